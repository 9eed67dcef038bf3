"""The backward half: a gated unit that runs again gets its value from its own backward.

    h  = glu(gate, up)                 runs again, for the weight gradient of the layer that reads h
    dh = ...                           that layer's
    dgate, dup = glu_backward(dh, gate, up)

becomes one pass that gives all three, behind dh; what reads h comes after it. Numerics stay: the same
expressions of the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir, order, rewrite

# By the unit: its backward, the op that gives both, the unit's tensors, and the rest of its form.
_UNITS: dict[str, tuple[str, Any, tuple[str, ...], tuple[str, ...]]] = {
    "glu": ("glu_backward", "glu_again_backward", ("gate", "up"), ("activation",)),
    "glu_packed": (
        "glu_packed_backward",
        "glu_packed_again_backward",
        ("gate_up",),
        ("activation", "gate_first", "interleaved"),
    ),
}


def join(half: fx.GraphModule) -> int:
    """Rewrite the backward half in place; tells how many units no longer run again."""
    return rewrite.each(half, ir.own_calls(half.graph, *_UNITS), _joined)


def joins(h: fx.Node) -> bool:
    """Whether a second run of ``h`` in a joint graph's backward half would be joined."""
    return ir.own_name(h) in _UNITS and _found(h) is not None


def _joined(graph: fx.Graph, h: fx.Node) -> bool:
    found = _found(h)
    if found is None:
        return False
    _replace(graph, h, *found)
    assert order.restore(graph), "nothing that waits for the value has an effect"
    return True


def _found(h: fx.Node) -> tuple[fx.Node, dict[Any, fx.Node]] | None:
    """The backward of the unit that made ``h``, and its results."""
    name, _, tensors, form = _UNITS[ir.own_name(h)]
    given = ir.named_arguments(h)
    if not str(given["activation"]).isidentifier():
        return None  # of an activation in text, sums may be contracted otherwise beside the slope
    if given["out_dtype"] is not ir.value(given[tensors[0]]).dtype:
        return None
    unit = _backward_of(h, name, (*tensors, *form))
    if unit is None:
        return None
    results = ir.results(unit) if len(tensors) > 1 else {0: unit}
    return None if results is None else (unit, results)


def _backward_of(h: fx.Node, name: str, shared: tuple[str, ...]) -> fx.Node | None:
    """The unit's backward, if it has the same operands, gives all gradients, and does not wait for h.

    What reads h moves down, so nothing of that may have an effect.
    """
    given, behind = ir.named_arguments(h), _behind(h)
    if any(n.op == "call_function" and ir.has_effect(n) for n in behind):
        return None
    unit: fx.Node
    for unit in given[shared[0]].users:
        if ir.own_name(unit) != name:
            continue
        backward = ir.named_arguments(unit)
        same = all(given[k] == backward[k] for k in shared)
        wanted = all(v for k, v in backward.items() if k.startswith("need_"))
        if same and wanted and unit not in behind:
            return unit
    return None


def _behind(node: fx.Node) -> set[fx.Node]:
    """Everything that depends on a value."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def _replace(graph: fx.Graph, h: fx.Node, unit: fx.Node, results: dict[Any, fx.Node]) -> None:
    _, again, tensors, form = _UNITS[ir.own_name(h)]
    given, gradients = ir.named_arguments(unit), unit.meta["val"]
    if len(tensors) == 1:
        gradients = (gradients,)
    with graph.inserting_before(unit):
        op = getattr(torch.ops.fusewright, again).default
        new = graph.call_function(op, (given["dy"], *(given[k] for k in (*tensors, *form))))
        ir.describe(new, unit, (*gradients, ir.value(h)))
        made = [rewrite.item(graph, new, at) for at in range(len(gradients) + 1)]
    for at, node in {**results, len(gradients): h}.items():
        node.replace_all_uses_with(made[at])
        graph.erase_node(node)
    if not unit._erased:
        graph.erase_node(unit)
    for node in made:
        if not node.users:
            graph.erase_node(node)
