"""Mapped functions (``torch.vmap``) inside a captured graph, as the plain calls that they amount to.

Dynamo writes a mapped function as calls between an increment and a decrement of the nesting. Traced
above autograd those calls would see batched tensors, which must not stay in a graph. So a section, from
the increment to its decrement, is traced on its own below autograd, where the batching rules have made
plain calls on whole tensors of it; these are then differentiable as any others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

_OPENS, _CLOSES = "_vmap_increment_nesting", "_vmap_decrement_nesting"
# What acts on autograd from inside would be lost in a trace below it.
_ON_AUTOGRAD = ("_set_grad_enabled", "detach", "requires_grad_", "_get_data_attr", "checkpoint")
_TRANSFORMS = ("_grad_increment_nesting", "_jvp_increment_nesting", "_enter_dual_level")


class NotMapped(Exception):
    """A mapped function that cannot be written as plain calls; the message says why."""


@dataclass(frozen=True)
class Section:
    """The calls of one mapped function, what they read from outside, and what is read of them."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def sections(graph: fx.Graph) -> dict[fx.Node, Section]:
    """Every outermost mapped function of a Dynamo graph, by its first node."""
    found: dict[fx.Node, Section] = {}
    inside: list[fx.Node] = []
    depth = 0
    for node in graph.nodes:
        name = _name(node)
        depth += name == _OPENS
        if depth:
            inside.append(node)
        if name == _CLOSES:
            depth -= 1
            if depth == 0:
                found[inside[0]] = _section(inside)
                inside = []
    if depth:
        raise NotMapped("a mapped function (vmap) does not end in the region")
    return found


def _name(node: fx.Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def _section(nodes: list[fx.Node]) -> Section:
    for node in nodes:
        name = _name(node)
        if name == _OPENS and "error" not in (*node.args, *node.kwargs.values()):
            raise NotMapped("a mapped function (vmap) draws random numbers")
        function = type(node.target).__name__ == "AutogradFunctionApply"
        if function or isinstance(node.target, HigherOrderOperator) or name in _TRANSFORMS:
            raise NotMapped(f"a mapped function (vmap) holds {name or node.target}")
        if name in _ON_AUTOGRAD:
            raise NotMapped(f"a mapped function (vmap) calls {name}")
    own = set(nodes)
    inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own)
    outputs = tuple(n for n in nodes if any(user not in own for user in n.users))
    return Section(tuple(nodes), tuple(inputs), outputs)


def unmapped(section: Section, values: Sequence[Any], root: torch.nn.Module) -> fx.GraphModule:
    """The section as a graph of plain calls.

    Args:
        section: of a Dynamo graph.
        values: what its inputs have become: fake tensors and sizes.
        root: owns what the graph's attributes name.
    """
    graph = fx.Graph()
    copied = {n: graph.placeholder(n.name) for n in section.inputs}
    for node in section.nodes:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output(tuple(copied[n] for n in section.outputs))
    runner = _Nested(fx.GraphModule(root, graph))
    with disable_proxy_modes_tracing(), torch.no_grad():
        plain: fx.GraphModule = make_fx(runner.traced, tracing_mode="real")(*values)
    kept = {k: v for k, v in section.nodes[0].meta.items() if k in _PROVENANCE}
    for node in plain.graph.nodes:
        node.meta.update(kept)
    return plain


_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack")


class _Nested(fx.Interpreter):
    """Runs a section, and leaves the nesting as it was whatever happens."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.open = 0

    def traced(self, *values: Any) -> Any:
        """The section's outputs."""
        try:
            return self.run(*values)
        finally:
            while self.open:
                self.open -= 1
                torch._C._functorch._vmap_decrement_nesting()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_function(target, args, kwargs)
        name = getattr(target, "__name__", "")
        self.open += (name == _OPENS) - (name == _CLOSES)
        return out
