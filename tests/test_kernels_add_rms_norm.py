"""The residual sum and its norm: derivation, the shared gradient, precision, bad input."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
from rows import DTYPES, compare, is_gradient, symbolic_mean, symbolic_row
from test_kernels_rms_norm import EPS
from test_kernels_rms_norm import eager as eager_norm

from fusewright.kernels import rms_norm
from fusewright.runtime.op import register_all

register_all()
OP = torch.ops.fusewright.add_rms_norm
Pair = tuple[torch.Tensor, torch.Tensor]


def eager(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    offset: float = 0.0,
    cast: str = "input",
) -> Pair:
    total = x + residual
    return eager_norm(total, weight, offset, cast), total


def test_gradient_is_sympys() -> None:
    x, e, dy, ds, w = (symbolic_row(n, 2) for n in ("x", "e", "dy", "ds", "w"))
    total, r = x + e, sp.Symbol("r", positive=True)
    root = 1 / sp.sqrt(symbolic_mean(total * total) + sp.Rational(1, 7))
    outputs, upstream = [*(total * root * w), *total], [*dy, *ds]
    claim = rms_norm.row_gradient(dy * w, total * r, r, symbolic_mean) + ds
    assert is_gradient(claim, outputs, upstream, x, {r: root})
    assert is_gradient(claim, outputs, upstream, e, {r: root})
    assert not is_gradient(claim - 2 * ds, outputs, upstream, x, {r: root})


@pytest.mark.parametrize("cast", ["input", "output"])
def test_gradcheck(cast: str) -> None:
    x, e = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def ours(*t: torch.Tensor) -> Pair:
        return OP(*t, EPS, 1.0, cast, torch.float64)[:2]

    assert torch.autograd.gradcheck(ours, (x, e, w))
    assert torch.autograd.gradcheck(lambda x, e: ours(x, e, None), (x, e))


def test_a_wrong_sign_fails_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda g, xhat, r, mean: r * (g + xhat * mean(g * xhat))
    monkeypatch.setattr(rms_norm, "row_gradient", wrong)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(
            lambda x: OP(x, x.detach(), None, EPS, 0.0, "output", torch.float64)[0], (x,)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast", ["input", "output"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_error_is_not_above_eagers(dtype: torch.dtype, cast: str, offset: float) -> None:
    x, e = torch.randn(64, 130).to(dtype), (3 * torch.randn(64, 130)).to(dtype)
    w = (1 + 0.3 * torch.randn(130)).to(dtype)
    compare(
        lambda x, e, w: OP(x, e, w, EPS, offset, cast, dtype)[:2],
        lambda x, e, w: eager(x, e, w, offset, cast),
        (x, e, w),
    )


def test_sum_is_eagers_bit_for_bit() -> None:
    x, e = torch.randn(8, 33).bfloat16(), torch.randn(8, 33).bfloat16()
    assert torch.equal(OP(x, e, None, EPS, 0.0, "input", torch.bfloat16)[1], x + e)


def test_either_operand_alone_and_either_output_alone() -> None:
    x, e, w = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
    for leaf in (0, 1):
        for use in (0, 1):
            pair = [x, e]
            pair[leaf] = pair[leaf].clone().requires_grad_()
            ours = OP(*pair, w, EPS, 0.0, "input", torch.float32)[use]
            grads = [
                torch.autograd.grad(y.sum(), pair[leaf])[0] for y in (ours, eager(*pair, w)[use])
            ]
            torch.testing.assert_close(*grads)


def test_the_shared_gradient_is_accumulated_apart() -> None:
    x, e = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    for _ in range(2):
        y, total, _ = OP(x, e, None, EPS, 0.0, "input", torch.float32)
        (y.square().sum() + total.sum() + x.sum()).backward()
    assert x.grad is not None and e.grad is not None
    torch.testing.assert_close(x.grad - 2.0, e.grad)


def test_no_rows() -> None:
    x, e = torch.randn(0, 8, requires_grad=True), torch.randn(0, 8, requires_grad=True)
    w = torch.randn(8, requires_grad=True)
    y, total, _ = OP(x, e, w, EPS, 0.0, "input", torch.float32)
    dx, de, dw = torch.autograd.grad((y + total).sum(), (x, e, w))
    assert dx.shape == de.shape == (0, 8) and not dw.any()


def test_bad_input_is_named() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"residual: expected the shape of x \(2, 4\), got \(4,\)"):
        OP(x, torch.randn(4), None, EPS, 0.0, "input", torch.float32)
    with pytest.raises(TypeError, match=r"residual: expected the dtype of x"):
        OP(x, x.half(), None, EPS, 0.0, "input", torch.float32)


def test_fake_agrees() -> None:
    for x in (torch.randn(2, 3, 8), torch.randn(3, 2, 8).transpose(0, 1)):
        leaves = x.requires_grad_(), torch.randn(2, 3, 8, requires_grad=True)
        weight = torch.randn(8, requires_grad=True)
        torch.library.opcheck(OP.default, (*leaves, weight, EPS, 0.0, "input", torch.float32))
