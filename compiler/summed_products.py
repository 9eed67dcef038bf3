"""The backward half: the sum of two matrix products is taken by the second of them.

    dx = mm(dgate, Wgate) + mm(dup, Wup)      becomes      dx = mm(dgate, Wgate); dx.addmm_(dup, Wup)

That is the gradient of what several layers read. The product adds before it rounds, where three calls
round three times, and the sum's own pass over memory is gone. The first product's memory is the sum's,
so nobody else may read it. For halves that run as they are: Inductor has its own way to do this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir, rewrite

aten = torch.ops.aten
_VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def accumulate(half: fx.GraphModule) -> int:
    """Rewrite the half in place; tells how many sums are gone."""
    sums = half.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    return rewrite.each(half, sums, _accumulated)


def _accumulated(graph: fx.Graph, total: fx.Node) -> bool:
    if len(total.args) != 2 or total.kwargs or total.args[0] is total.args[1]:
        return False
    first, second = (_Part.of(v, total) for v in total.args)
    if first is None or second is None or not _alike(first, second, total):
        return False
    if second.product.target is not aten.mm.default:
        first, second = second, first
    if second.product.target is not aten.mm.default:
        return False
    with graph.inserting_before(total):
        product = graph.call_function(aten.addmm_.default, (first.product, *second.product.args))
        product.meta = dict(first.product.meta)
        ir.inherit_provenance(product, total)
        view = graph.call_function(aten.reshape.default, (product, *first.shape))
        view.meta = dict(total.meta)
    total.replace_all_uses_with(view if first.shape else product)
    graph.erase_node(total)
    for node in (*first.views, *second.views, second.product):
        graph.erase_node(node)
    if not first.shape:
        graph.erase_node(view)
    return True


class _Part:
    """A product and the views of it that a sum reads, the last one first."""

    def __init__(self, product: fx.Node, views: list[fx.Node]) -> None:
        self.product, self.views = product, views
        self.shape = views[0].args[1:2] if views else ()

    @classmethod
    def of(cls, node: Any, total: fx.Node) -> _Part | None:
        """None where it is no product, or somebody else reads it."""
        views: list[fx.Node] = []
        reader = total
        while isinstance(node, fx.Node) and set(node.users) == {reader}:
            if node.target in (aten.mm.default, aten.addmm_.default):
                return cls(node, views)
            if node.target not in _VIEWS:
                return None
            views.append(node)
            reader, node = node, node.args[0]
        return None


def _alike(first: _Part, second: _Part, total: fx.Node) -> bool:
    """Whether both products are matrices of one shape and dtype, which is the sum's."""
    a, b, whole = (ir.value(n) for n in (first.product, second.product, total))
    parts = [ir.value(n) for n in total.args]  # type: ignore[arg-type]
    same = all(tuple(p.shape) == tuple(whole.shape) and p.dtype is whole.dtype for p in parts)
    return same and tuple(a.shape) == tuple(b.shape) and a.device == b.device
