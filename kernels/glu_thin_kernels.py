"""Triton kernels that make a gated unit's numbers and multiply them with thin operands at once.

The mathematics is that of ``glu`` and ``thin``: a tile that other kernels would store, and a thin
product read again, is multiplied while it is in registers, after it was rounded to what is stored.
Shares of sums go to a float32 scratch in the layout of ``thin_kernels``, whose ``sum_shares`` adds
them in order. 16-bit operands throughout.
"""

from __future__ import annotations

from fusewright.kernels.elementary import up_and_slope, value, value_and_slope
from fusewright.kernels.launch import tl, triton
from fusewright.kernels.thin_kernels import _product
from fusewright.kernels.thin_parts import clear, give, once, share, small_copy, wide


@triton.jit
def _thin_rows(ptr, first, line, place, row_stride, there, inside):
    """Rows of a thin operand, zeros beyond its ranks."""
    return tl.load(
        ptr + (wide(first) * row_stride + line[:, None] * row_stride + place),
        mask=there & inside,
        other=0.0,
    )


@triton.jit
def _gradients(gate, up, dh, ACTIVATION: tl.constexpr, PTX: tl.constexpr):
    """d(gate), d(up) and h of a tile, rounded to its dtype."""
    d = dh.to(tl.float32)
    act, slope = value_and_slope(gate.to(tl.float32), 1.0, ACTIVATION, False)
    u, up_slope = up_and_slope(up.to(tl.float32), ACTIVATION, False)
    dgate = (d * u * slope).to(gate.dtype)
    dup = (d * act * up_slope).to(gate.dtype)
    h = (act * u).to(gate.dtype)
    return once(dgate, PTX), once(dup, PTX), once(h, PTX)


