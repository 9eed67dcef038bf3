"""Who moves a step's bytes and does its FLOPs: the sites of each family, and the rest.

Costs are those of compiler/cost.py, before and after rewriting, for one instance of a region. What
no pattern took is kept apart by kind: matrix products and attention run at their library's speed and
nobody claims them; pointwise work is what is left on the table.

A step's time is not known without a device. Shares of it are made with the one number that decides
which of the two a kernel waits for, FLOPs or bytes: the device's balance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fusewright.compiler.cost import Cost, GraphCost, measure
from fusewright.compiler.records import GraphRecord

# FLOPs per byte: 690 TFLOP/s of bf16 products over 4.2 TB/s of copy, both measured on an H200.
BALANCE = 165.0

PRODUCTS, ATTENTION, OTHER = "matrix products", "attention", "pointwise and other"
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass
class Share:
    """A part of a step: its cost as captured and as rewritten.

    ``weight`` is its time as captured, in bytes at copy speed.
    """

    before: Cost = field(default_factory=Cost)
    after: Cost = field(default_factory=Cost)
    weight: float = 0.0

    def __add__(self, other: Share) -> Share:
        return Share(
            self.before + other.before, self.after + other.after, self.weight + other.weight
        )

    def times(self, n: int) -> Share:
        """The share of n instances."""
        return Share(self.before.times(n), self.after.times(n), self.weight * n)

    def as_dict(self) -> dict[str, int]:
        """The report's keys; a rewrite does the same FLOPs."""
        return {
            "flops": self.before.flops,
            "bytes": self.before.bytes,
            "bytes_after": self.after.bytes,
            "saved_bytes": self.before.saved,
            "saved_bytes_after": self.after.saved,
        }


@dataclass(frozen=True)
class Shares:
    """One instance of a region: per match, per miss, and what neither of them covers.

    ``unavailable`` says why there are no costs, "" where there are.
    """

    matches: list[Share]
    misses: list[Share]
    rest: dict[str, Share]
    unavailable: str = ""

    @property
    def total(self) -> Share:
        """The whole region. Missed sites are part of the rest."""
        return sum((*self.matches, *self.rest.values()), Share())


def of_record(record: GraphRecord) -> Shares:
    """The shares of one captured graph, worked out once."""
    if record.shares is None:
        record.shares = _shares(record)
    found: Shares = record.shares
    return found


def library_calls(record: GraphRecord) -> int:
    """How often the code itself calls the library's attention."""
    graph = record.canonical.graph if record.canonical is not None else None
    return len(graph.find_nodes(op="call_function", target=_ATTENTION)) if graph else 0


def _shares(record: GraphRecord) -> Shares:
    nothing = [Share() for _ in record.matches], [Share() for _ in record.misses]
    if record.canonical is None:
        why = record.failure or "its parts under a checkpoint are compiled one by one"
        return Shares(*nothing, {}, why)
    runs_rewritten = bool(record.matches) and not record.failure
    kept = _kept(record.canonical, record.rewritten) if record.rewritten is not None else None
    before = measure(record.canonical, kept)
    after = measure(record.rewritten, kept) if runs_rewritten else before
    why = before.unavailable or after.unavailable
    if why:
        return Shares(*nothing, {}, why)
    return _divide(record, before, after, runs_rewritten)


def _divide(
    record: GraphRecord, before: GraphCost, after: GraphCost, runs_rewritten: bool
) -> Shares:
    taken: set[str] = set()
    matches = []
    for i, match in enumerate(record.matches):
        names = {n.name for n in match.candidate.nodes} - taken
        taken |= names
        share = _share(before, names)
        if runs_rewritten:
            share.after = after.of(record.made[i])
        matches.append(share)
    misses = [_share(before, miss.nodes - taken) for miss in record.misses]
    rest: defaultdict[str, Share] = defaultdict(Share)
    kinds = _kinds(record.canonical.graph, before)
    made = frozenset().union(*record.made) if runs_rewritten else taken
    for name in before.nodes.keys() - taken:
        rest[kinds.get(name, OTHER)] += _share(before, {name}, None)
    for name in after.nodes.keys() - made:
        rest[kinds.get(name, OTHER)] += Share(after=after.nodes[name])
    return Shares(matches, misses, dict(rest))


def _share(before: GraphCost, names: Iterable[str], after: Any = "before") -> Share:
    cost = before.of(names)
    weight = sum(_weight(before.nodes[n]) for n in names if n in before.nodes)
    return Share(cost, Cost() if after is None else cost, weight)


def _weight(cost: Cost) -> float:
    return max(cost.flops / BALANCE, float(cost.bytes))


def _kinds(graph: fx.Graph, costs: GraphCost) -> dict[str, str]:
    kinds = {}
    for node in graph.nodes:
        if node.target is _ATTENTION:
            kinds[node.name] = ATTENTION
        elif node.name in costs.nodes and costs.nodes[node.name].flops:
            kinds[node.name] = PRODUCTS
    return kinds


def _kept(canonical: fx.GraphModule, rewritten: fx.GraphModule) -> list[int]:
    """Places of the outputs that both graphs give; a deferred one is None in the rewritten."""
    (before,), (after,) = (g.graph.output_node().args for g in (canonical, rewritten))
    pairs = zip(_flat(before), _flat(after), strict=False)
    return [i for i, (a, b) in enumerate(pairs) if a is not None and b is not None]


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
