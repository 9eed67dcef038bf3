"""Triton kernels of the thin products; the mathematics and the rules of rounding are in ``thin``.

Two ways to walk over a wide matrix M (rows, columns), each element of which is read once:

``right_products``  a program takes BT rows and walks over the columns of a slab: P is complete for
                    the slab, and for the matrix where there is one slab only.
``left_products``   a program takes a slab of BC columns and walks over a part of the rows: L of the
                    part stays in registers; where P is wanted too, each tile gives the slab's share.

Shares of P (slab, row, slot, rank) and of L (part, column, slot, rank) go to a float32 scratch, and
``sum_shares`` adds them in the order of slabs and parts: nothing depends on who finished first.

A launch has up to four matrices with one thin operand each, or one matrix with up to four (slots);
all thin operands of a launch have the same rank R, padded to RP columns.

MODE 0: both operands in the same 16 bits. MODE 1: M in bfloat16, the thin operand in float32, taken
as the sum of three bfloat16, which is exact. MODE 2: float32 arithmetic throughout. In modes 1 and 2
the products of a tile are summed by themselves and then added, so that sums stay short.
"""

from __future__ import annotations

from fusewright.kernels.launch import tl, triton
from fusewright.kernels.thin_parts import (
    WIDEN,
    block_of,
    clear,
    give,
    pick,
    share,
    share_all,
    small_copy,
    wide,
)


@triton.jit
def _rounded(thin, like, MODE: tl.constexpr):
    """The thin operand as it enters the tensor cores."""
    return thin.to(tl.float32) if MODE == 2 else thin.to(like.dtype.element_ty)


@triton.jit
def _rest(thin, like, MODE: tl.constexpr):
    """What rounding the thin operand to 16 bits left over, as two parts of 16 bits."""
    if MODE == 1:
        high = thin.to(like.dtype.element_ty)
        rest = thin - high.to(tl.float32)
        low = rest.to(like.dtype.element_ty)
        return low, (rest - low.to(tl.float32)).to(like.dtype.element_ty)
    else:
        return thin, thin


@triton.jit
def _product(m, high, low, total, MODE: tl.constexpr):
    """total + m (high + low + lowest), accumulated in float32; ``low`` is a pair."""
    if MODE == 2:
        return total + tl.dot(m.to(tl.float32), high, input_precision="ieee")
    middle, lowest = low
    if WIDEN:
        m, high = m.to(tl.float32), high.to(tl.float32)
        middle, lowest = middle.to(tl.float32), lowest.to(tl.float32)
    if MODE == 1:
        part = tl.dot(m, middle, tl.dot(m, lowest))
        total += tl.dot(m, high, part)
    else:
        total = tl.dot(m, high, total)
    return total


