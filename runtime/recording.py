"""Record what a host function does with its tensors, and make of it a function that does it again.

The function runs once under a dispatch mode that sees every operation, while its launches write
themselves down. Each tensor that is launched, operated on or returned is traced to an argument or to
a buffer made on the way, by its storage, and to the place in there. What is repeated are allocations,
launches and a list of operations whose results depend on their operands alone; anything else (a value
read back, a random number) and every tensor of unknown origin leave nothing to repeat.

What a function looks at besides shapes, strides, dtypes and constants it says itself
(``fusewright.kernels.recording``), as conditions that are checked before each repetition.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fusewright.kernels.launcher import current_stream
from fusewright.kernels.recording import Alias, Condition, Launch, Table, recorder, reinterpret
from fusewright.runtime.direct import direct
from fusewright.runtime.origins import Origins, Place, Unknown
from fusewright.runtime.rule import picker
from fusewright.runtime.watch import Buffer, Operation, Watch

aten = torch.ops.aten
Call = Callable[..., Any]
Tensors = Sequence[torch.Tensor | None]


class Plan:
    """What to do again: ``run(tensors, pointers)`` of the tensor arguments gives the results.

    Both are lists that ``run`` appends to. ``here`` tells whether the plan's device is the current
    one, where there are several; ``holds(tensors)``, where there are conditions, whether all of them
    hold. ``kept`` is for whoever needs more of the signature; it begins as None.
    """

    __slots__ = ("here", "holds", "kept", "run")

    def __init__(self, run: Call, here: Call | None, holds: Call | None) -> None:
        self.run, self.here, self.holds = run, here, holds
        self.kept: Any = None


def record(host: Call, values: tuple[Any, ...], given: Tensors) -> tuple[Any, Plan | None]:
    """Run ``host(*values)``, whose tensors are ``given``; its results and its plan, if it has one."""
    steps: list[Any] = []
    watch = Watch(steps)
    recorder.steps = steps
    try:
        with watch:
            out = host(*values)
    finally:
        recorder.steps = None
    device = next(t.device for t in given if t is not None)
    if watch.strange is not None:
        return out, None
    try:
        return out, _Writer(device, given).plan(steps, out)
    except Unknown:
        return out, None


class _Writer:
    """Turns recorded steps into functions of (tensors, pointers) of the origins so far."""

    def __init__(self, device: torch.device, given: Tensors) -> None:
        self.device, self.count = device, len(given)
        self.origins = Origins(given)
        self.none = self.origins.add(None)  # what absent tensors are launched as
        self.new = _allocator(device)

    def plan(self, steps: list[Any], out: Any) -> Plan:
        """The plan of these steps with the results ``out``."""
        writers: dict[type, Call] = {
            Launch: self._launch, Operation: self._operation,
            Table: self._table,
        }  # fmt: skip
        conditions = [found for s in steps if type(s) is Condition if (found := self._check(s))]
        conditions += self._twice()
        program = []
        for kind, group in itertools.groupby(steps, type):
            if kind is Buffer:
                program.append(self._buffers(list(group)))
                continue
            for step in group:
                if kind is Alias:
                    self.origins.alias(*step)
                elif kind is not Condition:
                    program.append(writers[kind](step))
        results = self._results(out)

        def run(tensors: list[Any], pointers: list[Any]) -> Any:
            tensors.append(None)
            pointers.append(None)
            for step in program:
                step(tensors, pointers)
            return results(tensors)

        return Plan(run, _presence(self.device), _all_of(conditions))

    def _buffers(self, steps: list[Buffer]) -> Call:
        """Allocations that follow each other."""
        new, made = self.new, []
        for (t,) in steps:
            if t.device != self.device:
                raise Unknown
            self.origins.add(t)
            made.append((tuple(t.shape), t.stride(), t.dtype))

        def allocate(tensors: list[Any], pointers: list[Any]) -> None:
            for size, stride, dtype in made:
                buffer = new(size, stride, dtype)
                tensors.append(buffer)
                pointers.append(buffer.data_ptr())

        return allocate

    def _launch(self, step: Launch) -> Call:
        compiled = step.compiled
        if compiled is None:
            raise Unknown
        absent = Place(self.none, 0)
        places = [absent if t is None else self.origins.place(t) for t in step.tensors]
        fixed = (compiled.function, compiled.packed_metadata, None, None, None)
        rest = step.numbers + step.constants
        run, before, after, packed = direct(compiled.run, fixed, len(places) + len(rest))
        before += (*step.grid, 1)
        index = -1 if self.device.index is None else self.device.index
        if not any(p.offset for p in places):
            pick = picker([p.origin for p in places])

            def launch(tensors: list[Any], pointers: list[Any]) -> None:
                run(*before, current_stream(index), *after, *pick(pointers), *rest)

            def launch_packed(tensors: list[Any], pointers: list[Any]) -> None:
                run(*before, current_stream(index), *after, pick(pointers) + rest)

            return launch_packed if packed else launch
        # Behind what there is stand the addresses inside of it.
        inside = tuple(dict.fromkeys(p for p in places if p.offset))
        total = len(self.origins.tensors)
        choose = picker([total + inside.index(p) if p.offset else p.origin for p in places])

        def launch_inside(tensors: list[Any], pointers: list[Any]) -> None:
            found = [*pointers, *[pointers[o] + offset for o, offset in inside]]
            given = choose(found) + rest
            if packed:
                run(*before, current_stream(index), *after, given)
            else:
                run(*before, current_stream(index), *after, *given)

        return launch_inside

    def _operation(self, step: Operation) -> Call:
        flat, spec = pytree.tree_flatten((step.args, step.kwargs))
        reads = [self._read(v) if isinstance(v, torch.Tensor) else None for v in flat]
        function, fresh = step.function._op, False
        if isinstance(step.result, torch.Tensor) and not self.origins.knows(step.result):
            self.origins.add(step.result)
            fresh = True

        def operate(tensors: list[Any], pointers: list[Any]) -> None:
            found = [v if r is None else r(tensors) for r, v in zip(reads, constants, strict=True)]
            args, kwargs = pytree.tree_unflatten(found, spec)
            out = function(*args, **kwargs)
            if fresh:
                tensors.append(out)
                pointers.append(out.data_ptr())

        constants = [None if isinstance(v, torch.Tensor) else v for v in flat]
        if step.function is aten.mm.out or step.function is aten.mm.default:
            return self._product(step, reads, fresh)
        if step.function is aten._assert_async.msg:
            return _assertion(reads[0], str(constants[1]))
        return operate

    def _product(self, step: Operation, reads: list[Any], fresh: bool) -> Call:
        """A matrix product, which most of the time is the only operation there is."""
        left, right, *out = reads
        mm = torch.mm
        if fresh:

            def multiply(tensors: list[Any], pointers: list[Any]) -> None:
                made = mm(left(tensors), right(tensors))
                tensors.append(made)
                pointers.append(made.data_ptr())

            return multiply
        (into,) = out

        def multiply_into(tensors: list[Any], pointers: list[Any]) -> None:
            mm(left(tensors), right(tensors), out=into(tensors))

        return multiply_into

    def _table(self, step: Table) -> Call:
        places = [self.origins.place(t) for t in step.tensors]
        self.origins.add(step.table)
        make, known = step.make, _Tables()

        def look(tensors: list[Any], pointers: list[Any]) -> None:
            addresses = tuple([pointers[o] + offset for o, offset in places])
            found = known.get(addresses)
            if found is None:
                found = known.put(addresses, make(addresses))
            tensors.append(found)
            pointers.append(found.data_ptr())

        return look

    def _check(self, step: Condition) -> Call | None:
        """A condition as a function of the arguments; None where it is on what is made here."""
        places = []
        for t in step.tensors:
            if not self.origins.knows(t):
                return None
            places.append(self.origins.place(t))
        if any(p.offset for p in places):
            raise Unknown
        pick, check = picker([p.origin for p in places]), step.check
        return lambda tensors: check(*pick(tensors))

    def _twice(self) -> list[Call]:
        """That arguments which were one tensor are one."""
        first: dict[int, int] = {}
        pairs = []
        for at, t in enumerate(self.origins.tensors):
            if t is not None and (other := first.setdefault(id(t), at)) != at:
                pairs.append((other, at))
        if not pairs:
            return []
        return [lambda ts: all(ts[i].data_ptr() == ts[j].data_ptr() for i, j in pairs)]

    def _read(self, t: torch.Tensor) -> Call:
        """A function that gives a tensor's counterpart among the origins."""
        place = self.origins.place(t)
        origin = self.origins.tensors[place.origin]
        assert origin is not None
        at = place.origin
        if origin.dtype != t.dtype or place.offset % t.element_size():
            raise Unknown
        if not place.offset and origin.shape == t.shape and origin.stride() == t.stride():
            return lambda tensors: tensors[at]
        size, stride, offset = tuple(t.shape), t.stride(), place.offset // t.element_size()
        return lambda tensors: reinterpret(tensors[at], size, stride, offset)

    def _results(self, out: Any) -> Call:
        """A function that gives the results, in tuples and lists as they were."""
        if isinstance(out, torch.Tensor):
            return self._result(out)
        if type(out) is list:
            entries = [self._results(v) for v in out]
            return lambda tensors: [e(tensors) for e in entries]
        parts = [self._results(v) for v in out]
        if all(isinstance(v, torch.Tensor) for v in out):
            whole = [self._whole(v) for v in out]
            if None not in whole:
                return picker([w for w in whole if w is not None])
        return lambda tensors: tuple([p(tensors) for p in parts])

    def _result(self, t: torch.Tensor) -> Call:
        if self.origins.place(t).origin < self.count:
            raise Unknown  # an argument handed back
        return self._read(t)

    def _whole(self, t: torch.Tensor) -> int | None:
        """Which origin a result is, if it is all of it."""
        place = self.origins.place(t)
        origin = self.origins.tensors[place.origin]
        assert origin is not None
        alike = origin.shape == t.shape and origin.stride() == t.stride()
        return place.origin if alike and origin.dtype == t.dtype and not place.offset else None


def _assertion(read: Call | None, message: str) -> Call:
    assert read is not None
    return lambda tensors, pointers: torch._assert_async(read(tensors), message)


class _Tables(dict[tuple[int, ...], torch.Tensor]):
    """Tables by the addresses that they were made of."""

    def put(self, addresses: tuple[int, ...], made: torch.Tensor) -> torch.Tensor:
        if len(self) >= 1024:
            self.clear()
        self[addresses] = made
        return made


def _all_of(conditions: list[Call]) -> Call | None:
    if not conditions:
        return None

    def holds(tensors: list[Any]) -> bool:
        for true in conditions:
            if not true(tensors):
                return False
        return True

    return holds


def _presence(device: torch.device) -> Callable[[], bool] | None:
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return None
    current, index = torch._C._cuda_getDevice, device.index
    return lambda: current() == index


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
