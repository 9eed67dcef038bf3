"""Activations as a family: one formula each, with its derivative written by hand.

Shapes: x (..., D), y like x. Saved: x. Computed in float32 (float64 for float64 inputs) and rounded
once, at the output.

``value`` and ``slope`` are written over a namespace ``m`` of elementary functions. With ``m = torch``
they are the reference; over a symbolic namespace the same lines become an expression, and so the
tests can prove that ``value`` equals ``formula`` and ``slope`` its derivative. ``formula`` is the
textbook definition over sympy, which is handed in and never imported here.

With s = sigmoid:
    silu       x s(x)                               s (1 + x (1 - s))
    gelu       x Phi(x)                             Phi(x) + x phi(x)
    gelu_tanh  x s(2u), u = k (x + a x^3)           s + 2 x s (1 - s) u',  u' = k (1 + 3 a x^2)
    relu2      max(x, 0)^2                          2 max(x, 0)
gelu_tanh is 0.5 x (1 + tanh u): as a sigmoid it keeps its relative precision where 1 + tanh cancels,
and 1 - s(z) is computed as s(-z) for the same reason.
At their kinks relu and relu2 have slope 0, as in torch.

An activation may also be given as text, value and derivative: see ``expressions``.

Sources: D. Hendrycks and K. Gimpel, "Gaussian Error Linear Units", 2016; P. Ramachandran et al.,
"Searching for Activation Functions", 2017; D. So et al., "Primer", 2021 (relu2).
Traffic: forward reads and writes one element; backward reads two and writes one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusewright.kernels import expressions
from fusewright.kernels.elementary import GELU_A, GELU_K, INV_SQRT_2PI, QUICK, SQRT_HALF
from fusewright.kernels.glu_kernels import launch_activation_backward, launch_activation_forward
from fusewright.kernels.launch import launchable
from fusewright.kernels.reduce import absent, compute_dtype
from fusewright.kernels.spec import OpSpec

Elementary = Any  # torch, or a namespace with the same function names over symbols


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        formula: (sympy, x) to the defining expression; tests only.
        value: (m, x) to the activation.
        slope: (m, x) to its derivative.
        up: what a gated unit applies to its other operand; None for nothing.
    """

    formula: Callable[[Any, Any], Any]
    value: Callable[[Elementary, Any], Any]
    slope: Callable[[Elementary, Any], Any]
    up: Activation | None = None


def swish_value(m: Elementary, x: Any, beta: float) -> Any:
    """x sigmoid(beta x)."""
    return x * m.sigmoid(beta * x)


def swish_slope(m: Elementary, x: Any, beta: float) -> Any:
    """d/dx of x sigmoid(beta x) = s (1 + beta x (1 - s)), with 1 - s(z) as s(-z)."""
    return m.sigmoid(beta * x) * (1.0 + beta * x * m.sigmoid(-beta * x))


def _gelu_value(m: Elementary, x: Any) -> Any:
    return 0.5 * x * (1.0 + m.erf(x * SQRT_HALF))


def _gelu_slope(m: Elementary, x: Any) -> Any:
    return 0.5 * (1.0 + m.erf(x * SQRT_HALF)) + x * (INV_SQRT_2PI * m.exp(-0.5 * x * x))


def _gelu_tanh_value(m: Elementary, x: Any) -> Any:
    return x * m.sigmoid(2.0 * GELU_K * (x + GELU_A * x * x * x))


def _gelu_tanh_slope(m: Elementary, x: Any) -> Any:
    w = 2.0 * GELU_K * (x + GELU_A * x * x * x)
    return m.sigmoid(w) * (1.0 + x * m.sigmoid(-w) * (2.0 * GELU_K + 6.0 * GELU_K * GELU_A * x * x))


def _sigmoid_slope(m: Elementary, x: Any) -> Any:
    return m.sigmoid(x) * m.sigmoid(-x)


def _tanh_slope(m: Elementary, x: Any) -> Any:
    t = m.tanh(x)
    return 1.0 - t * t


