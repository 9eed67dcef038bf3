"""What a graph costs in one training step: FLOPs, bytes moved, bytes kept for the backward.

The graph is run forward and backward on meta tensors of its traced sizes, so that the kernels that
autograd itself would launch are counted and nothing is derived by hand. Each kernel is charged to
the node of the graph that called it; a backward kernel to the node whose forward recorded it, by
autograd's sequence numbers.

- FLOPs: torch.utils.flop_counter's formulas for products, convolutions and attention; pointwise
  work counts nothing. Causal attention is counted whole, as there.
- bytes: what each kernel reads and writes, every tensor once a kernel. Views are free; of a
  gathered tensor the rows that are taken count. Caches and scratch inside a kernel are not seen.
- saved: storages that autograd keeps, by saved_tensors_hooks. Parameters are not counted, nor what
  the region was given and needs no gradient (rotary tables, masks): all layers share it.

Attention through the library's call is charged as one fused kernel that keeps q, k, v, its output
and a log-sum-exp per row, whatever the device at hand would take.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from fusewright.compiler import ir

aten = torch.ops.aten

# Rows of the first operand are taken; the rest of it is not read.
_GATHERS = frozenset(
    {
        aten.embedding.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.gather.default,
        aten.take_along_dim.default,
    }
)
_FREE = frozenset({aten._unsafe_view.default, aten.lift_fresh.default})
_WRITES_ONLY = frozenset(
    {aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.copy_.default}
)
_META = torch.device("meta")


@dataclass
class Cost:
    """FLOPs and bytes of one training step, forward and backward."""

    flops: int = 0
    bytes: int = 0
    saved: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.saved + other.saved)

    def times(self, n: int) -> Cost:
        """The cost of n instances."""
        return Cost(self.flops * n, self.bytes * n, self.saved * n)


@dataclass(frozen=True)
class GraphCost:
    """Costs by node name; "" is what belongs to no node, as the sums of gradients do."""

    nodes: dict[str, Cost]
    unavailable: str = ""

    def of(self, names: Iterable[str]) -> Cost:
        """The cost of these nodes together."""
        return sum((self.nodes[n] for n in names if n in self.nodes), Cost())

    @property
    def total(self) -> Cost:
        """The cost of the whole graph."""
        return self.of(self.nodes)


def measure(gm: fx.GraphModule, kept: Iterable[int] | None = None) -> GraphCost:
    """The cost of a canonical or rewritten graph at its traced sizes.

    Args:
        gm: the graph; its placeholders' fake tensors give the sizes.
        kept: places of the outputs that the backward may start from; all by default. Where one of
            them is a scalar, that is the loss and the backward starts there alone.

    Returns:
        The costs; ``unavailable`` says why where the graph does not run without data.
    """
    meter = _Meter()
    try:
        _run(gm, meter, kept)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError) as error:
        # Sizes that depend on data, and operators without a shape function.
        lines = str(error).strip().splitlines()
        return GraphCost({}, f"{type(error).__name__}: {lines[0] if lines else ''}")
    return GraphCost(dict(meter.costs))


def _run(gm: fx.GraphModule, meter: _Meter, kept: Iterable[int] | None) -> None:
    inputs = []
    for node in gm.graph.find_nodes(op="placeholder"):
        made = _input(node)
        inputs.append(made)
        if isinstance(made, torch.Tensor) and (
            node.meta.get("parameter") or not made.requires_grad
        ):
            meter.uncounted.add(_storage(made))
    hooks = torch.autograd.graph.saved_tensors_hooks(meter.save, lambda t: t)
    with torch.enable_grad(), torch.random.fork_rng(devices=()):
        # The hooks stand while the forward runs; a backward within a forward saves nothing.
        with hooks, meter:
            outputs = _Metered(gm, meter).run(*inputs)
        flat = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        chosen = [flat[i] for i in (range(len(flat)) if kept is None else kept)]
        roots = [o for o in chosen if isinstance(o, torch.Tensor) and o.requires_grad]
        roots = [o for o in roots if o.dim() == 0][:1] or roots
        leaves = [i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad]
        if roots and leaves:
            cotangents = [torch.empty_like(o) for o in roots]
            with meter:
                meter.backward = True
                torch.autograd.grad(roots, leaves, cotangents, allow_unused=True)


def _input(node: fx.Node) -> Any:
    val = ir.value(node)
    if not isinstance(val, torch.Tensor):
        return ir.traced(val)
    sizes, strides = ([ir.traced(s) for s in many] for many in (val.shape, val.stride()))
    made = torch.empty_strided(sizes, strides, dtype=val.dtype, device=_META)
    wants = bool(node.meta.get("requires_grad")) and (val.is_floating_point() or val.is_complex())
    return made.requires_grad_(wants)


def _storage(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


@dataclass
class _Span:
    """The autograd sequence numbers from ``start`` on belong to the node ``name``."""

    starts: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def begin(self, name: str) -> None:
        self.starts.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self.names.append(name)

    def name(self, number: int) -> str:
        at = bisect_right(self.starts, number) - 1
        return self.names[at] if at >= 0 and number < 2**62 else ""


class _Meter(TorchDispatchMode):
    """Charges every kernel that is dispatched to a node of the graph."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.costs: defaultdict[str, Cost] = defaultdict(Cost)
        self.current, self.backward = "", False
        self.spans = _Span()
        self.uncounted: set[int] = set()
        self.alive: list[torch.Tensor] = []

    def enter(self, name: str) -> None:
        """The node ``name`` is about to run."""
        self.current = name
        self.spans.begin(name)

    def save(self, t: torch.Tensor) -> torch.Tensor:
        """Pack hook: count the storage at its first saver."""
        key = _storage(t)
        if key not in self.uncounted:
            self.uncounted.add(key)
            self.alive.append(t)  # an id stays taken while its storage lives
            self.costs[self.current].saved += t.untyped_storage().nbytes()
        return t

    def charge(self, name: str, flops: int, moved: int) -> None:
        """Add to a node's cost."""
        cost = self.costs[name]
        cost.flops += flops
        cost.bytes += moved

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = self.current
        if self.backward:
            node = torch._C._current_autograd_node()
            name = self.spans.name(node._sequence_nr()) if node is not None else ""
        self.charge(name, _flops(func, args, kwargs, out), _moved(func, args, kwargs, out))
        return out


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = getattr(func, "_overloadpacket", None)
    formula = flop_registry.get(packet)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    if packet is getattr(aten, "_grouped_mm", None):
        # Groups of rows, or of the summed dimension: each element of a meets a row of b.
        return 2 * int(args[0].numel()) * int(args[1].shape[-1])
    return 0


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    schema = getattr(func, "_schema", None)
    if schema is None or func in _FREE or getattr(func, "is_view", False):
        return 0
    if "empty" in schema.name or schema.name in ("aten::detach", "aten::alias"):
        return 0
    read = _distinct((args, kwargs))
    written = _distinct(out)
    if func in _GATHERS:
        read = read[1:] + written
    elif func in _WRITES_ONLY:
        read = read[1:]
    return sum(map(_nbytes, read)) + sum(map(_nbytes, written))


