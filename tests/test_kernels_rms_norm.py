"""RMS normalisation: derivation, casting modes, layouts, precision, launches, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sympy as sp
import torch
from backends import Backend
from launches import TARGETS, assert_no_spills
from rows import DTYPES, compare, is_gradient, on, symbolic_mean, symbolic_row

from fusewright.kernels import norm_launch, rms_norm
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
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_error_is_not_above_eagers(
    backend: Backend, dtype: torch.dtype, cast: str, offset: float, scale: float
) -> None:
    op = backend.ops.rms_norm
    x, w = (torch.randn(64, 130) * scale).to(dtype), (1 + 0.3 * torch.randn(130)).to(dtype)
    compare(
        backend,
        lambda x, w: op(x, w, EPS, offset, cast, dtype)[0],
        lambda x, w: eager(x, w, offset, cast),
        (x, w),
    )
    compare(
        backend,
        lambda x: op(x, None, EPS, 0.0, cast, dtype)[0],
        lambda x: eager(x, None, cast=cast),
        (x,),
    )


@pytest.mark.parametrize("shape", [(50, 3), (33, 64), (7, 256), (2, 2304), (3, 4096), (1, 9000)])
def test_shapes(kernels: Backend, shape: tuple[int, int]) -> None:
    x, w = torch.randn(shape), torch.randn(shape[1])
    compare(
        kernels,
        lambda x, w: kernels.ops.rms_norm(x, w, EPS, 0.0, "input", torch.float32)[0],
        lambda x, w: eager(x, w, 0.0, "input"),
        (x, w),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1024, 2304, 5120, 6144, 8192, 11008, 16384, 20000])
def test_real_widths(width: int, dtype: torch.dtype) -> None:
    cuda = Backend("cuda", torch.ops.fusewright, "cuda")
    x, w = torch.randn(2050, width).to(dtype), (1 + 0.3 * torch.randn(width)).to(dtype)
    compare(
        cuda,
        lambda x, w: OP(x, w, EPS, 0.0, "input", dtype)[0],
        lambda x, w: eager(x, w, 0.0, "input"),
        (x, w),
    )


def test_weight_of_another_dtype_decides_the_output(backend: Backend) -> None:
    x, w = (on(backend, t) for t in (torch.randn(4, 6).half(), torch.randn(6)))
    y = backend.ops.rms_norm(x, w, EPS, 0.0, "input", torch.float32)[0]
    torch.testing.assert_close(y, eager(x, w), rtol=1e-6, atol=0)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert (dx.dtype, dw.dtype) == (torch.float16, torch.float32)


def test_strided_heads_keep_their_order_in_memory(backend: Backend) -> None:
    packed = torch.randn(2, 5, 3 * 8 + 2)[..., :16].unflatten(-1, (2, 8))
    for heads in (packed, packed.transpose(1, 2), packed.permute(2, 1, 0, 3)):
        x, w = on(backend, heads), on(backend, torch.randn(8))
        y = backend.ops.rms_norm(x, w, EPS, 0.0, "output", torch.float32)[0]
        torch.testing.assert_close(y, eager(x, w))
        order = sorted(range(3), key=x.stride, reverse=True)
        assert y.permute(*order, 3).is_contiguous()
        dy = torch.randn(8, *y.shape[:-1]).movedim(0, -1).to(y.device)
        for upstream in (dy, dy.contiguous(), y.new_ones(()).expand(y.shape)):
            grads = torch.autograd.grad(y, (x, w), upstream, retain_graph=True)
            torch.testing.assert_close(grads, torch.autograd.grad(eager(x, w), (x, w), upstream))
            assert grads[0].stride() == y.stride()


def test_rows_that_two_strides_do_not_describe(kernels: Backend) -> None:
    x = on(kernels, torch.randn(4, 6, 8, 5)[::2, ::2, ::2])
    y = kernels.ops.rms_norm(x, None, EPS, 0.0, "output", torch.float32)[0]
    torch.testing.assert_close(y, eager(x, None))
    single = on(kernels, torch.randn(4, 1))
    y = kernels.ops.rms_norm(single, None, EPS, 0.0, "output", torch.float32)[0]
    torch.testing.assert_close(y, eager(single, None))
    columns = on(kernels, torch.randn(8, 6).t())  # the last dimension is not contiguous
    y = kernels.ops.rms_norm(columns, None, EPS, 0.0, "output", torch.float32)[0]
    torch.testing.assert_close(y, eager(columns, None))


def test_a_wider_buffer_receives_the_output(kernels: Backend) -> None:
    x, w = torch.randn(2, 3, 8, device=kernels.device), torch.randn(8, device=kernels.device)
    buffer = torch.full((2, 3, 12), 7.0, device=kernels.device)
    y, _ = rms_norm.triton_fwd(x, w, EPS, 0.0, "input", torch.float32, out=buffer[..., :8])
    torch.testing.assert_close(buffer[..., :8], eager(x, w))
    assert y.data_ptr() == buffer.data_ptr() and (buffer[..., 8:] == 7).all()


def test_a_moved_statistic_is_put_in_order(kernels: Backend) -> None:
    x = on(kernels, torch.randn(5, 4, 3, 8).permute(1, 2, 0, 3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        y = kernels.ops.rms_norm(x, None, EPS, 0.0, "output", torch.float32)[0]
    dy = torch.randn(y.shape).to(y.device)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, torch.autograd.grad(eager(x, None), x, dy)[0])


def test_weight_gradient_is_reproducible_and_honours_frozen_sides(backend: Backend) -> None:
    x, w = on(backend, torch.randn(70, 33)), on(backend, torch.randn(33))
    dy = torch.randn(70, 33).to(x.device)
    y = backend.ops.rms_norm(x, w, EPS, 0.0, "output", torch.float32)[0]
    both = torch.autograd.grad(y, (x, w), dy, retain_graph=True)
    again = torch.autograd.grad(y, (x, w), dy)
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True))
    for leaves in ((x, w.detach()), (x.detach(), w)):
        y = backend.ops.rms_norm(*leaves, EPS, 0.0, "output", torch.float32)[0]
        leaf = next(t for t in leaves if t.requires_grad)
        torch.testing.assert_close(
            torch.autograd.grad(y, leaf, dy)[0], both[0] if leaf is x else both[1]
        )


@pytest.mark.parametrize("stages", [0, 1, 3])
@pytest.mark.parametrize(
    ("hoist", "reload", "piece"), [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 0, 16), (0, 1, 8)]
)
def test_every_tile_gives_the_same(
    kernels: Backend, monkeypatch: pytest.MonkeyPatch, stages: int, hoist: int, reload: int,
    piece: int,
) -> None:  # fmt: skip
    x, w = (on(kernels, t) for t in (torch.randn(21, 40), torch.randn(40)))
    dy = torch.randn(21, 40).to(x.device)
    results = []
    cut = (4, 4, 2 if stages else 0, max(stages, 1), bool(hoist), bool(reload), piece)
    for tile in (None, norm_launch.Tile(*cut)):
        if tile is not None:
            monkeypatch.setattr(norm_launch, "forward_tile", lambda *_, tile=tile: tile)
            monkeypatch.setattr(norm_launch, "backward_tile", lambda *_, tile=tile: tile)
        y = kernels.ops.rms_norm(x, w, EPS, 1.0, "input", torch.float32)[0]
        results.append((y, *torch.autograd.grad(y, (x, w), dy)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("width", [1100, 1536, 2304])
def test_rows_of_several_pieces(kernels: Backend, width: int) -> None:
    x, w = torch.randn(5, width), torch.randn(width)
    assert norm_launch.piece_of(width) < width
    compare(
        kernels,
        lambda x, w: kernels.ops.rms_norm(x, w, EPS, 0.0, "input", torch.float32)[0],
        lambda x, w: eager(x, w, 0.0, "input"),
        (x, w),
    )


def test_zero_and_huge_rows(backend: Backend) -> None:
    x = torch.zeros(3, 8, dtype=torch.float16)
    x[1] = 6e4
    x[2, 0] = 6e4
    leaf = on(backend, x)
    y = backend.ops.rms_norm(leaf, None, EPS, 0.0, "output", torch.float16)[0]
    torch.testing.assert_close(y, eager(leaf, None))
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert dx.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(backend: Backend, shape: tuple[int, ...]) -> None:
    x, w = on(backend, torch.randn(shape)), on(backend, torch.randn(8))
    y = backend.ops.rms_norm(x, w, EPS, 0.0, "input", torch.float32)[0]
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == dx.shape == shape
    assert not dw.any()


def test_bad_input_is_named(backend: Backend) -> None:
    op, x = backend.ops.rms_norm, torch.randn(2, 4, device=backend.device)
    with pytest.raises(ValueError, match=r"weight: expected shape \(4,\), got \(3,\)"):
        op(x, x[0, :3], EPS, 0.0, "input", torch.float32)
    with pytest.raises(TypeError, match=r"x: expected a floating point dtype, got torch.int64"):
        op(x.long(), None, EPS, 0.0, "input", torch.float32)
    with pytest.raises(ValueError, match=r"cast: expected one of .*, got 'none'"):
        op(x, None, EPS, 0.0, "none", torch.float32)
    with pytest.raises(ValueError, match=r"x: expected at least one dimension"):
        op(x[0, 0], None, EPS, 0.0, "input", torch.float32)


def test_fake_agrees(backend: Backend) -> None:
    for x in (torch.randn(2, 3, 4, 8), torch.randn(2, 4, 3, 8).transpose(1, 2)):
        args = (on(backend, x), on(backend, torch.randn(8)), EPS, 0.0, "input", torch.float32)
        torch.library.opcheck(backend.ops.rms_norm.default, args)


@pytest.mark.gpu
@pytest.mark.alone
def test_offsets_past_2_to_the_31() -> None:
    x = torch.randn(2**19 + 8, 4096, device="cuda", dtype=torch.bfloat16)
    y = OP(x, None, EPS, 0.0, "output", x.dtype)[0]
    assert torch.equal(y[-8:], OP(x[-8:], None, EPS, 0.0, "output", x.dtype)[0])


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.bfloat16, torch.float32):
        for width in (1024, 16384) if dtype is torch.float32 else (128, 2304, 11008, 16384):
            x, w, r = torch.empty(8, width, dtype=dtype), torch.empty(width), torch.empty(8)
            args = (EPS, 0.0, "input", dtype)
            tail = (r, 0.0, "input", True)
            yield f"{dtype} {width}", lambda x=x, w=w, a=args: rms_norm.triton_fwd(x, w, *a)
            for need in (False, True):
                yield (
                    f"{dtype} {width} backward {need}",
                    lambda x=x, w=w, t=tail, n=need: rms_norm.triton_bwd(x, x, w, *t, n),
                )


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    assert_no_spills(__name__, target)
