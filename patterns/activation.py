"""Activations of plain, ungated layers: y = f(x) between two projections.

Anchor: the last of two or more pointwise calls that together are a nonlinear function of one tensor,
where the result feeds a projection (through views, casts and dropout). What f is, is read off the graph
as for gated units: a known name, or text with the derivative that sympy finds.

When it helps. Eager runs one pass for each call of a spelled-out activation: the tanh form of GELU by
hand has eight calls, moves 17 elements for each one forward and more backward, and keeps six; the op
reads one and writes one, backward reads two and writes one, and keeps its input alone. A single call of
the library (gelu, silu, relu) already moves and keeps just that, so it is left alone, and no row of the
report says so. Inductor fuses such a chain as well as the op does. Where the result is not a
projection's input, as in a softcap before a mask and a softmax, it would also fuse it with what follows,
which an op of its own prevents: such chains are left alone, and so is every score that chooses experts.
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
from fusewright.compiler.rewrite import call
from fusewright.patterns import symbolic
from fusewright.patterns.pointwise import Reader, Reading
from fusewright.patterns.written import activation_of, applied

aten = torch.ops.aten

_CURVED = (
    symbolic.sigmoid, symbolic.tanh, symbolic.erf, symbolic.softplus, symbolic.relu,
    symbolic.expm1, symbolic.where, symbolic.since, symbolic.magnitude, symbolic.least,
    symbolic.most,
)  # fmt: skip
_PASSED = (aten.dropout.default, operator.getitem, *ir.VIEWS, *ir.IDENTITIES, *ir.CASTS)
_DEEPEST = 6


class Activation:
    """See the module's docstring."""

    name = "activation"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """The last call of each chain that is worth an op."""
        reader, inside = Reader(), set[fx.Node]()
        for node in reversed(list(ir.calls(graph))):
            if node in inside or not ir.is_floating(node) or ir.last(node) == 1:
                continue
            reading = reader.read(node)
            if len(reading.nodes) + len(_results(node)) < 2 or not _is_activation(reading):
                continue
            inside |= reading.nodes
            if _feeds_projections(node):
                yield node

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """Claims about the chain, from its narrowest input first."""
        if len(ir.shape(anchor)) < 2:
            raise Refused("a vector, not rows")
        whole = Reader().read(anchor)
        shared = frozenset(
            n for n in whole.nodes if n is not anchor and any(u not in whole.nodes for u in n.users)
        )
        refusal = None
        for reading in dict.fromkeys((whole, Reader(shared).read(anchor))):
            if len(reading.nodes) + len(_results(anchor)) < 2 or not _is_activation(reading):
                continue
            try:
                activation = activation_of(reading)
            except Refused as reason:
                refusal = reason
                continue
            for out in (*_results(anchor), anchor):
                yield _claim(reading, activation, out)
        if refusal is not None:
            raise refusal


def _results(node: fx.Node) -> list[fx.Node]:
    """The cast that is all that reads the node, if it is one."""
    return [u for u in node.users if ir.is_cast(u)] if len(node.users) == 1 else []


def _is_activation(reading: Reading) -> bool:
    return not reading.is_linear and symbolic.safe(reading.expression).has(*_CURVED)


def _feeds_projections(node: fx.Node, depth: int = 0) -> bool:
    """Whether all that reads the node contracts it, or hands it out of the region."""
    return depth < _DEEPEST and all(_contracts(user, depth) for user in node.users)


def _contracts(user: fx.Node, depth: int) -> bool:
    if user.op == "output":
        return True
    name = getattr(user.target, "__name__", str(user.target)).partition(".")[0]
    if "linear" in name or name.endswith("mm") or "matmul" in name or "norm" in name:
        return True
    if getattr(user.target, "namespace", "") == "fusewright" or "grouped_mm" in name:
        return True
    return ir.is_call(user, *_PASSED) and _feeds_projections(user, depth + 1)


def _claim(reading: Reading, activation: str, out: fx.Node) -> Candidate:
    out_dtype = ir.dtype(out)

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        return [applied(activation, t["x"])]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        op = torch.ops.fusewright.activation.default
        return [call(graph, op, (read["x"], activation, out_dtype), out)]

    return Candidate(
        reading.nodes | {out}, {"x": reading.root}, (out,), formula, emit,
        {"activation": activation}, cast="output", scaled=("x",), kernel="activation",
    )  # fmt: skip
