"""RMS normalisation with a gate, after the norm or before it.

    order="after"    y = x^ (offset + w) a(z)       x^ = x r,     r = (mean(x^2) + eps)^(-1/2)
    order="before"   y = u^ (offset + w)            u = x a(z),   u^ = u r,  r of u

Shapes: x, gate z and y (..., D), w (D,) or absent, a one of ``activations``. The mean is taken over
groups of ``group`` columns, of which D is a multiple: rstd r is (..., D / group), in float32. Saved:
x, z, w, r. y and the gradients are dense.

Where it rounds (x of dtype t, everything else in float32):
    cast="output"   one rounding, at the output
    cast="input"    x^ (or u^) is rounded to t before the weight

Backward, with a = a(z), a' its derivative and means over a group:
    after     g = dy (offset + w) a       dx = r (g - x^ mean(g x^))
              dz = dy (offset + w) x^ a'  dw = sum over rows of dy a x^
    before    g = dy (offset + w)         du = r (g - u^ mean(g u^))
              dx = du a    dz = du x a'   dw = sum over rows of dy u^

Source: T. Dao and A. Gu, "Transformers are SSMs", 2024 (the gate of its normalisation).
Traffic: forward reads x and z and writes y; backward reads x, z and dy and writes dx and dz.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusewright.kernels import activations, rms_norm
from fusewright.kernels.gated_rms_norm_launch import launch_backward, launch_forward
from fusewright.kernels.launch import launchable
from fusewright.kernels.reduce import absent, compute_dtype
from fusewright.kernels.rows import check_like
from fusewright.kernels.spec import OpSpec

ORDERS = ("after", "before")


def _takes(x: torch.Tensor, group: int) -> bool:
    """Whether a group's rows fit in registers; wider ones are left to the reference."""
    return group <= (8192 if x.element_size() == 2 else 4096)