@triton.jit
def _right_operand(
    ptr, column, width, stride, R: tl.constexpr, RP: tl.constexpr,
    TRANSPOSED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows ``column`` of V as (columns, RP), whether it lies as (columns, R) or as (R, columns)."""
    k = tl.arange(0, RP)[None, :]
    if TRANSPOSED:
        at = k * stride + column[:, None]
    else:
        at = column[:, None] * R + k
    mask = k < R
    if not EVEN:
        mask = mask & (column < width)[:, None]
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def _copied(m, wide_ptr, row, wide_row, copy, column, mask):
    """Store a tile into the wide buffer, if its matrix is to be copied."""
    to = wide_ptr + wide(row) * wide_row + column
    to += tl.arange(0, m.shape[0])[:, None] * wide_row + tl.arange(0, m.shape[1])[None, :]
    tl.store(to, m, mask=mask & (copy >= 0))


@triton.jit
def _added(
    total, m, v, v_row, column, width, like, R: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """total + M V of some columns."""
    t = _right_operand(v, column, width, v_row, R, total.shape[1], TRANSPOSED, EVEN)
    return _product(m, _rounded(t, like, MODE), _rest(t, like, MODE), total, MODE)


@triton.jit
def _right(
    program, m0, m1, m2, m3, v0, v1, v2, v3, partial_ptr, out_ptr, wide_ptr,
    rows, slab_columns, c0, c1, c2, c3, m0_row, m1_row, m2_row, m3_row, v0_row, v1_row, v2_row,
    v3_row, first1, first2, first3, copy0, copy1, copy2, copy3,
    to0, to1, to2, to3, scale0, scale1, scale2, scale3, out_row, wide_row, step, zero_from, zero_to,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MODE: tl.constexpr, TRANSPOSED: tl.constexpr, COPY: tl.constexpr, PLACED: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, ZERO: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, BT)
    slab = program // tiles
    first_row = (program - slab * tiles) * BT
    block, first = block_of(slab, first1, first2, first3, BLOCKS)
    width = pick(block, c0, c1, c2, c3, BLOCKS)
    stride = pick(block, m0_row, m1_row, m2_row, m3_row, BLOCKS)
    base = pick(block, m0, m1, m2, m3, BLOCKS) + first_row.to(tl.int64) * stride
    v = pick(block, v0, v1, v2, v3, BLOCKS)
    v_row = pick(block, v0_row, v1_row, v2_row, v3_row, BLOCKS)
    copy = pick(block, copy0, copy1, copy2, copy3, BLOCKS)
    line = tl.arange(0, BT)
    row = first_row + line
    there = (row < rows)[:, None]
    at = line[:, None] * stride + tl.arange(0, BK)[None, :]
    p0 = tl.zeros([BT, RP], tl.float32)
    p1 = tl.zeros([BT if SLOTS > 1 else 1, RP], tl.float32)
    p2 = tl.zeros([BT if SLOTS > 2 else 1, RP], tl.float32)
    p3 = tl.zeros([BT if SLOTS > 3 else 1, RP], tl.float32)
    start = (slab - first) * slab_columns
    end = tl.minimum(start + slab_columns, width)
    for c in tl.range(start, end, BK, num_stages=STAGES):
        column = c + tl.arange(0, BK)
        mask = there if EVEN else there & (column < width)[None, :]
        m = tl.load(base + c + at, mask=mask, other=0.0, eviction_policy="evict_first")
        p0 = _added(p0, m, v, v_row, column, width, m0, R, TRANSPOSED, EVEN, MODE)
        if SLOTS > 1:
            p1 = _added(p1, m, v1, v1_row, column, width, m0, R, TRANSPOSED, EVEN, MODE)
        if SLOTS > 2:
            p2 = _added(p2, m, v2, v2_row, column, width, m0, R, TRANSPOSED, EVEN, MODE)
        if SLOTS > 3:
            p3 = _added(p3, m, v3, v3_row, column, width, m0, R, TRANSPOSED, EVEN, MODE)
        if COPY:
            _copied(m, wide_ptr, first_row, wide_row, copy, copy + c, mask)
    if partial_ptr is not None:
        before = slab.to(tl.int64) * rows + first_row
        share_all(partial_ptr, before, p0, p1, p2, p3, there, SLOTS)
    else:
        placed = wide_ptr if PLACED else None
        scale = pick(block, scale0, scale1, scale2, scale3, BLOCKS)
        to_column = pick(block, to0, to1, to2, to3, BLOCKS)
        give(p0, scale, block, row, rows, to_column, out_ptr, placed, out_row, wide_row, step,
              R, SPLIT)  # fmt: skip
        if SLOTS > 1:
            give(p1, scale1, 1, row, rows, to1, out_ptr, placed, out_row, wide_row, step, R, SPLIT)
        if SLOTS > 2:
            give(p2, scale2, 2, row, rows, to2, out_ptr, placed, out_row, wide_row, step, R, SPLIT)
        if SLOTS > 3:
            give(p3, scale3, 3, row, rows, to3, out_ptr, placed, out_row, wide_row, step, R, SPLIT)
        if slab == 0:
            clear(row, rows, wide_ptr, wide_row, zero_from, zero_to, ZERO)


@triton.jit
def right_products(
    m0, m1, m2, m3, v0, v1, v2, v3, partial_ptr, out_ptr, wide_ptr, table_ptr,
    programs, rows, slab_columns, c0, c1, c2, c3, m0_row, m1_row, m2_row, m3_row,
    v0_row, v1_row, v2_row, v3_row, first1, first2, first3, copy0, copy1, copy2, copy3,
    to0, to1, to2, to3, scale0, scale1, scale2, scale3, out_row, wide_row, step, zero_from, zero_to,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MODE: tl.constexpr, TRANSPOSED: tl.constexpr, COPY: tl.constexpr, PLACED: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, ZERO: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    TASKS: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr,
    COPIED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """P of one to four matrices, finished or as shares; the last programs do the small copies."""
    program = tl.program_id(0)
    if program < programs:
        _right(
            program, m0, m1, m2, m3, v0, v1, v2, v3, partial_ptr, out_ptr, wide_ptr,
            rows, slab_columns, c0, c1, c2, c3, m0_row, m1_row, m2_row, m3_row, v0_row, v1_row,
            v2_row, v3_row, first1, first2, first3, copy0, copy1, copy2, copy3, to0, to1, to2, to3,
            scale0, scale1, scale2, scale3, out_row, wide_row, step, zero_from, zero_to,
            BLOCKS, SLOTS, R, RP, MODE, TRANSPOSED, COPY, PLACED, SPLIT, EVEN, ZERO, BT, BK, STAGES,
        )  # fmt: skip
    elif TASKS > 0:
        small_copy(program - programs, table_ptr, TASKS, SOURCE, TARGET, COPIED, AT_ONCE)


@triton.jit
def _left_operand(ptr, base, line, there, stride, R: tl.constexpr, RP: tl.constexpr):
    """Rows of U as (rows, RP)."""
    k = tl.arange(0, RP)[None, :]
    return tl.load(ptr + base + (line[:, None] * stride + k), mask=there & (k < R), other=0.0)


@triton.jit
def _slot(
    m, t, line, there, total, v_high, v_low, u_ptr, u_row, partial_ptr, before, m_ptr,
    AT: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MODE: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """What one tile gives to one slot: added to L's total, and the slab's share of P stored."""
    u = _left_operand(u_ptr, wide(t) * u_row, line, there, u_row, R, RP)
    high, low = _rounded(u, m_ptr, MODE), _rest(u, m_ptr, MODE)
    total = _product(tl.trans(m), high, low, total, MODE)
    if RIGHT:
        p = tl.zeros([m.shape[0], RP], tl.float32)
        p = _product(m, v_high, v_low, p, MODE)
        share(partial_ptr, before + t, p, AT, there, SLOTS)
    return total


@triton.jit
def _v_of(
    ptr, column, width, stride, like, R: tl.constexpr, RP: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr, MODE: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    """V of a slab, rounded, and its rest; nothing where this slot has none."""
    if WANTED:
        t = _right_operand(ptr, column, width, stride, R, RP, TRANSPOSED, EVEN)
        return _rounded(t, like, MODE), _rest(t, like, MODE)
    else:
        return 0, (0, 0)


@triton.jit
def _left(
    program, m0, m1, m2, m3, v0, v1, v2, v3, u0, u1, u2, u3, right_ptr, left_ptr, wide_ptr,
    rows, part_rows, slabs, columns, c0, c1, c2, c3, m0_row, m1_row, m2_row, m3_row,
    v0_row, v1_row, v2_row, v3_row, u0_row, u1_row, u2_row, u3_row, first1, first2, first3,
    before1, before2, before3, copy0, copy1, copy2, copy3, wide_row,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MODE: tl.constexpr, TRANSPOSED: tl.constexpr, COPY: tl.constexpr,
    EVEN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    RIGHT: tl.constexpr = right_ptr is not None
    part = program // slabs
    slab = program - part * slabs
    block, first = block_of(slab, first1, first2, first3, BLOCKS)
    width = pick(block, c0, c1, c2, c3, BLOCKS)
    stride = pick(block, m0_row, m1_row, m2_row, m3_row, BLOCKS)
    v = pick(block, v0, v1, v2, v3, BLOCKS) if RIGHT else None
    v_row = pick(block, v0_row, v1_row, v2_row, v3_row, BLOCKS)
    u = pick(block, u0, u1, u2, u3, BLOCKS)
    u_row = pick(block, u0_row, u1_row, u2_row, u3_row, BLOCKS)
    copy = pick(block, copy0, copy1, copy2, copy3, BLOCKS)
    c = (slab - first) * BC
    column = c + tl.arange(0, BC)
    m_base = pick(block, m0, m1, m2, m3, BLOCKS) + c
    line = tl.arange(0, BT)
    at = line[:, None] * stride + tl.arange(0, BC)[None, :]
    h0, w0 = _v_of(v, column, width, v_row, m0, R, RP, TRANSPOSED, EVEN, MODE, RIGHT)
    h1, w1 = _v_of(v1, column, width, v1_row, m0, R, RP, TRANSPOSED, EVEN, MODE,
                   RIGHT and SLOTS > 1)  # fmt: skip
    h2, w2 = _v_of(v2, column, width, v2_row, m0, R, RP, TRANSPOSED, EVEN, MODE,
                   RIGHT and SLOTS > 2)  # fmt: skip
    h3, w3 = _v_of(v3, column, width, v3_row, m0, R, RP, TRANSPOSED, EVEN, MODE,
                   RIGHT and SLOTS > 3)  # fmt: skip
    l0 = tl.zeros([BC, RP], tl.float32)
    l1 = tl.zeros([BC if SLOTS > 1 else 1, RP], tl.float32)
    l2 = tl.zeros([BC if SLOTS > 2 else 1, RP], tl.float32)
    l3 = tl.zeros([BC if SLOTS > 3 else 1, RP], tl.float32)
    before = slab.to(tl.int64) * rows
    start = part * part_rows
    for t in tl.range(start, tl.minimum(start + part_rows, rows), BT, num_stages=STAGES):
        there = (t + line < rows)[:, None]
        mask = there if EVEN else there & (column < width)[None, :]
        m = tl.load(
            m_base + wide(t) * stride + at, mask=mask, other=0.0, eviction_policy="evict_first"
        )
        l0 = _slot(m, t, line, there, l0, h0, w0, u, u_row, right_ptr, before, m0,
                   0, SLOTS, R, RP, MODE, RIGHT)  # fmt: skip
        if SLOTS > 1:
            l1 = _slot(m, t, line, there, l1, h1, w1, u1, u1_row, right_ptr, before, m0,
                       1, SLOTS, R, RP, MODE, RIGHT)  # fmt: skip
        if SLOTS > 2:
            l2 = _slot(m, t, line, there, l2, h2, w2, u2, u2_row, right_ptr, before, m0,
                       2, SLOTS, R, RP, MODE, RIGHT)  # fmt: skip
        if SLOTS > 3:
            l3 = _slot(m, t, line, there, l3, h3, w3, u3, u3_row, right_ptr, before, m0,
                       3, SLOTS, R, RP, MODE, RIGHT)  # fmt: skip
        if COPY:
            _copied(m, wide_ptr, t, wide_row, copy, copy + c, mask)
    inside = (column < width)[:, None]
    first = wide(part) * columns + c + pick(block, 0, before1, before2, before3, BLOCKS)
    share_all(left_ptr, first, l0, l1, l2, l3, inside, SLOTS)


@triton.jit
def left_products(
    m0, m1, m2, m3, v0, v1, v2, v3, u0, u1, u2, u3, right_ptr, left_ptr, wide_ptr, table_ptr,
    programs, rows, part_rows, slabs, columns, c0, c1, c2, c3, m0_row, m1_row, m2_row, m3_row,
    v0_row, v1_row, v2_row, v3_row, u0_row, u1_row, u2_row, u3_row, first1, first2, first3,
    before1, before2, before3, copy0, copy1, copy2, copy3, wide_row,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MODE: tl.constexpr, TRANSPOSED: tl.constexpr, COPY: tl.constexpr,
    EVEN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
    TASKS: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr,
    COPIED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Shares of L, and of P where V is given; the last programs do the small copies."""
    program = tl.program_id(0)
    if program < programs:
        _left(
            program, m0, m1, m2, m3, v0, v1, v2, v3, u0, u1, u2, u3, right_ptr, left_ptr, wide_ptr,
            rows, part_rows, slabs, columns, c0, c1, c2, c3, m0_row, m1_row, m2_row, m3_row,
            v0_row, v1_row, v2_row, v3_row, u0_row, u1_row, u2_row, u3_row, first1, first2, first3,
            before1, before2, before3, copy0, copy1, copy2, copy3, wide_row,
            BLOCKS, SLOTS, R, RP, MODE, TRANSPOSED, COPY, EVEN, BT, BC, STAGES,
        )  # fmt: skip
    elif TASKS > 0:
        small_copy(program - programs, table_ptr, TASKS, SOURCE, TARGET, COPIED, AT_ONCE)
