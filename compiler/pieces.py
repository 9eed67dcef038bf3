"""The backward half: gradients of the pieces of a group's result go to its backward as they are.

    lora_group_backward([cat([dq, dk, dv], -1)], ...)   becomes   lora_group_backward([dq, dk, dv], ...)

The op copies its gradients into the operand of one product anyway, where they are not there already,
and reads pieces as well as their whole. Numerics stay: the same numbers.
"""

from __future__ import annotations

import itertools

import torch
from torch import fx

from fusewright.compiler import ir, rewrite

_GROUPS = ("lora_group_backward", "lora_group_norm_backward", "lora_group_4bit_backward")


def spread(half: fx.GraphModule) -> int:
    """Rewrite the backward half in place; tells how many gradients are no longer put together."""
    return rewrite.each(half, ir.own_calls(half.graph, *_GROUPS), _spread)


def _spread(graph: fx.Graph, layers: fx.Node) -> bool:
    given = ir.named_arguments(layers)
    if len(given["dys"]) != 1 or given["grad_roomy"]:
        return False
    (whole,) = given["dys"]
    if whole.target is not torch.ops.aten.cat.default or set(whole.users) != {layers}:
        return False
    given_pieces, dimension = ir.argument(whole, 0), ir.argument(whole, 1, 0)
    pieces = [p for p in given_pieces if ir.traced(ir.value(p).shape[-1])]  # a cut may leave none
    value = ir.value(whole)
    if dimension not in (-1, value.dim() - 1):
        return False
    if not all(_in_rows(ir.value(p)) and ir.value(p).dtype is value.dtype for p in pieces):
        return False
    layers.args = (list(pieces), *layers.args[1:])
    ir.describe(layers, layers, ir.value(layers))
    graph.erase_node(whole)
    return True


def _in_rows(t: torch.Tensor) -> bool:
    """Whether (..., D) is (rows, D) with one distance between rows, so that it is read as it lies.

    Told from the traced sizes; at others the op would make a copy, as the cat did.
    """
    sizes, strides = map(ir.traced, t.shape), map(ir.traced, t.stride())
    lead = list(zip(sizes, strides, strict=True))
    (_, last), rows = lead.pop(), lead
    steps = [outer == inner * size for (_, outer), (size, inner) in itertools.pairwise(rows)]
    return last == 1 and all(steps)
