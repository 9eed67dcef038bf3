"""The Triton kernels of the gated RMS norm and their launches; the mathematics is in gated_rms_norm.

A program takes one group of columns of ROWS tokens at a time; the backward's programs walk over the
tokens with the sums of the weight's gradient in registers, which ``column_sums`` adds in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusewright.kernels import device
from fusewright.kernels.elementary import value, value_and_slope
from fusewright.kernels.launch import on_device_of, rows_of, tl, triton
from fusewright.kernels.launcher import Launcher
from fusewright.kernels.norm_kernels import columns_of
from fusewright.kernels.norm_sum_kernels import column_sums
from fusewright.kernels.norm_tiles import power_of_two

Maybe = torch.Tensor | None


@triton.jit
def _mean(t, width):
    return tl.div_rn(tl.sum(t, 1), tl.full([t.shape[0]], 0.0, tl.float32) + width)[:, None]


@triton.jit
def gated_forward(
    x_ptr, gate_ptr, weight_ptr, y_ptr, rstd_ptr, tokens, width, groups, x_row, gate_row, eps,
    OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, AFTER: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y and rstd."""
    group = tl.program_id(0) % groups
    token = (tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < width
    there = token < tokens
    mask = there & inside
    at = group * width + columns
    t = tl.load(x_ptr + token * x_row + at, mask=mask, other=0.0)
    gate = tl.load(gate_ptr + token * gate_row + at, mask=mask, other=0.0).to(tl.float32)
    x = t.to(tl.float32)
    act = value(gate, 1.0, ACTIVATION, PRECISE)
    if not AFTER:
        x = tl.where(mask, x * act, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(_mean(x * x, width) + eps))
    tl.store(rstd_ptr + token * groups + group, rstd, mask=there)
    y = x * rstd
    if ROUND_INPUT:
        y = y.to(t.dtype).to(tl.float32)
    if weight_ptr is not None:
        y = y * (tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32) + OFFSET)
    if AFTER:
        y = y * act
    y_at = y_ptr + token * (width * groups) + at
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_backward(
    dy_ptr, x_ptr, gate_ptr, weight_ptr, rstd_ptr, dx_ptr, dgate_ptr, dweight_ptr,
    tokens, width, groups, dy_row, x_row, gate_row,
    OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, AFTER: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, dgate, and one row of partial sums of the weight's gradient per program of a group."""
    group = tl.program_id(0) % groups
    split, splits = tl.program_id(0) // groups, tl.num_programs(0) // groups
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < width
    at = group * width + columns
    dweight = tl.zeros([ROWS, 1 if dweight_ptr is None else BLOCK], tl.float32)
    for first in range(split * ROWS, tokens, splits * ROWS):
        token = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        there = token < tokens
        mask = there & inside
        t = tl.load(x_ptr + token * x_row + at, mask=mask, other=0.0)
        gate = tl.load(gate_ptr + token * gate_row + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + token * dy_row + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + token * groups + group, mask=there, other=0.0)
        act, slope = value_and_slope(gate, 1.0, ACTIVATION, PRECISE)
        x = t.to(tl.float32)
        xhat = x * rstd if AFTER else tl.where(mask, x * act, 0.0) * rstd
        kept = xhat.to(t.dtype).to(tl.float32) if ROUND_INPUT else xhat
        if dweight_ptr is not None:
            dweight += g * kept * act if AFTER else g * kept
        if weight_ptr is not None:
            w = tl.load(weight_ptr + at, mask=inside, other=0.0, eviction_policy="evict_last")
            g = g * (w.to(tl.float32) + OFFSET)
        out = token * (width * groups) + at
        if AFTER:
            if dgate_ptr is not None:
                dgate = g * kept * slope
                tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
            g = g * act
        if (dx_ptr is not None) or (not AFTER):
            d = rstd * (g - xhat * _mean(g * xhat, width))
            if not AFTER:
                if dgate_ptr is not None:
                    dgate = d * x * slope
                    tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
                d = d * act
            if dx_ptr is not None:
                tl.store(dx_ptr + out, d.to(dx_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        sums = dweight_ptr + split.to(tl.int64) * (width * groups) + at
        tl.store(sums, columns_of(dweight, ROWS), mask=inside)


_forward, _backward, _sums = (
    Launcher(gated_forward),
    Launcher(gated_backward),
    Launcher(column_sums),
)


class _Cut(NamedTuple):
    rows: int
    block: int
    warps: int


def _cut(width: int, per_thread: int, limits: device.Limits, least: int = 2048) -> _Cut:
    """Some numbers a tile at least, and some to a thread."""
    block = power_of_two(width)
    rows = max(1, min(16, least // block))
    threads = max(128, min(1024, rows * block // per_thread))
    return _Cut(rows, block, threads // limits.warp)


def launch_forward(
    x: torch.Tensor, gate: torch.Tensor, weight: Maybe, y: torch.Tensor, rstd: torch.Tensor,
    eps: float, offset: float, cast: str, after: bool, activation: str, width: int,
) -> None:  # fmt: skip
    """Fill the dense y and rstd."""
    (x, x_row), (gate, gate_row) = rows_of(x), rows_of(gate)
    groups, tokens = x.shape[-1] // width, x.numel() // x.shape[-1]
    cut = _cut(width, 16, device.limits(x.device))
    precise = y.dtype is torch.float32
    with on_device_of(x):
        _forward(
            (-(-tokens // cut.rows) * groups, 1),
            (x, gate, None if weight is None else weight.contiguous(), y, rstd),
            (tokens, width, groups, x_row, gate_row, eps),
            (offset, cast == "input", after, activation, precise, cut.rows, cut.block),
            cut.warps,
        )


def launch_backward(
    dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, weight: Maybe, rstd: torch.Tensor,
    dx: Maybe, dgate: Maybe, dweight: Maybe,
    offset: float, cast: str, after: bool, activation: str, width: int,
) -> None:  # fmt: skip
    """Fill the dense dx, dgate and dweight, those that are given."""
    (dy, dy_row), (x, x_row), (gate, gate_row) = rows_of(dy), rows_of(x), rows_of(gate)
    groups, tokens = x.shape[-1] // width, x.numel() // x.shape[-1]
    limits = device.limits(x.device)
    cut = _cut(width, 4 if width > 2048 else 8, limits, 1024)
    tiles = -(-tokens // cut.rows)
    per_sm = max(1, 1024 // (cut.warps * limits.warp))
    most = max(1, min(tiles, per_sm * limits.multiprocessors // groups))
    splits = -(-tiles // -(-tiles // most)) if dweight is not None else tiles
    partial = None
    if dweight is not None:
        partial = torch.empty((splits, width * groups), dtype=torch.float32, device=x.device)
    precise = x.dtype is torch.float32
    with on_device_of(x):
        _backward(
            (splits * groups, 1),
            (dy, x, gate, None if weight is None else weight.contiguous(), rstd.contiguous(),
             dx, dgate, partial),
            (tokens, width, groups, dy_row, x_row, gate_row),
            (offset, cast == "input", after, activation, precise, cut.rows, cut.block),
            cut.warps,
        )  # fmt: skip
        if partial is not None:
            rows = max(8, min(512, power_of_two(splits)))
            _sums(
                (-(-width * groups // 8), 1),
                (partial, dweight, None),
                (splits, width * groups),
                (rows, 8),
                4,
            )
