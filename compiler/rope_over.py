"""Rotations written over their inputs, where nobody else reads these: before a joint graph's cut, and after.

    whole = ...                                            of a group of layers, q, k and v in its columns
    q, k, v = columns of whole
    q', k'  = rope(q, k, cos, sin)

becomes ``turned = rope_over(whole, cos, sin, columns of q and k)`` with q', k' and v for columns of it.
The backward of the rotation needs none of its values and attention's needs v, so what the cut saves is
``turned``, in as many bytes as ``whole``, where it saved ``whole`` and rotated q and k once more.

That is done on the joint graph (``place``) as a function, so the cut can count. In a half that runs as
it is the call writes over ``whole`` in the end (``write``): so its result takes no memory of its own.

q, k, v in float32 or 16 bits are rotated and rounded as before, by the same kernel: numerics stay.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from fusewright.compiler import ir, rewrite
from fusewright.compiler.recompute import base, is_view

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
# Views that hold elements of the viewed, each once: with others nobody knows which columns are read.
_PLAIN = frozenset(
    {
        *_RESHAPES,
        aten.detach.default,
        aten.permute.default,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.squeeze.dim,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        operator.getitem,
    }
)
_READABLE = _PLAIN - {aten._unsafe_view.default} | {aten.expand.default}
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
_GROUPS = ("lora_group", "lora_group_4bit")
_ALIGNED = 16  # bytes: attention's kernels read so many at once


class _Heads(NamedTuple):
    """Heads in some columns of a tensor (batch, tokens, columns)."""

    whole: fx.Node
    start: int
    heads: int
    width: int

    @property
    def columns(self) -> range:
        return range(self.start, self.start + self.heads * self.width)


class _Site(NamedTuple):
    """A rotation that can be written over its input."""

    q: _Heads
    k: _Heads | None
    views: list[fx.Node]  # of the whole, in the graph's order


def place(graph: fx.Graph) -> int:
    """Rewrite a joint graph in place; tells how many rotations give their input's memory anew."""
    done = 0
    for rope in ir.own_calls(graph, "rope"):
        found = _found(rope)
        if found is not None:
            _replace(graph, rope, found)
            done += 1
    if done:
        graph.lint()
    return done


def write(half: fx.GraphModule) -> int:
    """Have the calls of a half write over their input in place; tells how many do."""
    return rewrite.each(half, ir.own_calls(half.graph, "rope_over"), _written)


def _written(graph: fx.Graph, turned: fx.Node) -> bool:
    whole = ir.named_arguments(turned)["whole"]
    rest = {n for n in whole.users if ir.own_name(n) != "rope_over_"}  # what was written before
    if rest != {turned} or not _made_here(whole):
        return False
    with graph.inserting_before(turned):
        graph.call_function(torch.ops.fusewright.rope_over_.default, turned.args)
    turned.replace_all_uses_with(whole, delete_user_cb=lambda u: u is not turned)
    graph.erase_node(turned)
    return True


def _made_here(whole: fx.Node) -> bool:
    """Whether the value lies in memory that was allocated for it, and nobody else reads that."""
    node, made = whole, base(whole)
    while node is not made:
        node = ir.argument(node, 0)
        if node.target not in _PLAIN and node is not made or len(node.users) != 1:
            return False
    if made.target in _PRODUCTS:
        return True
    while made.target is operator.getitem:
        source = ir.argument(made, 0)
        items = [n for n in source.users if n is not made]
        if any(n.target is not operator.getitem or n.args[1] == made.args[1] for n in items):
            return False
        made = source
    return ir.own_name(made) in _GROUPS


def _found(rope: fx.Node) -> _Site | None:
    given, results = ir.named_arguments(rope), ir.results(rope)
    q, k = _heads(given["q"]), None if given["k"] is None else _heads(given["k"])
    if q is None or results is None or given["out_dtype"] is not ir.dtype(given["q"]):
        return None
    if given["k"] is not None and (k is None or not _side_by_side(q, k)):
        return None
    tables = {base(given["cos"]), base(given["sin"])}
    if not _made_here(q.whole) or base(q.whole) in tables or not _aligned(q, k):
        return None
    views = _views_beside(rope, q, k)
    if views is None or not all(_suits(n) for n in results.values()):
        return None
    return _Site(q, k, views)


