"""The Triton kernels of normalised and rotated heads; see ``qk_norm_rope``.

A row is one head of one token, of q or of k; rows are numbered in the order (batch, token, head). A
program takes ROWS rows at a time of one side, the first programs those of q and the others those of
k. A row is spread over few lanes of one warp, so that its mean crosses no warp. Everything that
belongs to a row, its angles and the weight too, is read with the row's own layout: 16 bytes a thread,
and from the first cache where other rows have read it before. The backward's programs walk over the
rows with the next ones on their way and the sums of the weight's gradient in registers; ``side_sums``
adds the programs' sums in a fixed order.
"""

from __future__ import annotations

from fusewright.kernels.launch import tl, triton
from fusewright.kernels.norm_sum_kernels import sum_columns
from fusewright.kernels.rope_kernels import _load_pairs, _store_pairs, _stored_pairs, _turn


@triton.jit
def _mean(first, second, rest, width, SHORT: tl.constexpr):
    """The mean over each head of what its pairs and the features beyond them hold, as a column."""
    total = tl.sum(first + second, 1)
    if SHORT:
        total += tl.sum(rest, 1)
    return tl.div_rn(total, tl.full(total.shape, 0.0, tl.float32) + width)[:, None]


@triton.jit
def _beyond(there, ROTARY: tl.constexpr, WIDTH: tl.constexpr, PASS: tl.constexpr):
    """The columns that do not turn, and which of them exist."""
    columns = ROTARY + tl.arange(0, PASS)[None, :]
    return columns, there & (columns < WIDTH)


@triton.jit
def _place(row, tokens, HEADS: tl.constexpr):
    """Batch, token and head of rows."""
    at = row // HEADS
    batch = at // tokens
    return batch.to(tl.int64), (at - batch * tokens).to(tl.int64), (row - at * HEADS).to(tl.int64)


@triton.jit
def _begin(ptr, batch, token, head, of_batch, of_head, of_token):
    """Where rows begin, as a column."""
    return ptr + (batch * of_batch + token * of_token + head * of_head)[:, None]


