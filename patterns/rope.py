"""Rotary position embedding: y = x cos + R(x) sin on the first ``rotary_dim`` features.

    half                   R(x) = (-x2, x1)    x1, x2 the two halves of the rotated features
    interleaved            R(x) = (-x_1, x_0, -x_3, x_2, ...)
    interleaved_to_half    half, of x sorted to (x_0, x_2, ..., x_1, x_3, ...)

Anchor: the concatenation (or stack) of a negated piece of x with another piece of x, or of a
difference and a sum of products of two pieces. Features beyond ``rotary_dim`` pass through. Queries
and keys that share cos and sin are taken together. A rotation the other way round is one by -sin.
cos and sin are tables without a gradient. The backward is derived in kernels/rope.py.
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
from fusewright.compiler.rewrite import call, item

aten = torch.ops.aten

_ARITHMETIC = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default)
_LAYOUT = (
    aten.cat.default,
    aten.stack.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.unsqueeze.default,
)


@dataclass(frozen=True)
class _Site:
    """One rotated tensor."""

    x: fx.Node
    out: fx.Node
    tables: tuple[fx.Node, fx.Node]
    nodes: frozenset[fx.Node]
    layout: str
    rotary_dim: int


class RoPE:
    """See the module's docstring."""

    name = "rope"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Rotations of one x along its features."""
        return (n for n in ir.calls(graph) if _rotation(n) is not None)

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """Claims about the tensor rotated at ``anchor``, together with its partner first."""
        sites = _sites(anchor)
        if not sites:
            raise Refused("the rotated value is not combined as x cos + R(x) sin with two tables")
        for site in sites:
            groups = [(site, partner) for partner in _partners(anchor, site)]
            for group in (*groups, (site,)):
                for order, back in ((0, False), (1, False), (0, True), (1, True)):
                    yield _candidate(group, order, back)


def _rotation(node: fx.Node) -> tuple[fx.Node, str] | None:
    """(the tensor that is rotated, layout) if the node is R(x), or x cos + R(x) sin by pieces."""
    if not ir.is_call(node, aten.cat.default, aten.stack.default):
        return None
    pieces = node.args[0]
    rank = len(ir.shape(node))
    dim = node.args[1] if len(node.args) > 1 else 0
    if not isinstance(pieces, (list, tuple)) or len(pieces) != 2 or dim % rank != rank - 1:  # type: ignore[operator]
        return None
    combined = [getattr(p, "target", None) for p in pieces]
    if combined in ([aten.sub.Tensor, aten.add.Tensor], [aten.add.Tensor, aten.sub.Tensor]):
        sources = [_product_sources(p) for p in pieces]
        common = sources[0] & sources[1]
        roots: list[Any] = [common.pop()] if len(common) == 1 else [None]
    else:
        negated = [ir.is_call(p, aten.neg.default) for p in pieces]
        if sum(negated) != 1:
            return None
        roots = [
            _root_of_piece(p.args[0] if n else p) for p, n in zip(pieces, negated, strict=True)
        ]
    if None in roots or any(r is not roots[0] for r in roots):
        return None
    if node.target is aten.stack.default:
        return roots[0], "interleaved"
    return roots[0], "interleaved_to_half" if _alternates(pieces[0]) else "half"


def _alternates(piece: Any) -> bool:
    """Whether what is concatenated is made of every other feature."""
    stack = [piece]
    while stack:
        node = stack.pop()
        cut = ir.as_slice(node)
        if cut is not None and cut[4] == 2:
            return True
        if cut is None and (ir.is_call(node, *_ARITHMETIC) or ir.is_cast(node)):
            stack += node.all_input_nodes
    return False


def _product_sources(combined: Any) -> set[fx.Node]:
    """The tensors that both products under a sum or difference read a piece of."""
    sides = []
    for product in ir.operands(combined):
        if not ir.is_call(product, aten.mul.Tensor):
            return set()
        factors = [f for f in ir.operands(product) if ir.is_tensor(f)]
        sides.append({r for r in map(_root_of_piece, factors) if r is not None})
    return sides[0] & sides[1]


def _root_of_piece(piece: fx.Node) -> fx.Node | None:
    piece = ir.strip_casts(piece)
    cut = ir.as_slice(piece)
    if cut is not None and cut[1] == len(ir.shape(cut[0])) - 1:
        return cut[0]
    if ir.is_call(piece, aten.select.int):
        source: fx.Node = piece.args[0]  # type: ignore[assignment]
        return source if ir.normal_dim(source, piece.args[1]) == len(ir.shape(source)) - 1 else None  # type: ignore[arg-type]
    return None


def _sites(anchor: fx.Node) -> list[_Site]:
    """What the rotation at ``anchor`` may be part of, the widest first."""
    found = _rotation(anchor)
    if found is None:
        return []
    rotated, layout = found
    x = _origin(rotated)
    width = ir.last(x)
    sites = []
    for out in _results(anchor, x):
        site = _site(x, out, layout, width)
        if site is not None:
            sites.append(site)
            sites += _with_passed_through(site)
    return sites[::-1]


def _origin(node: fx.Node) -> fx.Node:
    """The tensor under casts, and under the view that pairs up interleaved features."""
    while True:
        node = ir.strip_casts(node)
        if ir.is_call(node, aten.view.default, aten.reshape.default) and ir.last(node) == 2:
            node = node.args[0]  # type: ignore[assignment]
            continue
        return node


def _results(anchor: fx.Node, x: fx.Node) -> Iterator[fx.Node]:
    """Sums of products below the rotation with the shape of ``x``, and casts of them.

    A rotation by pieces is such a sum itself, behind the flattening of its pairs if interleaved.
    """
    frontier, seen = [anchor], {anchor}
    if not any(ir.is_call(p, aten.neg.default) for p in anchor.args[0]):  # type: ignore[union-attr]
        whole = [anchor, *(u for u in anchor.users if ir.is_call(u, *_LAYOUT))]
        for out in (n for n in whole if ir.shape(n) == ir.shape(x)):
            yield out
            yield from (u for u in out.users if ir.is_cast(u))
        return
    while frontier:
        node = frontier.pop(0)
        for user in node.users:
            steps = ir.is_call(user, *_ARITHMETIC, *_LAYOUT) or ir.is_cast(user)
            if user in seen or not steps or not ir.is_tensor(user):
                continue
            seen.add(user)
            if ir.is_call(user, aten.add.Tensor, aten.sub.Tensor):
                if ir.shape(user) == ir.shape(x):
                    yield user
                    yield from (u for u in user.users if ir.is_cast(u))
            else:
                frontier.append(user)


def _site(x: fx.Node, out: fx.Node, layout: str, width: Any) -> _Site | None:
    """The region between ``x`` and ``out`` if it reads two tables besides."""
    nodes, tables = _between(x, out)
    if len(tables) != 2 or not isinstance(width, int):
        return None
    return _Site(x, out, (tables[0], tables[1]), frozenset(nodes), layout, width)


def _between(x: fx.Node, out: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
    """Calls between ``x`` and ``out``, and the other values that they read."""
    depends: dict[fx.Node, bool] = {x: True}

    def reaches(node: fx.Node) -> bool:
        if node not in depends:
            inside = ir.is_call(node, *_ARITHMETIC, *_LAYOUT) or ir.is_cast(node)
            inside = inside or ir.as_slice(node) is not None or ir.is_call(node, *_SPLITS)
            depends[node] = False
            depends[node] = inside and any(reaches(a) for a in node.all_input_nodes)
        return depends[node]

    if not reaches(out):
        return set(), []
    nodes: set[fx.Node] = set()
    tables: dict[fx.Node, None] = {}
    stack = [out]
    while stack:
        node = stack.pop()
        if node in nodes or node is x:
            continue
        nodes.add(node)
        for above in node.all_input_nodes:
            if reaches(above):
                stack.append(above)
            elif ir.is_tensor(above):
                tables.setdefault(above)
    return nodes, list(tables)


_SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)


def _with_passed_through(site: _Site) -> list[_Site]:
    """The wider site when x is the head of a slice and the rest is concatenated back."""
    cut = ir.as_slice(site.x)
    if cut is None or cut[2] != 0 or cut[4] != 1 or cut[1] != len(ir.shape(cut[0])) - 1:
        return []
    whole = cut[0]
    sites = []
    for user in site.out.users:
        if not ir.is_call(user, aten.cat.default) or ir.shape(user) != ir.shape(whole):
            continue
        nodes, tables = _between(whole, user)
        if len(tables) == 2 and site.nodes <= nodes:
            pair = (tables[0], tables[1])
            sites.append(_Site(whole, user, pair, frozenset(nodes), site.layout, site.rotary_dim))
            casts = [u for u in user.users if ir.is_cast(u)]
            sites += [
                _Site(whole, c, pair, frozenset(nodes | {c}), site.layout, site.rotary_dim)
                for c in casts
            ]
    return sites


def _partners(anchor: fx.Node, site: _Site) -> Iterator[_Site]:
    """Other tensors of the graph that are rotated alike by the same tables."""
    for node in ir.calls(anchor.graph):
        if node is anchor or _rotation(node) is None or ir.dtype(node) != ir.dtype(anchor):
            continue
        for other in _sites(node):
            same = set(other.tables) == set(site.tables) and other.x is not site.x
            same = same and (other.layout, other.rotary_dim) == (site.layout, site.rotary_dim)
            if same and not other.nodes & site.nodes and ir.dtype(other.out) == ir.dtype(site.out):
                yield other


def _candidate(sites: tuple[_Site, ...], order: int, back: bool) -> Candidate:
    first = sites[0]
    tables = first.tables[::-1] if order else first.tables
    cos, sin = tables
    in_order = heads_second(first.x, cos)
    inputs = {"q": first.x, "k": sites[1].x if len(sites) > 1 else None, "cos": cos, "sin": sin}
    layout, rotary_dim = first.layout, first.rotary_dim

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        c, s = t["cos"].detach(), t["sin"].detach() * (-1 if back else 1)
        rotated = [x for x in (t["q"], t["k"]) if x is not None]
        return [_rotate(x, c, s, layout, rotary_dim) for x in rotated]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        if back:
            read = {**read, "sin": call(graph, aten.neg.default, (read["sin"],), first.out)}
        return emit_rotation(graph, read, in_order, layout, rotary_dim, first.out)

    params = {"layout": layout, "rotary_dim": rotary_dim, "together": len(sites)}
    return Candidate(
        nodes=frozenset().union(*(s.nodes for s in sites)),
        inputs=inputs,
        outputs=tuple(s.out for s in sites),
        formula=formula,
        emit=emit,
        params=params | ({"back": True} if back else {}),
        cast="output",
        scaled=("q", "k"),
        share=len(sites),
        kernel="rope",
        constant=("cos", "sin"),
    )


def emit_rotation(
    graph: fx.Graph,
    read: Mapping[str, Any],
    in_order: bool,
    layout: str,
    rotary_dim: int,
    out: fx.Node,
) -> list[fx.Node]:
    """The op on the nodes q, k (or None), cos and sin of ``read``, and its one or two results.

    ``in_order``: see :func:`heads_second`; other tensors are transposed for the kernel, and back.
    """
    values = dict(read)
    if not in_order:
        for role, node in values.items():
            if node is not None:
                values[role] = call(graph, aten.transpose.int, (node, 1, 2))
    args = (*values.values(), layout, rotary_dim, ir.dtype(out))
    made = call(graph, torch.ops.fusewright.rope.default, args, out)
    results = [item(graph, made, i) for i in range(2 if read["k"] is not None else 1)]
    return results if in_order else [call(graph, aten.transpose.int, (r, 1, 2)) for r in results]


def heads_second(x: fx.Node, table: fx.Node) -> bool:
    """Whether x is (batch, heads, tokens, features); False for (batch, tokens, heads, features)."""
    rank, sizes = len(ir.shape(x)), ir.shape(table)
    if rank != 4:
        raise Refused(f"x has {rank} dimensions; the kernel takes 4")
    if len(sizes) < 2 or len(sizes) < 4 or sizes[1] == 1:
        return True
    if sizes[2] == 1:
        return False
    raise Refused("cos varies over both the heads and the tokens")


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str, rotary_dim: int
) -> torch.Tensor:
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    if layout == "interleaved_to_half":
        turned, layout = torch.cat((turned[..., ::2], turned[..., 1::2]), dim=-1), "half"
    if cos.shape[-1] != rotary_dim:
        widen = _twice if layout == "half" else _each_twice
        cos, sin = widen(cos), widen(sin)
    if layout == "half":
        low, high = turned.chunk(2, dim=-1)
        partner = torch.cat((-high, low), dim=-1)
    else:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    y = turned * cos + partner * sin
    return torch.cat((y, passed), dim=-1) if passed.shape[-1] else y


def _twice(table: torch.Tensor) -> torch.Tensor:
    return torch.cat((table, table), dim=-1)


def _each_twice(table: torch.Tensor) -> torch.Tensor:
    return table.repeat_interleave(2, dim=-1)
