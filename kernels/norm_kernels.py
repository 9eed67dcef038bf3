"""Triton kernels of the row norms; the mathematics is in rms_norm, add_rms_norm and layer_norm.

A program takes tiles of ROWS whole rows, kept in registers between the statistics and the output.
Row ``i`` of a tensor lies at ``(i // inner) * outer stride + (i % inner) * inner stride``, which
covers every head of a slice of a fused projection; statistics and gradients are dense, in 64 bits.
With LOOP, a few programs per multiprocessor walk over the tiles.

A row is PIECES pieces of PIECE columns, a power of two: 5120 is five times 1024, where one block of
8192 would idle for three eighths of it. All pieces are spread over the threads alike, so that a sum
over the row adds the pieces first, number by number, and then goes once through the threads. EVEN:
the last piece ends with the row, as the others always do.

Gradients of weight and bias: every program sums the rows that it took in the order of the loop;
``column_sums`` adds the programs' sums in a fixed order. The shapes alone decide the result.
"""

from __future__ import annotations

from fusewright.kernels.launch import tl, triton


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Where the rows of a tile begin, as a column."""
    outer = row // inner
    at = outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride
    return at[:, None]


@triton.jit
def _columns(at: tl.constexpr, PIECE: tl.constexpr):
    """The columns of a piece, as a row."""
    return (at * PIECE + tl.arange(0, PIECE))[None, :]


@triton.jit
def _mask(there, columns, width, at: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr):
    """Which numbers of a piece exist; only the last one may reach beyond the row."""
    return there if EVEN or at < PIECES - 1 else there & (columns < width)


@triton.jit
def _of_width(sums, width):
    """Sums over rows, as means: correctly rounded quotients."""
    return tl.div_rn(sums, tl.full(sums.shape, 0.0, tl.float32) + width)


@triton.jit
def _mean(t, width):
    """The mean of each row as a column, from the sum of the row's pieces."""
    return _of_width(tl.sum(t, 1), width)[:, None]


@triton.jit
def _two_means(a, b, width):
    """Two means at once: side by side in a thread, they cross the threads together."""
    means = _of_width(tl.sum(tl.join(a, b), 1), width)
    first, second = tl.split(means)
    return first[:, None], second[:, None]


