"""Launches of the row norms' kernels: row strides, tiles, and buffers of partial sums.

Tiles depend on the shapes, the dtypes and the device, never on a measurement or on what else runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusewright.kernels import device
from fusewright.kernels.device import Limits
from fusewright.kernels.launch import HAS_TRITON, on_device_of
from fusewright.kernels.launcher import Launcher
from fusewright.kernels.norm_kernels import norm_backward, norm_forward
from fusewright.kernels.norm_sum_kernels import column_sums, weight_gradients
from fusewright.kernels.norm_tiles import (
    Tile,
    backward_tile,
    forward_tile,
    piece_of,
    power_of_two,
    sums_fit,
)
from fusewright.kernels.reduce import absent
from fusewright.kernels.rows import empty_ordered, empty_rows, leading_order

MAX_WIDTH = 16384
_forward, _backward = Launcher(norm_forward), Launcher(norm_backward)
_weights, _columns = Launcher(weight_gradients), Launcher(column_sums)
_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))
Maybe = torch.Tensor | None


def launchable(x: torch.Tensor, *others: torch.Tensor | torch.dtype | None) -> bool:
    """Whether the kernels take rows of ``x`` with these; otherwise the reference does."""
    dtypes = (o.dtype if isinstance(o, torch.Tensor) else o for o in others if o is not None)
    return (
        HAS_TRITON
        and x.numel() > 0
        and x.shape[-1] <= MAX_WIDTH
        and x.dtype in _DTYPES
        and all(d in _DTYPES for d in dtypes)
    )


def _constants(tile: Tile, width: int) -> tuple[int | bool, ...]:
    """The constants of a tile, in the kernels' order."""
    piece = tile.piece or piece_of(width)
    cut = (tile.rows, piece, -(-width // piece), width % piece == 0)
    return *cut, tile.per_sm > 0, tile.stages


def _programs(tiles: int, per_sm: int, limits: Limits) -> int:
    """As many programs as asked for, with the tiles spread evenly."""
    if not per_sm:
        return tiles
    most = min(tiles, per_sm * limits.multiprocessors)
    return -(-tiles // -(-tiles // most))


class _Walk(NamedTuple):
    """How to walk the rows of several tensors together.

    Row i lies at (i // inner) * strides[0] + (i % inner) * strides[1], two strides per tensor; what
    is dense in this order has its row i at i * width.
    """

    tensors: list[torch.Tensor]
    inner: int
    strides: list[int]


def _two_levels(order: list[int], tensors: list[torch.Tensor]) -> _Walk | None:
    """The walk in the given order of dimensions, or None where two strides do not describe it."""
    shape = tensors[0].shape
    if any(t.stride(-1) != 1 for t in tensors) and shape[-1] != 1:
        return None
    groups: list[tuple[int, int]] = []  # (innermost dimension, number of rows), from the inside
    within = -1
    for d in reversed([d for d in order if shape[d] != 1]):
        if groups and all(t.stride(d) == t.stride(within) * shape[within] for t in tensors):
            groups[-1] = (groups[-1][0], groups[-1][1] * shape[d])
        elif len(groups) == 2:
            return None
        else:
            groups.append((d, shape[d]))
        within = d
    if not groups:
        return _Walk(tensors, 1, [0, 0] * len(tensors))
    if len(groups) == 1:
        return _Walk(tensors, 1, [s for t in tensors for s in (t.stride(groups[0][0]), 0)])
    (low, inner), (high, _) = groups
    return _Walk(tensors, inner, [s for t in tensors for s in (t.stride(high), t.stride(low))])


def _walk(*tensors: torch.Tensor) -> _Walk:
    """The walk in the first tensor's order in memory; copies of the tensors where there is none."""
    if all(t.is_contiguous() for t in tensors):
        return _Walk(list(tensors), 1, [tensors[0].shape[-1], 0] * len(tensors))
    order = leading_order(tensors[0])
    found = _two_levels(order, list(tensors))
    if found is None:
        dense = [empty_ordered(t, t.shape, order, t.dtype).copy_(t) for t in tensors]
        found = _two_levels(order, dense)
        assert found is not None, "dense rows have one stride"
    return found


def _in_order(statistic: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A saved statistic, dense in the order of the rows of ``x`` even if it was moved meanwhile."""
    if x.is_contiguous() and statistic.is_contiguous():
        return statistic
    dense = empty_rows(x, statistic.dtype, statistic=True)
    return statistic if statistic.stride() == dense.stride() else dense.copy_(statistic)


def _dense(vector: Maybe) -> Maybe:
    return None if vector is None else vector.contiguous()


def _wide(vector: Maybe, x: torch.Tensor) -> bool:
    return vector is not None and vector.element_size() > x.element_size()


class Forward(NamedTuple):
    """What the forward gives; the sum and the mean where the norm has them."""

    y: torch.Tensor
    sum: Maybe
    mean: Maybe
    rstd: torch.Tensor


def forward(
    x: torch.Tensor,
    residual: Maybe,
    weight: Maybe,
    bias: Maybe,
    eps: float,
    offset: float,
    cast: str,
    out_dtype: torch.dtype,
    centered: bool,
    out: Maybe = None,
) -> Forward:
    """Normalise rows; with ``out`` (same shape, contiguous last dimension) y is written there."""
    width = x.shape[-1]
    rstd = empty_rows(x, torch.float32, statistic=True)
    mean = empty_rows(x, torch.float32, statistic=True) if centered else None
    total = None if residual is None else empty_rows(x, x.dtype)
    inputs = (x,) if residual is None else (x, residual)
    y = empty_rows(x, out_dtype) if out is None else out
    walk = _walk(*inputs, y)
    target = walk.tensors[-1]
    strides = walk.strides if residual is not None else [*walk.strides[:2], 0, 0, *walk.strides[2:]]
    rows = x.numel() // width
    limits = device.limits(x.device)
    tile = forward_tile(width, x.element_size(), len(inputs), limits, centered, _wide(weight, x))
    tensors = (
        walk.tensors[0], None if residual is None else walk.tensors[1],
        _dense(weight), _dense(bias), target, total, mean, rstd,
    )  # fmt: skip
    with on_device_of(x):
        _forward(
            (_programs(-(-rows // tile.rows), tile.per_sm, limits), 1),
            tensors,
            (rows, width, walk.inner, *strides, eps),
            (offset, centered, cast == "input", *_constants(tile, width), tile.reload),
            tile.warps,
        )
    if target is not y:
        y.copy_(target)
    return Forward(y, total, mean, rstd)


class Backward(NamedTuple):
    """The gradients; of shape (0,) where nobody asked."""

    dx: torch.Tensor
    dweight: torch.Tensor
    dbias: torch.Tensor


def backward(
    dy: torch.Tensor,
    dsum: Maybe,
    x: torch.Tensor,
    weight: Maybe,
    bias: Maybe,
    mean: Maybe,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool = False,
) -> Backward:
    """Gradients of ``forward``; ``x`` is the sum where there was a residual."""
    width = x.shape[-1]
    dx = empty_rows(x, x.dtype) if need_x else None
    walk = _walk(x, dy) if dsum is None else _walk(x, dy, dsum)
    job = _Job(walk, _dense(weight), None if mean is None else _in_order(mean, x),
               _in_order(rstd, x), offset, cast == "input")  # fmt: skip
    wanted = [v for v, need in ((weight, need_weight), (bias, need_bias)) if need and v is not None]
    with on_device_of(x):
        fit = sums_fit(width, x.element_size(), len(wanted), _wide(weight, x))
        if not wanted or (need_x and fit):
            partial = _row_gradients(job, dx, len(wanted), need_weight and weight is not None)
        else:
            if need_x:
                _row_gradients(job, dx, 0, False)
            partial = _sum_gradients(job, len(wanted), need_weight and weight is not None)
        sums = _finish(partial, wanted)
    none = absent(x)
    dweight = sums.pop(0) if need_weight and weight is not None else none
    dbias = sums.pop(0) if need_bias and bias is not None else none
    return Backward(none if dx is None else dx, dweight, dbias)


class _Job(NamedTuple):
    """What the backward's kernels share. The walk is over x, dy and maybe the sum's gradient."""

    walk: _Walk
    weight: Maybe
    mean: Maybe
    rstd: torch.Tensor
    offset: float
    round_input: bool


def _partial(x: torch.Tensor, sums: int, programs: int) -> Maybe:
    if not sums:
        return None
    return torch.empty((sums, programs, x.shape[-1]), dtype=torch.float32, device=x.device)


def _row_gradients(job: _Job, dx: Maybe, sums: int, of_weight: bool) -> Maybe:
    """Launch ``norm_backward``; the partial sums of the weight's gradient come before the bias's."""
    x, dy = job.walk.tensors[:2]
    dsum = job.walk.tensors[2] if len(job.walk.tensors) > 2 else None
    strides = job.walk.strides if dsum is not None else [*job.walk.strides, 0, 0]
    width = x.shape[-1]
    rows = x.numel() // width
    limits = device.limits(x.device)
    tile = backward_tile(
        width, x.element_size(), len(job.walk.tensors), sums, limits, _wide(job.weight, x)
    )
    programs = _programs(-(-rows // tile.rows), tile.per_sm, limits)
    partial = _partial(x, sums, programs)
    tensors = (
        dy, dsum, x, job.weight, job.mean, job.rstd, dx,
        partial[0] if partial is not None and of_weight else None,
        partial[-1] if partial is not None and sums > of_weight else None,
    )  # fmt: skip
    _backward(
        (programs, 1),
        tensors,
        (rows, width, job.walk.inner, *strides[2:], *strides[:2]),
        (
            job.offset,
            job.mean is not None,
            job.round_input,
            *_constants(tile, width),
            tile.hoist,
            tile.reload,
        ),
        tile.warps,
    )
    return partial


def _sum_gradients(job: _Job, sums: int, of_weight: bool) -> Maybe:
    """Launch ``weight_gradients``."""
    x, dy = job.walk.tensors[:2]
    width = x.shape[-1]
    rows = x.numel() // width
    tile_rows, block = 16, 256
    blocks = -(-width // block)
    splits = _programs(-(-rows // tile_rows), max(1, 8 // blocks), device.limits(x.device))
    partial = _partial(x, sums, splits)
    assert partial is not None
    _weights(
        (splits * blocks, 1),
        (dy, x, job.mean, job.rstd, partial[0] if of_weight else None,
         partial[-1] if sums > of_weight else None),
        (rows, width, job.walk.inner, *job.walk.strides[2:4], *job.walk.strides[:2], blocks),
        (job.mean is not None, job.round_input, tile_rows, block),
        4,
    )  # fmt: skip
    return partial


def _finish(partial: Maybe, wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    """Add up the partial sums, into vectors like those wanted."""
    if partial is None:
        return []
    sums = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in wanted]
    count, rows, width = partial.shape
    # All rows at once where registers allow: the time is that of one trip to the second cache.
    block = 8 if width <= 2048 else 16
    _columns(
        (-(-width // block), count),
        (partial, sums[0], sums[1] if count > 1 else None),
        (rows, width),
        (max(8, min(512, power_of_two(rows))), block),
        4 if block == 8 else 8,
    )
    return sums
