"""Put a graph's nodes back in an order in which every input comes before its users.

A rewrite that joins calls can leave users before what they read. They are moved down, everything else
stays in place; the random numbers that a graph draws keep their order, or nothing is moved.
"""

from __future__ import annotations

import heapq
import itertools

from torch import fx

from fusewright.compiler import ir


def restore(graph: fx.Graph) -> bool:
    """Reorder in place; False, with nothing moved, where no order keeps the graph's effects."""
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    if all(position[i] < position[n] for n in nodes for i in n.all_input_nodes):
        return True
    wanted = _sorted(nodes, position)
    if wanted is None or _effects(wanted) != _effects(nodes):
        return False
    for before, node in itertools.pairwise(wanted):
        before.append(node)
    return True


def _sorted(nodes: list[fx.Node], position: dict[fx.Node, int]) -> list[fx.Node] | None:
    """A topological order that prefers the old one; None if there is a cycle."""
    missing = {n: len(set(n.all_input_nodes)) for n in nodes}
    ready = [position[n] for n in nodes if not missing[n]]
    heapq.heapify(ready)
    out = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        out.append(node)
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, position[user])
    return out if len(out) == len(nodes) else None


def _effects(nodes: list[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if n.op != "call_function" or ir.has_effect(n)]
