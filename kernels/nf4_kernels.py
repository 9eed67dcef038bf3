"""Triton kernels of the dequantisation of 4-bit weights; formats and rounding are in ``nf4``.

One takes whole blocks and moves 4 bytes a thread; the other takes any shape, element by element.
"""

from __future__ import annotations

from fusewright.kernels.launch import tl, triton


@triton.jit
def _scale(
    block, inside, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr,
    NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
):  # fmt: skip
    """The scales of blocks, as bitsandbytes rounds them."""
    scale = tl.load(absmax_ptr + block, mask=inside, other=0)
    if NESTED:
        inner = tl.load(nested_code_ptr + scale.to(tl.int32), mask=inside, other=0.0)
        outer = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=inside, other=0.0)
        scale = inner * outer + tl.load(offset_ptr)
    return scale


@triton.jit
def dequantize_blocks(
    packed_ptr, absmax_ptr, code_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, out_ptr,
    blocks, row_blocks, out_row, behind,
    NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, BLOCKSIZE: tl.constexpr,
    DENSE: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr, BEHIND: tl.constexpr,
):  # fmt: skip
    """STEPS times BLOCKS whole blocks, none of which crosses a row.

    A thread reads 4 bytes and writes the 8 elements in them, so that both are coalesced. Behind a
    row's last block, ``behind`` (at most BEHIND) columns become zeros.
    """
    HALF: tl.constexpr = BLOCKSIZE // 2
    start = tl.program_id(0) * (BLOCKS * STEPS)
    for step in tl.static_range(STEPS):
        block = start + step * BLOCKS + tl.arange(0, BLOCKS)
        inside = block < blocks
        both = inside[:, None]
        scale = _scale(
            block, inside, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr,
            NESTED, NESTED_BLOCKSIZE,
        )  # fmt: skip
        wide = block.to(tl.int64)[:, None]
        at = wide * HALF + tl.arange(0, HALF)[None, :]
        packed = tl.load(packed_ptr + at, mask=both, other=0, eviction_policy="evict_first")
        packed = packed.to(tl.int32)
        first = tl.load(code_ptr + (packed >> 4)) * scale[:, None]
        second = tl.load(code_ptr + (packed & 15)) * scale[:, None]
        weight = tl.reshape(tl.join(first, second), (BLOCKS, BLOCKSIZE))
        column = tl.arange(0, BLOCKSIZE)[None, :]
        if DENSE:
            to = wide * BLOCKSIZE + column
        else:
            row = block // row_blocks
            rest = (block - row * row_blocks) * BLOCKSIZE
            to = row.to(tl.int64)[:, None] * out_row + (rest[:, None] + column)
        tl.store(out_ptr + to, weight, mask=both)
        if BEHIND > 0:
            row = block // row_blocks
            last = inside & (block - row * row_blocks == row_blocks - 1)
            room = tl.arange(0, BEHIND)[None, :]
            to = row.to(tl.int64)[:, None] * out_row + (row_blocks * BLOCKSIZE + room)
            nothing = tl.zeros((BLOCKS, BEHIND), out_ptr.dtype.element_ty)
            tl.store(out_ptr + to, nothing, mask=last[:, None] & (room < behind))


@triton.jit
def dequantize_elements(
    packed_ptr, absmax_ptr, code_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr, out_ptr,
    elements, columns, out_row,
    NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Any shape, one element a lane: blocks may cross rows, and a byte too."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    scale = _scale(
        element // BLOCKSIZE, inside, absmax_ptr, offset_ptr, nested_absmax_ptr, nested_code_ptr,
        NESTED, NESTED_BLOCKSIZE,
    )  # fmt: skip
    packed = tl.load(packed_ptr + element // 2, mask=inside, other=0).to(tl.int32)
    nibble = tl.where(element % 2 == 0, packed >> 4, packed & 15)
    weight = tl.load(code_ptr + nibble) * scale
    row = element // columns
    to = row * out_row + (element - row * columns)
    tl.store(out_ptr + to, weight, mask=inside)
