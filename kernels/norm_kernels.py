"""Triton kernels of the row norms; the mathematics is in rms_norm, add_rms_norm and layer_norm.

A program takes tiles of ROWS whole rows, kept in registers between the statistics and the output.
Row ``i`` of a tensor lies at ``(i // inner) * outer stride + (i % inner) * inner stride``, which
covers every head of a slice of a fused projection; statistics and gradients are dense, in 64 bits.
With LOOP, a few programs per multiprocessor walk over the tiles with the weight in registers.

A row is BLOCK columns, a power of two, or with TAIL those and TAIL more: 5120 is 4096 and 1024, where
one block would idle for three eighths of it. FULL: BLOCK lies within the row; EVEN: all columns do.

Gradients of weight and bias: every program sums the rows that it took in the order of the loop;
``column_sums`` adds the programs' sums in a fixed order. The shapes alone decide the result.
"""

from __future__ import annotations

from fusewright.kernels.launch import tl, triton


@triton.jit
def _offset(row, inner, outer_stride, inner_stride):
    """Where the rows of a tile begin, as a column."""
    outer = row // inner
    at = outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride
    return at[:, None]


@triton.jit
def _mean(t, tail, width, TAIL: tl.constexpr):
    """The mean of each row as a column, correctly rounded from its sum."""
    total = tl.sum(t, 1)
    if TAIL and t.shape[0] == 1:
        # As numbers: two tensors would have to agree on a layout, and whole rows be moved for it.
        total = tl.full([1], 0.0, tl.float32) + (tl.sum(total, 0) + tl.sum(tl.sum(tail, 1), 0))
    elif TAIL:
        total += tl.sum(tail, 1)
    return tl.div_rn(total, tl.full([t.shape[0]], 0.0, tl.float32) + width)[:, None]


