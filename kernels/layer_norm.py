"""Layer normalisation over the last dimension.

    m = mean(x)     r = (mean((x - m)^2) + eps)^(-1/2)     x^ = (x - m) r     y = x^ (offset + w) + b

Shapes: x (..., D), w and b (D,) or absent, y (..., D), mean m and rstd r (...) in float32. Saved:
x, w, m, r. y and dx lie in memory in the order of x's leading dimensions. The variance is taken of
the centred row, in a second pass over registers, so that a large mean costs no digits.

Where it rounds (x of dtype t, statistics always in float32):
    cast="output"   y = round(x^ (offset + w) + b)              one rounding, at the output
    cast="input"    y = (offset + w) round_t(x^) + b            x^ is rounded to t before the weight

Backward, with g = dy (offset + w) and means over the last dimension:
    dx = r (g - mean(g) - x^ mean(g x^))      dw = sum over rows of dy x^      db = sum over rows of dy

Source: J. L. Ba et al., "Layer Normalization", 2016.
Traffic: forward reads and writes x once; backward reads x and dy and writes dx once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusewright.kernels import norm_launch
from fusewright.kernels.reduce import absent, compute_dtype
from fusewright.kernels.rms_norm import gain, round_through, row_mean
from fusewright.kernels.rows import check_cast, check_rows, check_vector, empty_rows
from fusewright.kernels.spec import OpSpec


def row_gradient(g: Any, xhat: Any, r: Any, mean: Callable[[Any], Any]) -> Any:
    """The gradient of x from that of x^, over tensors or symbols."""
    return r * (g - mean(g) - xhat * mean(g * xhat))


def check(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, cast: str
) -> None:
    """Refuse wrong shapes, dtypes, devices and modes, by name."""
    check_rows(x)
    check_vector(weight, x, "weight")
    check_vector(bias, x, "bias")
    check_cast(cast)


def reference_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, mean and rstd in plain PyTorch; see the module's header."""
    check(x, weight, bias, cast)
    dtype = compute_dtype(x, weight, bias)
    xf = x.to(dtype)
    m = row_mean(xf)
    r = torch.rsqrt(row_mean((xf - m).square()) + eps)
    y = (xf - m) * r
    if cast == "input":
        y = round_through(y, x.dtype)
    scale = gain(weight, offset, dtype)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias.to(dtype)
    mean, rstd = (empty_rows(x, dtype, statistic=True).copy_(t.squeeze(-1)) for t in (m, r))
    return empty_rows(x, out_dtype).copy_(y), mean, rstd


def reference_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight and dbias in plain PyTorch; see the module's header."""
    dtype = compute_dtype(x, weight, bias)
    g, r = dy.to(dtype), rstd.to(dtype).unsqueeze(-1)
    xhat = (x.to(dtype) - mean.to(dtype).unsqueeze(-1)) * r
    dx, dweight, dbias = absent(x), absent(x), absent(x)
    if need_weight and weight is not None:
        kept = round_through(xhat, x.dtype) if cast == "input" else xhat
        dweight = (g * kept).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    if need_bias and bias is not None:
        dbias = g.reshape(-1, x.shape[-1]).sum(0).to(bias.dtype)
    if need_x:
        scale = gain(weight, offset, dtype)
        g = g if scale is None else g * scale
        dx = empty_rows(x, x.dtype).copy_(row_gradient(g, xhat, r, row_mean))
    return dx, dweight, dbias


def triton_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, mean and rstd on the GPU. y is ``out`` if given: of x's shape, last dimension contiguous."""
    check(x, weight, bias, cast)
    if not norm_launch.launchable(x, weight, bias, out_dtype):
        y, mean, rstd = reference_fwd(x, weight, bias, eps, offset, cast, out_dtype)
        return (y if out is None else out.copy_(y)), mean, rstd
    done = norm_launch.forward(x, None, weight, bias, eps, offset, cast, out_dtype, True, out)
    assert done.mean is not None
    return done.y, done.mean, done.rstd


def triton_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight and dbias on the GPU."""
    rest = (mean, rstd, offset, cast, need_x, need_weight, need_bias)
    if not norm_launch.launchable(x, weight, bias, dy):
        return reference_bwd(dy, x, weight, bias, *rest)
    done = norm_launch.backward(dy, None, x, weight, bias, *rest)
    return done.dx, done.dweight, done.dbias


def _fake_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check(x, weight, bias, cast)
    dtype = compute_dtype(x, weight, bias)
    mean, rstd = (empty_rows(x, dtype, statistic=True) for _ in range(2))
    return empty_rows(x, out_dtype), mean, rstd


def _fake_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = empty_rows(x, x.dtype) if need_x else absent(x)
    dw = torch.empty_like(weight) if need_weight and weight is not None else absent(x)
    db = torch.empty_like(bias) if need_bias and bias is not None else absent(x)
    return dx, dw, db


def _save(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
    tensors = inputs["x"], inputs["weight"], inputs["bias"], outputs[1], outputs[2]
    return *tensors, inputs["offset"], inputs["cast"]


OPS = (
    OpSpec(
        forward="layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float offset, "
        "str cast, ScalarType out_dtype) -> (Tensor y, Tensor mean, Tensor rstd)",
        backward="layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, "
        "Tensor mean, Tensor rstd, float offset, str cast, bool need_x, bool need_weight, "
        "bool need_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
        differentiable=("x", "weight", "bias"),
        outputs=1,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        triton=(triton_fwd, triton_bwd),
        cheap=True,
        fake=(_fake_fwd, _fake_bwd),
    ),
)
