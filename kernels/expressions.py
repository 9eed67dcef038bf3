"""Activations given as text: one expression for the value, one for its derivative.

    "x*sigmoid(0.5*x); sigmoid(0.5*x)*(1 + 0.5*x*sigmoid(-0.5*x))"

is an activation f and f' over x, and may stand wherever an op takes an activation's name. With four
expressions, "f; f'; h; h'", a gated unit is y = f(gate) h(up). The text is all that an op needs: it is
kept in graphs, printed in reports and passed to kernels as it is.

Grammar: numbers, x, + - * /, integer powers, and the functions below. It is read by Python's parser
and never executed: ``program`` flattens it to instructions in single-assignment form, in which equal
sub-expressions of value and derivative are one. The reference runs them over torch; the kernels walk
them while they are compiled (``elementary.evaluate``), so what is compiled is straight-line code.

Functions, each with the form that neither overflows nor cancels, z the argument:
    exp, log, sqrt, abs, tanh, erf, expm1, sigmoid      as torch's
    softplus(z)      max(z, 0) + log1p(exp(-|z|))
    relu(z)          max(z, 0)
    least(z, c)      z, but at least c       most(z, c)      z, but at most c
    where(c, a, b)   a if c > 0, otherwise b         since(c, a, b)   a if c >= 0, otherwise b
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

ARITY = {
    "exp": 1, "log": 1, "sqrt": 1, "abs": 1, "tanh": 1, "erf": 1, "expm1": 1, "sigmoid": 1,
    "softplus": 1, "relu": 1, "least": 2, "most": 2, "where": 3, "since": 3,
}  # fmt: skip
_BINARY = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
_MOST = 96  # instructions: what a kernel keeps in registers and a person can still read
_POWER = 8


class Step(NamedTuple):
    """One instruction: an operation and its operands, numbers of earlier values (0 is x).

    "const" has the constant in ``constant`` and no operands.
    """

    operation: str
    operands: tuple[int, ...] = ()
    constant: float = 0.0


class Program(NamedTuple):
    """Instructions, and the number of the value that each expression of the text has."""

    steps: tuple[Step, ...]
    results: tuple[int, ...]


def is_expression(activation: str) -> bool:
    """Whether an op's activation is text of this form, and not a name."""
    return ";" in activation


@functools.lru_cache(maxsize=1024)
def program(text: str, part: int = 0) -> Program:
    """The instructions of (f, f'), or with ``part`` 1 of (h, h').

    Raises:
        ValueError: the text is not of the grammar; the message names the piece.
    """
    pieces = text.split(";")
    if len(pieces) not in (2, 4):
        raise ValueError(
            f"activation: expected two or four expressions, got {len(pieces)} in {text!r}"
        )
    made = _Builder()
    results = tuple(made.read(piece) for piece in pieces[2 * part : 2 * part + 2])
    if len(made.steps) > _MOST:
        raise ValueError(f"activation: {len(made.steps)} operations, at most {_MOST}: {text!r}")
    return Program(tuple(made.steps), results)


def has_up(text: str) -> bool:
    """Whether the text also has a function of up."""
    return text.count(";") == 3


class _Builder:
    """Flattens expressions; a step that exists already is used again."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._known: dict[Step, int] = {}

    def read(self, text: str) -> int:
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"activation: {text.strip()!r} is no expression") from error
        return self._value(tree)

    def _add(self, operation: str, *operands: int, constant: float = 0.0) -> int:
        step = Step(operation, operands, constant)
        if step not in self._known:
            self.steps.append(step)
            self._known[step] = len(self.steps)
        return self._known[step]

    def _value(self, tree: ast.expr) -> int:
        constant = _constant(tree)
        if constant is not None:
            return self._add("const", constant=constant)
        if isinstance(tree, ast.Name) and tree.id == "x":
            return 0
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            return self._add("neg", self._value(tree.operand))
        if isinstance(tree, ast.BinOp) and type(tree.op) in _BINARY:
            operation = _BINARY[type(tree.op)]
            return self._add(operation, self._value(tree.left), self._value(tree.right))
        if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Pow):
            return self._power(self._value(tree.left), _constant(tree.right), tree)
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.keywords:
            name, arguments = tree.func.id, tree.args
            if ARITY.get(name) == len(arguments):
                return self._add(name, *[self._value(a) for a in arguments])
        raise ValueError(f"activation: {ast.unparse(tree)!r} is not of the grammar")

    def _power(self, base: int, exponent: float | None, tree: ast.expr) -> int:
        if exponent is None or exponent not in range(2, _POWER + 1):
            raise ValueError(f"activation: {ast.unparse(tree)!r} has no integer power up to 8")
        result = base
        for _ in range(int(exponent) - 1):
            result = self._add("mul", result, base)
        return result


def _constant(tree: ast.expr) -> float | None:
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        inner = _constant(tree.operand)
        return None if inner is None else -inner
    if isinstance(tree, ast.Constant) and type(tree.value) in (int, float):
        number = float(tree.value)  # type: ignore[arg-type]
        return number if math.isfinite(number) else None
    return None


def evaluate(text: str, x: torch.Tensor, part: int = 0) -> list[torch.Tensor]:
    """[f(x), f'(x)] in the dtype of ``x``."""
    made = program(text, part)
    values = [x]
    for step in made.steps:
        values.append(_run(step, [values[at] for at in step.operands], x))
    return [values[at] for at in made.results]


def _run(step: Step, given: Sequence[torch.Tensor], x: torch.Tensor) -> Any:
    operation = step.operation
    if operation == "const":
        return torch.full_like(x, step.constant)
    if operation == "neg":
        return -given[0]
    if operation in ("add", "sub", "mul", "div"):
        return getattr(torch, operation)(*given)
    if operation == "softplus":
        # F.softplus is the identity above its threshold of 20, which float64 can tell.
        z = given[0]
        return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))
    if operation == "relu":
        return F.relu(given[0])
    if operation == "least":
        return torch.where(given[0] < given[1], given[1], given[0])
    if operation == "most":
        return torch.where(given[0] > given[1], given[1], given[0])
    if operation == "where":
        return torch.where(given[0] > 0, given[1], given[2])
    if operation == "since":
        return torch.where(given[0] >= 0, given[1], given[2])
    return getattr(torch, operation)(given[0])
