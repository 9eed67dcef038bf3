"""Linear layers over bitsandbytes' 4-bit weights, read off what the graph computes.

A layer is either a call of ``bitsandbytes::gemm_4bit``, or a custom autograd function whose forward
body calls it, or dequantises the weight and multiplies, and whose backward body multiplies the gradient
by the same weight:

    y = x W^T + b        dx = dy W        W = code[packed] scale, scale nested or not (kernels/nf4.py)

The bodies are walked call by call; a call that is none of theirs refuses the layer. ``expand`` puts
``linear(x, weight_4bit(...), b)`` in place of each layer that it can read, so that what looks for
linear layers finds these too, and tells why others stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Miss, Refused
from fusewright.compiler.rewrite import call
from fusewright.kernels.codes import KINDS

aten = torch.ops.aten
_NESTED_BLOCKSIZE = 256  # the only one that gemm_4bit knows
GRADIENT = object()  # the gradient of y, in a backward's body
SIZE = object()  # a size or what is made of sizes, which no layer is computed from


@dataclass(frozen=True)
class Weight:
    """A 4-bit weight (rows, columns) by the nodes of its tensors and its constants.

    The last three nodes are None and nested_blocksize 0 where the scales are not quantised.
    ``turned`` while its transpose is meant; ``rounded`` are the dtypes that it went through.
    """

    packed: Any
    absmax: Any
    offset: Any
    nested_absmax: Any
    nested_code: Any
    rows: int
    columns: int
    kind: str
    blocksize: int
    nested_blocksize: int
    turned: bool = False
    rounded: tuple[torch.dtype, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Linear:
    """y = x W^T + bias, for x in its own dtype."""

    x: Any
    weight: Weight
    bias: Any


@dataclass(frozen=True)
class _Scales:
    """Block scales while they are put together: code[absmax] nested_absmax, plus an offset later."""

    absmax: Any
    nested_absmax: Any
    nested_code: Any
    blocksize: int
    offset: Any = None


@dataclass(frozen=True)
class _Product:
    """A matrix product g W, the gradient of x."""

    left: Any
    weight: Weight


def expand(graph: fx.Graph) -> list[Miss]:
    """See the module's docstring; returns why layers were left as they are."""
    missed = []
    for node in list(ir.calls(graph)):
        if not mentions_4bit(node):
            continue
        try:
            _replace(graph, node, read(node))
        except Refused as reason:
            missed.append(
                Miss(
                    "lora", "4-bit weight", str(reason), ir.source_line(node), ir.module_path(node)
                )
            )
    return missed


def mentions_4bit(node: fx.Node) -> bool:
    """Whether the call is a 4-bit product, or a custom function whose forward has a 4-bit weight."""
    if _name(node) == "gemm_4bit":
        return True
    forward = _bodies(node)[0] if is_custom(node) else None
    return forward is not None and any(
        _name(n) in ("gemm_4bit", "dequantize_4bit") for n in ir.calls(forward.graph)
    )


def read(node: fx.Node) -> Linear:
    """The layer that a call computes.

    Raises:
        Refused: it is none, or none that can be computed bit for bit.
    """
    if not is_custom(node):
        found: Linear = _read_call(node, node.args, dict(node.kwargs))
    else:
        found = _custom(node)
    _check(found)
    return found


def _name(node: Any) -> str:
    """The name of a bitsandbytes operator, "" for any other call."""
    if not ir.is_call(node) or getattr(node.target, "namespace", "") != "bitsandbytes":
        return ""
    return str(node.target._schema.name.partition("::")[2])


def is_weight(node: Any) -> bool:
    """Whether the node is a weight that ``expand`` wrote."""
    return ir.is_call(node, torch.ops.fusewright.weight_4bit.default)


def is_custom(node: Any) -> bool:
    """Whether the node calls a custom autograd function."""
    return ir.is_call(node) and (
        getattr(node.target, "__name__", "") == "autograd_function_apply"
        or type(node.target).__name__ == "AutogradFunctionApply"
    )


def _bodies(node: fx.Node) -> tuple[fx.GraphModule | None, fx.GraphModule | None]:
    root: Any = node.graph.owning_module
    found = []
    for body in node.args[:2]:
        attribute = isinstance(body, fx.Node) and body.op == "get_attr"
        found.append(root.get_submodule(str(body.target)) if attribute else None)  # type: ignore[union-attr]
    return found[0], found[1]


