"""Attention written out, softmax(s q k^T + mask) v, as the library's one call.

Anchor: a softmax between two matrix products, the weights of the second. Growing upwards: masks (added,
or filled in as -inf), the scale (a literal), and the product of q and k in any order of dimensions that
``matmul``, ``bmm`` or ``einsum`` can spell; downwards: the cast of the weights and a dropout that is off.
Keys and values that are repeated over their heads are so before they come here, and stay so.

The library rounds its weights to the row's dtype before it multiplies them with v, as code that computes
its softmax in float32 does by a cast; it never rounds the scores. Whether it is as exact on the device at
hand is measured, not believed: see patterns/attention_exactness.py. Where a row is masked whole by -inf,
the code's result is nan and the library's is 0: training on it is broken either way.
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
from fusewright.compiler.rewrite import call
from fusewright.patterns import attention_exactness
from fusewright.patterns.contraction import Contraction, of_scores, of_weights

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_WHERES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
_CONSTANTS = {aten.full.default: 1, aten.full_like.default: 1, aten.scalar_tensor.default: 0}
_PRODUCTS = (
    aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default,
    aten.einsum.default,
)  # fmt: skip
_CHANGES = (
    aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.detach.default, aten.mT.default,
    aten.slice.Tensor,
)  # fmt: skip
_KEEP_ROWS = (*ir.IDENTITIES, aten.contiguous.default, aten.dropout.default)
_LAYOUT_FREE = (
    aten.contiguous.default, aten.clone.default, aten.reshape.default, aten.flatten.using_ints,
    aten.matmul.default, aten.linear.default,
)  # fmt: skip


@dataclass(frozen=True)
class _Mask:
    """What keeps weights from positions: ``kept`` says which a boolean one names, None if it is added."""

    node: fx.Node
    kept: bool | None


@dataclass
class _Site:
    """What grew from one softmax."""

    softmax: fx.Node
    nodes: set[fx.Node]
    scale: float = 1.0
    masks: list[_Mask] = field(default_factory=list)
    rounded: torch.dtype | None = None


class Attention:
    """See the module's docstring."""

    name = "attention"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Softmaxes of what comes of a product, that lead to another product as its left operand."""
        for node in ir.calls(graph):
            found = ir.is_call(node, *_SOFTMAX) and ir.is_floating(node)
            if found and _weighs(node) and _from_a_product(node.args[0]):
                yield node

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """The one claim about the softmax at ``anchor``."""
        if not ir.last_dim_only(anchor, ir.argument(anchor, 1)):
            raise Refused("the softmax is not over the last dimension")
        site = _Site(anchor, {anchor})
        out = _descend(site)
        product = _climb(site)
        scores = of_scores(product, site.nodes)
        weighed = of_weights(out, _weights_of(out, site.nodes))
        _check(site, scores, weighed, out)
        yield _candidate(site, scores, weighed, out)


def _weighs(node: fx.Node) -> bool:
    """Whether the weights lead to a product whose left operand they are, through steps of any kind."""
    for user in node.users:
        if ir.is_call(user, *_PRODUCTS) and node in user.all_input_nodes:
            return True
        passes = ir.is_cast(user) or ir.is_call(user, *_KEEP_ROWS, *ir.VIEWS, *_CHANGES)
        if passes and node in user.args[:2] and _weighs(user):
            return True
    return False


def _from_a_product(node: Any, steps: int = 8) -> bool:
    """Whether scores are computed from a product of activations, by a few pointwise steps."""
    if ir.is_call(node, *_PRODUCTS):
        return True
    if not ir.is_call(node) or not steps or ir.is_call(node, aten.linear.default):
        return False
    flat = [a for a in node.all_input_nodes if ir.is_floating(a)]
    return any(_from_a_product(a, steps - 1) for a in flat)


def _descend(site: _Site) -> fx.Node:
    """From the softmax down to the product with v."""
    node = site.softmax
    while True:
        following = [u for u in node.users if u.op != "output"]
        if not following:
            raise Refused("the weights are not multiplied with values")
        user = next((u for u in following if ir.is_call(u, *_PRODUCTS)), following[0])
        if ir.is_call(user, *_PRODUCTS):
            site.nodes.add(user)
            return user
        if ir.is_call(user, aten.dropout.default):
            if ir.argument(user, 2) and ir.argument(user, 1):
                raise Refused("the weights drop out, and the library would draw other masks")
        elif ir.is_cast(user):
            if not ir.widens(user):
                site.rounded = ir.dtype(user)
        elif ir.is_call(user, aten.slice.Tensor):
            raise Refused("weights are cut off behind the softmax: one column is a sink")
        elif not ir.is_call(user, *_KEEP_ROWS):
            raise Refused(f"the weights go through {_name(user)} before the values")
        site.nodes.add(user)
        node = user


def _weights_of(out: fx.Node, nodes: set[fx.Node]) -> fx.Node:
    return next(n for n in out.all_input_nodes if n in nodes)


def _climb(site: _Site) -> fx.Node:
    """From the softmax up to the product of q and k; masks and the scale join the site."""
    node: Any = site.softmax.args[0]
    scaled = False
    while not ir.is_call(node, *_PRODUCTS):
        if not ir.is_call(node):
            raise Refused("the scores are an input of the region")
        mask = _mask(node)
        if mask is not None:
            if scaled:
                raise Refused("the scores are scaled behind their mask")
            below, found = mask
            if ir.shape(below) != ir.shape(node):
                raise Refused("the mask makes more scores than the product has")
            site.nodes.update(a for a in node.all_input_nodes if ir.is_call(a, *_CONSTANTS))
            site.masks.append(found)
        elif ir.is_call(node, aten.mul.Tensor, aten.div.Tensor):
            below, factor = _scaling(node)
            site.scale *= factor
            scaled = True
        elif ir.widens(node) or ir.is_call(node, *ir.IDENTITIES, aten.contiguous.default):
            below = node.args[0]
        else:
            raise Refused(_other_step(node))
        site.nodes.add(node)
        node = below
    site.nodes.add(node)
    return node  # type: ignore[no-any-return]


def _scaling(node: fx.Node) -> tuple[fx.Node, float]:
    scores, factor = ir.operands(node)
    if isinstance(scores, (int, float)) and node.target is aten.mul.Tensor:
        scores, factor = factor, scores
    if not isinstance(factor, (int, float)):
        raise Refused("the scores are scaled by a tensor")
    return scores, float(factor) if node.target is aten.mul.Tensor else 1.0 / factor


def _other_step(node: fx.Node) -> str:
    if ir.is_call(node, aten.tanh.default):
        return "the scores are capped by tanh, which the library's call does not know"
    if ir.is_call(node, aten.cat.default):
        return "a column joins the scores, a sink, which the library's call does not know"
    return f"the scores go through {_name(node)} before the softmax"


def _mask(node: fx.Node) -> tuple[fx.Node, _Mask] | None:
    """(scores below, mask) where the node puts a mask on scores."""
    if ir.is_call(node, aten.add.Tensor) and not node.kwargs:
        a, b = ir.operands(node)
        if not ir.is_tensor(b):
            raise Refused("a number is added to the scores")
        if _from_a_product(a) and _from_a_product(b):
            raise Refused("a bias that is itself computed from a product is added to the scores")
        below, mask = (a, b) if _from_a_product(a) else (b, a)
        return below, _Mask(mask, None)
    if ir.is_call(node, *_FILLS):
        _outside(ir.argument(node, 2))
        return ir.argument(node, 0), _Mask(ir.argument(node, 1), False)
    if ir.is_call(node, *_WHERES):
        mask, a, b = node.args
        kept = _from_a_product(a)
        _outside(b if kept else a)
        return (a if kept else b), _Mask(mask, kept)  # type: ignore[return-value, arg-type]
    return None


def _outside(fill: Any) -> None:
    """Refuse a fill but -inf: rows that are masked whole have other weights, and other gradients."""
    at = _CONSTANTS.get(fill.target) if ir.is_call(fill) else None
    number = ir.argument(fill, at) if at is not None else fill
    if not isinstance(number, (int, float)):
        raise Refused("masked scores are set to a tensor's value")
    if number != -float("inf"):
        raise Refused(f"masked scores are set to {number:.2g}: a row masked whole keeps weights")


def _check(site: _Site, scores: Contraction, weighed: Contraction, out: fx.Node) -> None:
    """What the library's call asks of its operands."""
    q, k, v = scores.left, scores.right, weighed.right
    if len({ir.dtype(n) for n in (q.node, k.node, v.node, out)}) > 1:
        raise Refused("q, k, v and the result differ in dtype")
    if len({o.shape[:-2] for o in (q, k, v)}) > 1 or len(q.shape) not in (3, 4):
        raise Refused("q, k and v are not of one batch and as many heads")
    if k.shape[-2] != v.shape[-2] or not all(isinstance(o.shape[-1], int) for o in (q, v)):
        raise Refused("keys and values do not belong together, or their width is not static")
    added = [m for m in site.masks if m.kept is None]
    if len(added) > 1 or (added and len(site.masks) > 1):
        raise Refused("several masks, of which one at least is added")
    for mask in site.masks:
        wanted = torch.bool if mask.kept is not None else ir.dtype(q.node)
        if not ir.is_tensor(mask.node) or ir.dtype(mask.node) is not wanted:
            raise Refused("the mask is neither boolean nor of the dtype of q")
    if not _layout_free(out) and not ir.value(out).is_contiguous():
        raise Refused("its users may rely on the strides of the result")
    widths = (int(q.shape[-1]), int(v.shape[-1]))
    kind = "none" if not site.masks else "added" if added else "boolean"
    short = attention_exactness.shortfall(
        ir.value(q.node).device.type, ir.dtype(q.node), widths, kind
    )
    if short:
        raise Refused(short)


