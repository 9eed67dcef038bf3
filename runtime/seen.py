"""Recognise arguments that were there before, by one question to PyTorch; admit new ones.

To write down the shape, strides, dtype and device of every tensor costs more than a launch. Dynamo's
guards compare all of them where they lie, dispatch keys and ``requires_grad`` included, in a tenth of
a microsecond a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    "List[float]": (list, tuple),
    "List[str]": (list, tuple),
    "List[Tensor]": (list, tuple),
    "List[Optional[Tensor]]": (list, tuple),
}


_PLAIN: dict[Any, bool] = {torch.Tensor: True, torch.nn.Parameter: True}


def is_plain(kind: type) -> bool:
    """Whether tensors of this type meet nothing of their own on the way to a kernel.

    So do parameters of a subclass that only carries more, such as a quantised weight's state; one
    that handles operators itself (``__torch_dispatch__``) does not.
    """
    found = _PLAIN.get(kind)
    if found is None:
        found = bool(
            issubclass(kind, torch.nn.Parameter)
            and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
            and not issubclass(kind, torch.nn.UninitializedParameter)
        )
        _PLAIN[kind] = found
    return found


class Seen(NamedTuple):
    """A signature as one question to PyTorch: do tensors agree with what they were?

    The tensors that ``present`` picks are asked about with ``agrees``; ``gaps`` are the places of the
    absent ones. ``constants`` are the values of the other arguments.
    """

    plan: Any
    constants: tuple[Any, ...]
    present: Call
    agrees: Call
    gaps: tuple[int, ...]


def seen(plan: Any, tensors: Sequence[torch.Tensor | None], constants: tuple[Any, ...]) -> Seen:
    """The signature of these arguments."""
    assert _guards is not None
    given = [t for t in tensors if t is not None]
    guard = _guards(
        *given,
        dynamic_dims_sizes=[list(t.shape) for t in given],
        dynamic_dims_strides=[list(t.stride()) for t in given],
    )
    present = picker([i for i, t in enumerate(tensors) if t is not None])
    gaps = tuple(i for i, t in enumerate(tensors) if t is None)
    kept = tuple([[*c] if type(c) is list else c for c in constants])
    return Seen(plan, kept, present, guard.check, gaps)


def admission(kinds: list[str], device: str) -> Callable[[tuple[Any, ...]], bool]:
    """Whether arguments are what a dispatcher would bring to the host function unconverted."""

    def admissible(values: tuple[Any, ...]) -> bool:
        for value, kind in zip(values, kinds, strict=True):
            if isinstance(value, torch.Tensor):
                if "Tensor" not in kind:
                    return False
                given: Sequence[Any] = [value]
            elif type(value) in _TYPES.get(kind, (type(value),)):
                given = value if "List[" in kind and "Tensor" in kind else []
            else:
                return False
            if any(t is not None and t.device.type != device for t in given):
                return False
        return True

    return admissible
