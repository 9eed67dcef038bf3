"""A gated unit between adapted layers, with the thin products that read or write its numbers.

The unit's backward makes d(gate) and d(up) and has h; six thin products read these three:

    dA = P^T h            of the layer behind the unit, P = s dy B
    P_j = s_j d_j B_j     dB_j = d_j^T S_j       of the two layers before it, d_j one of d(gate), d(up)

Here they are made from the tiles while those are in registers (``glu_thin_kernels``), so that h is
never written and d(gate) and d(up) are written once and read by the one large product that needs
them. Numbers enter the products rounded as they are stored, and the products are those of ``thin``:
sums in float32, scaled, rounded once. Traffic per element of h: three numbers read, two written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fusewright.kernels import device, thin_copies
from fusewright.kernels.device import Limits
from fusewright.kernels.glu_thin_kernels import glu_backward_products, glu_forward_product
from fusewright.kernels.launch import on_device_of
from fusewright.kernels.launcher import Launcher
from fusewright.kernels.thin_copies import Copy
from fusewright.kernels.thin_launch import Products, supported
from fusewright.kernels.thin_plan import Cut, Pass, Term, Tile, Wide, padded, split

_forward = Launcher(glu_forward_product, enable_fp_fusion=True)
_backward = Launcher(glu_backward_products, enable_fp_fusion=True)
_MOST = 32  # ranks of an operand, above which sums do not fit in registers
_KINDS = (torch.bfloat16, torch.float16)


class Made(NamedTuple):
    """P and dB of the layers that made gate and up, in their order, and dA of the one that reads h."""

    right: list[torch.Tensor]
    left: list[torch.Tensor]
    own: torch.Tensor


def takes(gate_up: torch.Tensor, ranks: Sequence[int], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether the kernel serves these: one 16-bit dtype, few ranks, tensor cores."""
    alike = gate_up.dtype in _KINDS and set(dtypes) == {gate_up.dtype}
    return alike and max(ranks) <= _MOST and supported(gate_up.device)


@functools.lru_cache(maxsize=256)
def forward_tile(ranks: int, limits: Limits) -> Tile:
    """The tile of a step, by hand from bench/sweep_glu_thin.py."""
    if limits.shared < 200000:
        return Tile(32, 64, 2, 4, 1)
    return Tile(32, 256, 2, 8, 2)


