"""Rotary embedding: derivation, layouts, tables, strides, precision, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sympy as sp
import torch
from backends import Backend
from launches import TARGETS, assert_no_spills
from rows import DTYPES, compare, is_gradient, on

from fusewright.kernels import rope
from fusewright.runtime.op import register_all

register_all()
OPS = torch.ops.fusewright
OP = OPS.rope
LAYOUTS = ["half", "interleaved", "interleaved_to_half"]
Pair = tuple[torch.Tensor, torch.Tensor]


def rotated(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "half":
        low, high = x.chunk(2, dim=-1)
        return torch.cat((-high, low), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def eager(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    if x.dtype is torch.float64:
        cos, sin = cos.double(), sin.double()
    width = cos.shape[-1]
    turned = x[..., :width]
    if layout == "interleaved_to_half":
        turned, layout = torch.cat((turned[..., ::2], turned[..., 1::2]), dim=-1), "half"
    y = turned * cos + rotated(turned, layout) * sin
    return torch.cat((y, x[..., width:]), dim=-1).to(x.dtype)


def tables(batch: int, tokens: int, width: int, layout: str, dtype: torch.dtype) -> Pair:
    angles = torch.rand(batch, 1, tokens, width // 2) * 6
    pairs = layout == "interleaved"
    angles = angles.repeat_interleave(2, -1) if pairs else angles.repeat(1, 1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def heads(batch: int, count: int, tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A transposed view of a projection's output."""
    return torch.randn(batch, tokens, count, width).to(dtype).transpose(1, 2)


def test_gradient_is_sympys() -> None:
    x, dy = sp.symbols("x1 x2", real=True), sp.symbols("dy1 dy2", real=True)
    angles = rope.Angles(*sp.symbols("c1 s1 c2 s2", real=True))
    y = rope.rotate(*x, angles)
    assert is_gradient(rope.unrotate(*dy, angles), y, dy, x, {})
    assert not is_gradient(rope.rotate(*dy, angles), y, dy, x, {})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("full", [True, False])
