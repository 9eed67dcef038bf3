"""Both halves: a gated unit and the adapted layers around it become one op each way.

    h = glu(gate_up)                                    forward: ``lora_glu``
    ys, S = lora_group(h, ...)

    d(gate_up), ... = lora_glu_backward(dys, ...)       backward: ``lora_mlp_backward``
    dx, ... = lora_group_backward(d(gate_up), ...)

The thin products are then made from the unit's numbers while these are in registers (see
``kernels/lora_mlp.py``). The rules of rounding stay; sums are taken in another order.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir, order, rewrite
from fusewright.compiler.gated_backward import DBIASES, DDOWN, DUP, DX

_UNITS = ("glu_packed_roomy", "glu_packed")
_GROUPS = {
    "lora_group_backward": "lora_mlp_backward",
    "lora_group_norm_backward": "lora_mlp_norm_backward",
}


def forward(half: fx.GraphModule) -> int:
    """Rewrite the forward half in place; tells how many units were joined."""
    return rewrite.each(half, ir.own_calls(half.graph, "lora_group"), _join_forward)


def backward(half: fx.GraphModule) -> int:
    """Rewrite the backward half in place, after ``gated_backward``; tells how many were joined."""
    return rewrite.each(half, ir.own_calls(half.graph, "lora_glu_backward"), _join_backward)


def _plain(given: dict[str, Any]) -> bool:
    """Whether every adapter of a group reads its x."""
    return not given["inputs"] and all(source < 0 for source in given["source"])


def _join_forward(graph: fx.Graph, layers: fx.Node) -> bool:
    given = ir.named_arguments(layers)
    h = given["x"]
    results = ir.results(layers)
    if ir.own_name(h) not in _UNITS or results is None or not (_plain(given) and given["down"]):
        return False
    unit = ir.named_arguments(h)
    gate_up = ir.value(unit["gate_up"])
    dtype = gate_up.dtype
    if not str(unit["activation"]).isidentifier():
        return False  # of an activation in text, sums may be contracted otherwise
    if unit["out_dtype"] is not dtype or given["out_dtype"] is not dtype:
        return False
    if any(user is not layers and user.op != "output" for user in h.users):
        return False  # h may be saved, but nothing else may want it before the group has run
    # What the group does not say of x it has to read as the unit left it.
    room = unit.get("room", 0) if given["roomy"] else 0
    if bool(room) != bool(given["roomy"]):
        return False
    ys, thin = layers.meta["val"]
    with graph.inserting_before(layers):
        new = graph.call_function(
            torch.ops.fusewright.lora_glu.default,
            (
                unit["gate_up"], given["weights"], given["biases"], given["down"], given["up"],
                given["member"], given["scales"], given["widths"], given["grad_roomy"],
                unit["activation"], unit["gate_first"], unit["interleaved"], room,
            ),
        )  # fmt: skip
        ir.describe(new, layers, (ys, thin, h.meta["val"]))
        value = graph.call_function(operator.getitem, (new, 2))
        value.meta = dict(h.meta)
    for at, node in results.items():
        node.args = (new, at)
    graph.erase_node(layers)
    h.replace_all_uses_with(value)
    graph.erase_node(h)
    return order.restore(graph)


def reader(dgate_up: fx.Node) -> fx.Node | None:
    """The group's backward that alone reads a unit's gradient, and nothing else in its place."""
    if len(dgate_up.users) != 1:
        return None
    (first,) = dgate_up.users
    found = ir.results(first) if ir.own_name(first) in _GROUPS else None
    if found is None or not found.keys() <= {DX, DBIASES, DDOWN, DUP}:
        return None
    given = ir.named_arguments(first)
    reads = list(given["dys"]) == [dgate_up] and dgate_up not in (given["x"], given["thin"])
    if not reads or not _plain(given) or given["need_inputs"] or given["need_weights"]:
        return None
    return first


def _join_backward(graph: fx.Graph, unit: fx.Node) -> bool:
    results = ir.results(unit)
    dgate_up = results.get(0) if results else None
    first = None if dgate_up is None else reader(dgate_up)
    if results is None or dgate_up is None or first is None or _reaches(first, unit, results):
        return False
    found, given = ir.results(first) or {}, ir.named_arguments(first)
    own = ir.named_arguments(unit)
    if given["grad_roomy"] != (own["grad_room"] > 0):
        return False
    with graph.inserting_before(first):
        new = graph.call_function(
            getattr(torch.ops.fusewright, _GROUPS[ir.own_name(first)]).default,
            (
                *unit.args, given["thin"], given["x"], given["weights"], given["biases"],
                given["down"], given["up"], given["member"], given["scales"], given["need_x"],
                given["need_biases"], given["need_down"], given["need_up"],
                *[v for k, v in given.items() if k.startswith("norm_")],
            ),
        )  # fmt: skip
        whole, second = first.meta["val"], unit.meta["val"]
        value = (*(whole[i] for i in (DX, DBIASES, DDOWN, DUP)), *second[1:])
        ir.describe(new, first, value)
    places = {DX: 0, DBIASES: 1, DDOWN: 2, DUP: 3}
    for at, node in found.items():
        node.args = (new, places[at])
    for at, node in results.items():
        if node is not dgate_up:
            node.args = (new, at + 3)
    graph.erase_node(first)
    graph.erase_node(dgate_up)
    graph.erase_node(unit)
    return order.restore(graph)


def _reaches(first: fx.Node, unit: fx.Node, results: dict[Any, fx.Node]) -> bool:
    """Whether the group reads, perhaps by way of others, another result of the unit's op."""
    others = {n for at, n in results.items() if at != 0}
    seen, waiting = set(), list(first.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node in others:
            return True
        if node not in seen and node is not unit:
            seen.add(node)
            waiting += node.all_input_nodes
    return False
