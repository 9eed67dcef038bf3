"""RMS normalisation with a gate: y = rms_norm(x) w a(z), or y = rms_norm(x a(z)) w.

Anchor: a ``glu`` node of ours beside an ``rms_norm`` node of ours, the norm's result as what is
gated or the gated rows as what is normalised. Between the two there may be the views that cut a row
into groups, widening casts, and a weight that multiplies the groups. What either op rounds is kept or
refused: a norm's result that may have been rounded on purpose is not gated unrounded. The product of
a weight and a row that was rounded before it is rounded by chance, and that may be left out.
Backward: kernels/gated_rms_norm.py.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.compiler.prove import Candidate, Rounder
from fusewright.compiler.rewrite import call, item
from fusewright.kernels.activations import lookup

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default)


@dataclass
class _Site:
    """A norm and a gate, and what lies between."""

    norm: fx.Node
    gate: fx.Node
    out: fx.Node
    after: bool
    weight: fx.Node | None
    late: bool  # the weight multiplies what the norm's op yields
    nodes: set[fx.Node] = field(default_factory=set)


class GatedRMSNorm:
    """See the module's docstring."""

    name = "gated_rms_norm"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Gates beside a norm."""
        gates = (n for n in ir.calls(graph) if ir.is_call(n, torch.ops.fusewright.glu.default))
        return (n for n in gates if _after(n) is not None or _before(n) is not None)

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """The claims about the gate at ``anchor``."""
        for site in (_after(anchor), _before(anchor)):
            if site is not None:
                yield _candidate(site)


def _under(node: Any, nodes: set[fx.Node]) -> Any:
    """What is below views and widening casts, which join ``nodes``."""
    while ir.is_call(node, *_VIEWS) or ir.widens(node):
        nodes.add(node)
        node = node.args[0]
    return node


def _normalised(node: Any) -> fx.Node | None:
    """The norm whose rows the node is."""
    if not ir.is_call(node, operator.getitem) or node.args[1] != 0:
        return None
    norm = node.args[0]
    return norm if ir.is_call(norm, torch.ops.fusewright.rms_norm.default) else None


def _vector(node: Any, width: Any, nodes: set[fx.Node]) -> fx.Node | None:
    """The vector of the row's width under views and widening casts."""
    if not ir.is_floating(node):
        return None
    found = _under(node, nodes)
    return found if ir.shape(found) == (width,) else None


def _after(gate: fx.Node) -> _Site | None:
    """The norm whose result is gated, maybe times a weight."""
    nodes: set[fx.Node] = {gate}
    y = _under(gate.args[1], nodes)
    weight = None
    if ir.is_call(y, aten.mul.Tensor):
        for a, b in (ir.operands(y), ir.operands(y)[::-1]):
            passed: set[fx.Node] = set()
            row = _under(b, passed)
            if _normalised(row) is not None:
                weight = _vector(a, ir.last(gate), passed)
            if weight is not None:
                nodes |= passed | {y}
                y = row
                break
    norm = _normalised(y)
    if norm is None or (weight is not None and norm.args[1] is not None):
        return None
    late = weight is not None
    site = _Site(norm, gate, gate, True, weight if late else norm.args[1], late, nodes)  # type: ignore[arg-type]
    site.nodes |= {norm, y}
    return site


def _before(gate: fx.Node) -> _Site | None:
    """The norm of gated rows, maybe times a weight."""
    nodes: set[fx.Node] = {gate}
    u: fx.Node = gate
    while len(u.users) == 1 and (
        ir.is_call(user := next(iter(u.users)), *_VIEWS) or ir.widens(user)
    ):
        nodes.add(user)
        u = user
    norms = [n for n in u.users if ir.is_call(n, torch.ops.fusewright.rms_norm.default)]
    if len(norms) != 1 or norms[0].args[0] is not u or len(norms[0].users) != 1:
        return None
    norm = norms[0]
    out = next(iter(norm.users))
    nodes |= {norm, out}
    while ir.shape(out) != ir.shape(gate):
        users = [v for v in out.users if ir.is_call(v, *_VIEWS)]
        if len(out.users) != 1 or len(users) != 1:
            return None
        out = users[0]
        nodes.add(out)
    weight = norm.args[1]
    late = False
    product = next(iter(out.users)) if len(out.users) == 1 else None
    if weight is None and ir.is_call(product, aten.mul.Tensor):
        passed: set[fx.Node] = set()
        weight = _vector(ir.other_operand(product, out), ir.last(gate), passed)  # type: ignore[arg-type]
        if weight is not None:
            late, out = True, product  # type: ignore[assignment]
            nodes |= passed | {out}
    return _Site(norm, gate, out, False, weight, late, nodes)  # type: ignore[arg-type]


def _cast(site: _Site, x: fx.Node) -> str:
    """Where the gated op must round x^; Refused where it cannot round as the two ops did."""
    row, made = ir.dtype(site.norm.args[0]), site.norm.args[5]  # type: ignore[arg-type]
    exact = torch.float32
    rounded = site.norm.args[4] == "input" and row is not exact
    if site.late or site.weight is None:
        # What the op yields is x^ itself.
        rounded = rounded or made is not exact
        kept = made
    else:
        kept = row
        if site.after and made is not exact and not rounded:
            raise Refused("the norm's result may have been rounded on purpose")
    if rounded and kept is not ir.dtype(x):
        raise Refused("the norm rounds to another dtype than its row's")
    if not site.after and ir.dtype(site.gate) is not exact:
        raise Refused("the gated rows may have been rounded on purpose")
    return "input" if rounded else "output"


def _candidate(site: _Site) -> Candidate:
    nodes = set(site.nodes)
    source = site.norm.args[0] if site.after else site.gate.args[1]
    x: Any = _under(source, nodes)
    z: Any = site.gate.args[0]
    while ir.widens(z):
        nodes.add(z)
        z = z.args[0]
    group = ir.last(site.norm.args[0])  # type: ignore[arg-type]
    if ir.shape(x) != ir.shape(z) or not isinstance(group, int):
        raise Refused("the rows and the gate differ in shape")
    activation = str(site.gate.args[2])
    cast, eps, offset = _cast(site, x), site.norm.args[2], 0.0 if site.late else site.norm.args[3]
    found, out_dtype = lookup(activation), ir.dtype(site.out)

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        u = t["x"] if site.after else t["x"] * found.value(torch, t["gate"])
        groups = u.unflatten(-1, (-1, group))
        y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
        y = y if t["weight"] is None else y * (offset + t["weight"])
        return [y * found.value(torch, t["gate"]) if site.after else y]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        order = "after" if site.after else "before"
        rows = (read["x"], read["gate"], read["weight"])
        args = (*rows, eps, offset, cast, order, activation, group, out_dtype)
        made = call(graph, torch.ops.fusewright.gated_rms_norm.default, args, site.out)
        return [item(graph, made, 0)]

    return Candidate(
        nodes=frozenset(nodes),
        inputs={"x": x, "gate": z, "weight": site.weight},
        outputs=(site.out,),
        formula=formula,
        emit=emit,
        params={"eps": eps, "activation": activation, "after": site.after, "group": group},
        cast=cast,
        scaled=("x",),
        kernel="gated_rms_norm",
    )
