"""Triton kernels of the thin products; the mathematics and the rules of rounding are in ``thin``.

Two ways to walk over a wide matrix M (rows, columns), each element of which is read once:

``right_products``  a program takes BT rows and walks over the columns of a slab: P is complete for
                    the slab, and for the matrix where there is one slab only.
``left_products``   a program takes a slab of BC columns and walks over a part of the rows: L of the
                    part stays in registers; where P is wanted too, each tile gives the slab's share.

Shares of P (slab, row, rank) and of L (part, column, rank) go to a float32 scratch, and
``sum_shares`` adds them in the order of slabs and parts: nothing depends on who finished first. With
``rstd_ptr`` M of the left products is the output of an RMS norm whose input is given.

A launch has up to four matrices with one thin operand each, or one matrix with up to four (slots)
that are loaded beside each other, as one operand of SLOTS R columns; these are padded to RP. All thin
operands of a launch have the same rank R.

MODE 0: both operands in the same 16 bits. MODE 1: M in bfloat16, the thin operand in float32, given
as three bfloat16 ``apart`` from each other (``thin_parts.split_parts``) whose sum it is exactly.
MODE 2: float32 arithmetic throughout. In modes 1 and 2 the products of a tile are summed by themselves
and then added, so that sums stay short.
"""

from __future__ import annotations

from fusewright.kernels.launch import HAS_TRITON, tl, triton
from fusewright.kernels.thin_parts import (
    WIDEN,
    block_of,
    clear,
    give,
    once,
    operand_of,
    pick,
    share,
    small_copy,
    term_of,
    wide,
)

if HAS_TRITON:
    from triton.language.target_info import cuda_capability_geq


@triton.jit
def _thin(at, apart, mask, MODE: tl.constexpr):
    """A thin operand as it enters the tensor cores, and its rest as a pair in MODE 1."""
    high = tl.load(at, mask=mask, other=0.0)
    if MODE == 1:
        middle = tl.load(at + apart, mask=mask, other=0.0)
        lowest = tl.load(at + 2 * apart, mask=mask, other=0.0)
        return high, (middle, lowest)
    elif MODE == 2:
        return high.to(tl.float32), (0, 0)
    else:
        return high, (0, 0)


