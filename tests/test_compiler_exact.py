"""A captured graph in float64: values and gradients, and how much of a frozen weight is widened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.compiler import exact
from fusewright.compiler.exact import Float64

aten = torch.ops.aten
BF16 = torch.bfloat16


class _Widest(TorchDispatchMode):
    """Notes the largest tensor that a cast made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default:
            self.most = max(self.most, out.numel())
        return out


def _head(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = torch.ops.aten.linear.default(x, weight, bias)
    return y.sin() + torch.ops.aten.linear.default(x, weight)


def _both(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.linear.default(x, weight, bias) * weight.sum()


@pytest.mark.parametrize("function", [_head, _both])
def test_in_pieces_as_whole(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(exact, "_PIECE", 100)
    weight, bias = torch.randn(50, 8).to(BF16), torch.randn(50).to(BF16)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    graph = make_fx(function, pre_dispatch=True)(x.detach().to(BF16), weight, bias)
    with _Widest() as widest:
        y = Float64(graph).run(x, weight, bias)
    wanted = function(x, weight.double(), bias.double())
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, torch.autograd.grad(wanted, x, dy)[0])
    assert widest.most == (96 if function is _head else weight.numel())


def test_a_trained_weight_is_the_callers_to_widen() -> None:
    layer = nn.Linear(8, 5, dtype=torch.float64)
    graph = make_fx(_head, pre_dispatch=True)(
        torch.ones(2, 8), *(p.detach().float() for p in layer.parameters())
    )
    y = Float64(graph).run(torch.ones(2, 8, dtype=torch.float64), layer.weight, layer.bias)
    assert y.dtype is torch.float64
    y.sum().backward()
    assert layer.weight.grad is not None
