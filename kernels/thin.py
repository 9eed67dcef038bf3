"""Thin products: a wide matrix M (T, C) times a matrix of few columns, from either side.

    right  P = s M V       M (T, C), V (C, r) or, transposed, (r, C);  P (T, r)
    left   L = s' M^T U    U (T, r);  L (C, r) or, transposed, (r, C)

These are the products of low-rank adapters: x A^T and dy B are right products, dA and dB left ones,
and dy B and dB share one read of dy. M is what is large: T C elements are read once, the rest is
r / C and r / T of that. On the way M can be copied into a wider buffer W (T, Wd) and P be written
behind it, so that [M | P] is the operand of one GEMM.

Where it rounds. Both operands in the same 16 bits: products and sums in float32, scaled in float32,
rounded once to that dtype. A float32 operand beside M in bfloat16 is split first in three bfloat16,
which is exact, its products with M are exact in float32, and the result is float32. Any other
mixture is computed in float32. A float32 P goes into a 16-bit W as three groups [hi | lo | hi], the
partner of [V_hi | V_hi | V_lo] in the other operand (``thin_copies.Copy``):
P V ~ hi V_hi + lo V_hi + hi V_lo.

Sums are taken in an order that depends on shapes, dtypes and the device's limits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusewright.kernels import thin_copies, thin_launch
from fusewright.kernels.launch import HAS_TRITON
from fusewright.kernels.normed import Norm
from fusewright.kernels.thin_copies import Copy
from fusewright.kernels.thin_plan import MOST_RANK, Result, Term, Wide

__all__ = ["Copy", "Result", "Term", "Wide", "reference", "thin"]

_KINDS = frozenset((torch.bfloat16, torch.float16, torch.float32))
_MOST = 1024  # signatures remembered, before all are forgotten
_seen: dict[tuple[Any, ...], bool] = {}  # whether the kernels take what was checked before


def thin(
    blocks: Sequence[torch.Tensor],
    terms: Sequence[Term],
    wide: Wide | None = None,
    copies: Sequence[Copy] = (),
    norm: Norm | None = None,
) -> list[Result]:
    """The products of every term, by kernels where there are kernels for these operands.

    Args:
        blocks: the matrices M_j (T, C_j), with any row stride and a contiguous last dimension.
        terms: what to multiply with; all on the blocks' device.
        wide: a buffer that receives copies of the blocks and the terms' P; see ``Wide``.
        copies: small copies done by the same launch, of tensors that no product here reads.
        norm: the one matrix of left products is this norm's output, and its input is given.

    Returns:
        For each term its P and L, each where it was asked for. A P that was written to the wide
        buffer in the buffer's dtype is a view of it.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: the wide buffer's dtype is not the blocks', or a copy cannot be split.
    """
    signature = _signature(blocks, terms, wide)
    launchable = _seen.get(signature)
    if launchable is None:
        _check(blocks, terms, wide)
        if len(_seen) >= _MOST:
            _seen.clear()
        launchable = _seen[signature] = _launchable(blocks, terms, wide)
    if copies:
        thin_copies.check(copies, blocks[0].device)
    if not launchable:
        results = reference(blocks, terms, wide, norm=norm)
        thin_copies.run(copies)
        return results
    return thin_launch.run(blocks, terms, wide, copies, norm)


def _look(t: torch.Tensor | None) -> tuple[Any, ...] | None:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def _signature(
    blocks: Sequence[torch.Tensor], terms: Sequence[Term], wide: Wide | None
) -> tuple[Any, ...]:
    """All that the checks look at."""
    into = None
    if wide is not None:
        into = (_look(wide.buffer), tuple(wide.columns), wide.step, tuple(wide.zero))
    return (
        into,
        *[_look(m) for m in blocks],
        *[(t.block, _look(t.right), t.right_transposed, t.column, _look(t.left)) for t in terms],
    )


def reference(
    blocks: Sequence[torch.Tensor],
    terms: Sequence[Term],
    wide: Wide | None = None,
    copies: Sequence[Copy] = (),
    norm: Norm | None = None,
) -> list[Result]:
    """The same in plain PyTorch, sums in float32 (float64 where an operand is float64)."""
    results = []
    blocks = blocks if norm is None else [norm.of(m) for m in blocks]
    for term in terms:
        m, right, left = blocks[term.block], None, None
        if term.right is not None:
            v = term.right.t() if term.right_transposed else term.right
            right = _mm(m, v, term.scale)
        if term.left is not None:
            u = term.left
            left = _mm(u.t(), m, term.left_scale) if term.left_transposed else None
            left = _mm(m.t(), u, term.left_scale) if left is None else left
        if right is not None and wide is not None and term.column is not None:
            placed = _place(right, wide, term.column)
            right = right if wide.dense else placed
        results.append(Result(right, left))
    if wide is not None:
        for m, column in zip(blocks, wide.columns, strict=True):
            if column is not None:
                wide.buffer[:, column : column + m.shape[1]] = m
        wide.buffer[:, wide.zero[0] : wide.zero[1]] = 0
    thin_copies.reference(copies)
    return results


def _mm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale a b, scaled before it is rounded to the wider dtype of the two."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    if a.is_cuda and a.dtype == b.dtype and a.dtype != compute:
        product: torch.Tensor = torch.ops.aten.mm.dtype(a, b, compute)
    else:
        product = a.to(compute) @ b.to(compute)
    return (product * scale).to(dtype)


def _place(p: torch.Tensor, wide: Wide, column: int) -> torch.Tensor:
    """Write P into the wide buffer; returns the view of it, or P itself where it was split."""
    groups = [
        wide.buffer[:, c : c + p.shape[1]] for c in (column + i * wide.step for i in range(3))
    ]
    groups[0].copy_(p)
    if not thin_launch.is_split(p.dtype, wide):
        return groups[0]
    groups[1].copy_(p - groups[0].to(p.dtype))
    groups[2].copy_(groups[0])
    return p


def _launchable(blocks: Sequence[torch.Tensor], terms: Sequence[Term], wide: Wide | None) -> bool:
    """Whether the kernels take these operands."""
    thins = [t for term in terms for t in (term.right, term.left) if t is not None]
    return (
        HAS_TRITON
        and all(t.dtype in _KINDS and t.numel() > 0 for t in (*blocks, *thins))
        and all(m.dtype == blocks[0].dtype and m.stride(1) == 1 for m in blocks)
        and all(thin_launch.rank(term) <= MOST_RANK for term in terms)
        and (wide is None or wide.buffer.stride(1) == 1)
        and thin_launch.supported(blocks[0].device)
    )


def _check(blocks: Sequence[torch.Tensor], terms: Sequence[Term], wide: Wide | None) -> None:
    """Refuse what does not fit together."""
    if not blocks or any(m.dim() != 2 or m.shape[0] != blocks[0].shape[0] for m in blocks):
        raise ValueError(
            f"blocks: expected matrices of as many rows, got {[tuple(m.shape) for m in blocks]}"
        )
    device, rows = blocks[0].device, blocks[0].shape[0]
    for at, term in enumerate(terms):
        width = blocks[term.block].shape[1]
        if term.right is not None:
            v = term.right.t() if term.right_transposed else term.right
            if v.dim() != 2 or v.shape[0] != width or v.device != device:
                raise ValueError(
                    f"terms[{at}].right: expected {width} rows on {device}, got {tuple(v.shape)} "
                    f"on {v.device}"
                )
        if term.left is not None:
            u = term.left
            if u.dim() != 2 or u.shape[0] != rows or u.device != device:
                raise ValueError(
                    f"terms[{at}].left: expected {rows} rows on {device}, got {tuple(u.shape)} "
                    f"on {u.device}"
                )
        ranks = [thin_launch.rank(t) for t in (term, term._replace(right=None))]
        if term.left is not None and ranks[0] != ranks[1]:
            raise ValueError(f"terms[{at}]: expected one rank, got {ranks[0]} and {ranks[1]}")
    if wide is not None:
        _check_wide(blocks, terms, wide)


def _check_wide(blocks: Sequence[torch.Tensor], terms: Sequence[Term], wide: Wide) -> None:
    buffer = wide.buffer
    if buffer.dim() != 2 or buffer.shape[0] != blocks[0].shape[0]:
        raise ValueError(f"wide: expected {blocks[0].shape[0]} rows, got {tuple(buffer.shape)}")
    if buffer.dtype != blocks[0].dtype:
        raise TypeError(f"wide: expected {blocks[0].dtype}, got {buffer.dtype}")
    if len(wide.columns) != len(blocks):
        raise ValueError(f"wide: expected {len(blocks)} columns, got {len(wide.columns)}")
    ends = [c + m.shape[1] for c, m in zip(wide.columns, blocks, strict=True) if c is not None]
    for term in terms:
        if term.right is not None and term.column is not None:
            dtype = torch.promote_types(term.right.dtype, buffer.dtype)
            last = 2 * wide.step if thin_launch.is_split(dtype, wide) else 0
            ends.append(term.column + last + thin_launch.rank(term))
    if max((*ends, wide.zero[1])) > buffer.shape[1]:
        raise ValueError(f"wide: {buffer.shape[1]} columns, but column {max(ends)} is written")
