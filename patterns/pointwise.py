"""Read pointwise code off a graph as an expression of one tensor.

A value is followed upwards through pointwise calls, as long as all their tensors are functions of one
and the same tensor of their own shape: the root. Casts that lose nothing are followed, a rounding one
ends the root (it is a value of its own). What is not pointwise, reads a second tensor, broadcasts,
writes or draws random numbers, is a root itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.patterns import symbolic as f
from fusewright.patterns.symbolic import X, number

aten = torch.ops.aten

_LONGEST = 40
_LEAK = number(0.01)
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


@dataclass(frozen=True)
class Reading:
    """A product of values, as an expression in X of their one ``root``.

    Attributes:
        expression: of X, the root.
        root: the tensor that all is a function of.
        nodes: the calls between the root and the values.
        tops: the values; what is read is their product times ``factor``.
    """

    expression: Any
    root: fx.Node
    nodes: frozenset[fx.Node]
    tops: tuple[fx.Node, ...]
    factor: float = 1.0

    def times(self, other: Reading) -> Reading:
        """The product of two readings of one root."""
        if other.root is not self.root:
            raise ValueError("readings of two roots have no product")
        return Reading(
            self.expression * other.expression,
            self.root,
            self.nodes | other.nodes,
            self.tops + other.tops,
            self.factor * other.factor,
        )

    def scaled(self, factor: float) -> Reading:
        """The same, ``factor`` times."""
        if factor == 1.0:
            return self
        expression = number(factor) * self.expression
        return Reading(expression, self.root, self.nodes, self.tops, self.factor * factor)

    @property
    def is_linear(self) -> bool:
        """Whether it is the root itself or a multiple of it and a constant: no activation."""
        expression = self.expression
        return bool(expression.is_polynomial(X) and sp.degree(expression, X) <= 1)

    @property
    def calls(self) -> int:
        """How many calls run on their own in eager."""
        return len(self.nodes)


class Reader:
    """Reads the values of one graph; what was read once is kept.

    Args:
        leaves: nodes that are roots whatever they are.
        casts: which casts are followed: "none", "widening", or "all" (the proof then tells whether
            a rounding was one).
    """

    def __init__(self, leaves: frozenset[fx.Node] = frozenset(), casts: str = "widening") -> None:
        self.leaves, self.casts = leaves, casts
        self.known: dict[fx.Node, Reading] = {}

    def read(self, node: fx.Node) -> Reading:
        """The longest reading of ``node``; the node itself is the root where there is none."""
        if node not in self.known:
            leaf = Reading(X, node, frozenset(), (node,))
            self.known[node] = leaf if node in self.leaves else self._compose(node) or leaf
        return self.known[node]

    def _compose(self, node: fx.Node) -> Reading | None:
        """The reading of a pointwise call, None where it has none."""
        if not ir.is_call(node) or not ir.is_floating(node):
            return None
        if ir.is_cast(node):
            followed = self.casts == "all" or (self.casts == "widening" and ir.widens(node))
            if not followed:
                return None
            inner = self.read(ir.argument(node, 0))
            return Reading(inner.expression, inner.root, inner.nodes | {node}, (node,))
        rule = RULES.get(node.target)
        if rule is None or not set(node.kwargs) <= {"approximate", "alpha"}:
            return None
        given = _Given(self, node)
        try:
            expression = rule(*[given(a) for a in node.args], **node.kwargs)
        except _Unread:
            return None
        if given.root is None or len(given.nodes) > _LONGEST:
            return None
        return Reading(expression, given.root, frozenset(given.nodes | {node}), (node,))


class _Unread(Exception):
    """An operand that is no function of the one root."""


class _Given:
    """Turns the operands of one call into expressions, all of one root."""

    def __init__(self, reader: Reader, node: fx.Node) -> None:
        self.reader, self.node = reader, node
        self.root: fx.Node | None = None
        self.nodes: set[fx.Node] = set()

    def __call__(self, operand: Any) -> Any:
        if isinstance(operand, bool) or operand is None or isinstance(operand, str):
            return operand
        if isinstance(operand, (int, float)):
            if not math.isfinite(operand):
                raise _Unread
            return number(operand)
        if not ir.is_tensor(operand) or ir.shape(operand) != ir.shape(self.node):
            raise _Unread
        if ir.is_call(operand, *_COMPARISONS):
            self.nodes.add(operand)
            return _COMPARISONS[operand.target](*map(self, operand.args))
        if not ir.is_floating(operand):
            raise _Unread
        if ir.is_call(operand, aten.zeros_like.default):
            self.nodes.add(operand)
            return sp.Integer(0)
        inner = self.reader.read(operand)
        if self.root not in (None, inner.root):
            raise _Unread
        self.root = inner.root
        self.nodes |= inner.nodes
        return inner.expression


# A condition is what must be positive (or, for the second of each pair, not negative).
_COMPARISONS: dict[Any, Callable[..., Any]] = {
    aten.gt.Scalar: lambda a, b: (f.where, a - b),
    aten.gt.Tensor: lambda a, b: (f.where, a - b),
    aten.lt.Scalar: lambda a, b: (f.where, b - a),
    aten.lt.Tensor: lambda a, b: (f.where, b - a),
    aten.ge.Scalar: lambda a, b: (f.since, a - b),
    aten.ge.Tensor: lambda a, b: (f.since, a - b),
    aten.le.Scalar: lambda a, b: (f.since, b - a),
    aten.le.Tensor: lambda a, b: (f.since, b - a),
}


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, tuple):
        raise _Unread
    choose, sign = condition
    return choose(sign, a, b)


def _clamp(z: Any, low: Any = None, high: Any = None) -> Any:
    z = z if low is None else f.least(z, low)
    return z if high is None else f.most(z, high)


def _gelu(z: Any, approximate: str = "none") -> Any:
    if approximate == "tanh":
        return z * f.sigmoid(2 * number(math.sqrt(2 / math.pi)) * (z + number(0.044715) * z**3))
    return z * (1 + f.erf(z * number(math.sqrt(0.5)))) / 2


def _softplus(z: Any, beta: Any = 1, threshold: Any = 20) -> Any:
    """The identity above the threshold, as torch has it."""
    return f.where(beta * z - threshold, z, f.softplus(beta * z) / beta)


def _elu(z: Any, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Any:
    return f.where(z, scale * z, alpha * scale * f.expm1(input_scale * z))


def _hard_sigmoid(z: Any) -> Any:
    middle = z / 6 + sp.Rational(1, 2)
    return f.where(z + 3, f.where(3 - z, middle, sp.Integer(1)), sp.Integer(0))


def _hard_swish(z: Any) -> Any:
    middle = z * (z + 3) / 6
    return f.where(z + 3, f.where(3 - z, middle, z), sp.Integer(0))


def _hard_tanh(z: Any, low: Any = -1, high: Any = 1) -> Any:
    """Unlike a clamp it has no slope at its bounds."""
    low, high = sp.sympify(low), sp.sympify(high)
    return f.where(z - low, f.where(high - z, z, high), low)


def _power(z: Any, exponent: Any) -> Any:
    if exponent == sp.Rational(1, 2):
        return sp.sqrt(z)
    return z**exponent


def _sum(a: Any, b: Any, alpha: Any = 1) -> Any:
    return a + b * sp.sympify(alpha)


RULES: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _sum,
    aten.add.Scalar: _sum,
    aten.sub.Tensor: lambda a, b, alpha=1: a - b * sp.sympify(alpha),
    aten.sub.Scalar: lambda a, b, alpha=1: a - b * sp.sympify(alpha),
    aten.rsub.Scalar: lambda a, b, alpha=1: b - a * sp.sympify(alpha),
    aten.mul.Tensor: lambda a, b: a * b,
    aten.mul.Scalar: lambda a, b: a * b,
    aten.div.Tensor: lambda a, b: a / b,
    aten.div.Scalar: lambda a, b: a / b,
    aten.neg.default: lambda a: -a,
    aten.reciprocal.default: lambda a: 1 / a,
    aten.pow.Tensor_Scalar: _power,
    aten.square.default: lambda a: a**2,
    aten.sqrt.default: sp.sqrt,
    aten.rsqrt.default: lambda a: 1 / sp.sqrt(a),
    aten.exp.default: sp.exp,
    aten.expm1.default: f.expm1,
    aten.log.default: sp.log,
    aten.log1p.default: lambda a: sp.log(1 + a),
    aten.abs.default: f.magnitude,
    aten.sigmoid.default: f.sigmoid,
    aten.log_sigmoid.default: lambda a: -f.softplus(-a),
    aten.tanh.default: f.tanh,
    aten.erf.default: f.erf,
    aten.silu.default: lambda a: a * f.sigmoid(a),
    aten.mish.default: lambda a: a * f.tanh(f.softplus(a)),
    aten.gelu.default: _gelu,
    aten.relu.default: f.relu,
    aten.leaky_relu.default: lambda a, slope=_LEAK: f.where(a, a, slope * a),
    aten.elu.default: _elu,
    aten.selu.default: lambda a: _elu(a, number(_SELU_ALPHA), number(_SELU_SCALE)),
    aten.softplus.default: _softplus,
    aten.hardsigmoid.default: _hard_sigmoid,
    aten.hardswish.default: _hard_swish,
    aten.hardtanh.default: _hard_tanh,
    aten.relu6.default: lambda a: _hard_tanh(a, 0, 6),
    aten.celu.default: lambda a, alpha=1: _elu(a, alpha, 1, 1 / sp.sympify(alpha)),
    aten.clamp.default: _clamp,
    aten.clip.default: _clamp,
    aten.clamp_min.default: lambda a, low: f.least(a, low),
    aten.clamp_max.default: lambda a, high: f.most(a, high),
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.where.Scalar: _where,
}
