"""Layer normalisation: derivation, casting modes, precision, bad input."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from rows import DTYPES, compare, is_gradient, symbolic_mean, symbolic_row

from fusewright.kernels import layer_norm
from fusewright.runtime.op import register_all

register_all()
OP = torch.ops.fusewright.layer_norm
EPS = 1e-5
Vector = torch.Tensor | None


def eager_by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The spelling that rounds the normalised row before weight and bias."""
    wide = x if x.dtype is torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    xhat = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * xhat.to(x.dtype) + bias


def test_gradient_is_sympys() -> None:
    x, dy, w, b = (symbolic_row(n, 3) for n in ("x", "dy", "w", "b"))
    r = sp.Symbol("r", positive=True)
    centred = x - symbolic_mean(x)
    root = 1 / sp.sqrt(symbolic_mean(centred * centred) + sp.Rational(1, 7))
    y = centred * root * w + b
    claim = layer_norm.row_gradient(dy * w, centred * r, r, symbolic_mean)
    assert is_gradient(claim, y, dy, x, {r: root})
    assert not is_gradient(-claim, y, dy, x, {r: root})


@pytest.mark.parametrize("cast", ["input", "output"])
def test_gradcheck(cast: str) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def ours(x: torch.Tensor, w: Vector = None, b: Vector = None) -> torch.Tensor:
        y: torch.Tensor = OP(x, w, b, EPS, 1.0, cast, torch.float64)[0]
        return y

    assert torch.autograd.gradcheck(ours, (x, w, b))
    assert torch.autograd.gradcheck(ours, (x, w))
    assert torch.autograd.gradcheck(lambda x, b: ours(x, None, b), (x, b))
    assert torch.autograd.gradcheck(ours, (x,))


def test_a_wrong_sign_fails_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda g, xhat, r, mean: r * (g + mean(g) - xhat * mean(g * xhat))
    monkeypatch.setattr(layer_norm, "row_gradient", wrong)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(
            lambda x: OP(x, None, None, EPS, 0.0, "output", torch.float64)[0], (x,)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_error_is_not_above_eagers(dtype: torch.dtype, scale: float, mean: float) -> None:
    x = (torch.randn(64, 130) * scale + mean * scale).to(dtype)
    w, b = ((1 + 0.3 * torch.randn(130)).to(dtype) for _ in range(2))
    compare(
        lambda x, w, b: OP(x, w, b, EPS, 0.0, "output", dtype)[0],
        lambda x, w, b: F.layer_norm(x, (130,), w, b, EPS),
        (x, w, b),
    )
    compare(lambda x, w, b: OP(x, w, b, EPS, 0.0, "input", dtype)[0], eager_by_hand, (x, w, b))
    compare(
        lambda x: OP(x, None, None, EPS, 0.0, "output", dtype)[0],
        lambda x: F.layer_norm(x, (130,), None, None, EPS),
        (x,),
    )


def test_a_large_mean_costs_no_digits() -> None:
    x = torch.randn(4, 64) + 1e4
    y = OP(x, None, None, EPS, 0.0, "output", torch.float32)[0]
    torch.testing.assert_close(y, F.layer_norm(x.double(), (64,)).float(), atol=5e-3, rtol=0)


def test_order_in_memory_and_frozen_sides() -> None:
    x = torch.randn(2, 5, 2, 8).transpose(1, 2).requires_grad_()
    w, b = torch.randn(8, requires_grad=True), torch.randn(8)
    y = OP(x, w, b, EPS, 0.0, "output", torch.float32)[0]
    assert y.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(y.sum(), (x, w))
    expected = torch.autograd.grad(F.layer_norm(x, (8,), w, b, EPS).sum(), (x, w))
    torch.testing.assert_close(grads, expected)


def test_constant_and_no_rows() -> None:
    x = torch.full((2, 8), 3.0, requires_grad=True)
    y = OP(x, None, None, EPS, 0.0, "output", torch.float32)[0]
    assert not y.any() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    empty, w = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = OP(empty, w, w, EPS, 0.0, "output", torch.float32)[0]
    assert y.shape == (0, 8) and not torch.autograd.grad(y.sum(), w)[0].any()


def test_bad_input_is_named() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"bias: expected shape \(4,\), got \(2, 4\)"):
        OP(x, None, x, EPS, 0.0, "output", torch.float32)
    with pytest.raises(TypeError, match=r"weight: expected a floating point dtype"):
        OP(x, torch.ones(4, dtype=torch.int32), None, EPS, 0.0, "output", torch.float32)


def test_fake_agrees() -> None:
    x = torch.randn(3, 2, 8).transpose(0, 1).requires_grad_()
    w, b = (torch.randn(8, requires_grad=True) for _ in range(2))
    torch.library.opcheck(OP.default, (x, w, b, EPS, 0.0, "input", torch.float32))