def _relu(m: Elementary, x: Any) -> Any:
    return m.where(x <= 0, 0.0, x)  # written so that NaN stays NaN


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(
        lambda sp, x: x / (1 + sp.exp(-x)),
        lambda m, x: swish_value(m, x, 1.0),
        lambda m, x: swish_slope(m, x, 1.0),
    ),
    "quick_gelu": Activation(
        lambda sp, x: x / (1 + sp.exp(-QUICK * x)),
        lambda m, x: swish_value(m, x, QUICK),
        lambda m, x: swish_slope(m, x, QUICK),
    ),
    "gelu": Activation(
        lambda sp, x: x * (1 + sp.erf(x / sp.sqrt(2))) / 2, _gelu_value, _gelu_slope
    ),
    "gelu_tanh": Activation(
        lambda sp, x: x * (1 + sp.tanh(sp.sqrt(2 / sp.pi) * (x + GELU_A * x**3))) / 2,
        _gelu_tanh_value,
        _gelu_tanh_slope,
    ),
    "relu": Activation(lambda sp, x: sp.Max(x, 0), _relu, lambda m, x: m.where(x > 0, 1.0, 0.0)),
    "relu2": Activation(
        lambda sp, x: sp.Max(x, 0) ** 2,
        lambda m, x: _relu(m, x) * _relu(m, x),
        lambda m, x: 2.0 * _relu(m, x),
    ),
    "sigmoid": Activation(
        lambda sp, x: 1 / (1 + sp.exp(-x)), lambda m, x: m.sigmoid(x), _sigmoid_slope
    ),
    "tanh": Activation(lambda sp, x: sp.tanh(x), lambda m, x: m.tanh(x), _tanh_slope),
    "identity": Activation(lambda sp, x: x, lambda m, x: x, lambda m, x: 0.0 * x + 1.0),
}


def lookup(name: str) -> Activation:
    """The activation called ``name``, or given as text; a ValueError names the ones there are."""
    found = ACTIVATIONS.get(name)
    if found is None and expressions.is_expression(name):
        return _written(name)
    if found is None:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return found


@functools.lru_cache(maxsize=1024)
def _written(text: str) -> Activation:
    """The activation that a text describes, over torch alone."""

    def part(number: int, up: Activation | None) -> Activation:
        expressions.program(text, number)  # refuse it now

        def value(m: Elementary, x: Any) -> Any:
            return expressions.evaluate(text, x, number)[0]

        def slope(m: Elementary, x: Any) -> Any:
            return expressions.evaluate(text, x, number)[1]

        return Activation(lambda sp, x: sp.sympify(text.split(";")[2 * number]), value, slope, up)

    return part(0, part(1, None) if expressions.has_up(text) else None)


def _plain(name: str) -> Activation:
    """An activation of one tensor; a ValueError where it is a gated unit's."""
    act = lookup(name)
    if act.up is not None:
        raise ValueError(f"activation: expected a function of one tensor, got {name!r}")
    return act


def reference_fwd(x: torch.Tensor, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    """act(x) in plain PyTorch."""
    act = _plain(activation)
    y: torch.Tensor = act.value(torch, x.to(compute_dtype(x)))
    return torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format).copy_(y)


def reference_bwd(dy: torch.Tensor, x: torch.Tensor, activation: str, need_x: bool) -> torch.Tensor:
    """dx = dy act'(x) in plain PyTorch."""
    if not need_x:
        return absent(x)
    dtype = compute_dtype(x)
    dx: torch.Tensor = dy.to(dtype) * _plain(activation).slope(torch, x.to(dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(dx)


def triton_fwd(x: torch.Tensor, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    """act(x) by a kernel."""
    _plain(activation)
    if x.dim() == 0 or not launchable(x, out_dtype):
        return reference_fwd(x, activation, out_dtype)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    launch_activation_forward(x, y, activation)
    return y


def triton_bwd(dy: torch.Tensor, x: torch.Tensor, activation: str, need_x: bool) -> torch.Tensor:
    """dx = dy act'(x) by a kernel."""
    if not need_x or x.dim() == 0 or not launchable(x, dy.dtype):
        return reference_bwd(dy, x, activation, need_x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_activation_backward(dy, x, dx, activation)
    return dx


def _fake_fwd(x: torch.Tensor, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)


def _fake_bwd(dy: torch.Tensor, x: torch.Tensor, activation: str, need_x: bool) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else absent(x)


def _save(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
    return inputs["x"], inputs["activation"]


OPS = (
    OpSpec(
        forward="activation(Tensor x, str activation, ScalarType out_dtype) -> Tensor y",
        backward="activation_backward(Tensor dy, Tensor x, str activation, bool need_x) "
        "-> Tensor dx",
        differentiable=("x",),
        outputs=1,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        fake=(_fake_fwd, _fake_bwd),
        triton=(triton_fwd, triton_bwd),
        cheap=True,
    ),
)
