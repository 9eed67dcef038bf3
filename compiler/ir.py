"""Reading a canonical graph: dtypes, shapes, casts, slices and provenance of its nodes.

The canonical graph is pre-dispatch ATen with a fake tensor in every node's ``meta["val"]``. Nothing
here changes a graph.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten._to_copy.default,
        aten.type_as.default,
    }
)
IDENTITIES = frozenset({aten.alias.default, aten.contiguous.default, aten.clone.default})
# ``tensor.data``: the same storage without autograd and without its version counter.
DATA: Any = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
        aten.t.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
    }
)


def value(node: fx.Node) -> Any:
    """What the node computes: a fake tensor, a SymInt, a tuple of those, or None."""
    return node.meta.get("val")


def is_tensor(node: Any) -> bool:
    """Whether ``node`` is a graph node that yields one tensor."""
    return isinstance(node, fx.Node) and isinstance(value(node), torch.Tensor)


def dtype(node: fx.Node) -> torch.dtype:
    """The tensor node's dtype."""
    out: torch.dtype = value(node).dtype
    return out


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The tensor node's sizes: int, or for a symbolic one its sympy expression.

    Expressions compare by structure. Comparing SymInts instead would add guards to the graph.
    """
    return tuple(_settled(s) for s in value(node).shape)


def alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two operands of one pointwise call have the same shape.

    Sizes that are other expressions (of a scan's halves put together, say) but had one number above one
    when traced are the same: the call broadcasts neither, so the graph is guarded on their equality.
    """
    shapes = value(a).shape, value(b).shape
    return len(shapes[0]) == len(shapes[1]) and all(
        _settled(x) == _settled(y) or _guarded_equal(x, y) for x, y in zip(*shapes, strict=True)
    )


def hold_equal(a: fx.Node, b: fx.Node, dims: range) -> bool:
    """Whether two values have equal sizes in ``dims``; where nothing says so yet, it is guarded.

    For calls that take unequal sizes too, such as a gather: the graph then holds for equal ones alone,
    and others are captured anew.
    """
    shapes = value(a).shape, value(b).shape
    pairs = [(shapes[0][d], shapes[1][d]) for d in dims]
    if any(_number(x) is None or _number(x) != _number(y) for x, y in pairs):
        return False
    return all(_settled(x) == _settled(y) or bool(x == y) for x, y in pairs)


def _number(size: Any) -> int | None:
    """The size when the graph was traced; None for one that depends on values."""
    try:
        return int(traced(size))
    except KeyError:
        return None


def _guarded_equal(x: Any, y: Any) -> bool:
    number = _number(x)
    return number is not None and number > 1 and number == _number(y)


def _settled(size: Any) -> Any:
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return size


def traced(size: Any) -> Any:
    """The number that a symbolic size had when the graph was traced; anything else as it is."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression.subs({s: traced_symbol(size, s) for s in expression.free_symbols}))


def traced_symbol(size: torch.SymInt, symbol: Any) -> int:
    """The number behind one symbol of a symbolic size."""
    environment = size.node.shape_env
    known = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    return int(known[symbol])


def last(node: fx.Node) -> Any:
    """The size of the last dimension, 1 for a scalar."""
    sizes = shape(node)
    return sizes[-1] if sizes else 1


def is_floating(node: Any) -> bool:
    """Whether the node yields one floating tensor."""
    return is_tensor(node) and dtype(node).is_floating_point


def is_call(node: Any, *targets: Any) -> bool:
    """Whether the node calls one of ``targets`` (any call if none is named)."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and (not targets or node.target in targets)
    )


def is_cast(node: Any) -> bool:
    """A conversion between floating dtypes that moves nothing and reorders nothing."""
    return (
        is_call(node)
        and node.target in CASTS
        and is_floating(node)
        and is_floating(node.args[0])
        and value(node).device == value(node.args[0]).device
    )


def widens(node: Any) -> bool:
    """A cast that loses nothing, as from bf16 to float32."""
    return is_cast(node) and dtype(node).itemsize > dtype(node.args[0]).itemsize


def strip_casts(node: fx.Node) -> fx.Node:
    """The node below any casts that lose nothing, and identities."""
    while widens(node) or is_call(node, *IDENTITIES):
        node = node.args[0]  # type: ignore[assignment]
    return node


def argument(node: Any, index: int, default: Any = None) -> Any:
    """The call's positional argument, or ``default`` where it was left out."""
    return node.args[index] if len(node.args) > index else default


def operands(node: fx.Node) -> tuple[Any, Any]:
    """The two operands of a binary call."""
    return node.args[0], node.args[1]


def other_operand(node: fx.Node, known: fx.Node) -> Any:
    """The operand of a binary call that is not ``known``."""
    a, b = operands(node)
    return b if a is known else a


