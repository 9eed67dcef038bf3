"""RMS normalisation: y = (offset + w) x / sqrt(mean(x^2) + eps) over the last dimension.

Anchor: the inverse square root above a mean of squares. Parameters: eps and offset are literals of
the graph; w is absent or one vector of the row's width. A root of the squares' sum is the same norm
with eps / D and the weight D^(-1/2), as x / sqrt(sum(x^2) + eps) = D^(-1/2) x / sqrt(mean(x^2) +
eps / D). Casting modes: see kernels/rms_norm.py. The backward is derived there too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.compiler.prove import Candidate, Rounder
from fusewright.compiler.rewrite import call, item

aten = torch.ops.aten

_SQUARES = (aten.pow.Tensor_Scalar, aten.square.default, aten.mul.Tensor)
_STEPS = (aten.mul.Tensor, aten.div.Tensor)


@dataclass
class _Site:
    """What grew from one anchor: the row, and the values that may be the norm's result."""

    x: fx.Node
    eps: float
    inside: set[fx.Node]
    summed: bool = False
    results: list[tuple[fx.Node, frozenset[fx.Node], fx.Node | None, float]] = field(
        default_factory=list
    )


class RMSNorm:
    """See the module's docstring."""

    name = "rms_norm"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Inverse square roots of something of width one, and torch's own rms_norm."""
        for node in ir.calls(graph):
            if (
                ir.is_call(node, aten.rms_norm.default)
                or inverse_root(node)
                and ir.is_floating(node)
                and ir.last(node) == 1
            ):
                yield node

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """Claims about the site at ``anchor``, the largest region first."""
        if ir.is_call(anchor, aten.rms_norm.default):
            yield from _library_call(anchor)
            return
        site = _grow(anchor)
        for out, nodes, weight, offset in reversed(site.results):
            if site.summed and weight is not None:
                continue  # the op has one weight, and the sum takes it
            for cast in ("output", "input"):
                yield _candidate(site.x, weight, out, nodes, site.eps, offset, cast, site.summed)


def inverse_root(node: fx.Node) -> bool:
    """Whether the node is an inverse square root, or a root that something is divided by."""
    if ir.is_call(node, aten.rsqrt.default):
        return True
    if ir.is_call(node, aten.pow.Tensor_Scalar):
        return bool(ir.argument(node, 1) == -0.5)
    if ir.is_call(node, aten.sqrt.default):
        return any(
            ir.is_call(u, aten.reciprocal.default)
            or (ir.is_call(u, aten.div.Tensor) and u.args[1] is node)
            for u in node.users
        )
    return False


def _library_call(node: fx.Node) -> Iterator[Candidate]:
    x, dims, weight, eps = (ir.argument(node, i) for i in range(4))
    if list(dims) != list(ir.shape(x))[-1:]:
        raise Refused("normalises over more than the last dimension")
    eps = torch.finfo(ir.dtype(x)).eps if eps is None else eps
    yield _candidate(x, weight, node, frozenset({node}), eps, 0.0, "output")


def _grow(anchor: fx.Node) -> _Site:
    inside = {anchor}
    reduction, eps = climb(anchor, inside)
    divided = any(ir.is_call(n, aten.div.Tensor, aten.mul.Tensor) for n in inside)
    summed = ir.is_call(reduction, aten.sum.dim_IntList) and not divided
    site = _Site(_row(reduction, inside), eps, inside, summed)
    x = site.x
    if not isinstance(ir.last(x), int):
        raise Refused("the row's width is not static")
    _descend(anchor, site)
    if not site.results:
        raise Refused("the inverse root never multiplies the row it was taken of")
    return site


def climb(anchor: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, float]:
    """From the root up to the reduction; the literals added on the way are eps."""
    node, eps = climb_literals(anchor, inside)
    node = _mean_as_sum(node, inside)
    if not ir.is_call(node, aten.mean.dim, aten.sum.dim_IntList):
        name = getattr(node, "target", node)
        raise Refused(f"the root is not taken of a mean over the row but of {name}")
    inside.add(node)
    source = node.args[0]
    if not ir.last_dim_only(source, node.args[1]):
        raise Refused("the mean is not over the last dimension alone")
    return node, eps


def climb_literals(anchor: fx.Node, inside: set[fx.Node]) -> tuple[Any, float]:
    """(what lies under the root but for casts and added literals, the literals' sum)."""
    node, eps = anchor.args[0], 0.0
    while ir.is_call(node, aten.add.Tensor, aten.add.Scalar) or ir.is_cast(node):
        inside.add(node)  # type: ignore[arg-type]
        if not ir.is_cast(node):
            added = [a for a in node.args[:2] if not isinstance(a, fx.Node)]  # type: ignore[union-attr]
            if len(added) != 1:
                raise Refused("what is added under the root is not a literal")
            eps += float(added[0])  # type: ignore[arg-type]
        node = next(a for a in node.args[:2] if isinstance(a, fx.Node))  # type: ignore[union-attr]
    return node, eps


