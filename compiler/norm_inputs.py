"""The joint graph: adapted layers' gradients are made of a norm's input instead of its output.

    x, r = rms_norm(h, w)                     or x, h, r = add_rms_norm(...)
    dx, ..., dA, dB = lora_group_backward(dys, S, x, ...)       reads x for dA alone

becomes ``lora_group_norm_backward``, which has h, w and r for x: the norm's own backward reads these
anyway, so that x is not kept and the norm does not run again. Numerics stay: x has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir, rewrite

# By the norm: the name of its input, or the place of it among the results, and the place of r.
_NORMS: dict[str, tuple[str | int, int]] = {
    "rms_norm": ("x", 1),
    "rms_norm_roomy": ("x", 1),
    "add_rms_norm": (1, 2),
    "add_rms_norm_roomy": (1, 2),
}
_FORWARDS = ("lora_group", "lora_group_4bit")


def hand_over(joint: fx.GraphModule) -> int:
    """Rewrite a joint graph in place; tells how many groups read a norm's input."""
    return rewrite.each(joint, ir.own_calls(joint.graph, "lora_group_backward"), _handed_over)


def _handed_over(graph: fx.Graph, layers: fx.Node) -> bool:
    given = ir.named_arguments(layers)
    norm = _norm_of(given["x"])
    plain = not given["inputs"] and not given["need_inputs"] and not given["need_weights"]
    if norm is None or not (plain and given["need_down"]) or given["x"] in given["dys"]:
        return False
    of_norm = ir.named_arguments(norm)
    source, statistic = _NORMS[ir.own_name(norm)]
    h = of_norm[source] if isinstance(source, str) else _result(graph, norm, source)
    if not ir.value(h).dtype is of_norm["out_dtype"] is ir.value(given["x"]).dtype:
        return False
    r = _result(graph, norm, statistic)
    args = [h if a is given["x"] else a for a in layers.args]
    with graph.inserting_before(layers):
        new = graph.call_function(
            torch.ops.fusewright.lora_group_norm_backward.default,
            (*args, of_norm["weight"], r, of_norm["offset"], of_norm["cast"]),
        )
        ir.describe(new, layers, layers.meta["val"])
    layers.replace_all_uses_with(new)
    graph.erase_node(layers)
    return True


def _norm_of(x: fx.Node) -> fx.Node | None:
    """The norm that made ``x``, if nobody reads it but groups that will not want it afterwards."""
    at = ir.argument(x, 1) if x.op == "call_function" else None
    norm: Any = ir.argument(x, 0) if at == 0 else None
    if ir.own_name(norm) not in _NORMS:
        return None
    readers = {ir.own_name(user) for user in x.users}
    return norm if readers <= {*_FORWARDS, "lora_group_backward"} else None


def _result(graph: fx.Graph, norm: fx.Node, at: int) -> fx.Node:
    """A result of the norm, as the graph has it or as it is told here."""
    for user in norm.users:
        if user.args[1:] == (at,):
            return user
    with graph.inserting_after(norm):
        return rewrite.item(graph, norm, at)
