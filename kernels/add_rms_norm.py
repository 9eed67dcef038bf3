"""The residual sum and its RMS normalisation in one pass.

    s = round(x + residual)     r = (mean(s^2) + eps)^(-1/2)     y = s r (offset + w)

Shapes: x, residual, s, y (..., D), w (D,) or absent, rstd r (...) in float32. Both s and y are
outputs. Saved: s, w, r; neither x nor residual. Casting modes as in kernels/rms_norm.py; s is
rounded to the dtype of x, as eager does, before it is normalised.

Backward, with g = dy (offset + w), s^ = s r and means over the last dimension:
    d = ds + r (g - s^ mean(g s^))      dx = dresidual = d      dw = sum over rows of dy s^
The two gradients are one tensor, rounded once where eager rounds twice. A sum that nobody else used
has no ds, and none is read.

Traffic: forward reads x and residual and writes s and y; backward reads dy, ds and s and writes d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusewright.kernels import norm_launch, rms_norm
from fusewright.kernels.reduce import absent, compute_dtype
from fusewright.kernels.rows import check_like, empty_rows
from fusewright.kernels.spec import OpSpec


def check(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, cast: str) -> None:
    """Refuse wrong shapes, dtypes, devices and modes, by name."""
    rms_norm.check(x, weight, cast)
    check_like(residual, x, "residual")


def reference_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, s and rstd in plain PyTorch; see the module's header."""
    check(x, residual, weight, cast)
    total = empty_rows(x, x.dtype).copy_(x + residual)
    y, rstd = rms_norm.reference_fwd(total, weight, eps, offset, cast, out_dtype)
    return y, total, rstd


def _given(dy: torch.Tensor | None, total: torch.Tensor) -> torch.Tensor:
    """The gradient of y; zeros where y alone is not used, which is rare."""
    return torch.zeros_like(total) if dy is None else dy


def reference_bwd(
    dy: torch.Tensor | None,
    dsum: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    need_x: bool,
    need_residual: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of x and of residual, and dweight, in plain PyTorch."""
    dtype = compute_dtype(total, weight)
    dy = _given(dy, total)
    rest = (rstd, offset, cast)
    dweight = rms_norm.reference_bwd(dy, total, weight, *rest, False, need_weight)[1]
    if not (need_x or need_residual):
        return absent(total), dweight
    g, r = dy.to(dtype), rstd.to(dtype).unsqueeze(-1)
    scale = rms_norm.gain(weight, offset, dtype)
    g = g if scale is None else g * scale
    d = rms_norm.row_gradient(g, total.to(dtype) * r, r, rms_norm.row_mean)
    d = d if dsum is None else d + dsum.to(dtype)
    return empty_rows(total, total.dtype).copy_(d), dweight


def triton_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, s and rstd on the GPU. y is ``out`` if given: of x's shape, its last dimension contiguous."""
    check(x, residual, weight, cast)
    if not norm_launch.launchable(x, weight, out_dtype):
        y, total, rstd = reference_fwd(x, residual, weight, eps, offset, cast, out_dtype)
        return (y if out is None else out.copy_(y)), total, rstd
    rest = (eps, offset, cast, out_dtype, False, out)
    done = norm_launch.forward(x, residual, weight, None, *rest)
    assert done.sum is not None
    return done.y, done.sum, done.rstd


def triton_bwd(
    dy: torch.Tensor | None,
    dsum: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    need_x: bool,
    need_residual: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of x and of residual, and dweight, on the GPU."""
    dy = _given(dy, total)
    needs = (need_x, need_residual, need_weight)
    if not norm_launch.launchable(total, weight, dy, dsum):
        return reference_bwd(dy, dsum, total, weight, rstd, offset, cast, *needs)
    rest = (None, rstd, offset, cast, need_x or need_residual, need_weight)
    done = norm_launch.backward(dy, dsum, total, weight, None, *rest)
    return done.dx, done.dweight


def _fake_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check(x, residual, weight, cast)
    rstd = empty_rows(x, compute_dtype(x, weight), statistic=True)
    return empty_rows(x, out_dtype), empty_rows(x, x.dtype), rstd


def _fake_bwd(
    dy: torch.Tensor | None,
    dsum: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    need_x: bool,
    need_residual: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    d = empty_rows(total, total.dtype) if need_x or need_residual else absent(total)
    dw = torch.empty_like(weight) if need_weight and weight is not None else absent(total)
    return d, dw


def _save(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
    return outputs[1], inputs["weight"], outputs[2], inputs["offset"], inputs["cast"]


OPS = (
    OpSpec(
        forward="add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, "
        "str cast, ScalarType out_dtype) -> (Tensor y, Tensor sum, Tensor rstd)",
        backward="add_rms_norm_backward(Tensor? dy, Tensor? dsum, Tensor sum, "
        "Tensor? weight, Tensor rstd, float offset, str cast, bool need_x, bool need_residual, bool need_weight) "
        "-> (Tensor dx, Tensor dweight)",
        differentiable=("x", "residual", "weight"),
        outputs=2,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        triton=(triton_fwd, triton_bwd),
        cheap=True,
        fake=(_fake_fwd, _fake_bwd),
        gradients=(0, 0, 1),
    ),
)
