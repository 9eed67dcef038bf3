"""Rotary embedding written over its input: heads of q and of k inside of one wider tensor.

``whole`` (B, T, C) holds the H heads of q, each of D features, from column ``q_start`` on, and likewise
those of k; ``k_heads`` is 0 without k. Its other columns, say those of v, stay as they are. The
mathematics, tables and layouts are those of ``rope``, whose backward reads neither input nor output: so
nothing is lost with what is written over.

``rope_over_`` writes into ``whole``; ``rope_over`` gives a copy with the same values. Neither is
differentiated: they stand where a block's backward has been derived already.

A head is read whole before any of it is written, by the program that writes it and by no other.
Traffic: reads and writes the features that turn, once; the tables once for all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fusewright.kernels import rope, rope_kernels
from fusewright.kernels.launch import launchable
from fusewright.kernels.spec import one_way

_Pair = tuple[torch.Tensor, torch.Tensor | None]


def pieces(
    whole: torch.Tensor, q_start: int, q_heads: int, k_start: int, k_heads: int, width: int
) -> _Pair:
    """q (B, Hq, T, D) and k (B, Hk, T, D) or None, as views of ``whole``."""
    columns = whole.shape[-1] if whole.dim() == 3 else 0
    spans = sorted(((q_start, q_start + q_heads * width), (k_start, k_start + k_heads * width)))
    if q_heads < 1 or spans[0][0] < 0 or spans[1][1] > columns or spans[0][1] > spans[1][0]:
        raise ValueError(
            f"whole: expected (batch, tokens, columns) with {q_heads} and {k_heads} heads of {width} "
            f"from columns {q_start} and {k_start} on, got {tuple(whole.shape)}"
        )

    def piece(start: int, heads: int) -> torch.Tensor:
        columns = whole.narrow(-1, start, heads * width)
        x: torch.Tensor = columns.unflatten(-1, (heads, width)).transpose(1, 2)
        return x

    return piece(q_start, q_heads), piece(k_start, k_heads) if k_heads else None


def reference_(
    whole: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    *where: int,
) -> None:
    """Rotate in place, in plain PyTorch."""
    q, k = pieces(whole, *where)
    rope.check(q, k, cos, sin, layout, rotary_dim)
    for x in (q, k):
        if x is not None:
            rope.turn(x, x, cos, sin, layout, rotary_dim)


def device_(
    whole: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    *where: int,
) -> None:
    """Rotate in place, on the GPU."""
    if whole.stride(-1) == 1 and launchable(whole, cos.dtype, sin.dtype):
        q, k = pieces(whole, *where)
        rope.check(q, k, cos, sin, layout, rotary_dim)
        rope_kernels.turn(q, k, q, k, cos, sin, layout, rotary_dim, back=False, over=True)
    else:
        reference_(whole, cos, sin, layout, rotary_dim, *where)


def reference(whole: torch.Tensor, *given: Any) -> torch.Tensor:
    """A rotated copy, in plain PyTorch."""
    out = whole.clone()
    reference_(out, *given)
    return out


def device(whole: torch.Tensor, *given: Any) -> torch.Tensor:
    """A rotated copy, on the GPU."""
    out = whole.clone()
    device_(out, *given)
    return out


def _fake_(
    whole: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    *where: int,
) -> None:
    rope.check(*pieces(whole, *where), cos, sin, layout, rotary_dim)


def _fake(whole: torch.Tensor, *given: Any) -> torch.Tensor:
    _fake_(whole, *given)
    return whole.clone()


def _no_products(args: Sequence[Any], out: Any) -> int:
    return 0


_GIVEN = (
    "Tensor cos, Tensor sin, str layout, int rotary_dim, int q_start, int q_heads, int k_start, "
    "int k_heads, int width"
)

OPS = (
    replace(
        one_way(
            f"rope_over(Tensor whole, {_GIVEN}) -> Tensor", reference, device, _fake, _no_products
        ),
        cheap=True,
    ),
    one_way(
        f"rope_over_(Tensor(a!) whole, {_GIVEN}) -> ()", reference_, device_, _fake_, _no_products
    ),
)
