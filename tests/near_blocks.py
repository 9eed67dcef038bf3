"""A whole block of which one part is nearly, and not quite, what the compiler looks for.

``Block`` is attention with rotated q and k, and a gated MLP, both behind norms. A near miss replaces
its norm, its rotation or its MLP by a look-alike; all else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, INNER = 16, 2, 24
EPS = 1e-5


def norm(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def rotate(q, cos, sin):
    a, b = q.chunk(2, dim=-1)
    return q * cos + torch.cat((-b, a), dim=-1) * sin


def mlp(block, x):
    return block.down(F.silu(block.gate(x)) * block.up(x))


class Block(nn.Module):
    """x (B, T, 16), cos and sin (B, T, 8) to (B, T, 16)."""

    def __init__(
        self,
        norm: Callable[..., Any] = norm,
        rotate: Callable[..., Any] = rotate,
        mlp: Callable[..., Any] = mlp,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.parts = (norm, rotate, mlp)
        for name in ("q", "k", "v", "o"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.first, self.second = (nn.Parameter(torch.empty(WIDTH)) for _ in range(2))
        for p in self.parameters():
            drawn = torch.randn(p.shape, generator=generator)
            p.data = 0.4 * drawn + (1.0 if p.dim() == 1 else 0.0)

    def forward(self, x, cos, sin):
        norm, rotate, mlp = self.parts
        h = norm(x, self.first)
        q, k, v = (
            m(h).view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)
            for m in (self.q, self.k, self.v)
        )
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = torch.softmax(q @ k.transpose(-1, -2), dim=-1)
        x = x + self.o((scores @ v).transpose(1, 2).flatten(2))
        return x + mlp(self, norm(x, self.second))


# --- norms that are none


def norm_over_the_tokens(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS))


def norm_with_eps_outside(x, w):
    return w * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS))


def norm_with_eps_behind(x, w):
    return w * (x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + EPS))


def norm_without_the_width(x, w):
    return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS))


def norm_of_the_row_before(x, w):
    return w * (x * torch.rsqrt(x.roll(1, 1).pow(2).mean(-1, keepdim=True) + EPS))


def norm_with_a_constant_root(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS).detach())


def norm_of_a_rounded_row(x, w):
    low = x.to(torch.bfloat16).float()
    return w * (x * torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + EPS))


def norm_with_weight_added(x, w):
    return w + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def norm_with_dropout_inside(x, w):
    return w * (F.dropout(x, 0.3) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def norm_by_the_length(x, w):
    """Another formula for long sequences, decided while tracing."""
    power = 2 if x.shape[1] < 100 else 4
    return w * (x * torch.rsqrt(x.pow(power).mean(-1, keepdim=True) + EPS))


# --- rotations that are none


def rotation_with_the_sign_flipped(q, cos, sin):
    a, b = q.chunk(2, dim=-1)
    return q * cos + torch.cat((b, -a), dim=-1) * sin


def rotation_without_a_sign(q, cos, sin):
    a, b = q.chunk(2, dim=-1)
    return q * cos + torch.cat((b, a), dim=-1) * sin


def rotation_of_unswapped_halves(q, cos, sin):
    a, b = q.chunk(2, dim=-1)
    return q * cos + torch.cat((-a, b), dim=-1) * sin


def rotation_by_difference(q, cos, sin):
    a, b = q.chunk(2, dim=-1)
    return q * cos - torch.cat((-b, a), dim=-1) * sin


def rotation_with_cos_and_sin_swapped(q, cos, sin):
    return rotate(q, sin, cos)


def rotation_of_pairs_in_halves(q, cos, sin):
    return q * cos + torch.cat((-q[..., 1::2], q[..., ::2]), dim=-1) * sin


def rotation_in_place(q, cos, sin):
    q = q.clone()
    turned = torch.cat((-q[..., 4:], q[..., :4]), dim=-1) * sin
    q.mul_(cos)
    return q.add_(turned)


def rotation_with_a_rounded_product(q, cos, sin):
    a, b = q.chunk(2, dim=-1)
    return (q * cos).to(torch.bfloat16).to(q.dtype) + torch.cat((-b, a), dim=-1) * sin


# --- units that are none, or others


def unit_with_gate_and_up_swapped(block, x):
    return block.down(block.gate(x) * F.silu(block.up(x)))


def unit_of_the_sum(block, x):
    return block.down(F.silu(block.gate(x) + block.up(x)))


def unit_that_adds(block, x):
    return block.down(F.silu(block.gate(x)) + block.up(x))


def unit_with_dropout_inside(block, x):
    return block.down(F.dropout(F.silu(block.gate(x)), 0.4) * block.up(x))


def unit_whose_activation_is_kept(block, x):
    active = F.silu(block.gate(x))
    return block.down(active * block.up(x)) + active[..., :WIDTH]


def unit_with_a_constant_gate(block, x):
    return block.down(F.silu(block.gate(x)).detach() * block.up(x))


def unit_changed_in_place(block, x):
    active = F.silu(block.gate(x))
    active.mul_(2)
    return block.down(active * block.up(x))


def unit_with_up_changed_in_between(block, x):
    up = block.up(x)
    active = F.silu(block.gate(x))
    up.add_(1.0)
    return block.down(active * up)


def unit_rounded_inside(block, x):
    return block.down(F.silu(block.gate(x)).to(torch.bfloat16).to(x.dtype) * block.up(x))


def unit_by_the_length(block, x):
    """Another activation for long sequences, decided while tracing."""
    active = F.silu(block.gate(x)) if x.shape[1] < 100 else torch.tanh(block.gate(x))
    return block.down(active * block.up(x))


def unit_of_one_token_before(block, x):
    return block.down(F.silu(block.gate(x)).roll(1, 1) * block.up(x))


def unit_with_one_gate_a_row(block, x):
    return block.down(F.silu(block.gate(x)[..., :1]) * block.up(x))


def unit_normalised_over_the_features(block, x):
    return block.down(torch.softmax(block.gate(x), -1) * block.up(x))


def unit_without_gradient(block, x):
    with torch.no_grad():
        active = F.silu(block.gate(x))
    return block.down(active * block.up(x))


def unit_nearly_gelu(block, x):
    g = block.gate(x)
    return block.down(0.5 * g * (1.0 + torch.erf(g / 1.4)) * block.up(x))


def unit_nearly_clamped(block, x):
    g, u = block.gate(x).clamp(max=1.0), block.up(x).clamp(-0.5, 1.0)
    return block.down((u + 1) * (g * torch.sigmoid(g * 1.702)))


def unit_of_two_gates(block, x):
    g, u = block.gate(x), block.up(x)
    return block.down(torch.sigmoid(g) * torch.tanh(u))


def unit_of_itself(block, x):
    g = block.gate(x)
    return block.down(F.silu(g) * g + 0 * block.up(x))


LEFT, ITSELF = "left alone", "matched as what it is"
# part of the block, look-alike, what becomes of it
NEAR_BLOCKS = [
    ("norm", norm_over_the_tokens, LEFT),
    ("norm", norm_with_eps_outside, LEFT),
    ("norm", norm_with_eps_behind, LEFT),
    ("norm", norm_without_the_width, ITSELF),
    ("norm", norm_of_the_row_before, LEFT),
    ("norm", norm_with_a_constant_root, LEFT),
    ("norm", norm_of_a_rounded_row, LEFT),
    ("norm", norm_with_weight_added, ITSELF),
    ("norm", norm_with_dropout_inside, LEFT),
    ("norm", norm_by_the_length, ITSELF),
    ("rotate", rotation_with_the_sign_flipped, ITSELF),
    ("rotate", rotation_without_a_sign, LEFT),
    ("rotate", rotation_of_unswapped_halves, LEFT),
    ("rotate", rotation_by_difference, ITSELF),
    ("rotate", rotation_with_cos_and_sin_swapped, ITSELF),
    ("rotate", rotation_of_pairs_in_halves, LEFT),
    ("rotate", rotation_in_place, LEFT),
    ("rotate", rotation_with_a_rounded_product, LEFT),
    ("mlp", unit_with_gate_and_up_swapped, ITSELF),
    ("mlp", unit_of_the_sum, LEFT),
    ("mlp", unit_that_adds, LEFT),
    ("mlp", unit_with_dropout_inside, LEFT),
    ("mlp", unit_whose_activation_is_kept, LEFT),
    ("mlp", unit_with_a_constant_gate, LEFT),
    ("mlp", unit_changed_in_place, LEFT),
    ("mlp", unit_with_up_changed_in_between, LEFT),
    ("mlp", unit_rounded_inside, LEFT),
    ("mlp", unit_by_the_length, ITSELF),
    ("mlp", unit_of_one_token_before, LEFT),
    ("mlp", unit_with_one_gate_a_row, LEFT),
    ("mlp", unit_normalised_over_the_features, LEFT),
    ("mlp", unit_without_gradient, LEFT),
    ("mlp", unit_nearly_gelu, ITSELF),
    ("mlp", unit_nearly_clamped, ITSELF),
    ("mlp", unit_of_two_gates, ITSELF),
    ("mlp", unit_of_itself, LEFT),
]
OPS = {"norm": "rms_norm", "rotate": "rope", "mlp": "glu"}
