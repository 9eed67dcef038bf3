"""The backward of a gated unit that gives the unit's value once more, for whoever kept none.

Shapes and formulas are those of ``glu``. The value has the forward's bits, being the same expression of
the same numbers. Traffic per element: three read and three written, where the unit's forward and
backward apart read five and write three.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fusewright.kernels import glu
from fusewright.kernels.glu_kernels import launch_backward, launch_packed_backward
from fusewright.kernels.launch import launchable
from fusewright.kernels.spec import one_way


class Pair(NamedTuple):
    """Gradients of gate and up, and the value."""

    gate: torch.Tensor
    up: torch.Tensor
    y: torch.Tensor


class Packed(NamedTuple):
    """The gradient of the packed tensor, and the value."""

    gate_up: torch.Tensor
    y: torch.Tensor


def reference(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> Pair:
    """Both in plain PyTorch."""
    glu.check_pair(gate, up)
    grads = glu.reference_bwd(dy, gate, up, activation, True, True)
    return Pair(*grads, glu.reference_fwd(gate, up, activation, gate.dtype))


def device(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> Pair:
    """Both by one kernel."""
    if not launchable(gate, dy.dtype):
        return reference(dy, gate, up, activation)
    glu.check_pair(gate, up)
    dgate, dup, y = (torch.empty(gate.shape, dtype=t.dtype, device=t.device)
                     for t in (gate, up, gate))  # fmt: skip
    launch_backward(dy, gate, up, dgate, dup, activation, None, y)
    return Pair(dgate, dup, y)


def packed_reference(
    dy: torch.Tensor, gate_up: torch.Tensor, activation: str, gate_first: bool, interleaved: bool
) -> Packed:
    """Both of a packed tensor in plain PyTorch."""
    form = activation, gate_first, interleaved
    grad = glu.packed_reference_bwd(dy, gate_up, *form, True)
    return Packed(grad, glu.packed_reference_fwd(gate_up, *form, gate_up.dtype))


def packed_device(
    dy: torch.Tensor, gate_up: torch.Tensor, activation: str, gate_first: bool, interleaved: bool
) -> Packed:
    """Both of a packed tensor by one kernel."""
    form = activation, gate_first, interleaved
    if not launchable(gate_up, dy.dtype):
        return packed_reference(dy, gate_up, *form)
    out = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    y = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    launch_packed_backward(dy, gate_up, out, *form, None, y)
    return Packed(out, y)


def _dense(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _fake(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> Pair:
    return Pair(_dense(gate), _dense(up), _dense(gate))


def _packed_fake(dy: torch.Tensor, gate_up: torch.Tensor, *form: Any) -> Packed:
    y = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    return Packed(_dense(gate_up), y)


OPS = (
    one_way(
        "glu_again_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> "
        "(Tensor dgate, Tensor dup, Tensor y)",
        reference,
        device,
        _fake,
        lambda args, out: 0,
    ),
    one_way(
        "glu_packed_again_backward(Tensor dy, Tensor gate_up, str activation, bool gate_first, "
        "bool interleaved) -> (Tensor dgate_up, Tensor y)",
        packed_reference,
        packed_device,
        _packed_fake,
        lambda args, out: 0,
    ),
)
