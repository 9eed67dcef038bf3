"""Gated linear units: y = act(gate) up, and their clamped form.

Shapes: gate, up, y (..., F); packed: gate_up (..., 2F), either the halves [gate | up] (or
[up | gate]) or interleaved pairs gate_0, up_0, gate_1, up_1, ... Saved: gate and up, or gate_up;
never their product. Computed in float32 (float64 for float64 inputs), rounded once at the output.

Backward:
    dgate = dy up act'(gate)            dup = dy act(gate)
and for the packed form both go into one buffer laid out like gate_up, so that the gradient of the
projection's input is one GEMM.

Where the activation is text with four expressions, y = f(gate) h(up), and
    dgate = dy h(up) f'(gate)           dup = dy f(gate) h'(up)

Clamped (limit L > 0, slope parameter alpha), with g = min(gate, L) and u = min(max(up, -L), L):
    y = (u + 1) g s(alpha g)
    dgate = dy (u + 1) (g s(alpha g))' [gate <= L]      dup = dy g s(alpha g) [-L <= up <= L]
A value exactly at the limit keeps its gradient, as torch.clamp does.

Sources: N. Shazeer, "GLU Variants Improve Transformer", 2020; the clamped form: OpenAI model card, August 2025.
Traffic per element of y: forward reads two and writes one; backward reads three and writes two.
"""

from __future__ import annotations

import functools
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

Pair = tuple[torch.Tensor, torch.Tensor]
# (activation,), or (alpha, limit) of the clamped form
Form = Sequence[Any]


def halves(gate_up: torch.Tensor, gate_first: bool, interleaved: bool) -> Pair:
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
    if gate.dim() == 0:
        raise ValueError("gate: expected at least one dimension, got a scalar")
    if gate.shape != up.shape:
        raise ValueError(
            f"up: expected the shape of gate {tuple(gate.shape)}, got {tuple(up.shape)}"
        )
    if gate.dtype != up.dtype:
        raise TypeError(f"up: expected the dtype of gate {gate.dtype}, got {up.dtype}")
    if gate.device != up.device:
        raise ValueError(f"up: expected the device of gate {gate.device}, got {up.device}")


def _value(gate: torch.Tensor, up: torch.Tensor, form: Form) -> torch.Tensor:
    if isinstance(form[0], str):
        act = lookup(form[0])
        h = up if act.up is None else act.up.value(torch, up)
        plain: torch.Tensor = act.value(torch, gate) * h
        return plain
    alpha, limit = form
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    clamped: torch.Tensor = (u + 1.0) * swish_value(torch, g, alpha)
    return clamped


def _grads(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, form: Form) -> Pair:
    if isinstance(form[0], str):
        act = lookup(form[0])
        h = up if act.up is None else act.up.value(torch, up)
        dup = dy * act.value(torch, gate)
        dup = dup if act.up is None else dup * act.up.slope(torch, up)
        return dy * h * act.slope(torch, gate), dup
    alpha, limit = form
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    dgate = dy * (u + 1.0) * swish_slope(torch, g, alpha)
    dup = dy * swish_value(torch, g, alpha)
    return torch.where(gate > limit, 0.0, dgate), torch.where(up.abs() > limit, 0.0, dup)


