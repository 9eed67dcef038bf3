"""What a case of the row kernels' benchmark is: one direction of one op at one shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from place import DEVICE

EPS = 1e-6
Call = Callable[[], Any]
Function = Callable[..., Any]


def draw(*shape: int, mean: float = 0.0, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16
         ) -> torch.Tensor:  # fmt: skip
    """Normal numbers on the device."""
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_(mean, scale)


def outputs_of(out: Any) -> tuple[torch.Tensor, ...]:
    """One or several results as a tuple."""
    return out if isinstance(out, tuple) else (out,)


class RowCase:
    """One direction of one op at one shape.

    ``direction`` is forward, dx (gradients of what is as large as x) or dx+dw (of the weights too).
    All implementations take the same operands. Three there always are: ``ours``, the host function on
    fresh inputs, ``op``, the registered op, and ``eager``, the formula.
    """

    direction: str
    rows: int  # or tokens
    width: int  # of a row, or of a head
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """What the case is called in tables, its shape left out."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """The least that must move; weights and statistics are not counted."""
        raise NotImplementedError

    def operands(self) -> list[tuple[str, torch.Tensor]]:
        """Fresh operands, each with what it is: x, w, or constant."""
        raise NotImplementedError

    def ours(self) -> Call:
        """Our host function on fresh inputs."""
        raise NotImplementedError

    def op(self, *t: torch.Tensor) -> Any:
        """Our registered op on the operands."""
        raise NotImplementedError

    def eager(self, *t: torch.Tensor) -> Any:
        """The formula as a model writes it."""
        raise NotImplementedError

    def leaves(self) -> list[torch.Tensor]:
        """Fresh operands, with gradients where this direction asks for them."""
        wanted = {"forward": "", "dx": "x", "dx+dw": "xw"}[self.direction]
        return [t.detach().requires_grad_(kind in wanted) for kind, t in self.operands()]

    def peer(self, function: Function) -> Call:
        """The same work by another implementation of ``eager``'s signature."""
        leaves = self.leaves()
        if self.direction == "forward":
            return lambda: function(*leaves)
        out = outputs_of(function(*leaves))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        up = [torch.randn_like(o) for o in out]
        return lambda: torch.autograd.grad(out, wanted, up, retain_graph=True)
