"""Activations given as text: grammar, derivative, kernels against the reference and against eager."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from backends import Backend
from targets import Case, assert_compiles
from test_kernels_glu import compare

from fusewright.kernels import expressions
from fusewright.patterns import symbolic as f
from fusewright.patterns.symbolic import X, number, with_slope

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# expression in X, and what eager runs
WRITTEN = {
    "mish": (X * f.tanh(f.softplus(X)), lambda x: x * torch.tanh(F.softplus(x))),
    "silu": (X / (1 + sp.exp(-X)), lambda x: x * torch.sigmoid(x)),
    "elu": (f.where(X, X, number(0.7) * f.expm1(X)), lambda x: F.elu(x, 0.7)),
    "gelu": (X * (1 + f.erf(X * number(0.5**0.5))) / 2,
             lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5))),
    "softsign": (X / (1 + f.magnitude(X)), lambda x: x / (1 + x.abs())),
    "clamped": (f.most(f.least(X, number(-1.5)), number(0.5)) ** 3,
                lambda x: x.clamp(-1.5, 0.5) ** 3),
    "root": (sp.sqrt(f.softplus(X)), lambda x: F.softplus(x, threshold=100.0).sqrt()),
    "bell": (f.relu(X) * sp.exp(-(X**2)) + sp.log(1 + X**2),
             lambda x: F.relu(x) * torch.exp(-x * x) + torch.log(1 + x * x)),
}  # fmt: skip


def text(name: str) -> str:
    return "; ".join(with_slope(WRITTEN[name][0]))


@pytest.mark.parametrize("name", WRITTEN)
def test_value_and_slope_are_autograds(name: str) -> None:
    x = torch.linspace(-9.0, 9.07, 301, dtype=torch.float64, requires_grad=True)
    y = WRITTEN[name][1](x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    ours = expressions.evaluate(text(name), x.detach())
    torch.testing.assert_close(ours[0], y.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours[1], slope, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRITTEN)
def test_error_is_not_above_eagers(backend: Backend, name: str, dtype: torch.dtype) -> None:
    compare(
        backend,
        lambda x: backend.ops.activation(x, text(name), dtype),
        WRITTEN[name][1],
        ((33, 129),),
        2.0,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_unit_with_a_function_of_up(backend: Backend, dtype: torch.dtype) -> None:
    both = f"{text('mish')}; {text('clamped')}"
    slack = 1.5  # tanh' as a product of sigmoids rounds twice more than 1 - t^2, and never cancels
    eager = lambda g, u: g * torch.tanh(F.softplus(g)) * u.clamp(-1.5, 0.5) ** 3
    compare(
        backend,
        lambda g, u: backend.ops.glu(g, u, both, dtype),
        eager,
        ((9, 65),) * 2,
        1.0,
        dtype,
        slack,
    )
    packed = lambda x: backend.ops.glu_packed(x, both, True, True, dtype)
    compare(
        backend, packed, lambda x: eager(x[..., ::2], x[..., 1::2]), ((9, 66),), 1.0, dtype, slack
    )


def test_a_wrong_slope_is_seen() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    wrong = text("mish").replace("; ", "; -")
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(
            lambda t: torch.ops.fusewright.activation(t, wrong, torch.float64), (x,)
        )


def test_far_out_nothing_overflows(backend: Backend) -> None:
    for name in ("mish", "silu", "elu", "softsign"):
        x = torch.tensor([[-1e4, -100.0, 100.0, 1e4]], device=backend.device).requires_grad_()
        y = backend.ops.activation(x, text(name), torch.float32)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert bool(y.isfinite().all() and slope.isfinite().all()), name


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("x; y", "'y' is not of the grammar"),
        ("x; x; x", "two or four expressions, got 3"),
        ("x +; 1", "is no expression"),
        ("x**0.5; 1", "no integer power"),
        ("exit(x); 1", "is not of the grammar"),
        ("x.real; 1", "is not of the grammar"),
    ],
)
def test_text_that_is_none_is_refused(bad: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        torch.ops.fusewright.activation(torch.randn(2, 3), bad, torch.float32)


def test_a_plain_activation_takes_no_up() -> None:
    with pytest.raises(ValueError, match="a function of one tensor"):
        torch.ops.fusewright.activation(torch.randn(2, 3), "x; 1; x; 1", torch.float32)


def test_equal_parts_are_computed_once() -> None:
    steps = expressions.program("x*sigmoid(2*x); sigmoid(2*x)").steps
    assert [s.operation for s in steps] == ["const", "mul", "sigmoid", "mul"]


def test_kernels_compile_without_spills() -> None:
    types = {"x_ptr": "*bf16:16", "y_ptr": "*bf16:16", "x_row": "i32:16", "y_row": "i32:16"}
    types |= {"width": "i32:16", "column_blocks": "i32"}
    back = {("dx" if n == "y_ptr" else n).replace("y_row", "dx_row"): t for n, t in types.items()}
    back = {("dx_ptr" if n == "dx" else n): t for n, t in back.items()}
    back |= {"dy_ptr": "*bf16:16", "dy_row": "i32:16"}
    cases = []
    for name in ("mish", "bell"):
        for precise in (False, True):
            constants = {"ACTIVATION": text(name), "PRECISE": precise, "BLOCK": 1024}
            module = "fusewright.kernels.glu_kernels:activation_"
            cases += [Case(module + "forward", types, constants)]
            cases += [Case(module + "backward", back, constants)]
    assert_compiles(cases)
