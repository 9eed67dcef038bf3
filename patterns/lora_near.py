"""Adapters beside a linear layer that are near low-rank ones, and what they have more of.

    with a bias of the adapter's own   y + s (x A^T) B^T + s c
    with scaled waist and result       y + b (d (x A^T)) B^T, for vectors b and d
    with a weight put together         y + x D^T, where a function computes D of other weights

They keep running as they are written; the names serve the report's reasons.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir

aten = torch.ops.aten


def pair(node: Any) -> fx.Node | None:
    """The first map, if ``node`` is the second of two bias-free linear maps in a row."""
    first = ir.strip_casts(node.args[0]) if _plain(node) else None
    return first if _plain(first) else None


def looks_added(node: fx.Node) -> bool:
    """Whether an adapter's last map, scaled or not, is added to a linear map of the same input."""
    if _linear(node) and _computed(node.args[1]):
        return True  # the sum is often another graph's, since the function breaks this one
    x, total = _input(node), node
    while x is not None and len(total.users) == 1:
        (user,) = total.users
        if ir.is_call(user, aten.add.Tensor):
            other = ir.other_operand(user, total)
            base: Any = ir.strip_casts(other) if ir.is_tensor(other) else None
            return _linear(base) and _source(base) is x and _input(base) is None
        if not ir.is_call(user, aten.mul.Tensor) and not ir.is_cast(user):
            return False
        total = user
    return False


def other_kind(node: fx.Node) -> str:
    """What an adapter ending at ``node`` has beyond two maps in a row; "" if it is nothing known."""
    if not _linear(node):
        return ""
    if _computed(node.args[1]):
        return "a function of its own puts the weight together; it is not two maps in a row"
    first = _first(node)
    if first is None:
        return ""
    if not (_plain(node) and _plain(first)):
        return "the adapter's maps have a bias of their own"
    return "the adapter scales what lies between its two maps"


def _input(last: fx.Node) -> fx.Node | None:
    """What an adapter reads that ends with the map ``last``; None if it looks like none."""
    if not _linear(last):
        return None
    first = _first(last)
    return None if first is None else _source(first)


def _first(second: fx.Node) -> fx.Node | None:
    """The map before ``second``, behind casts and products with a vector or a number."""
    node: Any = ir.strip_casts(second.args[0])  # type: ignore[arg-type]
    while ir.is_call(node, aten.mul.Tensor):
        factors = [ir.strip_casts(n) for n in node.all_input_nodes]
        node = next((n for n in factors if _linear(n) or ir.is_call(n, aten.mul.Tensor)), None)
    return node if _linear(node) else None


def _computed(parameter: Any) -> bool:
    """Whether an autograd function of the model's own puts a weight together."""
    through = (aten.mul.Tensor, aten.view.default, aten.reshape.default, operator.getitem)
    weight: Any = ir.strip_casts(parameter)
    while ir.is_call(weight, *through):
        weight = ir.strip_casts(weight.args[0])
    return ir.is_call(weight, torch.ops.higher_order.autograd_function_apply)


def _source(linear: Any) -> Any:
    """The tensor that a map reads, before casts and dropout."""
    x: Any = ir.strip_casts(linear.args[0])
    return ir.strip_casts(x.args[0]) if ir.is_call(x, aten.dropout.default) else x


def _linear(node: Any) -> bool:
    return ir.is_call(node, aten.linear.default)


def _plain(node: Any) -> bool:
    return _linear(node) and (len(node.args) < 3 or node.args[2] is None)
