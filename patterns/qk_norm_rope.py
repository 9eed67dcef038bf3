"""Normalised and rotated heads: y = rope(rms_norm(x)) for queries and keys, in one pass.

Anchor: a ``rope`` node of ours whose q and k are results of ``rms_norm`` nodes of ours over the
heads' features, as they are or transposed. Both norms and the rotation keep their parameters and
casting modes; the norm's result is rounded to the dtype it had. Backward: kernels/qk_norm_rope.py.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.compiler.prove import Candidate, Rounder
from fusewright.compiler.rewrite import call, item

aten = torch.ops.aten
_LAYOUTS = ("half", "interleaved")


@dataclass(frozen=True)
class _Side:
    """One of q and k: the norm of it, and the nodes between its row and the rotation."""

    norm: fx.Node
    nodes: frozenset[fx.Node]
    transposed: bool

    @property
    def row(self) -> fx.Node:
        """What the norm reads."""
        return self.norm.args[0]  # type: ignore[return-value]

    @property
    def weight(self) -> fx.Node | None:
        """The norm's weight."""
        return self.norm.args[1]  # type: ignore[return-value]

    @property
    def settings(self) -> tuple[Any, ...]:
        """eps, offset, cast, and the dtype of the norm's result."""
        return tuple(self.norm.args[2:6])


class QKNormRoPE:
    """See the module's docstring."""

    name = "qk_norm_rope"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Rotations of what a norm yields."""
        turns = (n for n in ir.calls(graph) if ir.is_call(n, torch.ops.fusewright.rope.default))
        return (n for n in turns if any(_side(x) is not None for x in n.args[:2]))

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """The one claim about the rotation at ``anchor``."""
        q, k = (_side(x) for x in anchor.args[:2])
        if q is None or k is None:
            raise Refused("the rotation is not of two normalised tensors")
        if q.settings != k.settings or ir.dtype(q.row) != ir.dtype(k.row):
            raise Refused("the norms of q and k differ")
        if anchor.args[4] not in _LAYOUTS:
            raise Refused(f"the kernel has no layout {anchor.args[4]}")
        if q.settings[-1] not in (ir.dtype(q.row), torch.float32):
            raise Refused("the norm's result is of another dtype than its row")
        yield _candidate(anchor, q, k)


def _side(x: Any) -> _Side | None:
    """The norm that ``x`` is the result of, directly or transposed."""
    passed = [x]
    transposed = ir.is_call(x, aten.transpose.int)
    if transposed:
        if {ir.normal_dim(x, d) for d in x.args[1:3]} != {1, 2}:
            return None
        passed.append(x.args[0])
    y = passed[-1]
    if not ir.is_call(y, operator.getitem) or y.args[1] != 0:
        return None
    norm = y.args[0]
    if not ir.is_call(norm, torch.ops.fusewright.rms_norm.default):
        return None
    return _Side(norm, frozenset({norm, *passed}), transposed)


def _candidate(rope: fx.Node, q: _Side, k: _Side) -> Candidate:
    cos, sin, layout, rotary_dim, out_dtype = rope.args[2:7]
    eps, offset, cast, norm_dtype = q.settings
    outs = tuple(
        u
        for at in (0, 1)
        for u in rope.users
        if ir.is_call(u, operator.getitem) and u.args[1] == at
    )
    if len(outs) != 2 or len(rope.users) != 2:
        raise Refused("the rotation's results are not taken once each")
    sides = {"q": q, "k": k}

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        made = []
        for name, side in sides.items():
            x, weight = t[name], t[f"{name}_weight"]
            n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            n = n if weight is None else n * (offset + weight)
            n = n.transpose(1, 2) if side.transposed else n
            made.append(_rotated(n, t["cos"].detach(), t["sin"].detach(), layout, rotary_dim))
        return made

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        rows = [
            call(graph, aten.transpose.int, (read[n], 1, 2)) if s.transposed else read[n]
            for n, s in sides.items()
        ]
        norm = (read["q_weight"], read["k_weight"], eps, offset, cast, norm_dtype)
        turn = (read["cos"], read["sin"], layout, rotary_dim, out_dtype)
        made = call(graph, torch.ops.fusewright.qk_norm_rope.default, (*rows, *norm, *turn), rope)
        return [item(graph, made, at) for at in (0, 1)]

    return Candidate(
        nodes=q.nodes | k.nodes | {rope, *outs},
        inputs={"q": q.row, "k": k.row, "q_weight": q.weight, "k_weight": k.weight,
                "cos": cos, "sin": sin},  # type: ignore[dict-item]
        outputs=outs,
        formula=formula,
        emit=emit,
        params={"eps": eps, "offset": offset, "layout": layout, "rotary_dim": rotary_dim},
        cast=str(cast),
        scaled=("q", "k"),
        kernel="qk_norm_rope",
        constant=("cos", "sin"),
    )  # fmt: skip


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: Any, rotary_dim: Any
) -> torch.Tensor:
    """x cos + R(x) sin on the first features, over pairs."""
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    half = layout == "half"

    def pairs(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if half:
            low, high = t.chunk(2, dim=-1)
            return low, high
        return t[..., 0::2], t[..., 1::2]

    x1, x2 = pairs(turned)
    shared = cos.shape[-1] * 2 == rotary_dim
    (c1, c2), (s1, s2) = ((t, t) if shared else pairs(t) for t in (cos, sin))
    y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    y = torch.cat((y1, y2), -1) if half else torch.stack((y1, y2), -1).flatten(-2)
    return torch.cat((y, rest), dim=-1)
