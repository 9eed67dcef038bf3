"""Recognise arguments that were there before, by one question to PyTorch; admit new ones.

To write down the shape, strides, dtype and device of every tensor costs more than a launch. Dynamo's
guards compare all of them where they lie, dispatch keys and ``requires_grad`` included, in a tenth of
a microsecond a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fusewright.runtime.rule import picker

Call = Callable[..., Any]
_guards = getattr(torch._C._dynamo.guards, "TensorGuards", None)
POSSIBLE = _guards is not None
_TYPES = {
    "Tensor": (torch.Tensor,),
    "Optional[Tensor]": (torch.Tensor, torch.nn.Parameter, type(None)),
    "float": (float,),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "List[int]": (list, tuple),
}


class Seen(NamedTuple):
    """A signature as one question to PyTorch: do tensors agree with what they were?

    The tensors that ``present`` picks are asked about with ``agrees``; the constants and the absent
    tensors, which ``others`` picks, are compared; ``gaps`` are the absent ones' places among the
    tensors.
    """

    plan: Any
    present: Call
    agrees: Call
    others: Call
    expected: tuple[Any, ...]
    gaps: tuple[int, ...]


def seen(plan: Any, values: tuple[Any, ...], at: tuple[int, ...]) -> Seen:
    """The signature of these arguments, of which those ``at`` are tensors or None."""
    assert _guards is not None
    there = [i for i in at if values[i] is not None]
    tensors = [values[i] for i in there]
    guard = _guards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    )
    others = picker([i for i in range(len(values)) if i not in there])
    gaps = tuple(n for n, i in enumerate(at) if values[i] is None)
    return Seen(plan, picker(there), guard.check, others, others(values), gaps)


def admission(kinds: list[str], device: str) -> Callable[[tuple[Any, ...]], bool]:
    """Whether arguments are what a dispatcher would bring to the host function unconverted."""

    def admissible(values: tuple[Any, ...]) -> bool:
        for value, kind in zip(values, kinds, strict=True):
            if isinstance(value, torch.Tensor):
                if value.device.type != device or "Tensor" not in kind:
                    return False
            elif type(value) not in _TYPES.get(kind, (type(value),)):
                return False
        return True

    return admissible
