"""The backward of adapted layers whose input is a gated unit, and of that unit, in one op.

    h = act(gate) up        y_j = h W_j^T + b_j + sum_i s_i (h A_i^T) B_i^T

Shapes: gate_up (..., 2F) holds gate and up as in ``glu``; h (..., F) is x of ``lora``, and every adapter
reads it. Saved: gate_up and the thin products, not h.

Backward, in an order in which h is not needed before it is there anyway:

    dh = [dy_0 | ... | P_0 | ...] [W; A]      dB_i = dy_j^T S_i      db_j = column sums of dy_j
    dgate, dup, h                             one pass over dh, gate and up
    dA_i = P_i^T h

Derivations and rounding are those of ``glu`` and ``lora``; h has the forward's bits, being the same
expression of the same numbers. Traffic per element of h: three read and three written, where the
unit's forward and backward apart read five and write three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fusewright.kernels import glu, lora, lora_gemm, roomy
from fusewright.kernels.glu_kernels import launch_packed_backward
from fusewright.kernels.launch import launchable
from fusewright.kernels.lora_group import Group, Needs, Tensors, takes
from fusewright.kernels.room import empty_roomy
from fusewright.kernels.spec import Implementation, one_way


class Given(NamedTuple):
    """The operator's arguments.

    Attributes:
        dys, thin: as in the backward of ``lora``.
        gate_up: (..., 2F).
        weights, biases, down, up, member, scales: of the layers and adapters, as in ``lora``.
        activation, gate_first, interleaved: of the gated unit, as in ``glu``.
        room, grad_room: columns behind the rows of h and of d(gate_up), see ``room``.
        grad_roomy: dy was made with room behind its rows.
        need_biases, need_down, need_up: which gradients are wanted beside d(gate_up).
    """

    dys: Tensors
    thin: torch.Tensor
    gate_up: torch.Tensor
    weights: Tensors
    biases: Sequence[torch.Tensor | None]
    down: Tensors
    up: Tensors
    member: Sequence[int]
    scales: Sequence[float]
    activation: str
    gate_first: bool
    interleaved: bool
    room: int
    grad_room: int
    grad_roomy: bool
    need_biases: bool
    need_down: bool
    need_up: bool

    @property
    def layout(self) -> tuple[str, bool, bool]:
        """Of the gated unit."""
        return self.activation, self.gate_first, self.interleaved

    @property
    def needs(self) -> Needs:
        """What is wanted of the layers' backward."""
        return Needs(True, False, False, self.need_biases, self.need_down, self.need_up)

    def group(self, h: torch.Tensor) -> Group:
        """The layers and adapters over h."""
        return Group.over(h, self)


class Results(NamedTuple):
    """The gradients; of shape (0,) where nobody asked."""

    gate_up: torch.Tensor
    biases: list[torch.Tensor]
    down: list[torch.Tensor]
    up: list[torch.Tensor]


def _apart(
    given: Given, unit: Implementation, layers: Implementation, unit_bwd: Implementation
) -> Results:
    """The same by the three ops' own functions."""
    h = unit(given.gate_up, *given.layout, given.gate_up.dtype, given.room, given.grad_room)
    found = layers(given.dys, given.thin, *given.group(h), given.grad_roomy, *given.needs)
    dgate_up = unit_bwd(found.x, given.gate_up, *given.layout, given.grad_room, True)
    return Results(dgate_up, found.biases, found.down, found.up)


def host(*args: Any) -> Results:
    """The gradients by the references."""
    return _apart(
        Given(*args), roomy._packed_reference_fwd, lora.host_bwd, roomy._packed_reference_bwd
    )


def device(*args: Any) -> Results:
    """The gradients by kernels, h out of the unit's backward."""
    given = Given(*args)
    gate_up = given.gate_up
    shape = (*gate_up.shape[:-1], glu._half_width(gate_up))
    h = empty_roomy(shape, given.room, gate_up.dtype, gate_up.device)
    group = given.group(h)
    if not (takes(group, given.dys[0].dtype) and launchable(gate_up, gate_up.dtype)):
        return _apart(given, roomy._packed_fwd, lora.device_bwd, roomy._packed_bwd)
    out = empty_roomy(gate_up.shape, given.grad_room, gate_up.dtype, gate_up.device)

    def fill(dh: torch.Tensor) -> None:
        launch_packed_backward(dh, gate_up, out, *given.layout, None, h)

    found = lora_gemm.backward(given.dys, given.thin, group, given.grad_roomy, given.needs, fill)
    return Results(out, found.biases, found.down, found.up)


def _fake(*args: Any) -> Results:
    given = Given(*args)
    gate_up = given.gate_up
    h = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    found = lora._fake_bwd(given.dys, given.thin, *given.group(h), given.grad_roomy, *given.needs)
    out = roomy._fake_packed_bwd(found.x, gate_up, *given.layout, given.grad_room, True)
    return Results(out, found.biases, found.down, found.up)


def _flops(args: Sequence[Any], out: Any) -> Any:
    """Of dh and of the thin products' gradients."""
    pieces, thin, gate_up = args[:3]
    width = gate_up.shape[-1] // 2
    return 2 * sum(y.numel() for y in pieces) * width + 8 * thin.numel() * width


OPS = (
    one_way(
        "lora_glu_backward(Tensor[] dys, Tensor thin, Tensor gate_up, Tensor[] weights, "
        "Tensor?[] biases, Tensor[] down, Tensor[] up, int[] member, float[] scales, "
        "str activation, bool gate_first, bool interleaved, int room, int grad_room, "
        "bool grad_roomy, bool need_biases, bool need_down, bool need_up) -> "
        "(Tensor dgate_up, Tensor[] dbiases, Tensor[] ddown, Tensor[] dup)",
        host,
        device,
        _fake,
        _flops,
    ),
)