def _layout_free(node: fx.Node) -> bool:
    """Whether no user minds how the value lies in memory."""
    return all(
        ir.is_call(u, *_LAYOUT_FREE)
        or (ir.is_call(u, aten.transpose.int, aten.permute.default) and _layout_free(u))
        for u in node.users
    )


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _candidate(site: _Site, scores: Contraction, weighed: Contraction, out: fx.Node) -> Candidate:
    q, k, v = scores.left, scores.right, weighed.right
    masks = {f"mask{i or ''}": mask for i, mask in enumerate(site.masks)}
    scale, rounded = site.scale, site.rounded

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        given = torch.matmul(q.of(t["q"]), k.of(t["k"]).transpose(-1, -2)) * scale
        for role, mask in masks.items():
            if mask.kept is None:
                given = given + t[role]
            else:
                given = given.masked_fill(t[role] != mask.kept, -float("inf"))
        weights = torch.softmax(given, dim=-1)
        weights = weights if rounded is None else rounder(weights, rounded)
        return [torch.matmul(weights, v.of(t["v"])).permute(weighed.result)]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        rows = [
            _batched(graph, o.laid_out(graph, read[r])) for o, r in ((q, "q"), (k, "k"), (v, "v"))
        ]
        mask = _library_mask(graph, [(read[r], m.kept) for r, m in masks.items()])
        result = _library_call(graph, rows, mask, scale, out, weighed)
        return [
            result if _layout_free(out) else call(graph, aten.contiguous.default, (result,), out)
        ]

    drawn = {r: _boolean(m.kept) for r, m in masks.items() if m.kept is not None}
    kinds = ["added" if m.kept is None else "boolean" for m in site.masks]
    return Candidate(
        nodes=frozenset(site.nodes),
        inputs={"q": q.node, "k": k.node, "v": v.node} | {r: m.node for r, m in masks.items()},
        outputs=(out,),
        formula=formula,
        emit=emit,
        params={"scale": scale, "mask": " and ".join(kinds) or "none", "dim": q.shape[-1]},
        cast="" if rounded is None else "weights",
        scaled=("v",),
        draw=drawn,
        constant=tuple(r for r, m in masks.items() if m.kept is None),
        kernel="scaled_dot_product_attention",
    )