def _custom(node: fx.Node) -> Linear:
    forward, backward = _bodies(node)
    if forward is None or backward is None:
        raise Refused("the custom function's bodies are not known")
    given = list(node.args[2:])
    # Some releases of Dynamo hand out the body's other values too; _replace sees that none is used.
    (layer, *others), saved = _outputs(_walk(forward, given))
    if not isinstance(layer, Linear):
        raise Refused("its forward is not one linear layer over a 4-bit weight")
    gradients, _ = _outputs((_walk(backward, [GRADIENT, *(None for _ in others), *saved]), ()))
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        same = i < len(given) and given[i] is layer.x and isinstance(gradient, _Product)
        if not same or gradient.weight != layer.weight:
            raise Refused("its backward is not the gradient of a frozen linear layer")
    return layer


def _outputs(found: Any) -> tuple[list[Any], list[Any]]:
    """(results, what the forward saves) of a body's nested output."""
    results, *rest = found if isinstance(found, (tuple, list)) else (found,)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    return results, list(rest[0]) if rest and isinstance(rest[0], (tuple, list)) else list(rest)


def _walk(body: fx.GraphModule, given: list[Any]) -> Any:
    """The body's output in terms of ``given`` and of what its calls are read as."""
    known: dict[fx.Node, Any] = {}
    places = body.graph.find_nodes(op="placeholder")
    context = [None] * (len(places) - len(given))  # older graphs pass the function's context first
    if len(context) > 1 or len(given) > len(places):
        raise Refused(f"its body takes {len(places)} values, and is given {len(given)}")
    known.update(zip(places, [*context, *given], strict=True))
    read = _read_nodes(body.graph)
    for node in body.graph.nodes:
        if node not in read:
            continue
        if node.op in ("call_function", "call_method"):
            known[node] = _read_call(node, _mapped(node.args, known), _mapped(node.kwargs, known))
        elif node.op == "output":
            return _mapped(node.args[0], known)
        elif node.op != "placeholder":
            raise Refused(f"its body has a {node.op}")
    raise Refused("its body has no output")


def _read_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the output or a call in place reads; what else there is (sizes) changes nothing."""
    read: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        if node in read or node.op == "output" or name.endswith("_") or name == "_set_grad_enabled":
            read |= {node, *node.all_input_nodes}
    return read


def _mapped(value: Any, known: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return known[value]
    if isinstance(value, (tuple, list)):
        return [_mapped(v, known) for v in value]
    return {k: _mapped(v, known) for k, v in value.items()} if isinstance(value, dict) else value


def _read_call(node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
    """What one call of a body yields, in this module's terms."""
    operator_of = {"gemm_4bit": _gemm, "dequantize_4bit": _dequantised,
                   "dequantize_blockwise": _nested}.get(_name(node))  # fmt: skip
    if operator_of is not None:
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        return operator_of(dict(zip(names, args, strict=False)) | kwargs)
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    if name == "_set_grad_enabled":
        return None
    if name in _QUESTIONS:
        return SIZE
    if node.target is operator.getitem:
        return args[0][args[1]]
    step = _STEPS.get(name)
    found = step(args, kwargs) if step is not None else None
    if found is None:
        raise Refused(f"its body calls {name}")
    return found


def _gemm(given: dict[str, Any]) -> Linear:
    scales = given["absmax"]
    if given.get("absmax_8bit") is not None:
        scales = _Scales(given["absmax_8bit"], scales, given["absmax_code"], _NESTED_BLOCKSIZE,
                         given["absmax_offset"])  # fmt: skip
    weight = _weight(given["B"], scales, given["shapeB"], given["quant_type"], given["blocksize"])
    return Linear(given["A"], weight, given.get("bias"))


def _dequantised(given: dict[str, Any]) -> Weight:
    weight = _weight(given["A"], given["absmax"], given["shape"], given["quant_type"],
                     given["blocksize"])  # fmt: skip
    return replace(weight, rounded=(given["dtype"],))


def _nested(given: dict[str, Any]) -> _Scales:
    if given["dtype"] is not torch.float32:
        raise Refused(f"its block scales are in {given['dtype']}")
    return _Scales(given["A"], given["absmax"], given["code"], given["blocksize"])


def _weight(packed: Any, scales: Any, shape: Any, kind: Any, blocksize: Any) -> Weight:
    rows, columns = shape
    inner: Any = (scales, None, None, None, 0)
    if isinstance(scales, _Scales):
        if scales.offset is None:
            raise Refused("its block scales are quantised without an offset")
        inner = (scales.absmax, scales.offset, scales.nested_absmax, scales.nested_code,
                 scales.blocksize)  # fmt: skip
    absmax, offset, nested_absmax, nested_code, nested_blocksize = inner
    tensors = (_flat(packed), absmax, offset, nested_absmax, nested_code)
    return Weight(*tensors, rows, columns, kind, blocksize, nested_blocksize)


def _flat(packed: Any) -> Any:
    """The node whose bytes lie as in ``packed``, below views of a vector."""
    while ir.is_call(packed, *ir.VIEWS) and 1 in ir.shape(packed.args[0]):
        packed = packed.args[0]
    return packed


