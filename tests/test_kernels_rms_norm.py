"""RMS normalisation: derivation, casting modes, layouts, precision, bad input."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
from rows import DTYPES, compare, is_gradient, symbolic_mean, symbolic_row

from fusewright.kernels import rms_norm
from fusewright.runtime.op import register_all

register_all()
OP = torch.ops.fusewright.rms_norm
EPS = 1e-6


def eager(
    x: torch.Tensor, weight: torch.Tensor | None, offset: float = 0.0, cast: str = "input"
) -> torch.Tensor:
    wide = x if x.dtype is torch.float64 else x.float()
    xhat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if weight is None:
        return xhat.to(x.dtype)
    if cast == "input":
        return (offset + weight) * xhat.to(x.dtype)
    return (xhat * (offset + weight.to(wide.dtype))).to(x.dtype)


def test_gradient_is_sympys() -> None:
    x, dy, w = (symbolic_row(n, 3) for n in ("x", "dy", "w"))
    eps, offset, r = sp.Rational(1, 7), sp.Symbol("o"), sp.Symbol("r", positive=True)
    root = 1 / sp.sqrt(symbolic_mean(x * x) + eps)
    y = x * root * (offset + w)
    claim = rms_norm.row_gradient(dy * (offset + w), x * r, r, symbolic_mean)
    assert is_gradient(claim, y, dy, x, {r: root})
    assert not is_gradient(-claim, y, dy, x, {r: root})
    for at in range(3):  # dw of one row
        assert sp.simplify(sum(dy * [sp.diff(f, w[at]) for f in y]) - dy[at] * x[at] * root) == 0


@pytest.mark.parametrize("cast", ["input", "output"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradcheck(cast: str, offset: float) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = OP(x, w, EPS, offset, cast, torch.float64)[0]
        return y

    assert torch.autograd.gradcheck(ours, (x, w))
    assert torch.autograd.gradcheck(lambda x: OP(x, None, EPS, 0.0, cast, torch.float64)[0], (x,))


def test_a_wrong_sign_fails_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda g, xhat, r, mean: r * (g + xhat * mean(g * xhat))
    monkeypatch.setattr(rms_norm, "row_gradient", wrong)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: OP(x, None, EPS, 0.0, "output", torch.float64)[0], (x,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast", ["input", "output"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_error_is_not_above_eagers(
    dtype: torch.dtype, cast: str, offset: float, scale: float
) -> None:
    x, w = (torch.randn(64, 130) * scale).to(dtype), (1 + 0.3 * torch.randn(130)).to(dtype)
    compare(
        lambda x, w: OP(x, w, EPS, offset, cast, dtype)[0],
        lambda x, w: eager(x, w, offset, cast),
        (x, w),
    )
    compare(
        lambda x: OP(x, None, EPS, 0.0, cast, dtype)[0], lambda x: eager(x, None, cast=cast), (x,)
    )


def test_weight_of_another_dtype_decides_the_output() -> None:
    x, w = torch.randn(4, 6).bfloat16(), torch.randn(6)
    y = OP(x, w, EPS, 0.0, "input", torch.float32)[0]
    assert torch.equal(y, eager(x, w))


def test_output_and_gradient_keep_the_order_in_memory() -> None:
    heads = torch.randn(2, 5, 3 * 8)[..., :16].unflatten(-1, (2, 8)).transpose(1, 2)
    x = heads.detach().requires_grad_()
    y = OP(x, None, EPS, 0.0, "output", torch.float32)[0]
    torch.testing.assert_close(y, eager(x, None))
    assert y.transpose(1, 2).is_contiguous()
    (dx,) = torch.autograd.grad(y, x, torch.randn(2, 2, 5, 8))
    assert dx.stride() == y.stride()


def test_expanded_gradient_second_backward_and_frozen_side() -> None:
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    y = OP(x, w, EPS, 0.0, "output", torch.float32)[0]
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.autograd.grad(eager(x, w).sum(), x)[0])


def test_zero_and_huge_rows() -> None:
    x = torch.zeros(3, 8, dtype=torch.float16)
    x[1] = 6e4
    x[2, 0] = 6e4
    leaf = x.requires_grad_()
    y = OP(leaf, None, EPS, 0.0, "output", torch.float16)[0]
    torch.testing.assert_close(y, eager(x, None))
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert dx.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape, requires_grad=True), torch.randn(8, requires_grad=True)
    y = OP(x, w, EPS, 0.0, "input", torch.float32)[0]
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == dx.shape == shape
    assert not dw.any()


def test_bad_input_is_named() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"weight: expected shape \(4,\), got \(3,\)"):
        OP(x, torch.randn(3), EPS, 0.0, "input", torch.float32)
    with pytest.raises(TypeError, match=r"x: expected a floating point dtype, got torch.int64"):
        OP(x.long(), None, EPS, 0.0, "input", torch.float32)
    with pytest.raises(ValueError, match=r"cast: expected one of .*, got 'none'"):
        OP(x, None, EPS, 0.0, "none", torch.float32)
    with pytest.raises(ValueError, match=r"x: expected at least one dimension"):
        OP(torch.tensor(1.0), None, EPS, 0.0, "input", torch.float32)


def test_fake_agrees() -> None:
    for x in (torch.randn(2, 3, 4, 8), torch.randn(2, 4, 3, 8).transpose(1, 2)):
        x = x.requires_grad_()
        torch.library.opcheck(
            OP.default, (x, torch.randn(8, requires_grad=True), EPS, 0.0, "input", torch.float32)
        )
