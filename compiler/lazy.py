"""Take a value that only the graph's output uses out of the graph, to be computed when it is read.

The head's logits are such a value once the loss is fused: the graph then returns what they are made
of (hidden states and the projection's weight, which it holds anyway), and the runtime puts a lazy
tensor in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.prove import Candidate
from fusewright.runtime import row_logits
from fusewright.runtime.logits import LazyLogits
from fusewright.runtime.rows import Rows

aten = torch.ops.aten


@dataclass(frozen=True)
class Projection:
    """How a deferred value is made row by row: a linear layer, and ``post`` on what it gives.

    ``x``, ``weight`` and ``bias`` are places among the leaves.
    """

    x: int
    weight: int
    bias: int | None
    post: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Deferred:
    """A value taken out of a graph.

    Attributes:
        index: its place among the graph's outputs.
        compute: leaves -> the value.
        leaves: how many extra outputs at the end of the graph are its leaves.
        shape: per dimension a size, or (leaf, dimension) to read it from.
        dtype: the value's dtype.
        projection: how it is made row by row, where it is.
    """

    index: int
    compute: Callable[..., torch.Tensor]
    leaves: int
    shape: tuple[int | tuple[int, int], ...]
    dtype: torch.dtype
    projection: Projection | None = None


def deferrable(graph: fx.Graph) -> frozenset[fx.Node]:
    """The floating tensors that the graph returns and that are large: candidates for deferring."""
    return frozenset(
        n for n in _outputs(graph) if ir.is_floating(n) and ir.is_call(n) and len(ir.shape(n)) >= 2
    )


def _outputs(graph: fx.Graph) -> list[Any]:
    (returned,) = graph.output_node().args
    return list(returned) if isinstance(returned, (list, tuple)) else [returned]


def defer(graph: fx.Graph, candidate: Candidate, allowed: frozenset[fx.Node]) -> Deferred:
    """Take the candidate's deferrable value out of the graph.

    Raises:
        ValueError: the value's shape cannot be read off what it is made of.
    """
    value = next(n for n in _outputs(graph) if n in allowed and n in candidate.nodes)
    inputs = [n for n in candidate.sources.values() if n is not None and n not in candidate.nodes]
    return _take_out(graph, value, candidate.nodes, inputs)


def defer_projection(graph: fx.Graph, allowed: frozenset[fx.Node]) -> Deferred | None:
    """Take the one deferrable value out of a graph without a loss, if a projection makes its rows."""
    found = [n for n in _outputs(graph) if n in allowed and _projection(n) is not None]
    if len(found) != 1:
        return None
    projection, between = _projection(found[0])  # type: ignore[misc]
    nodes = frozenset({projection, *between})
    if any(u not in nodes for n in nodes for u in n.users if u.op != "output"):
        return None
    return _take_out(graph, found[0], nodes, projection.all_input_nodes)


def _take_out(
    graph: fx.Graph, value: fx.Node, nodes: frozenset[fx.Node], inputs: list[fx.Node]
) -> Deferred:
    outputs = _outputs(graph)
    index = outputs.index(value)
    inner, leaves = _extract(value, nodes, inputs)
    shape = tuple(_read_size(s, leaves) for s in ir.shape(value))
    if any(s is None for s in shape):
        raise ValueError("the deferred value's shape cannot be read off its inputs")
    by_rows = _by_rows(value, leaves)
    outputs[index] = None
    graph.output_node().args = (tuple(outputs) + tuple(leaves),)
    dtype = ir.dtype(value)
    return Deferred(index, inner.forward, len(leaves), shape, dtype, by_rows)  # type: ignore[arg-type]


def _projection(value: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The linear layer that makes a value, and what lies between: casts, numbers' products, tanh."""
    between = []
    node = value
    while not ir.is_call(node, aten.linear.default):
        by_number = ir.is_call(node, aten.mul.Tensor, aten.div.Tensor) and isinstance(
            ir.argument(node, 1), (int, float)
        )
        alone = ir.is_call(node, aten.tanh.default, *ir.IDENTITIES)
        if not (by_number or alone or ir.is_cast(node)) or node.kwargs:
            return None
        between.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, between


def _by_rows(value: fx.Node, leaves: list[fx.Node]) -> Projection | None:
    found = _projection(value)
    if found is None:
        return None
    linear, between = found
    x, weight, bias = (ir.argument(linear, i) for i in range(3))
    if any(n not in leaves for n in (x, weight, bias) if n is not None):
        return None
    graph = fx.Graph()
    copies = {linear: graph.placeholder("made")}
    for node in reversed(between):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[value])
    post = fx.GraphModule(torch.nn.Module(), graph).forward
    place = leaves.index
    return Projection(place(x), place(weight), None if bias is None else place(bias), post)


def _extract(
    value: fx.Node, nodes: frozenset[fx.Node], inputs: list[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The part of a region that computes ``value``, and the nodes that it reads."""
    needed: set[fx.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += [n for n in node.all_input_nodes if n in nodes and n not in inputs]
    ordered = [n for n in value.graph.nodes if n in needed]
    leaves = list(dict.fromkeys(a for n in ordered for a in n.all_input_nodes if a not in needed))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {leaf: graph.placeholder(leaf.name) for leaf in leaves}
    for node in ordered:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[value])
    return fx.GraphModule(torch.nn.Module(), graph), leaves


def _read_size(size: Any, leaves: list[fx.Node]) -> int | tuple[int, int] | None:
    if isinstance(size, int):
        return size
    for i, leaf in enumerate(leaves):
        if ir.is_tensor(leaf):
            for dim, other in enumerate(ir.shape(leaf)):
                if other == size:
                    return (i, dim)
    return None


def attach(
    run: Callable[..., Any], deferred: Deferred, told: Callable[[str], None] | None = None
) -> Callable[..., Any]:
    """``run`` with the deferred output in its place as a lazy tensor, and without the leaves.

    With ``told`` it is answered row by row where that can be; where not, ``told`` is given the reason.
    """

    def with_lazy(*args: Any) -> Any:
        results = list(run(*args))
        leaves = tuple(results[len(results) - deferred.leaves :])
        results = results[: len(results) - deferred.leaves]
        results[deferred.index] = _lazy(deferred, leaves, told)
        return tuple(results)

    return with_lazy


def _lazy(
    deferred: Deferred, leaves: tuple[Any, ...], told: Callable[[str], None] | None
) -> LazyLogits:
    how = deferred.projection
    if told is not None and how is not None:
        parts = (leaves[how.x], leaves[how.weight], None if how.bias is None else leaves[how.bias])
        if all(t is None or type(t) in (torch.Tensor, torch.nn.Parameter) for t in parts):
            return row_logits.logits(Rows(*parts, how.post, deferred.dtype), told)
    if told is not None:
        told("the logits were computed as a whole: no plain projection makes them")
    sizes = [s if isinstance(s, int) else leaves[s[0]].shape[s[1]] for s in deferred.shape]
    return LazyLogits(deferred.compute, leaves, sizes, deferred.dtype).connected()
