"""RoPE: spellings seen in the wild, and look-alikes that are something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import check, named, rows, to_bf16

WIDTH = 8


def _half(x):
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def _pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _inputs_for(name: str) -> list[Any]:
    """q (B, H, T, D), k with fewer heads, cos and sin (B, T, D), of half width where named so."""
    angle = torch.randn(2, 5, WIDTH // 2)
    if "narrow" not in name:
        angle = angle.repeat_interleave(2, -1) if "pairs" in name else torch.cat((angle, angle), -1)
    if "partial" in name:
        angle = torch.cat((angle[..., :2], angle[..., :2]), -1)
    shape = (5, 4) if "tokens_first" in name else (4, 5)
    q = rows(2, *shape, WIDTH)
    k = rows(2, *((5, 2) if "tokens_first" in name else (2, 5)), WIDTH)
    return [q, k, angle.cos(), angle.sin()]


def llama(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half(q) * sin, k * cos + _half(k) * sin


def tokens_first(q, k, cos, sin):
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + _half(q) * sin, k * cos + _half(k) * sin


def one_tensor(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half(q) * sin, k


def sum_turned_around(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _half(q) * sin + cos * q, sin * _half(k) + k * cos


def chunked(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)

    return q * cos + rotated(q) * sin, k * cos + rotated(k) * sin


def split_by_width(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x):
        a, b = torch.split(x, WIDTH // 2, dim=-1)
        return torch.cat([-b, a], dim=3)

    return q * cos + rotated(q) * sin, k * cos + rotated(k) * sin


def in_float32(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    a, b = q.float(), k.float()
    return (a * cos + _half(a) * sin).to(q.dtype), (b * cos + _half(b) * sin).to(k.dtype)


def pairs(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _pairs(q) * sin, k * cos + _pairs(k) * sin


def pairs_shaped_back(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape_as(x)

    return q * cos + rotated(q) * sin, k * cos + rotated(k) * sin


def pairs_repeated_inside_narrow(q, k, cos, sin):
    cos = cos.unsqueeze(1).repeat_interleave(2, -1)
    sin = sin.unsqueeze(1).repeat_interleave(2, -1)
    return q * cos + _pairs(q) * sin, k * cos + _pairs(k) * sin


def by_pieces_narrow(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return rotated(q), rotated(k)


def pairs_by_pieces_narrow(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x):
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    return rotated(q), rotated(k)


def pairs_to_halves_narrow(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    return rotated(q), rotated(k)


def partial(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x):
        head, rest = x[..., :4], x[..., 4:]
        return torch.cat((head * cos + _half(head) * sin, rest), dim=-1)

    return rotated(q), rotated(k)


def added_in_one_call(q, k, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    return torch.add(q * cos, _half(q) * sin), torch.add(k * cos, _half(k) * sin)


SPELLINGS = [
    llama,
    tokens_first,
    one_tensor,
    sum_turned_around,
    chunked,
    split_by_width,
    in_float32,
    pairs,
    pairs_shaped_back,
    pairs_repeated_inside_narrow,
    by_pieces_narrow,
    pairs_by_pieces_narrow,
    pairs_to_halves_narrow,
    partial,
    added_in_one_call,
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_is_matched(spelling: Any) -> None:
    check(spelling, _inputs_for(spelling.__name__), {"rope": 1})


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_in_bfloat16(spelling: Any) -> None:
    check(spelling, to_bf16(_inputs_for(spelling.__name__)), {"rope": 1})
