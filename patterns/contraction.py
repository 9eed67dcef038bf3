"""The two matrix products of attention, read off ``matmul``, ``bmm`` or ``einsum`` in any layout.

Scores are left (..., Q, D) times right (..., K, D) transposed; what the weights (..., Q, K) yield is
their product with right (..., K, E). An operand that lies otherwise is permuted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.compiler.rewrite import call

aten = torch.ops.aten

_PLAIN = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class Operand:
    """A value of the graph and the order of its dimensions that a product means."""

    node: fx.Node
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes in the product's order: int, or for a symbolic one its expression."""
        sizes = ir.shape(self.node)
        return tuple(sizes[i] for i in self.order)

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """The tensor in the product's order."""
        return t.permute(self.order)

    def laid_out(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """The node in the product's order, by a view where it needs one."""
        if list(self.order) == sorted(self.order):
            return node
        return call(graph, aten.permute.default, (node, list(self.order)))


@dataclass(frozen=True)
class Contraction:
    """A product's operands, and the order in which its result's dimensions lie in the graph."""

    left: Operand
    right: Operand
    result: tuple[int, ...]


def of_scores(product: fx.Node, nodes: set[fx.Node]) -> Contraction:
    """Scores (..., Q, K) as left (..., Q, D) and right (..., K, D); a transposition joins ``nodes``.

    Raises:
        Refused: the product is another one.
    """
    if ir.is_call(product, aten.einsum.default):
        a, b, out, (x, y) = _equation(product)
        if out[-2] not in a:
            a, b, x, y = b, a, y, x
        (summed,) = _summed(a, b, out)
        batch = out[:-2]
        left = _operand(x, a, batch + out[-2] + summed)
        right = _operand(y, b, batch + out[-1] + summed)
        return Contraction(left, right, tuple(range(len(out))))
    q, turned = _operands(product)
    rank = len(ir.shape(turned))
    plain = tuple(range(rank))
    if _swaps_last(turned):
        nodes.add(turned)
        return Contraction(Operand(q, plain), Operand(turned.args[0], plain), plain)  # type: ignore[arg-type]
    return Contraction(Operand(q, plain), Operand(turned, (*plain[:-2], rank - 1, rank - 2)), plain)


def of_weights(product: fx.Node, weights: fx.Node) -> Contraction:
    """The weights' product with right (..., K, E), whose result lies in the graph as ``result`` says.

    Raises:
        Refused: the product is another one.
    """
    if ir.is_call(product, aten.einsum.default):
        a, b, out, (x, y) = _equation(product)
        if x is not weights:
            a, b, x, y = b, a, y, x
        (summed,) = _summed(a, b, out)
        own = [c for c in b if c not in a]
        if len(own) != 1 or summed != a[-1]:
            raise Refused("the weights are not summed over what the softmax runs over")
        lies = a[:-1] + own[0]
        if sorted(lies) != sorted(out):
            raise Refused("the einsum of the weights is no matrix product")
        right = _operand(y, b, a[:-2] + summed + own[0])
        return Contraction(Operand(x, tuple(range(len(a)))), right, _order(lies, out))
    left, right_node = _operands(product)
    if left is not weights:
        raise Refused("the weights are the right operand of their product")
    plain = tuple(range(len(ir.shape(right_node))))
    return Contraction(Operand(left, plain), Operand(right_node, plain), plain)


def _operands(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    if not ir.is_call(product, *_PLAIN):
        raise Refused(f"the product is {product.target}, with more in it")
    a, b = ir.operands(product)
    if len(ir.shape(a)) != len(ir.shape(b)) or len(ir.shape(a)) < 3:
        raise Refused("the product broadcasts one operand over the other's batch")
    return a, b


def _swaps_last(node: Any) -> bool:
    if ir.is_call(node, aten.mT.default):
        return True
    if not ir.is_call(node, aten.transpose.int):
        return False
    rank = len(ir.shape(node))
    return {ir.argument(node, i) % rank for i in (1, 2)} == {rank - 2, rank - 1}


def _equation(node: fx.Node) -> tuple[str, str, str, tuple[fx.Node, fx.Node]]:
    """(letters of either operand, of the result, the operands) of an einsum of two."""
    text: str = ir.argument(node, 0).replace(" ", "")
    given: Sequence[fx.Node] = ir.argument(node, 1)
    inputs, arrow, out = text.partition("->")
    sides = inputs.split(",")
    if len(given) != 2 or len(sides) != 2 or not arrow or "." in text:
        raise Refused(f"the einsum {text} is not of two operands with named dimensions")
    a, b = sides
    if not len(a) == len(b) == len(out) or any(len(set(s)) != len(s) for s in (a, b, out)):
        raise Refused(f"the einsum {text} is no product of matrices, one for each head")
    return a, b, out, (given[0], given[1])


def _summed(a: str, b: str, out: str) -> list[str]:
    found = [c for c in a if c in b and c not in out]
    if len(found) != 1:
        raise Refused(f"the einsum {a},{b}->{out} does not sum over one dimension")
    return found


def _operand(node: fx.Node, letters: str, wanted: str) -> Operand:
    if sorted(letters) != sorted(wanted):
        raise Refused(f"the einsum's operand {letters} has not the dimensions of {wanted}")
    return Operand(node, _order(letters, wanted))


def _order(letters: str, wanted: str) -> tuple[int, ...]:
    return tuple(letters.index(c) for c in wanted)
