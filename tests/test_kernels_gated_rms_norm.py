"""The gated RMS norm: derivation, orders, groups, casts, precision, strides, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy as sp
import torch
from backends import Backend
from launches import TARGETS, assert_no_spills
from rows import DTYPES, compare, is_gradient, on, symbolic_mean, symbolic_row

from fusewright.kernels import gated_rms_norm as family
from fusewright.kernels import rms_norm
from fusewright.runtime.op import register_all

register_all()
OP = torch.ops.fusewright.gated_rms_norm
EPS = 1e-6
ACT: dict[str, Callable[..., torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


def eager(
    x: torch.Tensor, z: torch.Tensor, w: torch.Tensor | None, offset: float, cast: str,
    order: str, act: str, group: int,
) -> torch.Tensor:  # fmt: skip
    """As models write it: in float32, rounded to the row's dtype before the weight or at the end."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    a, u = ACT[act](z.to(wide)), x.to(wide)
    u = u * a if order == "before" else u
    rows = u.unflatten(-1, (-1, group))
    u = (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + EPS)).flatten(-2)
    u = u.to(x.dtype) if cast == "input" else u
    u = u if w is None else (w + offset) * u
    return (u * a if order == "after" else u).to(x.dtype)


@pytest.mark.parametrize("order", family.ORDERS)
def test_gradients_are_sympys(order: str) -> None:
    x, z, w, dy = (symbolic_row(n, 2) for n in ("x", "z", "w", "dy"))
    r = sp.Symbol("r", positive=True)
    # a = z^2 stands for any activation: its derivative enters as a factor alone
    a, slope = z * z, 2 * z
    u = x if order == "after" else x * a
    root = 1 / sp.sqrt(symbolic_mean(u * u) + sp.Rational(1, 7))
    y = u * root * w * (a if order == "after" else 1)
    if order == "after":
        dx, dz = family.gradients_after(dy, x * r, x * r, r, w, a, slope, symbolic_mean)
    else:
        dx, dz = family.gradients_before(dy, x, r, w, a, slope, symbolic_mean)
    assert is_gradient(dx, y, dy, x, {r: root})
    assert is_gradient(dz, y, dy, z, {r: root})
    assert not is_gradient(-dz, y, dy, z, {r: root})


@pytest.mark.parametrize("order", family.ORDERS)
@pytest.mark.parametrize("act", list(ACT))
@pytest.mark.parametrize("group", [3, 6])
def test_gradcheck(order: str, act: str, group: int) -> None:
    x, z = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def ours(x: torch.Tensor, z: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = OP(x, z, w, EPS, 1.0, "output", order, act, group, torch.float64)[0]
        return y

    assert torch.autograd.gradcheck(ours, (x, z, w))
    assert torch.autograd.gradcheck(lambda x, z: ours(x, z, None), (x, z))


def test_a_wrong_sign_fails_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda g, xhat, r, mean: r * (g + xhat * mean(g * xhat))
    monkeypatch.setattr(rms_norm, "row_gradient", wrong)
    x, z = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tail = (EPS, 0.0, "output", "after", "silu", 4, torch.float64)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x, z: OP(x, z, None, *tail)[0], (x, z))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast", ["input", "output"])
@pytest.mark.parametrize("order", family.ORDERS)
@pytest.mark.parametrize(("width", "group"), [(128, 128), (192, 64), (40, 20)])
def test_error_is_not_above_eagers(
    backend: Backend, dtype: torch.dtype, cast: str, order: str, width: int, group: int
) -> None:
    x, z, w = torch.randn(5, 7, width), torch.randn(5, 7, width), torch.randn(width)
    rest = (cast, order, "silu", group)
    compare(
        backend,
        lambda x, z, w: backend.ops.gated_rms_norm(x, z, w, EPS, 0.0, *rest, dtype)[0],
        lambda x, z, w: eager(x, z, w, 0.0, *rest),
        [t.to(dtype) for t in (x, z, w)],
    )


