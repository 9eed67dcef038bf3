"""One kind of block: its joint graph with formulas, and the ways to run it that are worth having."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
from torch import fx

from fusewright.compiler import cut as cuts
from fusewright.compiler import ir, tiles
from fusewright.compiler.joint import Joint
from fusewright.compiler.planning import gated, work
from fusewright.compiler.planning import price as price_
from fusewright.compiler.planning.devices import Device
from fusewright.compiler.planning.work import Amounts
from fusewright.compiler.recompute import base

if TYPE_CHECKING:
    from fusewright.compiler.planning.liveness import Schedule
    from fusewright.compiler.planning.tiling import Tiling

BATCH, SEQUENCE = sympy.symbols("batch sequence", positive=True, integer=True)
KEEP, WHOLE = "keep", "whole block"
_HIGHEST, _LOWEST, _DEPTH = 4e13, 1e9, 4  # bytes of memory per second of recompute


@dataclass(frozen=True)
class Measure:
    """One way of running a block at one size: what it costs.

    Attributes:
        saved: bytes kept on the device from its forward to its backward.
        forward, backward: bytes that are alive for the time of its forward or backward beyond what is
            saved, at the worst moment.
        seconds: of what is run again, and of what is waited for.
        away: bytes that are in the host's memory from its forward to its backward; around these two
            they are on the device, and those of its neighbour with them.
        small: of ``saved``, in pieces that stay on the device if the rest does not.
        stream: of ``saved``, the hidden states that the block reads.
        held: bytes of these that stay on the device, if they do, and are not in ``saved``. Of all blocks
            but the first they are what the block before has made.
    """

    saved: float
    forward: float
    backward: float
    seconds: float
    away: float = 0.0
    small: float = 0.0
    stream: float = 0.0
    held: float = 0.0

    @property
    def most(self) -> float:
        """Bytes at the block's worst moment, what it saves included."""
        return self.saved + 2 * self.away + max(self.forward, self.backward)


@dataclass(frozen=True)
class Choice:
    """One way of running a block.

    Attributes:
        name: for people.
        price: bytes of memory that a second is worth: what the cut was made with; 0 for the whole
            block from its input, infinity where nothing runs again.
        cut: what is saved and what runs again.
        away: whether what is saved is in the host's memory until the backward.
        tiled: whether the block's tail runs in tiles of rows; the cut is then of what comes before it.
    """

    name: str
    price: float
    cut: cuts.Cut
    away: bool = False
    tiled: bool = False

    @property
    def label(self) -> str:
        """The name, with where the saved values wait and what runs in tiles."""
        return self.name + ", tiled" * self.tiled + ", offloaded" * self.away


@dataclass
class Block:
    """A kind of block, seen once and repeated.

    Attributes:
        joint: its joint graph.
        symbols: what each symbol of the graph is: ``BATCH``, ``SEQUENCE``, or a number.
        choices: the front, from the fastest to the smallest; behind it that of those with tiles.
        tiling: its parts, where its tail can run in tiles.
        joins: whether its backward is compiled as a half, in which gated units are joined.
        schedules, inner: what is worked out once (see ``liveness``).
        units: those that are joined.
        stream: the input with the hidden states.
        tables: other inputs that grow with the batch or the sequence and want no gradient.
    """

    joint: Joint
    symbols: dict[Any, Any]
    choices: list[Choice] = field(default_factory=list)
    tiling: Tiling | None = None
    joins: bool = True
    schedules: dict[cuts.Cut, Schedule] = field(default_factory=dict)
    inner: Choice | None = None

    def __post_init__(self) -> None:
        self.nodes = [n for n in self.joint.graph.nodes if n.op != "output"]
        self.works = {n: work.of(n) for n in self.nodes}
        self.units = gated.units(self.joint) if self.joins else ()
        inputs = [n for n in self.joint.forward if n.op == "placeholder" and self._grows(n)]
        # The largest: tables of rotations are as long, and a head wide.
        self.stream = max(inputs, key=lambda n: int(ir.traced(ir.value(n).shape[-1])), default=None)
        self.tables = [n for n in inputs if n is not self.stream and n in self.joint.free]
        self._evaluate = self._compiled()

    def _grows(self, node: fx.Node) -> bool:
        """Whether it is a tensor of rows: no parameter, and no mask, whose memory is a guess."""
        value = ir.value(node)
        if not ir.is_tensor(node) or value.dim() != 3 or not value.is_floating_point():
            return False
        return bool(self.works[node].memory.subs(self.symbols).free_symbols)

    def _compiled(self) -> Callable[[int, int], Sequence[float]]:
        flat = [e.subs(self.symbols) for w in self.works.values() for e in w.formulas]
        function: Callable[[int, int], Sequence[float]] = sympy.lambdify(
            (BATCH, SEQUENCE), flat, "math"
        )
        return function

    def numbers(self, batch: int, sequence: int) -> dict[fx.Node, Amounts]:
        """What the formulas of each node come to."""
        flat = self._evaluate(batch, sequence)
        step = len(Amounts._fields)
        found = [Amounts(*flat[i : i + step]) for i in range(0, len(flat), step)]
        return dict(zip(self.works, found, strict=True))

    def usable(self, batch: int, sequence: int) -> list[Choice]:
        """The choices for a batch: tiles where there are rows for more than one."""
        return [c for c in self.choices if not c.tiled or tiles.worth(batch * sequence)]

    def formula(self, choice: Choice) -> sympy.Expr:
        """Bytes that a choice saves, over ``batch`` and ``sequence``."""
        if choice.tiled:
            assert self.tiling is not None
            return self.tiling.formula(choice)
        bases = {base(n) for n in choice.cut.saved if ir.is_tensor(n)} - self.joint.free
        total = sum((self.works[b].memory for b in bases), sympy.Integer(0))
        return sympy.expand(total.subs(self.symbols))


