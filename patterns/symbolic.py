"""Scalar expressions of one tensor over sympy: their forms, their derivative, and their text.

Only what a float needs is simplified: sums that cancel and exponentials that overflow become the
functions that have no such trouble, each an identity of real numbers:

    1 / (1 + e^w) = sigmoid(-w)           e^w sigmoid(-w) = sigmoid(w)
    c + c tanh(u) = 2 c sigmoid(2 u)      c - c sigmoid(u) = c sigmoid(-u)
    log(1 + e^w) = softplus(w)            e^w - 1 = expm1(w)

The functions know their own derivatives, in forms of the same kind: sigmoid' = sigmoid(u) sigmoid(-u),
tanh' = 4 sigmoid(2u) sigmoid(-2u), and steps for the pieces, with torch's value at the kinks.
"""

from __future__ import annotations

import functools
from typing import Any

import sympy as sp

X = sp.Symbol("x", real=True)
exp = sp.exp


class Unreadable(Exception):
    """An expression that has no text, or whose derivative has none."""


class _Elementary(sp.Function):  # type: ignore[misc]
    """A function that sympy leaves as it is."""

    nargs = 1
    is_real = True


class sigmoid(_Elementary):
    def fdiff(self, argindex: int = 1) -> Any:
        return sigmoid(self.args[0]) * sigmoid(-self.args[0])


class tanh(_Elementary):
    def fdiff(self, argindex: int = 1) -> Any:
        u = self.args[0]
        return 4 * sigmoid(2 * u) * sigmoid(-2 * u)


class erf(_Elementary):
    def fdiff(self, argindex: int = 1) -> Any:
        return 2 / sp.sqrt(sp.pi).evalf(17) * sp.exp(-(self.args[0] ** 2))


class softplus(_Elementary):
    def fdiff(self, argindex: int = 1) -> Any:
        return sigmoid(self.args[0])


class expm1(_Elementary):
    def fdiff(self, argindex: int = 1) -> Any:
        return sp.exp(self.args[0])


class relu(_Elementary):
    def fdiff(self, argindex: int = 1) -> Any:
        return where(self.args[0], sp.Integer(1), sp.Integer(0))


class magnitude(_Elementary):
    """|x|, whose slope at zero is zero."""

    def fdiff(self, argindex: int = 1) -> Any:
        u = self.args[0]
        return where(u, sp.Integer(1), where(-u, sp.Integer(-1), sp.Integer(0)))


class _Choice(sp.Function):  # type: ignore[misc]
    """f(c, a, b): a or b by the sign of c, which itself has no slope."""

    nargs = 3
    is_real = True

    def _eval_derivative(self, symbol: Any) -> Any:
        # The slopes are chosen between, not multiplied by 0 and 1: the one not chosen may be infinite.
        c, a, b = self.args
        a, b = sp.diff(a, symbol), sp.diff(b, symbol)
        return a if a == b else self.func(c, a, b)


class where(_Choice):
    """a if c > 0."""


class since(_Choice):
    """a if c >= 0."""


class least(sp.Function):  # type: ignore[misc]
    """max(z, c) for a constant c; a value at the bound keeps its slope."""

    nargs = 2
    is_real = True

    def fdiff(self, argindex: int = 1) -> Any:
        z, c = self.args
        return since(z - c, sp.Integer(1), sp.Integer(0)) if argindex == 1 else sp.Integer(0)


class most(sp.Function):  # type: ignore[misc]
    """min(z, c) for a constant c; a value at the bound keeps its slope."""

    nargs = 2
    is_real = True

    def fdiff(self, argindex: int = 1) -> Any:
        z, c = self.args
        return since(c - z, sp.Integer(1), sp.Integer(0)) if argindex == 1 else sp.Integer(0)


def number(value: float) -> Any:
    """A constant of the graph: an integer where it is one, otherwise the very float."""
    return sp.Integer(int(value)) if value == int(value) else sp.Float(value, 17)


def safe(expression: Any) -> Any:
    """The expression in the forms of the module's docstring."""
    for _ in range(4):
        before = expression
        expression = expression.replace(_is_whole, lambda e: sp.Integer(int(e)))
        expression = expression.replace(lambda e: e.is_Add, _sum)
        expression = expression.replace(_is_logistic, lambda e: sigmoid(-e.base.args[1].args[0]))
        expression = expression.replace(lambda e: e.is_Mul, _product)
        expression = expression.replace(_is_softplus, lambda e: softplus(e.args[0].args[1].args[0]))
        if expression == before:
            break
    return expression


def _is_whole(e: Any) -> bool:
    """sympy holds 1.0 and 1 for different numbers."""
    return bool(e.is_Float and abs(e) < 2**53 and float(e) == int(e))


def _one_plus_exp(e: Any) -> bool:
    return bool(e.is_Add and len(e.args) == 2 and e.args[0] == 1 and isinstance(e.args[1], sp.exp))


