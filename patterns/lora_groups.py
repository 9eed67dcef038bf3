"""After the adapters are matched: layers of one input together, and room for the augmented product.

``merge`` makes one ``lora_group`` of all that read the same x, frozen layers without adapters
included, and hands out the results as pieces of one tensor; a gated unit that takes two of them as
halves then writes both gradients into one buffer. ``settle`` runs last: the producers of x and of the
gradient leave room behind their rows where nobody else would see it, and the weights are asked for in
one buffer (kernels/room.py). The pieces are views of one result: AOTAutograd refuses an op whose
results share memory.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir, order
from fusewright.compiler.legality import mutations
from fusewright.compiler.normalize import drop_dead
from fusewright.compiler.rewrite import call, item
from fusewright.compiler.storage import Storage
from fusewright.kernels import room
from fusewright.kernels.lora_group import Group, plan, takes
from fusewright.patterns.quantised import is_weight

aten = torch.ops.aten

_ALIGNED = 8  # columns; a piece that starts elsewhere would start within 16 bytes
# Where the arguments of lora_group are.
_X, _INPUTS, _WEIGHTS, _BIASES, _DOWN, _UP, _MEMBER, _SOURCE, _SCALES = range(9)
_WIDTHS, _DTYPE, _ROOMY, _GRAD_ROOMY = range(9, 13)
# Of lora_group_4bit, whose weights are the packed ones, behind those: absmax, offset, nested absmax
# and code, heights, kinds, block sizes; one entry per layer each.
_HEIGHTS = 17


def _dense_op() -> Any:
    return torch.ops.fusewright.lora_group.default


def _op_4bit() -> Any:
    return torch.ops.fusewright.lora_group_4bit.default


def _is_group(node: fx.Node) -> bool:
    return node.target is _dense_op() or node.target is _op_4bit()


def _groups(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in ir.calls(graph) if _is_group(n)]


def over_4bit(args: list[Any]) -> tuple[Any, list[Any]]:
    """The op and its arguments, from those of lora_group, whose weights may be dequantised ones."""
    dense = args[_WEIGHTS]
    if not all(is_weight(w) for w in dense):
        return _dense_op(), args
    columns = [list(c) for c in zip(*(w.args for w in dense), strict=True)]
    packed, absmax, offset, nested, codes, rows, _, kinds, sizes, nested_sizes, _ = columns
    rest = (absmax, offset, nested, codes, rows, kinds, sizes, nested_sizes)
    return _op_4bit(), [*args[:_WEIGHTS], packed, *args[_BIASES:13], *rest]


def _args(node: fx.Node) -> list[Any]:
    return list(node.args)


def merge(graph: fx.Graph) -> None:
    """One group per x, where the results' users can wait for it."""
    _group_4bit(graph)
    if mutations(graph):
        return
    by_input: dict[tuple[fx.Node, Any], list[fx.Node]] = {}
    for node in _groups(graph):
        if _mergeable(node):
            by_input.setdefault((_args(node)[_X], node.target), []).append(node)
    for (x, op), members in by_input.items():
        dense = op is _dense_op()
        plain = [u for u in x.users if dense and _frozen_linear(u, x, members[0])]
        together = [n for n in graph.nodes if n in members or n in plain]
        if len(together) > 1:
            _merge(graph, together)


def _group_4bit(graph: fx.Graph) -> None:
    """Make a group of its own of every layer over a 4-bit weight that has no adapter."""
    for node in list(ir.calls(graph)):
        if ir.is_call(node, aten.linear.default) and is_weight(node.args[1]):
            with graph.inserting_before(node):
                made = call(graph, *over_4bit(_as_group(node)), node)
                y = item(graph, item(graph, made, 0), 0)
            node.replace_all_uses_with(y)
            graph.erase_node(node)


def _mergeable(node: fx.Node) -> bool:
    return _untrained(node) and _kind(node) is not None


def _untrained(node: fx.Node) -> bool:
    return node.target is _op_4bit() or all(_frozen(w) for w in _args(node)[_WEIGHTS])


def _group(node: fx.Node) -> Group:
    """The group in fake tensors."""
    args = _args(node)
    group = Group(*fx.map_arg(tuple(args[:9]), ir.value))
    if node.target is _op_4bit():
        width, dtype = ir.shape(args[_X])[-1], ir.dtype(args[_X])
        dense = [torch.empty((n, width), dtype=dtype, device="meta") for n in args[_HEIGHTS]]
        group = group._replace(weights=dense)
    return group


def _kind(node: fx.Node) -> Any:
    """What layers must have in common; None where the augmented product does not serve them."""
    group = _group(node)
    fits = takes(group, _args(node)[_DTYPE]) and group.weights[0].shape[0] % _ALIGNED == 0
    return (group.x.dtype, group.dtype) if fits else None


