"""Variants of ops whose result, or gradient, has room behind its rows (see ``room``).

    <op>_roomy(..., int room)                       y (..., D) is a view of (..., D + room)
    glu_packed_roomy(..., int room, int grad_room)  so is d(gate_up), of (..., 2F + grad_room)

They compute what the plain ops do. The room is left as it is: whoever asked for it writes there, and
reads only what it wrote. Derivations, rounding and traffic are the plain ops'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusewright.kernels import add_rms_norm, glu, layer_norm, rms_norm
from fusewright.kernels.glu_kernels import (
    launch_forward,
    launch_packed_backward,
    launch_packed_forward,
)
from fusewright.kernels.launch import launchable
from fusewright.kernels.room import empty_roomy, fake_roomy
from fusewright.kernels.spec import Implementation, OpSpec


def _like(y: torch.Tensor, room: int) -> torch.Tensor:
    """A copy of ``y`` with room behind its rows."""
    return empty_roomy(y.shape, room, y.dtype, y.device).copy_(y)


def _first_roomy(forward: Implementation) -> Implementation:
    """A reference whose first result has room."""

    def roomy(*args: Any) -> Any:
        *given, room = args
        out = forward(*given)
        return (_like(out[0], room), *out[1:]) if isinstance(out, tuple) else _like(out, room)

    return roomy


def _fake_first_roomy(fake: Implementation) -> Implementation:
    def roomy(*args: Any) -> Any:
        *given, room = args
        out = fake(*given)
        first = out[0] if isinstance(out, tuple) else out
        made = fake_roomy(first, first.shape, room, first.dtype)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    return roomy


def _norm_fwd(forward: Callable[..., Any]) -> Implementation:
    """A norm's host function on a result with room; x is its first argument."""

    def roomy(x: torch.Tensor, *args: Any) -> Any:
        *given, out_dtype, room = args
        return forward(x, *given, out_dtype, out=empty_roomy(x.shape, room, out_dtype, x.device))

    return roomy


def _glu_fwd(gate: torch.Tensor, up: torch.Tensor, *args: Any) -> torch.Tensor:
    *form, out_dtype, room = args
    glu.check_pair(gate, up)
    if not launchable(gate, out_dtype):
        return _like(glu.reference_fwd(gate, up, *form, out_dtype), room)
    y = empty_roomy(gate.shape, room, out_dtype, gate.device)
    launch_forward(gate, up, y, *glu._launched(form))
    return y


def _packed_fwd(gate_up: torch.Tensor, *args: Any) -> torch.Tensor:
    *form, gate_first, interleaved, out_dtype, room, _ = args
    if not launchable(gate_up, out_dtype):
        rest = (*form, gate_first, interleaved, out_dtype)
        return _like(glu.packed_reference_fwd(gate_up, *rest), room)
    shape = (*gate_up.shape[:-1], glu._half_width(gate_up))
    y = empty_roomy(shape, room, out_dtype, gate_up.device)
    activation, clamp = glu._launched(form)
    launch_packed_forward(gate_up, y, activation, gate_first, interleaved, clamp)
    return y


def _packed_bwd(dy: torch.Tensor, gate_up: torch.Tensor, *args: Any) -> torch.Tensor:
    *form, gate_first, interleaved, grad_room, need = args
    rest = (*form, gate_first, interleaved, need)
    if not need or not launchable(gate_up, dy.dtype):
        return _like(glu.packed_reference_bwd(dy, gate_up, *rest), grad_room if need else 0)
    out = empty_roomy(gate_up.shape, grad_room, gate_up.dtype, gate_up.device)
    activation, clamp = glu._launched(form)
    launch_packed_backward(dy, gate_up, out, activation, gate_first, interleaved, clamp)
    return out


def _packed_reference_fwd(*args: Any) -> torch.Tensor:
    *given, room, _ = args
    return _like(glu.packed_reference_fwd(*given), room)


def _packed_reference_bwd(*args: Any) -> torch.Tensor:
    *given, grad_room, need = args
    return _like(glu.packed_reference_bwd(*given, need), grad_room if need else 0)


def _fake_packed_fwd(*args: Any) -> torch.Tensor:
    *given, room, _ = args
    y = glu._fake_packed_fwd(*given)
    return fake_roomy(y, y.shape, room, y.dtype)


def _fake_packed_bwd(*args: Any) -> torch.Tensor:
    *given, grad_room, need = args
    d = glu._fake_packed_bwd(*given, need)
    return fake_roomy(d, d.shape, grad_room, d.dtype) if need else d


def _more(schema: str, name: str, arguments: str) -> str:
    """The schema of op ``name`` under its variant's name, with more arguments at the end."""
    head, result = schema[len(name) :].split(") ->", 1)
    return f"{name}_roomy{head}, {arguments}) ->{result}"


def _without(save: Callable[..., Sequence[Any]], dropped: str) -> Callable[..., Sequence[Any]]:
    def saved(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
        return save({k: v for k, v in inputs.items() if k != dropped}, outputs)

    return saved


def _variant(spec: OpSpec, device_fwd: Implementation) -> OpSpec:
    """The variant of an op whose backward stays as it is."""
    assert spec.triton is not None
    name = spec.name
    return dataclasses.replace(
        spec,
        forward=_more(spec.forward, name, "int room"),
        backward=f"{name}_roomy{spec.backward[len(name) :]}",
        save=_without(spec.save, "room"),
        reference=(_first_roomy(spec.reference[0]), spec.reference[1]),
        triton=(device_fwd, spec.triton[1]),
        fake=(_fake_first_roomy(spec.fake[0]), spec.fake[1]),
    )


def _packed_variant(spec: OpSpec) -> OpSpec:
    name = spec.name
    head, rest = spec.backward[len(name) :].split(", bool need_", 1)
    return dataclasses.replace(
        spec,
        forward=_more(spec.forward, name, "int room, int grad_room"),
        backward=f"{name}_roomy{head}, int grad_room, bool need_{rest}",
        save=_without(spec.save, "room"),
        reference=(_packed_reference_fwd, _packed_reference_bwd),
        triton=(_packed_fwd, _packed_bwd),
        fake=(_fake_packed_fwd, _fake_packed_bwd),
    )


def _named(name: str) -> OpSpec:
    return next(s for s in glu.OPS if s.name == name)


OPS = (
    *(_variant(m.OPS[0], _norm_fwd(m.triton_fwd)) for m in (rms_norm, add_rms_norm, layer_norm)),
    _variant(_named("glu"), _glu_fwd),
    _packed_variant(_named("glu_packed")),
    _variant(_named("glu_clamped"), _glu_fwd),
    _packed_variant(_named("glu_clamped_packed")),
)