@functools.lru_cache(maxsize=256)
def forward_cut(rows: int, width: int, ranks: int, limits: Limits) -> Cut:
    """How h (rows, width) and its thin product are made: tiles of rows, slabs of columns."""
    tile = forward_tile(ranks, limits)
    tiles, steps = -(-rows // tile.rows), -(-width // tile.columns)
    slots = limits.multiprocessors * tile.per_sm
    step_bytes = 6 * tile.rows * tile.columns
    each = split(tiles, steps, step_bytes, 8 * rows * ranks, slots, slots)
    slabs = -(-steps // each)
    return Cut(
        tile.rows, tile.columns, tile.stages, tile.warps, each * tile.columns, rows,
        (slabs, slabs, slabs), slabs, 1, tiles * slabs,
    )  # fmt: skip


def forward(
    gate_up: torch.Tensor,
    h: torch.Tensor,
    activation: str,
    gate_first: bool,
    term: Term,
    wide: Wide | None,
    copies: Sequence[Copy],
) -> torch.Tensor:
    """Fill ``h`` with the unit's value, and return the thin product of ``term`` (T, r).

    Args:
        gate_up: (T, 2F), not interleaved, with any row stride.
        h: (T, F), with any row stride.
        term: its right product, of a transposed operand.
        wide: the memory of h with its room, where the product goes beside.
        copies: small copies that ride along, of tensors that nothing here reads.
    """
    rows, width = h.shape
    clear = wide is not None and wide.zero[1] > wide.zero[0]
    made = Products([h], [term], Pass((0,), True, False), wide, [None], clear)
    ranks = padded(made.rank)
    limits = device.limits(h.device)
    cut = forward_cut(rows, width, ranks, limits)
    works = thin_copies.prepare(copies)
    work = works.pop() if works else thin_copies.NONE
    shape = cut.slabs * rows * ranks
    shares = (
        None if cut.slabs == 1 and wide is not None else h.new_empty(shape, dtype=torch.float32)
    )
    gate, up = (0, width) if gate_first else (width, 0)
    zero = (0, 0) if wide is None else wide.zero
    a, out = made.vs[0], made.out
    assert out is not None
    with on_device_of(h):
        _forward(
            (cut.programs + work.programs, 1),
            (gate_up, h, a, shares, None if shares is not None else out, work.table, work.first),
            (cut.programs, rows, cut.slab, width, gate, up, gate_up.stride(0), h.stride(0),
             a.stride(0), term.scale, made.rank, term.column or 0, *zero),
            (activation, made.rank, ranks, width % cut.columns == 0, made.zero, cut.rows,
             cut.columns, cut.stages, device.ptx(limits), *work.constants),
            cut.warps,
        )  # fmt: skip
        if shares is not None:
            made.launch_sums(cut, shares, None)
        thin_copies.launch(works)
    (p,) = made.rights
    assert p is not None
    return p


@functools.lru_cache(maxsize=256)
def backward_tile(ranks: int, limits: Limits) -> Tile:
    """The tile, by hand from bench/sweep_glu_thin.py.

    The wider a slab, the fewer shares of P, and the more sums in registers.
    """
    if limits.shared < 200000:
        return Tile(16 if ranks > 16 else 32, 64, 2, 4, 1)
    return Tile(16, 128, 3, 4, 3)


@functools.lru_cache(maxsize=256)
def backward_cut(rows: int, width: int, ranks: int, limits: Limits) -> Cut:
    """How the unit of ``width`` columns is made: slabs of columns, parts of the rows."""
    tile = backward_tile(ranks, limits)
    slabs, steps = -(-width // tile.columns), -(-rows // tile.rows)
    slots = limits.multiprocessors * tile.per_sm
    step_bytes = 10 * tile.rows * tile.columns
    each = split(slabs, steps, step_bytes, 24 * width * ranks, slots, slots)
    parts = -(-steps // each)
    return Cut(
        tile.rows, tile.columns, tile.stages, tile.warps, tile.columns, each * tile.rows,
        (slabs, 2 * slabs, 2 * slabs), 2 * slabs, parts, slabs * parts,
    )  # fmt: skip


def _shares(cut: Cut, rows: int, width: int, ranks: int, own: int) -> tuple[int, int, int]:
    """Numbers in the float32 shares of P, dB and dA."""
    return cut.slabs * rows * ranks, 2 * cut.parts * width * ranks, cut.parts * width * own


def scratch(rows: int, width: int, rank: int, own: int, limits: Limits) -> int:
    """Bytes that :func:`backward` takes for its shares, of adapters of these ranks before and behind."""
    ranks = padded(rank)
    cut = backward_cut(rows, width, ranks, limits)
    return 4 * sum(_shares(cut, rows, width, ranks, padded(own)))


def backward(
    dh: torch.Tensor,
    gate_up: torch.Tensor,
    out: torch.Tensor,
    activation: str,
    gate_first: bool,
    p: torch.Tensor,
    terms: Sequence[Term],
    wide: Wide | None,
    copies: Sequence[Copy],
) -> Made:
    """Fill ``out`` with d(gate_up), and make the products.

    Args:
        dh: (T, F).
        gate_up, out: (T, 2F), not interleaved, with any row stride.
        p: (T, r') of the layer that reads h.
        terms: of the first F columns of ``out`` and of the last, both from both sides, of one rank.
        wide: where P goes beside; its buffer is the memory of ``out`` or other memory.
        copies: small copies to be made, of tensors that nothing here reads.
    """
    rows, width = dh.shape
    halves = [out[:, :width], out[:, width:]]
    pair = Products(halves, list(terms), Pass((0, 1), True, True), wide, [None, None],
                    wide is not None and wide.zero[1] > wide.zero[0])  # fmt: skip
    of_h = Term(0, left=p, left_transposed=True)
    own = Products(halves[:1], [of_h], Pass((0,), False, True), None, [], False)
    ranks, own_ranks = padded(pair.rank), padded(own.rank)
    limits = device.limits(dh.device)
    cut = backward_cut(rows, width, ranks, limits)
    works = thin_copies.prepare(copies)  # beside the kernel: in it they take 28 registers a thread
    sizes = _shares(cut, rows, width, ranks, own_ranks)
    shares = dh.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    gate, up = (0, 1) if gate_first else (1, 0)
    slabs = cut.slabs // 2
    operands = [t for side in (pair.vs, pair.us) for t in (side[gate], side[up])]
    with on_device_of(dh):
        _backward(
            (cut.programs, 1),
            (dh, gate_up, out, own.us[0], *operands, *shares),
            (rows, cut.part, slabs, width, gate * width, up * width, gate * slabs,
             up * slabs, dh.stride(0), gate_up.stride(0), out.stride(0), own.us[0].stride(0),
             *[t.stride(0) for t in operands]),
            (activation, pair.rank, ranks, own.rank, own_ranks, width % cut.columns == 0, cut.rows,
             cut.columns, cut.stages, device.ptx(limits)),
            cut.warps,
        )  # fmt: skip
        pair.launch_sums(cut, shares[0], shares[1])
        own.launch_sums(cut._replace(slabs=1, firsts=(1, 1, 1)), None, shares[2])
        thin_copies.launch(works)
    (da,) = own.lefts
    assert da is not None
    return Made([t for t in pair.rights if t is not None],
                     [t for t in pair.lefts if t is not None], da)  # fmt: skip
