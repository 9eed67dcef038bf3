"""Rewrite: put a match's replacement into the graph and remove what it replaces."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from fusewright.compiler import ir
from fusewright.compiler.match import Match


def call(graph: fx.Graph, target: Any, args: Sequence[Any], like: fx.Node | None = None) -> fx.Node:
    """Append a call at the graph's insertion point with its fake value worked out.

    Args:
        graph: where to insert; its insertion point decides where.
        target: the operator overload.
        args: nodes and constants.
        like: node whose provenance (source line, module) the new one inherits.
    """
    node = graph.call_function(target, tuple(args))
    fake = fx.map_arg(node.args, ir.value)
    mode = next(
        (v.fake_mode for v in map(ir.value, node.all_input_nodes) if hasattr(v, "fake_mode")), None
    )
    if mode is None:
        raise ValueError(f"{target} reads no tensor of the graph")
    # As Dynamo does: some composite operators ask for numbers where sizes are symbols.
    with mode, torch.no_grad(), enable_python_dispatcher():
        node.meta["val"] = target(*fake)
    inherited = like if like is not None else next(iter(node.all_input_nodes))
    ir.inherit_provenance(node, inherited)
    return node


def item(graph: fx.Graph, source: fx.Node, index: int) -> fx.Node:
    """Append ``source[index]`` for a call that yields a tuple."""
    node = graph.call_function(operator.getitem, (source, index))
    node.meta["val"] = ir.value(source)[index]
    ir.inherit_provenance(node, source)
    return node


def each(
    half: fx.GraphModule, nodes: Iterable[fx.Node], one: Callable[[fx.Graph, fx.Node], bool]
) -> int:
    """Rewrite at each of some nodes where ``one`` can, in place; tells at how many it could."""
    done = sum(one(half.graph, node) for node in list(nodes))
    if done:
        half.graph.lint()
        half.recompile()
    return done


def apply(match: Match, graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Replace the match's region; returns the nodes that stand for its outputs."""
    candidate = match.candidate
    with graph.inserting_before(match.before):
        results = tuple(candidate.emit(graph, candidate.sources))
    for old, new in zip(candidate.outputs, results, strict=True):
        expected, got = ir.value(old), ir.value(new)
        if expected.dtype != got.dtype or len(expected.shape) != len(got.shape):
            raise ValueError(
                f"{match.pattern}: the replacement yields {got.dtype} of rank {len(got.shape)}, "
                f"the region {expected.dtype} of rank {len(expected.shape)}"
            )
        ir.inherit_provenance(new, old)
        standing = new
        if _order(expected) != _order(got) and _reaches_a_draw(old):
            standing = _laid_out(graph, new, _order(expected))
        old.replace_all_uses_with(standing, delete_user_cb=lambda u: u not in candidate.nodes)
    _erase(graph, candidate.nodes)
    return results


def _order(t: torch.Tensor) -> list[int]:
    """The dimensions from the one that is laid out widest to the densest; of one element left out."""
    sizes, strides = list(map(ir.traced, t.shape)), list(map(ir.traced, t.stride()))
    return sorted((d for d in range(t.dim()) if sizes[d] != 1), key=lambda d: -strides[d])


def _reaches_a_draw(node: fx.Node) -> bool:
    """Whether random numbers are drawn for what is made of the value: their order is its layout's."""
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if ir.is_random(user):
                return True
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return False


def _laid_out(graph: fx.Graph, node: fx.Node, order: list[int]) -> fx.Node:
    """The same value with its dimensions in memory in this order."""
    rank = ir.value(node).dim()
    whole = [d for d in range(rank) if d not in order] + order
    back = [whole.index(d) for d in range(rank)]
    aten = torch.ops.aten
    with graph.inserting_after(node):
        turned = call(graph, aten.permute.default, (node, whole))
    with graph.inserting_after(turned):
        dense = call(graph, aten.contiguous.default, (turned,))
    with graph.inserting_after(dense):
        return call(graph, aten.permute.default, (dense, back))


def _erase(graph: fx.Graph, nodes: frozenset[fx.Node]) -> None:
    for node in [n for n in reversed(graph.nodes) if n in nodes]:
        if not node.users:
            graph.erase_node(node)
