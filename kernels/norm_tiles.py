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
    ``hoist`` keeps the weight in registers from tile to tile; ``reload`` reads a row again, from the
    cache, rather than hold it in registers while it is summed up. A row is cut into pieces of
    ``piece`` columns, a power of two; 0 leaves it to ``piece_of``.
    """

    rows: int
    warps: int
    per_sm: int = 0
    stages: int = 1
    hoist: bool = False
    reload: bool = False
    piece: int = 0


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def piece_of(width: int) -> int:
    """The widest power of two whose multiples cover a row and idle for at most an eighth of it.

    Of 256 columns at least, so that 128 threads have 4 bytes each to fetch: with less there is no
    prefetching.
    """
    piece = power_of_two(width)
    while width > 1024 and piece > 256 and -width % piece > width // 8:
        piece //= 2
    return piece


def covered(width: int) -> int:
    """The columns that a row takes in registers."""
    return width + -width % piece_of(width)


def _warps(numbers: int, per_thread: int, limits: Limits, least: int = 128) -> int:
    """Warps that give each thread some numbers of a tile: a power of two, 1024 threads at most."""
    threads = max(least, limits.warp, min(1024, power_of_two(numbers // per_thread + 1) // 2))
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
    """2048 numbers a tile at least, 16 to a thread.

    A centred norm waits for two sums in turn, so it needs more rows in flight: some 64 KiB of them
    on a multiprocessor. It gets 32 numbers a thread, so that barriers join few warps, and a wide row
    is read again, which costs no register. ``wide``: the weight has more bytes than the rows, and so
    takes more registers.
    """
    numbers = covered(width)
    rows = max(1, min(16, 2048 // numbers))
    if centered and itemsize == 2 and numbers >= 1024:
        reload = numbers > 6144 and inputs == 1
        return Tile(1, _warps(numbers, 32, limits, 32), reload=reload)
    per_thread = 8 if wide and piece_of(width) < numbers else 32 if numbers > 12288 else 16
    return Tile(rows, _warps(rows * numbers, per_thread, limits))


@functools.lru_cache(maxsize=512)
def backward_tile(
    width: int, itemsize: int, inputs: int, sums: int, limits: Limits, wide: bool = False
) -> Tile:
    """As the forward; with ``sums`` weight gradients, whose rows stay in registers, a loop."""
    numbers = covered(width)
    if sums:
        return _summing_tile(width, itemsize, inputs, sums, limits, wide)
    rows = max(1, min(16, 2048 // numbers))
    if numbers > 8192:
        # Two programs of 512 threads on a multiprocessor have 64 registers a thread.
        single, widest = itemsize == 4, numbers > 12288
        piece = 0 if not widest or (wide and not single) else 4096 if single else 2048
        again = single or not (wide and widest)
        return Tile(1, _warps(numbers, 16 if single else 24, limits), reload=again, piece=piece)
    return Tile(rows, _warps(rows * numbers, 16, limits))


def _summing_tile(
    width: int, itemsize: int, inputs: int, sums: int, limits: Limits, wide: bool
) -> Tile:
    """The tile of a backward with weight gradients.

    Bandwidth needs some 60 KiB in flight on a multiprocessor. Rows of up to 8192 numbers have 512
    threads there with 128 registers each: two programs, which prefetch unless a row fills them, or
    one program for wider rows and where much is read or summed. Where the sums fill the registers,
    a row is read again rather than held.
    """
    numbers = covered(width)
    if itemsize == 4:
        rows = max(1, min(16, 2048 // numbers))
        warps = _warps(rows * numbers, 8, limits)
        per_sm = max(1, min(4, 768 // (warps * limits.warp)))
        stages = _stages(2, numbers * itemsize * (rows * inputs + 1), per_sm, limits)
        crowded = sums == 2 and piece_of(width) < numbers
        return Tile(rows, warps, per_sm, 1 if crowded else stages)
    if piece_of(width) < numbers < 4096:
        # Many short pieces: four programs of 128 threads, so that each has enough of a row to do.
        threads, per_sm, rows = 128, 4, 1
    else:
        narrow = numbers <= 5120 or (sums == 1 and numbers <= (8192 if inputs == 2 else 6144))
        threads, per_sm = (256, 2) if narrow else (512, 1)
        rows = max(1, min(32, 4096 // power_of_two(numbers)))
    warps = threads // limits.warp
    if numbers > 12288:
        again = wide or sums == 2 or inputs > 2
        return Tile(rows, warps, per_sm, reload=again, piece=8192 if sums == 2 or inputs > 2 else 0)
    if sums == 1 and inputs == 2 and numbers == 8192:
        return Tile(rows, warps, per_sm)
    tile_bytes = numbers * itemsize * (rows * inputs + (2 if wide else 1))
    stages = _stages(4 if rows * numbers < 4096 else 3, tile_bytes, per_sm, limits)
    return Tile(rows, warps, per_sm, stages)


def sums_fit(width: int, itemsize: int, sums: int, wide: bool = False) -> bool:
    """Whether a row of partial sums fits in registers beside the rows that are read."""
    numbers = covered(width)
    if itemsize == 4:
        return numbers <= (12288 if sums == 1 else 8192)
    return sums == 1 or numbers <= 8192 or not wide
