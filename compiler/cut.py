"""The cheapest set of values to save: a minimum cut of the forward between its inputs and its backward.

Every value v becomes an edge v_in -> v_out whose capacity is the memory that saving it keeps alive.
On the cut's source side lies what the forward has computed, on the sink's what the backward must
have, and what is on the sink's side with its input is computed there once more:

    source -> v_in    what running v a second time costs; infinite where it must not
    v_in   -> v_out   bytes of v's memory; infinite where v is a view (its base is saved instead)
    v_out  -> u_in    infinite: who runs u needs v
    v_out  -> sink    infinite: the backward reads v
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import networkx as nx
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.gated_backward import costs_nothing
from fusewright.compiler.joint import Joint
from fusewright.compiler.recompute import (
    base,
    is_cheap,
    is_symbol,
    is_view,
    moved,
    repeatable,
    storage_bytes,
)

# How many bytes may be moved again for one byte that is not saved. At 3.8 TB/s and 6 bytes a GiB costs
# at most 1.7 ms of a step; the gated unit moves 3, a norm 2, a rotation of both heads 2.
MOVED_PER_SAVED = 6.0
_SYMBOL = 1e-3

Price = Callable[[fx.Node], float | None]


@dataclass(frozen=True)
class Cut:
    """What is saved and what runs again.

    Attributes:
        saved: values that the forward hands to the backward, inputs among them.
        recomputed: calls that run again in the backward.
    """

    saved: tuple[fx.Node, ...]
    recomputed: tuple[fx.Node, ...]

    def bytes(self, joint: Joint) -> int:
        """Bytes of memory that the saved values keep alive and that would be free without them."""
        bases = {base(n) for n in self.saved if ir.is_tensor(n)} - joint.free
        return sum(storage_bytes(ir.value(b)) for b in bases if ir.is_tensor(b))

    def moved(self) -> int:
        """Bytes that the second runs read and write."""
        return sum(moved(n) for n in self.recomputed if not costs_nothing(n))


def charge(node: fx.Node) -> float | None:
    """The price of a second run in bytes saved; None where there must be none."""
    if not is_cheap(node):
        return None
    return 0.0 if costs_nothing(node) else moved(node) / MOVED_PER_SAVED


def keep(node: fx.Node) -> float | None:
    """As ``charge``, where nothing that takes time runs twice."""
    cheap = is_view(node) or is_symbol(node) or (is_cheap(node) and moved(node) == 0)
    return 0.0 if cheap or costs_nothing(node) else None


def minimum(joint: Joint, price: Price = charge) -> Cut:
    """The cut of least saved bytes plus price of what runs again."""
    if not joint.needed:
        return Cut((), ())
    net = nx.DiGraph()
    net.add_node("source")
    net.add_node("sink")
    place = {node: i for i, node in enumerate(joint.forward)}
    for node, i in place.items():
        cost = _cost(node, joint, price)
        _edge(net, "source", (i, 0), cost)
        _edge(net, (i, 0), (i, 1), _weight(node, joint))
        if node in joint.needed:
            net.add_edge((i, 1), "sink")
        for user in node.users:
            if user in place:
                net.add_edge((i, 1), (place[user], 0))
    _, (available, _) = nx.minimum_cut(net, "source", "sink")
    saved, again = [], []
    for node, i in place.items():
        if (i, 0) not in available:
            again.append(node)
        elif (i, 1) not in available:
            saved.append(node)
    return Cut(tuple(saved), tuple(again))


def _cost(node: fx.Node, joint: Joint, price: Price) -> float | None:
    if node.op != "call_function":
        return None
    if node not in joint.required and repeatable(node):
        return 0.0  # the backward alone runs it
    return price(node)


def _edge(net: nx.DiGraph, start: object, end: object, capacity: float | None) -> None:
    """An edge; without a capacity it is never cut."""
    if capacity is None:
        net.add_edge(start, end)
    else:
        net.add_edge(start, end, capacity=capacity)


def _weight(node: fx.Node, joint: Joint) -> float | None:
    """Bytes that saving the node keeps alive; None where it cannot be saved, or its base is."""
    if is_symbol(node):
        return _SYMBOL
    if not ir.is_tensor(node):
        return None
    if is_view(node):
        return None
    if node in joint.free:
        return 0.0
    return float(storage_bytes(ir.value(node)))
