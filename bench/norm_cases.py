"""The row norms and rope as cases to measure: inputs, our call, eager's formula, bytes to move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from row_case import EPS, Call, RowCase, draw

from fusewright.kernels import add_rms_norm, layer_norm, rms_norm, rope


def rms_formula(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """RMSNorm as models write it: in float32, rounded before the weight."""
    wide = x if x.dtype is torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return w * y.to(x.dtype)


@dataclass(frozen=True)
class NormCase(RowCase):
    """A norm of whole rows; ``kind`` is rms, add or layer."""

    kind: str
    direction: str
    rows: int
    width: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.kind} {self.direction}"

    @property
    def units(self) -> int:
        """Row tensors read and written."""
        forward = self.direction == "forward"
        return {"rms": (2, 3), "layer": (2, 3), "add": (4, 4)}[self.kind][0 if forward else 1]

    @property
    def bytes(self) -> int:
        return self.units * self.rows * self.width * self.dtype.itemsize

    def _new(self) -> torch.Tensor:
        return draw(self.rows, self.width, dtype=self.dtype)

    def operands(self) -> list[tuple[str, torch.Tensor]]:
        w = ("w", draw(self.width, mean=1, scale=0.3, dtype=self.dtype))
        rows = [("x", self._new()) for _ in range(2 if self.kind == "add" else 1)]
        b = [("w", draw(self.width, scale=0.3, dtype=self.dtype))] if self.kind == "layer" else []
        return [*rows, w, *b]

    def ours(self) -> Call:
        x, *rest = (t for _, t in self.operands())
        d, need = self.dtype, self.direction == "dx+dw"
        if self.direction == "forward":
            if self.kind == "rms":
                return lambda: rms_norm.triton_fwd(x, *rest, EPS, 0.0, "input", d)
            if self.kind == "add":
                return lambda: add_rms_norm.triton_fwd(x, *rest, EPS, 0.0, "input", d)
            return lambda: layer_norm.triton_fwd(x, *rest, EPS, 0.0, "output", d)
        mean, rstd = x.float().mean(-1), torch.rsqrt(x.float().square().mean(-1) + EPS)
        g = self._new()
        if self.kind == "rms":
            (w,) = rest
            return lambda: rms_norm.triton_bwd(g, x, w, rstd, 0.0, "input", True, need)
        if self.kind == "add":
            s, w = rest
            return lambda: add_rms_norm.triton_bwd(g, s, x, w, rstd, 0.0, "input", True, True, need)
        return lambda: layer_norm.triton_bwd(
            g, x, *rest, mean, rstd, 0.0, "output", True, need, need
        )

    def eager(self, *t: torch.Tensor) -> Any:
        if self.kind == "layer":
            return F.layer_norm(t[0], (self.width,), t[1], t[2], EPS)
        x = t[0] + t[1] if self.kind == "add" else t[0]
        y = rms_formula(x, t[-1])
        return (y, x) if self.kind == "add" else y

    def op(self, *t: torch.Tensor) -> Any:
        ops, d = torch.ops.fusewright, self.dtype
        if self.kind == "layer":
            return ops.layer_norm(*t, EPS, 0.0, "output", d)[0]
        if self.kind == "add":
            return ops.add_rms_norm(*t, EPS, 0.0, "input", d)[:2]
        return ops.rms_norm(*t, EPS, 0.0, "input", d)[0]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    """The rotation as models write it."""
    if layout == "half":
        low, high = x.chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


@dataclass(frozen=True)
class HeadCase(RowCase):
    """q and k of so many heads, in and to the layout of a projection's output."""

    direction: str
    rows: int
    q_heads: int
    k_heads: int
    width: int
    batch: int = 2
    dtype: torch.dtype = torch.bfloat16
    packed: bool = False  # q and k are columns of one projection's output, v beside them

    @property
    def heads(self) -> str:
        return f"{self.q_heads}/{self.k_heads}x{self.width}{' strided' if self.packed else ''}"

    @property
    def bytes(self) -> int:
        """Read and written are q and k, in a backward of a norm their gradients too; tables once."""
        heads = self._passes() * (self.q_heads + self.k_heads) * self.width * self.dtype.itemsize
        tables = 2 * self.width * self.dtype.itemsize // self.batch
        return self.rows * (heads + tables)

    def _passes(self) -> int:
        return 2

    def pair(self, packed: bool) -> list[torch.Tensor]:
        """q and k."""
        length, counts = self.rows // self.batch, (self.q_heads, self.k_heads)
        if packed:
            all_heads = self.q_heads + 2 * self.k_heads
            whole = draw(self.batch, length, all_heads, self.width, dtype=self.dtype)
            parts = list(whole.split((*counts, self.k_heads), 2)[:2])
        else:
            parts = [draw(self.batch, length, n, self.width, dtype=self.dtype) for n in counts]
        return [t.transpose(1, 2) for t in parts]

    def tables(self) -> list[torch.Tensor]:
        """cos and sin."""
        angles = draw(1, 1, self.rows // self.batch, self.width // 2, scale=3, dtype=torch.float32)
        angles = torch.cat((angles, angles), -1)
        return [angles.cos().to(self.dtype), angles.sin().to(self.dtype)]


@dataclass(frozen=True)
class RopeCase(HeadCase):
    """q and k turned together."""

    layout: str = "half"

    @property
    def name(self) -> str:
        direction = "forward" if self.direction == "forward" else "backward"
        return f"rope {self.layout} {direction} {self.heads}"

    def operands(self) -> list[tuple[str, torch.Tensor]]:
        return [
            *(("x", t) for t in self.pair(self.packed)),
            *(("constant", t) for t in self.tables()),
        ]

    def ours(self) -> Call:
        q, k = self.pair(self.packed and self.direction == "forward")
        args = (*self.tables(), self.layout, self.width, self.dtype)
        if self.direction == "forward":
            return lambda: rope.triton_fwd(q, k, *args)
        order = [0, 2, 1]
        return lambda: rope.triton_bwd(q, k, *args, order, order, True, True)

    def eager(self, *t: torch.Tensor) -> Any:
        return tuple(rotate(x, t[2], t[3], self.layout) for x in t[:2])

    def op(self, *t: torch.Tensor) -> Any:
        return torch.ops.fusewright.rope(*t, self.layout, self.width, self.dtype)
