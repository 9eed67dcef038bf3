"""The last part of a block that treats every token alone, cut off so that it can run in tiles.

From the block's result upwards, ``split`` gathers the calls that compute a row (one token of one sequence)
of their results from the same row of their inputs: pointwise work, linear layers, norms, gated units,
cuts and joins of the last dimension. Where that part holds a value that is wider than whatever it
reads, running it in tiles of rows bounds that value's memory by the tile's.

Random draws, sizes as numbers and whatever is unknown are not taken in: a draw would give other masks.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.normalize import drop_dead

aten = torch.ops.aten

_UNIT = 8  # rows
TOKENS = 8192  # of a tile, at most: products of so many rows are as fast as of any more

# Ops of ours whose rows are independent; what they read beside rows are weights and vectors.
_OURS = frozenset(
    {
        *("rms_norm", "rms_norm_roomy", "add_rms_norm", "add_rms_norm_roomy", "layer_norm"),
        *("gated_rms_norm", "activation", "glu", "glu_roomy", "glu_packed", "glu_packed_roomy"),
        *("lora_group", "lora_group_4bit", "lora_added"),
    }
)
_LAST_DIM = {  # op -> where its dimension stands, and the default
    aten.split_with_sizes.default: (2, 0),
    aten.split.Tensor: (2, 0),
    aten.chunk.default: (2, 0),
    aten.slice.Tensor: (1, 0),
    aten.cat.default: (1, 0),
}


@dataclass(frozen=True)
class Parts:
    """A block in two parts.

    Attributes:
        first: the block up to the tail, with the block's inputs; it yields what the tail reads of it.
        tail: the rest, over some rows.
        sources: per input of the tail, (of the block's inputs or else of ``first``'s results, place).
        rows: places of the tail's inputs that are cut into tiles.
        width: of the tail's result.
    """

    first: fx.GraphModule
    tail: fx.GraphModule
    sources: tuple[tuple[bool, int], ...]
    rows: tuple[int, ...]
    width: int

    def given(self, inputs: Any, results: Any) -> list[Any]:
        """The tail's inputs, from the block's inputs and the first part's results."""
        return [(inputs if outside else results)[at] for outside, at in self.sources]


def split(gm: fx.GraphModule) -> Parts | None:
    """The block in two parts; None where its end has nothing to gain from tiles."""
    (returned,) = gm.graph.output_node().args
    if not isinstance(returned, (tuple, list)) or len(returned) != 1:
        return None
    (result,) = returned
    if not isinstance(result, fx.Node) or not _is_rows(result, result):
        return None
    nodes = _tail(gm.graph, result)
    inputs = [n for n in gm.graph.nodes if n not in nodes and not nodes.isdisjoint(n.users)]
    rows = [n for n in inputs if _is_rows(n, result)]
    fixed = [n for n in inputs if n not in rows]
    if any(n.op != "placeholder" for n in fixed) or not rows:
        return None
    widest = max(map(ir.last, rows))
    if not any(ir.last(n) > widest for n in nodes if ir.is_tensor(n)):
        return None
    return _parts(gm, result, nodes, inputs, rows)


def _tail(graph: fx.Graph, result: fx.Node) -> set[fx.Node]:
    """The calls that work row by row and that only such calls read, up from the result."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        read = [u for u in node.users if u.op != "output"]
        ours = node is result or (bool(read) and len(read) == len(node.users))
        if ours and all(u in found for u in read) and _by_rows(node, result):
            found.add(node)
    return found


def _is_rows(node: Any, like: fx.Node) -> bool:
    """Whether the value is (batch, sequence, width), with the result's batch and sequence."""
    if not ir.is_floating(node) or len(ir.shape(node)) != 3:
        return False
    return bool(ir.shape(node)[:2] == ir.shape(like)[:2])


def _by_rows(node: fx.Node, like: fx.Node) -> bool:
    """Whether a row of the call's result is computed from the same row of what it reads."""
    if node.op != "call_function" or ir.is_random(node):
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node)  # as what it takes an item of
    read = node.all_input_nodes
    rows = [n for n in read if _is_rows(n, like)]
    rest = [n for n in read if n not in rows]
    if not rows or not all(map(_is_fixed, rest)):
        return False
    if ir.own_name(node):
        return ir.own_name(node) in _OURS
    if node.target is aten.linear.default:
        return _is_rows(node.args[0], like) and len(rows) == 1
    if node.target in _LAST_DIM:
        place, default = _LAST_DIM[node.target]
        return ir.argument(node, place, default) in (-1, 2) and not rest
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or ir.is_cast(node)
    return pointwise and _is_rows(node, like) and all(len(ir.shape(n)) <= 1 for n in rest)


def _is_fixed(node: fx.Node) -> bool:
    """Whether it is an input without rows: a weight, a vector, a number's tensor."""
    if node.op != "placeholder" or not ir.is_tensor(node):
        return False
    return all(isinstance(s, int) for s in ir.shape(node)) and len(ir.shape(node)) <= 2


def _parts(
    gm: fx.GraphModule,
    result: fx.Node,
    nodes: set[fx.Node],
    inputs: list[fx.Node],
    rows: list[fx.Node],
) -> Parts:
    """The two graphs; the first is a copy of the block's without the tail."""
    places = {n: i for i, n in enumerate(gm.graph.find_nodes(op="placeholder"))}
    made = [n for n in inputs if n not in places]
    tail = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for n in inputs:
        copies[n] = tail.placeholder(n.name)
        copies[n].meta = {"requires_grad": n not in places} | n.meta
    for n in gm.graph.nodes:
        if n in nodes:
            copies[n] = tail.node_copy(n, copies.__getitem__)
    tail.output((copies[result],))
    first = copy.deepcopy(gm)
    known = {n.name: n for n in first.graph.nodes}
    first.graph.output_node().args = (tuple(known[n.name] for n in made),)
    drop_dead(first.graph)
    first.recompile()
    return Parts(
        first,
        fx.GraphModule(gm, tail),
        tuple((n in places, places[n] if n in places else made.index(n)) for n in inputs),
        tuple(i for i, n in enumerate(inputs) if n in rows),
        int(ir.last(result)),
    )


def tokens(rows: int) -> int:
    """Rows of a tile: as few tiles as there can be, of about equal size; equal if a few more are."""
    least = -(-rows // TOKENS)
    for count in range(least, least + least // 4 + 1):
        if rows % count == 0 and rows // count % _UNIT == 0:
            return rows // count
    even = -(-rows // least)
    return min(-(-even // _UNIT) * _UNIT, rows)


def worth(rows: int) -> bool:
    """Whether there are rows for two tiles."""
    return rows >= 2 * TOKENS
