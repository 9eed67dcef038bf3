"""Rows of a tensor: the last dimension is a row, the leading ones enumerate the rows.

An output keeps the order in which its input's leading dimensions lie in memory, so that a kernel
reads and writes along the same path and a transposed view of a projection stays one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

CASTS = ("output", "input")


def leading_order(x: torch.Tensor) -> list[int]:
    """The leading dimensions of ``x``, outermost in memory first."""
    strides = x.stride()[:-1]
    order = list(range(len(strides)))
    for at in range(1, len(order)):  # insertion sort: stable, and few guards on symbolic strides
        while at and strides[order[at - 1]] < strides[order[at]]:
            order[at - 1], order[at] = order[at], order[at - 1]
            at -= 1
    return order


def empty_ordered(
    like: torch.Tensor, shape: Sequence[int], order: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """A dense tensor of ``shape`` whose first dimensions lie in memory in the given order."""
    strides, step = [0] * len(shape), 1
    for d in (*range(len(shape) - 1, len(order) - 1, -1), *reversed(order)):
        strides[d] = step
        step = step * max(shape[d], 1)
    return torch.empty_strided(shape, strides, dtype=dtype, device=like.device)


def empty_rows(x: torch.Tensor, dtype: torch.dtype, statistic: bool = False) -> torch.Tensor:
    """A new tensor shaped like ``x``, or one value per row, laid out in the order of ``x``."""
    shape = x.shape[:-1] if statistic else x.shape
    if x.is_contiguous():
        return torch.empty(shape, dtype=dtype, device=x.device)
    return empty_ordered(x, shape, leading_order(x), dtype)


def check_rows(x: torch.Tensor, name: str = "x") -> None:
    """Refuse what has no rows of floating point numbers."""
    if x.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating point dtype, got {x.dtype}")


def check_like(other: torch.Tensor, x: torch.Tensor, name: str, of: str = "x") -> None:
    """Refuse a tensor whose shape, dtype or device is not that of ``x``."""
    if other.shape != x.shape:
        raise ValueError(
            f"{name}: expected the shape of {of} {tuple(x.shape)}, got {tuple(other.shape)}"
        )
    if other.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of {of} {x.dtype}, got {other.dtype}")
    if other.device != x.device:
        raise ValueError(f"{name}: expected the device of {of} {x.device}, got {other.device}")


def check_vector(vector: torch.Tensor | None, x: torch.Tensor, name: str) -> None:
    """Refuse a weight or bias that is not one vector of the row's width."""
    if vector is None:
        return
    if vector.dim() != 1 or vector.shape[0] != x.shape[-1]:
        raise ValueError(f"{name}: expected shape ({x.shape[-1]},), got {tuple(vector.shape)}")
    if not vector.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating point dtype, got {vector.dtype}")
    if vector.device != x.device:
        raise ValueError(f"{name}: expected the device of x {x.device}, got {vector.device}")


def check_cast(cast: str) -> None:
    """Refuse an unknown casting mode."""
    if cast not in CASTS:
        raise ValueError(f"cast: expected one of {CASTS}, got {cast!r}")