def _view(args: Any, kwargs: dict[str, Any]) -> Any:
    """Views of the packed bytes and of vectors; of anything else they would change the layer."""
    plain = ir.is_tensor(args[0]) and sum(s != 1 for s in ir.shape(args[0])) <= 1
    return args[0] if plain else None


def _transposed(args: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], Weight):
        return replace(args[0], turned=not args[0].turned)
    return _view(args, kwargs)


def _converted(args: Any, kwargs: dict[str, Any]) -> Any:
    """A move to the same device, or a rounding of the weight; scales and inputs must stay."""
    value, *rest = args
    dtypes = [v for v in (*rest, *kwargs.values()) if isinstance(v, torch.dtype)]
    if isinstance(value, Weight):
        return replace(value, rounded=(*value.rounded, *dtypes))
    own = ir.dtype(value) if ir.is_tensor(value) else None
    own = torch.float32 if isinstance(value, _Scales) else own
    return value if value is GRADIENT or all(d is own for d in dtypes) else None


def _widened(args: Any, kwargs: dict[str, Any]) -> Any:
    return _converted((args[0], torch.float32), {})


def _sum(args: Any, kwargs: dict[str, Any]) -> Any:
    scales, offset = args[:2]
    if isinstance(scales, _Scales) and scales.offset is None and ir.is_tensor(offset):
        return replace(scales, offset=offset)
    return None


def _linear(args: Any, kwargs: dict[str, Any]) -> Any:
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    whole = isinstance(weight, Weight) and not weight.turned and ir.is_tensor(x)
    return Linear(x, weight, bias) if whole else None


def _matmul(args: Any, kwargs: dict[str, Any]) -> Any:
    left, weight = args[:2]
    if not isinstance(weight, Weight):
        return None
    if left is GRADIENT:
        return None if weight.turned else _Product(left, weight)
    return Linear(left, replace(weight, turned=False), None) if weight.turned else None


_QUESTIONS = ("numel", "size", "dim", "eq", "ne")  # about shapes: they change no value
_Step = Callable[[Any, dict[str, Any]], Any]
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("view", "reshape", "contiguous", "detach"), _view),
    **dict.fromkeys(("t", "transpose"), _transposed),
    "to": _converted,
    "float": _widened,
    **dict.fromkeys(("add", "iadd", "add_"), _sum),
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm"), _matmul),
}


def _check(layer: Linear) -> None:
    """Refuse what would not be computed bit for bit."""
    weight, x = layer.weight, layer.x
    tensors = (weight.packed, weight.absmax, weight.offset, weight.nested_absmax,
               weight.nested_code, layer.bias)  # fmt: skip
    if not ir.is_floating(x) or not all(t is None or ir.is_tensor(t) for t in tensors):
        raise Refused("its inputs are not tensors of the graph")
    dtype, device = ir.dtype(x), ir.value(x).device
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise Refused(f"it works in {dtype}")
    if weight.kind not in KINDS:
        raise Refused(f"its format {weight.kind!r} is not known")
    if any(d not in (torch.float32, dtype) for d in weight.rounded):
        raise Refused("its weight is rounded to another dtype before it is used")
    if layer.bias is not None and ir.dtype(layer.bias) is not dtype:
        raise Refused("its bias is of another dtype")
    packed = ir.value(weight.packed)
    elements = weight.rows * weight.columns
    if ir.shape(x)[-1] != weight.columns or 2 * packed.numel() * packed.itemsize != elements:
        raise Refused(f"its weight is not {weight.rows} x {weight.columns}")
    if device.type == "cpu" and weight.columns % weight.blocksize:
        # bitsandbytes' kernel for the CPU starts each row with a new block, and no other does.
        raise Refused("its blocks cross rows, which on the CPU is computed in another way")


def _replace(graph: fx.Graph, node: fx.Node, layer: Linear) -> None:
    weight = layer.weight
    results = [node] if ir.is_tensor(node) else list(node.users)
    if not ir.is_tensor(node) and any(
        not ir.is_call(u, operator.getitem) or u.args[1] != 0 for u in results
    ):
        raise Refused("more than its result is used")
    with graph.inserting_before(node):
        tensors = (weight.packed, weight.absmax, weight.offset, weight.nested_absmax,
                   weight.nested_code)  # fmt: skip
        sizes = (weight.rows, weight.columns, weight.kind, weight.blocksize,
                 weight.nested_blocksize, ir.dtype(layer.x))  # fmt: skip
        op = torch.ops.fusewright.weight_4bit.default
        dense = call(graph, op, (*tensors, *sizes), node)
        made = call(graph, aten.linear.default, (layer.x, dense, layer.bias), node)
    for old in results:
        old.replace_all_uses_with(made)
        if old is not node:
            graph.erase_node(old)
    graph.erase_node(node)