def gradients_after(
    dy: Any, xhat: Any, kept: Any, r: Any, gain: Any, a: Any, slope: Any, mean: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """dx and dz where the gate comes after the norm, over tensors or symbols."""
    g = dy * gain
    return rms_norm.row_gradient(g * a, xhat, r, mean), g * kept * slope


def gradients_before(
    dy: Any, x: Any, r: Any, gain: Any, a: Any, slope: Any, mean: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """dx and dz where the gate comes before the norm, over tensors or symbols."""
    du = rms_norm.row_gradient(dy * gain, x * a * r, r, mean)
    return du * a, du * x * slope


def check(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    cast: str,
    order: str,
    activation: str,
    group: int,
) -> None:
    """Refuse wrong shapes, dtypes, devices and modes, by name."""
    rms_norm.check(x, weight, cast)
    if gate.dtype.is_floating_point and gate.dtype is not x.dtype:
        check_like(gate.to(x.dtype), x, "gate")
    else:
        check_like(gate, x, "gate")
    activations.lookup(activation)
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
    if group < 1 or x.shape[-1] % group:
        raise ValueError(f"group: expected a divisor of {x.shape[-1]}, got {group}")


def _grouped(t: torch.Tensor, group: int) -> torch.Tensor:
    return t.reshape(*t.shape[:-1], t.shape[-1] // group, group)


def _gain(
    weight: torch.Tensor | None, offset: float, group: int, dtype: torch.dtype
) -> torch.Tensor | float:
    gain = rms_norm.gain(weight, offset, dtype)
    return 1.0 if gain is None else _grouped(gain, group)


def reference_fwd(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    order: str,
    activation: str,
    group: int,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and rstd in plain PyTorch; see the module's header."""
    check(x, gate, weight, cast, order, activation, group)
    dtype = compute_dtype(x, weight)
    u = _grouped(x.to(dtype), group)
    a = activations.lookup(activation).value(torch, _grouped(gate.to(dtype), group))
    u = u * a if order == "before" else u
    r = torch.rsqrt(rms_norm.row_mean(u.square()) + eps)
    y = u * r
    y = rms_norm.round_through(y, x.dtype) if cast == "input" else y
    y = y * _gain(weight, offset, group, dtype)
    y = y * a if order == "after" else y
    return y.flatten(-2).to(out_dtype).contiguous(), r.squeeze(-1).contiguous()


def reference_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    order: str,
    activation: str,
    group: int,
    need_x: bool,
    need_gate: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dgate and dweight in plain PyTorch; see the module's header."""
    dtype = compute_dtype(x, weight)
    g, xg, z = (_grouped(t.to(dtype), group) for t in (dy, x, gate))
    r, act = rstd.to(dtype).unsqueeze(-1), activations.lookup(activation)
    a, slope = act.value(torch, z), act.slope(torch, z)
    xhat = (xg if order == "after" else xg * a) * r
    kept = rms_norm.round_through(xhat, x.dtype) if cast == "input" else xhat
    gain = _gain(weight, offset, group, dtype)
    if order == "after":
        dx, dz = gradients_after(g, xhat, kept, r, gain, a, slope, rms_norm.row_mean)
    else:
        dx, dz = gradients_before(g, xg, r, gain, a, slope, rms_norm.row_mean)
    dw = absent(x)
    if need_weight and weight is not None:
        each = g * kept * a if order == "after" else g * kept
        dw = each.flatten(-2).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return (
        dx.flatten(-2).to(x.dtype).contiguous() if need_x else absent(x),
        dz.flatten(-2).to(gate.dtype).contiguous() if need_gate else absent(x),
        dw,
    )


def triton_fwd(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    order: str,
    activation: str,
    group: int,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and rstd on the GPU."""
    check(x, gate, weight, cast, order, activation, group)
    dtypes = (gate.dtype, out_dtype, *(() if weight is None else (weight.dtype,)))
    rest = (offset, cast, order, activation, group)
    if not _takes(x, group) or not launchable(x, *dtypes):
        return reference_fwd(x, gate, weight, eps, *rest, out_dtype)
    y, rstd = _fake_fwd(x, gate, weight, eps, *rest, out_dtype)
    launch_forward(x, gate, weight, y, rstd, eps, offset, cast, order == "after", activation, group)
    return y, rstd


def triton_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    order: str,
    activation: str,
    group: int,
    need_x: bool,
    need_gate: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dgate and dweight on the GPU."""
    rest = (offset, cast, order, activation, group, need_x, need_gate, need_weight)
    dtypes = (gate.dtype, dy.dtype, *(() if weight is None else (weight.dtype,)))
    if not _takes(x, group) or not launchable(x, *dtypes):
        return reference_bwd(dy, x, gate, weight, rstd, *rest)
    grads = _fake_bwd(dy, x, gate, weight, rstd, *rest)
    dx, dgate, dweight = (g if g.numel() else None for g in grads)
    launch_backward(
        dy,
        x,
        gate,
        weight,
        rstd,
        dx,
        dgate,
        dweight,
        offset,
        cast,
        order == "after",
        activation,
        group,
    )
    return grads


def _fake_fwd(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    cast: str,
    order: str,
    activation: str,
    group: int,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    check(x, gate, weight, cast, order, activation, group)
    groups = (*x.shape[:-1], x.shape[-1] // group)
    rstd = x.new_empty(groups, dtype=compute_dtype(x, weight))
    return x.new_empty(x.shape, dtype=out_dtype), rstd


def _fake_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    cast: str,
    order: str,
    activation: str,
    group: int,
    need_x: bool,
    need_gate: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape) if need_x else absent(x),
        gate.new_empty(gate.shape) if need_gate else absent(x),
        torch.empty_like(weight) if need_weight and weight is not None else absent(x),
    )


def _save(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
    names = ("offset", "cast", "order", "activation", "group")
    kept = (inputs["x"], inputs["gate"], inputs["weight"], outputs[1])
    return *kept, *(inputs[n] for n in names)


OPS = (
    OpSpec(
        forward="gated_rms_norm(Tensor x, Tensor gate, Tensor? weight, float eps, float offset, "
        "str cast, str order, str activation, int group, ScalarType out_dtype) "
        "-> (Tensor y, Tensor rstd)",
        backward="gated_rms_norm_backward(Tensor dy, Tensor x, Tensor gate, Tensor? weight, "
        "Tensor rstd, float offset, str cast, str order, str activation, int group, bool need_x, "
        "bool need_gate, bool need_weight) -> (Tensor dx, Tensor dgate, Tensor dweight)",
        differentiable=("x", "gate", "weight"),
        outputs=1,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        triton=(triton_fwd, triton_bwd),
        cheap=True,
        fake=(_fake_fwd, _fake_bwd),
    ),
)
