"""Gated linear units: y = f(gate) h(up), with f and h any functions of one tensor each.

Anchor: a product of which one side is a nonlinear function of a single tensor, and the other a
function of another of the same shape. Both are read off the graph as expressions, so a spelling by
hand and an activation never seen before count as well as the library's: what has a name in
kernels/activations.py becomes that, the clamped unit its own op, and all else text with the derivative
that sympy finds. Where gate and up are the two halves of one tensor, side by side or interleaved, the
packed op is used: its backward writes both gradients into one buffer. The backward is derived in
kernels/glu.py, the derivative of a new activation in patterns/symbolic.py; the proof holds the very
slope that the kernel uses against autograd of the code.

What it saves: eager runs one pass for every call between the two projections and keeps most of the
results; the op reads gate and up once, writes y, and keeps gate and up alone. ``aten.glu`` is such a
pass already and is taken for its gradient's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.compiler.prove import Candidate, Rounder
from fusewright.compiler.rewrite import call
from fusewright.patterns.halves import Packed, packed
from fusewright.patterns.pointwise import Reader, Reading
from fusewright.patterns.symbolic import (
    X,
    erf,
    exp,
    expm1,
    least,
    most,
    number,
    sigmoid,
    softplus,
    tanh,
)
from fusewright.patterns.written import applied, applied_to_up, pair_of

aten = torch.ops.aten

# Which casts are followed, and whether a product of several factors is taken apart.
_WAYS = (("widening", True), ("widening", False), ("none", True), ("none", False), ("all", True))
_IN_PLACE = (aten.silu_.default, aten.relu_.default, aten.sigmoid_.default, aten.tanh_.default)
_CURVES = (sigmoid, tanh, erf, softplus, expm1, exp)


@dataclass(frozen=True)
class Unit:
    """A gated unit: what its product reads, and the calls that it is made of."""

    gate: Reading
    up: Reading
    nodes: frozenset[fx.Node]


class GLU:
    """See the module's docstring."""

    name = "glu"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Products with a nonlinear side, the outermost first, and the library's own units."""
        for node in reversed(list(ir.calls(graph))):
            if _library(node) or next(_units(node), None) is not None or _obstacle(node):
                yield node

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """Claims about the product, with as much of the code around it as can be read."""
        if len(ir.shape(anchor)) < 2:
            raise Refused("a product of vectors, not of rows")
        outs = [u for u in anchor.users if ir.is_cast(u)] if len(anchor.users) == 1 else []
        outs.append(anchor)
        if _library(anchor):
            yield from (_from_library(anchor, out) for out in outs)
            return
        what = _obstacle(anchor)
        refusal = Refused(what) if what else None
        for unit in _units(anchor):
            if ir.dtype(unit.gate.root) != ir.dtype(unit.up.root):
                refusal = Refused(
                    f"gate is {ir.dtype(unit.gate.root)}, up {ir.dtype(unit.up.root)}"
                )
                continue
            try:
                form = _form(unit)
            except Refused as reason:
                refusal = reason
                continue
            for out in outs:
                yield from _claims(unit, form, out)
        if refusal is not None:
            raise refusal


def _library(node: fx.Node) -> bool:
    if not ir.is_call(node, aten.glu.default):
        return False
    source: fx.Node = ir.argument(node, 0)
    return ir.is_floating(node) and ir.last_dim_only(source, ir.argument(node, 1, -1))