def test_gradcheck(layout: str, width: int, full: bool) -> None:
    q = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 1, 4, 6, dtype=torch.float64, requires_grad=True)
    # Unlike angles for the two features of a pair: the general transpose.
    cos, sin = torch.randn(2, 1, 1, 4, width if full else width // 2, dtype=torch.float64)

    def ours(q: torch.Tensor, k: torch.Tensor | None) -> Pair:
        out: Pair = OP(q, k, cos, sin, layout, width, torch.float64)
        return out

    assert torch.autograd.gradcheck(ours, (q, k))
    assert torch.autograd.gradcheck(lambda q: ours(q, None)[0], (q,))
    assert torch.autograd.gradcheck(lambda k: ours(q.detach(), k)[1], (k,))


def test_a_wrong_sign_fails_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, "unrotate", rope.rotate)
    q = torch.randn(1, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 1, 1, 2, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda q: OP(q, None, cos, sin, "half", 4, torch.float64)[0], (q,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", ["same", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [32, 20])
def test_error_is_not_above_eagers(
    backend: Backend, dtype: torch.dtype, table_dtype: str, layout: str, width: int
) -> None:
    made = tables(2, 9, width, layout, dtype if table_dtype == "same" else torch.float32)
    cos, sin = (t.to(backend.device) for t in made)
    compare(
        backend,
        lambda q, k: backend.ops.rope(q, k, cos, sin, layout, width, dtype),
        lambda q, k: (eager(q, cos, sin, layout), eager(k, cos, sin, layout)),
        (heads(2, 4, 9, 32, dtype), heads(2, 2, 9, 32, dtype)),
    )


HEADS = [(1, 1, 4), (3, 1, 6), (5, 3, 80), (32, 8, 64), (71, 1, 64), (33, 33, 96), (1, 4, 256)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", HEADS)
def test_shapes(kernels: Backend, shape: tuple[int, int, int], layout: str) -> None:
    q_heads, k_heads, width = shape
    cos, sin = (t.to(kernels.device) for t in tables(1, 3, width, layout, torch.float32))
    compare(
        kernels,
        lambda q, k: kernels.ops.rope(q, k, cos, sin, layout, width, torch.float16),
        lambda q, k: (eager(q, cos, sin, layout), eager(k, cos, sin, layout)),
        (heads(2, q_heads, 3, width, torch.float16), heads(2, k_heads, 3, width, torch.float16)),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 8, 128, 128), (16, 16, 256, 64), (128, 1, 64, 64)])
def test_real_shapes(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    q_heads, k_heads, width, turned = shape
    cos, sin = (t.cuda() for t in tables(2, 700, turned, layout, torch.float32))
    compare(
        Backend("cuda", OPS, "cuda"),
        lambda q, k: OP(q, k, cos, sin, layout, turned, dtype),
        lambda q, k: (eager(q, cos, sin, layout), eager(k, cos, sin, layout)),
        (heads(2, q_heads, 700, width, dtype), heads(2, k_heads, 700, width, dtype)),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_width_tables_equal_full_ones(backend: Backend, layout: str) -> None:
    q = heads(2, 3, 5, 8, torch.float32).to(backend.device)
    cos, sin = (t.to(backend.device) for t in tables(1, 5, 8, layout, torch.float32))
    short = [rope.split(t, rope.ends(layout)[1])[0] for t in (cos, sin)]
    full = backend.ops.rope(q, None, cos, sin, layout, 8, torch.float32)[0]
    for pair in (short, (cos[0, 0], sin[0, 0]), (cos.expand(2, 1, 5, 8), sin)):
        other = backend.ops.rope(q, None, *pair, layout, 8, torch.float32)[0]
        assert torch.equal(full, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pair_with_unlike_angles(backend: Backend, layout: str) -> None:
    cos, sin = torch.randn(2, 2, 1, 5, 8, device=backend.device)
    q = on(backend, heads(2, 3, 5, 12, torch.float32))
    y = backend.ops.rope(q, None, cos, sin, layout, 8, torch.float32)[0]
    expected = eager(q, cos, sin, layout)
    torch.testing.assert_close(y, expected)
    dy = torch.randn(y.shape).to(y.device)
    torch.testing.assert_close(torch.autograd.grad(y, q, dy), torch.autograd.grad(expected, q, dy))


def test_outputs_and_gradients_keep_the_order_in_memory(backend: Backend) -> None:
    cos, sin = (t.to(backend.device) for t in tables(2, 5, 8, "half", torch.float32))
    packed = torch.randn(2, 5, 3 * 8 + 9)[..., :24].unflatten(-1, (3, 8)).transpose(1, 2)
    q, k = on(backend, packed), on(backend, torch.randn(2, 2, 5, 8))
    q_out, k_out = backend.ops.rope(q, k, cos, sin, "half", 8, torch.float32)
    assert q_out.transpose(1, 2).is_contiguous() and k_out.is_contiguous()
    upstream = [
        torch.randn(2, 3, 5, 8).to(q.device),
        torch.randn(8, 5, 2, 2).permute(3, 2, 1, 0).to(q.device),
    ]
    dq, dk = torch.autograd.grad((q_out, k_out), (q, k), upstream)
    assert dq.transpose(1, 2).is_contiguous() and dk.is_contiguous()
    expected = torch.autograd.grad(
        (eager(q, cos, sin, "half"), eager(k, cos, sin, "half")), (q, k), upstream
    )
    torch.testing.assert_close((dq, dk), expected)


def test_one_side_alone_expanded_gradient_second_backward(backend: Backend) -> None:
    cos, sin = (t.to(backend.device) for t in tables(1, 5, 8, "half", torch.float32))
    q = heads(2, 3, 5, 8, torch.float32).to(backend.device)
    k = on(backend, heads(2, 2, 5, 8, torch.float32))
    out = backend.ops.rope(q, k, cos, sin, "half", 8, torch.float32)
    (first,) = torch.autograd.grad(out[1].sum(), k, retain_graph=True)
    (second,) = torch.autograd.grad(out[1].sum(), k)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.autograd.grad(eager(k, cos, sin, "half").sum(), k)[0])
    assert backend.ops.rope(q, None, cos, sin, "half", 8, torch.float32)[1].shape == (0,)


def test_no_tokens(backend: Backend) -> None:
    q = on(backend, torch.randn(2, 3, 0, 8))
    table = torch.randn(1, 1, 0, 8, device=backend.device)
    out = backend.ops.rope(q, None, table, table, "half", 8, torch.float32)[0]
    assert out.shape == torch.autograd.grad(out.sum(), q)[0].shape == (2, 3, 0, 8)


def test_bad_input_is_named(backend: Backend) -> None:
    op, device = backend.ops.rope, backend.device
    q, table = torch.randn(2, 3, 5, 8, device=device), torch.randn(1, 1, 5, 8, device=device)
    tail = ("half", 8, torch.float32)
    with pytest.raises(ValueError, match=r"q: expected \(batch, heads, tokens, features\)"):
        op(q[0], None, table, table, *tail)
    with pytest.raises(
        ValueError, match=r"k: expected shape \(2, heads, 5, 8\), got \(2, 3, 4, 8\)"
    ):
        op(q, q[:, :, :4], table, table, *tail)
    with pytest.raises(TypeError, match=r"k: expected torch.float32 on .* like q"):
        op(q, q.half(), table, table, *tail)
    with pytest.raises(ValueError, match=r"cos: expected a shape broadcastable .* \(1, 3, 5, 8\)"):
        op(q, None, table.expand(1, 3, 5, 8), table, *tail)
    with pytest.raises(ValueError, match=r"sin: expected width 8 like cos, got 4"):
        op(q, None, table, table[..., :4], *tail)
    with pytest.raises(ValueError, match=r"rotary_dim: expected an even number up to 8, got 7"):
        op(q, None, table, table, "half", 7, torch.float32)
    with pytest.raises(ValueError, match=r"layout: expected one of"):
        op(q, None, table, table, "halves", 8, torch.float32)


def test_fake_agrees(backend: Backend) -> None:
    cos, sin = (t.to(backend.device) for t in tables(1, 5, 8, "half", torch.float32))
    q, k = heads(2, 3, 5, 8, torch.float32), torch.randn(2, 2, 5, 8)
    for second in (on(backend, k), None):
        args = (on(backend, q), second, cos, sin, "half", 8, torch.float32)
        torch.library.opcheck(backend.ops.rope.default, args)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for layout in LAYOUTS:
        for q_heads, k_heads, width, turned in ((32, 8, 128, 128), (71, 1, 80, 40)):
            q, k = (torch.empty(2, h, 4, width).bfloat16() for h in (q_heads, k_heads))
            table = torch.empty(1, 1, 4, turned)
            args = (table, table, layout, turned, torch.bfloat16)
            order = ([0, 1, 2], [0, 1, 2], True, True)
            yield f"{layout} {width}", lambda q=q, k=k, a=args: rope.triton_fwd(q, k, *a)
            yield (
                f"{layout} {width} backward",
                lambda q=q, k=k, a=args, o=order: rope.triton_bwd(q, k, *a, *o),
            )


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    assert_no_spills(__name__, target)
