"""Gated linear units: y = act(gate) up, and their clamped form.

Shapes: gate, up, y (..., F); packed: gate_up (..., 2F), either the halves [gate | up] (or
[up | gate]) or interleaved pairs gate_0, up_0, gate_1, up_1, ... Saved: gate and up, or gate_up;
never their product. Computed in float32 (float64 for float64 inputs), rounded once at the output.

Backward:
    dgate = dy up act'(gate)            dup = dy act(gate)
and for the packed form both go into one buffer laid out like gate_up, so that the gradient of the
projection's input is one GEMM.

Clamped (limit L > 0, slope parameter alpha), with g = min(gate, L) and u = min(max(up, -L), L):
    y = (u + 1) g s(alpha g)
    dgate = dy (u + 1) (g s(alpha g))' [gate <= L]      dup = dy g s(alpha g) [-L <= up <= L]
A value exactly at the limit keeps its gradient, as torch.clamp does.

Sources: N. Shazeer, "GLU Variants Improve Transformer", 2020; the clamped form: OpenAI model card, August 2025.
Traffic per element of y: forward reads two and writes one; backward reads three and writes two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusewright.kernels.activations import lookup, swish_slope, swish_value
from fusewright.kernels.glu_kernels import (
    launch_backward,
    launch_forward,
    launch_packed_backward,
    launch_packed_forward,
)
from fusewright.kernels.launch import launchable
from fusewright.kernels.reduce import absent, compute_dtype
from fusewright.kernels.spec import OpSpec

_Pair = tuple[torch.Tensor, torch.Tensor]


def halves(gate_up: torch.Tensor, gate_first: bool, interleaved: bool) -> _Pair:
    """Views (gate, up) of a packed tensor (..., 2F)."""
    width = _half_width(gate_up)
    if interleaved:
        first, second = gate_up[..., 0::2], gate_up[..., 1::2]
    else:
        first, second = gate_up[..., :width], gate_up[..., width:]
    return (first, second) if gate_first else (second, first)


def _half_width(gate_up: torch.Tensor) -> int:
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: expected an even last dimension, got {tuple(gate_up.shape)}")
    return gate_up.shape[-1] // 2


def check_pair(gate: torch.Tensor, up: torch.Tensor) -> None:
    """Refuse a gate and an up that do not belong together."""
    if gate.shape != up.shape:
        raise ValueError(
            f"up: expected the shape of gate {tuple(gate.shape)}, got {tuple(up.shape)}"
        )
    if gate.dtype != up.dtype:
        raise TypeError(f"up: expected the dtype of gate {gate.dtype}, got {up.dtype}")
    if gate.device != up.device:
        raise ValueError(f"up: expected the device of gate {gate.device}, got {up.device}")


def _plain(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    y: torch.Tensor = lookup(activation).value(torch, gate) * up
    return y


def _plain_grads(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> _Pair:
    act = lookup(activation)
    return dy * up * act.slope(torch, gate), dy * act.value(torch, gate)


def _clamped(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    y: torch.Tensor = (u + 1.0) * swish_value(torch, g, alpha)
    return y


def _clamped_grads(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float
) -> _Pair:
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    dgate = dy * (u + 1.0) * swish_slope(torch, g, alpha)
    dup = dy * swish_value(torch, g, alpha)
    return torch.where(gate > limit, 0.0, dgate), torch.where(up.abs() > limit, 0.0, dup)


def _new(like: torch.Tensor, dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    return torch.empty(value.shape, dtype=dtype, device=like.device).copy_(value)


def glu_reference_fwd(
    gate: torch.Tensor, up: torch.Tensor, activation: str, out_dtype: torch.dtype
) -> torch.Tensor:
    """act(gate) up in plain PyTorch."""
    check_pair(gate, up)
    t = compute_dtype(gate)
    return _new(gate, out_dtype, _plain(gate.to(t), up.to(t), activation))


def glu_reference_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    need_gate: bool,
    need_up: bool,
) -> _Pair:
    """dgate and dup in plain PyTorch."""
    t = compute_dtype(gate)
    dgate, dup = _plain_grads(dy.to(t), gate.to(t), up.to(t), activation)
    return (
        _new(gate, gate.dtype, dgate) if need_gate else absent(gate),
        _new(up, up.dtype, dup) if need_up else absent(up),
    )


def packed_reference_fwd(
    gate_up: torch.Tensor,
    activation: str,
    gate_first: bool,
    interleaved: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """act(gate) up of a packed tensor in plain PyTorch."""
    gate, up = halves(gate_up.to(compute_dtype(gate_up)), gate_first, interleaved)
    return _new(gate_up, out_dtype, _plain(gate, up, activation))


def packed_reference_bwd(
    dy: torch.Tensor,
    gate_up: torch.Tensor,
    activation: str,
    gate_first: bool,
    interleaved: bool,
    need_gate_up: bool,
) -> torch.Tensor:
    """d(gate_up), one buffer, in plain PyTorch."""
    if not need_gate_up:
        return absent(gate_up)
    t = compute_dtype(gate_up)
    gate, up = halves(gate_up.to(t), gate_first, interleaved)
    return _pack(gate_up, _plain_grads(dy.to(t), gate, up, activation), gate_first, interleaved)


def _pack(like: torch.Tensor, grads: _Pair, gate_first: bool, interleaved: bool) -> torch.Tensor:
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    for part, grad in zip(halves(out, gate_first, interleaved), grads, strict=True):
        part.copy_(grad)
    return out


def clamped_reference_fwd(
    gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float, out_dtype: torch.dtype
) -> torch.Tensor:
    """The clamped form in plain PyTorch."""
    check_pair(gate, up)
    t = compute_dtype(gate)
    return _new(gate, out_dtype, _clamped(gate.to(t), up.to(t), alpha, limit))


def clamped_reference_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    alpha: float,
    limit: float,
    need_gate: bool,
    need_up: bool,
) -> _Pair:
    """dgate and dup of the clamped form in plain PyTorch."""
    t = compute_dtype(gate)
    dgate, dup = _clamped_grads(dy.to(t), gate.to(t), up.to(t), alpha, limit)
    return (
        _new(gate, gate.dtype, dgate) if need_gate else absent(gate),
        _new(up, up.dtype, dup) if need_up else absent(up),
    )


def clamped_packed_reference_fwd(
    gate_up: torch.Tensor,
    alpha: float,
    limit: float,
    gate_first: bool,
    interleaved: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The clamped form of a packed tensor in plain PyTorch."""
    gate, up = halves(gate_up.to(compute_dtype(gate_up)), gate_first, interleaved)
    return _new(gate_up, out_dtype, _clamped(gate, up, alpha, limit))


