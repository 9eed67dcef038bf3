"""A linear layer with low-rank adapters: y = x W^T + b + sum_i s_i (x A_i^T) B_i^T.

Shapes: x (..., K), W (N, K), b (N,) or absent, A_i (r_i, K), B_i (N, r_i), y (..., N).
Saved: x and the weights, nothing else; the thin product x A_i^T is made again in the backward.

Backward, with g = dy as rows (T, N), x as rows (T, K), S_i = x A_i^T and P_i = s_i g B_i (T, r_i):
    dx = g W + sum_i P_i A_i        dA_i = P_i^T x        dB_i = s_i g^T S_i
    dW = g^T x                      db = sum over rows of g

Where it rounds: each product accumulates in float32 (cuBLAS, MKL) and is rounded to the dtype of
its operands; adapters of another dtype than x work in their own (float32 adapters beside a bf16
base: the branch is computed in float32), and the sum is rounded once, to the output's dtype.

Source: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fusewright.kernels.reduce import absent
from fusewright.kernels.spec import OpSpec

Tensors = Sequence[torch.Tensor]


def reference_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: Tensors,
    up: Tensors,
    scales: Sequence[float],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y; see the module's header."""
    y = F.linear(x.to(weight.dtype), weight, bias)
    for a, b, s in zip(down, up, scales, strict=True):
        y = y + F.linear(F.linear(x.to(a.dtype), a), b) * s
    return y.to(out_dtype)


def reference_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: Tensors,
    up: Tensors,
    scales: Sequence[float],
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_down: bool,
    need_up: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of x, weight, bias, every A and every B; see the module's header."""
    g, rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    base = g.to(weight.dtype)
    dx = base @ weight if need_x else absent(x)
    ddown, dup = [], []
    for a, b, s in zip(down, up, scales, strict=True):
        branch = g.to(b.dtype)
        p = (branch @ b) * s if need_x or need_down else None
        source = rows.to(a.dtype)
        if need_x and p is not None:
            dx = dx + p @ a
        if need_down and p is not None:
            ddown.append(p.T @ source)
        if need_up:
            dup.append((branch.T @ (source @ a.T)) * s)
    dweight = base.T @ rows.to(weight.dtype) if need_weight else absent(x)
    dbias = g.sum(0).to(bias.dtype) if need_bias and bias is not None else absent(x)
    dx = dx.reshape(x.shape).to(x.dtype) if need_x else dx
    return dx, dweight, dbias, ddown, dup


def _fake_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: Tensors,
    up: Tensors,
    scales: Sequence[float],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


def _fake_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: Tensors,
    up: Tensors,
    scales: Sequence[float],
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_down: bool,
    need_up: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    return (
        x.new_empty(x.shape) if need_x else absent(x),
        torch.empty_like(weight) if need_weight else absent(x),
        torch.empty_like(bias) if need_bias and bias is not None else absent(x),
        [torch.empty_like(a) for a in down] if need_down else [],
        [torch.empty_like(b) for b in up] if need_up else [],
    )


def _save(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
    return tuple(inputs[n] for n in ("x", "weight", "bias", "down", "up", "scales"))


OPS = (
    OpSpec(
        forward="lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] down, Tensor[] up, "
        "float[] scales, ScalarType out_dtype) -> Tensor",
        backward="lora_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, "
        "Tensor[] down, Tensor[] up, float[] scales, bool need_x, bool need_weight, "
        "bool need_bias, bool need_down, bool need_up) "
        "-> (Tensor, Tensor, Tensor, Tensor[], Tensor[])",
        differentiable=("x", "weight", "bias", "down", "up"),
        outputs=1,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        fake=(_fake_fwd, _fake_bwd),
    ),
)