@triton.jit
def _product(m, high, low, total, MODE: tl.constexpr):
    """total + m (high + low), accumulated in float32; ``low`` is a pair."""
    # One way out: not every version of Triton leaves out what stands behind a return.
    if MODE == 2:
        # Triton makes total + dot(...) one chain of the whole sum, unless the dot is said to
        # accumulate in its own way; float32's products ignore what is said.
        total += tl.dot(m.to(tl.float32), high, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        if WIDEN:
            m, high = m.to(tl.float32), high.to(tl.float32)
        if MODE == 1:
            middle, lowest = low
            if WIDEN:
                middle, lowest = middle.to(tl.float32), lowest.to(tl.float32)
            total += tl.dot(m, high, tl.dot(m, middle, tl.dot(m, lowest)))
        else:
            total = tl.dot(m, high, total)
    return total


@triton.jit
def _right_operand(
    ptr, column, width, stride, apart, place, inside, R: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Rows ``column`` of V as (columns, RP), whether it lies as (columns, R) or as (R, columns)."""
    if TRANSPOSED:
        at = place * stride + column[:, None]
    else:
        at = column[:, None] * R + place
    mask = inside
    if not EVEN:
        mask = mask & (column < width)[:, None]
    return _thin(ptr + at, apart, mask, MODE)


@triton.jit
def _copied(m, wide_ptr, row, wide_row, copy, column, mask):
    """Store a tile into the wide buffer, if its matrix is to be copied."""
    to = wide_ptr + wide(row) * wide_row + column
    to += tl.arange(0, m.shape[0])[:, None] * wide_row + tl.arange(0, m.shape[1])[None, :]
    tl.store(to, m, mask=mask & (copy >= 0))


@triton.jit
def _right(
    program, m0, m1, m2, m3, v0, v1, v2, v3, partial_ptr, out_ptr, wide_ptr,
    rows, slab_columns, apart, c0, c1, c2, c3, m0_row, m1_row, m2_row, m3_row, v0_row, v1_row,
    v2_row, v3_row, first1, first2, first3, copy0, copy1, copy2, copy3,
    to0, to1, to2, to3, scale0, scale1, scale2, scale3, out_row, wide_row, step, zero_from, zero_to,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MODE: tl.constexpr, TRANSPOSED: tl.constexpr, COPY: tl.constexpr, PLACED: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, ZERO: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, BT)
    slab = program // tiles
    first_row = (program - slab * tiles) * BT
    block, first = block_of(slab, first1, first2, first3, BLOCKS)
    width = pick(block, c0, c1, c2, c3, BLOCKS)
    stride = pick(block, m0_row, m1_row, m2_row, m3_row, BLOCKS)
    base = pick(block, m0, m1, m2, m3, BLOCKS) + first_row.to(tl.int64) * stride
    TERMS: tl.constexpr = BLOCKS * SLOTS
    term, place, out_column = term_of(block, R, RP, SLOTS)
    inside = tl.arange(0, RP)[None, :] < SLOTS * R
    v = operand_of(term, v0, v1, v2, v3, BLOCKS, SLOTS, ALIGNED)
    v_row = pick(term, v0_row, v1_row, v2_row, v3_row, TERMS)
    copy = pick(block, copy0, copy1, copy2, copy3, BLOCKS)
    line = tl.arange(0, BT)
    row = first_row + line
    there = (row < rows)[:, None]
    at = line[:, None] * stride + tl.arange(0, BK)[None, :]
    p = tl.zeros([BT, RP], tl.float32)
    start = (slab - first) * slab_columns
    end = tl.minimum(start + slab_columns, width)
    for c in tl.range(start, end, BK, num_stages=STAGES):
        column = c + tl.arange(0, BK)
        mask = there if EVEN else there & (column < width)[None, :]
        m = tl.load(base + c + at, mask=mask, other=0.0, eviction_policy="evict_first")
        high, low = _right_operand(
            v, column, width, v_row, apart, place, inside, R, TRANSPOSED, EVEN, MODE
        )
        p = _product(m, high, low, p, MODE)
        if COPY:
            _copied(m, wide_ptr, first_row, wide_row, copy, copy + c, mask)
    if partial_ptr is not None:
        share(partial_ptr, slab.to(tl.int64) * rows + first_row, p, there)
    else:
        placed = wide_ptr if PLACED else None
        scale = pick(term, scale0, scale1, scale2, scale3, TERMS)
        wide_column = pick(term, to0, to1, to2, to3, TERMS) + place
        give(p, scale, inside, row, rows, out_column, wide_column, out_ptr, placed, out_row,
             wide_row, step, SPLIT)  # fmt: skip
        if slab == 0:
            clear(row, rows, wide_ptr, wide_row, zero_from, zero_to, ZERO)


@triton.jit
def right_products(
    m0, m1, m2, m3, v0, v1, v2, v3, partial_ptr, out_ptr, wide_ptr, table_ptr, first_ptr,
    programs, rows, slab_columns, apart, c0, c1, c2, c3, m0_row, m1_row, m2_row, m3_row,
    v0_row, v1_row, v2_row, v3_row, first1, first2, first3, copy0, copy1, copy2, copy3,
    to0, to1, to2, to3, scale0, scale1, scale2, scale3, out_row, wide_row, step, zero_from, zero_to,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MODE: tl.constexpr, TRANSPOSED: tl.constexpr, COPY: tl.constexpr, PLACED: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, ZERO: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
    TASKS: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr,
    COPIED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """P of one to four matrices, finished or as shares; the last programs do the small copies."""
    program = tl.program_id(0)
    if program < programs:
        _right(
            program, m0, m1, m2, m3, v0, v1, v2, v3, partial_ptr, out_ptr, wide_ptr,
            rows, slab_columns, apart, c0, c1, c2, c3, m0_row, m1_row, m2_row, m3_row, v0_row,
            v1_row, v2_row, v3_row, first1, first2, first3, copy0, copy1, copy2, copy3,
            to0, to1, to2, to3, scale0, scale1, scale2, scale3, out_row, wide_row, step, zero_from, zero_to,
            BLOCKS, SLOTS, R, RP, MODE, TRANSPOSED, COPY, PLACED, SPLIT, EVEN, ZERO, BT, BK, STAGES,
            ALIGNED,
        )  # fmt: skip
    elif TASKS > 0:
        small_copy(program - programs, table_ptr, first_ptr, TASKS, SOURCE, TARGET, COPIED, AT_ONCE)


@triton.jit
def _gain(weight_ptr, column, width, OFFSET: tl.constexpr):
    """What an RMS norm multiplies these columns with, as a row; 1 without a weight."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
        return (weight.to(tl.float32) + OFFSET)[None, :]
    else:
        return 1.0


@triton.jit
def _normed(x, rstd_ptr, row, rows, gain, ROUND_INPUT: tl.constexpr, PTX: tl.constexpr):
    """A tile of an RMS norm's output, of a tile of its input: see ``normed``."""
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    y = x.to(tl.float32) * rstd[:, None]
    if ROUND_INPUT:
        y = y.to(x.dtype).to(tl.float32)
    y = (y * gain).to(x.dtype)
    # The products' layout would reach back to where x is read, and x be read without being on its
    # way early. From this capability on there is no such layout, and what is skipped at the loop's
    # ends may not be text of the assembler's.
    if x.dtype.primitive_bitwidth == 16 and not WIDEN and PTX and not cuda_capability_geq(10):
        y = once(y, PTX)
    return y


@triton.jit
def _left(
    program, m0, m1, m2, m3, v0, v1, v2, v3, u0, u1, u2, u3, right_ptr, left_ptr, wide_ptr, rstd_ptr,
    weight_ptr, rows, part_rows, slabs, columns, v_apart, u_apart, c0, c1, c2, c3, m0_row, m1_row, m2_row,
    m3_row, v0_row, v1_row, v2_row, v3_row, u0_row, u1_row, u2_row, u3_row, first1, first2, first3,
    before1, before2, before3, copy0, copy1, copy2, copy3, wide_row,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MODE: tl.constexpr, TRANSPOSED: tl.constexpr, COPY: tl.constexpr,
    EVEN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr, OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    RIGHT: tl.constexpr = right_ptr is not None
    part = program // slabs
    slab = program - part * slabs
    block, first = block_of(slab, first1, first2, first3, BLOCKS)
    width = pick(block, c0, c1, c2, c3, BLOCKS)
    stride = pick(block, m0_row, m1_row, m2_row, m3_row, BLOCKS)
    TERMS: tl.constexpr = BLOCKS * SLOTS
    term, place, _ = term_of(block, R, RP, SLOTS)
    within = tl.arange(0, RP)[None, :] < SLOTS * R
    u = operand_of(term, u0, u1, u2, u3, BLOCKS, SLOTS, ALIGNED)
    u_row = pick(term, u0_row, u1_row, u2_row, u3_row, TERMS)
    copy = pick(block, copy0, copy1, copy2, copy3, BLOCKS)
    c = (slab - first) * BC
    column = c + tl.arange(0, BC)
    m_base = pick(block, m0, m1, m2, m3, BLOCKS) + c
    line = tl.arange(0, BT)
    at = line[:, None] * stride + tl.arange(0, BC)[None, :]
    u_at = line[:, None] * u_row + place
    if RIGHT:
        v = operand_of(term, v0, v1, v2, v3, BLOCKS, SLOTS, ALIGNED)
        v_row = pick(term, v0_row, v1_row, v2_row, v3_row, TERMS)
        v_high, v_low = _right_operand(
            v, column, width, v_row, v_apart, place, within, R, TRANSPOSED, EVEN, MODE
        )
    gain = _gain(weight_ptr, column, width, OFFSET)
    total = tl.zeros([BC, RP], tl.float32)
    before = slab.to(tl.int64) * rows
    start = part * part_rows
    for t in tl.range(start, tl.minimum(start + part_rows, rows), BT, num_stages=STAGES):
        there = (t + line < rows)[:, None]
        mask = there if EVEN else there & (column < width)[None, :]
        m = tl.load(
            m_base + wide(t) * stride + at, mask=mask, other=0.0, eviction_policy="evict_first"
        )
        if rstd_ptr is not None:
            m = _normed(m, rstd_ptr, t + line, rows, gain, ROUND_INPUT, PTX)
        high, low = _thin(u + (wide(t) * u_row + u_at), u_apart, there & within, MODE)
        total = _product(tl.trans(m), high, low, total, MODE)
        if RIGHT:
            p = _product(m, v_high, v_low, tl.zeros([BT, RP], tl.float32), MODE)
            share(right_ptr, before + t, p, there)
        if COPY:
            _copied(m, wide_ptr, t, wide_row, copy, copy + c, mask)
    inside = (column < width)[:, None]
    first = wide(part) * columns + c + pick(block, 0, before1, before2, before3, BLOCKS)
    share(left_ptr, first, total, inside)


@triton.jit
def left_products(
    m0, m1, m2, m3, v0, v1, v2, v3, u0, u1, u2, u3, right_ptr, left_ptr, wide_ptr, rstd_ptr, weight_ptr,
    table_ptr, first_ptr,
    programs, rows, part_rows, slabs, columns, v_apart, u_apart, c0, c1, c2, c3, m0_row, m1_row,
    m2_row, m3_row, v0_row, v1_row, v2_row, v3_row, u0_row, u1_row, u2_row, u3_row, first1, first2, first3,
    before1, before2, before3, copy0, copy1, copy2, copy3, wide_row,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    MODE: tl.constexpr, TRANSPOSED: tl.constexpr, COPY: tl.constexpr,
    EVEN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr, OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, PTX: tl.constexpr,
    TASKS: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr,
    COPIED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Shares of L, and of P where V is given; the last programs do the small copies."""
    program = tl.program_id(0)
    if program < programs:
        _left(
            program, m0, m1, m2, m3, v0, v1, v2, v3, u0, u1, u2, u3, right_ptr, left_ptr, wide_ptr,
            rstd_ptr, weight_ptr, rows, part_rows, slabs, columns, v_apart, u_apart, c0, c1, c2, c3,
            m0_row, m1_row, m2_row, m3_row, v0_row, v1_row, v2_row, v3_row, u0_row, u1_row, u2_row, u3_row, first1, first2, first3,
            before1, before2, before3, copy0, copy1, copy2, copy3, wide_row,
            BLOCKS, SLOTS, R, RP, MODE, TRANSPOSED, COPY, EVEN, BT, BC, STAGES, ALIGNED,
            OFFSET, ROUND_INPUT, PTX,
        )  # fmt: skip
    elif TASKS > 0:
        small_copy(program - programs, table_ptr, first_ptr, TASKS, SOURCE, TARGET, COPIED, AT_ONCE)