def _is_logistic(e: Any) -> bool:
    return bool(e.is_Pow and e.exp == -1 and _one_plus_exp(e.base))


def _is_softplus(e: Any) -> bool:
    return isinstance(e, sp.log) and _one_plus_exp(e.args[0])


def _sum(e: Any) -> Any:
    """c + c tanh(u), c - c sigmoid(u) and e^w - 1 among the terms of a sum."""
    constant, rest = e.as_coeff_Add()
    if constant == 0:
        return e
    terms = list(sp.Add.make_args(rest))
    for term in terms:
        factor, function = term.as_coeff_Mul()
        others = sum((t for t in terms if t is not term), sp.Integer(0))
        if isinstance(function, tanh) and abs(factor) == abs(constant):
            u = 2 * function.args[0] * sp.sign(factor) * sp.sign(constant)
            return others + 2 * constant * sigmoid(u)
        if isinstance(function, sigmoid) and factor == -constant:
            return others + constant * sigmoid(-function.args[0])
        if isinstance(function, sp.exp) and factor == -constant:
            return others + factor * expm1(function.args[0])
    return e


def _product(e: Any) -> Any:
    """e^w sigmoid(-w) among the factors of a product."""
    factors = list(e.args)
    for a in factors:
        for b in factors:
            if isinstance(a, sp.exp) and isinstance(b, sigmoid) and b.args[0] == -a.args[0]:
                rest = [f for f in factors if f is not a and f is not b]
                return sp.Mul(*rest, sigmoid(a.args[0]))
    return e


@functools.lru_cache(maxsize=512)
def with_slope(expression: Any) -> tuple[str, str]:
    """(text, text of its derivative) of an expression in X.

    Raises:
        Unreadable: a part of it has no text.
    """
    expression = safe(expression)
    slope = safe(sp.diff(expression, X))
    if slope.has(sp.Derivative, sp.Subs):
        raise Unreadable(f"the derivative of {expression} is not known")
    return _open(_text(expression)), _open(_text(slope))


def _text(e: Any) -> str:
    if e == X:
        return "x"
    if e.is_Number:
        return _constant(e)
    if e.is_Add:
        return "(" + " + ".join(map(_text, _ordered(e.args))).replace(" + -", " - ") + ")"
    if e.is_Mul:
        return _product_text(e)
    if e.is_Pow:
        return _power(e)
    if isinstance(e, (sp.exp, sp.log, sp.Abs, _Elementary, _Choice, least, most)):
        name = "abs" if isinstance(e, (magnitude, sp.Abs)) else type(e).__name__
        return f"{name}({', '.join(_open(_text(a)) for a in e.args)})"
    raise Unreadable(f"{type(e).__name__} has no form in a kernel")


def _open(text: str) -> str:
    """Without a pair of brackets around the whole."""
    if not text.startswith("("):
        return text
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[1:-1] if at == len(text) - 1 else text
    return text


def _constant(e: Any) -> str:
    value = float(e)
    return repr(int(value)) if value == int(value) and abs(value) < 2**53 else repr(value)


def _product_text(e: Any) -> str:
    coefficient, rest = e.as_coeff_Mul()
    if not rest.is_Mul and coefficient in (1, -1):
        return _text(rest) if coefficient == 1 else "-" + _text(rest)
    above: list[Any] = []
    below: list[Any] = []
    for factor in _ordered(sp.Mul.make_args(rest)):
        inverse = factor.is_Pow and factor.exp.is_number and factor.exp.is_negative
        (below if inverse else above).append(1 / factor if inverse else factor)
    sign = "-" if coefficient == -1 else ""
    if coefficient not in (1, -1):
        above.insert(0, coefficient)
    text = sign + ("*".join(map(_text, above)) if above else "1")
    return text + "".join("/" + _bracketed(b) for b in below)


def _bracketed(e: Any) -> str:
    text = _text(e)
    return f"({text})" if e.is_Mul or (e.is_Pow and not text.startswith("sqrt")) else text


def _ordered(args: Any) -> list[Any]:
    """One order of operands whatever order they were written in: constants first."""
    return sorted(args, key=lambda a: (not a.is_number, sp.default_sort_key(a)))


def _power(e: Any) -> str:
    base, exponent = e.base, e.exp
    if exponent.is_number and exponent.is_negative:
        return "1/" + _bracketed(1 / e)
    if exponent == sp.Rational(1, 2) or exponent == 0.5:
        return f"sqrt({_text(base)})"
    if exponent.is_number and exponent == int(exponent) and 2 <= int(exponent) <= 8:
        text = _text(base)
        bare = base == X or base.is_Function or base.is_Add  # a sum has its brackets
        return f"{text if bare else f'({text})'}**{int(exponent)}"
    raise Unreadable(f"the power {exponent} has no form in a kernel")
