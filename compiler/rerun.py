"""The forward of a block as its checkpoint runs it again: without what only its results are made of.

A block's last product is its largest but one, and its backward reads nothing of it but the adapters'
thin products. So the second run is the forward's graph without its results, and where a group of
linear layers is left with its thin products, these alone are computed (``lora_thin``).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir

_GROUPS = ("lora_group", "lora_group_4bit")
_ARGUMENTS = (0, 1, 4, 5, 7, 8)  # of a group: x, inputs, down, up, source, scales


def without_results(forward: fx.GraphModule, results: int) -> fx.GraphModule | None:
    """The graph of everything but the first ``results`` outputs; None if that saves nothing."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(forward.graph, copies)
    (outputs,) = forward.graph.output_node().args
    kept = [copies[n] if isinstance(n, fx.Node) else n for n in outputs[results:]]  # type: ignore[index, union-attr]
    graph.output(tuple(kept))
    before = len(graph.nodes)
    graph.eliminate_dead_code()
    thinned = [n for n in list(graph.nodes) if _is_thin(n) and _thin(n)]
    if not thinned and len(graph.nodes) == before:
        return None
    graph.lint()
    return fx.GraphModule(forward, graph)


def fits_inductor(graph: fx.Graph) -> bool:
    """Whether plain Python gives what Inductor's code would: its fusions round less often."""
    return all(_is_opaque(n.target) for n in ir.calls(graph))


def _is_opaque(target: Any) -> bool:
    """Whether Inductor calls an operator as it is, or takes it for a view."""
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem or getattr(target, "__module__", "") == "_operator"
    attention = target._schema.name.startswith("aten::_scaled_dot_product")
    return attention or target.namespace == "fusewright" or target.is_view


def _is_thin(node: fx.Node) -> bool:
    """Whether of a group nothing is read but the thin products."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith("fusewright::"):
        return False
    if schema.name.partition("::")[2] not in _GROUPS:
        return False
    return all(u.target is operator.getitem and u.args[1] == 1 for u in node.users)


def _thin(group: fx.Node) -> bool:
    """Put the thin products in the place of the group; False for one without adapters."""
    graph = group.graph
    args = tuple(ir.argument(group, at) for at in _ARGUMENTS)
    if not args[2]:
        return False
    with graph.inserting_before(group):
        made = graph.call_function(torch.ops.fusewright.lora_thin.default, args)
    for user in list(group.users):
        made.meta = dict(user.meta)
        user.replace_all_uses_with(made)
        graph.erase_node(user)
    graph.erase_node(group)
    return True