def normal_dim(node: fx.Node, dim: int) -> int:
    """``dim`` counted from the front for the tensor ``node``."""
    return dim % max(len(shape(node)), 1)


def last_dim_only(source: fx.Node, dims: Any) -> bool:
    """Whether ``dims`` of a reduction name just the last dimension of ``source``."""
    dims = [dims] if isinstance(dims, int) else dims
    rank = len(shape(source))
    return bool(dims) and len(dims) == 1 and dims[0] % rank == rank - 1


def as_slice(node: fx.Node) -> tuple[fx.Node, int, int, int, int] | None:
    """(source, dim, start, stop, step) when the node is one piece of a slice, split or chunk.

    Sizes along the sliced dimension must be static; None otherwise.
    """
    if is_call(node, aten.slice.Tensor):
        source: fx.Node = argument(node, 0)
        start, stop, step = (argument(node, i) for i in (2, 3, 4))
        dim = normal_dim(source, argument(node, 1, 0))
        size = shape(source)[dim]
        if not all(isinstance(v, int) or v is None for v in (size, start, stop, step)):
            return None
        first, end, stride = slice(start, stop, step or 1).indices(size)
        return source, dim, first, end, stride
    if is_call(node, operator.getitem) and is_call(node.args[0]):
        return _piece(argument(node, 0), argument(node, 1))
    return None


def _piece(split: fx.Node, index: int) -> tuple[fx.Node, int, int, int, int] | None:
    if split.target not in (
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.split.sizes,
        aten.chunk.default,
        aten.tensor_split.sections,
        aten.unsafe_chunk.default,
    ):
        return None
    source: fx.Node = argument(split, 0)
    dim = normal_dim(source, argument(split, 2, 0))
    widths = [piece.shape[dim] for piece in value(split)]
    if not all(isinstance(w, int) for w in widths):
        return None
    start = sum(widths[:index])
    return source, dim, start, start + widths[index], 1


def source_line(node: fx.Node) -> str:
    """``file:line`` of the user's code that made the node, innermost frame; empty if unknown."""
    frames = [
        line.strip()
        for line in (node.meta.get("stack_trace") or "").splitlines()
        if line.strip().startswith("File ")
    ]
    if not frames:
        return ""
    parts = frames[-1].split(", ")
    return f"{parts[0][6:-1]}:{parts[1].removeprefix('line ')}" if len(parts) > 1 else ""


def module_path(node: fx.Node) -> str:
    """The innermost module's path inside the region, e.g. ``self_attn.q_norm``; empty if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = re.sub(r"^L\['\w+'\]", "", str(list(stack.values())[-1][0]))
    return path.replace("._modules['", ".").replace("']", "").strip(".")


def inherit_provenance(node: fx.Node, source: fx.Node) -> None:
    """Give ``node`` the source line and the module of ``source``, where it has them."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """The call nodes in order."""
    return (n for n in graph.nodes if n.op == "call_function")


_RANDOM = frozenset({"dropout", "bernoulli", "bernoulli_", "rand", "randn", "native_dropout"})


def is_random(node: fx.Node) -> bool:
    """Whether the call draws random numbers."""
    name = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "")
    if name == "scaled_dot_product_attention":
        return bool(argument(node, 4, 0.0))
    return name in _RANDOM


def draws_in_vain(node: fx.Node) -> bool:
    """Whether the call draws random numbers that nobody reads; it still moves the generator."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not node.users and (seeded or is_random(node))


def has_effect(node: fx.Node) -> bool:
    """Whether the call does more than yield a value: its place among others of the kind counts."""
    return is_random(node) or node.is_impure()


def own_name(node: Any) -> str:
    """The name of an op of ours, "" for anything else."""
    target = getattr(node, "target", None)
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "fusewright":
        return ""
    return str(target._schema.name.partition("::")[2])


def own_calls(graph: fx.Graph, *names: str) -> list[fx.Node]:
    """The calls of these ops of ours, in order."""
    return [node for node in graph.nodes if own_name(node) in names]


def results(node: fx.Node) -> dict[Any, fx.Node] | None:
    """Position -> the getitem of it; None if the node is used in another way, or one twice."""
    found = {n.args[1]: n for n in node.users if n.target is operator.getitem}
    return found if len(found) == len(node.users) else None


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an op of ours, by name; those ops have no defaults."""
    target: Any = node.target
    names = [a.name for a in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def describe(node: fx.Node, like: fx.Node, result: Any) -> None:
    """Say of a new call what is known of ``like``, its own value, and its own arguments' values."""
    node.meta = {**like.meta, "val": result}
    if node.meta.pop("eager_input_vals", None) is not None:  # Inductor keeps to their strides
        node.meta["eager_input_vals"] = fx.node.map_arg((node.args, node.kwargs), value)