@triton.jit
def _centred(
    x, mean, columns, width, at: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """x - mean, 0 beyond the row."""
    x = x - mean
    return x if EVEN or at < PIECES - 1 else tl.where(columns < width, x, 0.0)


@triton.jit
def _vector(
    ptr, columns, width, at: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """A piece of the weight or the bias, which every row needs again."""
    inside = _mask(columns >= 0, columns, width, at, PIECES, EVEN)
    return tl.load(ptr + columns, mask=inside, other=0.0, eviction_policy="evict_last")


@triton.jit
def columns_of(t, ROWS: tl.constexpr):
    """The sums of the columns of a tile."""
    return t if ROWS == 1 else tl.sum(t, 0)[None, :]


@triton.jit
def _taken(
    row, width, columns, mask, x_at, residual_at, x_ptr, residual_ptr, sum_ptr, LATE: tl.constexpr
):  # fmt: skip
    """A piece of the rows to normalise; where there is a residual their sum, which is stored."""
    t = tl.load(
        x_ptr + (x_at + columns), mask=mask, other=0.0, eviction_policy="evict_last" if LATE else ""
    )
    if residual_ptr is not None:
        r = tl.load(residual_ptr + (residual_at + columns), mask=mask, other=0.0)
        t = (t.to(tl.float32) + r.to(tl.float32)).to(t.dtype)
        tl.store(sum_ptr + (row.to(tl.int64)[:, None] * width + columns), t, mask=mask)
    return t


@triton.jit
def _forward_tile(
    first,
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, width, inner, x_outer, x_inner, residual_outer, residual_inner, y_outer, y_inner, eps,
    OFFSET: tl.constexpr, CENTERED: tl.constexpr, ROUND_INPUT: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr,
    RELOAD: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    x_at = row_offset(row, inner, x_outer, x_inner)
    residual_at = row_offset(row, inner, residual_outer, residual_inner)
    taken = ()
    for at in tl.static_range(PIECES):
        columns = _columns(at, PIECE)
        mask = _mask(there, columns, width, at, PIECES, EVEN)
        t = _taken(
            row, width, columns, mask, x_at, residual_at, x_ptr, residual_ptr, sum_ptr, RELOAD
        )
        taken = taken + (t,)
    mean = tl.zeros([ROWS, 1], tl.float32)
    if CENTERED:
        total = taken[0].to(tl.float32)
        for at in tl.static_range(1, PIECES):
            total += taken[at].to(tl.float32)
        mean = _mean(total, width)
        tl.store(mean_ptr + row[:, None], mean, mask=there)
    squares = tl.zeros([ROWS, PIECE], tl.float32)
    for at in tl.static_range(PIECES):
        x = taken[at].to(tl.float32)
        if CENTERED:
            x = _centred(x, mean, _columns(at, PIECE), width, at, PIECES, EVEN)
        squares += x * x
    rstd = tl.div_rn(1.0, tl.sqrt_rn(_mean(squares, width) + eps))
    tl.store(rstd_ptr + row[:, None], rstd, mask=there)
    y_at = row_offset(row, inner, y_outer, y_inner)
    for at in tl.static_range(PIECES):
        columns = _columns(at, PIECE)
        mask = _mask(there, columns, width, at, PIECES, EVEN)
        t = taken[at]
        if RELOAD:
            # The row is in the first cache now; to hold it would cost another row its registers.
            t = tl.load(
                x_ptr + (x_at + columns), mask=mask, other=0.0, eviction_policy="evict_first"
            )
        y = t.to(tl.float32)
        if CENTERED:
            y = y - mean
        y = y * rstd
        if ROUND_INPUT:
            y = y.to(t.dtype).to(tl.float32)
        if weight_ptr is not None:
            w = _vector(weight_ptr, columns, width, at, PIECES, EVEN)
            y = y * (w.to(tl.float32) + OFFSET)
        if bias_ptr is not None:
            y += _vector(bias_ptr, columns, width, at, PIECES, EVEN).to(tl.float32)
        tl.store(y_ptr + (y_at + columns), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, width, inner, x_outer, x_inner, residual_outer, residual_inner, y_outer, y_inner, eps,
    OFFSET: tl.constexpr, CENTERED: tl.constexpr, ROUND_INPUT: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr,
    LOOP: tl.constexpr, STAGES: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """y, the statistics, and the sum with the residual where there is one."""
    start = tl.program_id(0) * ROWS
    if LOOP:
        for first in tl.range(start, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
            _forward_tile(
                first,
                x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
                rows, width, inner, x_outer, x_inner, residual_outer, residual_inner,
                y_outer, y_inner, eps, OFFSET, CENTERED, ROUND_INPUT,
                ROWS, PIECE, PIECES, EVEN, RELOAD,
            )  # fmt: skip
    else:
        _forward_tile(
            start,
            x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
            rows, width, inner, x_outer, x_inner, residual_outer, residual_inner,
            y_outer, y_inner, eps, OFFSET, CENTERED, ROUND_INPUT,
            ROWS, PIECE, PIECES, EVEN, RELOAD,
        )  # fmt: skip


@triton.jit
def _normalised(
    t, mean, rstd, columns, width, at: tl.constexpr, PIECES: tl.constexpr,
    CENTERED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x^ of a piece, 0 beyond the row."""
    x = t.to(tl.float32)
    if CENTERED:
        x = _centred(x, mean, columns, width, at, PIECES, EVEN)
    return x * rstd


@triton.jit
def _weights(
    ptr, width, PIECE: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """All pieces of the weight if there is one."""
    pieces = ()
    if ptr is not None:
        for at in tl.static_range(PIECES):
            pieces = pieces + (_vector(ptr, _columns(at, PIECE), width, at, PIECES, EVEN),)
    return pieces


@triton.jit
def _pieces(
    ptr, there, width, PIECE: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """All pieces of some rows."""
    pieces = ()
    for at in tl.static_range(PIECES):
        columns = _columns(at, PIECE)
        mask = _mask(there, columns, width, at, PIECES, EVEN)
        pieces = pieces + (tl.load(ptr + columns, mask=mask, other=0.0),)
    return pieces


@triton.jit
def _held(
    weights, ptr, columns, width, at: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr,
    AGAIN: tl.constexpr,
):  # fmt: skip
    """A piece of the weight, from registers or from the cache."""
    if AGAIN:
        return _vector(ptr, columns, width, at, PIECES, EVEN)
    else:
        return weights[at]


@triton.jit
def _means(products, shifts, width, CENTERED: tl.constexpr):
    """mean(g x^), and mean(g) where the norm is centred."""
    if CENTERED:
        return _two_means(products, shifts, width)
    else:
        along = _mean(products, width)
        return along, along


@triton.jit
def _store_dx(
    row, there, taken, given, weights, along, shift, mean, rstd, x_at, dy_at,
    dsum_ptr, weight_ptr, dx_ptr, width, inner, dsum_outer, dsum_inner,
    OFFSET: tl.constexpr, CENTERED: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    EVEN: tl.constexpr, HOIST: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """Store dx of a tile whose means are known."""
    for at in tl.static_range(PIECES):
        columns = _columns(at, PIECE)
        mask = _mask(there, columns, width, at, PIECES, EVEN)
        if RELOAD:
            # The row is in the first cache now; to hold it would cost another its registers.
            t = tl.load(x_at + columns, mask=mask, other=0.0, eviction_policy="evict_first")
            g = tl.load(dy_at + columns, mask=mask, other=0.0, eviction_policy="evict_first")
        else:
            t, g = taken[at], given[at]
        xhat = _normalised(t, mean, rstd, columns, width, at, PIECES, CENTERED, EVEN)
        g = g.to(tl.float32)
        if weight_ptr is not None:
            w = _held(weights, weight_ptr, columns, width, at, PIECES, EVEN, RELOAD and not HOIST)
            g = g * (w.to(tl.float32) + OFFSET)
        d = g - xhat * along
        if CENTERED:
            d -= shift
        d = d * rstd
        if dsum_ptr is not None:
            dsum_at = row_offset(row, inner, dsum_outer, dsum_inner) + columns
            d += tl.load(dsum_ptr + dsum_at, mask=mask, other=0.0).to(tl.float32)
        dx_at = row.to(tl.int64)[:, None] * width + columns
        tl.store(dx_ptr + dx_at, d.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_tile(
    first, held, dweight, dbias,
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, width, inner, dy_outer, dy_inner, dsum_outer, dsum_inner, x_outer, x_inner,
    OFFSET: tl.constexpr, CENTERED: tl.constexpr, ROUND_INPUT: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr,
    HOIST: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """Store dx of a tile; the sums of the gradients of weight and bias with the tile added."""
    row = first + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    x_at = x_ptr + row_offset(row, inner, x_outer, x_inner)
    dy_at = dy_ptr + row_offset(row, inner, dy_outer, dy_inner)
    rstd = tl.load(rstd_ptr + row[:, None], mask=there, other=0.0)
    mean = rstd
    if CENTERED:
        mean = tl.load(mean_ptr + row[:, None], mask=there, other=0.0)
    taken, given = (), ()
    if not RELOAD:
        # All of the row is asked for before any of it is used: more bytes are in flight.
        taken = _pieces(x_at, there, width, PIECE, PIECES, EVEN)
        given = _pieces(dy_at, there, width, PIECE, PIECES, EVEN)
    weights = held
    if not (HOIST or RELOAD):
        weights = _weights(weight_ptr, width, PIECE, PIECES, EVEN)
    products = tl.zeros([ROWS, PIECE], tl.float32)
    shifts = tl.zeros([ROWS, PIECE], tl.float32)
    new_dweight, new_dbias = (), ()
    for at in tl.static_range(PIECES):
        columns = _columns(at, PIECE)
        if RELOAD:
            mask = _mask(there, columns, width, at, PIECES, EVEN)
            t = tl.load(x_at + columns, mask=mask, other=0.0, eviction_policy="evict_last")
            g = tl.load(dy_at + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        else:
            t, g = taken[at], given[at]
        xhat = _normalised(t, mean, rstd, columns, width, at, PIECES, CENTERED, EVEN)
        g = g.to(tl.float32)
        dw, db = dweight[at], dbias[at]
        if dweight_ptr is not None:
            dw += g * (xhat.to(t.dtype).to(tl.float32) if ROUND_INPUT else xhat)
        if dbias_ptr is not None:
            db += g
        new_dweight, new_dbias = new_dweight + (dw,), new_dbias + (db,)
        if weight_ptr is not None:
            w = _held(weights, weight_ptr, columns, width, at, PIECES, EVEN, RELOAD and not HOIST)
            g = g * (w.to(tl.float32) + OFFSET)
        products += g * xhat
        if CENTERED:
            shifts += g
    if dx_ptr is not None:
        along, shift = _means(products, shifts, width, CENTERED)
        _store_dx(
            row, there, taken, given, weights, along, shift, mean, rstd, x_at, dy_at,
            dsum_ptr, weight_ptr, dx_ptr, width, inner, dsum_outer, dsum_inner,
            OFFSET, CENTERED, PIECE, PIECES, EVEN, HOIST, RELOAD,
        )  # fmt: skip
    return new_dweight, new_dbias


@triton.jit
def norm_backward(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    rows, width, inner, dy_outer, dy_inner, dsum_outer, dsum_inner, x_outer, x_inner,
    OFFSET: tl.constexpr, CENTERED: tl.constexpr, ROUND_INPUT: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr,
    LOOP: tl.constexpr, STAGES: tl.constexpr, HOIST: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """dx, and one row of partial sums of the gradients of weight and bias per program."""
    held, dw, db = (), (), ()
    if HOIST:
        held = _weights(weight_ptr, width, PIECE, PIECES, EVEN)
    for _ in tl.static_range(PIECES):
        dw = dw + (tl.zeros([ROWS, 1 if dweight_ptr is None else PIECE], tl.float32),)
        db = db + (tl.zeros([ROWS, 1 if dbias_ptr is None else PIECE], tl.float32),)
    start = tl.program_id(0) * ROWS
    if LOOP:
        for first in tl.range(start, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
            dw, db = _backward_tile(
                first, held, dw, db,
                dy_ptr, dsum_ptr, x_ptr, weight_ptr,
                mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, width, inner,
                dy_outer, dy_inner, dsum_outer, dsum_inner, x_outer, x_inner,
                OFFSET, CENTERED, ROUND_INPUT, ROWS, PIECE, PIECES, EVEN, HOIST, RELOAD,
            )  # fmt: skip
    else:
        dw, db = _backward_tile(
            start, held, dw, db,
            dy_ptr, dsum_ptr, x_ptr, weight_ptr,
            mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, width, inner,
            dy_outer, dy_inner, dsum_outer, dsum_inner, x_outer, x_inner,
            OFFSET, CENTERED, ROUND_INPUT, ROWS, PIECE, PIECES, EVEN, HOIST, RELOAD,
        )  # fmt: skip
    _store_sums(dweight_ptr, dw, width, ROWS, PIECE, PIECES)
    _store_sums(dbias_ptr, db, width, ROWS, PIECE, PIECES)


@triton.jit
def _store_sums(
    ptr, sums, width, ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """This program's row of partial sums, where they are wanted."""
    if ptr is not None:
        start = ptr + tl.program_id(0).to(tl.int64) * width
        for at in tl.static_range(PIECES):
            columns = _columns(at, PIECE)
            tl.store(start + columns, columns_of(sums[at], ROWS), mask=columns < width)
