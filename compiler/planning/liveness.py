"""What is alive while a block's forward and backward run, value by value, for one choice of its cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fusewright.compiler import cut as cuts
from fusewright.compiler import ir
from fusewright.compiler.gated_backward import costs_nothing
from fusewright.compiler.planning.block import WHOLE, Block, Choice, Measure
from fusewright.compiler.planning.devices import Device
from fusewright.compiler.planning.work import Amounts
from fusewright.compiler.recompute import base

Numbers = dict[fx.Node, Amounts]


@dataclass(frozen=True)
class Schedule:
    """What one way of running a block does, whatever the sizes.

    Attributes:
        kept: whose memory is saved and would be free without.
        again: what runs a second time, and takes time.
        forward, backward: the calls in order, each with the values that are not needed after it.
    """

    kept: frozenset[fx.Node]
    again: tuple[fx.Node, ...]
    forward: tuple[tuple[fx.Node, tuple[fx.Node, ...]], ...]
    backward: tuple[tuple[fx.Node, tuple[fx.Node, ...]], ...]


def schedule(block: Block, choice: Choice) -> Schedule:
    """The schedule of a choice, worked out once."""
    known = block.schedules.get(choice.cut)
    if known is None:
        joint = block.joint
        kept = frozenset({base(n) for n in choice.cut.saved if ir.is_tensor(n)} - joint.free)
        again = tuple(
            n for n in choice.cut.recomputed if n in joint.required and not costs_nothing(n)
        )
        first = [n for n in joint.forward if n in joint.required]
        ran = set(choice.cut.recomputed or joint.forward)
        outside = kept | joint.free
        known = Schedule(kept, again, _ends(first, outside), _ends(_order(block, ran), outside))
        block.schedules[choice.cut] = known
    return known


def measure(block: Block, choice: Choice, device: Device, batch: int, sequence: int) -> Measure:
    """The cost of one way of running the block at one size."""
    if choice.away:
        return _away(block, choice, device, batch, sequence)
    if choice.tiled:
        assert block.tiling is not None
        return block.tiling.measure(choice, device, batch, sequence)
    numbers = block.numbers(batch, sequence)
    plan = schedule(block, choice)
    outside = plan.kept | block.joint.free
    saved = sum(_size(n, numbers) for n in plan.kept)
    seconds = sum(block.works[n].seconds(device, numbers[n]) for n in plan.again)
    forward = _peak(plan.forward, numbers, outside)
    if choice.name == WHOLE:
        # The forward runs once more, and cheap calls of it a third time: what it keeps is the peak.
        inner = measure(block, within(block), device, batch, sequence)
        alive = inner.saved - saved + inner.backward
        return Measure(saved, forward, alive, seconds + inner.seconds)
    return Measure(saved, forward, _peak(plan.backward, numbers, outside), seconds)


def within(block: Block) -> Choice:
    """How the graph inside of a checkpoint is cut: as without a budget."""
    if block.inner is None:
        block.inner = Choice("default", 0.0, cuts.minimum(block.joint))
    return block.inner


def _away(block: Block, choice: Choice, device: Device, batch: int, sequence: int) -> Measure:
    """What is saved in the host's memory: copies that take longer than the block are waited for."""
    cost = measure(block, dataclasses.replace(choice, away=False), device, batch, sequence)
    copied = cost.saved / device.host
    beside = forward_seconds(block, device, batch, sequence)
    back = backward_seconds(block, device, batch, sequence) + cost.seconds
    waited = max(0.0, copied - beside) + max(0.0, copied - back)
    return Measure(0.0, cost.forward, cost.backward, cost.seconds + waited, cost.saved)


def forward_seconds(block: Block, device: Device, batch: int, sequence: int) -> float:
    """Of the block's forward."""
    numbers = block.numbers(batch, sequence)
    return sum(
        block.works[n].seconds(device, numbers[n])
        for n in block.joint.forward
        if n in block.joint.required
    )


def backward_seconds(block: Block, device: Device, batch: int, sequence: int) -> float:
    """Of the block's backward, without what it runs again."""
    numbers = block.numbers(batch, sequence)
    required = block.joint.required
    return sum(block.works[n].seconds(device, numbers[n]) for n in block.nodes if n not in required)


def _size(node: fx.Node, numbers: Numbers) -> float:
    """Bytes that come to life with the node; an item of a tuple has its own, a view none."""
    if base(node) is not node or not ir.is_tensor(node):
        return 0.0
    return numbers[node].memory


def _order(block: Block, again: set[fx.Node]) -> list[fx.Node]:
    """The backward's calls, each second run just before its first reader."""
    forward = set(block.joint.forward)
    done: set[fx.Node] = set()
    order: list[fx.Node] = []
    for node in block.nodes:
        if node in forward or node.op == "placeholder":
            continue
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [i for i in top.all_input_nodes if i in again and i not in done]
            if top in done or not waiting:
                stack.pop()
                if top not in done:
                    done.add(top)
                    order.append(top)
            else:
                stack += waiting
    return order


def _ends(
    order: list[fx.Node], outside: frozenset[fx.Node]
) -> tuple[tuple[fx.Node, tuple[fx.Node, ...]], ...]:
    """The order with the values that end behind each call; ``outside`` are counted elsewhere."""
    made = set(order)
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(order):
        for read in (node, *node.all_input_nodes):
            last[base(read)] = i
    ends: dict[int, list[fx.Node]] = {}
    for node, i in last.items():
        if node in made and node not in outside:
            ends.setdefault(i, []).append(node)
    return tuple((node, tuple(ends.get(i, ()))) for i, node in enumerate(order))


def _peak(
    order: Iterable[tuple[fx.Node, tuple[fx.Node, ...]]],
    numbers: Numbers,
    outside: frozenset[fx.Node],
) -> float:
    """The most bytes alive at once, what a call needs while it runs included."""
    alive = most = 0.0
    for node, ended in order:
        alive += 0.0 if node in outside else _size(node, numbers)
        most = max(most, alive + numbers[node].passing)
        alive -= sum(_size(n, numbers) for n in ended)
    return most
