"""The gradients of a linear head, gathered over chunks of rows in float32.

A 16-bit product is accumulated in float32 inside the GEMM and stays there: neither is it rounded at
the end of a chunk, nor is the sum over chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusewright.kernels.reduce import absent, compute_dtype


def matmul_wide(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, add: bool) -> None:
    """out = a b, or out += a b, in the dtype of ``out``: a 16-bit product is not rounded to 16 bits."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif not a.is_cuda:
        matmul_wide(out, a.to(out.dtype), b.to(out.dtype), add)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


class Gradients(NamedTuple):
    """What is accumulated over the chunks, in float32 (float64); None where it is not wanted."""

    x: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def add(self, d: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rows: slice) -> None:
        """Take in D of the rows of one chunk; the first chunk is written, the others are added."""
        if self.x is not None:
            matmul_wide(self.x[rows], d, weight, add=False)
        if self.weight is not None:
            matmul_wide(self.weight, d.t(), x[rows], add=rows.start > 0)
        if self.bias is not None:
            self.bias.add_(d.sum(0, dtype=self.bias.dtype))

    def results(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three tensors, absent ones as placeholders."""
        x, weight, bias = (absent(like) if t is None else t for t in self)
        return x, weight, bias


def new_gradients(
    x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> Gradients:
    """Accumulators for the inputs that need a gradient; written by the first chunk."""
    wide, device = compute_dtype(x), x.device
    some = x.shape[0] > 0  # without rows there is no first chunk to write the weight's gradient
    new = torch.empty if some else torch.zeros
    return Gradients(
        torch.empty(x.shape, dtype=wide, device=device) if need_x else None,
        new(weight.shape, dtype=wide, device=device) if need_weight else None,
        torch.zeros(weight.shape[0], dtype=wide, device=device) if need_bias else None,
    )
