"""Gated linear units: derivation, layouts, strides, precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from numerics import assert_not_worse
from symbolic import Symbols

from fusewright.kernels.activations import ACTIVATIONS, swish_slope, swish_value
from fusewright.runtime.op import register_all

register_all()
OPS = torch.ops.fusewright
ALPHA, LIMIT = 1.702, 7.0
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Act = Callable[[torch.Tensor], torch.Tensor]
EAGER: dict[str, Act] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


def eager_clamped(gate: torch.Tensor, up: torch.Tensor, limit: float = LIMIT) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * ALPHA))


def test_clamped_gradients_are_sympys() -> None:
    g, u, alpha, limit = sp.symbols("g u alpha L", real=True)
    inside = swish_value(Symbols, g, alpha) * (u + 1)
    dgate = (u + 1) * swish_slope(Symbols, g, alpha)
    assert sp.simplify(sp.nsimplify(sp.diff(inside, g) - dgate)) == 0
    assert sp.simplify(sp.nsimplify(sp.diff(inside, u) - swish_value(Symbols, g, alpha))) == 0
    assert sp.simplify(sp.nsimplify(sp.diff(inside, g) + dgate)) != 0
    outside = inside.subs(g, limit)  # above the limit the gate is a constant
    assert sp.diff(outside, g) == 0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradcheck(name: str) -> None:
    gate = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g, u: OPS.glu(g, u, name, torch.float64), (gate, up))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gate_first", [False, True])
def test_gradcheck_packed(gate_first: bool, interleaved: bool) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    layout = (gate_first, interleaved, torch.float64)
    assert torch.autograd.gradcheck(lambda t: OPS.glu_packed(t, "silu", *layout), (x,))
    assert torch.autograd.gradcheck(lambda t: OPS.glu_clamped_packed(t, ALPHA, 0.7, *layout), (x,))


def test_a_wrong_sign_fails_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    silu = ACTIVATIONS["silu"]
    wrong = type(silu)(silu.formula, silu.value, lambda m, x: -silu.slope(m, x))
    monkeypatch.setitem(ACTIVATIONS, "silu", wrong)
    gate = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    up = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda g: OPS.glu(g, up, "silu", torch.float64), (gate,))


def compare(
    ours: Callable, eager: Callable, inputs: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """Value and every gradient of ``ours`` are not worse than those of ``eager``."""
    results = []
    dy = torch.randn(eager(*inputs).shape).to(dtype)
    for f, cast in ((ours, dtype), (eager, dtype), (eager, torch.float64)):
        leaves = [t.to(cast).requires_grad_() for t in inputs]
        y = f(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(cast))))
    factor = 1.6 if dtype is torch.float32 else 1.0
    for at, row in enumerate(zip(*results, strict=True)):
        assert_not_worse(*row, factor, f"result {at}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EAGER)
def test_error_is_not_above_eagers(name: str, dtype: torch.dtype) -> None:
    inputs = [(torch.randn(33, 129) * 3).to(dtype), torch.randn(33, 129).to(dtype)]
    compare(
        lambda g, u: OPS.glu(g, u, name, dtype),
        lambda g, u: EAGER[name](g) * u,
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped_error_is_not_above_eagers(dtype: torch.dtype) -> None:
    inputs = [(torch.randn(33, 129) * 6).to(dtype), (torch.randn(33, 129) * 6).to(dtype)]
    compare(lambda g, u: OPS.glu_clamped(g, u, ALPHA, LIMIT, dtype), eager_clamped, inputs, dtype)


def test_a_value_at_the_limit_keeps_its_gradient() -> None:
    gate = torch.tensor([7.0, -7.0, 7.5, -7.5], dtype=torch.float64)
    for leaf_is_gate in (True, False):
        grads = []
        for f in (lambda g, u: OPS.glu_clamped(g, u, ALPHA, LIMIT, torch.float64), eager_clamped):
            leaf = gate.clone().requires_grad_()
            other = torch.ones_like(gate)
            y = f(leaf, other) if leaf_is_gate else f(other, leaf)
            grads.append(torch.autograd.grad(y.sum(), leaf)[0])
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gate_first", [False, True])
def test_packed_equals_separate(gate_first: bool, interleaved: bool) -> None:
    x = torch.randn(4, 2, 10, requires_grad=True)
    y = OPS.glu_packed(x, "silu", gate_first, interleaved, torch.float32)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    gate, up = (first, second) if gate_first else (second, first)
    expected = OPS.glu(gate, up, "silu", torch.float32)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, torch.autograd.grad(expected, x, dy)[0])
    assert dx.is_contiguous()


def test_strided_views_and_expanded_gradients() -> None:
    wide = torch.randn(6, 40)
    gate, up = wide[:, :16].requires_grad_(), wide[:, 20:36].requires_grad_()
    y = OPS.glu(gate, up, "gelu", torch.float32)
    torch.testing.assert_close(y, F.gelu(gate) * up)
    (ours,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(ours, torch.autograd.grad((F.gelu(gate) * up).sum(), gate)[0])


def test_second_backward_and_frozen_side() -> None:
    gate, up = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    y = OPS.glu(gate, up, "silu", torch.float32)
    (first,) = torch.autograd.grad(y.sum(), gate, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), gate)
    assert torch.equal(first, second)


def test_bad_input_is_named() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"up: expected the shape of gate \(2, 4\), got \(2, 3\)"):
        OPS.glu(x, torch.randn(2, 3), "silu", torch.float32)
    with pytest.raises(TypeError, match="up: expected the dtype of gate torch.float32"):
        OPS.glu(x, x.half(), "silu", torch.float32)
    with pytest.raises(ValueError, match="gate_up: expected an even last dimension"):
        OPS.glu_packed(torch.randn(2, 5), "silu", True, False, torch.float32)


def test_zero_rows() -> None:
    x = torch.randn(0, 8, requires_grad=True)
    y = OPS.glu_packed(x, "silu", True, False, torch.float32)
    assert y.shape == (0, 4)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 8)
