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
from fusewright.runtime.seen import POSSIBLE, Seen, admission, is_plain, seen

Call = Callable[..., Any]
_MOST = 1024  # signatures remembered of one host function, before all are forgotten
_RECENT, _LESSONS = 8, 64  # signatures that are asked first, and how often these may change
_pointer = torch.Tensor.data_ptr
_UNSEEN, _REFUSED = object(), object()
_NO_PLAN = (None, None, None)


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
    look = _looker(known, kinds, at, tensors_of, admission(kinds, device))

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
    constants_of = _constants(kinds, at)
    modes = torch._C._len_torch_dispatch_stack
    transforms = torch._C._are_functorch_transforms_active
    search = _searcher(known, admissible)
    recent: tuple[Seen, ...] = ()
    lessons = _LESSONS if POSSIBLE else 0

    def look(values: tuple[Any, ...]) -> tuple[Any, Any, Any] | None:
        nonlocal recent, lessons
        if modes() or transforms():
            return None
        tensors, constants = tensors_of(values), constants_of(values)
        for plan, expected, present, agrees, gaps in recent:
            if constants != expected:
                continue
            there = tensors
            if gaps:
                if any(tensors[i] is not None for i in gaps):
                    continue
                there = present(tensors)
            if agrees(*there):
                pointers: list[int | None] = [*map(_pointer, there)]
                bits = 0
                for pointer in pointers:
                    bits |= pointer  # type: ignore[operator]
                if bits & 15 or 0 in pointers:
                    break
                for gap in gaps:
                    pointers.insert(gap, None)
                return _ready(plan, tensors, pointers)
        out: tuple[Any, Any, Any] | None = search(values, tensors, constants)
        if lessons and out is not None and out[0] is not None:
            lessons -= 1
            recent = (seen(out[0], tensors, constants), *recent)[:_RECENT]
        return out

    return look


def _ready(plan: Plan, tensors: Sequence[Any], pointers: list[Any]) -> tuple[Any, Any, Any]:
    """What ``look`` gives for a plan, which may not be for here and now."""
    if hooked() or not (plan.here is None or plan.here()):
        return _NO_PLAN
    if plan.holds is not None and not plan.holds(tensors):
        return _NO_PLAN
    return plan, tensors, pointers


def _constants(kinds: list[str], at: tuple[int, ...]) -> Call:
    """A function that takes what is no tensor of the arguments, lengths of lists of tensors included."""
    constants_of = picker([i for i in range(len(kinds)) if i not in at])
    lists = [i for i in at if kinds[i].startswith("List[")]
    if not lists:
        return constants_of
    lists_of = picker(lists)
    return lambda values: (*constants_of(values), *map(len, lists_of(values)))


def _searcher(known: dict[Any, Any], admissible: Call) -> Call:
    """``look`` by the whole signature, where neither modes nor transforms are active."""

    def search(
        values: tuple[Any, ...], tensors: Sequence[Any], constants: tuple[Any, ...]
    ) -> tuple[Any, Any, Any] | None:
        bits = 0
        signature: list[Any] = []
        pointers: list[int | None] = []
        for t in tensors:
            if t is None:
                signature.append(None)
                pointers.append(None)
                continue
            if not is_plain(type(t)) or t.is_neg():
                return None
            pointer = t.data_ptr()
            if not pointer and t.numel():
                return None  # zeros that autograd made of nothing, or memory that was taken back
            bits |= pointer
            pointers.append(pointer)
            signature += (t.shape, t.stride(), t.dtype, t.device)
        try:
            key = (*signature, *[tuple(c) if type(c) is list else c for c in constants])
            plan = known.get(key, _UNSEEN)
        except TypeError:  # a constant without a hash is none that a schema asks for
            return None
        if plan.__class__ is Plan:
            return _NO_PLAN if bits & 15 else _ready(plan, tensors, pointers)
        if not admissible(values):
            return None
        return None, tensors, None if plan is _REFUSED or bits & 15 else key

    return search


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
