"""The thin products of a group of adapters: S = s x A^T, P = s dy B, dA = P^T x, dB = dy^T S."""

from __future__ import annotations

import torch

from fusewright.kernels.lora_group import Group, Needs, Plan, Tensors
from fusewright.kernels.reduce import absent


def halves(t: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """t as a sum of two tensors of a narrower dtype, up to the last bits of the lower one."""
    high = t.to(dtype)
    return high, (t - high.to(t.dtype)).to(dtype)


def scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale a b, rounded once to the operands' dtype."""
    if scale == 1.0 or a.dtype in (torch.float32, torch.float64):
        return torch.matmul(a, b) * scale
    return (torch.matmul(a.float(), b.float()) * scale).to(a.dtype)


def place(t: torch.Tensor, target: torch.Tensor, split: bool, dim: int) -> None:
    """A weight of an adapter into its blocks: itself, or [hi, hi, lo] along ``dim``."""
    if not split:
        target.copy_(t)
        return
    high, low = halves(t.float(), target.dtype)
    for part, piece in zip((high, high, low), target.chunk(3, dim), strict=True):
        piece.copy_(part)


def paired(
    thin: torch.Tensor, right: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(left, right^T) whose product in ``dtype`` is thin right^T with the precision of float32.

    Args:
        thin: (T, r).
        right: (N, r).
    """
    if dtype in (thin.dtype, right.dtype) and thin.dtype == right.dtype:
        return thin, right.t()
    (a, b), (c, d) = halves(thin.float(), dtype), halves(right.float(), dtype)
    return torch.cat((a, b, a), 1), torch.cat((c, c, d), 1).t()


def _columns(thin: torch.Tensor, wide: torch.Tensor, how: Plan, width: int) -> None:
    """The thin products into the columns behind the rows, a one for the biases, zeros for the rest."""
    room, start = wide[:, width:], 0
    for r, at in zip(how.ranks, how.blocks, strict=True):
        low, target = thin[:, start : start + r], room[:, at]
        start += r
        if how.split:
            high, rest = halves(low, wide.dtype)
            target.copy_(torch.cat((high, rest, high), 1))
        else:
            target.copy_(low)
    room[:, how.thin :].zero_()


def right(
    group: Group, rows: torch.Tensor, how: Plan, wide: torch.Tensor | None, copy: bool
) -> torch.Tensor:
    """S (T, sum r_i); with ``wide`` (T, K + columns) also in its columns, and x if ``copy``."""
    dtype, width = group.dtype, rows.shape[1]
    parts = []
    for i, (a, s) in enumerate(zip(group.down, group.scales, strict=True)):
        own = group.input_of(i).reshape(-1, width).to(dtype)
        parts.append(scaled(own, a.to(dtype).t(), s))
    thin = torch.cat(parts, 1) if parts else absent(rows)
    if wide is not None:
        if copy:
            wide[:, :width].copy_(rows)
        _columns(thin, wide, how, width)
        if how.ones:
            wide[:, width + how.thin].fill_(1.0)
    return thin


def both(
    group: Group,
    g: Tensors,
    thin: torch.Tensor,
    how: Plan,
    wide: torch.Tensor | None,
    copy: bool,
    needs: Needs,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """P_i, dB_i and db_j; with ``wide`` (T, sum N_j + rows) P also in its columns, and g if ``copy``."""
    dtype, x = group.dtype, group.x
    wanted = needs.x or needs.down or needs.inputs
    p, dup, start = [], [], 0
    for b, j, s in zip(group.up, group.member, group.scales, strict=True):
        own = g[j].to(dtype)
        low = thin[:, start : start + b.shape[1]]
        start += b.shape[1]
        p.append(scaled(own, b.to(dtype), s) if wanted else absent(x))
        dup.append(torch.mm(own.t(), low).to(b.dtype) if needs.up else absent(x))
    if wide is not None:
        width = sum(d.shape[1] for d in g)
        if copy:
            for piece, d in zip(wide[:, :width].split([d.shape[1] for d in g], 1), g, strict=True):
                piece.copy_(d)
        inner = [
            t if at < 0 else torch.zeros_like(t) for t, at in zip(p, group.source, strict=True)
        ]
        _columns(torch.cat(inner, 1) if inner else absent(x), wide, how, width)
    dbiases = [
        d.sum(0, dtype=torch.float32).to(b.dtype) if needs.biases and b is not None else absent(x)
        for d, b in zip(g, group.biases, strict=True)
    ]
    return p, dup, dbiases


def left(group: Group, rows: torch.Tensor, p: Tensors, need: bool) -> list[torch.Tensor]:
    """dA_i."""
    out = []
    for i, a in enumerate(group.down):
        if not need:
            out.append(absent(group.x))
            continue
        own = group.input_of(i).reshape(-1, rows.shape[1]).to(group.dtype)
        out.append(torch.mm(p[i].t(), own).to(a.dtype))
    return out
