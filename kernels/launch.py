"""What every launch needs: Triton where there is one, the tensor's device, and row strides.

Where Triton is missing, ``triton.jit`` leaves a function as it is and ``HAS_TRITON`` is False, so that
the kernels' files can be imported everywhere and the references be used.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ModuleNotFoundError:
    HAS_TRITON = False
    triton = SimpleNamespace(jit=lambda f: f, constexpr_function=lambda f: f)
    tl = SimpleNamespace(constexpr=lambda value: value)

__all__ = ["HAS_TRITON", "launchable", "on_device_of", "row_stride", "rows_of", "tl", "triton"]

_HERE = contextlib.nullcontext()


_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))


def launchable(t: torch.Tensor, *dtypes: torch.dtype) -> bool:
    """Whether a kernel can take ``t`` beside other tensors of these dtypes; else the reference does.

    A grid has at least one program, and float64 is left to the references.
    """
    return HAS_TRITON and t.dtype in _DTYPES and t.numel() > 0 and _DTYPES.issuperset(dtypes)


def on_device_of(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's, if it is another."""
    if not t.is_cuda or t.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(t.get_device())


def row_stride(t: torch.Tensor) -> int | None:
    """The distance between rows of ``t`` seen as (-1, width), or None where there is no such view.

    Of a row in one piece, the last dimension must be contiguous, and every outer dimension must step
    evenly over the one inside it.
    """
    shape = t.shape
    if t.is_contiguous():
        return shape[-1]
    strides = t.stride()
    if strides[-1] != 1 and shape[-1] != 1:
        return None
    step = expected = None
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != expected:
            return None
        expected = stride * size
    return shape[-1] if step is None else step


def rows_of(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """``t``, or a contiguous copy where its rows do not lie evenly, with its row stride."""
    step = row_stride(t)
    if step is None:
        return t.contiguous(), t.shape[-1]
    return t, step
