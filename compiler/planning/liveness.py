"""What is alive while a block's forward and backward run, value by value, for one choice of its cut."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from fusewright.compiler import cut as cuts
from fusewright.compiler import ir
from fusewright.compiler.gated_backward import costs_nothing
from fusewright.compiler.planning import gated
from fusewright.compiler.planning.block import WHOLE, Block, Choice, Measure
from fusewright.compiler.planning.devices import Device
from fusewright.compiler.planning.work import Amounts
from fusewright.compiler.recompute import base, is_view
from fusewright.runtime import offload

Numbers = dict[fx.Node, Amounts]


class Moment(NamedTuple):
    """A call with its results, and the values that are not needed after it."""

    nodes: tuple[fx.Node, ...]
    ended: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Schedule:
    """What one way of running a block does, whatever the sizes.

    Attributes:
        kept: whose memory is saved and would be free without.
        again: what runs a second time, and takes time.
        results: what the forward makes for others, which is there from then on.
        keeps: whether the hidden states that the block reads are saved, counted among ``kept`` or not.
        forward, backward: the calls in order.
    """

    kept: frozenset[fx.Node]
    again: tuple[fx.Node, ...]
    results: frozenset[fx.Node]
    keeps: bool
    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]


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
        results = frozenset(n for n in joint.free if n.op == "call_function")
        keeps = block.stream is not None and block.stream in map(base, choice.cut.saved)
        known = Schedule(
            kept,
            again,
            results,
            keeps,
            _ends(first, frozenset(), kept | joint.free, gated.forward(block.units)),
            _ends(_order(block, ran), kept, joint.free, gated.backward(block.units, ran)),
        )
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
    sizes = [_size(n, numbers) for n in plan.kept]
    seconds = sum(block.works[n].seconds(device, numbers[n]) for n in plan.again)
    stream = 0.0 if block.stream is None else numbers[block.stream].memory
    counted, free = block.stream in plan.kept, block.stream in block.joint.free
    cost = Measure(
        sum(sizes),
        _peak(plan.forward, numbers, outside - plan.results, {}),
        0.0,
        seconds,
        small=sum(s for s in sizes if s < offload.LEAST),
        stream=stream if counted else 0.0,
        held=0.0 if counted or (free and not plan.keeps) else stream,
    )
    if choice.name == WHOLE:
        # The forward runs once more, and cheap calls of it a third time: what it keeps is the peak.
        inner = measure(block, within(block), device, batch, sequence)
        alive = inner.saved - cost.saved + max(inner.forward, inner.backward)
        return dataclasses.replace(cost, backward=alive, seconds=seconds + inner.seconds)
    passing: dict[fx.Node, float] = {}
    for unit in block.units:
        if unit.value in choice.cut.recomputed:
            passing |= unit.passing(numbers, device.limits)
    return dataclasses.replace(cost, backward=_peak(plan.backward, numbers, outside, passing))


def within(block: Block) -> Choice:
    """How the graph inside of a checkpoint is cut: as without a budget."""
    if block.inner is None:
        block.inner = Choice("default", 0.0, cuts.minimum(block.joint))
    return block.inner


def _away(block: Block, choice: Choice, device: Device, batch: int, sequence: int) -> Measure:
    """What is saved in the host's memory: copies that take longer than the block are waited for.

    Small values stay on the device.
    """
    cost = measure(block, dataclasses.replace(choice, away=False), device, batch, sequence)
    free = block.stream in block.joint.free
    gone = cost.saved - cost.small + (cost.held if free else 0.0)
    copied = gone / device.host
    beside = forward_seconds(block, device, batch, sequence)
    back = backward_seconds(block, device, batch, sequence) + cost.seconds
    waited = max(0.0, copied - beside) + max(0.0, copied - back)
    held = 0.0 if free else cost.held + cost.stream  # a leaf of autograd's is held by its graph
    return dataclasses.replace(
        cost, saved=cost.small, seconds=cost.seconds + waited, away=gone, stream=0.0, held=held
    )


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
    """The backward's calls, each second run just before its first reader.

    A gated unit's op has what all of its calls read before it begins, and does not run h again.
    """
    forward = set(block.joint.forward)
    reads = gated.backward(block.units, again)
    done = {u.value for u in block.units if u.value in again}
    order: list[fx.Node] = []
    for node in block.nodes:
        if node in forward or node.op == "placeholder":
            continue
        stack = [node]
        while stack:
            top = stack[-1]
            read = reads.get(top, top.all_input_nodes)
            waiting = [i for i in read if i in again and i not in done]
            if top in done or not waiting:
                stack.pop()
                if top not in done:
                    done.add(top)
                    order.append(top)
            else:
                stack += waiting
    return order


def _ends(
    order: list[fx.Node],
    given: frozenset[fx.Node],
    outside: frozenset[fx.Node],
    reads: Mapping[fx.Node, list[fx.Node]],
) -> tuple[Moment, ...]:
    """The order as moments: a call with all of its results, and the values that end behind it.

    Args:
        given: values of before that end with their last reader.
        outside: what is counted elsewhere for all the time.
        reads: of calls that stand for a joined op, what that has in its hands.
    """
    calls: dict[fx.Node, list[fx.Node]] = {}
    for node in order:
        if _call(node) not in calls:
            calls[node] = [node, *_results(node)]
    made = given.union(*calls.values())
    last: dict[fx.Node, int] = {}
    for i, nodes in enumerate(calls.values()):
        for read in (*nodes, *reads.get(nodes[0], nodes[0].all_input_nodes)):
            last[base(read)] = i
    ends: dict[int, list[fx.Node]] = {}
    for node, i in last.items():
        if node in made and node not in outside:
            ends.setdefault(i, []).append(node)
    return tuple(
        Moment(tuple(nodes), tuple(ends.get(i, ()))) for i, nodes in enumerate(calls.values())
    )


def _call(result: fx.Node) -> fx.Node:
    """The call whose result, or item of a list among its results, the node is."""
    while result.target is operator.getitem and not is_view(result):
        result = ir.argument(result, 0)
    return result


def _results(call: fx.Node) -> list[fx.Node]:
    """The call's results that are read, and the items of lists among them."""
    found = [n for n in call.users if n.target is operator.getitem and not is_view(n)]
    return [n for result in found for n in (result, *_results(result))]


def _peak(
    order: Iterable[Moment],
    numbers: Numbers,
    outside: frozenset[fx.Node],
    passing: Mapping[fx.Node, float],
) -> float:
    """The most bytes alive at once beyond those ``outside`` that are there at the beginning.

    What a call needs while it runs is included: its own, or that of the op that stands for it.
    """
    alive = most = 0.0
    for (call, *results), ended in order:
        alive += sum(_size(n, numbers) for n in (call, *results) if n not in outside)
        most = max(most, alive + passing.get(call, numbers[call].passing))
        alive -= sum(_size(n, numbers) for n in ended)
    return most
