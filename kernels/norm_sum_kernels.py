"""Triton kernels that sum over the rows for the gradients of a norm's weight and bias.

``weight_gradients`` is for what ``norm_backward`` does not sum on its way; ``column_sums`` adds up
what the programs of either left, in a fixed order.
"""

from __future__ import annotations

from fusewright.kernels.launch import tl, triton
from fusewright.kernels.norm_kernels import columns_of, row_offset


@triton.jit
def weight_gradients(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr,
    rows, width, inner, dy_outer, dy_inner, x_outer, x_inner, blocks,
    CENTERED: tl.constexpr, ROUND_INPUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums as in ``norm_backward`` where a whole row of them does not fit in registers.

    A program takes BLOCK columns of every tile that is its turn.
    """
    split, splits = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    columns = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = columns < width
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(split * ROWS, rows, splits * ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < rows)[:, None]
        mask = there & inside
        at = row_offset(row, inner, dy_outer, dy_inner) + columns
        g = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            at = row_offset(row, inner, x_outer, x_inner) + columns
            t = tl.load(x_ptr + at, mask=mask, other=0.0)
            xhat = t.to(tl.float32)
            if CENTERED:
                xhat -= tl.load(mean_ptr + row[:, None], mask=there, other=0.0)
            xhat *= tl.load(rstd_ptr + row[:, None], mask=there, other=0.0)
            if ROUND_INPUT:
                xhat = xhat.to(t.dtype).to(tl.float32)
            dweight += g * xhat
        if dbias_ptr is not None:
            dbias += g
    at = split.to(tl.int64) * width + columns
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, columns_of(dweight, ROWS), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, columns_of(dbias, ROWS), mask=inside)


@triton.jit
def sum_columns(partial_ptr, sum_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the ``rows`` partial rows of one gradient, for the program's columns."""
    columns = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = columns < width
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, rows, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        at = row.to(tl.int64) * width + columns
        total += tl.load(partial_ptr + at, mask=(row < rows) & inside, other=0.0)
    result = tl.sum(total, 0)[None, :]
    tl.store(sum_ptr + columns, result.to(sum_ptr.dtype.element_ty), mask=inside)


@triton.jit
def column_sums(
    partial_ptr, first_ptr, second_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the ``rows`` partial rows of one gradient, or of two that lie one behind the other."""
    if tl.program_id(1) == 0:
        sum_columns(partial_ptr, first_ptr, rows, width, ROWS, BLOCK)
    elif second_ptr is not None:
        behind = partial_ptr + tl.cast(rows, tl.int64) * width
        sum_columns(behind, second_ptr, rows, width, ROWS, BLOCK)