@triton.jit
def _tail_columns(BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """The columns after the first block; one, which nobody uses, where there are none."""
    return (BLOCK + tl.arange(0, TAIL if TAIL else 1))[None, :]


@triton.jit
def _centred(x, mean, inside, EVEN: tl.constexpr):
    x = x - mean
    return x if EVEN else tl.where(inside, x, 0.0)


@triton.jit
def _vector(ptr, columns, inside):
    """The weight or the bias, which every row needs again."""
    return tl.load(ptr + columns, mask=inside, other=0.0, eviction_policy="evict_last")


@triton.jit
def _hoisted(ptr, columns, inside, HOIST: tl.constexpr):
    """The vector if there is one and it is to stay in registers from tile to tile."""
    if ptr is None or not HOIST:
        return tl.zeros([1, 1], tl.float32)
    else:
        return _vector(ptr, columns, inside)


@triton.jit
def _mask(row, rows, inside, EVEN: tl.constexpr):
    there = (row < rows)[:, None]
    return there if EVEN else there & inside


@triton.jit
def _columns_of(t, ROWS: tl.constexpr):
    """The sums of the columns of a tile."""
    return t if ROWS == 1 else tl.sum(t, 0)[None, :]


@triton.jit
def _taken(
    row, width, columns, mask, x_at, residual_at, x_ptr, residual_ptr, sum_ptr,
):  # fmt: skip
    """A block of the rows to normalise; where there is a residual their sum, which is stored."""
    t = tl.load(x_ptr + (x_at + columns), mask=mask, other=0.0)
    if residual_ptr is not None:
        r = tl.load(residual_ptr + (residual_at + columns), mask=mask, other=0.0)
        t = (t.to(tl.float32) + r.to(tl.float32)).to(t.dtype)
        tl.store(sum_ptr + (row.to(tl.int64)[:, None] * width + columns), t, mask=mask)
    return t


@triton.jit
def _given(
    x, rstd, t, weight, bias, columns, inside, mask, y_at, weight_ptr, bias_ptr, y_ptr,
    OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Store a block of y."""
    y = x * rstd
    if ROUND_INPUT:
        y = y.to(t.dtype).to(tl.float32)
    if weight_ptr is not None:
        w = weight if HOIST else _vector(weight_ptr, columns, inside)
        y = y * (w.to(tl.float32) + OFFSET)
    if bias_ptr is not None:
        b = bias if HOIST else _vector(bias_ptr, columns, inside)
        y += b.to(tl.float32)
    tl.store(y_ptr + (y_at + columns), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_tile(
    first, weight, bias, columns, inside, HOIST: tl.constexpr,
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, width, inner, x_outer, x_inner, residual_outer, residual_inner, y_outer, y_inner, eps,
    OFFSET: tl.constexpr, CENTERED: tl.constexpr, ROUND_INPUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    FULL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    x_at = _offset(row, inner, x_outer, x_inner)
    residual_at = _offset(row, inner, residual_outer, residual_inner)
    mask = _mask(row, rows, inside, FULL)
    beyond = _tail_columns(BLOCK, TAIL)
    within = beyond < width
    rest = _mask(row, rows, within, EVEN)
    t = _taken(row, width, columns, mask, x_at, residual_at, x_ptr, residual_ptr, sum_ptr)
    x = t.to(tl.float32)
    tail = x
    if TAIL:
        last = _taken(row, width, beyond, rest, x_at, residual_at, x_ptr, residual_ptr, sum_ptr)
        tail = last.to(tl.float32)
    if CENTERED:
        mean = _mean(x, tail, width, TAIL)
        tl.store(mean_ptr + row[:, None], mean, mask=there)
        x = _centred(x, mean, inside, FULL)
        if TAIL:
            tail = _centred(tail, mean, within, EVEN)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(_mean(x * x, tail * tail, width, TAIL) + eps))
    tl.store(rstd_ptr + row[:, None], rstd, mask=there)
    y_at = _offset(row, inner, y_outer, y_inner)
    _given(x, rstd, t, weight, bias, columns, inside, mask, y_at,
           weight_ptr, bias_ptr, y_ptr, OFFSET, ROUND_INPUT, HOIST)  # fmt: skip
    if TAIL:
        _given(tail, rstd, t, weight, bias, beyond, within, rest, y_at,
               weight_ptr, bias_ptr, y_ptr, OFFSET, ROUND_INPUT, False)  # fmt: skip


@triton.jit
def norm_forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, width, inner, x_outer, x_inner, residual_outer, residual_inner, y_outer, y_inner, eps,
    OFFSET: tl.constexpr, CENTERED: tl.constexpr, ROUND_INPUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    FULL: tl.constexpr, EVEN: tl.constexpr,
    LOOP: tl.constexpr, STAGES: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """y, the statistics, and the sum with the residual where there is one."""
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < width
    weight = _hoisted(weight_ptr, columns, inside, HOIST)
    bias = _hoisted(bias_ptr, columns, inside, HOIST)
    start = tl.program_id(0) * ROWS
    if LOOP:
        for first in tl.range(start, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
            _forward_tile(
                first, weight, bias, columns, inside, HOIST,
                x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
                rows, width, inner, x_outer, x_inner, residual_outer, residual_inner,
                y_outer, y_inner, eps, OFFSET, CENTERED, ROUND_INPUT,
                ROWS, BLOCK, TAIL, FULL, EVEN,
            )  # fmt: skip
    else:
        _forward_tile(
            start, weight, bias, columns, inside, HOIST,
            x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
            rows, width, inner, x_outer, x_inner, residual_outer, residual_inner,
            y_outer, y_inner, eps, OFFSET, CENTERED, ROUND_INPUT, ROWS, BLOCK, TAIL, FULL, EVEN,
        )  # fmt: skip


@triton.jit
def _normalised(t, mean, rstd, inside, CENTERED: tl.constexpr, EVEN: tl.constexpr):
    """x^ of a block, 0 beyond the row."""
    x = t.to(tl.float32)
    if CENTERED:
        x = _centred(x, mean, inside, EVEN)
    return x * rstd


@triton.jit
def _scaled(
    g, weight, columns, inside, weight_ptr, OFFSET: tl.constexpr, HOIST: tl.constexpr
):  # fmt: skip
    """The gradient of x^ of a block from that of y."""
    if weight_ptr is None:
        return g
    else:
        w = weight if HOIST else _vector(weight_ptr, columns, inside)
        return g * (w.to(tl.float32) + OFFSET)


@triton.jit
def _added(
    g, xhat, t, dweight, dbias, dweight_ptr, dbias_ptr, ROUND_INPUT: tl.constexpr
):  # fmt: skip
    """The sums of the gradients of weight and bias with a block added."""
    if dweight_ptr is not None:
        dweight += g * (xhat.to(t.dtype).to(tl.float32) if ROUND_INPUT else xhat)
    if dbias_ptr is not None:
        dbias += g
    return dweight, dbias


@triton.jit
def _dx(
    g, xhat, along, shift, rstd, row, width, columns, mask, dsum_at, dsum_ptr, dx_ptr,
    CENTERED: tl.constexpr,
):  # fmt: skip
    """Store a block of dx."""
    d = g - xhat * along
    if CENTERED:
        d -= shift
    d = d * rstd
    if dsum_ptr is not None:
        d += tl.load(dsum_ptr + (dsum_at + columns), mask=mask, other=0.0).to(tl.float32)
    at = row.to(tl.int64)[:, None] * width + columns
    tl.store(dx_ptr + at, d.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_tile(
    first, weight, dweight, dbias, tail_dweight, tail_dbias, columns, inside,
    HOIST: tl.constexpr, RELOAD: tl.constexpr,
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, width, inner, dy_outer, dy_inner, dsum_outer, dsum_inner, x_outer, x_inner,
    OFFSET: tl.constexpr, CENTERED: tl.constexpr, ROUND_INPUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    FULL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    mask = _mask(row, rows, inside, FULL)
    beyond = _tail_columns(BLOCK, TAIL)
    within = beyond < width
    rest = _mask(row, rows, within, EVEN)
    x_at = x_ptr + (_offset(row, inner, x_outer, x_inner) + columns)
    dy_at = dy_ptr + (_offset(row, inner, dy_outer, dy_inner) + columns)
    rstd = tl.load(rstd_ptr + row[:, None], mask=there, other=0.0)
    mean = rstd
    if CENTERED:
        mean = tl.load(mean_ptr + row[:, None], mask=there, other=0.0)
    t = tl.load(x_at, mask=mask, other=0.0, eviction_policy="evict_last" if RELOAD else "")
    g = tl.load(dy_at, mask=mask, other=0.0, eviction_policy="evict_last" if RELOAD else "")
    g = g.to(tl.float32)
    xhat = _normalised(t, mean, rstd, inside, CENTERED, FULL)
    tail, tail_g = xhat, g
    if TAIL:
        at = _offset(row, inner, x_outer, x_inner) + beyond
        last = tl.load(x_ptr + at, mask=rest, other=0.0)
        at = _offset(row, inner, dy_outer, dy_inner) + beyond
        tail_g = tl.load(dy_ptr + at, mask=rest, other=0.0).to(tl.float32)
        tail = _normalised(last, mean, rstd, within, CENTERED, EVEN)
        tail_dweight, tail_dbias = _added(
            tail_g, tail, last, tail_dweight, tail_dbias, dweight_ptr, dbias_ptr, ROUND_INPUT
        )
    dweight, dbias = _added(g, xhat, t, dweight, dbias, dweight_ptr, dbias_ptr, ROUND_INPUT)
    if dx_ptr is not None:
        g = _scaled(g, weight, columns, inside, weight_ptr, OFFSET, HOIST)
        if TAIL:
            tail_g = _scaled(tail_g, weight, beyond, within, weight_ptr, OFFSET, False)
        along = _mean(g * xhat, tail_g * tail, width, TAIL)
        shift = along
        if CENTERED:
            shift = _mean(g, tail_g, width, TAIL)
        if RELOAD:
            # The row is in the first cache now; to hold it would cost the registers of another row.
            t = tl.load(x_at, mask=mask, other=0.0, eviction_policy="evict_first")
            xhat = _normalised(t, mean, rstd, inside, CENTERED, FULL)
            g = tl.load(dy_at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            g = _scaled(g, weight, columns, inside, weight_ptr, OFFSET, False)
        dsum_at = _offset(row, inner, dsum_outer, dsum_inner)
        _dx(g, xhat, along, shift, rstd, row, width, columns, mask, dsum_at, dsum_ptr, dx_ptr,
            CENTERED)  # fmt: skip
        if TAIL:
            _dx(tail_g, tail, along, shift, rstd, row, width, beyond, rest, dsum_at, dsum_ptr,
                dx_ptr, CENTERED)  # fmt: skip
    return dweight, dbias, tail_dweight, tail_dbias


@triton.jit
def norm_backward(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, width, inner, dy_outer, dy_inner, dsum_outer, dsum_inner, x_outer, x_inner,
    OFFSET: tl.constexpr, CENTERED: tl.constexpr, ROUND_INPUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    FULL: tl.constexpr, EVEN: tl.constexpr,
    LOOP: tl.constexpr, STAGES: tl.constexpr, HOIST: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """dx, and one row of partial sums of the gradients of weight and bias per program."""
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < width
    weight = _hoisted(weight_ptr, columns, inside, HOIST)
    dw = tl.zeros([ROWS, 1 if dweight_ptr is None else BLOCK], tl.float32)
    db = tl.zeros([ROWS, 1 if dbias_ptr is None else BLOCK], tl.float32)
    tail_dw = tl.zeros([ROWS, TAIL if TAIL and dweight_ptr is not None else 1], tl.float32)
    tail_db = tl.zeros([ROWS, TAIL if TAIL and dbias_ptr is not None else 1], tl.float32)
    start = tl.program_id(0) * ROWS
    if LOOP:
        for first in tl.range(start, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
            dw, db, tail_dw, tail_db = _backward_tile(
                first, weight, dw, db, tail_dw, tail_db, columns, inside, HOIST, RELOAD,
                dy_ptr, dsum_ptr, x_ptr, weight_ptr,
                mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, width, inner,
                dy_outer, dy_inner, dsum_outer, dsum_inner, x_outer, x_inner,
                OFFSET, CENTERED, ROUND_INPUT, ROWS, BLOCK, TAIL, FULL, EVEN,
            )  # fmt: skip
    else:
        dw, db, tail_dw, tail_db = _backward_tile(
            start, weight, dw, db, tail_dw, tail_db, columns, inside, HOIST, RELOAD,
            dy_ptr, dsum_ptr, x_ptr, weight_ptr,
            mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, width, inner,
            dy_outer, dy_inner, dsum_outer, dsum_inner, x_outer, x_inner,
            OFFSET, CENTERED, ROUND_INPUT, ROWS, BLOCK, TAIL, FULL, EVEN,
        )  # fmt: skip
    _store_sums(dweight_ptr, dw, tail_dw, columns, width, ROWS, BLOCK, TAIL)
    _store_sums(dbias_ptr, db, tail_db, columns, width, ROWS, BLOCK, TAIL)


@triton.jit
def _store_sums(
    ptr, sums, tail, columns, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
):
    """This program's row of partial sums, where they are wanted."""
    if ptr is not None:
        at = ptr + tl.program_id(0).to(tl.int64) * width
        tl.store(at + columns, _columns_of(sums, ROWS), mask=columns < width)
        if TAIL:
            beyond = _tail_columns(BLOCK, TAIL)
            tl.store(at + beyond, _columns_of(tail, ROWS), mask=beyond < width)


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
        at = _offset(row, inner, dy_outer, dy_inner) + columns
        g = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if dweight_ptr is not None:
            at = _offset(row, inner, x_outer, x_inner) + columns
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
        tl.store(dweight_ptr + at, _columns_of(dweight, ROWS), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, _columns_of(dbias, ROWS), mask=inside)


@triton.jit
def column_sums(
    partial_ptr, first_ptr, second_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the ``rows`` partial rows of one gradient, or of two that lie one behind the other."""
    which = tl.program_id(1)
    columns = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = columns < width
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, rows, ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        at = (which * rows + row).to(tl.int64) * width + columns
        total += tl.load(partial_ptr + at, mask=(row < rows) & inside, other=0.0)
    result = tl.sum(total, 0)[None, :]
    if which == 0:
        tl.store(first_ptr + columns, result.to(first_ptr.dtype.element_ty), mask=inside)
    elif second_ptr is not None:
        tl.store(second_ptr + columns, result.to(second_ptr.dtype.element_ty), mask=inside)
