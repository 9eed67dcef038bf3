"""What a group of linear layers with adapters is made of, and how its adapters are laid out.

The mathematics is in ``lora``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Tensors = Sequence[torch.Tensor]
_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))


class Group(NamedTuple):
    """Linear layers of one input and their adapters, as in the operator's arguments.

    Attributes:
        x: (..., K).
        inputs: tensors like x that some adapters read in its place.
        weights: (N_j, K) per layer.
        biases: (N_j,) or None per layer.
        down, up: A_i (r_i, K) and B_i (N_j, r_i) per adapter.
        member: the layer j of each adapter.
        source: which of ``inputs`` each adapter reads, -1 for x.
        scales: s_i.
    """

    x: torch.Tensor
    inputs: Tensors
    weights: Tensors
    biases: Sequence[torch.Tensor | None]
    down: Tensors
    up: Tensors
    member: Sequence[int]
    source: Sequence[int]
    scales: Sequence[float]

    @classmethod
    def over(cls, x: torch.Tensor, layers: Any) -> Group:
        """The layers that a named tuple has under these names, every adapter of which reads x."""
        ours = (layers.weights, layers.biases, layers.down, layers.up, layers.member)
        return cls(x, [], *ours, [-1] * len(layers.down), layers.scales)

    @property
    def dtype(self) -> torch.dtype:
        """In which the adapters work: float32 if one is in float32, else that of the first."""
        kinds = [t.dtype for t in (*self.down, *self.up)]
        for wide in (torch.float64, torch.float32):
            if wide in kinds:
                return wide
        return kinds[0] if kinds else self.x.dtype

    def input_of(self, i: int) -> torch.Tensor:
        """What adapter ``i`` reads."""
        return self.x if self.source[i] < 0 else self.inputs[self.source[i]]


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    inputs: bool
    weights: bool
    biases: bool
    down: bool
    up: bool


class Results(NamedTuple):
    """The gradients, as in the operator's results; of shape (0,) where nobody asked."""

    x: torch.Tensor
    inputs: list[torch.Tensor]
    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    down: list[torch.Tensor]
    up: list[torch.Tensor]


def takes(group: Group, out_dtype: torch.dtype) -> bool:
    """Whether the products here serve these dtypes: one for x, weights, biases and y, floats beside.

    Adapters may be in float32 over 16-bit weights, not the other way round.
    """
    dtype = group.x.dtype
    given = {w.dtype for w in group.weights} | {b.dtype for b in group.biases if b is not None}
    given |= {out_dtype, dtype}
    beside = {t.dtype for t in (*group.down, *group.up, *group.inputs)}
    allowed = {dtype, torch.float32}
    return dtype in _DTYPES and given == {dtype} and beside <= allowed and group.x.numel() > 0


class Plan(NamedTuple):
    """Where the adapters' columns lie behind x and behind the gradient.

    With ``split`` there are three groups of columns for the halves of float32 factors, [hi | lo | hi]
    for [hi | hi | lo] of the other one. With ``ones`` a last column adds the biases.
    """

    ranks: tuple[int, ...]
    split: bool
    ones: bool

    @property
    def step(self) -> int:
        """From one group of columns to the next; 0 where there is one group."""
        return sum(self.ranks) if self.split else 0

    @property
    def thin(self) -> int:
        """Columns of the adapters."""
        return sum(self.ranks) * (3 if self.split else 1)

    @property
    def columns(self) -> int:
        """Columns behind x."""
        return self.thin + self.ones

    @property
    def starts(self) -> list[int]:
        """The first column of each adapter, in the first group."""
        return list(itertools.accumulate(self.ranks, initial=0))[:-1]


def plan(group: Group) -> Plan:
    """The layout of a group's adapters."""
    split = group.dtype is torch.float32 and group.x.dtype is not torch.float32
    ones = any(b is not None for b in group.biases)
    return Plan(tuple(a.shape[0] for a in group.down), split, ones)


def forward_flops(args: Sequence[Any], out: Any) -> Any:
    """Of the layers' products with x (args[0]) and the thin ones; dropped inputs count like x."""
    (pieces, thin), width = out, args[0].shape[-1]
    return 2 * sum(y.numel() for y in pieces) * width + 4 * thin.numel() * width


def backward_flops(args: Sequence[Any], out: Any) -> Any:
    """Of dx and of the thin products' gradients; args are the gradients of y, thin, and then x."""
    pieces, thin, x = args[:3]
    width = x.shape[-1]
    whole = 2 * sum(y.numel() for y in pieces) * width
    trained = len([w for w in out[2] if w.dim() == 2]) if len(out) == 6 else 0
    return whole * (2 if trained else 1) + 8 * thin.numel() * width