def symbols_of(joint: Joint, sizes: tuple[int, int]) -> dict[Any, Any]:
    """What each symbol of a graph that was traced at (batch, sequence) = ``sizes`` stands for."""
    known: dict[Any, Any] = {}
    named = {sizes[1]: SEQUENCE, sizes[0]: BATCH}
    for size in work.sizes(joint.graph):
        for symbol in size.node.expr.free_symbols:
            hint = ir.traced_symbol(size, symbol)
            known[symbol] = named.get(hint, hint)
    return known


def build(joint: Joint, traced: tuple[int, int], device: Device, sizes: tuple[int, int]) -> Block:
    """The block of a joint graph, traced at one (batch, sequence), with its front at another."""
    block = Block(joint, symbols_of(joint, traced))
    block.choices = front(block, _with_host(ways(block, device, sizes), device), device, sizes)
    return block


def tile(block: Block, tiling: Tiling, device: Device, sizes: tuple[int, int]) -> None:
    """Add the ways to run the block's tail in tiles to a block."""
    block.tiling = tiling
    more = [dataclasses.replace(c, tiled=True) for c in tiling.first.choices]
    block.choices += front(block, _with_host(more, device), device, sizes)


def _with_host(found: list[Choice], device: Device) -> list[Choice]:
    """The choices and, where values can be moved there, their twins in the host's memory."""
    return found + [dataclasses.replace(c, away=True) for c in found if device.host]


def ways(block: Block, device: Device, sizes: tuple[int, int]) -> list[Choice]:
    """Cuts of a block at all prices, from keeping everything to a checkpoint around it."""
    joint = block.joint
    numbers = block.numbers(*sizes)

    def seconds(node: fx.Node) -> float:
        return block.works[node].seconds(device, numbers[node])

    def at(price: float) -> Choice:
        found = cuts.minimum(joint, price_.cost(price, block.works.__getitem__, seconds))
        heavy = [n for n in found.recomputed if numbers[n].flops and n in joint.required]
        some = [n for n in found.recomputed if numbers[n].moved and n in joint.required]
        plural = "s" if len(heavy) > 1 else ""
        name = f"pointwise and {len(heavy)} product{plural}" if heavy else "pointwise"
        return Choice(name if some else KEEP, price, found)

    ends = at(_HIGHEST), at(_LOWEST)
    found = [Choice(KEEP, math.inf, cuts.minimum(joint, cuts.keep)), *ends]
    _between(*ends, at, found, _DEPTH)
    found.append(whole(joint))
    return found


def _between(
    high: Choice, low: Choice, at: Callable[[float], Choice], found: list[Choice], depth: int
) -> None:
    """Cuts at prices between two, where those differ."""
    if depth == 0 or set(high.cut.saved) == set(low.cut.saved):
        return
    middle = at(math.sqrt(high.price * low.price))
    found.append(middle)
    _between(high, middle, at, found, depth - 1)
    _between(middle, low, at, found, depth - 1)


def whole(joint: Joint) -> Choice:
    """Everything again from the block's inputs, as a gradient checkpoint runs it."""
    inputs = tuple(n for n in joint.forward if n.op == "placeholder")
    calls = tuple(n for n in joint.forward if n.op == "call_function" and n in joint.required)
    return Choice(WHOLE, 0.0, cuts.Cut(inputs, calls))


def front(
    block: Block, found: Sequence[Choice], device: Device, sizes: tuple[int, int]
) -> list[Choice]:
    """Those choices that no other beats in time and in memory at every moment, the fastest first."""
    from fusewright.compiler.planning.liveness import measure

    measured = [(measure(block, c, device, *sizes), c) for c in found]
    measured.sort(key=lambda pair: (pair[0].seconds, pair[0].saved, pair[0].backward))
    kept: list[tuple[Measure, Choice]] = []
    for cost, choice in measured:
        # What is alive while other layers run, while this one does, and in the host's memory.
        if all(
            cost.saved < k.saved or cost.most < k.most or cost.saved + cost.away < k.saved + k.away
            for k, _ in kept
        ):
            kept.append((cost, choice))
    return [choice for _, choice in kept]
