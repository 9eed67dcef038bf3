"""Precision rules shared by the references and the kernels."""

from __future__ import annotations

import torch


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype in which a reference computes: float32, or float64 when an input is float64."""
    if any(t is not None and t.dtype is torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def absent(like: torch.Tensor) -> torch.Tensor:
    """The placeholder, of shape (0,), that stands for a gradient nobody asked for."""
    return like.new_empty(0)


def unbroadcast(grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sum ``grad`` over the dimensions along which an operand of ``shape`` was broadcast."""
    return grad.sum_to_size(shape) if grad.shape != shape else grad
