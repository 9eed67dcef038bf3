"""The residual sum and its norm: derivation, the shared gradient, precision, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sympy as sp
import torch
from backends import Backend
from launches import TARGETS, assert_no_spills
from rows import DTYPES, compare, is_gradient, on, symbolic_mean, symbolic_row
from test_kernels_rms_norm import EPS
from test_kernels_rms_norm import eager as eager_norm

from fusewright.kernels import add_rms_norm, rms_norm
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
def test_error_is_not_above_eagers(
    backend: Backend, dtype: torch.dtype, cast: str, offset: float
) -> None:
    x, e = torch.randn(64, 130).to(dtype), (3 * torch.randn(64, 130)).to(dtype)
    w = (1 + 0.3 * torch.randn(130)).to(dtype)
    compare(
        backend,
        lambda x, e, w: backend.ops.add_rms_norm(x, e, w, EPS, offset, cast, dtype)[:2],
        lambda x, e, w: eager(x, e, w, offset, cast),
        (x, e, w),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1024, 2304, 5120, 6144, 8192, 11008, 16384])
def test_real_widths(width: int, dtype: torch.dtype) -> None:
    x, e = (torch.randn(2050, width).to(dtype) for _ in range(2))
    compare(
        Backend("cuda", torch.ops.fusewright, "cuda"),
        lambda x, e, w: OP(x, e, w, EPS, 0.0, "input", dtype)[:2],
        eager,
        (x, e, (1 + 0.3 * torch.randn(width)).to(dtype)),
    )


def test_sum_is_eagers_bit_for_bit(backend: Backend) -> None:
    x, e = (torch.randn(8, 33, device=backend.device).half() for _ in range(2))
    total = backend.ops.add_rms_norm(x, e, None, EPS, 0.0, "input", torch.float16)[1]
    assert torch.equal(total, x + e)


def test_either_operand_alone_and_either_output_alone(backend: Backend) -> None:
    x, e, w = (on(backend, torch.randn(s)).detach() for s in ((4, 6), (4, 6), (6,)))
    for leaf in (0, 1):
        for use in (0, 1):
            pair = [x, e]
            pair[leaf] = pair[leaf].clone().requires_grad_()
            ours = backend.ops.add_rms_norm(*pair, w, EPS, 0.0, "input", torch.float32)[use]
            both = (ours, eager(*pair, w)[use])
            grads = [torch.autograd.grad(y.sum(), pair[leaf])[0] for y in both]
            torch.testing.assert_close(*grads)


def test_the_shared_gradient_is_accumulated_apart(backend: Backend) -> None:
    x, e = (on(backend, torch.randn(4, 6)) for _ in range(2))
    for _ in range(2):
        y, total, _ = backend.ops.add_rms_norm(x, e, None, EPS, 0.0, "input", torch.float32)
        (y.square().sum() + total.sum() + x.sum()).backward()
    assert x.grad is not None and e.grad is not None
    torch.testing.assert_close(x.grad - 2.0, e.grad)


def test_operands_of_unlike_strides(backend: Backend) -> None:
    w = on(backend, torch.randn(8))
    wide = on(backend, torch.randn(2, 4, 3, 20)[..., :8])
    turned = on(backend, torch.randn(3, 4, 2, 8).transpose(0, 2))
    for x, e in ((wide, turned), (turned, wide)):
        y, total, _ = backend.ops.add_rms_norm(x, e, w, EPS, 0.0, "input", torch.float32)
        torch.testing.assert_close((y, total), eager(x, e, w))
        grads = [
            torch.autograd.grad((a.cos() + b.sin()).sum(), (x, e, w))
            for a, b in ((y, total), eager(x, e, w))
        ]
        torch.testing.assert_close(*grads)


def test_a_wider_buffer_receives_the_output(kernels: Backend) -> None:
    x, e, w = (torch.randn(s, device=kernels.device) for s in ((4, 8), (4, 8), (8,)))
    buffer = torch.full((4, 12), 7.0, device=kernels.device)
    args = (EPS, 0.0, "input", torch.float32)
    _, total, _ = add_rms_norm.triton_fwd(x, e, w, *args, out=buffer[:, :8])
    torch.testing.assert_close((buffer[:, :8], total), eager(x, e, w))
    assert (buffer[:, 8:] == 7).all()


def test_no_rows(backend: Backend) -> None:
    x, e, w = (on(backend, torch.randn(s)) for s in ((0, 8), (0, 8), (8,)))
    y, total, _ = backend.ops.add_rms_norm(x, e, w, EPS, 0.0, "input", torch.float32)
    dx, de, dw = torch.autograd.grad((y + total).sum(), (x, e, w))
    assert dx.shape == de.shape == (0, 8) and not dw.any()


def test_bad_input_is_named(backend: Backend) -> None:
    op, x = backend.ops.add_rms_norm, torch.randn(2, 4, device=backend.device)
    with pytest.raises(ValueError, match=r"residual: expected the shape of x \(2, 4\), got \(4,\)"):
        op(x, x[0], None, EPS, 0.0, "input", torch.float32)
    with pytest.raises(TypeError, match=r"residual: expected the dtype of x"):
        op(x, x.half(), None, EPS, 0.0, "input", torch.float32)


def test_fake_agrees(backend: Backend) -> None:
    for x in (torch.randn(2, 3, 8), torch.randn(3, 2, 8).transpose(0, 1)):
        leaves = [on(backend, t) for t in (x, torch.randn(2, 3, 8), torch.randn(8))]
        args = (*leaves, EPS, 0.0, "input", torch.float32)
        torch.library.opcheck(backend.ops.add_rms_norm.default, args)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.bfloat16, torch.float32):
        for width in (4096, 16384):
            x, w, r = torch.empty(8, width, dtype=dtype), torch.empty(width), torch.empty(8)
            args, tail = (EPS, 0.0, "input", dtype), (r, 0.0, "input", True, True)
            yield f"{dtype} {width}", lambda x=x, w=w, a=args: add_rms_norm.triton_fwd(x, x, w, *a)
            for need, ds in ((False, x), (True, x), (True, None)):
                yield (
                    f"{dtype} {width} backward {need}",
                    lambda x=x, s=ds, w=w, t=tail, n=need: add_rms_norm.triton_bwd(
                        x, s, x, w, *t, n
                    ),
                )


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    assert_no_spills(__name__, target)
