"""The row norms and rope as cases to measure: inputs, our call, eager's formula, bytes to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fusewright.kernels import add_rms_norm, layer_norm, rms_norm, rope

EPS = 1e-6
Call = Callable[[], Any]


@dataclass(frozen=True)
class NormCase:
    """One direction of one norm at one shape, in bfloat16.

    ``kind`` is rms, add or layer; ``direction`` is forward, dx (no weight gradient) or dx+dw.
    """

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
        """The least that must move; weights and statistics are not counted."""
        return self.units * self.rows * self.width * self.dtype.itemsize

    def tensors(self) -> dict[str, torch.Tensor]:
        """Random inputs and upstream gradients."""
        shape, new = (self.rows, self.width), {"dtype": self.dtype, "device": "cuda"}
        names = {"rms": "x", "layer": "x", "add": "xe"}[self.kind]
        if self.direction != "forward":
            names += "gs" if self.kind == "add" else "g"
        made = {n: torch.empty(shape, **new).normal_() for n in names}
        made["w"] = torch.empty(self.width, **new).normal_(1, 0.3)
        made["b"] = torch.empty(self.width, **new).normal_(0, 0.3)
        return made

    def ours(self) -> Call:
        """Our host function on fresh inputs."""
        t, d = self.tensors(), self.dtype
        x, w, b = t["x"], t["w"], t["b"]
        need = self.direction == "dx+dw"
        if self.direction == "forward":
            if self.kind == "rms":
                return lambda: rms_norm.triton_fwd(x, w, EPS, 0.0, "input", d)
            if self.kind == "add":
                return lambda: add_rms_norm.triton_fwd(x, t["e"], w, EPS, 0.0, "input", d)
            return lambda: layer_norm.triton_fwd(x, w, b, EPS, 0.0, "output", d)
        mean, rstd = x.float().mean(-1), torch.rsqrt(x.float().square().mean(-1) + EPS)
        g = t["g"]
        if self.kind == "rms":
            return lambda: rms_norm.triton_bwd(g, x, w, rstd, 0.0, "input", True, need)
        if self.kind == "add":
            s = t["s"]
            del t["e"]
            return lambda: add_rms_norm.triton_bwd(g, s, x, w, rstd, 0.0, "input", True, True, need)
        return lambda: layer_norm.triton_bwd(
            g, x, w, b, mean, rstd, 0.0, "output", True, need, need
        )

    def eager(self, *t: torch.Tensor) -> Any:
        """The formula as a model writes it, of (x, w, b) or (x, e, w)."""
        if self.kind == "layer":
            return F.layer_norm(t[0], (self.width,), t[1], t[2], EPS)
        x = t[0] + t[1] if self.kind == "add" else t[0]
        wide = x if x.dtype is torch.float64 else x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        y = t[-1] * y.to(x.dtype)
        return (y, x) if self.kind == "add" else y

    def leaves(self, t: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The operands of ``eager``, with gradients where this direction asks for them."""
        names = {"rms": "xw", "layer": "xwb", "add": "xew"}[self.kind]
        wanted = {"forward": "", "dx": "xe", "dx+dw": "xewb"}[self.direction]
        return [t[n].detach().requires_grad_(n in wanted) for n in names]

    def peer(self, function: Callable[..., Any]) -> Call:
        """The same work by another implementation of ``eager``'s signature."""
        t = self.tensors()
        leaves = self.leaves(t)
        if self.direction == "forward":
            return lambda: function(*leaves)
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        up = [t["g"], t["s"]] if self.kind == "add" else [t["g"]]
        return lambda: torch.autograd.grad(out, wanted, up, retain_graph=True)

    def op(self, *t: torch.Tensor) -> Any:
        """Our registered op with ``eager``'s signature."""
        ops, d = torch.ops.fusewright, self.dtype
        if self.kind == "layer":
            return ops.layer_norm(*t, EPS, 0.0, "output", d)[0]
        if self.kind == "add":
            return ops.add_rms_norm(*t, EPS, 0.0, "input", d)[:2]
        return ops.rms_norm(*t, EPS, 0.0, "input", d)[0]


@dataclass(frozen=True)
class RopeCase:
    """q and k turned together, from and to the layout of a projection's output."""

    direction: str
    tokens: int
    q_heads: int
    k_heads: int
    width: int
    layout: str = "half"
    batch: int = 2
    dtype: torch.dtype = torch.bfloat16
    table_dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"rope {self.layout} {self.direction} {self.q_heads}/{self.k_heads}x{self.width}"

    @property
    def bytes(self) -> int:
        """q and k read and written, the tables read once."""
        heads = 2 * (self.q_heads + self.k_heads) * self.width * self.dtype.itemsize
        tables = 2 * self.width * self.table_dtype.itemsize // self.batch
        return self.tokens * (heads + tables)

    def tensors(self) -> list[torch.Tensor]:
        """q, k, cos, sin."""
        length = self.tokens // self.batch
        pair = [
            torch.empty((self.batch, length, h, self.width), dtype=self.dtype, device="cuda")
            .normal_()
            .transpose(1, 2)
            for h in (self.q_heads, self.k_heads)
        ]
        angles = torch.rand(1, 1, length, self.width // 2, device="cuda") * 6
        angles = torch.cat((angles, angles), -1)
        return [*pair, angles.cos().to(self.table_dtype), angles.sin().to(self.table_dtype)]

    def ours(self) -> Call:
        """Our host function on fresh inputs."""
        q, k, cos, sin = self.tensors()
        args = (cos, sin, self.layout, self.width, self.dtype)
        if self.direction == "forward":
            return lambda: rope.triton_fwd(q, k, *args)
        order = [0, 2, 1]
        return lambda: rope.triton_bwd(q, k, *args, order, order, True, True)

    def eager(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """The formula as a model writes it."""
        return tuple(x * cos + self._rotated(x) * sin for x in (q, k))

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "half":
            low, high = x.chunk(2, dim=-1)
            return torch.cat((-high, low), dim=-1)
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    def leaves(self, t: list[torch.Tensor]) -> list[torch.Tensor]:
        """The operands of ``eager``, with gradients where this direction asks for them."""
        grad = self.direction != "forward"
        return [x.detach().requires_grad_(grad and i < 2) for i, x in enumerate(t)]

    def peer(self, function: Callable[..., Any]) -> Call:
        """The same work by another implementation of ``eager``'s signature."""
        leaves = self.leaves(self.tensors())
        if self.direction == "forward":
            return lambda: function(*leaves)
        out = function(*leaves)
        up = [torch.randn_like(o) for o in out]
        return lambda: torch.autograd.grad(out, leaves[:2], up, retain_graph=True)

    def op(self, *t: torch.Tensor) -> Any:
        """Our registered op with ``eager``'s signature."""
        return torch.ops.fusewright.rope(*t, self.layout, self.width, self.dtype)