def _distinct(values: Any) -> list[torch.Tensor]:
    found = {id(t): t for t in tree_leaves(values) if isinstance(t, torch.Tensor)}
    return list(found.values())


def _nbytes(t: torch.Tensor) -> int:
    """Bytes that a kernel touches: an expanded tensor's storage is read once."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


class _Metered(fx.Interpreter):
    """Runs a graph on meta tensors and tells the meter which node runs."""

    def __init__(self, gm: fx.GraphModule, meter: _Meter) -> None:
        super().__init__(gm)
        self.meter = meter

    def run_node(self, n: fx.Node) -> Any:
        self.meter.enter(n.name)
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        # A constant of the graph, such as a table of frequencies: of its shape alone.
        return found.detach().to(_META) if isinstance(found, torch.Tensor) else found

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(torch.device, lambda _: _META, (args, kwargs))
        if target is aten.scaled_dot_product_attention.default and args[0].dim() == 4:
            mask = args[3] if len(args) > 3 else None
            attend: Any = _FusedAttention.apply
            return attend(*args[:3], mask, self.meter)
        return super().call_function(target, args, kwargs)


class _FusedAttention(torch.autograd.Function):
    """The shapes and the cost of one fused attention; (B, H, T, D), k and v with H or fewer heads."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, meter: _Meter) -> Any:
        (b, h, t, _), width = q.shape, v.shape[-1]
        # A fused kernel's output has the heads next to their width, so that joining them is free.
        out = torch.empty((b, t, h, width), dtype=q.dtype, device=_META).transpose(1, 2)
        statistics = torch.empty((b, h, t), dtype=torch.float32, device=_META)
        ctx.save_for_backward(q, k, v, out, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.meter, ctx.name = meter, meter.current
        whole = [(b, h, *s.shape[2:]) for s in (k, v)]  # as many heads as q has
        ctx.flops = sdpa_backward_flop_count(tuple(out.shape), tuple(q.shape), *whole)
        extra = [] if mask is None else [mask]
        ctx.moved = sum(map(_nbytes, (q, k, v, out, out, statistics, q, k, v, *extra)))
        moved = sum(map(_nbytes, (q, k, v, out, statistics, *extra)))
        meter.charge(ctx.name, sdpa_flop_count(tuple(q.shape), *whole), moved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        ctx.meter.charge(ctx.name, ctx.flops, ctx.moved)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None
