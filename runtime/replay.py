"""Repeat what a host function did, where everything that it could look at is as it was.

Of some 29 microseconds that a host function takes, the launch takes 5. The rest is checks, strides,
tiles and allocations that follow from the arguments' shapes, strides, dtypes, device and constants.
So a call that was seen with the same ones before is not computed again: its *plan* allocates the
same buffers, launches the same compiled kernels on the new pointers and repeats the same products.

A plan is a recording (``recording``), made at the second call with one signature, and what cannot be
recorded is not guessed: it leaves that signature to the host function for good. A host function may
look at one thing besides the signature, how its pointers are aligned; so plans are for pointers at
multiples of 16 bytes, as kernels are specialised, and others take the function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fusewright.kernels.launcher import hooked
from fusewright.kernels.recording import recorder
from fusewright.runtime.recording import Plan, record
from fusewright.runtime.rule import picker

Call = Callable[..., Any]
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_MOST = 1024  # signatures remembered of one host function, before all are forgotten
_UNSEEN, _REFUSED = object(), object()
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


class Planned(NamedTuple):
    """A host function with its plans.

    ``look`` maps the arguments to what is known of them, or to None where the host function may not
    be called past the dispatcher: a mode or a transform is active, a tensor is of a subclass or of
    another device, or a constant is not of its schema's type. ``settle`` takes both and returns the
    results. ``call`` is the two together, for arguments that the dispatcher has brought; ``tensors``
    are the positions of the tensors among them.
    """

    look: Call
    settle: Call
    call: Call
    tensors: tuple[int, ...]


def planned(host: Call, schema: Any, device: str = "cuda") -> Planned:
    """``host``, the function that ``schema``'s operator has registered for ``device``."""
    known: dict[Any, Any] = {}
    kinds = [str(a.real_type) for a in schema.arguments]
    at = tuple(i for i, k in enumerate(kinds) if "Tensor" in k)
    nested = any("List[" in kinds[i] for i in at)
    tensors_of = _flattened(at) if nested else picker(at)
    look = _looker(known, kinds, at, tensors_of, _admission(kinds, device))

    def settle(found: tuple[Any, Any, Any], values: tuple[Any, ...]) -> Any:
        plan, tensors, rest = found
        if plan is not None:
            return plan.run(tensors, rest)
        if rest is None:
            return host(*values)
        if rest in known:
            return _record(host, values, tensors, known, rest, nested)
        out = host(*values)  # shapes that never come again are not worth a recording
        if len(known) >= _MOST:
            known.clear()
        known[rest] = None
        return out

    def call(*values: Any) -> Any:
        found = look(values)
        return host(*values) if found is None else settle(found, values)

    return Planned(look, settle, call, at)


def _flattened(at: tuple[int, ...]) -> Call:
    """A function that takes the values at these positions, those of lists one by one."""

    def flattened(values: tuple[Any, ...]) -> list[Any]:
        flat: list[Any] = []
        for i in at:
            value = values[i]
            if value.__class__ is list or value.__class__ is tuple:
                flat.extend(value)
            else:
                flat.append(value)
        return flat

    return flattened


def _looker(
    known: dict[Any, Any], kinds: list[str], at: tuple[int, ...], tensors_of: Call, admissible: Call
) -> Callable[[tuple[Any, ...]], tuple[Any, Any, Any] | None]:
    """``Planned.look``: gives (plan, tensors, pointers), or without a plan the signature to learn."""
    constants_of = picker([i for i in range(len(kinds)) if i not in at])
    lists = any(k.startswith("List[") for i, k in enumerate(kinds) if i not in at)
    counted = tuple(i for i in at if kinds[i].startswith("List["))
    modes = torch._C._len_torch_dispatch_stack
    transforms = torch._C._are_functorch_transforms_active

    def look(values: tuple[Any, ...]) -> tuple[Any, Any, Any] | None:
        if modes() or transforms():
            return None
        bits = 0
        signature: list[Any] = [len(values[i]) for i in counted]
        pointers: list[int | None] = []
        tensors = tensors_of(values)
        for t in tensors:
            if t is None:
                signature.append(None)
                pointers.append(None)
                continue
            if type(t) not in _PLAIN or t.is_neg():
                return None
            pointer = t.data_ptr()
            if not pointer and t.numel():
                return None  # zeros that autograd made of nothing, or memory that was taken back
            bits |= pointer
            pointers.append(pointer)
            signature += (t.shape, t.stride(), t.dtype, t.device)
        constants = constants_of(values)
        if lists:
            constants = tuple([tuple(c) if type(c) is list else c for c in constants])
        try:
            key = (*signature, *constants)
            plan = known.get(key, _UNSEEN)
        except TypeError:  # a constant without a hash is none that a schema asks for
            return None
        if plan.__class__ is Plan:
            if bits & 15 or hooked() or (plan.here is not None and not plan.here()):
                return None, None, None
            tensors = list(tensors)
            if plan.holds is not None and not plan.holds(tensors):
                return None, None, None
            return plan, tensors, pointers
        if not admissible(values):
            return None
        return None, tensors, None if plan is _REFUSED or bits & 15 else key

    return look


def _admission(kinds: list[str], device: str) -> Callable[[tuple[Any, ...]], bool]:
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


def _record(
    host: Call,
    values: tuple[Any, ...],
    given: Sequence[Any],
    known: dict[Any, Any],
    key: Any,
    nested: bool,
) -> Any:
    """Run the host function and make its plan.

    Not so where two arguments are one tensor, since a plan for that serves nobody else; but lists
    often have one tensor several times, and then always.
    """
    there = [id(t) for t in given if t is not None]
    if recorder.steps is not None or (not nested and len(set(there)) < len(there)):
        return host(*values)
    out, plan = record(host, values, given)
    known[key] = _REFUSED if plan is None else plan
    return out
