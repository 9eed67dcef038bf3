"""RMS normalisation over the last dimension.

    r = (mean(x^2) + eps)^(-1/2)        x^ = x r        y = x^ (offset + w)

Shapes: x (..., D), w (D,) or absent, y (..., D), rstd r (...) in float32. Saved: x, w, r.
y and dx lie in memory in the order of x's leading dimensions.

Where it rounds (x of dtype t, statistics always in float32):
    cast="output"   y = round(x^ (offset + w))                  one rounding, at the output
    cast="input"    y = (offset + w) round_t(x^)                x^ is rounded to t before the weight

Backward, with g = dy (offset + w) and means over the last dimension:
    dx = r (g - x^ mean(g x^))          dw = sum over rows of dy x^

Source: B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019.
Traffic: forward reads and writes x once; backward reads x and dy and writes dx once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusewright.kernels import norm_launch
from fusewright.kernels.reduce import absent, compute_dtype
from fusewright.kernels.rows import check_cast, check_rows, check_vector, empty_rows
from fusewright.kernels.spec import OpSpec


def row_mean(t: torch.Tensor) -> torch.Tensor:
    """The mean of each row, kept as a column."""
    return t.mean(-1, keepdim=True)


def row_gradient(g: Any, xhat: Any, r: Any, mean: Callable[[Any], Any]) -> Any:
    """The gradient of x from that of x^, over tensors or symbols."""
    return r * (g - xhat * mean(g * xhat))


def round_through(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``t`` with its values rounded to ``dtype``."""
    return t.to(dtype).to(t.dtype)


def gain(weight: torch.Tensor | None, offset: float, dtype: torch.dtype) -> torch.Tensor | None:
    """offset + w, or None without a weight."""
    return None if weight is None else weight.to(dtype) + offset


def check(x: torch.Tensor, weight: torch.Tensor | None, cast: str) -> None:
    """Refuse wrong shapes, dtypes, devices and modes, by name."""
    check_rows(x)
    check_vector(weight, x, "weight")
    check_cast(cast)


def reference_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and rstd in plain PyTorch; see the module's header."""
    check(x, weight, cast)
    dtype = compute_dtype(x, weight)
    xf = x.to(dtype)
    r = torch.rsqrt(row_mean(xf.square()) + eps)
    y = xf * r
    if cast == "input":
        y = round_through(y, x.dtype)
    scale = gain(weight, offset, dtype)
    y = y if scale is None else y * scale
    rstd = empty_rows(x, dtype, statistic=True).copy_(r.squeeze(-1))
    return empty_rows(x, out_dtype).copy_(y), rstd


def reference_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dweight in plain PyTorch; see the module's header."""
    dtype = compute_dtype(x, weight)
    g, r = dy.to(dtype), rstd.to(dtype).unsqueeze(-1)
    xhat = x.to(dtype) * r
    dx, dweight = absent(x), absent(x)
    if need_weight and weight is not None:
        kept = round_through(xhat, x.dtype) if cast == "input" else xhat
        dweight = (g * kept).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    if need_x:
        scale = gain(weight, offset, dtype)
        g = g if scale is None else g * scale
        dx = empty_rows(x, x.dtype).copy_(row_gradient(g, xhat, r, row_mean))
    return dx, dweight


def triton_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and rstd on the GPU. y is ``out`` if given: of x's shape, its last dimension contiguous."""
    check(x, weight, cast)
    if not norm_launch.launchable(x, weight, out_dtype):
        y, rstd = reference_fwd(x, weight, eps, offset, cast, out_dtype)
        return (y if out is None else out.copy_(y)), rstd
    done = norm_launch.forward(x, None, weight, None, eps, offset, cast, out_dtype, False, out)
    return done.y, done.rstd


def triton_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dweight on the GPU."""
    if not norm_launch.launchable(x, weight, dy):
        return reference_bwd(dy, x, weight, rstd, offset, cast, need_x, need_weight)
    rest = (None, rstd, offset, cast, need_x, need_weight)
    done = norm_launch.backward(dy, None, x, weight, None, *rest)
    return done.dx, done.dweight


def _fake_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    check(x, weight, cast)
    rstd = empty_rows(x, compute_dtype(x, weight), statistic=True)
    return empty_rows(x, out_dtype), rstd


def _fake_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = empty_rows(x, x.dtype) if need_x else absent(x)
    dw = torch.empty_like(weight) if need_weight and weight is not None else absent(x)
    return dx, dw


def _save(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
    return inputs["x"], inputs["weight"], outputs[1], inputs["offset"], inputs["cast"]


OPS = (
    OpSpec(
        forward="rms_norm(Tensor x, Tensor? weight, float eps, float offset, str cast, "
        "ScalarType out_dtype) -> (Tensor y, Tensor rstd)",
        backward="rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, "
        "str cast, bool need_x, bool need_weight) -> (Tensor dx, Tensor dweight)",
        differentiable=("x", "weight"),
        outputs=1,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        triton=(triton_fwd, triton_bwd),
        cheap=True,
        fake=(_fake_fwd, _fake_bwd),
    ),
)
