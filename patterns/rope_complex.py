"""Rotary position embedding as a product of complex numbers: (x_2i + j x_2i+1) (cos + j sin).

That is the layout "interleaved" of patterns/rope.py with cos and sin in one complex table, and it
becomes the same op, which reads the table's two parts. Anchor: the complex view of pairs of
features. Queries and keys that share the table are taken together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.compiler.prove import Candidate, Rounder
from fusewright.compiler.rewrite import call
from fusewright.patterns.rms_norm import strip_widening
from fusewright.patterns.rope import emit_rotation, heads_second

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)


@dataclass(frozen=True)
class _Site:
    """One rotated tensor: what it is made of, what it becomes, and the table."""

    x: fx.Node
    out: fx.Node
    table: fx.Node
    nodes: frozenset[fx.Node]


class ComplexRoPE:
    """See the module's docstring."""

    name = "rope"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Complex views of real tensors."""
        return (n for n in ir.calls(graph) if ir.is_call(n, aten.view_as_complex.default))

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """Claims about the tensor rotated at ``anchor``, together with its partner first."""
        site = _site(anchor)
        for node in self.anchors(anchor.graph):
            try:
                other = _site(node) if node is not anchor else None
            except Refused:
                continue
            if other is not None and other.table is site.table and _alike(site, other):
                yield _candidate((site, other))
        yield _candidate((site,))


def _alike(a: _Site, b: _Site) -> bool:
    return ir.dtype(a.x) == ir.dtype(b.x) and ir.dtype(a.out) == ir.dtype(b.out)


def _site(anchor: fx.Node) -> _Site:
    inside = {anchor}
    pairs: Any = strip_widening(anchor.args[0], inside)  # type: ignore[arg-type]
    if not ir.is_call(pairs, *_RESHAPES) or ir.last(pairs) != 2:
        raise Refused("the complex view is not of pairs of features")
    inside.add(pairs)
    x = strip_widening(pairs.args[0], inside)
    products = [u for u in anchor.users if ir.is_call(u, aten.mul.Tensor)]
    if len(products) != 1 or len(anchor.users) != 1:
        raise Refused("the complex value is not multiplied by one table")
    product = products[0]
    table = ir.other_operand(product, anchor)
    if not ir.is_tensor(table) or not ir.value(table).is_complex():
        raise Refused("the complex value is not multiplied by a complex table")
    inside.add(product)
    node = product
    for wanted in ((aten.view_as_real.default,), _RESHAPES):
        following = [u for u in node.users if ir.is_call(u, *wanted)]
        if len(following) != 1 or len(node.users) != 1:
            raise Refused("the product does not go back to one real tensor")
        node = following[0]
        inside.add(node)
    if ir.shape(node) != ir.shape(x):
        raise Refused("the rotated value has another shape")
    casts = [u for u in node.users if ir.is_cast(u)]
    if len(casts) == len(node.users) == 1:
        node = casts[0]
        inside.add(node)
    return _Site(x, node, table, frozenset(inside))


def _candidate(sites: tuple[_Site, ...]) -> Candidate:
    first = sites[0]
    width, order = ir.last(first.x), heads_second(first.x, first.table)
    if not isinstance(width, int):
        raise Refused("the width of the heads is not static")

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        table = t["table"]
        rotated = []
        for x in (t[role] for role in ("q", "k") if t[role] is not None):
            x1, x2 = x[..., 0::2], x[..., 1::2]
            y1, y2 = x1 * table.real - x2 * table.imag, x2 * table.real + x1 * table.imag
            rotated.append(torch.stack((y1, y2), dim=-1).flatten(-2))
        return rotated

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        plain = call(graph, aten.resolve_conj.default, (read["table"],), first.out)
        parts = call(graph, aten.view_as_real.default, (plain,), first.out)
        cos, sin = (call(graph, aten.select.int, (parts, -1, i), first.out) for i in (0, 1))
        values = {"q": read["q"], "k": read["k"], "cos": cos, "sin": sin}
        return emit_rotation(graph, values, order, "interleaved", width, first.out)

    return Candidate(
        nodes=frozenset().union(*(s.nodes for s in sites)),
        inputs={"q": first.x, "k": sites[1].x if len(sites) > 1 else None, "table": first.table},
        outputs=tuple(s.out for s in sites),
        formula=formula,
        emit=emit,
        params={"layout": "complex", "rotary_dim": width, "together": len(sites)},
        cast="output",
        scaled=("q", "k"),
        draw={"table": _turns},
        share=len(sites),
        kernel="rope",
        constant=("table",),
    )


def _turns(extent: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    parts = torch.randn((*extent, 2), generator=generator, dtype=torch.float64)
    return torch.view_as_complex(parts)