def _frozen(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder" and not _trained(node)


def _trained(node: fx.Node) -> bool:
    return bool(node.meta.get("requires_grad"))


def _frozen_linear(node: fx.Node, x: fx.Node, like: fx.Node) -> bool:
    """A frozen layer without an adapter that reads x too."""
    if not ir.is_call(node, aten.linear.default) or node.args[0] is not x:
        return False
    weight, bias = node.args[1], ir.argument(node, 2)
    same = (
        ir.dtype(node) == _args(like)[_DTYPE] == ir.dtype(x) and ir.shape(node)[-1] % _ALIGNED == 0
    )
    return same and _frozen(weight) and (bias is None or _frozen(bias))


def _as_group(node: fx.Node) -> list[Any]:
    """The arguments of a member, a plain layer as a group without adapters."""
    if _is_group(node):
        return _args(node)
    weight, bias = node.args[1], ir.argument(node, 2)
    widths = [ir.shape(node)[-1]]
    return [
        node.args[0],
        [],
        [weight],
        [bias],
        [],
        [],
        [],
        [],
        [],
        widths,
        ir.dtype(node),
        False,
        False,
    ]


def _result(member: fx.Node) -> fx.Node:
    """The node that stands for a member's y."""
    if not _is_group(member):
        return member
    ys = next(u for u in member.users if u.args[1] == 0)
    return next(iter(ys.users))


def _merge(graph: fx.Graph, members: Sequence[fx.Node]) -> None:
    if len({_kind(m) for m in members if _is_group(m) and _args(m)[_DOWN]}) > 1:
        return
    op = next(m.target for m in members if _is_group(m))
    joined = _as_group(members[0])
    for member in members[1:]:
        more = _as_group(member)
        offset, layers = len(joined[_INPUTS]), len(joined[_WEIGHTS])
        more[_MEMBER] = [j + layers for j in more[_MEMBER]]
        more[_SOURCE] = [i + offset if i >= 0 else i for i in more[_SOURCE]]
        lists = [at for at in range(len(joined)) if isinstance(joined[at], (list, tuple))]
        for at in lists:
            joined[at] = [*joined[at], *more[at]]
    heights, joined[_WIDTHS] = joined[_WIDTHS], [sum(joined[_WIDTHS])]
    results = [_result(m) for m in members]
    with graph.inserting_before(members[-1]):
        y = item(graph, item(graph, call(graph, op, joined, results[0]), 0), 0)
        pieces = call(graph, aten.split_with_sizes.default, (y, heights, -1), results[0])
        made = [item(graph, pieces, i) for i in range(len(heights))]
    for old, new in zip(results, made, strict=True):
        ir.inherit_provenance(new, old)
        old.replace_all_uses_with(new)
    if order.restore(graph):
        drop_dead(graph)
        return
    for old, new in zip(results, made, strict=True):  # no order would serve: as it was
        new.replace_all_uses_with(old)
    drop_dead(graph)


def settle(graph: fx.Graph) -> list[Storage]:
    """See the module's docstring."""
    wanted = []
    for node in _groups(graph):
        args = _args(node)
        bare = not args[_DOWN]
        if not _untrained(node) or _kind(node) is None or (bare and node.target is _dense_op()):
            continue
        x = ir.value(args[_X])
        if not bare and room.serves(x.device, x.dtype):
            how = plan(_group(node))
            space = room.needed(how.columns, how.thin)
            _make_room(graph, node, space)
            if node.target is _dense_op():
                wanted.append(_storage(node, space))
    return wanted


def _storage(node: fx.Node, space: room.Room) -> Storage:
    weights = tuple(_args(node)[_WEIGHTS])

    def holds(tensors: Sequence[torch.Tensor]) -> bool:
        return room.find(tensors, space.columns, space.rows) is not None

    def make(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return room.allocate(tensors, space)

    dtype = ir.dtype(_args(node)[_X])

    def pays(tensors: Sequence[torch.Tensor]) -> bool:
        return room.serves(tensors[0].device, dtype)

    def adds(tensors: Sequence[torch.Tensor]) -> int:
        return room.added(tensors, space)

    return Storage(weights, make, holds, room.owned, "lora", pays, adds)


def _make_room(graph: fx.Graph, node: fx.Node, space: room.Room) -> None:
    """Have x, and the gradient of y, made with room behind their rows."""
    args = _args(node)
    x = args[_X]
    producer = x.args[0] if ir.is_call(x, operator.getitem) and x.args[1] == 0 else x
    # Two groups would write over each other's thin products, which the backward reads.
    groups = [u for u in x.users if _is_group(u)]
    unseen = len(groups) == 1 and all(
        u is node or ir.is_call(u, aten.linear.default) for u in x.users
    )
    if unseen and _with_room(graph, producer, room=space.columns):
        args[_ROOMY] = True
    y = _result(node) if len(args[_WIDTHS]) == 1 else None
    if y is not None and len(y.users) == 1:
        (user,) = y.users
        if user.args[0] is y and _with_room(graph, user, grad_room=space.rows):
            args[_GRAD_ROOMY] = True
    node.args = tuple(args)


def _with_room(graph: fx.Graph, node: Any, **asked: int) -> bool:
    """Replace the call by its variant with room, or raise what the variant leaves; False if none."""
    if not ir.is_call(node) or getattr(node.target, "namespace", "") != "fusewright":
        return False
    name = node.target._schema.name.partition("::")[2]
    variant = getattr(torch.ops.fusewright, name + "_roomy", None)
    roomy = name.endswith("_roomy")
    target = node.target if roomy else getattr(variant, "default", None)
    if target is None:
        return False
    names = [a.name for a in target._schema.arguments]
    given = dict(zip(names, node.args, strict=False))
    extra = [n for n in names if n in ("room", "grad_room")]
    if not set(asked) <= set(extra):
        return False
    for n in extra:
        given[n] = max(given.get(n, 0), asked.get(n, 0))
    node.target, node.args = target, tuple(given[n] for n in names)
    mode = next(v.fake_mode for v in map(ir.value, node.all_input_nodes) if hasattr(v, "fake_mode"))
    with mode, torch.no_grad():
        node.meta["val"] = target(*fx.map_arg(node.args, ir.value))
    for user in node.users:
        if ir.is_call(user, operator.getitem):
            user.meta["val"] = ir.value(node)[user.args[1]]
    return True
