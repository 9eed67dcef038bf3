"""Layer normalisation: y = (x - m) / sqrt(mean((x - m)^2) + eps) (offset + w) + b, m = mean(x).

Anchor: torch's own layer_norm over the last dimension, or an inverse square root above a mean of
squares of a centred row, or above torch's variance. Parameters, casting modes and the backward: see kernels/layer_norm.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.compiler.prove import Candidate, Rounder
from fusewright.compiler.rewrite import call, item
from fusewright.patterns.rms_norm import (
    climb,
    climb_literals,
    gain_of,
    inverse_root,
    strip_widening,
)

aten = torch.ops.aten


class LayerNorm:
    """See the module's docstring."""

    name = "layer_norm"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """torch's layer_norm, and inverse roots of the variance of a row centred by hand."""
        for node in ir.calls(graph):
            if ir.is_call(node, aten.layer_norm.default) or (
                inverse_root(node) and _centred(node, set()) is not None
            ):
                yield node

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """Claims about the site at ``anchor``, the largest region first."""
        if ir.is_call(anchor, aten.layer_norm.default):
            yield _library_call(anchor)
            return
        inside = {anchor}
        found = _centred(anchor, inside)
        if found is None:
            raise Refused("the root is not of the variance of the row")
        x, centred, eps = found
        for out, nodes, weight, offset, bias in reversed(_results(anchor, x, centred, inside)):
            for cast in ("output", "input"):
                yield _candidate(x, weight, bias, out, nodes, eps, offset, cast)


def _library_call(node: fx.Node) -> Candidate:
    x, dims, weight, bias, eps = (
        ir.argument(node, i, default) for i, default in enumerate((None, None, None, None, 1e-5))
    )
    if list(dims) != list(ir.shape(x))[-1:]:
        raise Refused("normalises over more than the last dimension")
    inside = {node}
    source = strip_widening(x, inside)
    nodes = frozenset(inside)
    return _candidate(source, weight, bias, node, nodes, eps, 0.0, "output")


def _centred(anchor: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, fx.Node, float] | None:
    """(row, row less its mean, eps) if the root is taken of the row's variance."""
    found = _library_variance(anchor, inside)
    if found is not None:
        return found
    try:
        reduction, eps = climb(anchor, inside)
    except Refused:
        return None
    square = ir.argument(reduction, 0)
    if not ir.is_call(square, aten.pow.Tensor_Scalar, aten.square.default, aten.mul.Tensor):
        return None
    centred = ir.argument(square, 0)
    if not ir.is_call(centred, aten.sub.Tensor) or not isinstance(ir.last(centred), int):
        return None
    wide, mean = ir.operands(centred)
    averages = ir.is_call(mean, aten.mean.dim) and ir.argument(mean, 0) is wide
    if not averages or not ir.last_dim_only(wide, ir.argument(mean, 1)):
        return None
    inside.update((square, centred, mean))
    return strip_widening(wide, inside), centred, eps


def _library_variance(
    anchor: fx.Node, inside: set[fx.Node]
) -> tuple[fx.Node, fx.Node, float] | None:
    """The same where the variance is torch's own; the centred row is another user of the row."""
    passed: set[fx.Node] = set()
    try:
        variance, eps = climb_literals(anchor, passed)
    except Refused:
        return None
    if not ir.is_call(variance, aten.var.dim) or ir.argument(variance, 2, True):
        return None
    wide = ir.argument(variance, 0)
    if not ir.last_dim_only(wide, ir.argument(variance, 1)) or not isinstance(ir.last(wide), int):
        return None
    for centred in wide.users:
        mean: Any = centred.args[1] if ir.is_call(centred, aten.sub.Tensor) else None
        averages = ir.is_call(mean, aten.mean.dim) and mean.args[0] is wide is centred.args[0]
        if averages and ir.last_dim_only(wide, ir.argument(mean, 1)):
            inside |= {*passed, variance, centred, mean}
            return strip_widening(wide, inside), centred, eps
    return None


_Result = tuple[fx.Node, frozenset[fx.Node], fx.Node | None, float, fx.Node | None]


def _results(anchor: fx.Node, x: fx.Node, centred: fx.Node, inside: set[fx.Node]) -> list[_Result]:
    """Follow the value down: times the centred row, times a weight, plus a bias, cast."""
    current, weight, offset, bias = anchor, None, 0.0, None
    results: list[_Result] = []
    normalised = False
    while True:
        step = next((u for u in current.users if u not in inside), None)
        if step is None or not ir.is_tensor(step):
            return results
        if not ir.is_cast(step):
            if not ir.is_call(step, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor):
                return results
            operand = ir.other_operand(step, current)
            if not normalised and _same_difference(operand, centred):
                inside.add(operand)
                normalised = True
            elif normalised and ir.is_tensor(operand):
                gain = gain_of(operand, x, inside)
                if gain is None or ir.is_call(step, aten.div.Tensor):
                    return results
                if ir.is_call(step, aten.add.Tensor):
                    if bias is not None or gain[1]:
                        return results
                    bias = gain[0]
                elif weight is None and bias is None:
                    weight, offset = gain
                else:
                    return results
            else:
                return results
        inside.add(step)
        current = step
        if ir.shape(current) == ir.shape(x):
            results.append((current, frozenset(inside), weight, offset, bias))


def _same_difference(operand: Any, centred: fx.Node) -> bool:
    return operand is centred or (
        ir.is_call(operand, aten.sub.Tensor) and operand.args == centred.args
    )


def _candidate(
    x: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
    out: fx.Node,
    nodes: frozenset[fx.Node],
    eps: float,
    offset: float,
    cast: str,
) -> Candidate:
    row_dtype, out_dtype = ir.dtype(x), ir.dtype(out)

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        centred = t["x"] - t["x"].mean(-1, keepdim=True)
        y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        y = rounder(y, row_dtype) if cast == "input" else y
        y = y if t["weight"] is None else y * (offset + t["weight"])
        return [y if t["bias"] is None else y + t["bias"]]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        args = (read["x"], read["weight"], read["bias"], eps, offset, cast, out_dtype)
        return [item(graph, call(graph, torch.ops.fusewright.layer_norm.default, args, out), 0)]

    return Candidate(
        nodes=nodes,
        inputs={"x": x, "weight": weight, "bias": bias},
        outputs=(out,),
        formula=formula,
        emit=emit,
        params={"eps": eps, "weight": weight is not None, "bias": bias is not None},
        cast=cast,
        scaled=("x",),
        kernel="layer_norm",
    )
