"""Cost formulas of a joint graph's nodes, in sympy over the graph's own symbols.

FLOPs: matrix products by torch's flop counter, our ops by their own formulas, fused attention by its
shapes (half where causal). Bytes moved: every tensor once a call. Memory: the storage that a value
keeps alive, room behind its rows included.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from fusewright.compiler import ir
from fusewright.compiler.planning.devices import Device
from fusewright.compiler.recompute import is_view, tensors
from fusewright.runtime.op import flop_formulas, passing_formulas

_ATTENTION = "_scaled_dot_product_"


@dataclass(frozen=True)
class Work:
    """What one run of a node takes.

    Attributes:
        memory: bytes of the storages that its results lie in; 0 for views.
        moved: bytes that it reads and writes.
        flops: of matrix products.
        passing: bytes that it needs while it runs, beside those.
        before: bytes that it moves before its products begin.
        kind: "products", "attention" or "attention_backward": whose rate its FLOPs have.
    """

    memory: sympy.Expr
    moved: sympy.Expr
    flops: sympy.Expr
    passing: sympy.Expr = sympy.S.Zero
    before: sympy.Expr = sympy.S.Zero
    kind: str = "products"

    @property
    def formulas(self) -> tuple[sympy.Expr, ...]:
        """In the order of :class:`Amounts`."""
        return self.memory, self.moved, self.flops, self.passing, self.before

    def seconds(self, device: Device, amounts: Amounts) -> float:
        """The time of a run whose formulas came to these numbers."""
        if amounts.moved == 0:
            return 0.0
        share = device.products / getattr(device, self.kind)
        return device.seconds(amounts.flops * share, amounts.moved) + device.copied(amounts.before)


class Amounts(NamedTuple):
    """The formulas of a :class:`Work` in numbers."""

    memory: float
    moved: float
    flops: float
    passing: float
    before: float


def expression(size: Any) -> sympy.Expr:
    """A number or symbolic number as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def sizes(graph: fx.Graph) -> Iterator[torch.SymInt]:
    """The symbolic sizes of a graph's inputs."""
    for node in graph.find_nodes(op="placeholder"):
        value = ir.value(node)
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                yield size


def of(node: fx.Node) -> Work:
    """The formulas of one node."""
    zero = sympy.Integer(0)
    found = list(tensors(ir.value(node)))
    if is_view(node):
        return Work(zero, zero, zero)
    memory = sum((_storage(t) for t in found), zero)
    if node.target is operator.getitem:
        return Work(memory, zero, zero)
    if node.op != "call_function" or not found:
        return Work(memory, zero, zero)
    read = {n for n in node.all_input_nodes if ir.is_tensor(n)}
    moved = sum((_extent(ir.value(n)) for n in read), zero) + sum(map(_extent, found), zero)
    flops, kind = _flops(node)
    return Work(memory, moved, flops, *_passing(node), kind)


def _storage(t: torch.Tensor) -> sympy.Expr:
    return expression(t.untyped_storage().nbytes())


def _extent(t: torch.Tensor) -> sympy.Expr:
    """Bytes that a kernel touches: an expanded tensor's memory is read once."""
    expanded = any(isinstance(s, int) and s == 0 for s in t.stride())
    return _storage(t) if expanded else expression(t.numel()) * t.element_size()


def _flops(node: fx.Node) -> tuple[sympy.Expr, str]:
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    name = "" if schema is None else schema.name.partition("::")[2]
    args = fx.map_arg(node.args, ir.value)
    kwargs = fx.map_arg(node.kwargs, ir.value)
    if name.startswith(_ATTENTION):
        return _attention(name, schema, args, kwargs)
    own = flop_formulas().get(name) if getattr(target, "namespace", "") == "fusewright" else None
    if own is not None:
        return expression(own(args, ir.value(node))), "products"
    formula = flop_registry.get(getattr(target, "_overloadpacket", None))
    if formula is None:
        return sympy.Integer(0), "products"
    return expression(formula(*args, **kwargs, out_val=ir.value(node))), "products"


def _passing(node: fx.Node) -> tuple[sympy.Expr, sympy.Expr]:
    """Bytes within a run and bytes moved before its products; of attention what kernels ask for."""
    target: Any = node.target
    own = getattr(target, "namespace", "") == "fusewright"
    name = getattr(getattr(target, "_schema", None), "name", "").partition("::")[2]
    if name.startswith(_ATTENTION) and "backward" in name:
        return _sums_of_attention(node), sympy.Integer(0)
    formula = passing_formulas().get(name) if own else None
    if formula is None:
        return sympy.Integer(0), sympy.Integer(0)
    found = formula(fx.map_arg(node.args, ir.value), ir.value(node))
    return expression(found.memory), expression(found.moved)


def _sums_of_attention(node: fx.Node) -> sympy.Expr:
    """Its backward sums dq in float32, and dk and dv of heads that share theirs apart."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, k, v = (ir.value(given[n]) for n in ("query", "key", "value"))
    total = 4 * expression(q.numel())
    if expression(q.shape[1]) != expression(k.shape[1]):
        apart = expression(q.shape[0]) * expression(q.shape[1]) * expression(k.shape[2])
        total += apart * (expression(k.shape[3]) + expression(v.shape[3])) * k.element_size()
    return total


def _attention(name: str, schema: Any, args: Any, kwargs: Any) -> tuple[sympy.Expr, str]:
    """Two products forward, five backward, of every query with every key it may see."""
    names = [a.name for a in schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    q, k, v = given["query"], given["key"], given["value"]
    pairs = sympy.Integer(1)
    for size in (q.shape[0], q.shape[1], q.shape[2], k.shape[2]):
        pairs *= expression(size)
    widths = expression(q.shape[3]), expression(v.shape[3])
    seen = sympy.Rational(1, 2) if given.get("is_causal") else sympy.Integer(1)
    if "backward" in name:
        return 2 * pairs * (3 * widths[0] + 2 * widths[1]) * seen, "attention_backward"
    return 2 * pairs * sum(widths) * seen, "attention"