def clamped_packed_reference_bwd(
    dy: torch.Tensor,
    gate_up: torch.Tensor,
    alpha: float,
    limit: float,
    gate_first: bool,
    interleaved: bool,
    need_gate_up: bool,
) -> torch.Tensor:
    """d(gate_up) of the clamped form, one buffer, in plain PyTorch."""
    if not need_gate_up:
        return absent(gate_up)
    t = compute_dtype(gate_up)
    gate, up = halves(gate_up.to(t), gate_first, interleaved)
    return _pack(gate_up, _clamped_grads(dy.to(t), gate, up, alpha, limit), gate_first, interleaved)


def glu_triton_fwd(
    gate: torch.Tensor, up: torch.Tensor, activation: str, out_dtype: torch.dtype
) -> torch.Tensor:
    """act(gate) up by a kernel."""
    if gate.dim() == 0 or not launchable(gate, up.dtype, out_dtype):
        return glu_reference_fwd(gate, up, activation, out_dtype)
    check_pair(gate, up)
    lookup(activation)
    y = torch.empty(gate.shape, dtype=out_dtype, device=gate.device)
    launch_forward(gate, up, y, activation)
    return y


def glu_triton_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    need_gate: bool,
    need_up: bool,
) -> _Pair:
    """dgate and dup by a kernel."""
    if gate.dim() == 0 or not launchable(gate, dy.dtype):
        return glu_reference_bwd(dy, gate, up, activation, need_gate, need_up)
    dgate, dup = _new_grads(gate, up, need_gate, need_up)
    launch_backward(dy, gate, up, dgate, dup, activation)
    return absent(gate) if dgate is None else dgate, absent(up) if dup is None else dup


