"""Layer normalisation: derivation, casting modes, precision, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from backends import Backend
from launches import TARGETS, assert_no_spills
from rows import DTYPES, compare, is_gradient, on, symbolic_mean, symbolic_row

from fusewright.kernels import layer_norm, norm_launch
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
@pytest.mark.parametrize("scale", [1e-3, 30.0])
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_error_is_not_above_eagers(
    backend: Backend, dtype: torch.dtype, scale: float, mean: float
) -> None:
    op = backend.ops.layer_norm
    x = (torch.randn(64, 130) * scale + mean * scale).to(dtype)
    w, b = ((1 + 0.3 * torch.randn(130)).to(dtype) for _ in range(2))
    compare(
        backend,
        lambda x, w, b: op(x, w, b, EPS, 0.0, "output", dtype)[0],
        lambda x, w, b: F.layer_norm(x, (130,), w, b, EPS),
        (x, w, b),
    )
    compare(
        backend,
        lambda x, w, b: op(x, w, b, EPS, 0.0, "input", dtype)[0],
        eager_by_hand,
        (x, w, b),
    )
    compare(
        backend,
        lambda x: op(x, None, None, EPS, 0.0, "output", dtype)[0],
        lambda x: F.layer_norm(x, (130,), None, None, EPS),
        (x,),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1024, 2304, 5120, 8192, 11008, 16384])
def test_real_widths(width: int, dtype: torch.dtype) -> None:
    vectors = [(1 + 0.3 * torch.randn(width)).to(dtype) for _ in range(2)]
    compare(
        Backend("cuda", torch.ops.fusewright, "cuda"),
        lambda x, w, b: OP(x, w, b, EPS, 0.0, "output", dtype)[0],
        lambda x, w, b: F.layer_norm(x, (width,), w, b, EPS),
        (torch.randn(2050, width).to(dtype), *vectors),
    )


def test_a_large_mean_costs_no_digits(backend: Backend) -> None:
    x = torch.randn(4, 64, device=backend.device) + 1e4
    y = backend.ops.layer_norm(x, None, None, EPS, 0.0, "output", torch.float32)[0]
    torch.testing.assert_close(y, F.layer_norm(x.double(), (64,)).float(), atol=5e-3, rtol=0)


def test_weight_plus_one(backend: Backend) -> None:
    x, w, b = (on(backend, torch.randn(s)) for s in ((5, 12), (12,), (12,)))
    y = backend.ops.layer_norm(x, w, b, EPS, 1.0, "output", torch.float32)[0]
    expected = F.layer_norm(x, (12,), w + 1, b, EPS)
    torch.testing.assert_close(y, expected)
    dy = torch.randn(5, 12).to(x.device)
    grads = [torch.autograd.grad(t, (x, w, b), dy) for t in (y, expected)]
    torch.testing.assert_close(*grads)


def test_order_in_memory_and_frozen_sides(backend: Backend) -> None:
    x = on(backend, torch.randn(2, 5, 2, 8).transpose(1, 2))
    w, b = (on(backend, torch.randn(8)) for _ in range(2))
    for needed in ((x, w), (x, b), (w,), (b,), (w, b), (x,), (x, w, b)):
        given = [t if any(t is n for n in needed) else t.detach() for t in (x, w, b)]
        y = backend.ops.layer_norm(*given, EPS, 0.0, "output", torch.float32)[0]
        assert y.transpose(1, 2).is_contiguous()
        dy = torch.randn(y.shape).to(y.device)
        grads = torch.autograd.grad(y, needed, dy)
        expected = torch.autograd.grad(F.layer_norm(*given[:1], (8,), *given[1:], EPS), needed, dy)
        torch.testing.assert_close(grads, expected)


def test_constant_and_no_rows(backend: Backend) -> None:
    op = backend.ops.layer_norm
    x = on(backend, torch.full((2, 8), 3.0))
    y = op(x, None, None, EPS, 0.0, "output", torch.float32)[0]
    assert not y.any() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    empty, w = on(backend, torch.randn(0, 8)), on(backend, torch.randn(8))
    y = op(empty, w, w, EPS, 0.0, "output", torch.float32)[0]
    assert y.shape == (0, 8) and not torch.autograd.grad(y.sum(), w)[0].any()


def test_sums_that_do_not_fit_in_registers(
    kernels: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_launch, "sums_fit", lambda *_: False)
    x, w, b = torch.randn(70, 300), torch.randn(300), torch.randn(300)
    compare(
        kernels,
        lambda x, w, b: kernels.ops.layer_norm(x, w, b, EPS, 0.0, "output", torch.float32)[0],
        lambda x, w, b: F.layer_norm(x, (300,), w, b, EPS),
        (x, w, b),
    )


@pytest.mark.parametrize("bias_alone", [True, False])
def test_sums_without_the_gradient_of_x(kernels: Backend, bias_alone: bool) -> None:
    x, w, b = torch.randn(70, 300), torch.randn(300), torch.randn(300)
    fixed = on(kernels, x).detach()
    compare(
        kernels,
        lambda b, w: kernels.ops.layer_norm(
            fixed, w.detach() if bias_alone else w, b, EPS, 0.0, "output", torch.float32
        )[0] + (0 * w.sum() if bias_alone else 0),
        lambda b, w: F.layer_norm(
            fixed.to(b.dtype), (300,), w.detach() if bias_alone else w, b, EPS
        ) + (0 * w.sum() if bias_alone else 0),
        (b, w),
    )  # fmt: skip


def test_bad_input_is_named(backend: Backend) -> None:
    op, x = backend.ops.layer_norm, torch.randn(2, 4, device=backend.device)
    with pytest.raises(ValueError, match=r"bias: expected shape \(4,\), got \(2, 4\)"):
        op(x, None, x, EPS, 0.0, "output", torch.float32)
    with pytest.raises(TypeError, match=r"weight: expected a floating point dtype"):
        op(x, x[0].int(), None, EPS, 0.0, "output", torch.float32)


def test_fake_agrees(backend: Backend) -> None:
    x = on(backend, torch.randn(3, 2, 8).transpose(0, 1))
    w, b = (on(backend, torch.randn(8)) for _ in range(2))
    args = (x, w, b, EPS, 0.0, "input", torch.float32)
    torch.library.opcheck(backend.ops.layer_norm.default, args)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.bfloat16, torch.float32):
        for width in (5120, 11008, 16384):
            x, w, r = torch.empty(8, width, dtype=dtype), torch.empty(width), torch.empty(8)
            args, tail = (EPS, 0.0, "output", dtype), (r, r, 0.0, "output", True)
            yield f"{dtype} {width}", lambda x=x, w=w, a=args: layer_norm.triton_fwd(x, w, w, *a)
            for need in (False, True):
                yield (
                    f"{dtype} {width} backward {need}",
                    lambda x=x, w=w, t=tail, n=need: layer_norm.triton_bwd(x, x, w, w, *t, n, n),
                )


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    assert_no_spills(__name__, target)
