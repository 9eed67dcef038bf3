"""The elementary functions over sympy, under the names that the references use from torch."""

from __future__ import annotations

from typing import Any

import sympy as sp


class Symbols:
    """What a formula written over a namespace of functions needs, symbolically."""

    exp = staticmethod(sp.exp)
    log = staticmethod(sp.log)
    erf = staticmethod(sp.erf)
    tanh = staticmethod(sp.tanh)

    @staticmethod
    def sigmoid(x: Any) -> Any:
        """1 / (1 + exp(-x))."""
        return 1 / (1 + sp.exp(-x))

    @staticmethod
    def where(condition: Any, then: Any, otherwise: Any) -> Any:
        """A piecewise expression."""
        return sp.Piecewise((then, condition), (otherwise, True))


def exact(expression: Any) -> Any:
    """The expression with its floats replaced by the numbers that they stand for."""
    return sp.nsimplify(expression, [sp.sqrt(2), 1 / sp.sqrt(2 * sp.pi), sp.sqrt(2 / sp.pi)])
