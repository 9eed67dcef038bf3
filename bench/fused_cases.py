"""The gated norm, and the heads' norm with rope, as cases to measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from norm_cases import HeadCase, rms_formula, rotate
from row_case import EPS, Call, RowCase, draw

from fusewright.kernels import gated_rms_norm, qk_norm_rope


@dataclass(frozen=True)
class GatedCase(RowCase):
    """An RMS norm over groups of columns, gated by silu of a second input before or after it."""

    order: str
    direction: str
    rows: int
    width: int
    group: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"gated {self.order} {self.direction}"

    @property
    def bytes(self) -> int:
        tensors = 3 if self.direction == "forward" else 5
        return tensors * self.rows * self.width * self.dtype.itemsize

    @property
    def form(self) -> tuple[Any, ...]:
        return 0.0, "input", self.order, "silu", self.group

    def operands(self) -> list[tuple[str, torch.Tensor]]:
        x, gate = (draw(self.rows, self.width, dtype=self.dtype) for _ in range(2))
        return [("x", x), ("x", gate), ("w", draw(self.width, mean=1, scale=0.3, dtype=self.dtype))]

    def ours(self) -> Call:
        given = [t for _, t in self.operands()]
        if self.direction == "forward":
            return lambda: gated_rms_norm.triton_fwd(*given, EPS, *self.form, self.dtype)
        dy = draw(self.rows, self.width, dtype=self.dtype)
        rstd = torch.ones(self.rows, self.width // self.group, device=dy.device)
        needs = (True, True, self.direction == "dx+dw")
        return lambda: gated_rms_norm.triton_bwd(dy, *given, rstd, *self.form, *needs)

    def eager(self, *t: torch.Tensor) -> Any:
        x, gate, w = t
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        u, a = x.to(wide), F.silu(gate.to(wide))
        u = u * a if self.order == "before" else u
        groups = u.unflatten(-1, (-1, self.group))
        u = (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + EPS)).flatten(-2)
        u = w * u.to(x.dtype)
        return (u * a if self.order == "after" else u).to(x.dtype)

    def op(self, *t: torch.Tensor) -> Any:
        return torch.ops.fusewright.gated_rms_norm(*t, EPS, *self.form, self.dtype)[0]


@dataclass(frozen=True)
class QkCase(HeadCase):
    """Queries and keys normalised head by head, and rotated."""

    @property
    def name(self) -> str:
        return f"qk_norm_rope {self.direction} {self.heads}"

    def _passes(self) -> int:
        return 2 if self.direction == "forward" else 3

    def operands(self) -> list[tuple[str, torch.Tensor]]:
        weights = [draw(self.width, mean=1, scale=0.3, dtype=self.dtype) for _ in range(2)]
        return [
            *(("x", t) for t in self.pair(self.packed)),
            *(("w", t) for t in weights),
            *(("constant", t) for t in self.tables()),
        ]

    def _given(self, *t: torch.Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return t[:4], (0.0, "input", self.dtype, *t[4:], "half", self.width)

    def ours(self) -> Call:
        given, form = self._given(*(t for _, t in self.operands()))
        if self.direction == "forward":
            return lambda: qk_norm_rope.triton_fwd(*given, EPS, *form, self.dtype)
        up = self.pair(False)
        rstd = [torch.ones(t.shape[0], t.shape[2], t.shape[1], device=t.device) for t in up]
        needs = (True, True, *[self.direction == "dx+dw"] * 2)
        return lambda: qk_norm_rope.triton_bwd(*up, *given, *rstd, *form, *needs)

    def eager(self, *t: torch.Tensor) -> Any:
        return tuple(
            rotate(rms_formula(x, w), *t[4:], "half") for x, w in zip(t[:2], t[2:4], strict=True)
        )

    def op(self, *t: torch.Tensor) -> Any:
        given, form = self._given(*t)
        return torch.ops.fusewright.qk_norm_rope(*given, EPS, *form, self.dtype)[:2]
