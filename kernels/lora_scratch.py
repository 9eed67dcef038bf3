"""What the augmented products of ``lora`` take beside their results: memory within a run, and traffic.

An input that was made without room behind its rows is copied with it, the gradients of several pieces
are put beside each other, and 4-bit weights are written as 16-bit ones: ``Passing.memory`` bytes are
there while the op runs and gone behind it, and ``Passing.moved`` bytes go through memory before its
product begins. Symbolic sizes give symbolic numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusewright.kernels import room
from fusewright.kernels.lora_group import Group, plan
from fusewright.kernels.spec import Passing

_PACKED = 0.5  # bytes of a 4-bit weight; its scales are small beside them


def _augmented(group: Group) -> bool:
    return bool(group.down) and room.serves(group.x.device, group.x.dtype)


def forward(group: Group, roomy: bool, packed: bool) -> Passing:
    """Of y: x with room, and the weights with room behind them."""
    x, size = group.x, group.x.element_size()
    augmented = _augmented(group)
    space = room.needed(plan(group).columns if augmented else 0, 0)
    width, height = x.shape[-1], sum(w.shape[0] for w in group.weights)
    rows = x.numel() // width if augmented and not roomy else 0
    copied = rows * (width + space.columns) * size
    written = height * (width + space.columns) * size if packed else 0
    read = int(_PACKED * height * width) if packed else 0
    return Passing(copied + written, copied + written + read)


def backward(
    dys: Sequence[Any], group: Group, grad_roomy: bool, packed: bool, need: bool
) -> Passing:
    """Of dx, if there is need of it: the gradients of y with room, and the weights with room below."""
    if not need:
        return Passing(0, 0)
    x, size = group.x, group.x.element_size()
    augmented = _augmented(group)
    space = room.needed(0, plan(group).thin if augmented else 0)
    width, height = x.shape[-1], sum(w.shape[0] for w in group.weights)
    ready = grad_roomy and len(dys) == 1
    rows = x.numel() // width if augmented and not ready else 0
    copied = rows * (height + space.rows) * size
    written = (height + space.rows) * width * size if packed else 0
    read = int(_PACKED * height * width) if packed else 0
    return Passing(copied + written, copied + written + read)
