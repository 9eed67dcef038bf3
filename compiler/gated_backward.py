"""The backward half: a gated unit that runs again for one reader gets its value from its own backward.

    h = glu(gate_up)                                  runs again
    dh, ..., dA, dB = lora_group_backward(dy, h, ...) reads h for dA alone
    d(gate_up) = glu_backward(dh, gate_up)            has gate and up in registers

becomes ``lora_glu_backward``, which makes dh first, h beside d(gate_up), and dA last. Numerics stay:
the same kernels on the same numbers.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fusewright.compiler import gated_again, ir, rewrite

# Positions in the results of lora_group_backward.
DX, DBIASES, DDOWN, DUP = 0, 3, 4, 5
_ROOMY = ("glu_packed_roomy", "glu_packed_roomy_backward")
_DENSE = ("glu_packed", "glu_packed_backward")


def join(half: fx.GraphModule) -> int:
    """Rewrite the backward half in place; tells how many units no longer run again."""
    return rewrite.each(half, ir.own_calls(half.graph, "lora_group_backward"), _joined)


def costs_nothing(h: fx.Node) -> bool:
    """Whether a second run of ``h`` in a joint graph's backward half would be joined, and so be none."""
    if gated_again.joins(h):
        return True
    if ir.own_name(h) not in (_ROOMY[0], _DENSE[0]):
        return False
    return around(h) is not None


def around(h: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """In a joint graph, the calls that would be joined with ``h``: the layers' backward and the unit's."""
    behind = [n for n in h.users if ir.own_name(n) == "lora_group_backward"]
    others = {ir.own_name(n) for n in h.users if n not in behind}
    if len(behind) != 1 or not others <= {"lora_group"}:
        return None
    found = _unit_of(behind[0], h)
    return None if found is None else (behind[0], found[1])


def _joined(graph: fx.Graph, layers: fx.Node) -> bool:
    h = ir.named_arguments(layers)["x"]
    if ir.own_name(h) not in (_ROOMY[0], _DENSE[0]) or set(h.users) != {layers}:
        return False
    found = _unit_of(layers, h)
    if found is not None:
        _replace(graph, layers, found[0], h, found[1])
    return found is not None


def _unit_of(layers: fx.Node, h: fx.Node) -> tuple[dict[Any, fx.Node], fx.Node] | None:
    """(results of the layers' backward, the unit's backward) where the two can be joined."""
    given = ir.named_arguments(layers)
    plain = not given["inputs"] and not given["need_inputs"] and not given["need_weights"]
    if given["x"] is not h or not (plain and given["need_x"] and given["need_down"]):
        return None
    results = ir.results(layers)
    if results is None or not results.keys() <= {DX, DBIASES, DDOWN, DUP}:
        return None
    unit = _unit_backward(h, results.get(DX))
    return None if unit is None else (results, unit)


def _unit_backward(h: fx.Node, dh: fx.Node | None) -> fx.Node | None:
    """The backward of the unit that made ``h``, if it alone reads ``dh``."""
    if dh is None or len(dh.users) != 1:
        return None
    (unit,) = dh.users
    if (ir.own_name(h), ir.own_name(unit)) not in (_ROOMY, _DENSE):
        return None
    forward, backward = ir.named_arguments(h), ir.named_arguments(unit)
    if not str(forward["activation"]).isidentifier():
        return None  # of an activation in text, sums may be contracted otherwise beside the slope
    shared = ("gate_up", "activation", "gate_first", "interleaved")
    same = all(forward[k] == backward[k] for k in shared)
    gate_up = ir.value(forward["gate_up"])
    fits = backward["dy"] is dh and backward["need_gate_up"]
    return unit if same and fits and forward["out_dtype"] is gate_up.dtype else None


def _replace(
    graph: fx.Graph, layers: fx.Node, results: dict[Any, fx.Node], h: fx.Node, unit: fx.Node
) -> None:
    given, forward, backward = (
        ir.named_arguments(layers),
        ir.named_arguments(h),
        ir.named_arguments(unit),
    )
    whole = layers.meta["val"]
    value = (unit.meta["val"], *(whole[i] for i in (DBIASES, DDOWN, DUP)))
    with graph.inserting_before(layers):
        new = graph.call_function(
            torch.ops.fusewright.lora_glu_backward.default,
            (
                given["dys"], given["thin"], forward["gate_up"], given["weights"],
                given["biases"], given["down"], given["up"], given["member"], given["scales"],
                forward["activation"], forward["gate_first"], forward["interleaved"],
                forward.get("room", 0), backward.get("grad_room", 0), given["grad_roomy"],
                given["need_biases"], given["need_down"], given["need_up"],
            ),
        )  # fmt: skip
        ir.describe(new, layers, value)
        dgate_up = graph.call_function(operator.getitem, (new, 0))
        dgate_up.meta = dict(unit.meta)
    unit.replace_all_uses_with(dgate_up)
    graph.erase_node(unit)
    graph.erase_node(results.pop(DX))
    for at, node in results.items():
        node.args = (new, at - 2)
    graph.erase_node(layers)
    graph.erase_node(h)
