"""Two tensors that are the two halves of one: side by side, or every other element."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir

aten = torch.ops.aten


@dataclass(frozen=True)
class Packed:
    """Where gate and up lie in the last dimension of ``source`` (..., 2F).

    Attributes:
        source: the tensor that holds both.
        gate_first: whether the gate is the first half, or the first of each pair.
        interleaved: whether they alternate, element by element.
        pieces: the calls that take them apart.
    """

    source: fx.Node
    gate_first: bool
    interleaved: bool
    pieces: frozenset[fx.Node]

    def apart(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate, up) of a tensor that is laid out so."""
        if self.interleaved:
            first, second = both[..., 0::2], both[..., 1::2]
        else:
            first, second = both.chunk(2, dim=-1)
        return (first, second) if self.gate_first else (second, first)


def packed(gate: fx.Node, up: fx.Node) -> Packed | None:
    """How gate and up lie in one tensor; None if they do not, or not evenly."""
    a, b = _half(gate), _half(up)
    if a is None or b is None or a[0] is not b[0] or a[1] != b[1] or {a[2], b[2]} != {0, 1}:
        return None
    source, interleaved, index = a[:3]
    return Packed(source, index == 0, interleaved, a[3] | b[3])


def _half(node: fx.Node) -> tuple[fx.Node, bool, int, frozenset[fx.Node]] | None:
    """(source, interleaved, which half, calls in between)."""
    piece = ir.as_slice(node)
    if piece is not None:
        return _sliced(node, *piece)
    whole: Any = node
    dim: Any = None
    index: Any = None
    if ir.is_call(node, aten.select.int):
        whole, dim, index = node.args
    elif ir.is_call(node, operator.getitem) and ir.is_call(node.args[0], aten.unbind.int):
        unbound: Any = node.args[0]
        whole, dim, index = unbound.args[0], ir.argument(unbound, 1, 0), node.args[1]
    if dim is None or not isinstance(index, int) or not ir.is_call(whole, *ir.VIEWS):
        return None
    return _selected(node, whole, ir.normal_dim(whole, dim), index)


def _sliced(
    node: fx.Node, source: fx.Node, dim: int, start: int, end: int, step: int
) -> tuple[fx.Node, bool, int, frozenset[fx.Node]] | None:
    width = ir.shape(source)[dim]
    if dim != len(ir.shape(source)) - 1 or not isinstance(width, int) or width % 2:
        return None
    between = frozenset(n for n in (node, node.all_input_nodes[0]) if n is not source)
    if step == 1 and (start, end) in ((0, width // 2), (width // 2, width)):
        return source, False, int(start != 0), between
    if step == 2 and start in (0, 1) and end >= width - 1 + start:
        return source, True, start, between
    return None


def _selected(
    node: fx.Node, whole: fx.Node, dim: int, index: int
) -> tuple[fx.Node, bool, int, frozenset[fx.Node]] | None:
    """One of two along an axis that a view made from the last: (..., 2, F) or (..., F, 2)."""
    source: fx.Node = ir.argument(whole, 0)
    rank, shape = len(ir.shape(whole)), ir.shape(whole)
    folded = (*shape[:-2], shape[-2] * shape[-1]) if rank >= 3 else ()
    if whole.target not in (aten.view.default, aten.reshape.default, aten.unflatten.int):
        return None
    if ir.shape(source) != folded or dim < rank - 2 or shape[dim] != 2:
        return None
    between = {node, whole} | ({node.args[0]} if ir.is_call(node, operator.getitem) else set())
    return source, dim == rank - 1, index % 2, frozenset(between)  # type: ignore[arg-type]