@pytest.mark.parametrize("order", family.ORDERS)
@pytest.mark.parametrize("act", ["sigmoid", "identity"])
def test_activations_and_offset(kernels: Backend, order: str, act: str) -> None:
    rest = ("output", order, act, 24)
    compare(
        kernels,
        lambda x, z, w: kernels.ops.gated_rms_norm(x, z, w, EPS, 1.0, *rest, torch.float32)[0],
        lambda x, z, w: eager(x, z, w, 1.0, *rest),
        (torch.randn(37, 24), torch.randn(37, 24), torch.randn(24)),
    )


@pytest.mark.parametrize("order", family.ORDERS)
def test_each_gradient_alone_and_strided_rows(backend: Backend, order: str) -> None:
    packed = torch.randn(2, 5, 40)
    w, dy = on(backend, torch.randn(16)), torch.randn(5, 2, 16).transpose(0, 1)
    dy = dy.to(backend.device)
    leaves = [on(backend, packed[..., :16]), on(backend, packed[..., 20:36]), w]
    rest = ("output", order, "silu", 8)
    expected = torch.autograd.grad(eager(*leaves, 0.0, *rest), leaves, dy)
    for at, want in enumerate(expected):
        given = [t if i == at else t.detach() for i, t in enumerate(leaves)]
        y = backend.ops.gated_rms_norm(*given, EPS, 0.0, *rest, torch.float32)[0]
        torch.testing.assert_close(torch.autograd.grad(y, given[at], dy)[0], want)


def test_zero_rows_and_no_rows(backend: Backend) -> None:
    for shape in ((3, 8), (0, 8)):
        x = on(backend, torch.zeros(shape))
        z, w = on(backend, torch.ones(shape)), on(backend, torch.randn(8))
        args = (EPS, 0.0, "input", "after", "silu", 8, torch.float32)
        y = backend.ops.gated_rms_norm(x, z, w, *args)[0]
        grads = torch.autograd.grad(y.sum(), (x, z, w))
        assert y.shape == shape and all(g.isfinite().all() for g in grads)


def test_bad_input_is_named(backend: Backend) -> None:
    op, x = backend.ops.gated_rms_norm, torch.randn(2, 4, device=backend.device)

    def run(gate: Any = x, order: str = "after", act: str = "silu", group: int = 4) -> None:
        op(x, gate, None, EPS, 0.0, "input", order, act, group, torch.float32)

    with pytest.raises(ValueError, match=r"gate: expected the shape of x \(2, 4\), got \(2, 2\)"):
        run(gate=x[:, :2])
    with pytest.raises(TypeError, match=r"gate: expected the dtype of x"):
        run(gate=x.long())
    with pytest.raises(ValueError, match=r"order: expected one of .*, got 'between'"):
        run(order="between")
    with pytest.raises(ValueError, match=r"activation: expected one of"):
        run(act="cube")
    with pytest.raises(ValueError, match=r"group: expected a divisor of 4, got 3"):
        run(group=3)


def test_fake_agrees(backend: Backend) -> None:
    x, z, w = (on(backend, torch.randn(*s)) for s in ((2, 3, 8), (2, 3, 8), (8,)))
    for order in family.ORDERS:
        args = (x, z, w, EPS, 0.0, "input", order, "silu", 4, torch.float32)
        torch.library.opcheck(backend.ops.gated_rms_norm.default, args)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    bf16, f32 = torch.bfloat16, torch.float32
    shapes = [
        (d, f32, w, g) for d in (bf16, f32) for w, g in ((128, 128), (4096, 512), (4096, 4096))
    ]
    shapes += [(bf16, bf16, w, w) for w in (4096, 5120, 8192)]
    for dtype, of_weight, width, group in shapes:
        # rows enough for programs that walk over them
        x, w = torch.empty(1024, width, dtype=dtype), torch.empty(width, dtype=of_weight)
        r = torch.empty(1024, width // group)
        for order in family.ORDERS:
            a = ("input", order, "silu", group)
            yield (
                f"{dtype} {of_weight} {width} {order}",
                lambda x=x, w=w, a=a: family.triton_fwd(x, x, w, EPS, 0.0, *a, x.dtype),
            )
            for need in (False, True) if dtype is of_weight else (True,):
                yield (
                    f"{dtype} {of_weight} {width} {order} backward {need}",
                    lambda x=x, w=w, r=r, a=a, n=need: family.triton_bwd(
                        x, x, x, w, r, 0.0, *a, True, True, n
                    ),
                )


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    assert_no_spills(__name__, target)
