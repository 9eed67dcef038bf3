"""Gated linear units: derivation, layouts, strides, precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from backends import Backend
from numerics import assert_not_worse_pooled, error
from symbolic import Symbols
from targets import Case, assert_compiles

from fusewright.kernels.activations import ACTIVATIONS, swish_slope, swish_value
from fusewright.runtime.op import register_all

register_all()
OPS = torch.ops.fusewright  # on the CPU: the references
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
    backend: Backend,
    ours: Callable,
    eager: Callable,
    shapes: tuple,
    scale: float,
    dtype: Any,
    slack: float = 1.25,
) -> None:
    """Value and every gradient of ``ours`` are not worse than those of ``eager``, over draws."""
    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        inputs = [(torch.randn(s) * scale).to(backend.device, dtype) for s in shapes]
        dy = torch.randn(eager(*inputs).shape).to(backend.device, dtype)
        results = []
        for f, cast in ((ours, dtype), (eager, dtype), (eager, torch.float64)):
            leaves = [t.to(cast).requires_grad_() for t in inputs]
            y = f(*leaves)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(cast))))
        draws.append(tuple(results))
    names = ("y", *(f"d{at}" for at in range(len(shapes))))
    if dtype is torch.bfloat16 and not backend.rounds_bfloat16:
        for mine, _, oracle in draws:
            for a, o in zip(mine, oracle, strict=True):
                assert error(a, o) <= 2**-7 * error(o, torch.zeros_like(o))
    else:
        # one float32 rounding more or less is the order of the products
        # In 16 bits a float32 value between two neighbours may go either way by its last bit.
        assert_not_worse_pooled(draws, names, slack if dtype is torch.float32 else 1.001)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EAGER)
def test_error_is_not_above_eagers(backend: Backend, name: str, dtype: torch.dtype) -> None:
    compare(
        backend,
        lambda g, u: backend.ops.glu(g, u, name, dtype),
        lambda g, u: EAGER[name](g) * u,
        ((33, 129), (33, 129)),
        3.0,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped_error_is_not_above_eagers(backend: Backend, dtype: torch.dtype) -> None:
    compare(
        backend,
        lambda g, u: backend.ops.glu_clamped(g, u, ALPHA, LIMIT, dtype),
        eager_clamped,
        ((33, 129), (33, 129)),
        6.0,
        dtype,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("clamped", [False, True])
def test_packed_error_is_not_above_eagers(
    backend: Backend,
    clamped: bool,
    gate_first: bool,
    interleaved: bool,
) -> None:
    layout = (gate_first, interleaved, torch.float16)

    def ours(x: torch.Tensor) -> torch.Tensor:
        if clamped:
            return backend.ops.glu_clamped_packed(x, ALPHA, LIMIT, *layout)
        return backend.ops.glu_packed(x, "silu", *layout)

    def eager(x: torch.Tensor) -> torch.Tensor:
        first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        gate, up = (first, second) if gate_first else (second, first)
        return eager_clamped(gate, up) if clamped else F.silu(gate) * up

    compare(backend, ours, eager, ((3, 11, 2 * 65),), 4.0, torch.float16)


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


def test_strided_views_and_expanded_gradients(backend: Backend) -> None:
    wide = torch.randn(6, 5, 40, device=backend.device)
    for gate, up in (
        (wide[..., :16], wide[..., 20:36]),  # rows apart
        (wide[:, 1:3, :16], wide[:, 2:4, 7:23]),  # rows unevenly apart
        (wide.transpose(0, 1), wide.transpose(0, 1)),
        (wide[..., ::2], wide[..., 1::2]),
        (wide[:1], wide[:1]),
    ):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        y = backend.ops.glu(gate, up, "gelu", torch.float32)
        expected = F.gelu(gate) * up
        torch.testing.assert_close(y, expected)
        for loss in (lambda t: t.sum(), lambda t: t[..., 0].sum()):
            grads = torch.autograd.grad(loss(y), (gate, up), retain_graph=True)
            torch.testing.assert_close(
                grads, torch.autograd.grad(loss(expected), (gate, up), retain_graph=True)
            )


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 3e38, -3e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", EAGER)
def test_extreme_values_are_eagers(backend: Backend, name: str, value: float) -> None:
    gate = torch.full((2, 8), value, device=backend.device, requires_grad=True)
    up = torch.ones(2, 8, device=backend.device)
    y = backend.ops.glu(gate, up, name, torch.float32)
    expected = EAGER[name](gate.double())
    torch.testing.assert_close(y, expected.float(), equal_nan=True)
    ours, theirs = (torch.autograd.grad(t.sum(), gate)[0] for t in (y, EAGER[name](gate)))
    sane = ~theirs.isnan()
    torch.testing.assert_close(ours[sane], theirs[sane])


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


def compiled_cases() -> list[Case]:
    """The kernels at their largest block, once per layout and for the activations that differ."""
    module = "fusewright.kernels.glu_kernels:"
    sizes = {n: "i32:16" for n in ("gate_at", "up_at", "gate_row", "up_row", "y_row", "width")}
    sizes |= {"column_blocks": "i32", "alpha": "fp32", "limit": "fp32"}
    cases = []
    for kind, activation, clamped, interleaved in (
        ("bf16", "silu", False, False),
        ("bf16", "gelu", False, True),
        ("fp16", "swish", True, True),
        ("fp32", "gelu_tanh", False, False),
        ("fp32", "tanh", False, False),
    ):
        pointer = f"*{kind}:16"
        constants = {
            "ACTIVATION": activation, "CLAMPED": clamped, "INTERLEAVED": interleaved,
            "GATE_FIRST": True, "PRECISE": kind == "fp32",
        }  # fmt: skip
        types = sizes | {n: pointer for n in ("gate_ptr", "up_ptr", "y_ptr")}
        block = 1024 if kind == "fp32" else 2048
        cases.append(Case(module + "glu_forward", types, constants | {"BLOCK": block}))
        names = ("dy_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr")
        types = sizes | {n: pointer for n in names} | {"dy_row": "i32:16", "out_row": "i32:16"}
        needs = {"NEED_GATE": True, "NEED_UP": True, "BLOCK": 1024}
        for need_y in (False, True):
            y_type = {"y_ptr": pointer} if need_y else {}
            needs |= {"NEED_Y": need_y} | ({} if need_y else {"y_ptr": None})
            cases.append(Case(module + "glu_backward", types | y_type, constants | needs))
            needs.pop("y_ptr", None)
    return cases


def test_kernels_compile_without_spills() -> None:
    assert_compiles(compiled_cases())


@pytest.mark.gpu
@pytest.mark.alone
def test_offsets_beyond_two_to_the_31() -> None:
    rows, width = 75_000, 14_336
    both = torch.empty(rows, 2 * width, dtype=torch.bfloat16, device="cuda").normal_()
    gate, up = both[-4:].float().chunk(2, -1)
    y = OPS.glu_packed(both, "silu", True, False, torch.bfloat16)
    torch.testing.assert_close(y[-4:], (F.silu(gate) * up).bfloat16())
    d = OPS.glu_packed_backward(y, both, "silu", True, False, True)
    expected = OPS.glu_packed_backward(y[-4:], both[-4:], "silu", True, False, True)
    assert torch.equal(d[-4:], expected)
    flat = OPS.activation(both, "relu2", torch.bfloat16)
    torch.testing.assert_close(flat[-4:], F.relu(both[-4:]).square())
