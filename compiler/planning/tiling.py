"""What a block costs whose tail runs in tiles of rows (``compiler/tiles.py``, ``runtime/tiles.py``).

From forward to backward such a block keeps what its first part saves and what the tail reads. Wide values
of the tail are there for one tile only; the gradients of what it reads are there whole. The tail's forward
runs once more, and 4-bit weights are dequantised for every tile.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import sympy
from torch import fx

from fusewright.compiler import cut as cuts
from fusewright.compiler import ir, tiles
from fusewright.compiler.planning import block as blocks
from fusewright.compiler.planning import liveness
from fusewright.compiler.planning.block import Block, Choice, Measure
from fusewright.compiler.planning.devices import Device
from fusewright.compiler.recompute import base


@dataclass(frozen=True)
class Tiling:
    """The two parts of a block.

    Attributes:
        first, tail: with formulas of their own; the tail's hold for one row of as many tokens as a tile.
        rows: per input of the tail that has rows, its node there, and its node among the first part's
            inputs, or None where the first part makes it.
    """

    first: Block
    tail: Block
    rows: tuple[tuple[fx.Node, fx.Node | None], ...]

    def plain(self, choice: Choice) -> Choice:
        """The choice as one of the first part alone."""
        return dataclasses.replace(choice, tiled=False, away=False)

    def added(self, choice: Choice) -> list[fx.Node]:
        """Inputs of the tail that are kept beside what the first part saves."""
        if choice.name == blocks.WHOLE:
            return []
        counted = {base(n) for n in choice.cut.saved if ir.is_tensor(n)} | self.first.joint.free
        return [t for t, outside in self.rows if outside is None or outside not in counted]

    def formula(self, choice: Choice) -> sympy.Expr:
        """Bytes that a choice saves, over ``batch`` and ``sequence``."""
        rows = blocks.BATCH * blocks.SEQUENCE
        total = self.first.formula(self.plain(choice))
        for node in self.added(choice):
            own = self.tail.works[node].memory.subs(self.tail.symbols)
            total += own.subs({blocks.BATCH: 1, blocks.SEQUENCE: rows})
        return sympy.expand(total)

    def measure(self, choice: Choice, device: Device, batch: int, sequence: int) -> Measure:
        """The cost at one size; what is offloaded is the caller's matter."""
        count = batch * sequence
        whole = self.tail.numbers(1, count)
        sizes = {t: whole[t].memory for t, _ in self.rows}
        made = sum(sizes[t] for t, outside in self.rows if outside is None)
        gradients = sum(sizes[t] for t, _ in self.rows if t not in self.tail.joint.free)
        cost = liveness.measure(self.first, self.plain(choice), device, batch, sequence)
        saved = cost.saved + sum(sizes[t] for t in self.added(choice))
        here = made if choice.name == blocks.WHOLE else 0.0
        tile = self.inside(device, tiles.tokens(count))
        result = sizes[self.rows[0][0]]
        behind = liveness.within(self.first) if choice.name == blocks.WHOLE else None
        kept = 0.0  # beside the saved, from the checkpoint's second run on
        if behind is not None:
            inner = liveness.measure(self.first, behind, device, batch, sequence)
            kept = max(inner.saved - cost.saved, 0.0)
        return dataclasses.replace(
            cost,
            saved=saved,
            forward=max(cost.forward + here, here + result + tile.forward),
            backward=here + gradients + max(kept + tile.backward, cost.backward),
            seconds=cost.seconds + self.repeated(device, count),
        )

    def inside(self, device: Device, tokens: int) -> Measure:
        """One tile: its forward without a graph, and its second one with its backward."""
        tail = self.tail
        kept = Choice(blocks.KEEP, 0.0, cuts.minimum(tail.joint, cuts.keep))
        cost = liveness.measure(tail, kept, device, 1, tokens)
        numbers = tail.numbers(1, tokens)
        trained = [n for n in tail.joint.forward if n.op == "placeholder"]
        trained = [n for n in trained if n not in tail.joint.free and n not in dict(self.rows)]
        sums = sum(numbers[n].memory for n in trained) * 2  # in float32, of 16-bit ones at most
        return Measure(cost.saved, cost.forward, cost.saved + cost.backward + sums, 0.0)

    def repeated(self, device: Device, count: int) -> float:
        """Seconds beyond a forward and a backward of the tail as a whole."""
        tokens = tiles.tokens(count)

        def spent(rows: int) -> tuple[float, float]:
            return (
                liveness.forward_seconds(self.tail, device, 1, rows),
                liveness.backward_seconds(self.tail, device, 1, rows),
            )

        (forward, backward), whole = spent(tokens), spent(count)
        return max(count / tokens * (2 * forward + backward) - sum(whole), 0.0)


def build(
    parts: tiles.Parts, traced: tuple[int, int], device: Device, sizes: tuple[int, int], over: bool
) -> Tiling | None:
    """The costs of a block's parts, and the choices of the first, in ``first.choices``.

    None where a part wants no gradient: it saves nothing then. ``over`` as in ``observed.observe``.
    """
    from fusewright.compiler.planning.observed import joint_of

    joints = joint_of(parts.first, over), joint_of(parts.tail, False)
    if joints[0] is None or joints[1] is None:
        return None
    first, tail = (
        Block(j, blocks.symbols_of(j, traced), joins=j is joints[0])
        for j in joints
        if j is not None
    )  # the tail's backward is autograd's
    first.choices = blocks.ways(first, device, sizes)
    inputs, outside = (
        [n for n in j.graph.find_nodes(op="placeholder") if "tangents" not in str(n.target)]
        for j in (tail.joint, first.joint)
    )
    rows = tuple(
        (inputs[i], outside[parts.sources[i][1]] if parts.sources[i][0] else None)
        for i in parts.rows
    )
    return Tiling(first, tail, rows)
