"""Pieces of the thin products' kernels: what a program works on, the ends of P, small copies, sums.

A launch has up to four matrices with one thin operand each (BLOCKS), or one matrix with up to four
(SLOTS). Where one value is needed of several, ``pick`` selects it by the number of the matrix.
"""

from __future__ import annotations

from fusewright.kernels.launch import HAS_TRITON, tl, triton

if HAS_TRITON:
    from triton import knobs

    # The interpreter keeps bfloat16 as integers and multiplies these; it gets float32, which is exact.
    WIDEN = tl.constexpr(bool(knobs.runtime.interpret))
else:
    WIDEN = False


@triton.jit
def once(x, PTX: tl.constexpr):
    """x of 16 bits, which the compiler is not to work out again for each layout it is wanted in.

    It would read and compute all that x is made of three times over, and spill (in the backward of the
    gated unit on sm_90: 255 registers and 1.5 KB spilled against 187 registers at 32 x 128 numbers
    and 4 warps). Text of other assemblers is left out without PTX.
    """
    if PTX and not WIDEN:
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    return x


@triton.jit
def wide(i):
    """A number in 64 bits; the interpreter's loops count in Python's own."""
    return tl.full([], 0, tl.int64) + i


@triton.jit
def pick(i, a, b, c, d, N: tl.constexpr):
    """The i-th of the first N values."""
    if N == 1:
        return a
    elif N == 2:
        return tl.where(i == 0, a, b)
    elif N == 3:
        return tl.where(i == 0, a, tl.where(i == 1, b, c))
    else:
        return tl.where(i < 2, tl.where(i == 0, a, b), tl.where(i == 2, c, d))


@triton.jit
def block_of(slab, first1, first2, first3, N: tl.constexpr):
    """Which matrix a slab belongs to, and that matrix's first slab."""
    block = 0
    if N > 1:
        block = (slab >= first1).to(tl.int32)
    if N > 2:
        block += (slab >= first2).to(tl.int32)
    if N > 3:
        block += (slab >= first3).to(tl.int32)
    return block, pick(block, 0, first1, first2, first3, N)