def _heads(x: fx.Node) -> _Heads | None:
    """Which heads ``x`` (batch, heads, tokens, features) is; None where it is laid out otherwise."""
    if ir.is_call(x, aten.transpose.int):
        turned = {d % 4 for d in x.args[1:]} == {1, 2}  # type: ignore[operator]
    else:
        turned = ir.is_call(x, aten.permute.default) and x.args[1] == [0, 2, 1, 3]
    split = ir.argument(x, 0)
    if not turned or not ir.is_call(split, *_RESHAPES) or len(ir.shape(split)) != 4:
        return None
    columns = ir.argument(split, 0)
    *rows, count, width = ir.shape(split)
    if ir.shape(columns) != (*rows, ir.last(columns)):
        return None
    piece = ir.as_slice(columns)
    whole, dim, start, stop, step = piece or (columns, 2, 0, ir.last(columns), 1)
    numbers = (start, stop, count, width, ir.last(whole))
    if not all(_is_number(n) for n in numbers) or len(ir.shape(whole)) != 3:
        return None
    if dim != 2 or step != 1 or int(stop) - int(start) != int(count) * int(width):
        return None
    return _Heads(whole, int(start), int(count), int(width))


def _is_number(size: Any) -> bool:
    return isinstance(size, int) or bool(getattr(size, "is_Integer", False))


def _side_by_side(q: _Heads, k: _Heads) -> bool:
    apart = q.columns.stop <= k.start or k.columns.stop <= q.start
    return q.whole is k.whole and q.width == k.width and apart


def _aligned(*pieces: _Heads | None) -> bool:
    """Whether every head of every row begins where a dense tensor's would, for who reads it next."""
    return all(
        n * ir.dtype(p.whole).itemsize % _ALIGNED == 0
        for p in pieces
        if p is not None
        for n in (p.start, p.width, int(ir.last(p.whole)))
    )


def _views_beside(rope: fx.Node, q: _Heads, k: _Heads | None) -> list[fx.Node] | None:
    """All views of the whole, where nobody but ``rope`` reads q and k, and others come behind it."""
    turned = [p.columns for p in (q, k) if p is not None]
    everything = range(int(ir.last(q.whole)))
    behind = {n: at for at, n in enumerate(rope.graph.nodes)}
    views: set[fx.Node] = set()
    waiting = [(q.whole, everything)]
    while waiting:
        node, columns = waiting.pop()
        for user in node.users:
            if is_view(user):
                if user.target not in _PLAIN:
                    return None
                views.add(user)
                waiting.append((user, _columns(user, q.whole, columns)))
            elif user is not rope:
                apart = all(columns.stop <= t.start or t.stop <= columns.start for t in turned)
                if not apart or not _reads(user) or behind[user] < behind[rope]:
                    return None
    return sorted(views, key=behind.__getitem__)


def _columns(view: fx.Node, whole: fx.Node, within: range) -> range:
    """Columns of the whole that a view of a view may hold, of which the other holds ``within``."""
    if ir.is_tensor(view) and 0 in ir.shape(view):
        return range(0)
    piece = ir.as_slice(view)
    if piece is None or piece[0] is not whole or piece[1] != 2:
        return within
    return range(piece[2], piece[3])


def _reads(user: fx.Node) -> bool:
    """Whether the node is a call that takes tensors however they lie in memory, and only reads."""
    target = user.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return target.namespace in ("aten", "prims", "fusewright")


def _suits(rotated: fx.Node) -> bool:
    """Whether whoever reads the result can read it as columns of a wider tensor."""
    return all(
        (u.target in _READABLE and _suits(u)) if is_view(u) else _reads(u) for u in rotated.users
    )


def _replace(graph: fx.Graph, rope: fx.Node, site: _Site) -> None:
    given, (q, k, views) = ir.named_arguments(rope), site
    results = ir.results(rope) or {}
    keys = (k.start, k.heads) if k is not None else (0, 0)
    tables = (given["cos"], given["sin"], given["layout"], given["rotary_dim"])
    args = (q.whole, *tables, q.start, q.heads, *keys, q.width)
    with graph.inserting_before(rope):
        turned = rewrite.call(graph, torch.ops.fusewright.rope_over.default, args, rope)
    ir.describe(turned, rope, ir.value(turned))
    for at, node in results.items():
        node.replace_all_uses_with(given["k" if at else "q"])
        graph.erase_node(node)
    graph.erase_node(rope)
    q.whole.replace_all_uses_with(turned, delete_user_cb=lambda u: u is not turned)
    last = turned
    for view in views:  # they are read behind the rotation only, and so may wait for it
        last.append(view)
        last = view
