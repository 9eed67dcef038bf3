"""Whether a proven candidate may be replaced: uses outside, order, convexity, mutation, gradients.

networkx would answer convexity on the whole graph; a region is small and its frontier smaller, so
the walks here stay on fx nodes and between the region's own positions.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fusewright.compiler import ir
from fusewright.compiler.prove import Candidate


class Illegal(Exception):
    """The candidate is what it claims, but replacing it would change or repeat something else."""


def check(candidate: Candidate, graph: fx.Graph, deferrable: frozenset[fx.Node]) -> fx.Node:
    """The node before which the replacement may be inserted; Illegal with the reason otherwise.

    Args:
        candidate: a proven candidate.
        graph: the graph that it lies in.
        deferrable: nodes of the region whose only outside user is the graph's output and that the
            runtime can hand out lazily.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    _uses_outside(candidate, deferrable)
    inputs = _read_outside(candidate)
    users = [u for out in candidate.outputs for u in out.users if u not in candidate.nodes]
    if not users:
        raise Illegal("its result is not used")
    after = max((position[n] for n in inputs), default=-1)
    first_user = min(users, key=position.__getitem__)
    if after >= position[first_user]:
        raise Illegal("an input is made only after a result is used")
    _mutation(candidate, position, position[first_user])
    _gradients(candidate, graph, first_user)
    return first_user


def _read_outside(candidate: Candidate) -> list[fx.Node]:
    return [n for n in candidate.sources.values() if n is not None and n not in candidate.nodes]


def _uses_outside(candidate: Candidate, deferrable: frozenset[fx.Node]) -> None:
    for node in candidate.nodes:
        outside = [u for u in node.users if u not in candidate.nodes]
        lazily = node in deferrable and all(u.op == "output" for u in outside)
        if node in candidate.outputs or lazily or not outside:
            continue
        for kept in _ancestors(node, candidate.nodes):
            if not _cheap(kept):
                line = ir.source_line(outside[0]) or outside[0].name
                raise Illegal(f"the intermediate value {node.name!r} is also used at {line}")


def _ancestors(node: fx.Node, within: frozenset[fx.Node]) -> Iterable[fx.Node]:
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        yield current
        for above in current.all_input_nodes:
            if above in within and above not in seen:
                seen.add(above)
                stack.append(above)


def _cheap(node: fx.Node) -> bool:
    """Keeping it costs nothing to speak of: a view, a cast, or a value of a parameter's size."""
    if ir.is_cast(node) or ir.is_call(node, *ir.VIEWS) or ir.as_slice(node) is not None:
        return True
    return ir.is_tensor(node) and sum(s != 1 for s in ir.shape(node)) <= 1


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose storage ``node`` views, following the schemas' alias annotations."""
    while ir.is_call(node):
        if ir.is_call(node, operator.getitem) and ir.is_call(node.args[0]):
            # A piece of a split is a view of the whole; pieces of other calls are on their own.
            if getattr(node.args[0].target, "is_view", False):  # type: ignore[union-attr]
                node = node.args[0].args[0]  # type: ignore[union-attr, assignment]
                continue
            return node
        if ir.is_call(node, ir.DATA):
            node = node.args[0]  # type: ignore[assignment]
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.returns or schema.returns[0].alias_info is None:
            return node
        aliased = [
            value
            for argument, value in zip(schema.arguments, node.args, strict=False)
            if argument.alias_info is not None and isinstance(value, fx.Node)
        ]
        if not aliased:
            return node
        node = aliased[0]
    return node


def mutations(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """(mutating call, root of the storage it writes) for every in-place call of the graph."""
    found = []
    for node in ir.calls(graph):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        named = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
        named |= node.kwargs
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                values = tree_leaves(named.get(argument.name))
                found += [(node, storage_root(v)) for v in values if isinstance(v, fx.Node)]
    return found


def written(graph: fx.Graph) -> frozenset[int]:
    """Places of the inputs that the graph writes to.

    A cast may hand on what it was given, and does where all is float64: what is written behind one
    counts as its input's.
    """
    found = set()
    for _, root in mutations(graph):
        while ir.is_cast(root) and isinstance(root.args[0], fx.Node):
            root = storage_root(root.args[0])
        found.add(root)
    inputs = graph.find_nodes(op="placeholder")
    return frozenset(place for place, node in enumerate(inputs) if node in found)


def _mutation(candidate: Candidate, position: dict[fx.Node, int], insertion: int) -> None:
    graph = next(iter(candidate.nodes)).graph
    first = min(position[n] for n in candidate.nodes)
    inner = {storage_root(n) for n in candidate.nodes}
    read = {storage_root(n) for n in _read_outside(candidate)}
    for node, root in mutations(graph):
        where = ir.source_line(node) or node.name
        if node in candidate.nodes or (root in inner and root in candidate.nodes):
            raise Illegal(f"the region's own value is changed in place at {where}")
        if root in read and position[node] >= first:
            # Later than that it matters too: the kernel may save what eager's backward does not.
            when = "between its uses" if position[node] < insertion else "after its use"
            raise Illegal(f"an input is changed in place at {where}, {when}")


def _gradients(candidate: Candidate, graph: fx.Graph, first_user: fx.Node) -> None:
    """The region lies under one gradient mode, and what the kernel holds constant is constant."""
    enabled = gradient_modes(graph)
    if len({enabled[n] for n in (*candidate.nodes, first_user)}) > 1:
        raise Illegal("gradients are switched off or on inside of it")
    constants = [(r, candidate.inputs[r]) for r in candidate.constant]
    differentiated = needs_gradient(graph) if any(n is not None for _, n in constants) else set()
    for role, node in constants:
        if node in differentiated:
            raise Illegal(f"{role} needs a gradient, and the kernel gives none")


def gradient_modes(graph: fx.Graph) -> dict[fx.Node, bool]:
    """Whether gradients are recorded where each node stands."""
    enabled, modes = True, {}
    for node in graph.nodes:
        if ir.is_call(node, torch._C._set_grad_enabled):
            enabled = bool(node.args[0])
        modes[node] = enabled
    return modes


def needs_gradient(graph: fx.Graph) -> set[fx.Node]:
    """The nodes through which some input of the graph gets a gradient.

    The nodes' own fake tensors do not say so: they were recorded detached.
    """
    modes = gradient_modes(graph)
    found = {n for n in graph.find_nodes(op="placeholder") if n.meta.get("requires_grad")}
    written = mutations(graph)
    first_alone = (torch.ops.aten.to.other, torch.ops.aten.type_as.default)
    while True:
        before = len(found)
        for node in ir.calls(graph):
            if not modes[node] or node.target is torch.ops.aten.detach.default:
                continue
            read = node.all_input_nodes
            read = read[:1] if node.target in first_alone else read
            # A call that yields several values counts as differentiable; its pieces tell.
            differentiable = not ir.is_tensor(node) or ir.is_floating(node)
            if any(n in found for n in read) and (differentiable or ir.value(node).is_complex()):
                found.add(node)
        found |= {root for call, root in written if call in found}
        if len(found) == before:
            return found
