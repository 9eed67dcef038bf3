"""A residual sum and its RMS normalisation: s = x + e, y = rms_norm(s); both are handed out.

Anchor: a ``rms_norm`` node of ours, put there by the pattern before, that normalises the sum of two
tensors of one shape and dtype. The norm's parameters and casting mode are taken over as they are.
Other uses of the sum read the one that the kernel writes. Backward: kernels/add_rms_norm.py.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.compiler.prove import Candidate, Rounder
from fusewright.compiler.rewrite import call, item

aten = torch.ops.aten


class AddRMSNorm:
    """See the module's docstring."""

    name = "add_rms_norm"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Norms of a sum of two tensors."""
        norm = torch.ops.fusewright.rms_norm.default
        return (n for n in ir.calls(graph) if ir.is_call(n, norm) and _sum_of_two(n.args[0]))

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """The one claim about the norm at ``anchor``."""
        total: Any = anchor.args[0]
        x, residual = ir.operands(total)
        if ir.shape(x) != ir.shape(residual) or ir.dtype(x) != ir.dtype(residual):
            raise Refused("the operands of the sum differ in shape or dtype")
        rows = [u for u in anchor.users if ir.is_call(u, operator.getitem) and u.args[1] == 0]
        if len(rows) != 1 or len(anchor.users) != 1:
            raise Refused("the norm's statistics are used")
        yield _candidate(anchor, total, rows[0], x, residual)


def _sum_of_two(node: Any) -> bool:
    """Whether the node adds two tensors, neither of them scaled."""
    if not ir.is_call(node, aten.add.Tensor) or node.kwargs:
        return False
    return len(node.args) == 2 and all(ir.is_floating(a) for a in node.args)


def _candidate(
    norm: fx.Node, total: fx.Node, y: fx.Node, x: fx.Node, residual: fx.Node
) -> Candidate:
    weight, eps, offset, cast, out_dtype = (ir.argument(norm, i) for i in range(1, 6))
    nodes = frozenset({norm, y, total})
    kept = any(u not in nodes for u in total.users)

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        s = t["x"] + t["residual"]
        out = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
        out = out if t["weight"] is None else out * (offset + t["weight"])
        return [out, s] if kept else [out]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        args = (read["x"], read["residual"], read["weight"], eps, offset, cast, out_dtype)
        both = call(graph, torch.ops.fusewright.add_rms_norm.default, args, y)
        return [item(graph, both, at) for at in range(2 if kept else 1)]

    return Candidate(
        nodes=nodes,
        inputs={"x": x, "residual": residual, "weight": weight},
        outputs=(y, total) if kept else (y,),
        formula=formula,
        emit=emit,
        params={"eps": eps, "offset": offset, "weight": weight is not None, "dim": ir.last(x)},
        cast=cast,
        scaled=("x", "residual"),
        kernel="add_rms_norm",
    )