@triton.jit
def term_of(block, R: tl.constexpr, RP: tl.constexpr, SLOTS: tl.constexpr):
    """(term, place in its operand, place in the output) of each of RP columns, as (1, RP).

    The operands of several slots stand beside each other: column k belongs to the slot k // R.
    """
    k = tl.arange(0, RP)[None, :]
    if SLOTS > 1:
        slot = tl.minimum(k // R, SLOTS - 1)
        return slot, k - slot * R, k
    else:
        return block, k, block * R + k


@triton.jit
def _apart(a, b, ALIGNED: tl.constexpr):
    """How many elements b begins behind a; pointers at multiples of 16 bytes if ALIGNED."""
    BYTES: tl.constexpr = a.dtype.element_ty.primitive_bitwidth // 8
    between = (b.to(tl.int64) - a.to(tl.int64)) // BYTES
    return tl.multiple_of(between, 16 // BYTES) if ALIGNED else between


@triton.jit
def operand_of(term, a, b, c, d, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a term's operand begins: of one matrix, or for each column of several slots.

    Columns get distances from the first operand, since not every compiler selects pointers.
    """
    if SLOTS == 1:
        return pick(term, a, b, c, d, BLOCKS)
    elif SLOTS == 2:
        return a + pick(term, wide(0), _apart(a, b, ALIGNED), 0, 0, 2)
    elif SLOTS == 3:
        return a + pick(term, wide(0), _apart(a, b, ALIGNED), _apart(a, c, ALIGNED), 0, 3)
    else:
        return a + pick(
            term, wide(0), _apart(a, b, ALIGNED), _apart(a, c, ALIGNED), _apart(a, d, ALIGNED), 4
        )


@triton.jit
def give(
    p, scale, inside, row, rows, out_column, wide_column, out_ptr, wide_ptr, out_row, wide_row, step,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Store rows of a finished P: scaled, then rounded once, or as rounded and rest and rounded."""
    p *= scale
    at = row.to(tl.int64)[:, None]
    mask = (row < rows)[:, None] & inside
    if out_ptr is not None:
        to = out_ptr + (at * out_row + out_column)
        tl.store(to, p.to(out_ptr.dtype.element_ty), mask=mask)
    if wide_ptr is not None:
        to = wide_ptr + (at * wide_row + wide_column)
        high = p.to(wide_ptr.dtype.element_ty)
        tl.store(to, high, mask=mask)
        if SPLIT:
            low = (p - high.to(tl.float32)).to(wide_ptr.dtype.element_ty)
            tl.store(to + step, low, mask=mask)
            tl.store(to + 2 * step, high, mask=mask)


@triton.jit
def clear(row, rows, wide_ptr, wide_row, zero_from, zero_to, ZERO: tl.constexpr):
    """Zero the columns of the wide buffer that nothing is written to."""
    if ZERO > 0:
        column = zero_from + tl.arange(0, ZERO)[None, :]
        to = wide_ptr + (row.to(tl.int64)[:, None] * wide_row + column)
        nothing = tl.zeros([row.shape[0], ZERO], wide_ptr.dtype.element_ty)
        tl.store(to, nothing, mask=(row < rows)[:, None] & (column < zero_to))


@triton.jit
def share(ptr, first, total, there):
    """Store a share; ``first`` counts the rows of RP numbers before it."""
    RP: tl.constexpr = total.shape[1]
    to = ptr + first * RP + tl.arange(0, total.shape[0])[:, None] * RP
    tl.store(to + tl.arange(0, RP)[None, :], total, mask=there)


@triton.jit
def small_copy(
    program, table_ptr, first_ptr, TASKS: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one of the small copies; the table's columns are in ``thin_copies``."""
    firsts = tl.load(table_ptr + tl.arange(0, TASKS) * 10)
    task = table_ptr + (tl.sum((firsts <= program).to(tl.int32), 0) - 1) * 10
    source = tl.load(task + 1).to(tl.pointer_type(SOURCE))
    target = first_ptr + tl.load(task + 2)
    count = tl.load(task + 3).to(tl.int32)
    inner = tl.load(task + 4).to(tl.int32)
    source_outer, source_inner = tl.load(task + 5), tl.load(task + 6)
    target_outer, target_inner = tl.load(task + 7), tl.load(task + 8)
    step = tl.load(task + 9)
    start = (program - tl.load(task).to(tl.int32)) * BLOCK
    for e in range(start, tl.minimum(start + BLOCK, count), AT_ONCE):
        element = e + tl.arange(0, AT_ONCE)
        inside = element < count
        i = element // inner
        j = (element - i * inner).to(tl.int64)
        i = i.to(tl.int64)
        x = tl.load(source + (i * source_outer + j * source_inner), mask=inside, other=0.0)
        to = target + (i * target_outer + j * target_inner)
        high = x.to(TARGET)
        tl.store(to, high, mask=inside)
        if step != 0:
            low = (x.to(tl.float32) - high.to(tl.float32)).to(TARGET)
            tl.store(to + step, high, mask=inside)
            tl.store(to + 2 * step, low, mask=inside)


@triton.jit
def small_copies(
    table_ptr, first_ptr, TASKS: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The small copies by themselves."""
    small_copy(tl.program_id(0), table_ptr, first_ptr, TASKS, SOURCE, TARGET, BLOCK, AT_ONCE)


@triton.jit
def _sum(
    ptr, first, last, apart, there, BLOCK: tl.constexpr, RP: tl.constexpr, AHEAD: tl.constexpr
):
    """The sum of the shares first to last, in this order; AHEAD of them are read at a time."""
    total = tl.zeros([BLOCK, RP], tl.float32)
    for s in range(first, last, AHEAD):
        for ahead in tl.static_range(AHEAD):
            wanted = there & (s + ahead < last)
            total += tl.load(ptr + wide(s + ahead) * apart, mask=wanted, other=0.0)
    return total


@triton.jit
def sum_shares(
    right_ptr, left_ptr, out_ptr, wide_ptr, l0, l1, l2, l3,
    right_programs, rows, columns, parts, c0, c1, c2, c3, before1, before2, before3,
    first1, first2, first3, slabs, to0, to1, to2, to3, scale0, scale1, scale2, scale3,
    left0, left1, left2, left3, out_row, wide_row, step, zero_from, zero_to,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    SPLIT: tl.constexpr, TRANSPOSED: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr, RIGHT_AHEAD: tl.constexpr, LEFT_AHEAD: tl.constexpr,
):  # fmt: skip
    """P and L of every term from their shares: BLOCK rows of one P or BLOCK columns of one L.

    The terms of one matrix lie beside each other in RP columns. Block i has the slabs from
    first_i up to first_(i + 1), which is ``slabs`` for the last.
    """
    TERMS: tl.constexpr = BLOCKS * SLOTS
    program = tl.program_id(0)
    k = tl.arange(0, RP)[None, :]
    inside = k < SLOTS * R
    if program < right_programs:
        if right_ptr is not None:
            block = program % BLOCKS
            term, place, out_column = term_of(block, R, RP, SLOTS)
            row = (program // BLOCKS) * BLOCK + tl.arange(0, BLOCK)
            there = (row < rows)[:, None]
            first = pick(block, 0, first1, first2, first3, BLOCKS)
            last = pick(block, first1, first2, first3, slabs, BLOCKS)
            at = right_ptr + (row.to(tl.int64)[:, None] * RP + k)
            p = _sum(at, first, last, rows * RP, there & inside, BLOCK, RP, RIGHT_AHEAD)
            scale = pick(term, scale0, scale1, scale2, scale3, TERMS)
            wide_column = pick(term, to0, to1, to2, to3, TERMS) + place
            give(p, scale, inside, row, rows, out_column, wide_column, out_ptr, wide_ptr, out_row,
                 wide_row, step, SPLIT)  # fmt: skip
            if block == 0:
                clear(row, rows, wide_ptr, wide_row, zero_from, zero_to, ZERO)
    else:
        if left_ptr is not None:
            block = (program - right_programs) % BLOCKS
            term, place, _ = term_of(block, R, RP, SLOTS)
            width = pick(block, c0, c1, c2, c3, BLOCKS)
            before = pick(block, 0, before1, before2, before3, BLOCKS)
            column = ((program - right_programs) // BLOCKS) * BLOCK + tl.arange(0, BLOCK)
            mask = (column < width)[:, None] & inside
            at = left_ptr + ((before + column)[:, None] * RP + k)
            total = _sum(at, 0, parts, columns * RP, mask, BLOCK, RP, LEFT_AHEAD)
            total *= pick(term, left0, left1, left2, left3, TERMS)
            to = operand_of(term, l0, l1, l2, l3, BLOCKS, SLOTS, True)
            if TRANSPOSED:
                to += place * width + column[:, None]
            else:
                to += column[:, None] * R + place
            tl.store(to, total.to(l0.dtype.element_ty), mask=mask)


@triton.jit
def split_parts(
    s0, s1, s2, s3, target_ptr, n0, n1, n2, n3, c0, c1, c2, c3, row0, row1, row2, row3,
    first1, first2, first3, before1, before2, before3, apart, COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Float32 operands (n elements in rows of c) as three 16-bit parts whose sum they are."""
    i, first = block_of(tl.program_id(0), first1, first2, first3, COUNT)
    e = (tl.program_id(0) - first) * BLOCK + tl.arange(0, BLOCK)
    mask = e < pick(i, n0, n1, n2, n3, COUNT)
    c = pick(i, c0, c1, c2, c3, COUNT)
    line = e // c
    at = line.to(tl.int64) * pick(i, row0, row1, row2, row3, COUNT) + (e - line * c)
    x = tl.load(pick(i, s0, s1, s2, s3, COUNT) + at, mask=mask, other=0.0)
    high = x.to(target_ptr.dtype.element_ty)
    rest = x - high.to(tl.float32)
    middle = rest.to(target_ptr.dtype.element_ty)
    lowest = (rest - middle.to(tl.float32)).to(target_ptr.dtype.element_ty)
    to = target_ptr + pick(i, 0, before1, before2, before3, COUNT) + e
    tl.store(to, high, mask=mask)
    tl.store(to + apart, middle, mask=mask)
    tl.store(to + 2 * apart, lowest, mask=mask)
