"""The backward half: a gradient added to that of a norm's input is added by the norm's backward.

    dx = rms_norm_backward(dy, x, ...)
    d  = other + dx

becomes ``add_rms_norm_backward`` with ``other`` for the sum's gradient: x is the sum, whoever made it.
It adds in float32 and rounds once, where two calls round twice. The stream that enters a block has such
a sum, since what made it lies in another region.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir, rewrite

_NORMS = ("rms_norm_backward", "rms_norm_roomy_backward")


def fold(half: fx.GraphModule) -> int:
    """Rewrite the backward half in place; tells how many sums are gone."""
    sums = half.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    return rewrite.each(half, sums, _folded)


def _folded(graph: fx.Graph, total: fx.Node) -> bool:
    if len(total.args) != 2 or total.kwargs:
        return False
    for dx, other in (total.args, reversed(total.args)):
        norm = _norm_of(dx, total)
        if norm is not None and _fits(other, total, norm):
            _replace(graph, total, norm, other)
            return True
    return False


def _norm_of(dx: Any, total: fx.Node) -> fx.Node | None:
    """The norm's backward of which ``dx`` is the first result, read by ``total`` alone."""
    if not isinstance(dx, fx.Node) or dx.target is not operator.getitem or dx.args[1] != 0:
        return None
    norm = dx.args[0]
    if ir.own_name(norm) not in _NORMS or set(dx.users) != {total}:
        return None
    assert isinstance(norm, fx.Node)
    rest = [n for n in norm.users if n is not dx]
    # d(weight) is made where the sum was: nobody may ask for it before.
    late = all(
        n.target is operator.getitem and all(u.op == "output" for u in n.users) for n in rest
    )
    return norm if late else None


def _fits(other: Any, total: fx.Node, norm: fx.Node) -> bool:
    """Whether the other operand is a gradient of the same kind as the norm's."""
    if not isinstance(other, fx.Node) or not ir.is_tensor(other):
        return False
    given = ir.named_arguments(norm)
    x, d, whole = (ir.value(n) for n in (given["x"], other, total))
    if not (given["need_x"] and x.dtype is d.dtype is whole.dtype):
        return False
    return tuple(d.shape) == tuple(x.shape) == tuple(whole.shape) and d.device == x.device


def _replace(graph: fx.Graph, total: fx.Node, norm: fx.Node, other: Any) -> None:
    given = ir.named_arguments(norm)
    with graph.inserting_before(total):
        new = graph.call_function(
            torch.ops.fusewright.add_rms_norm_backward.default,
            (
                given["dy"], other, given["x"], given["weight"], given["rstd"], given["offset"],
                given["cast"], True, False, given["need_weight"],
            ),
        )  # fmt: skip
        ir.describe(new, norm, norm.meta["val"])
        results = {n.args[1]: n for n in norm.users}
        for at, node in results.items():
            made = graph.call_function(operator.getitem, (new, at))
            made.meta = dict(node.meta)
            (total if at == 0 else node).replace_all_uses_with(made)
    graph.erase_node(total)
    for node in results.values():
        graph.erase_node(node)
    graph.erase_node(norm)