@triton.jit
def glu_backward_products(
    dh_ptr, gate_ptr, out_ptr, p_ptr, bg_ptr, bu_ptr, sg_ptr, su_ptr,
    right_ptr, left_ptr, own_ptr, rows, part_rows, slabs, width, gate_at, up_at, gate_slab, up_slab, dh_row, gate_row, out_row, p_row,
    bg_row, bu_row, sg_row, su_row,
    ACTIVATION: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, OWN: tl.constexpr,
    OWN_PADDED: tl.constexpr, EVEN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """d(gate) and d(up); shares of their products with B and S, and of P^T h.

    A program takes BC columns of the unit and a part of the rows. ``own`` is P of the layer that
    reads h, R the rank of the two that made gate and up.
    """
    program = tl.program_id(0)
    part = program // slabs
    slab = program - part * slabs
    c = slab * BC
    column = c + tl.arange(0, BC)
    inside = (column < width)[None, :]
    k = tl.arange(0, RP)[None, :]
    within = k < R
    own = tl.arange(0, OWN_PADDED)[None, :]
    owned = own < OWN
    down = (column < width)[:, None] & within
    bg = tl.load(bg_ptr + column[:, None] * bg_row + k, mask=down, other=0.0)
    bu = tl.load(bu_ptr + column[:, None] * bu_row + k, mask=down, other=0.0)
    line = tl.arange(0, BT)
    of_gate = tl.zeros([BC, RP], tl.float32)
    of_up = tl.zeros([BC, RP], tl.float32)
    of_h = tl.zeros([BC, OWN_PADDED], tl.float32)
    start = part * part_rows
    for t in tl.range(start, tl.minimum(start + part_rows, rows), BT, num_stages=STAGES):
        there = (t + line < rows)[:, None]
        mask = there if EVEN else there & inside
        at = gate_ptr + (wide(t) * gate_row + line[:, None] * gate_row + column[None, :])
        dh_at = dh_ptr + (wide(t) * dh_row + line[:, None] * dh_row + column[None, :])
        gate = tl.load(at + gate_at, mask=mask, other=0.0, eviction_policy="evict_first")
        up = tl.load(at + up_at, mask=mask, other=0.0, eviction_policy="evict_first")
        dh = tl.load(dh_at, mask=mask, other=0.0, eviction_policy="evict_first")
        p = _thin_rows(p_ptr, t, line, own, p_row, there, owned)
        sg = _thin_rows(sg_ptr, t, line, k, sg_row, there, within)
        su = _thin_rows(su_ptr, t, line, k, su_row, there, within)
        dgate, dup, h = _gradients(gate, up, dh, ACTIVATION, PTX)
        to = out_ptr + (wide(t) * out_row + line[:, None] * out_row + column[None, :])
        tl.store(to + gate_at, dgate, mask=mask)
        tl.store(to + up_at, dup, mask=mask)
        of_h = _product(tl.trans(h), p, (0, 0), of_h, 0)
        of_gate = _product(tl.trans(dgate), sg, (0, 0), of_gate, 0)
        of_up = _product(tl.trans(dup), su, (0, 0), of_up, 0)
        pg = _product(dgate, bg, (0, 0), tl.zeros([BT, RP], tl.float32), 0)
        pu = _product(dup, bu, (0, 0), tl.zeros([BT, RP], tl.float32), 0)
        share(right_ptr, wide(gate_slab + slab) * rows + t, pg, there)
        share(right_ptr, wide(up_slab + slab) * rows + t, pu, there)
    kept = (column < width)[:, None]
    first = wide(part) * (2 * width) + c
    share(left_ptr, first + gate_at, of_gate, kept)
    share(left_ptr, first + up_at, of_up, kept)
    share(own_ptr, wide(part) * width + c, of_h, kept)


@triton.jit
def glu_forward_product(
    gate_ptr, h_ptr, a_ptr, partial_ptr, out_ptr, table_ptr, first_ptr,
    programs, rows, slab_columns, width, gate_at, up_at, gate_row, h_row, a_row, scale, out_row,
    wide_column, zero_from, zero_to,
    ACTIVATION: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, EVEN: tl.constexpr,
    ZERO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PTX: tl.constexpr, TASKS: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr,
    COPIED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """h = act(gate) up, and scale h A^T: finished beside h and behind its rows, or shares of it.

    A program takes BT rows and a slab of columns.
    """
    program = tl.program_id(0)
    if program < programs:
        tiles = tl.cdiv(rows, BT)
        slab = program // tiles
        first_row = (program - slab * tiles) * BT
        line = tl.arange(0, BT)
        row = first_row + line
        there = (row < rows)[:, None]
        k = tl.arange(0, RP)[None, :]
        within = k < R
        start = slab * slab_columns
        total = tl.zeros([BT, RP], tl.float32)
        for c in tl.range(start, tl.minimum(start + slab_columns, width), BK, num_stages=STAGES):
            column = c + tl.arange(0, BK)
            mask = there if EVEN else there & (column < width)[None, :]
            at = gate_ptr + (
                wide(first_row) * gate_row + line[:, None] * gate_row + column[None, :]
            )
            gate = tl.load(at + gate_at, mask=mask, other=0.0, eviction_policy="evict_first")
            up = tl.load(at + up_at, mask=mask, other=0.0, eviction_policy="evict_first")
            a = tl.load(
                a_ptr + (tl.trans(k) * a_row + column[None, :]),
                mask=tl.trans(within) & (column < width)[None, :],
                other=0.0,
            )
            u, _ = up_and_slope(up.to(tl.float32), ACTIVATION, False)
            h = value(gate.to(tl.float32), 1.0, ACTIVATION, False) * u
            h = once(h.to(h_ptr.dtype.element_ty), PTX)
            tl.store(
                h_ptr + (wide(first_row) * h_row + line[:, None] * h_row + column[None, :]),
                h, mask=mask,
            )  # fmt: skip
            total = _product(h, tl.trans(a), (0, 0), total, 0)
        if partial_ptr is not None:
            share(partial_ptr, wide(slab) * rows + first_row, total, there)
        else:
            give(total, scale, within, row, rows, k, wide_column + k, out_ptr, h_ptr, out_row, h_row,
                 0, False)  # fmt: skip
            clear(row, rows, h_ptr, h_row, zero_from, zero_to, ZERO)
    elif TASKS > 0:
        small_copy(program - programs, table_ptr, first_ptr, TASKS, SOURCE, TARGET, COPIED, AT_ONCE)
