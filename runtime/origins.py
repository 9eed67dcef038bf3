"""Where the tensors of a recording lie: in which argument or buffer, and how far behind its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Unknown(Exception):
    """A recording has a tensor that comes from nowhere."""


class Place(NamedTuple):
    """Where a tensor lies: in which origin, how many bytes behind its beginning."""

    origin: int
    offset: int


class Origins:
    """The tensors that others lie in: arguments, then buffers and results as they are made.

    What a function gets from torch.empty is another object than what the mode saw, on the same
    storage; arguments are the objects they were, and several may share a storage.
    """

    def __init__(self, given: Sequence[torch.Tensor | None]) -> None:
        self.tensors: list[torch.Tensor | None] = list(given)
        self.aliases: list[tuple[torch.Tensor, int]] = []

    def alias(self, t: torch.Tensor, other: torch.Tensor) -> None:
        self.aliases.append((t, self.place(other).origin))

    def add(self, t: torch.Tensor | None) -> int:
        self.tensors.append(t)
        return len(self.tensors) - 1

    def knows(self, t: torch.Tensor) -> bool:
        return any(o is not None and _storage(o) == _storage(t) for o in self.tensors)

    def place(self, t: torch.Tensor) -> Place:
        for at, other in enumerate(self.tensors):
            if other is t:
                return Place(at, 0)
        for other, at in self.aliases:
            if _storage(other) == _storage(t):
                return Place(at, t.data_ptr() - other.data_ptr())
        around = [
            Place(at, t.data_ptr() - other.data_ptr())
            for at, other in enumerate(self.tensors)
            if other is not None and _storage(other) == _storage(t)
        ]
        if len(around) > 1:  # arguments that are pieces of one tensor
            around = [p for p in around if _inside(t, self.tensors[p.origin], p.offset)]
        if len(around) != 1:
            raise Unknown
        return around[0]


def _storage(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _inside(t: torch.Tensor, whole: torch.Tensor | None, offset: int) -> bool:
    """Whether the first and the last element of ``t`` are elements of ``whole``."""
    assert whole is not None
    if t.dtype != whole.dtype or offset < 0 or t.numel() == 0:
        return False
    first = offset // t.element_size()
    last = first + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return _element(first, whole) and _element(last, whole)


def _element(at: int, of: torch.Tensor) -> bool:
    """Whether the memory ``at`` elements behind the beginning is an element of a tensor."""
    for stride, size in sorted(zip(of.stride(), of.shape, strict=True), reverse=True):
        if stride and size > 1:
            index = min(at // stride, size - 1)
            at -= index * stride
    return at == 0
