"""An expression read off the graph as the activation of an op: a known name, or text.

Before text is used it is held against the code that it was read from, value and slope, at several
scales, at every constant of the expression (where pieces meet) and far out:
    in float64 they must agree;
    in float32, as the kernels compute, its error must not be above that of the code itself.
A derivative that cancels or overflows where the code's own does not is refused there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.kernels import expressions
from fusewright.kernels.activations import ACTIVATIONS, lookup
from fusewright.patterns.pointwise import Reading
from fusewright.patterns.symbolic import Unreadable, X, with_slope

_SCALES = (1e-4, 1e-2, 1.0, 30.0)
_FAR = (-1e4, -300.0, -88.0, 88.0, 300.0, 1e4)
_ALIKE = 1e-11
_AGREE = 1e-10
_NOTHING = 1e-25  # autograd's 1 - s is 0 where the slope of a sigmoid is 1e-39
_FACTOR = 1.5  # two orders of the same float32 roundings


class _Slope(torch.autograd.Function):
    """An activation whose backward is its own slope, so that the proof sees the slope too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, act: Any) -> Any:
        ctx.save_for_backward(x)
        ctx.act = act
        return act.value(torch, x).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * ctx.act.slope(torch, x), None


def applied(activation: str, x: torch.Tensor) -> torch.Tensor:
    """f(x) with the gradient that the op will give."""
    y: torch.Tensor = _Slope.apply(x, lookup(activation))  # type: ignore[no-untyped-call]
    return y


def applied_to_up(activation: str, x: torch.Tensor) -> torch.Tensor:
    """h(x) likewise; x where the activation has no h."""
    up = lookup(activation).up if expressions.is_expression(activation) else None
    return x if up is None else _Slope.apply(x, up)  # type: ignore[no-untyped-call]


def activation_of(reading: Reading) -> str:
    """The activation that a reading is, as an op takes it.

    Raises:
        Refused: there is no text for it, or the text is not as exact as the code.
    """
    text = text_of(reading)
    name = named(text)
    if name is None:
        _sound(reading, text)
    return name or text


def pair_of(gate: Reading, up: Reading) -> str:
    """The activation of a gated unit; four expressions where up is changed before the product."""
    coefficient, rest = up.expression.as_coeff_Mul()
    if rest == X:
        return activation_of(gate.scaled(float(coefficient)))
    text, of_up = text_of(gate), text_of(up)
    _sound(gate, text)
    _sound(up, of_up)
    return f"{text}; {of_up}"


def text_of(reading: Reading) -> str:
    """Value and slope of a reading as text; Refused where there is none."""
    try:
        text = "; ".join(with_slope(reading.expression))
        expressions.program(text)
    except (Unreadable, ValueError) as error:
        raise Refused(f"the activation has no kernel: {error}") from error
    return text


@functools.lru_cache(maxsize=512)
def named(text: str) -> str | None:
    """The known activation that the text is, value and slope and its kinks; None if it is new."""
    x = torch.cat([torch.linspace(-6.03, 6.11, 61, dtype=torch.float64), _kinks(text)])
    value, slope = expressions.evaluate(text, x)
    for name, act in ACTIVATIONS.items():
        if _close(value, act.value(torch, x)) and _close(slope, act.slope(torch, x)):
            return name
    return None


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a - b).abs() <= _ALIKE * b.abs().clamp(min=1e-3)).all())


def _kinks(text: str) -> torch.Tensor:
    """Zero and every constant of the text, of both signs: where pieces may meet."""
    steps = expressions.program(text).steps
    found = sorted({s.constant for s in steps if s.operation == "const" and abs(s.constant) < 1e4})
    values = [v for c in (0.0, *found) for v in (c, -c)]
    return torch.tensor(values, dtype=torch.float32).double()


def _sound(reading: Reading, text: str) -> None:
    """Refuse a text whose value or slope is not that of the code, or not as exact."""
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randn(257, generator=generator) * s for s in _SCALES]
    # Far out the code's own slope is nothing but cancellation: 1 - tanh(u)^2 is 0 where 4 e^(-2u) is meant.
    unit = float(_of_code(reading, draws[2].double())[1].square().mean().sqrt())
    floors = {"value": _NOTHING, "slope": max(_NOTHING, unit * torch.finfo(torch.float64).eps)}
    for x in (*draws, _kinks(text).float(), torch.tensor(_FAR)):
        runs = (
            _of_code(reading, x.double()),
            expressions.evaluate(text, x.double()),
            _of_code(reading, x),
            expressions.evaluate(text, x),
        )
        for what, *results in zip(("value", "slope"), *runs, strict=True):
            _as_exact(f"the {what} of {reading.expression}", floors[what], *results)


def _as_exact(
    what: str,
    nothing: float,
    exact: torch.Tensor,
    wide: torch.Tensor,
    code: torch.Tensor,
    ours: torch.Tensor,
) -> None:
    """``wide`` must be ``exact``, both in float64, and ``ours`` as near to it as ``code``.

    What is below ``nothing`` counts as nothing.
    """
    sane = exact.isfinite() & code.isfinite()
    if not bool((ours.isfinite() | ~sane).all()):
        raise Refused(f"{what} overflows where the code's does not")
    exact, wide = exact[sane], wide[sane]
    code, ours = code[sane].double(), ours[sane].double()
    size = float(exact.norm())
    if not float((wide - exact).norm()) <= max(_AGREE * size, nothing):
        raise Refused(f"{what} as derived is not that of the code")
    error, theirs = float((ours - exact).norm()), float((code - exact).norm())
    if not error <= max(_FACTOR * theirs, 2.0**-23 * size, nothing):
        raise Refused(
            f"{what} is ill-conditioned: its error in float32 {error:.1e}, the code's {theirs:.1e}"
        )


def _of_code(reading: Reading, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and slope of the graph's own calls at ``x``, in its dtype, by autograd."""
    leaf = x.clone().requires_grad_()
    env: dict[fx.Node, Any] = {reading.root: leaf}
    with torch.enable_grad():
        value = leaf.new_tensor(reading.factor)
        for top in reading.tops:
            value = value * _run(top, env)
        (slope,) = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)
    return value.detach(), slope


def _run(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    if node not in env:
        args = fx.map_arg(node.args, lambda n: _run(n, env))
        if ir.is_cast(node):
            env[node] = args[0]
        else:
            env[node] = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return env[node]
