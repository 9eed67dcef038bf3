"""Which tile a norm's kernels take: a function of width, element size and the device's limits alone.

Chosen by hand from bench/sweep_norms.py on an H200; nothing is measured when a kernel is used.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from fusewright.kernels.device import Limits


class Tile(NamedTuple):
    """How a norm is cut: rows and warps of a tile, its loop, and what stays in registers.

    With ``per_sm`` programs per multiprocessor each walks over the tiles and has the next ones in
    flight (``stages`` - 1 of them, in shared memory); with 0 there are as many programs as tiles.
    ``hoist`` keeps the weight in registers from tile to tile; ``reload`` has the backward read a row
    again, from the cache, rather than hold it in registers while it is summed up.
    """

    rows: int
    warps: int
    per_sm: int = 0
    stages: int = 1
    hoist: bool = False
    reload: bool = False


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def blocks(width: int) -> tuple[int, int]:
    """The powers of two that a row is read in: one, and where that wastes much another after it."""
    block = power_of_two(width)
    # 512, so that 256 threads have 4 bytes each to fetch: with less there is no prefetching.
    tail = max(512, power_of_two(width - block // 2))
    if width <= 1024 or tail >= block // 2:
        return block, 0
    return block // 2, tail


def _warps(numbers: int, per_thread: int, limits: Limits) -> int:
    """Warps that give each thread some numbers of a tile; four at least, 1024 threads at most."""
    threads = max(128, min(1024, numbers // per_thread))
    return threads // limits.warp


def _stages(wanted: int, tile_bytes: int, per_sm: int, limits: Limits) -> int:
    """The stages for which shared memory has room beside what the reductions need."""
    return max(1, min(wanted, 1 + (limits.shared // per_sm - 4096) // tile_bytes))


@functools.lru_cache(maxsize=512)
def forward_tile(
    width: int,
    itemsize: int,
    inputs: int,
    limits: Limits,
    centered: bool = False,
    wide: bool = False,
) -> Tile:
    """2048 numbers a tile at least, 16 to a thread; more to a thread where that lets more rows wait.

    A centred norm waits for two sums in turn, so it wants many rows in flight and cheap barriers.
    ``wide``: the weight has more bytes than the rows, and so takes more registers.
    """
    block, tail = blocks(width)
    rows = max(1, min(16, 2048 // block))
    many = block > 8192 or (centered and itemsize == 2 and width in (4096, 8192))
    return Tile(rows, _warps(rows * block, 32 if many else 8 if wide and tail else 16, limits))


@functools.lru_cache(maxsize=512)
def backward_tile(
    width: int, itemsize: int, inputs: int, sums: int, limits: Limits, wide: bool = False
) -> Tile:
    """As the forward; with ``sums`` weight gradients, whose rows stay in registers, a loop."""
    block, tail = blocks(width)
    if sums:
        tile = _summing_tile(block, tail, itemsize, inputs, sums, limits)
        return tile._replace(reload=wide and block > 8192)
    rows = max(1, min(16, 2048 // block))
    if block > 8192:
        single = itemsize == 4
        return Tile(1, _warps(block, 16 if single else 32, limits), reload=single)
    return Tile(rows, _warps(rows * block, 16, limits))


def _summing_tile(
    block: int, tail: int, itemsize: int, inputs: int, sums: int, limits: Limits
) -> Tile:
    """The tile of a backward with weight gradients.

    Bandwidth needs some 60 KiB in flight on a multiprocessor. Rows of up to 8192 numbers have 512
    threads there with 128 registers each: two programs, which prefetch unless a row fills them, or
    one program for wider rows and where there are two sums.
    """
    numbers = block + tail
    if itemsize == 4:
        rows = max(1, min(16, 2048 // block))
        warps = _warps(rows * block, 8, limits)
        per_sm = max(1, min(4, 768 // (warps * limits.warp)))
        stages = _stages(2, rows * numbers * itemsize * (inputs + 1), per_sm, limits)
        return Tile(rows, warps, per_sm, stages)
    rows = max(1, min(32, (2048 if tail else 4096) // block))
    narrow = numbers <= 4096 or (sums == 1 and numbers <= 8192)
    threads, per_sm = (256, 2) if narrow else (512, 1)
    if numbers > 12288 or (sums == 1 and numbers == 8192):
        return Tile(rows, threads // limits.warp, per_sm)
    tile_bytes = rows * numbers * itemsize * (inputs + 1)
    stages = _stages(4 if rows * numbers < 4096 else 3, tile_bytes, per_sm, limits)
    return Tile(rows, threads // limits.warp, per_sm, stages)


def sums_fit(width: int, itemsize: int, sums: int) -> bool:
    """Whether a row of partial sums fits in registers beside the rows that are read."""
    return sum(blocks(width)) * (itemsize * 3 + 4 * sums) <= 16384 * 10