def _mean_as_sum(node: Any, inside: set[fx.Node]) -> Any:
    """The reduction below a dropped dimension put back, and below a division by the width."""
    below, passed = node, []
    while ir.is_call(below, aten.unsqueeze.default, aten.div.Tensor, aten.mul.Tensor):
        if isinstance(below.args[1], fx.Node):
            return node
        passed.append(below)
        below = below.args[0]
    divided = any(not ir.is_call(n, aten.unsqueeze.default) for n in passed)
    if ir.is_call(below, aten.sum.dim_IntList if divided else aten.mean.dim):
        inside.update(passed)
        return below
    return node


def _row(reduction: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """The row whose squares are averaged."""
    square: Any = reduction.args[0]
    while ir.is_cast(square):
        inside.add(square)
        square = square.args[0]
    if not ir.is_call(square, *_SQUARES):
        raise Refused("the mean is not of squares")
    base = square.args[0]
    if ir.is_call(square, aten.pow.Tensor_Scalar) and square.args[1] != 2:
        raise Refused(f"the mean is of powers {square.args[1]}, not of squares")
    if ir.is_call(square, aten.mul.Tensor) and square.args[1] is not base:
        raise Refused("the mean is of a product of two different values")
    inside.add(square)
    return strip_widening(base, inside)


def strip_widening(node: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """The value under casts that lose nothing; the casts join ``inside``."""
    while ir.widens(node):
        inside.add(node)
        node = node.args[0]  # type: ignore[assignment]
    return node


def _descend(anchor: fx.Node, site: _Site) -> None:
    """Follow the value down while it is multiplied by the row, by a weight, or cast."""
    current, weight, offset = anchor, None, 0.0
    while True:
        step = next(
            (u for u in current.users if u not in site.inside and _continues(u, current, site)),
            None,
        )
        if step is None:
            return
        if not _passes(step):
            operand = ir.other_operand(step, current)
            if _is_row(operand, site):
                strip_widening(operand, site.inside)
            else:
                gain = gain_of(operand, site.x, site.inside)
                if gain is None or weight is not None:
                    return
                weight, offset = gain
        site.inside.add(step)
        current = step
        if ir.last(current) == ir.last(site.x) and ir.shape(current) == ir.shape(site.x):
            site.results.append((current, frozenset(site.inside), weight, offset))


def _continues(user: fx.Node, current: fx.Node, site: _Site) -> bool:
    if _passes(user):
        return True
    if not ir.is_call(user, *_STEPS):
        return False
    operand = ir.other_operand(user, current)
    if not ir.is_tensor(operand):
        return False
    if user.target is aten.div.Tensor and user.args[1] is not current:
        return False
    return _is_row(operand, site) or ir.last(operand) == ir.last(site.x)


def _is_row(operand: fx.Node, site: _Site) -> bool:
    return ir.strip_casts(operand) is ir.strip_casts(site.x)


def _passes(step: fx.Node) -> bool:
    """Whether the value goes through a step alone: casts, and ``1 / root`` as torch traces it."""
    if ir.is_cast(step) or ir.is_call(step, aten.reciprocal.default):
        return True
    return ir.is_call(step, aten.mul.Tensor) and bool(ir.argument(step, 1) == 1)


def gain_of(operand: fx.Node, x: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, float] | None:
    """(weight, offset) when the operand is offset + w with w one vector of the row's width."""
    node, offset, passed = operand, 0.0, []
    while ir.is_cast(node) or ir.is_call(node, aten.add.Tensor, aten.rsub.Scalar):
        if not ir.is_cast(node):
            literals = [a for a in node.args[:2] if not isinstance(a, fx.Node)]
            if len(literals) != 1 or node.target is aten.rsub.Scalar:
                break
            offset += float(literals[0])  # type: ignore[arg-type]
        passed.append(node)
        node = next(a for a in node.args[:2] if isinstance(a, fx.Node))
    if ir.shape(node) != (ir.last(x),):
        return None
    inside.update(passed)
    return node, offset


def _candidate(
    x: fx.Node,
    weight: fx.Node | None,
    out: fx.Node,
    nodes: frozenset[fx.Node],
    eps: float,
    offset: float,
    cast: str,
    summed: bool = False,
) -> Candidate:
    row_dtype, out_dtype, width = ir.dtype(x), ir.dtype(out), ir.last(x)

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        squares = t["x"].square()
        under = squares.sum(-1, keepdim=True) if summed else squares.mean(-1, keepdim=True)
        y = t["x"] * torch.rsqrt(under + eps)
        y = rounder(y, row_dtype) if cast == "input" else y
        return [y if t["weight"] is None else y * (offset + t["weight"])]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        args = (read["x"], read["weight"], eps, offset, cast, out_dtype)
        if summed:
            # D^(-1/2) goes in as the offset, in full precision, of a weight of zeros.
            zeros = call(graph, aten.new_zeros.default, (read["x"], [width]), out)
            args = (read["x"], zeros, eps / width, width**-0.5, cast, out_dtype)
        return [item(graph, call(graph, torch.ops.fusewright.rms_norm.default, args, out), 0)]

    params = {"eps": eps, "offset": offset, "weight": weight is not None, "dim": width}
    return Candidate(
        nodes=nodes,
        inputs={"x": x, "weight": weight},
        outputs=(out,),
        formula=formula,
        emit=emit,
        params=params | ({"sum": True} if summed else {}),
        cast=cast,
        scaled=("x",),
        kernel="rms_norm",
    )