def _obstacle(product: fx.Node) -> str | None:
    """What stands between an activation and its product, where there would be a unit without it."""
    if not ir.is_call(product, aten.mul.Tensor) or not ir.is_floating(product):
        return None
    for side in ir.operands(product):
        below: Any = ir.argument(side, 0) if ir.is_call(side) else None
        if not ir.is_floating(below) or ir.shape(side) != ir.shape(product):
            continue
        schema = getattr(side.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            what = "is changed in place"
        elif side.target in (aten.dropout.default, aten.detach.default):
            what = "passes a " + side.target.name().partition("::")[2]
        else:
            continue
        if side.target in _IN_PLACE or not Reader().read(below).is_linear:
            return f"the activation {what} before the product"
    return None


def _units(node: fx.Node) -> Iterator[Unit]:
    """The gated units that a product may be, the largest first."""
    if not ir.is_call(node, aten.mul.Tensor) or not ir.is_floating(node):
        return
    if not all(ir.is_floating(s) and ir.alike(s, node) for s in ir.operands(node)):
        return
    tried = set()
    for unit in _readings(node, frozenset()):
        if unit not in tried:
            tried.add(unit)
            yield unit
    # What is used elsewhere too has to be computed anyway: begin there.
    shared = frozenset().union(*({n for n in u.nodes if _used_outside(n, u, node)} for u in tried))
    for unit in _readings(node, shared) if shared else ():
        if unit not in tried:
            tried.add(unit)
            yield unit


def _used_outside(node: fx.Node, unit: Unit, product: fx.Node) -> bool:
    return node is not product and any(u not in unit.nodes for u in node.users)


def _readings(product: fx.Node, leaves: frozenset[fx.Node]) -> Iterator[Unit]:
    for casts, apart in _WAYS:
        reader = Reader(leaves, casts)
        factors, inner, constant = _factors(product, apart, leaves)
        sides: dict[fx.Node, Reading] = {}
        for factor in factors:
            reading = reader.read(factor)
            known = sides.get(reading.root)
            sides[reading.root] = reading if known is None else known.times(reading)
        if len(sides) != 2:
            continue
        # The gate is what is bent most, and of two alike the first.
        gate, up = sorted(sides.values(), key=lambda r: -_bend(r))
        whole = all(ir.alike(r.root, product) for r in (gate, up))
        if not gate.is_linear and whole:
            yield Unit(gate.scaled(constant), up, gate.nodes | up.nodes | inner)


def _bend(reading: Reading) -> int:
    """0 for a linear side, 1 for one made of straight pieces, 2 for a curved one."""
    return 2 if reading.expression.has(*_CURVES) else 0 if reading.is_linear else 1


def _factors(
    product: fx.Node, apart: bool, leaves: frozenset[fx.Node]
) -> tuple[list[fx.Node], frozenset[fx.Node], float]:
    """(factors, the products between them, constant) of a product of tensors of one shape."""
    factors: list[fx.Node] = []
    inner, constant = {product}, 1.0
    stack = list(reversed(ir.operands(product)))
    while stack:
        node = stack.pop()
        opens = apart and ir.is_call(node, aten.mul.Tensor) and node not in leaves
        if not opens or len(node.users) > 1 or ir.dtype(node) != ir.dtype(product):
            factors.append(node)
            continue
        a, b = ir.operands(node)
        scalar = isinstance(b, (int, float)) and not isinstance(b, bool)
        tensors = [a] if scalar else [b, a]
        if not all(ir.is_floating(t) and ir.alike(t, product) for t in tensors):
            factors.append(node)
            continue
        constant *= float(b) if scalar else 1.0
        inner.add(node)
        stack += tensors
    return factors, frozenset(inner), constant


@dataclass(frozen=True)
class _Form:
    """An op's name, what it takes before the output's dtype, the formula, and the report's words."""

    op: str
    arguments: tuple[Any, ...]
    formula: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    params: dict[str, Any]


def _form(unit: Unit) -> _Form:
    clamp = _clamped(unit.gate.expression, unit.up.expression)
    if clamp is not None:
        alpha, limit = clamp

        def clamped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            g = gate.clamp(max=limit)
            return (up.clamp(-limit, limit) + 1) * g * torch.sigmoid(alpha * g)

        return _Form("glu_clamped", clamp, clamped, {"alpha": alpha, "limit": limit})
    activation = pair_of(unit.gate, unit.up)
    return _named_form(activation)


def _named_form(activation: str) -> _Form:
    def formula(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return applied(activation, gate) * applied_to_up(activation, up)

    return _Form("glu", (activation,), formula, {"activation": activation})


def _clamped(gate: Any, up: Any) -> tuple[float, float] | None:
    """(alpha, limit) of (1 + clamp(up, -L, L)) min(gate, L) sigmoid(alpha min(gate, L))."""
    bound = up - 1
    if not isinstance(bound, most) or bound.args[0] != least(X, -bound.args[1]):
        return None
    limit = bound.args[1]
    inside = most(X, limit)
    rest = gate / inside
    if not isinstance(rest, sigmoid):
        return None
    alpha = rest.args[0] / inside
    if not alpha.is_number or limit <= 0 or rest.args[0] != number(float(alpha)) * inside:
        return None
    return float(alpha), float(limit)


def _claims(unit: Unit, form: _Form, out: fx.Node) -> Iterator[Candidate]:
    gate, up = unit.gate.root, unit.up.root
    nodes = unit.nodes | {out}
    layout = packed(gate, up)
    if layout is not None:
        yield _packed_claim(layout, form, out, nodes)
    out_dtype = ir.dtype(out)

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        return [form.formula(t["gate"], t["up"])]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        op = getattr(torch.ops.fusewright, form.op).default
        return [call(graph, op, (read["gate"], read["up"], *form.arguments, out_dtype), out)]

    yield Candidate(
        nodes, {"gate": gate, "up": up}, (out,), formula, emit, form.params | {"packed": False},
        cast="output", scaled=("gate", "up"), kernel=form.op,
    )  # fmt: skip


def _packed_claim(
    layout: Packed, form: _Form, out: fx.Node, nodes: frozenset[fx.Node]
) -> Candidate:
    out_dtype = ir.dtype(out)
    op_name = form.op + "_packed"

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        return [form.formula(*layout.apart(t["gate_up"]))]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        op = getattr(torch.ops.fusewright, op_name).default
        args = (*form.arguments, layout.gate_first, layout.interleaved, out_dtype)
        return [call(graph, op, (read["gate_up"], *args), out)]

    params = form.params | {"packed": True}
    if layout.interleaved:
        params["interleaved"] = True
    return Candidate(
        nodes | layout.pieces, {"gate_up": layout.source}, (out,), formula, emit, params,
        cast="output", scaled=("gate_up",), kernel=op_name,
    )  # fmt: skip


def _from_library(anchor: fx.Node, out: fx.Node) -> Candidate:
    """x[..., :F] sigmoid(x[..., F:])."""
    source: fx.Node = ir.argument(anchor, 0)
    layout = Packed(source, False, False, frozenset())
    return _packed_claim(layout, _named_form("sigmoid"), out, frozenset({anchor, out}))
