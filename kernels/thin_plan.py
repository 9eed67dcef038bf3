"""How thin products are cut into launches, tiles, slabs and parts: by shapes and limits alone.

What a choice costs is counted in bytes at the device's bandwidth: the tiles that the busiest
multiprocessors read one after the other, and the float32 shares that are written and read again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fusewright.kernels.device import Limits

MOST_RANK = 256
MOST_TERMS = 4  # of one launch
SINGLE_RANK = 64  # of several terms in float32 arithmetic, whose sums do without tensor cores
_ROOMY = 200000  # bytes of shared memory, from which on the tensor cores read their operands there
_LAUNCH_BYTES = 8 * 2**20  # what the memory could move in the time of one more launch
_COMPUTED_RANKS = 192  # from which on tensor cores, not the memory, decide how long a step takes


class Term(NamedTuple):
    """One matrix of the blocks and what it is multiplied with, from one side or from both.

    Attributes:
        block: which matrix.
        right: V (C, r), or (r, C) with ``right_transposed``; P = scale M V is wanted.
        column: where P begins in the wide buffer, if it goes there.
        left: U (T, r); L = left_scale M^T U (C, r), or (r, C) with ``left_transposed``, is wanted.
    """

    block: int
    right: torch.Tensor | None = None
    right_transposed: bool = False
    scale: float = 1.0
    column: int | None = None
    left: torch.Tensor | None = None
    left_transposed: bool = False
    left_scale: float = 1.0


class Wide(NamedTuple):
    """A buffer (T, Wd) of the blocks' dtype, with a contiguous last dimension.

    Attributes:
        columns: for each block where its copy begins, or None where it is not copied (it may lie in
            the buffer already).
        step: from each group of a float32 P to the next, if P is written as [hi | lo | hi]; with 0
            it is rounded.
        zero: the range of columns to be zeroed; nothing else is written there.
        dense: results are dense tensors, also where they were written to the buffer.
    """

    buffer: torch.Tensor
    columns: Sequence[int | None]
    step: int = 0
    zero: tuple[int, int] = (0, 0)
    dense: bool = False


class Result(NamedTuple):
    """P and L of one term; None where it was not asked for."""

    right: torch.Tensor | None
    left: torch.Tensor | None


class Fact(NamedTuple):
    """What of a term decides about the launch that it is in; ``left`` and ``right``: wanted."""

    block: int
    rank: int
    dtype: torch.dtype
    right: bool
    right_transposed: bool
    left: bool
    left_transposed: bool
    placed: bool


class Pass(NamedTuple):
    """One read of some matrices: terms of one rank, on one matrix each or all on the same."""

    terms: tuple[int, ...]
    right: bool
    left: bool


class Cut(NamedTuple):
    """Tiles of ``rows`` x ``columns``; ``slab`` columns and ``part`` rows for one program."""

    rows: int
    columns: int
    stages: int
    warps: int
    slab: int
    part: int
    firsts: tuple[
        int, int, int
    ]  # of the second to the fourth matrix; ``slabs`` where there is none
    slabs: int
    parts: int
    programs: int


def padded(rank: int) -> int:
    """The power of two that the tensor cores take for a rank."""
    return max(16, 1 << (rank - 1).bit_length())


def both_ranks(limits: Limits) -> int:
    """Ranks in all, up to which shares of P cost less than a second read of the matrix."""
    return 32 if limits.shared >= _ROOMY else 16


@functools.lru_cache(maxsize=512)
def passes(facts: tuple[Fact, ...], both_most: int, most: int = MOST_RANK) -> tuple[Pass, ...]:
    """The launches that make all products: of at most ``most`` ranks of one matrix, where a term
    alone has no more; up to ``both_most`` ranks P and L share one."""
    alike: dict[Fact, list[int]] = {}
    for at, fact in enumerate(facts):
        alike.setdefault(fact._replace(block=0), []).append(at)
    found = []
    for fact, terms in alike.items():
        for group in _groups(facts, terms, fact.rank, most):
            slots = len(group) if len({facts[i].block for i in group}) == 1 else 1
            both = fact.right and fact.left
            if both and padded(slots * fact.rank) > both_most:
                found += [Pass(group, True, False), Pass(group, False, True)]
            else:
                found.append(Pass(group, fact.right, fact.left))
    return tuple(found)


def _groups(
    facts: Sequence[Fact], terms: list[int], rank: int, limit: int
) -> list[tuple[int, ...]]:
    """Terms of one launch each: several on one matrix, or one on each of several matrices."""
    of: dict[int, list[int]] = {}
    for at in terms:
        of.setdefault(facts[at].block, []).append(at)
    single = [group[0] for group in of.values() if len(group) == 1]
    groups = [tuple(single[i : i + MOST_TERMS]) for i in range(0, len(single), MOST_TERMS)]
    most = max(n for n in range(1, MOST_TERMS + 1) if n == 1 or padded(n * rank) <= limit)
    for group in of.values():
        if len(group) > 1:
            groups += [tuple(group[i : i + most]) for i in range(0, len(group), most)]
    return groups


class Tile(NamedTuple):
    """A tile before it is known how often: ``per_sm`` programs share a multiprocessor."""

    rows: int
    columns: int
    stages: int
    warps: int
    per_sm: int


def right_tile(
    ranks: int, item: int, thin_item: int, mode: int, copy: bool, limits: Limits
) -> Tile:
    """The tile of P alone; ``ranks`` padded columns of thin operands."""
    if mode == 2:
        tile = Tile(32, 32 if ranks < 64 else 16, 3, 4, 2)
    elif mode and limits.shared < _ROOMY:
        tile = Tile(32, 64, 4, 4, 2)
    elif mode:
        # Tensor cores cut off what they add up: of 64 products the sum is nearer than float32's, of
        # 128 it is not. Three parts and a sum of their own take registers.
        tile = Tile(64, 64, 4, 4, 3 if ranks <= 32 else 2) if ranks <= 64 else Tile(64, 32, 4, 8, 1)
    elif ranks <= 64:
        tile = Tile(64, 128, 4, 4, 2)
    else:
        tile = Tile(128, 64, 4, 8, 1)
    while True:
        step = tile.columns * (tile.rows * item + ranks * thin_item)
        if fits := _fitting(tile, step, 0, limits):
            return fits
        tile = tile._replace(columns=tile.columns // 2)


def left_tile(
    ranks: int, item: int, thin_item: int, mode: int, right: bool, copy: bool, limits: Limits
) -> Tile:
    """The tile of L, with P where ``right``; a ``copy`` takes the tile through registers."""
    roomy = limits.shared >= _ROOMY
    if mode == 2:
        tile = Tile(32, 64, 3, 8, 2)
    elif right:
        # The wider a slab, the fewer shares of P.
        columns = (512 if roomy else 256) >> (2 * mode + copy)
        tile = Tile(64 if roomy else 32, columns, 3, 8, 1 if columns == 512 else 2)
        if columns == 512 and ranks == 16:  # two small programs overlap better, as measured
            tile = Tile(64, 256, 3, 4, 2)
    elif ranks << mode <= 64 and not mode:
        tile = Tile(64, 128, 4, 4, 2)
    elif mode:
        tile = Tile(32, 64, 4, 8, 2)
    else:
        tile = Tile(64, 128, 4, 8, 2) if roomy else Tile(32, 64, 4, 8, 2)
    while True:
        step = tile.rows * (tile.columns * item + ranks * thin_item)
        kept = tile.columns * ranks * thin_item if right else 0
        if fits := _fitting(tile, step, kept, limits):
            return fits
        tile = tile._replace(columns=tile.columns // 2)


def _fitting(tile: Tile, step: int, kept: int, limits: Limits) -> Tile | None:
    """The tile with as many programs and stages as shared memory has room for."""
    for per_sm in range(tile.per_sm, 0, -1):
        room = limits.shared // per_sm - 2048 - kept
        if room >= 2 * step or (tile.columns <= 32 and per_sm == 1):
            stages = max(1, min(tile.stages, room // step))
            return tile._replace(stages=stages, per_sm=per_sm)
    return None


def _enough(tile: Tile, ranks: int, limits: Limits) -> int:
    """How many programs at a time are as fast as all that fit.

    Three eighths saturate the memory, as measured; the more ranks, the more multiprocessors it takes
    to make the products as fast as the memory delivers.
    """
    reading = limits.multiprocessors * tile.per_sm * 3 // 8
    return max(reading, min(_COMPUTED_RANKS, ranks) * limits.multiprocessors // _COMPUTED_RANKS)


def split(
    tiles: int, steps: int, step_bytes: int, split_bytes: int, slots: int, enough: int
) -> int:
    """Steps that one program takes, so that ``tiles`` chains of ``steps`` end soonest.

    ``slots`` programs run at a time, ``enough`` of which are as fast as all.
    """
    least, best = float("inf"), steps
    for parts in range(1, min(steps, 64) + 1):
        each = -(-steps // parts)
        count = -(-steps // each)
        full, rest = divmod(tiles * count, slots)
        cost = full * slots * each * step_bytes
        if rest:
            cost += max(rest, enough) * each * step_bytes
        cost += count * split_bytes + _LAUNCH_BYTES if count > 1 else 0
        if cost < least:
            least, best = cost, each
    return best


def _slabs(widths: Sequence[int], slab: int) -> tuple[tuple[int, int, int], int]:
    """The first slab of the second to the fourth matrix, and how many there are."""
    ends, total = [], 0
    for width in widths:
        total += -(-width // slab)
        ends.append(total)
    firsts = (*ends[:-1], total, total, total)[:3]
    return (firsts[0], firsts[1], firsts[2]), total


@functools.lru_cache(maxsize=512)
def right_cut(
    rows: int, widths: tuple[int, ...], ranks: int, item: int, thin_item: int, mode: int,
    copy: bool, limits: Limits,
) -> Cut:  # fmt: skip
    """How P of matrices (rows, width) is made."""
    tile = right_tile(ranks, item, thin_item, mode, copy, limits)
    tiles = -(-rows // tile.rows)
    steps = sum(-(-w // tile.columns) for w in widths)
    step_bytes = tile.rows * tile.columns * item
    slots = limits.multiprocessors * tile.per_sm
    enough = _enough(tile, ranks, limits)
    each = split(tiles, steps, step_bytes, 8 * rows * ranks, slots, enough)
    slab = each * tile.columns
    firsts, slabs = _slabs(widths, slab)
    return Cut(
        tile.rows,
        tile.columns,
        tile.stages,
        tile.warps,
        slab,
        rows,
        firsts,
        slabs,
        1,
        tiles * slabs,
    )


@functools.lru_cache(maxsize=512)
def left_cut(
    rows: int, widths: tuple[int, ...], ranks: int, item: int, thin_item: int, mode: int,
    right: bool, copy: bool, limits: Limits,
) -> Cut:  # fmt: skip
    """How L, and with ``right`` P too, of matrices (rows, width) is made."""
    tile = left_tile(ranks, item, thin_item, mode, right, copy, limits)
    firsts, slabs = _slabs(widths, tile.columns)
    steps = -(-rows // tile.rows)
    step_bytes = tile.rows * tile.columns * item
    slots = limits.multiprocessors * tile.per_sm
    enough = _enough(tile, ranks, limits)
    each = split(slabs, steps, step_bytes, 8 * sum(widths) * ranks, slots, enough)
    parts = -(-steps // each)
    return Cut(
        tile.rows, tile.columns, tile.stages, tile.warps, tile.columns, each * tile.rows, firsts,
        slabs, parts, slabs * parts,
    )  # fmt: skip