def _boolean(kept: bool) -> Any:
    """Draws a boolean mask of which every row keeps its first position."""

    def draw(extent: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        mask = torch.rand(extent, generator=generator) < 0.6
        mask[..., 0] = True
        return mask if kept else ~mask

    return draw


def _batched(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """(H, T, D) as (1, H, T, D): the library's fused kernels take four dimensions."""
    if len(ir.value(node).shape) == 4:
        return node
    return call(graph, aten.unsqueeze.default, (node, 0))


def _library_mask(graph: fx.Graph, masks: list[tuple[fx.Node, bool | None]]) -> fx.Node | None:
    """One mask of four dimensions; a boolean one is True where a weight is kept."""
    whole: fx.Node | None = None
    for node, kept in masks:
        one = call(graph, aten.logical_not.default, (node,)) if kept is False else node
        whole = one if whole is None else call(graph, aten.logical_and.default, (whole, one))
    while whole is not None and len(ir.value(whole).shape) < 4:
        whole = call(graph, aten.unsqueeze.default, (whole, 0))
    return whole


def _library_call(
    graph: fx.Graph,
    rows: list[fx.Node],
    mask: fx.Node | None,
    scale: float,
    out: fx.Node,
    weighed: Contraction,
) -> fx.Node:
    target = aten.scaled_dot_product_attention.default
    node = graph.call_function(target, (*rows, mask, 0.0, False), {"scale": scale})
    ir.inherit_provenance(node, out)
    back = [weighed.result.index(i) for i in range(len(weighed.result))]
    # The value is the region's own, laid out anew: asking the library would guard on sizes.
    val = ir.value(out)
    with val.fake_mode, torch.no_grad():
        val = val.permute(back)
        node.meta["val"] = val if val.dim() == 4 else val.unsqueeze(0)
    if len(back) == 3:
        node = call(graph, aten.squeeze.dim, (node, 0), out)
    if list(weighed.result) != sorted(weighed.result):
        node = call(graph, aten.permute.default, (node, list(weighed.result)), out)
    return node
