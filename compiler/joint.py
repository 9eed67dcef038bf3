"""Reading AOTAutograd's joint graph: what the forward can compute, and what the backward asks for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

from fusewright.compiler import ir
from fusewright.compiler.recompute import base


@dataclass(frozen=True)
class Joint:
    """One joint graph, read.

    Attributes:
        graph: the joint graph; its outputs are the forward's and then the gradients.
        forward: in order, the calls and inputs that need no gradient from outside.
        needed: those of ``forward`` that the rest of the backward reads.
        required: those of ``forward`` that the forward's own outputs are made of.
        free: memory that outlives the forward whatever is saved: parameters, inputs that want no
            gradient (layers share their tables and masks), and the forward's outputs.
    """

    graph: fx.Graph
    forward: tuple[fx.Node, ...]
    needed: frozenset[fx.Node]
    required: frozenset[fx.Node]
    free: frozenset[fx.Node]

    @classmethod
    def read(cls, graph: fx.Graph, outputs: int, static: Collection[int]) -> Joint:
        """Read a joint graph.

        Args:
            graph: it has placeholders with "tangents" in their names for the gradients from outside.
            outputs: how many leading outputs are the forward's.
            static: places of the inputs that live on anyway, as parameters do.
        """
        placeholders = graph.find_nodes(op="placeholder")
        tangents = {n for n in placeholders if "tangents" in str(n.target)}
        primals = [n for n in placeholders if n not in tangents]
        flat = tree_leaves(graph.find_nodes(op="output")[0].args)
        results, gradients = flat[:outputs], flat[outputs:]
        backward = _after(graph, tangents)
        forward = [n for n in graph.nodes if n.op != "output" and n not in backward]
        asked = {n for b in backward for n in b.all_input_nodes}
        asked |= {g for g in gradients if isinstance(g, fx.Node)}
        free = {base(n) for n in results if ir.is_tensor(n)}
        free |= {primals[i] for i in static if i < len(primals)}
        if len(gradients) == len(primals):
            free |= {p for p, g in zip(primals, gradients, strict=True) if g is None}
        return cls(
            graph,
            tuple(forward),
            frozenset(asked.difference(backward)),
            frozenset(_before(n for n in results if isinstance(n, fx.Node))),
            frozenset(free),
        )


def _after(graph: fx.Graph, tangents: set[fx.Node]) -> set[fx.Node]:
    """What depends on the tangents, and writes that belong to the backward."""
    found = set(tangents)
    for node in graph.nodes:
        if node.op == "output":
            continue
        if _written_in_backward(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _written_in_backward(node: fx.Node) -> bool:
    tag = node.meta.get("partitioner_tag")
    schema = getattr(node.target, "_schema", None)
    return tag == "must_be_in_backward" or (
        tag == "is_backward" and schema is not None and bool(schema.is_mutable)
    )


def _before(roots: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found