def _new_grads(
    gate: torch.Tensor, up: torch.Tensor, need_gate: bool, need_up: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if need_gate else None,
        torch.empty(up.shape, dtype=up.dtype, device=up.device) if need_up else None,
    )


def packed_triton_fwd(
    gate_up: torch.Tensor,
    activation: str,
    gate_first: bool,
    interleaved: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """act(gate) up of a packed tensor by a kernel."""
    if not launchable(gate_up, out_dtype):
        return packed_reference_fwd(gate_up, activation, gate_first, interleaved, out_dtype)
    lookup(activation)
    y = _packed_output(gate_up, out_dtype)
    launch_packed_forward(gate_up, y, activation, gate_first, interleaved)
    return y


def _packed_output(gate_up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    width = _half_width(gate_up)
    return torch.empty((*gate_up.shape[:-1], width), dtype=dtype, device=gate_up.device)


def packed_triton_bwd(
    dy: torch.Tensor,
    gate_up: torch.Tensor,
    activation: str,
    gate_first: bool,
    interleaved: bool,
    need_gate_up: bool,
) -> torch.Tensor:
    """d(gate_up), one buffer, by a kernel."""
    if not need_gate_up or not launchable(gate_up, dy.dtype):
        return packed_reference_bwd(dy, gate_up, activation, gate_first, interleaved, need_gate_up)
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    launch_packed_backward(dy, gate_up, out, activation, gate_first, interleaved)
    return out


def clamped_triton_fwd(
    gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float, out_dtype: torch.dtype
) -> torch.Tensor:
    """The clamped form by a kernel."""
    if gate.dim() == 0 or not launchable(gate, up.dtype, out_dtype):
        return clamped_reference_fwd(gate, up, alpha, limit, out_dtype)
    check_pair(gate, up)
    y = torch.empty(gate.shape, dtype=out_dtype, device=gate.device)
    launch_forward(gate, up, y, "swish", (alpha, limit))
    return y


def clamped_triton_bwd(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    alpha: float,
    limit: float,
    need_gate: bool,
    need_up: bool,
) -> _Pair:
    """dgate and dup of the clamped form by a kernel."""
    if gate.dim() == 0 or not launchable(gate, dy.dtype):
        return clamped_reference_bwd(dy, gate, up, alpha, limit, need_gate, need_up)
    dgate, dup = _new_grads(gate, up, need_gate, need_up)
    launch_backward(dy, gate, up, dgate, dup, "swish", (alpha, limit))
    return absent(gate) if dgate is None else dgate, absent(up) if dup is None else dup


def clamped_packed_triton_fwd(
    gate_up: torch.Tensor,
    alpha: float,
    limit: float,
    gate_first: bool,
    interleaved: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The clamped form of a packed tensor by a kernel."""
    if not launchable(gate_up, out_dtype):
        return clamped_packed_reference_fwd(
            gate_up, alpha, limit, gate_first, interleaved, out_dtype
        )
    y = _packed_output(gate_up, out_dtype)
    launch_packed_forward(gate_up, y, "swish", gate_first, interleaved, (alpha, limit))
    return y


def clamped_packed_triton_bwd(
    dy: torch.Tensor,
    gate_up: torch.Tensor,
    alpha: float,
    limit: float,
    gate_first: bool,
    interleaved: bool,
    need_gate_up: bool,
) -> torch.Tensor:
    """d(gate_up) of the clamped form, one buffer, by a kernel."""
    if not need_gate_up or not launchable(gate_up, dy.dtype):
        return clamped_packed_reference_bwd(
            dy, gate_up, alpha, limit, gate_first, interleaved, need_gate_up
        )
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    launch_packed_backward(dy, gate_up, out, "swish", gate_first, interleaved, (alpha, limit))
    return out


def _fake_pair_fwd(gate: torch.Tensor, up: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(gate, dtype=rest[-1], memory_format=torch.contiguous_format)


def _fake_pair_bwd(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *rest: Any) -> _Pair:
    need_gate, need_up = rest[-2:]
    return (
        torch.empty_like(gate, memory_format=torch.contiguous_format)
        if need_gate
        else absent(gate),
        torch.empty_like(up, memory_format=torch.contiguous_format) if need_up else absent(up),
    )


def _fake_packed_fwd(gate_up: torch.Tensor, *rest: Any) -> torch.Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=rest[-1])


def _fake_packed_bwd(dy: torch.Tensor, gate_up: torch.Tensor, *rest: Any) -> torch.Tensor:
    if not rest[-1]:
        return absent(gate_up)
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _save(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
    return [value for name, value in inputs.items() if name != "out_dtype"]


_LAYOUT = "bool gate_first, bool interleaved"

OPS = (
    OpSpec(
        forward="glu(Tensor gate, Tensor up, str activation, ScalarType out_dtype) -> Tensor y",
        backward="glu_backward(Tensor dy, Tensor gate, Tensor up, str activation, bool need_gate, "
        "bool need_up) -> (Tensor dgate, Tensor dup)",
        differentiable=("gate", "up"),
        outputs=1,
        save=_save,
        reference=(glu_reference_fwd, glu_reference_bwd),
        triton=(glu_triton_fwd, glu_triton_bwd),
        fake=(_fake_pair_fwd, _fake_pair_bwd),
    ),
    OpSpec(
        forward=f"glu_packed(Tensor gate_up, str activation, {_LAYOUT}, ScalarType out_dtype) "
        "-> Tensor y",
        backward=f"glu_packed_backward(Tensor dy, Tensor gate_up, str activation, {_LAYOUT}, "
        "bool need_gate_up) -> Tensor dgate_up",
        differentiable=("gate_up",),
        outputs=1,
        save=_save,
        reference=(packed_reference_fwd, packed_reference_bwd),
        triton=(packed_triton_fwd, packed_triton_bwd),
        fake=(_fake_packed_fwd, _fake_packed_bwd),
    ),
    OpSpec(
        forward="glu_clamped(Tensor gate, Tensor up, float alpha, float limit, "
        "ScalarType out_dtype) -> Tensor y",
        backward="glu_clamped_backward(Tensor dy, Tensor gate, Tensor up, float alpha, "
        "float limit, bool need_gate, bool need_up) -> (Tensor dgate, Tensor dup)",
        differentiable=("gate", "up"),
        outputs=1,
        save=_save,
        reference=(clamped_reference_fwd, clamped_reference_bwd),
        triton=(clamped_triton_fwd, clamped_triton_bwd),
        fake=(_fake_pair_fwd, _fake_pair_bwd),
    ),
    OpSpec(
        forward=f"glu_clamped_packed(Tensor gate_up, float alpha, float limit, {_LAYOUT}, "
        "ScalarType out_dtype) -> Tensor y",
        backward="glu_clamped_packed_backward(Tensor dy, Tensor gate_up, float alpha, "
        f"float limit, {_LAYOUT}, bool need_gate_up) -> Tensor dgate_up",
        differentiable=("gate_up",),
        outputs=1,
        save=_save,
        reference=(clamped_packed_reference_fwd, clamped_packed_reference_bwd),
        triton=(clamped_packed_triton_fwd, clamped_packed_triton_bwd),
        fake=(_fake_packed_fwd, _fake_packed_bwd),
    ),
)
