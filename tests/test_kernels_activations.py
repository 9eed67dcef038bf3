"""Activations: the code is the formula, the slope its derivative, the error not above eager's."""

from __future__ import annotations

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from numerics import assert_not_worse
from symbolic import Symbols

from fusewright.kernels.activations import ACTIVATIONS, swish_slope, swish_value
from fusewright.runtime.op import register_all

register_all()
OP = torch.ops.fusewright.activation
EAGER = {
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x.clone(),
}
POINTS = [sp.Rational(k, 7) + sp.Rational(1, 1000) for k in range(-42, 43, 3)]
X = sp.Symbol("x", real=True)


def identical(left: sp.Expr, right: sp.Expr) -> bool:
    """Equal to 25 digits at 29 points: what two different analytic expressions cannot be.

    Floats in the code are binary64 images of sqrt(2/pi) and the like, so 14 digits are asked.
    """
    f = sp.lambdify(X, left - right, "mpmath")
    return all(abs(f(sp.N(p, 30))) < 1e-14 for p in POINTS)


def proves(formula: sp.Expr, value: sp.Expr, slope: sp.Expr) -> bool:
    return identical(formula, value) and identical(sp.diff(formula, X), slope)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slope_is_sympys_derivative_of_the_formula(name: str) -> None:
    act = ACTIVATIONS[name]
    formula = act.formula(sp, X)
    assert proves(formula, act.value(Symbols, X), act.slope(Symbols, X))
    assert not proves(formula, act.value(Symbols, X), -act.slope(Symbols, X))


def test_swish_slope_holds_for_every_beta() -> None:
    beta = sp.Symbol("beta", positive=True)
    value, slope = swish_value(Symbols, X, beta), swish_slope(Symbols, X, beta)
    assert sp.simplify(sp.nsimplify(sp.diff(value, X) - slope)) == 0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradcheck(name: str) -> None:
    x = torch.linspace(-4.0, 4.1, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: OP(t, name, torch.float64), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_error_is_not_above_eagers(name: str, dtype: torch.dtype) -> None:
    x = (torch.randn(64, 129) * 3).to(dtype)
    dy = torch.randn(64, 129).to(dtype)
    results = []
    for t, f in (
        (x, lambda t: OP(t, name, dtype)),
        (x, EAGER[name]),
        (x.double(), EAGER[name]),
    ):
        leaf = t.clone().requires_grad_()
        y = f(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, dy.to(t.dtype))))
    # float32 rounds a handful of times in any order; two orders differ by a few percent
    factor = 1.6 if dtype is torch.float32 else 1.001
    for what, ours, eager, oracle in zip(("y", "dx"), *results, strict=True):
        assert_not_worse(ours, eager, oracle, factor, what)


@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_kinks_infinities_and_nan_are_torchs(name: str) -> None:
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")], requires_grad=True)
    y = OP(x, name, torch.float32)
    torch.testing.assert_close(y, EAGER[name](x), equal_nan=True)
    (ours,) = torch.autograd.grad(OP(x[:2], name, torch.float32).sum(), x)
    assert torch.equal(ours, torch.zeros(5))


def test_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="expected one of silu, .*got 'swoosh'"):
        OP(torch.randn(2, 3), "swoosh", torch.float32)
