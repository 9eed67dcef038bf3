"""Launches of the gated norm's kernels: tiles, row strides, partial sums.

Tiles depend on the shapes, the dtypes and the device, never on a measurement or on what else runs.
"""

from __future__ import annotations

import functools

import torch

from fusewright.kernels import device
from fusewright.kernels.device import Limits
from fusewright.kernels.gated_rms_norm_kernels import gated_backward, gated_forward
from fusewright.kernels.launch import on_device_of, rows_of
from fusewright.kernels.launcher import Launcher
from fusewright.kernels.norm_sum_kernels import column_sums
from fusewright.kernels.norm_tiles import Tile, covered, piece_of, power_of_two

# Of a tile, "reload" stands here for: the backward works the activation out again, once the row's sum
# is known, rather than hold it.
Maybe = torch.Tensor | None
_forward, _backward, _sums = (
    Launcher(gated_forward),
    Launcher(gated_backward),
    Launcher(column_sums),
)


def _warps(numbers: int, per_thread: int, limits: Limits) -> int:
    threads = max(128, min(1024, power_of_two(numbers // per_thread + 1) // 2))
    return threads // limits.warp


def _rows(numbers: int, least: int, most: int = 16) -> int:
    return max(1, min(most, least // power_of_two(numbers)))


@functools.lru_cache(maxsize=512)
def forward_tile(width: int, itemsize: int, after: bool, limits: Limits) -> Tile:
    """2048 numbers a tile at least, 16 to a thread; half of it in float32."""
    numbers = covered(width)
    rows = _rows(numbers, 2048 if itemsize == 2 else 1024)
    return Tile(rows, _warps(rows * numbers, 16 if itemsize == 2 else 8, limits))


@functools.lru_cache(maxsize=512)
def backward_tile(width: int, itemsize: int, after: bool, summing: bool, limits: Limits) -> Tile:
    """16 numbers a thread: what a thread does once is then little beside what it does per number.

    With sums a loop, of two programs of 256 threads a multiprocessor with 128 registers a thread, or
    of one of 512, and with the next tile in flight where shared memory has room. There, a gate before
    the norm has too many numbers to hold of each element (x, g, the activation and its slope), and
    they are worked out again; of the widest rows nothing is held from before the loop either, and two
    tiles are in flight (0.87 of the bandwidth against 0.80 at 8192 on an H100).
    """
    numbers = covered(width)
    rows = _rows(numbers, 2048 if itemsize == 2 else 1024)
    few = itemsize == 4 or (numbers > 6144 and not summing and not after)
    warps = _warps(rows * numbers, 8 if few else 16, limits)
    if not summing:
        # In pieces of 16 bytes a thread the compiler holds least, where little is held at all.
        piece = warps * limits.warp * 8
        fits = after and itemsize == 2 and rows == 1 and piece < width and width % piece == 0
        return Tile(rows, warps, hoist=itemsize == 2, piece=piece if fits else 0)
    if numbers < 1024 and not few and after:
        # Several short rows to a tile: 256 threads, where 128 took twice as long (bench/sweep_gated_qk).
        rows, warps = _rows(numbers, 4096, 32), 256 // limits.warp
    per_sm = max(1, 512 // (warps * limits.warp))
    room = limits.shared // per_sm - 4096
    wide = numbers > 6144 and not after
    stages = max(1, min(3 if wide else 2, 1 + room // (rows * numbers * itemsize * 4)))
    hoist = itemsize == 2 and numbers >= 2048 and not wide
    return Tile(rows, warps, per_sm, 1 if itemsize == 4 else stages, hoist, reload=not after)


def _constants(tile: Tile, width: int) -> tuple[int | bool, ...]:
    """ROWS, PIECE, PIECES and EVEN."""
    piece = tile.piece or piece_of(width)
    return tile.rows, piece, -(-width // piece), width % piece == 0


def launch_forward(
    x: torch.Tensor, gate: torch.Tensor, weight: Maybe, y: torch.Tensor, rstd: torch.Tensor,
    eps: float, offset: float, cast: str, after: bool, activation: str, width: int,
) -> None:  # fmt: skip
    """Fill the dense y and rstd."""
    (x, x_row), (gate, gate_row) = rows_of(x), rows_of(gate)
    groups, tokens = x.shape[-1] // width, x.numel() // x.shape[-1]
    tile = forward_tile(width, x.element_size(), after, device.limits(x.device))
    precise = y.dtype is torch.float32
    with on_device_of(x):
        _forward(
            (-(-tokens // tile.rows) * groups, 1),
            (x, gate, None if weight is None else weight.contiguous(), y, rstd),
            (tokens, width, groups, x_row, gate_row, eps),
            (offset, cast == "input", after, activation, precise, *_constants(tile, width)),
            tile.warps,
        )


def launch_backward(
    dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, weight: Maybe, rstd: torch.Tensor,
    dx: Maybe, dgate: Maybe, dweight: Maybe,
    offset: float, cast: str, after: bool, activation: str, width: int,
) -> None:  # fmt: skip
    """Fill the dense dx, dgate and dweight, those that are given."""
    (dy, dy_row), (x, x_row), (gate, gate_row) = rows_of(dy), rows_of(x), rows_of(gate)
    groups, tokens = x.shape[-1] // width, x.numel() // x.shape[-1]
    limits, summing = device.limits(x.device), dweight is not None
    tile = backward_tile(width, x.element_size(), after, summing, limits)
    splits = tiles = -(-tokens // tile.rows)
    if tile.per_sm:
        most = max(1, min(tiles, tile.per_sm * limits.multiprocessors // groups))
        splits = -(-tiles // -(-tiles // most))
    partial = None
    if summing:
        partial = torch.empty((splits, width * groups), dtype=torch.float32, device=x.device)
    precise = x.dtype is torch.float32
    # A weight of more bytes than the rows takes more registers than there are.
    hoist = tile.hoist and weight is not None and weight.element_size() <= x.element_size()
    with on_device_of(x):
        _backward(
            (splits * groups, 1),
            (dy, x, gate, None if weight is None else weight.contiguous(), rstd.contiguous(),
             dx, dgate, partial),
            (tokens, width, groups, dy_row, x_row, gate_row),
            (offset, cast == "input", after, activation, precise, *_constants(tile, width),
             tile.per_sm > 0, tile.stages, hoist, tile.reload),
            tile.warps,
        )  # fmt: skip
        if partial is not None:
            block = 8 if width * groups <= 2048 else 16
            _sums(
                (-(-width * groups // block), 1),
                (partial, dweight, None),
                (splits, width * groups),
                (max(8, min(512, power_of_two(splits))), block),
                4 if block == 8 else 8,
            )
