"""Low-rank adapters beside a linear layer: y = x W^T + b + sum_i s_i (x A_i^T) B_i^T.

Anchor: two linear maps in a row of which the first is thin. Growing: the scale, the casts around
the adapter (PEFT keeps float32 adapters beside a bf16 base), and the sum with the base layer's
output, which must read the same x. An adapter that drops out its input keeps that dropout: the mask
is drawn where the model draws it, and the op reads what is left. Layers of one input are put together
afterwards, by patterns/lora_groups.py. The backward is derived in kernels/lora.py.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Miss, Refused
from fusewright.compiler.prove import Candidate, Rounder
from fusewright.compiler.rewrite import call, item
from fusewright.compiler.storage import Storage
from fusewright.patterns import lora_groups, lora_near, quantised

aten = torch.ops.aten


@dataclass(frozen=True)
class _Adapter:
    """One low-rank branch, from the layer's input to what is added to the base's output.

    ``dropped`` is what it reads where that is not the layer's input itself. ``rounded`` is the dtype
    that its result is cast to last, if that loses something.
    """

    x: fx.Node
    dropped: fx.Node | None
    down: fx.Node
    up: fx.Node
    scale: float
    rounded: torch.dtype | None
    out: fx.Node
    nodes: frozenset[fx.Node]


class LoRA:
    """See the module's docstring."""

    name = "lora"

    def prepare(self, graph: fx.Graph) -> list[Miss]:
        """Write layers over 4-bit weights as linear layers over weights that are dequantised."""
        return quantised.expand(graph)

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Second halves of two linear maps in a row through a thin waist."""
        for node in ir.calls(graph):
            if _thin_pair(node) is not None or lora_near.looks_added(node):
                yield node

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """Claims about the layer that the adapter at ``anchor`` belongs to."""
        adapter = _adapter(anchor)
        added = ""
        try:
            base, adapters, out, nodes = _collect(adapter)
        except Refused:
            found = _collect_opaque(adapter)
            if found is None:
                raise
            base, adapters, out, nodes, added = found
        results = [u for u in out.users if ir.is_cast(u)] if len(out.users) == 1 else []
        for result in (*results, out):
            yield _candidate(base, adapters, result, nodes | {result}, added)

    def regroup(self, graph: fx.Graph) -> None:
        """Put the layers of one input together."""
        lora_groups.merge(graph)

    def settle(self, graph: fx.Graph) -> list[Storage]:
        """Let producers leave room for the adapters, and say how the weights are to be stored."""
        return lora_groups.settle(graph)


def _thin_pair(node: fx.Node) -> fx.Node | None:
    """The first map, if there are two with a thin waist between them."""
    first = lora_near.pair(node)
    if first is None:
        return None
    rank, width, height = _extents(first, node)
    return first if rank < min(width, height) else None


def _extents(first: fx.Node, second: fx.Node) -> tuple[Any, Any, Any]:
    (rank, width), height = ir.shape(first.args[1]), ir.shape(second.args[1])[0]  # type: ignore[arg-type]
    return rank, width, height


def _adapter(second: fx.Node) -> _Adapter:
    first = lora_near.pair(second)
    if first is None:
        raise Refused(lora_near.other_kind(second) or "not two linear maps in a row")
    rank, width, height = _extents(first, second)
    if not rank < min(width, height):
        raise Refused(f"the waist of {rank} is not narrower than the layer, {height} x {width}")
    nodes = {first, second}
    middle: Any = second.args[0]
    while middle is not first:
        nodes.add(middle)
        middle = middle.args[0]
    x: Any = first.args[0]
    dropped = x if ir.is_call(x, aten.dropout.default) else None
    if dropped is not None:
        x = ir.strip_casts(dropped.args[0])
    while ir.widens(x):
        nodes.add(x)
        x = x.args[0]
    scale, out = 1.0, second
    while len(out.users) == 1:
        (user,) = out.users
        factor = ir.other_operand(user, out) if ir.is_call(user, aten.mul.Tensor) else None
        if isinstance(factor, (int, float)):
            scale *= float(factor)
        elif not ir.is_cast(user):
            break
        nodes.add(user)
        out = user
    weights: Any = (first.args[1], second.args[1])
    narrow = ir.is_cast(out) and ir.dtype(out).itemsize < ir.dtype(out.args[0]).itemsize  # type: ignore[arg-type]
    rounded = ir.dtype(out) if narrow else None
    down, up = weights
    return _Adapter(x, dropped, down, up, scale, rounded, out, frozenset(nodes))


def _collect(
    adapter: _Adapter,
) -> tuple[fx.Node, list[_Adapter], fx.Node, frozenset[fx.Node]]:
    """The base layer, every adapter summed onto it, the sum and all calls in between."""
    nodes = set(adapter.nodes)
    total = adapter.out
    addends: list[fx.Node] = []
    while True:
        sums = [u for u in total.users if ir.is_call(u, aten.add.Tensor, aten.add_.Tensor)]
        if len(total.users) != 1 or not sums or ir.is_call(sums[0], aten.add_.Tensor):
            break
        other = ir.other_operand(sums[0], total)
        if not _belongs(other, adapter):
            break
        addends.append(other)
        nodes.add(sums[0])
        total = sums[0]
    base, adapters = None, [adapter]
    while addends:
        node = addends.pop(0)
        stripped = ir.strip_casts(node)
        if ir.is_call(stripped, aten.add.Tensor):
            nodes |= _chain(node, stripped)
            addends += [a for a in stripped.all_input_nodes]
        elif ir.is_call(stripped, aten.linear.default) and _thin_pair(stripped) is None:
            if base is not None:
                raise Refused("the adapter is added to more than one linear layer")
            nodes |= _chain(node, stripped)
            base = stripped
        else:
            more = _adapter(_second_of(stripped))
            nodes |= more.nodes | _chain(node, stripped)
            adapters.append(more)
    if base is None:
        raise Refused("no linear layer's output is added to the adapter's")
    if any(a.x is not ir.strip_casts(base.args[0]) for a in adapters):  # type: ignore[arg-type]
        raise Refused("the adapter and the base layer read different inputs")
    x: Any = base.args[0]
    nodes |= _chain(x, ir.strip_casts(x)) - {ir.strip_casts(x)}
    return base, adapters, total, frozenset(nodes)


def _params(adapters: list[_Adapter], weight: Any, added: str) -> dict[str, Any]:
    """What the report says of a layer."""
    ranks = [ir.shape(a.down)[0] for a in adapters]
    params: dict[str, Any] = {
        "r": ranks[0] if len(ranks) == 1 else ranks,
        "scale": [a.scale for a in adapters],
        "dropout": any(a.dropped is not None for a in adapters),
    }
    if added:
        params["form"] = f"added: {added}"
    elif quantised.is_weight(weight):
        params["form"] = f"{weight.args[7]}, blocks of {weight.args[8]}"
    return params


def _kernel(weight: Any, added: str) -> str:
    if added:
        return "lora_added"
    return "lora_group_4bit" if quantised.is_weight(weight) else "lora_group"


def _collect_opaque(
    adapter: _Adapter,
) -> tuple[fx.Node, list[_Adapter], fx.Node, frozenset[fx.Node], str] | None:
    """As ``_collect``, for a base that is known as a tensor alone, and why it is; None if none is."""
    nodes, adapters, total = set(adapter.nodes), [adapter], adapter.out
    base: Any = None
    while len(total.users) == 1:
        (user,) = total.users
        summed = ir.is_call(user, aten.add.Tensor)
        other: Any = ir.other_operand(user, total) if summed else None
        if not ir.is_tensor(other) or len(user.args) > 2 or user.kwargs:
            break
        second = _second_of(other)
        if second is not None:
            adapters.append(_adapter(second))
            nodes |= adapters[-1].nodes | _chain(other, second)
        elif base is None:
            base = other
        else:
            break
        nodes.add(user)
        total = user
    while ir.is_call(base, *ir.IDENTITIES):
        nodes.add(base)
        base = base.args[0]
    why = _opaque(base, adapter.x)
    fits = base is not None and why and ir.shape(base) == ir.shape(total)
    if base is None or not fits or any(a.x is not adapter.x for a in adapters):
        return None
    return base, adapters, total, frozenset(nodes), why


def _opaque(base: Any, x: fx.Node) -> str:
    """Why a tensor that a layer computes from x is none the adapters go into; "" if it may be any."""
    if base is None or len([u for u in base.users if not ir.is_call(u, *ir.IDENTITIES)]) > 1:
        return ""
    while ir.is_cast(base) or ir.is_call(base, *ir.IDENTITIES):
        base = base.args[0]
    if ir.is_call(base, aten.linear.default) and quantised.is_weight(base.args[1]):
        return "the layer works in another dtype than its adapters" if _reads(base, x) else ""
    custom = base.args[0] if ir.is_call(base, operator.getitem) else base
    if quantised.is_custom(custom) and _reads(custom, x):
        return "the layer is a custom function that is not known"
    return ""


def _reads(node: fx.Node, x: fx.Node) -> bool:
    """Whether the call takes x or a cast of it."""
    inputs = list(node.all_input_nodes)
    return any(n is x or (ir.is_cast(n) and n.args[0] is x) for n in inputs)


def _chain(top: fx.Node, bottom: fx.Node) -> set[fx.Node]:
    nodes = {bottom}
    while top is not bottom:
        nodes.add(top)
        top = top.args[0]  # type: ignore[assignment]
    return nodes


def _belongs(node: Any, adapter: _Adapter) -> bool:
    """Whether an addend is the base's output, another adapter's, or a sum of such."""
    if not ir.is_tensor(node):
        return False
    node = ir.strip_casts(node)
    if ir.is_call(node, aten.add.Tensor):
        return all(_belongs(a, adapter) for a in node.all_input_nodes)
    if ir.is_call(node, aten.linear.default):
        source = ir.strip_casts(node.args[0])
        return source is adapter.x or _thin_pair(node) is not None
    return ir.is_call(node, aten.mul.Tensor) and _second_of(node) is not None


def _second_of(node: Any) -> Any:
    while ir.is_call(node, aten.mul.Tensor) or ir.is_cast(node):
        node = next((a for a in node.all_input_nodes if ir.is_tensor(a)), None)
    return node if node is not None and _thin_pair(node) is not None else None


def _candidate(
    base: fx.Node,
    adapters: list[_Adapter],
    out: fx.Node,
    nodes: frozenset[fx.Node],
    added: str,
) -> Candidate:
    """The claim; ``added`` says why the base stays a tensor to which the adapters are added."""
    x = adapters[0].x
    scales = [a.scale for a in adapters]
    weight: Any = None if added else base.args[1]
    bias: Any = ir.argument(base, 2) if not added else None
    inputs: dict[str, fx.Node | None] = {"x": x, "base": base}
    own = [a.dropped for a in adapters if a.dropped is not None]
    source = [-1 if a.dropped is None else own.index(a.dropped) for a in adapters]
    for i, adapter in enumerate(adapters):
        inputs[f"a{i}"], inputs[f"b{i}"] = adapter.down, adapter.up
    inputs |= {f"d{i}": node for i, node in enumerate(own)}
    out_dtype, count = ir.dtype(out), len(adapters)

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        y = t["base"]
        for i, scale in enumerate(scales):
            read = t["x"] if source[i] < 0 else t[f"d{source[i]}"]
            low = scale * F.linear(F.linear(read, t[f"a{i}"]), t[f"b{i}"])
            # The graph may round the addend to the sum's dtype; the op rounds the sum alone.
            kind = adapters[i].rounded
            y = y + (rounder(low, kind) if kind is ir.dtype(base) else low)
        return [y]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        downs = [read[f"a{i}"] for i in range(count)]
        ups = [read[f"b{i}"] for i in range(count)]
        drops = [read[f"d{i}"] for i in range(len(own))]
        if added:
            values = (read["base"], read["x"], drops, downs, ups, source, scales, out_dtype)
            op = torch.ops.fusewright.lora_added.default
            return [item(graph, call(graph, op, values, out), 0)]
        group = (read["x"], drops, [read["weight"]], [read["bias"]], downs, ups)
        layout = ([0] * count, source, scales, [ir.shape(base)[-1]], out_dtype, False, False)
        made = call(graph, *lora_groups.over_4bit([*group, *layout]), out)
        return [item(graph, item(graph, made, 0), 0)]

    return Candidate(
        nodes=nodes,
        inputs=inputs,
        reads={"weight": weight, "bias": bias},
        outputs=(out,),
        formula=formula,
        emit=emit,
        params=_params(adapters, weight, added),
        cast="output",
        scaled=("x", *(f"d{i}" for i in range(len(own)))),
        kernel=_kernel(weight, added),
    )