@triton.jit
def _table(
    at, pairs, there, HALF: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A table's values for the first and the second features of the pairs of every row."""
    if FULL:
        first, second = _load_pairs(at, pairs, there, HALF, BLOCK, INTERLEAVED)
    else:
        mask = there & (pairs < HALF)[None, :]
        first = tl.load(at + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
        second = first
    return first, second


@triton.jit
def _angles(
    cos_ptr, sin_ptr, batch, token, of_batch, of_token, pairs, there, HALF: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """cos and sin of the first features, cos and sin of the second ones, of every row."""
    at = (batch * of_batch + token * of_token)[:, None]
    c1, c2 = _table(cos_ptr + at, pairs, there, HALF, BLOCK, FULL, INTERLEAVED)
    s1, s2 = _table(sin_ptr + at, pairs, there, HALF, BLOCK, FULL, INTERLEAVED)
    return c1, s1, c2, s2


@triton.jit
def _plus(t, OFFSET: tl.constexpr):
    return t if OFFSET == 0.0 else t + OFFSET


@triton.jit
def _gains(
    ptr, row, pairs, OFFSET: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PASS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """offset + w for the pairs and for the features beyond them, for every row; without a weight 1."""
    first = tl.full([row.shape[0], BLOCK], 1.0, tl.float32)
    second = first
    rest = tl.full([row.shape[0], PASS], 1.0, tl.float32)
    if ptr is not None:
        every = (row >= 0)[:, None]
        at = ptr + tl.zeros_like(row)[:, None]
        first, second = _load_pairs(at, pairs, every, ROTARY // 2, BLOCK, INTERLEAVED)
        first, second = _plus(first, OFFSET), _plus(second, OFFSET)
        if ROTARY < WIDTH:
            columns, mask = _beyond(every, ROTARY, WIDTH, PASS)
            rest = _plus(tl.load(at + columns, mask=mask, other=0.0).to(tl.float32), OFFSET)
    return first, second, rest


@triton.jit
def _rounded(t, like, ROUND: tl.constexpr):
    """``t`` with its values rounded to what ``like`` points to."""
    return t.to(like.dtype.element_ty).to(tl.float32) if ROUND else t


@triton.jit
def _forward_side(
    program, x_ptr, weight_ptr, out_ptr, rstd_ptr, cos_ptr, sin_ptr, rows, tokens,
    x_batch, x_head, x_token, out_batch, out_head, out_token, table_batch, table_token, eps,
    HEADS: tl.constexpr, OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, ROUND_NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr, FULL: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PASS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of q or of k: what is made of them, and their rstd."""
    HALF: tl.constexpr = ROTARY // 2
    SHORT: tl.constexpr = ROTARY < WIDTH
    row = program * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    pairs = tl.arange(0, BLOCK)
    batch, token, head = _place(row, tokens, HEADS)
    at = _begin(x_ptr, batch, token, head, x_batch, x_head, x_token)
    x1, x2 = _stored_pairs(at, pairs, there, HALF, BLOCK, INTERLEAVED)
    x3 = x1
    if SHORT:
        columns, mask = _beyond(there, ROTARY, WIDTH, PASS)
        x3 = tl.load(at + columns, mask=mask, other=0.0)
    c1, s1, c2, s2 = _angles(
        cos_ptr, sin_ptr, batch, token, table_batch, table_token, pairs, there, HALF, BLOCK, FULL,
        INTERLEAVED,
    )  # fmt: skip
    w1, w2, w3 = _gains(weight_ptr, row, pairs, OFFSET, ROTARY, WIDTH, BLOCK, PASS, INTERLEAVED)
    x1, x2, x3 = x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(_mean(x1 * x1, x2 * x2, x3 * x3, WIDTH, SHORT) + eps))
    n1 = _rounded(_rounded(x1 * rstd, x_ptr, ROUND_INPUT) * w1, x_ptr, ROUND_NORM)
    n2 = _rounded(_rounded(x2 * rstd, x_ptr, ROUND_INPUT) * w2, x_ptr, ROUND_NORM)
    y1, y2 = _turn(n1, n2, c1, s1, c2, s2, False)
    to = _begin(out_ptr, batch, token, head, out_batch, out_head, out_token)
    _store_pairs(to, y1, y2, pairs, there, HALF, BLOCK, INTERLEAVED)
    if SHORT:
        n3 = _rounded(_rounded(x3 * rstd, x_ptr, ROUND_INPUT) * w3, x_ptr, ROUND_NORM)
        tl.store(to + columns, n3.to(out_ptr.dtype.element_ty), mask=mask)
    # Last, because it crosses the warps.
    tl.store(rstd_ptr + row[:, None], rstd, mask=there)


@triton.jit
def qk_forward(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, q_rstd_ptr, k_rstd_ptr,
    cos_ptr, sin_ptr, q_programs, q_rows, k_rows, tokens,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    table_batch, table_token, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, ROUND_NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr, FULL: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PASS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """q_out, k_out and the rstd of both."""
    program = tl.program_id(0)
    if program < q_programs:
        _forward_side(
            program, q_ptr, q_weight_ptr, q_out_ptr, q_rstd_ptr, cos_ptr, sin_ptr, q_rows, tokens,
            q_batch, q_head, q_token, q_out_batch, q_out_head, q_out_token, table_batch,
            table_token, eps, Q_HEADS, OFFSET, ROUND_INPUT, ROUND_NORM, INTERLEAVED, FULL, ROTARY,
            WIDTH, BLOCK, PASS, ROWS,
        )  # fmt: skip
    else:
        _forward_side(
            program - q_programs, k_ptr, k_weight_ptr, k_out_ptr, k_rstd_ptr, cos_ptr, sin_ptr,
            k_rows, tokens, k_batch, k_head, k_token, k_out_batch, k_out_head, k_out_token,
            table_batch, table_token, eps, K_HEADS, OFFSET, ROUND_INPUT, ROUND_NORM, INTERLEAVED,
            FULL, ROTARY, WIDTH, BLOCK, PASS, ROWS,
        )  # fmt: skip


@triton.jit
def _given(
    row, rows, tokens, pairs, dy_ptr, x_ptr, rstd_ptr,
    dy_batch, dy_head, dy_token, x_batch, x_head, x_token,
    HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """What a backward reads of rows, as it is stored: x and dy in their parts, and rstd."""
    HALF: tl.constexpr = ROTARY // 2
    there = (row < rows)[:, None]
    batch, token, head = _place(row, tokens, HEADS)
    at = _begin(x_ptr, batch, token, head, x_batch, x_head, x_token)
    dy_at = _begin(dy_ptr, batch, token, head, dy_batch, dy_head, dy_token)
    x1, x2 = _stored_pairs(at, pairs, there, HALF, BLOCK, INTERLEAVED)
    y1, y2 = _stored_pairs(dy_at, pairs, there, HALF, BLOCK, INTERLEAVED)
    x3, y3 = x1, y1
    if ROTARY < WIDTH:
        columns, mask = _beyond(there, ROTARY, WIDTH, PASS)
        x3 = tl.load(at + columns, mask=mask, other=0.0)
        y3 = tl.load(dy_at + columns, mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
    return x1, x2, x3, y1, y2, y3, rstd


@triton.jit
def _added(total, t, WANTED: tl.constexpr):
    """The sum with rows added."""
    return total + t if WANTED else total


@triton.jit
def _backward_rows(
    row, given, dw, dy_ptr, x_ptr, weight_ptr, dx_ptr, cos_ptr, sin_ptr, rows, tokens, pairs,
    dx_batch, dx_head, dx_token, table_batch, table_token,
    HEADS: tl.constexpr, OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr,
    INTERLEAVED: tl.constexpr, FULL: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PASS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Store dx of rows; the weight's sums with them added."""
    HALF: tl.constexpr = ROTARY // 2
    SHORT: tl.constexpr = ROTARY < WIDTH
    there = (row < rows)[:, None]
    batch, token, head = _place(row, tokens, HEADS)
    x1, x2, x3, y1, y2, y3, rstd = given
    c1, s1, c2, s2 = _angles(
        cos_ptr, sin_ptr, batch, token, table_batch, table_token, pairs, there, HALF, BLOCK, FULL,
        INTERLEAVED,
    )  # fmt: skip
    w1, w2, w3 = _gains(weight_ptr, row, pairs, OFFSET, ROTARY, WIDTH, BLOCK, PASS, INTERLEAVED)
    d1, d2 = _turn(y1.to(tl.float32), y2.to(tl.float32), c1, s1, c2, s2, True)
    x1, x2 = x1.to(tl.float32) * rstd, x2.to(tl.float32) * rstd
    dw1, dw2, dw3 = dw
    dw1 = _added(dw1, d1 * _rounded(x1, x_ptr, ROUND_INPUT), SUM)
    dw2 = _added(dw2, d2 * _rounded(x2, x_ptr, ROUND_INPUT), SUM)
    g1, g2 = d1 * w1, d2 * w2
    g3 = g1
    if SHORT:
        x3, d3 = x3.to(tl.float32) * rstd, y3.to(tl.float32)
        dw3 = _added(dw3, d3 * _rounded(x3, x_ptr, ROUND_INPUT), SUM)
        g3 = d3 * w3
    else:
        x3 = x1
    if dx_ptr is not None:
        along = _mean(g1 * x1, g2 * x2, g3 * x3, WIDTH, SHORT)
        to = _begin(dx_ptr, batch, token, head, dx_batch, dx_head, dx_token)
        z1, z2 = rstd * (g1 - x1 * along), rstd * (g2 - x2 * along)
        _store_pairs(to, z1, z2, pairs, there, HALF, BLOCK, INTERLEAVED)
        if SHORT:
            columns, mask = _beyond(there, ROTARY, WIDTH, PASS)
            z3 = rstd * (g3 - x3 * along)
            tl.store(to + columns, z3.to(dx_ptr.dtype.element_ty), mask=mask)
    return dw1, dw2, dw3


@triton.jit
def _store_sums(
    ptr, program, dw, pairs, ROTARY: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PASS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A program's row of a weight's partial sums."""
    dw1, dw2, dw3 = dw
    start = ptr + program.to(tl.int64) * WIDTH
    one = tl.full([1, 1], 0, tl.int32) == 0
    first, second = tl.sum(dw1, 0)[None, :], tl.sum(dw2, 0)[None, :]
    _store_pairs(start, first, second, pairs, one, ROTARY // 2, BLOCK, INTERLEAVED)
    if ROTARY < WIDTH:
        columns, mask = _beyond(one, ROTARY, WIDTH, PASS)
        tl.store(start + columns, tl.sum(dw3, 0)[None, :], mask=mask)


@triton.jit
def _backward_side(
    program, programs, dy_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr, cos_ptr, sin_ptr,
    rows, tokens, dy_batch, dy_head, dy_token, x_batch, x_head, x_token,
    dx_batch, dx_head, dx_token, table_batch, table_token,
    HEADS: tl.constexpr, OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr,
    INTERLEAVED: tl.constexpr, FULL: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PASS: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """dx of q or of k, and a program's row of the partial sums of the weight's gradient."""
    SUM: tl.constexpr = dweight_ptr is not None
    pairs, lines = tl.arange(0, BLOCK), tl.arange(0, ROWS)
    dw1 = tl.zeros([ROWS if SUM else 1, BLOCK if SUM else 1], tl.float32)
    dw2 = dw1
    dw3 = tl.zeros([ROWS if SUM else 1, PASS if SUM else 1], tl.float32)
    dw = (dw1, dw2, dw3)
    begin, step = program * ROWS, programs * ROWS
    if AHEAD:
        given = _given(
            begin + lines, rows, tokens, pairs, dy_ptr, x_ptr, rstd_ptr,
            dy_batch, dy_head, dy_token, x_batch, x_head, x_token,
            HEADS, INTERLEAVED, ROTARY, WIDTH, BLOCK, PASS,
        )  # fmt: skip
    for first in range(begin, rows, step):
        following = _given(
            first + (step if AHEAD else 0) + lines, rows, tokens, pairs, dy_ptr, x_ptr, rstd_ptr,
            dy_batch, dy_head, dy_token, x_batch, x_head, x_token,
            HEADS, INTERLEAVED, ROTARY, WIDTH, BLOCK, PASS,
        )  # fmt: skip
        dw = _backward_rows(
            first + lines, given if AHEAD else following, dw, dy_ptr, x_ptr, weight_ptr, dx_ptr,
            cos_ptr, sin_ptr, rows, tokens, pairs, dx_batch, dx_head, dx_token,
            table_batch, table_token,
            HEADS, OFFSET, ROUND_INPUT, INTERLEAVED, FULL, ROTARY, WIDTH, BLOCK, PASS, SUM,
        )  # fmt: skip
        if AHEAD:
            given = following
    if SUM:
        _store_sums(dweight_ptr, program, dw, pairs, ROTARY, WIDTH, BLOCK, PASS, INTERLEAVED)


@triton.jit
def qk_backward(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_rstd_ptr, k_rstd_ptr,
    dq_ptr, dk_ptr, dq_weight_ptr, dk_weight_ptr, cos_ptr, sin_ptr,
    q_programs, k_programs, q_rows, k_rows, tokens,
    dq_out_batch, dq_out_head, dq_out_token, dk_out_batch, dk_out_head, dk_out_token,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    dq_batch, dq_head, dq_token, dk_batch, dk_head, dk_token, table_batch, table_token,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PASS: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
    Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dq and dk, and one row of partial sums of the weight's gradient per program.

    Q and K: whether anything is wanted of q and of k; a side without has no program.
    """
    program = tl.program_id(0)
    if Q:  # noqa: SIM102 - decided before the other is
        if program < q_programs:
            _backward_side(
                program, q_programs, dq_out_ptr, q_ptr, q_weight_ptr, q_rstd_ptr, dq_ptr,
                dq_weight_ptr, cos_ptr, sin_ptr, q_rows, tokens,
                dq_out_batch, dq_out_head, dq_out_token, q_batch, q_head, q_token,
                dq_batch, dq_head, dq_token, table_batch, table_token,
                Q_HEADS, OFFSET, ROUND_INPUT, INTERLEAVED, FULL, ROTARY, WIDTH, BLOCK, PASS,
                ROWS, AHEAD,
            )  # fmt: skip
    if K:  # noqa: SIM102 - decided before the other is
        if program >= q_programs:
            _backward_side(
                program - q_programs, k_programs, dk_out_ptr, k_ptr, k_weight_ptr, k_rstd_ptr,
                dk_ptr, dk_weight_ptr, cos_ptr, sin_ptr, k_rows, tokens,
                dk_out_batch, dk_out_head, dk_out_token, k_batch, k_head, k_token,
                dk_batch, dk_head, dk_token, table_batch, table_token,
                K_HEADS, OFFSET, ROUND_INPUT, INTERLEAVED, FULL, ROTARY, WIDTH, BLOCK, PASS,
                ROWS, AHEAD,
            )  # fmt: skip


@triton.jit
def side_sums(
    q_partial_ptr, k_partial_ptr, dq_weight_ptr, dk_weight_ptr, q_programs, k_programs,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of both weights from the programs' partial sums, where they are wanted."""
    if tl.program_id(1) == 0:
        if dq_weight_ptr is not None:
            sum_columns(q_partial_ptr, dq_weight_ptr, q_programs, WIDTH, ROWS, BLOCK)
    else:
        if dk_weight_ptr is not None:
            sum_columns(k_partial_ptr, dk_weight_ptr, k_programs, WIDTH, ROWS, BLOCK)
