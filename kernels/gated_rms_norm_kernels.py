"""The Triton kernels of the gated RMS norm; the mathematics is in gated_rms_norm.

A program takes one group of columns of ROWS tokens at a time. As in norm_kernels a row is PIECES
pieces of PIECE columns, and all of it is asked for before any of it is used. The backward's programs
walk over the tokens with the sums of the weight's gradient in registers, which ``column_sums`` adds in
order.
"""

from __future__ import annotations

from fusewright.kernels.elementary import value, value_and_slope
from fusewright.kernels.launch import tl, triton
from fusewright.kernels.norm_kernels import (
    _columns,
    _mask,
    _of_width,
    _pieces,
    _vector,
    _weights,
    columns_of,
)


@triton.jit
def _begin(token, row_stride, group, width):
    """Where a group of tokens begins, as a column."""
    return token.to(tl.int64)[:, None] * row_stride + group * width


@triton.jit
def _within(t, columns, width, at: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr):
    """``t``, and 0 beyond the row, where the activation of 0 may be anything."""
    return t if EVEN or at < PIECES - 1 else tl.where(columns < width, t, 0.0)


@triton.jit
def _plus(t, OFFSET: tl.constexpr):
    return t if OFFSET == 0.0 else t + OFFSET


@triton.jit
def gated_forward(
    x_ptr, gate_ptr, weight_ptr, y_ptr, rstd_ptr, tokens, width, groups, x_row, gate_row, eps,
    OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, AFTER: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y and rstd."""
    group = tl.program_id(0) % groups
    token = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    there = (token < tokens)[:, None]
    taken = _pieces(x_ptr + _begin(token, x_row, group, width), there, width, PIECE, PIECES, EVEN)
    gates = _pieces(
        gate_ptr + _begin(token, gate_row, group, width), there, width, PIECE, PIECES, EVEN
    )
    squares = tl.zeros([ROWS, PIECE], tl.float32)
    acts = ()
    for at in tl.static_range(PIECES):
        x = taken[at].to(tl.float32)
        act = value(gates[at].to(tl.float32), 1.0, ACTIVATION, PRECISE)
        acts = acts + (act,)
        if not AFTER:
            x = _within(x * act, _columns(at, PIECE), width, at, PIECES, EVEN)
        squares += x * x
    rstd = tl.div_rn(1.0, tl.sqrt_rn(_of_width(tl.sum(squares, 1), width)[:, None] + eps))
    to = y_ptr + _begin(token, width * groups, group, width)
    for at in tl.static_range(PIECES):
        columns = _columns(at, PIECE)
        t, act = taken[at], acts[at]
        y = t.to(tl.float32)
        if not AFTER:
            y = y * act
        y = y * rstd
        if ROUND_INPUT:
            y = y.to(t.dtype).to(tl.float32)
        if weight_ptr is not None:
            w = _vector(weight_ptr + group * width, columns, width, at, PIECES, EVEN)
            y = y * _plus(w.to(tl.float32), OFFSET)
        if AFTER:
            y = y * act
        mask = _mask(there, columns, width, at, PIECES, EVEN)
        tl.store(to + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + token.to(tl.int64)[:, None] * groups + group, rstd, mask=there)


@triton.jit
def _gain(
    weights, weight_ptr, columns, width, at: tl.constexpr, PIECES: tl.constexpr,
    EVEN: tl.constexpr, OFFSET: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """offset + w of a piece."""
    if HOIST:
        w = weights[at]
    else:
        w = _vector(weight_ptr, columns, width, at, PIECES, EVEN)
    return _plus(w.to(tl.float32), OFFSET)


@triton.jit
def _store_gradients(
    there, taken, gates, given, weights, rstd, along, out, weight_ptr, dx_ptr, dgate_ptr, width,
    OFFSET: tl.constexpr, AFTER: tl.constexpr, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr, HOIST: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """Store dx, and dgate where the gate comes before the norm, of a tile whose means are known."""
    # 1, which the compiler cannot know: what follows is worked out again, not held.
    one = tl.where(tl.abs(along) >= 0.0, 1.0, along)
    for at in tl.static_range(PIECES):
        columns = _columns(at, PIECE)
        mask = _mask(there, columns, width, at, PIECES, EVEN)
        x, g, z = taken[at].to(tl.float32), given[at].to(tl.float32), gates[at].to(tl.float32)
        if AGAIN:
            x, g, z = x * one, g * one, z * one
        act, slope = value_and_slope(z, 1.0, ACTIVATION, PRECISE)
        if weight_ptr is not None:
            g = g * _gain(weights, weight_ptr, columns, width, at, PIECES, EVEN, OFFSET, HOIST)
        if AFTER:
            d = rstd * (g * act - x * rstd * along)
        else:
            d = rstd * (g - x * act * rstd * along)
            if dgate_ptr is not None:
                dgate = (d * x * slope).to(dgate_ptr.dtype.element_ty)
                tl.store(dgate_ptr + (out + columns), dgate, mask=mask)
            d = d * act
        if dx_ptr is not None:
            tl.store(dx_ptr + (out + columns), d.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_tile(
    first, group, weights, dweight,
    dy_ptr, x_ptr, gate_ptr, weight_ptr, rstd_ptr, dx_ptr, dgate_ptr,
    tokens, width, groups, dy_row, x_row, gate_row,
    OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, AFTER: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr,
    PIECES: tl.constexpr, EVEN: tl.constexpr, HOIST: tl.constexpr, AGAIN: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Store dx and dgate of a tile; the sums of the weight's gradient with the tile added."""
    token = first + tl.arange(0, ROWS)
    there = (token < tokens)[:, None]
    x_at = x_ptr + _begin(token, x_row, group, width)
    gate_at = gate_ptr + _begin(token, gate_row, group, width)
    dy_at = dy_ptr + _begin(token, dy_row, group, width)
    # One load a row, not one a number: this form keeps it in the layout of the row's sums.
    at_rstd = rstd_ptr + token.to(tl.int64) * groups + group
    rstd = tl.load(at_rstd, mask=token < tokens, other=0.0)[:, None]
    taken = _pieces(x_at, there, width, PIECE, PIECES, EVEN)
    gates = _pieces(gate_at, there, width, PIECE, PIECES, EVEN)
    given = _pieces(dy_at, there, width, PIECE, PIECES, EVEN)
    out = _begin(token, width * groups, group, width)
    products = tl.zeros([ROWS, PIECE], tl.float32)
    added = ()
    for at in tl.static_range(PIECES):
        columns = _columns(at, PIECE)
        t, g = taken[at], given[at].to(tl.float32)
        act, slope = value_and_slope(gates[at].to(tl.float32), 1.0, ACTIVATION, PRECISE)
        x = t.to(tl.float32)
        if not AFTER:
            x = _within(x * act, columns, width, at, PIECES, EVEN)
        xhat = x * rstd
        kept = xhat.to(t.dtype).to(tl.float32) if ROUND_INPUT else xhat
        dw = dweight[at]
        if SUM:
            dw += g * kept * act if AFTER else g * kept
        added = added + (dw,)
        if weight_ptr is not None:
            g = g * _gain(weights, weight_ptr, columns, width, at, PIECES, EVEN, OFFSET, HOIST)
        if AFTER:
            if dgate_ptr is not None:
                mask = _mask(there, columns, width, at, PIECES, EVEN)
                dgate = g * kept * slope
                tl.store(
                    dgate_ptr + (out + columns), dgate.to(dgate_ptr.dtype.element_ty), mask=mask
                )
            g = _within(g * act, columns, width, at, PIECES, EVEN)
        products += g * xhat
    if (dx_ptr is not None) or ((dgate_ptr is not None) and not AFTER):
        along = _of_width(tl.sum(products, 1), width)[:, None]
        _store_gradients(
            there, taken, gates, given, weights, rstd, along, out, weight_ptr, dx_ptr, dgate_ptr,
            width, OFFSET, AFTER, ACTIVATION, PRECISE, PIECE, PIECES, EVEN, HOIST, AGAIN,
        )  # fmt: skip
    return added


@triton.jit
def gated_backward(
    dy_ptr, x_ptr, gate_ptr, weight_ptr, rstd_ptr, dx_ptr, dgate_ptr, dweight_ptr,
    tokens, width, groups, dy_row, x_row, gate_row,
    OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, AFTER: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr,
    LOOP: tl.constexpr, STAGES: tl.constexpr, HOIST: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """dx, dgate, and one row of partial sums of the weight's gradient per program of a group."""
    SUM: tl.constexpr = dweight_ptr is not None
    group = tl.program_id(0) % groups
    split, splits = tl.program_id(0) // groups, tl.num_programs(0) // groups
    dweight, weights = (), ()
    for _ in tl.static_range(PIECES):
        dweight = dweight + (tl.zeros([ROWS, PIECE if SUM else 1], tl.float32),)
    if weight_ptr is not None:
        weight_ptr += group * width
        if HOIST:
            weights = _weights(weight_ptr, width, PIECE, PIECES, EVEN)
    if LOOP:
        for first in tl.range(split * ROWS, tokens, splits * ROWS, num_stages=STAGES):
            dweight = _backward_tile(
                first, group, weights, dweight,
                dy_ptr, x_ptr, gate_ptr, weight_ptr, rstd_ptr, dx_ptr, dgate_ptr,
                tokens, width, groups, dy_row, x_row, gate_row,
                OFFSET, ROUND_INPUT, AFTER, ACTIVATION, PRECISE,
                ROWS, PIECE, PIECES, EVEN, HOIST, AGAIN, SUM,
            )  # fmt: skip
    else:
        dweight = _backward_tile(
            split * ROWS, group, weights, dweight,
            dy_ptr, x_ptr, gate_ptr, weight_ptr, rstd_ptr, dx_ptr, dgate_ptr,
            tokens, width, groups, dy_row, x_row, gate_row,
            OFFSET, ROUND_INPUT, AFTER, ACTIVATION, PRECISE,
            ROWS, PIECE, PIECES, EVEN, HOIST, AGAIN, SUM,
        )  # fmt: skip
    if SUM:
        start = dweight_ptr + split.to(tl.int64) * (width * groups) + group * width
        for at in tl.static_range(PIECES):
            columns = _columns(at, PIECE)
            tl.store(start + columns, columns_of(dweight[at], ROWS), mask=columns < width)