def _new(like: torch.Tensor, dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    return torch.empty(value.shape, dtype=dtype, device=like.device).copy_(value)


def reference_fwd(gate: torch.Tensor, up: torch.Tensor, *rest: Any) -> torch.Tensor:
    """y in plain PyTorch; ``rest`` is the form and the output's dtype."""
    *form, out_dtype = rest
    check_pair(gate, up)
    t = compute_dtype(gate)
    return _new(gate, out_dtype, _value(gate.to(t), up.to(t), form))


def reference_bwd(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *rest: Any) -> Pair:
    """dgate and dup in plain PyTorch; ``rest`` is the form and which of the two are wanted."""
    *form, need_gate, need_up = rest
    t = compute_dtype(gate)
    dgate, dup = _grads(dy.to(t), gate.to(t), up.to(t), form)
    return (
        _new(gate, gate.dtype, dgate) if need_gate else absent(gate),
        _new(up, up.dtype, dup) if need_up else absent(up),
    )


def packed_reference_fwd(gate_up: torch.Tensor, *rest: Any) -> torch.Tensor:
    """y of a packed tensor in plain PyTorch; ``rest`` is form, layout and the output's dtype."""
    *form, gate_first, interleaved, out_dtype = rest
    gate, up = halves(gate_up.to(compute_dtype(gate_up)), gate_first, interleaved)
    return _new(gate_up, out_dtype, _value(gate, up, form))


def packed_reference_bwd(dy: torch.Tensor, gate_up: torch.Tensor, *rest: Any) -> torch.Tensor:
    """d(gate_up), one buffer, in plain PyTorch; ``rest`` is form, layout and whether it is wanted."""
    *form, gate_first, interleaved, need = rest
    if not need:
        return absent(gate_up)
    t = compute_dtype(gate_up)
    gate, up = halves(gate_up.to(t), gate_first, interleaved)
    out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    grads = _grads(dy.to(t), gate, up, form)
    for part, grad in zip(halves(out, gate_first, interleaved), grads, strict=True):
        part.copy_(grad)
    return out


def _launched(form: Form) -> tuple[str, tuple[float, float] | None]:
    """The kernel's activation, and alpha and limit if it clamps."""
    if isinstance(form[0], str):
        lookup(form[0])
        return form[0], None
    return "swish", (form[0], form[1])


def triton_fwd(gate: torch.Tensor, up: torch.Tensor, *rest: Any) -> torch.Tensor:
    """y by a kernel."""
    *form, out_dtype = rest
    check_pair(gate, up)
    if not launchable(gate, out_dtype):
        return reference_fwd(gate, up, *rest)
    y = torch.empty(gate.shape, dtype=out_dtype, device=gate.device)
    launch_forward(gate, up, y, *_launched(form))
    return y


def triton_bwd(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *rest: Any) -> Pair:
    """dgate and dup by a kernel."""
    *form, need_gate, need_up = rest
    if not launchable(gate, dy.dtype):
        return reference_bwd(dy, gate, up, *rest)
    new = functools.partial(torch.empty, gate.shape, dtype=gate.dtype, device=gate.device)
    dgate, dup = new() if need_gate else None, new() if need_up else None
    launch_backward(dy, gate, up, dgate, dup, *_launched(form))
    return absent(gate) if dgate is None else dgate, absent(up) if dup is None else dup


def packed_triton_fwd(gate_up: torch.Tensor, *rest: Any) -> torch.Tensor:
    """y of a packed tensor by a kernel."""
    *form, gate_first, interleaved, out_dtype = rest
    if not launchable(gate_up, out_dtype):
        return packed_reference_fwd(gate_up, *rest)
    shape = (*gate_up.shape[:-1], _half_width(gate_up))
    y = torch.empty(shape, dtype=out_dtype, device=gate_up.device)
    activation, clamp = _launched(form)
    launch_packed_forward(gate_up, y, activation, gate_first, interleaved, clamp)
    return y


def packed_triton_bwd(dy: torch.Tensor, gate_up: torch.Tensor, *rest: Any) -> torch.Tensor:
    """d(gate_up), one buffer, by a kernel."""
    *form, gate_first, interleaved, need = rest
    if not need or not launchable(gate_up, dy.dtype):
        return packed_reference_bwd(dy, gate_up, *rest)
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    activation, clamp = _launched(form)
    launch_packed_backward(dy, gate_up, out, activation, gate_first, interleaved, clamp)
    return out


def _fake_pair_fwd(gate: torch.Tensor, up: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(gate, dtype=rest[-1], memory_format=torch.contiguous_format)


def _fake_pair_bwd(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *rest: Any) -> Pair:
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


def _pair_op(name: str, form: str) -> OpSpec:
    """The op of a form over separate gate and up."""
    return OpSpec(
        forward=f"{name}(Tensor gate, Tensor up, {form}, ScalarType out_dtype) -> Tensor y",
        backward=f"{name}_backward(Tensor dy, Tensor gate, Tensor up, {form}, bool need_gate, "
        "bool need_up) -> (Tensor dgate, Tensor dup)",
        differentiable=("gate", "up"),
        outputs=1,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        fake=(_fake_pair_fwd, _fake_pair_bwd),
        triton=(triton_fwd, triton_bwd),
        cheap=True,
    )


def _packed_op(name: str, form: str) -> OpSpec:
    """The op of a form over one tensor that holds both."""
    return OpSpec(
        forward=f"{name}(Tensor gate_up, {form}, {_LAYOUT}, ScalarType out_dtype) -> Tensor y",
        backward=f"{name}_backward(Tensor dy, Tensor gate_up, {form}, {_LAYOUT}, "
        "bool need_gate_up) -> Tensor dgate_up",
        differentiable=("gate_up",),
        outputs=1,
        save=_save,
        reference=(packed_reference_fwd, packed_reference_bwd),
        fake=(_fake_packed_fwd, _fake_packed_bwd),
        triton=(packed_triton_fwd, packed_triton_bwd),
        cheap=True,
    )


OPS = (
    _pair_op("glu", "str activation"),
    _packed_op("glu_packed", "str activation"),
    _pair_op("glu_clamped", "float alpha, float limit"),
    _packed_op("glu_clamped_packed", "float alpha, float limit"),
)
