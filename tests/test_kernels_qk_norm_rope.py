"""Normalised and rotated heads: derivation, casts, layouts, strides, precision, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy as sp
import torch
from backends import Backend
from launches import TARGETS, assert_no_spills
from rows import DTYPES, compare, is_gradient, on, symbolic_mean, symbolic_row
from test_kernels_rms_norm import EPS
from test_kernels_rms_norm import eager as eager_norm
from test_kernels_rope import eager as eager_rope
from test_kernels_rope import heads, tables

from fusewright.kernels import qk_norm_rope as family
from fusewright.kernels import rms_norm, rope
from fusewright.runtime.op import register_all

register_all()
OP = torch.ops.fusewright.qk_norm_rope
Pair = tuple[torch.Tensor, torch.Tensor]


def eager(
    q: torch.Tensor, k: torch.Tensor, qw: Any, kw: Any, cos: torch.Tensor, sin: torch.Tensor,
    layout: str = "half", cast: str = "input", offset: float = 0.0,
) -> Pair:  # fmt: skip
    turned = [
        eager_rope(eager_norm(x, w, offset, cast), cos, sin, layout) for x, w in ((q, qw), (k, kw))
    ]
    return turned[0], turned[1]


def test_gradient_is_sympys() -> None:
    x, w, dy = (symbolic_row(n, 2) for n in ("x", "w", "dy"))
    r, angles = sp.Symbol("r", positive=True), rope.Angles(*sp.symbols("c1 s1 c2 s2", real=True))
    root = 1 / sp.sqrt(symbolic_mean(x * x) + sp.Rational(1, 7))
    y = rope.rotate(*(x * root * w), angles)
    dn = sp.Array(rope.unrotate(*dy, angles))
    g = symbolic_row("g", 2)
    named = dict(zip(g, (d * v for d, v in zip(dn, w, strict=True)), strict=True))
    claim = rms_norm.row_gradient(g, x * r, r, symbolic_mean)
    claim = [c.subs(named) for c in claim]
    assert is_gradient(claim, y, dy, x, {r: root})
    assert not is_gradient([-c for c in claim], y, dy, x, {r: root})
    assert is_gradient([d * v * r for d, v in zip(dn, x, strict=True)], y, dy, w, {r: root})


@pytest.mark.parametrize("layout", family.LAYOUTS)
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("full", [True, False])
def test_gradcheck(layout: str, width: int, full: bool) -> None:
    f64 = torch.float64
    q = torch.randn(2, 3, 4, 6, dtype=f64, requires_grad=True)
    k = torch.randn(2, 1, 4, 6, dtype=f64, requires_grad=True)
    qw, kw = (torch.randn(6, dtype=f64, requires_grad=True) for _ in range(2))
    # Unlike angles for the two features of a pair: the general transpose.
    cos, sin = torch.randn(2, 1, 1, 4, width if full else width // 2, dtype=f64)

    def ours(q: torch.Tensor, k: torch.Tensor, qw: Any, kw: Any) -> Pair:
        out: Pair = OP(q, k, qw, kw, EPS, 1.0, "output", f64, cos, sin, layout, width, f64)[:2]
        return out

    assert torch.autograd.gradcheck(ours, (q, k, qw, kw))
    assert torch.autograd.gradcheck(lambda q, k: ours(q, k, None, kw), (q, k))
    assert torch.autograd.gradcheck(lambda k: ours(q.detach(), k, None, None)[1], (k,))


def test_a_wrong_sign_fails_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda g, xhat, r, mean: r * (g + xhat * mean(g * xhat))
    monkeypatch.setattr(rms_norm, "row_gradient", wrong)
    q = torch.randn(1, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 1, 1, 2, 4, dtype=torch.float64)
    tail = (EPS, 0.0, "output", q.dtype, cos, sin, "half", 4, q.dtype)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda q: OP(q, q.detach(), None, None, *tail)[0], (q,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast", ["input", "output"])
@pytest.mark.parametrize("layout", family.LAYOUTS)
@pytest.mark.parametrize("width", [32, 20])
def test_error_is_not_above_eagers(
    backend: Backend, dtype: torch.dtype, cast: str, layout: str, width: int
) -> None:
    made = tables(2, 9, width, layout, dtype if cast == "input" else torch.float32)
    cos, sin = (t.to(backend.device) for t in made)
    compare(
        backend,
        lambda *t: backend.ops.qk_norm_rope(
            *t, EPS, 1.0, cast, dtype, cos, sin, layout, width, dtype
        )[:2],
        lambda *t: eager(*t, cos, sin, layout, cast, 1.0),
        (
            heads(2, 4, 9, 32, dtype),
            heads(2, 2, 9, 32, dtype),
            (1 + 0.3 * torch.randn(32)).to(dtype),
            (1 + 0.3 * torch.randn(32)).to(dtype),
        ),
    )


HEADS = [(1, 1, 4), (3, 1, 6), (5, 3, 80), (32, 8, 64), (71, 1, 64), (4, 4, 96), (1, 4, 256)]


@pytest.mark.parametrize("layout", family.LAYOUTS)
@pytest.mark.parametrize("shape", HEADS)
def test_shapes(kernels: Backend, shape: tuple[int, int, int], layout: str) -> None:
    q_heads, k_heads, width = shape
    f16 = torch.float16
    cos, sin = (t.to(kernels.device) for t in tables(1, 3, width, layout, torch.float32))
    compare(
        kernels,
        lambda *t: kernels.ops.qk_norm_rope(
            *t, EPS, 0.0, "output", f16, cos, sin, layout, width, f16
        )[:2],
        lambda *t: eager(*t, cos, sin, layout, "output"),
        (
            heads(2, q_heads, 3, width, f16),
            heads(2, k_heads, 3, width, f16),
            (1 + 0.3 * torch.randn(width)).to(f16),
            (1 + 0.3 * torch.randn(width)).to(f16),
        ),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 8, 128), (16, 16, 256), (8, 4, 256)])
def test_real_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    q_heads, k_heads, width = shape
    cos, sin = (t.cuda() for t in tables(1, 1030, width, "half", dtype))
    compare(
        Backend("cuda", torch.ops.fusewright, "cuda"),
        lambda *t: OP(*t, EPS, 0.0, "input", dtype, cos, sin, "half", width, dtype)[:2],
        lambda *t: eager(*t, cos, sin),
        (
            heads(2, q_heads, 1030, width, dtype),
            heads(2, k_heads, 1030, width, dtype),
            (1 + 0.3 * torch.randn(width)).to(dtype),
            (1 + 0.3 * torch.randn(width)).to(dtype),
        ),
    )


def test_each_gradient_alone_and_strides(backend: Backend) -> None:
    packed = torch.randn(2, 5, 6, 20).transpose(1, 2)
    cos, sin = (t.to(backend.device) for t in tables(2, 5, 8, "half", torch.float32))
    leaves = [on(backend, t) for t in (packed[:, :4, :, :16], packed[:, 4:, :, 2:18])]
    leaves += [on(backend, torch.randn(16)) for _ in range(2)]
    up = [torch.randn(2, 5, n, 16, device=backend.device).transpose(1, 2) for n in (4, 2)]
    expected = torch.autograd.grad(eager(*leaves, cos, sin), leaves, up)
    tail = (EPS, 0.0, "input", torch.float32, cos, sin, "half", 8, torch.float32)
    for at, want in enumerate(expected):
        given = [t if i == at else t.detach() for i, t in enumerate(leaves)]
        out = backend.ops.qk_norm_rope(*given, *tail)[:2]
        for made, x in zip(out, leaves, strict=False):
            assert made.stride()[-1] == 1 and made.shape == x.shape
        grad = torch.autograd.grad(out[at % 2], given[at], up[at % 2])[0]
        torch.testing.assert_close(grad, want)


def test_tables_of_unlike_strides(kernels: Backend) -> None:
    q, k = (heads(2, n, 5, 8, torch.float32).to(kernels.device) for n in (2, 1))
    cos, sin = (t.to(kernels.device) for t in tables(2, 5, 8, "half", torch.float32))
    tail = (EPS, 0.0, "input", torch.float32, cos[:1], sin, "half", 8, torch.float32)
    ours = kernels.ops.qk_norm_rope(q, k, None, None, *tail)[:2]
    torch.testing.assert_close(ours, eager(q, k, None, None, cos[:1], sin))


def test_rounds_as_the_two_ops_do(kernels: Backend) -> None:
    """The norm's rounding is kept; what follows is the rotation's own."""
    q, k = (heads(1, n, 7, 16, torch.float16).to(kernels.device) for n in (4, 2))
    w = torch.randn(16, device=kernels.device).half()
    cos, sin = (t.to(kernels.device) for t in tables(1, 7, 16, "half", torch.float32))
    for cast in ("input", "output"):
        for wide in (torch.float16, torch.float32):
            norm = (EPS, 0.0, cast, wide)
            ops, turn = kernels.ops, (cos, sin, "half", 16, torch.float16)
            ours = ops.qk_norm_rope(q, k, w, w, *norm, *turn)[:2]
            apart = ops.rope(*(ops.rms_norm(x, w, *norm)[0] for x in (q, k)), *turn)
            for a, b in zip(ours, apart, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3)
                assert (a != b).float().mean() < 0.02  # a sum in another order turns a tie over


def test_zero_rows_and_no_tokens(backend: Backend) -> None:
    for tokens in (3, 0):
        q, k = (on(backend, torch.zeros(2, n, tokens, 8)) for n in (2, 1))
        w = on(backend, torch.randn(8))
        cos, sin = (t.to(backend.device) for t in tables(1, tokens, 8, "half", torch.float32))
        args = (EPS, 0.0, "input", torch.float32, cos, sin, "half", 8, torch.float32)
        out = backend.ops.qk_norm_rope(q, k, w, w, *args)
        grads = torch.autograd.grad(out[0].sum() + out[1].sum(), (q, k, w))
        assert out[0].shape == (2, 2, tokens, 8) and all(g.isfinite().all() for g in grads)


def test_bad_input_is_named(backend: Backend) -> None:
    q, k = (torch.randn(1, n, 3, 8, device=backend.device) for n in (4, 2))
    cos = torch.randn(1, 1, 3, 8, device=backend.device)

    def run(k: Any = k, w: Any = None, cast: str = "input", norm: Any = torch.float32,
            layout: str = "half") -> None:  # fmt: skip
        args = (EPS, 0.0, cast, norm, cos, cos, layout, 8, torch.float32)
        backend.ops.qk_norm_rope(q, k, w, None, *args)

    with pytest.raises(ValueError, match=r"k: expected shape \(1, heads, 3, 8\)"):
        run(k=k[..., :4])
    with pytest.raises(ValueError, match=r"q_weight: expected shape \(8,\), got \(4,\)"):
        run(w=q[0, 0, 0, :4])
    with pytest.raises(ValueError, match="cast: expected one of"):
        run(cast="between")
    with pytest.raises(TypeError, match="norm_dtype: expected torch.float32"):
        run(norm=torch.float16)
    with pytest.raises(ValueError, match="layout: expected one of"):
        run(layout="spiral")


def test_fake_agrees(backend: Backend) -> None:
    q, k = (on(backend, heads(2, n, 3, 8, torch.float32)) for n in (4, 2))
    w = on(backend, torch.randn(8))
    cos, sin = (t.to(backend.device) for t in tables(1, 3, 8, "half", torch.float32))
    args = (EPS, 0.0, "input", torch.float32, cos, sin, "half", 8, torch.float32)
    torch.library.opcheck(backend.ops.qk_norm_rope.default, (q, k, w, w, *args))


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in (torch.bfloat16, torch.float32):
        for q_heads, k_heads, width, layout, turned in (
            (32, 8, 128, "half", 128), (64, 8, 128, "half", 128), (16, 4, 128, "interleaved", 64),
            (16, 16, 256, "half", 256),
        ):  # fmt: skip
            # tokens enough for programs that walk over them
            q, k = (torch.empty(2, 512, n, width, dtype=dtype).transpose(1, 2)
                    for n in (q_heads, k_heads))  # fmt: skip
            w, cos = torch.empty(width, dtype=dtype), torch.empty(1, 1, 512, turned)
            norm, turn = (0.0, "input", dtype), (cos, cos, layout, turned)
            stats = [torch.empty(2, 512, n) for n in (q_heads, k_heads)]
            yield (
                f"{dtype} {q_heads} {width}",
                lambda a=(q, k, w, w, EPS, *norm, *turn, dtype): family.triton_fwd(*a),
            )
            for need in (False, True):
                yield (
                    f"{dtype} {q_heads} {width} backward {need}",
                    lambda a=(q, k, q, k, w, w, *stats, *norm, *turn), n=need: family.triton_bwd(
                        *a, True, True, n, n
                    ),
                )


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    assert_no_spills(__name__, target)
