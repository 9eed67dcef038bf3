"""Launches of the cross-entropy's kernels.

Blocks and warps depend on the width of a row and its dtype alone. ``form`` is the ``LossForm`` of
``cross_entropy``: ignore_index, label_smoothing, softcap, scale, z_loss.
"""

from __future__ import annotations

from typing import Any

import torch

from fusewright.kernels.arrivals import counter
from fusewright.kernels.cross_entropy_kernels import (
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_reduce,
    loss_and_gradient_in_place,
    scale_to,
)
from fusewright.kernels.device import limits
from fusewright.kernels.launch import on_device_of
from fusewright.kernels.launcher import Launcher
from fusewright.kernels.recording import recorder

# What they assert stays in.
_forward, _reduce = (
    Launcher(kernel, enable_fp_fusion=True, debug=True, sanitize_overflow=False)
    for kernel in (cross_entropy_forward, cross_entropy_reduce)
)
_backward = Launcher(cross_entropy_backward, enable_fp_fusion=True)
_in_place = Launcher(loss_and_gradient_in_place, enable_fp_fusion=True)
_scale = Launcher(scale_to, enable_fp_fusion=True)


def _constants(form: Any, dtype: torch.dtype) -> tuple[bool, bool, bool, bool, bool]:
    """SCALED, CAPPED, SMOOTH, Z_LOSS and PRECISE."""
    return (
        form.scale != 1.0,
        form.softcap > 0,
        form.label_smoothing > 0,
        form.z_loss > 0,
        dtype is torch.float32,
    )


def _numbers(form: Any) -> tuple[float, float, float, float, float]:
    inverse = 1.0 / form.softcap if form.softcap > 0 else 0.0
    return form.label_smoothing, form.z_loss, form.scale, form.softcap, inverse


def _row_block(vocab: int, itemsize: int, largest: int) -> tuple[int, int, int]:
    """(BLOCK, WIDE, warps) of a program that walks along a row: 16 bytes a lane and step."""
    wide = 16 // itemsize
    block = min(max(1 << (vocab - 1).bit_length(), 32 * wide), largest)
    return block, wide, max(1, min(largest // 1024, block // (32 * wide)))


def _shifted(logits: torch.Tensor, wide: int) -> bool:
    """Whether rows begin between multiples of 16 bytes, or end there."""
    vocab = logits.shape[1]
    return logits.stride(0) % wide != 0 or vocab % wide != 0 or recorder.address(logits) % 16 != 0


def _added(rows: int) -> int:
    """How many rows are added up at a time."""
    return min(2048, max(32, 1 << (rows - 1).bit_length()))


def launch_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    lse: torch.Tensor,
    form: Any,
    reduction: str,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Write every row's loss (any float dtype) and log-sum-exp (float64).

    Returns the loss (None for "none") and the factor of the gradients; asserts the labels' range.
    """
    (rows, vocab), device = logits.shape, logits.device
    block, wide, warps = _row_block(vocab, logits.element_size(), 8192)
    if form.softcap > 0:  # tanh needs registers: a thread takes half as many numbers at a time
        block = max(block // 2, 32 * wide)
    each = reduction == "none"
    loss = None if each else torch.empty((), dtype=torch.float32, device=device)
    factor = torch.empty((), dtype=torch.float64, device=device)
    with on_device_of(logits):
        _forward(
            (rows, 1),
            (logits, labels, losses, lse, counter(device), loss, factor),
            (logits.stride(0), labels.stride(0), vocab, form.ignore_index, *_numbers(form)),
            (*_constants(form, logits.dtype), block, wide, _shifted(logits, wide), not each,
             reduction == "mean", min(_added(rows), 256 * warps)),
            warps,
        )  # fmt: skip
    return loss, factor


def launch_reduce(
    losses: torch.Tensor,
    labels: torch.Tensor,
    denominator: torch.Tensor | None,
    vocab: int,
    ignore_index: int,
    mean: bool,
    unit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of rows that other launches have written, and the factor; asserts the labels' range.

    The assertion is the kernel's: nothing is brought to the host, and nothing launched for it.
    """
    device = labels.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    factor = torch.empty((), dtype=torch.float64, device=device)
    rows = labels.shape[0]
    block = _added(rows)
    with on_device_of(labels):
        _reduce(
            (1, 1),
            (losses, labels, denominator, loss, factor),
            (rows, labels.stride(0), vocab, ignore_index, unit),
            (mean, denominator is not None, block),
            max(1, block // 256),
        )
    return loss, factor


def launch_backward(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    factor: torch.Tensor,
    dlogits: torch.Tensor,
    form: Any,
) -> None:
    """Write d(logits) into a dense tensor."""
    rows, vocab = logits.shape
    wide = 16 // logits.element_size()
    # Both must be shifted alike; otherwise elements are read and written one by one.
    alike = (logits.stride(0) - vocab) % wide == 0 and (
        recorder.address(logits) - recorder.address(dlogits)
    ) % 16 == 0
    shifted = alike and _shifted(logits, wide)
    block = min(2048, max(wide, 1 << (vocab - 1).bit_length()))
    column_blocks = -(-(vocab + (wide - 1 if shifted else 0)) // block)
    warps = max(1, block // (1024 if wide == 8 else 512))
    with on_device_of(logits):
        _backward(
            (rows * column_blocks, 1),
            (dloss, logits, labels, lse, factor, dlogits),
            (dloss.stride(0) if dloss.dim() else 0, logits.stride(0), labels.stride(0), vocab,
             column_blocks, form.ignore_index, *_numbers(form)),
            (*_constants(form, logits.dtype), block, wide, shifted),
            warps,
        )  # fmt: skip


def in_place_block(vocab: int, wide: int, capped: bool, warp: int) -> tuple[int, int]:
    """(BLOCK, warps): the longer the row, the fewer rows at once, so that they stay in the cache."""
    if capped:  # tanh needs registers: a thread takes half as many numbers at a time
        largest, most = 4096, 8
    elif wide == 8 and vocab > 65536:
        largest, most = 16384, 32
    else:
        largest, most = 8192, 8 if wide == 8 else 16
    block = min(max(1 << (vocab - 1).bit_length(), 32 * wide), largest)
    return block, max(1, min(most, 1024 // warp, block // (32 * wide)))


def launch_in_place(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    form: Any,
    unit: float,
    gradient: bool,
) -> None:
    """Write the rows' losses (float64) and overwrite the logits with ``unit`` d(logits)."""
    rows, vocab = logits.shape
    wide = 16 // logits.element_size()
    block, warps = in_place_block(vocab, wide, form.softcap > 0, limits(logits.device).warp)
    with on_device_of(logits):
        _in_place(
            (rows, 1),
            (logits, labels, losses),
            (logits.stride(0), labels.stride(0), vocab, form.ignore_index, *_numbers(form), unit),
            (*_constants(form, logits.dtype), gradient, block, wide, _shifted(logits, wide)),
            warps,
        )


def launch_scale(
    saved: torch.Tensor, dloss: torch.Tensor, factor: torch.Tensor, out: torch.Tensor
) -> None:
    """Write saved times the upstream scalar times ``factor``; both dense."""
    block = 2048
    with on_device_of(saved):
        blocks = -(-saved.numel() // block)
        _scale((blocks, 1), (saved, dloss, factor, out), (saved.numel(),), (block,), 4)
