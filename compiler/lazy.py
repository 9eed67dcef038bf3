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
from fusewright.runtime.logits import LazyLogits


@dataclass(frozen=True)
class Deferred:
    """A value taken out of a graph.

    Attributes:
        index: its place among the graph's outputs.
        compute: leaves -> the value.
        leaves: how many extra outputs at the end of the graph are its leaves.
        shape: per dimension a size, or (leaf, dimension) to read it from.
        dtype: the value's dtype.
    """

    index: int
    compute: Callable[..., torch.Tensor]
    leaves: int
    shape: tuple[int | tuple[int, int], ...]
    dtype: torch.dtype


def deferrable(graph: fx.Graph) -> frozenset[fx.Node]:
    """The floating tensors that the graph returns and that are large: candidates for deferring."""
    return frozenset(
        n for n in _outputs(graph) if ir.is_floating(n) and ir.is_call(n) and len(ir.shape(n)) >= 2
    )


def _outputs(graph: fx.Graph) -> list[Any]:
    (returned,) = graph.output_node().args
    return list(returned) if isinstance(returned, (list, tuple)) else [returned]


def defer(graph: fx.Graph, candidate: Candidate, allowed: frozenset[fx.Node]) -> Deferred | None:
    """Take the candidate's deferrable value out of the graph; None if its shape is not readable."""
    outputs = _outputs(graph)
    index = next(i for i, n in enumerate(outputs) if n in allowed and n in candidate.nodes)
    value = outputs[index]
    inputs = [n for n in candidate.sources.values() if n is not None and n not in candidate.nodes]
    inner, leaves = _extract(value, candidate.nodes, inputs)
    shape = tuple(_read_size(s, leaves) for s in ir.shape(value))
    if any(s is None for s in shape):
        raise ValueError("the deferred value's shape cannot be read off its inputs")
    outputs[index] = None
    graph.output_node().args = (tuple(outputs) + tuple(leaves),)
    return Deferred(index, inner.forward, len(leaves), shape, ir.dtype(value))  # type: ignore[arg-type]


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


def attach(run: Callable[..., Any], deferred: Deferred) -> Callable[..., Any]:
    """``run`` with the deferred output in its place as a lazy tensor, and without the leaves."""

    def with_lazy(*args: Any) -> Any:
        results = list(run(*args))
        leaves = tuple(results[len(results) - deferred.leaves :])
        results = results[: len(results) - deferred.leaves]
        sizes = [s if isinstance(s, int) else leaves[s[0]].shape[s[1]] for s in deferred.shape]
        lazy = LazyLogits(deferred.compute, leaves, sizes, deferred.dtype)
        results[deferred.index] = lazy.connected()
        return tuple(results)

    return with_lazy
