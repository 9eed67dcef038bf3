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

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusewright.kernels.launcher import current_stream
from fusewright.kernels.recording import (
    Alias,
    Condition,
    Fetched,
    Launch,
    Table,
    recorder,
    reinterpret,
)
from fusewright.runtime.direct import direct
from fusewright.runtime.origins import Origins, Unknown
from fusewright.runtime.program import Program
from fusewright.runtime.rule import picker
from fusewright.runtime.watch import Buffer, Operation, Watch

aten = torch.ops.aten
Call = Callable[..., Any]
Tensors = Sequence[torch.Tensor | None]


class Plan:
    """What to do again: ``run(tensors, pointers)`` of the tensor arguments gives the results.

    Both have an entry for each of them. ``here`` tells whether the plan's device is the current
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
    """Writes recorded steps down as a program of the origins so far."""

    def __init__(self, device: torch.device, given: Tensors) -> None:
        self.device, self.count = device, len(given)
        self.origins = Origins(given)
        self.program = Program()
        self.new = self.program.value(_allocator(device))
        self.streamed = False
        self.addressed = set(range(self.count))  # origins whose addresses are variables
        self.views: dict[Any, str] = {}

    def plan(self, steps: list[Any], out: Any) -> Plan:
        """The plan of these steps with the results ``out``."""
        writers: dict[type, Call] = {
            Launch: self._launch, Operation: self._operation, Buffer: self._buffer,
            Table: self._table, Fetched: self._fetched, Alias: lambda step: self.origins.alias(*step),
        }  # fmt: skip
        conditions = [found for s in steps if type(s) is Condition if (found := self._check(s))]
        conditions += self._twice()
        for step in steps:
            if type(step) is not Condition:
                writers[type(step)](step)
        results = self._results(out)
        given = range(self.count)
        run = self.program.function(given, given, results)
        return Plan(run, _presence(self.device), _all_of(conditions))

    def _made(self, t: torch.Tensor) -> str:
        """The variable of a new origin."""
        return f"t{self.origins.add(t)}"

    def _buffer(self, step: Buffer) -> None:
        (t,) = step
        if t.device != self.device:
            raise Unknown
        like = self.program.value((tuple(t.shape), t.stride(), t.dtype))
        name = self._made(t)
        self.program.line(f"{name} = {self.new}{like}", name)

    def _pointer(self, t: torch.Tensor | None) -> str:
        """Where a tensor begins, as an expression."""
        if t is None:
            return "None"
        origin, offset = self.origins.place(t)
        if origin not in self.addressed:
            self.addressed.add(origin)
            self.program.line(f"p{origin} = t{origin}.data_ptr()", f"p{origin}")
        return f"p{origin} + {offset}" if offset else f"p{origin}"

    def _launch(self, step: Launch) -> None:
        compiled, value = step.compiled, self.program.value
        if compiled is None:
            raise Unknown
        fixed = (compiled.function, compiled.packed_metadata, None, None, None)
        rest = step.numbers + step.constants
        given = [*map(self._pointer, step.tensors), *map(value, rest)]
        run, before, after, packed = direct(compiled.run, fixed, len(given))
        if not self.streamed:
            self.streamed = True
            index = -1 if self.device.index is None else self.device.index
            self.program.line(f"s = {value(current_stream)}({index})")
        if packed:
            given = [f"({', '.join(given)},)"]
        head = [*map(value, (*before, *step.grid, 1)), "s", *map(value, after)]
        self.program.line(f"{value(run)}({', '.join([*head, *given])})")

    def _operation(self, step: Operation) -> None:
        function, result = step.function, step.result
        if function is aten.zero_.default:
            if result.numel():
                self.program.line(f"{self._read(step.args[0])}.zero_()")
            return
        products = (aten.mm.out, aten.mm.default)
        name = self.program.value(torch.mm if function in products else function._op)
        named = [f"{k}={self._written(v)}" for k, v in step.kwargs.items()]
        call = f"{name}({', '.join([*map(self._written, step.args), *named])})"
        if isinstance(result, torch.Tensor) and not self.origins.knows(result):
            made = self._made(result)
            self.program.line(f"{made} = {call}", made)
        else:
            self.program.line(call)

    def _listed(self, values: Sequence[Any]) -> str:
        return ", ".join(map(self._written, values))

    def _written(self, value: Any) -> str:
        """An argument of an operation, in lists and tuples as it was."""
        if isinstance(value, torch.Tensor):
            return self._read(value)
        if type(value) is list:
            return f"[{self._listed(value)}]"
        return self.program.value(value)

    def _table(self, step: Table) -> None:
        value, known = self.program.value, _Tables(step.make)
        addresses = "".join(f"{self._pointer(t)}, " for t in step.tensors)
        origin = self.origins.add(step.table)
        self.addressed.add(origin)
        names = f"t{origin}", f"p{origin}"
        key = self.program.view()
        self.program.line(f"{key} = ({addresses})", key)
        look = f"{value(known.get)}({key}) or {value(known.put)}({key})"
        self.program.line(f"{', '.join(names)} = {look}", *names)

    def _fetched(self, step: Fetched) -> None:
        origin = self.origins.add(step.tensor)
        self.addressed.add(origin)
        names = f"t{origin}", f"p{origin}"
        self.program.line(f"{', '.join(names)} = {self.program.value(step.fetch)}()", *names)

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

    def _read(self, t: torch.Tensor) -> str:
        """The variable of a tensor's counterpart."""
        place = self.origins.place(t)
        origin = self.origins.tensors[place.origin]
        assert origin is not None
        if origin.dtype != t.dtype or place.offset % t.element_size():
            raise Unknown
        if not place.offset and origin.shape == t.shape and origin.stride() == t.stride():
            return f"t{place.origin}"
        seen = (tuple(t.shape), t.stride(), place.offset // t.element_size())
        name = self.views.get((place.origin, seen))
        if name is None:
            name = self.views[place.origin, seen] = self.program.view()
            given = ", ".join(map(self.program.value, seen))
            call = f"{self.program.value(reinterpret)}(t{place.origin}, {given})"
            self.program.line(f"{name} = {call}", name)
        return name

    def _results(self, out: Any) -> str:
        """The results, in tuples and lists as they were; None of what writes into its arguments."""
        if out is None:
            return "None"
        if isinstance(out, torch.Tensor):
            if self.origins.place(out).origin < self.count:
                raise Unknown  # an argument handed back
            return self._read(out)
        parts = "".join(f"{self._results(v)}, " for v in out)
        return f"[{parts}]" if type(out) is list else f"({parts})"


class _Tables(dict[tuple[int, ...], tuple[torch.Tensor, int]]):
    """Tables, and where they begin, by the addresses that they were made of."""

    def __init__(self, make: Callable[[tuple[int, ...]], torch.Tensor]) -> None:
        super().__init__()
        self.make = make

    def put(self, addresses: tuple[int, ...]) -> tuple[torch.Tensor, int]:
        if len(self) >= 1024:
            self.clear()
        made = self.make(addresses)
        found = self[addresses] = made, made.data_ptr()
        return found


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
