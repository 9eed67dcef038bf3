"""Interpreters that say what a captured graph computes: without dropout, and in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir

aten = torch.ops.aten

_PIECE = 2**24  # numbers of a frozen weight that are in float64 at a time


class Quiet(fx.Interpreter):
    """Runs a graph with dropout off."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.dropout.default:
            return args[0].clone()
        if target is aten.scaled_dot_product_attention.default and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        return super().call_function(target, args, kwargs)


class Float64(Quiet):
    """Runs a graph in float64: floating casts and dtypes are widened.

    Inputs may have any dtype. A frozen weight of linear layers alone is widened a piece at a time, in
    the forward and again in the backward: whole, a head's would take more memory than the step has.
    """

    def run_node(self, node: fx.Node) -> Any:
        if ir.is_cast(node):
            return self.env[ir.argument(node, 0)]
        if node.op == "placeholder":
            value = super().run_node(node)
            return value if _only_multiplied(node, value) else _widened(value)
        if ir.is_call(node, aten.linear.default) and _is_narrow(self.env.get(ir.argument(node, 1))):
            x, weight, *bias = (self.env[a] if isinstance(a, fx.Node) else a for a in node.args)
            multiply: Any = _Product.apply
            product = multiply(x, weight)
            return product if not bias or bias[0] is None else product + bias[0]
        return super().run_node(node)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        widened = tuple(_widen_dtype(a) for a in args)
        return super().call_function(
            target, widened, {k: _widen_dtype(v) for k, v in kwargs.items()}
        )


def _only_multiplied(node: fx.Node, value: Any) -> bool:
    """Whether the input is a frozen matrix that is read as the weight of linear layers alone."""
    frozen = isinstance(value, torch.Tensor) and not value.requires_grad and value.dim() == 2
    return frozen and all(
        ir.is_call(user, aten.linear.default)
        and user.args.count(node) == 1
        and user.args[1] is node
        for user in node.users
    )


def _is_narrow(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dtype is not torch.float64
    )


def _widened(value: Any) -> Any:
    return value.to(torch.float64) if _is_narrow(value) else value


def _widen_dtype(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


class _Product(torch.autograd.Function):
    """x (..., K) in float64 times the transpose of a frozen weight (N, K) of fewer digits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return torch.cat([x @ piece.double().t() for piece in weight.split(_rows(weight))], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (dy,), weight = grads, ctx.weight
        dx, rows = dy.new_zeros(*dy.shape[:-1], weight.shape[1]), _rows(weight)
        for piece, part in zip(weight.split(rows), dy.split(rows, dim=-1), strict=True):
            dx += part @ piece.double()
        return dx, None


def _rows(weight: torch.Tensor) -> int:
    return max(1, _PIECE // max(1, weight.shape[1]))
