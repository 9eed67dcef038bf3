"""Repeat what a host function did, where everything that it could look at is as it was.

Of some 29 microseconds that a host function takes, the launch takes 5. The rest is checks, strides,
tiles and allocations that follow from the arguments' shapes, strides, dtypes, device and constants.
So a call that was seen with the same ones before is not computed again: its *plan* allocates the
same buffers and launches the same compiled kernels on the new pointers.

A plan is a recording, and what cannot be recorded is not guessed. The second call with one signature
runs under a dispatch mode that sees every operation: buffers, views of them, launches and the
assertion on a device are understood; anything else (a copy of strided rows, a matrix product, a value
read back) and every pointer of unknown origin leave that signature to the host function for good.
A host function may look at one thing besides the signature, how its pointers are aligned; so plans
are for pointers at multiples of 16 bytes, as kernels are specialised, and others take the function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.kernels.launcher import Launch, current_stream, hooked, recorder
from fusewright.runtime.direct import direct
from fusewright.runtime.rule import picker
from fusewright.runtime.seen import POSSIBLE, Seen, admission, seen

aten = torch.ops.aten
Call = Callable[..., Any]
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_MOST = 1024  # signatures remembered of one host function, before all are forgotten
_RECENT, _LESSONS = 4, 64  # signatures that are asked first, and how often these may change
_pointer = torch.Tensor.data_ptr
_UNSEEN, _REFUSED = object(), object()
_BUFFERS = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
_VIEWS = frozenset(
    {
        aten.alias.default,
        aten.as_strided.default,
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)


class _Assertion(NamedTuple):
    """An assertion on the device, of a tensor and its message."""

    tensor: torch.Tensor
    message: str


class _Watch(TorchDispatchMode):
    """Writes down what a host function does; ``strange`` is the first thing that is not understood."""

    def __init__(self, steps: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps = steps
        self.buffers: list[torch.Tensor] = []
        self.strange: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _BUFFERS:
            self.buffers.append(out)
        elif func is aten._assert_async.msg:
            self.steps.append(_Assertion(*args))
        elif func not in _VIEWS:
            self.strange = self.strange or str(func)
        return out


class Plan:
    """What to do again: ``run`` maps the pointers of the tensor arguments to the results.

    ``kept`` is for whoever needs more of the signature; it begins as None. ``here`` tells whether the
    plan's device is the current one, where there are several.
    """

    __slots__ = ("here", "kept", "run")

    def __init__(self, run: Call, here: Callable[[], bool] | None) -> None:
        self.run, self.here = run, here
        self.kept: Any = None


class _Unknown(Exception):
    """A recording has a tensor that comes from nowhere."""


class _Slots:
    """Numbers the pointers of a recording: arguments, buffers, None, and places inside of either.

    What a function gets from torch.empty is another object than what the mode saw, on the same
    storage; arguments are the objects they were, and several may share a storage.
    """

    def __init__(self, given: Sequence[torch.Tensor | None], buffers: list[torch.Tensor]) -> None:
        self.given, self.buffers = given, buffers
        self.none = len(given) + len(buffers)
        self.inside: list[tuple[int, int]] = []

    def of(self, t: torch.Tensor | None) -> int:
        """The slot of a launched tensor."""
        if t is None:
            return self.none
        for at, other in enumerate(self.given):
            if other is t:
                return at
        around = [
            at
            for at, other in enumerate((*self.given, *self.buffers))
            if other is not None and _storage(other) == _storage(t)
        ]
        if len(around) != 1:
            raise _Unknown
        origin = (*self.given, *self.buffers)[around[0]]
        assert origin is not None
        offset = t.data_ptr() - origin.data_ptr()
        if not offset:
            return around[0]
        self.inside.append((around[0], offset))
        return self.none + len(self.inside)

    def buffer(self, t: torch.Tensor) -> int:
        """Which buffer a whole tensor is."""
        for at, other in enumerate(self.buffers):
            if _storage(other) == _storage(t):
                if _layout(other) != _layout(t):
                    break
                return at
        raise _Unknown


def _storage(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _layout(t: torch.Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype, t.storage_offset()


def plan_of(watch: _Watch, given: Sequence[torch.Tensor | None], out: Any) -> Plan | None:
    """The plan of what was recorded with the tensor arguments ``given``; None if there is none."""
    device = next(t.device for t in given if t is not None)
    if watch.strange is not None or any(b.device != device for b in watch.buffers):
        return None
    slots = _Slots(given, watch.buffers)
    try:
        if isinstance(out, torch.Tensor):
            results: Call = _one_of(slots.buffer(out))
        else:
            results = picker([slots.buffer(t) for t in out])
        return Plan(_repeat(device, watch.steps, slots, results), _presence(device))
    except _Unknown:
        return None


def _one_of(at: int) -> Call:
    return lambda buffers: buffers[at]


def _presence(device: torch.device) -> Callable[[], bool] | None:
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return None
    current, index = torch._C._cuda_getDevice, device.index
    return lambda: current() == index


def _launch(step: Launch, slots: _Slots) -> tuple[Any, ...]:
    """A launch: (function, what comes before the stream, after it, pointers' picker, rest, packed)."""
    compiled = step.compiled
    if compiled is None:
        raise _Unknown
    pick = picker([slots.of(t) for t in step.tensors])
    rest = step.numbers + step.constants
    fixed = (compiled.function, compiled.packed_metadata, None, None, None)
    way = direct(compiled.run, fixed, len(step.tensors) + len(rest))
    return way.launch, (*way.before, *step.grid, 1), way.after, pick, rest, way.packed


def _assertion(step: _Assertion, slots: _Slots) -> Call:
    at, message = slots.buffer(step.tensor), step.message
    return lambda buffers: torch._assert_async(buffers[at], message)


def _allocator(device: torch.device) -> Call:
    """(sizes, strides, dtype) to a tensor on the current device of this type.

    Inductor's own way to make buffers takes a third of the time of torch.empty_strided.
    """
    quick: Call | None = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if quick is not None:
        return quick
    return lambda sizes, strides, dtype: torch.empty_strided(
        sizes, strides, dtype=dtype, device=device
    )


def _repeat(device: torch.device, steps: list[Any], slots: _Slots, results: Call) -> Call:
    """The function that a plan runs; ``pointers`` is a list that it may append to."""
    sizes = [(tuple(b.shape), b.stride(), b.dtype) for b in slots.buffers]
    launches = [_launch(s, slots) for s in steps if isinstance(s, Launch)]
    assertions = [_assertion(s, slots) for s in steps if isinstance(s, _Assertion)]
    new, inside = _allocator(device), slots.inside
    index = -1 if device.index is None else device.index

    def run(pointers: list[Any]) -> Any:
        buffers = []
        for size, stride, dtype in sizes:
            b = new(size, stride, dtype)
            buffers.append(b)
            pointers.append(b.data_ptr())
        pointers.append(None)
        for at, offset in inside:
            pointers.append(pointers[at] + offset)
        stream = current_stream(index)
        for launch, before, after, pick, rest, packed in launches:
            if packed:
                launch(*before, stream, *after, pick(pointers) + rest)
            else:
                launch(*before, stream, *after, *pick(pointers), *rest)
        for check in assertions:  # of the last values: a buffer is written once
            check(buffers)
        return results(buffers)

    return run


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
    at = tuple(i for i, k in enumerate(kinds) if k in ("Tensor", "Optional[Tensor]"))
    tensors_of = picker(at)
    look = _looker(known, kinds, at, admission(kinds, device))

    def settle(found: tuple[Any, Any], values: tuple[Any, ...]) -> Any:
        plan, rest = found
        if plan is not None:
            return plan.run(rest)
        if rest is None:
            return host(*values)
        if rest in known:
            return _record(host, values, tensors_of(values), known, rest)
        out = host(*values)  # shapes that never come again are not worth a recording
        if len(known) >= _MOST:
            known.clear()
        known[rest] = None
        return out

    def call(*values: Any) -> Any:
        found = look(values)
        return host(*values) if found is None else settle(found, values)

    return Planned(look, settle, call, at)


def _looker(
    known: dict[Any, Any], kinds: list[str], at: tuple[int, ...], admissible: Call
) -> Callable[[tuple[Any, ...]], tuple[Any, Any] | None]:
    """``Planned.look``: gives (plan, pointers), or (None, the signature to learn), or (None, None)."""
    modes = torch._C._len_torch_dispatch_stack
    transforms = torch._C._are_functorch_transforms_active
    search = _searcher(known, kinds, at, admissible)
    recent: tuple[Seen, ...] = ()
    lessons = _LESSONS if POSSIBLE else 0

    def look(values: tuple[Any, ...]) -> tuple[Any, Any] | None:
        nonlocal recent, lessons
        if modes() or transforms():
            return None
        for plan, present, agrees, others, expected, gaps in recent:
            if others(values) == expected and agrees(*(there := present(values))):
                found: list[int | None] = [*map(_pointer, there)]
                bits = 0
                for pointer in found:
                    bits |= pointer  # type: ignore[operator]
                if bits & 15 or 0 in found or hooked() or not (plan.here is None or plan.here()):
                    break
                for gap in gaps:
                    found.insert(gap, None)
                return plan, found
        out = search(values)
        if lessons and out is not None and out[0] is not None:
            lessons -= 1
            recent = (seen(out[0], values, at), *recent)[:_RECENT]
        return out

    return look


def _searcher(
    known: dict[Any, Any], kinds: list[str], at: tuple[int, ...], admissible: Call
) -> Callable[[tuple[Any, ...]], tuple[Any, Any] | None]:
    """``look`` by the whole signature, where neither modes nor transforms are active."""
    tensors_of, constants_of = picker(at), picker([i for i in range(len(kinds)) if i not in at])
    lists = any(k.startswith("List[") for k in kinds)

    def search(values: tuple[Any, ...]) -> tuple[Any, Any] | None:
        bits = 0
        signature: list[Any] = []
        pointers: list[int | None] = []
        for t in tensors_of(values):
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
            constants = tuple(tuple(c) if type(c) is list else c for c in constants)
        try:
            key = (*signature, *constants)
            plan = known.get(key, _UNSEEN)
        except TypeError:  # a constant without a hash is none that a schema asks for
            return None
        if plan.__class__ is Plan:
            if bits & 15 or hooked() or (plan.here is not None and not plan.here()):
                return None, None
            return plan, pointers
        if not admissible(values):
            return None
        return None, None if plan is _REFUSED or bits & 15 else key

    return search


def _record(
    host: Call, values: tuple[Any, ...], given: Sequence[Any], known: dict[Any, Any], key: Any
) -> Any:
    """Run the host function and make its plan, unless two arguments cannot be told apart."""
    there = [id(t) for t in given if t is not None]
    if len(set(there)) < len(there) or recorder.launches is not None:
        return host(*values)
    steps: list[Any] = []
    watch = _Watch(steps)
    recorder.launches = steps
    try:
        with watch:
            out = host(*values)
    finally:
        recorder.launches = None
    plan = plan_of(watch, given, out)
    known[key] = _REFUSED if plan is None else plan
    return out
