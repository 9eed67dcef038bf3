"""RoPE: look-alikes that are something else, or a rotation other than they seem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import check, check_untouched, named
from test_patterns_rope import WIDTH, _half, _inputs_for, _pairs

# --- the other way round


def sign_flipped(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = q[..., : WIDTH // 2], q[..., WIDTH // 2 :]
    return q * cos + torch.cat((b, -a), dim=-1) * sin, k


def both_turned_back(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def back(x):
        a, b = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
        return x * cos + torch.cat((b, -a), dim=-1) * sin

    return back(q), back(k)


def difference(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos - _half(q) * sin, k


# --- near misses


def difference_turned_around(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _half(q) * sin - q * cos, k


def cos_and_sin_swapped(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * sin + _half(q) * cos, k


def swapped_for_keys_alone(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half(q) * sin, k * sin + _half(k) * cos


def flipped_for_keys_alone(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half(q) * sin, k * cos - _half(k) * sin


def both_negated(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = q[..., : WIDTH // 2], q[..., WIDTH // 2 :]
    return q * cos + torch.cat((-b, -a), dim=-1) * sin, k


def none_negated(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = q[..., : WIDTH // 2], q[..., WIDTH // 2 :]
    return q * cos + torch.cat((b, a), dim=-1) * sin, k


def halves_not_swapped(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = q[..., : WIDTH // 2], q[..., WIDTH // 2 :]
    return q * cos + torch.cat((-a, b), dim=-1) * sin, k


def uneven_split(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = q[..., :3], q[..., 3:]
    return q * cos + torch.cat((-b, a), dim=-1) * sin, k


def halves_from_pairs(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + torch.cat((-q[..., 1::2], q[..., ::2]), dim=-1) * sin, k


def pairs_from_halves(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = q[..., : WIDTH // 2], q[..., WIDTH // 2 :]
    return q * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin, k


def q_in_halves_k_in_pairs(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half(q) * sin, k * cos + _pairs(k) * sin


def of_another_tensor(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half(q.tanh()) * sin, k


def rotated_along_the_tokens(q, k, cos, sin):
    cos, sin = cos[:, None, :4], sin[:, None, :4]
    q = q[:, :, :4]
    return q * cos + torch.cat((-q[:, :, 2:], q[:, :, :2]), dim=2) * sin, k


def tables_with_a_gradient(q, k, cos, sin):
    scale = k.mean() + 1
    cos, sin = cos.unsqueeze(1) * scale, sin.unsqueeze(1) * scale
    return q * cos + _half(q) * sin, k


def scaled_inside(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos + _half(q) * sin) * 0.5, q * cos + 0.5 * _half(q) * sin


def rotated_used_outside(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = _half(q)
    return q * cos + turned * sin, turned


def three_tables(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half(q) * sin * cos.abs(), k


def square_of_a_table(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half(q) * (sin * sin), k


def changed_in_place_in_between(q, k, cos, sin):
    q = q.detach()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = _half(q) * sin
    q.mul_(2)
    return q * cos + turned + 0 * k.mean(), k


def table_changed_between_q_and_k(q, k, cos, sin):
    a = q.detach() * cos.unsqueeze(1) + _half(q.detach()) * sin.unsqueeze(1)
    cos.mul_(2.0)
    return a + q, k * cos.unsqueeze(1) + _half(k) * sin.unsqueeze(1)


def keys_need_the_queries(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a = q * cos + _half(q) * sin
    k = k + a.mean()
    return a, k * cos + _half(k) * sin


def pieces_with_the_second_sign_flipped_narrow(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = q.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos - a * sin), dim=-1), k


def pieces_transposed_narrow(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = q.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1), k


def pieces_with_the_first_sign_flipped_narrow(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = q.chunk(2, dim=-1)
    return torch.cat((b * cos - a * sin, b * cos + a * sin), dim=-1), k


def pieces_crossed_narrow(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = q.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * cos + b * sin), dim=-1), k


def halves_wide_with_different_tables(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1).clone(), sin.unsqueeze(1)
    cos = cos + 0.1 * torch.arange(float(WIDTH))
    return q * cos + _half(q) * sin, k


def rounded_in_the_middle(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    product = (q.float() * cos).to(torch.bfloat16).to(q.dtype)
    return product + _half(q) * sin, k


LEFT_ALONE = [
    (difference_turned_around, "rope", "proof: float64: value differs"),
    (both_negated, "rope", None),
    (none_negated, "rope", None),
    (halves_not_swapped, "rope", "proof: float64: value differs"),
    (uneven_split, "rope", "proof: float64: value differs"),
    (halves_from_pairs, "rope", "proof: float64: value differs"),
    (pairs_from_halves, "rope", "proof: float64: value differs"),
    (of_another_tensor, "rope", "grow: cos varies over both the heads and the tokens"),
    (rotated_along_the_tokens, "rope", None),
    (tables_with_a_gradient, "rope", "legality: cos needs a gradient, and the kernel gives none"),
    (rotated_used_outside, "rope", "is also used at"),
    (
        three_tables,
        "rope",
        "grow: the rotated value is not combined as x cos + R(x) sin with two tables",
    ),
    (changed_in_place_in_between, "rope", "grow: cos varies over both the heads and the tokens"),
    (pieces_with_the_second_sign_flipped_narrow, "rope", None),
    (pieces_with_the_first_sign_flipped_narrow, "rope", "proof: float64: value differs"),
    (pieces_crossed_narrow, "rope", "proof: float64: value differs"),
    (rounded_in_the_middle, "rope", "proof: casting mode: value differs"),
]
MATCHED_AS_WHAT_IT_IS = [
    (sign_flipped, {"rope": 1}),
    (both_turned_back, {"rope": 1}),
    (difference, {"rope": 1}),
    (pieces_transposed_narrow, {"rope": 1}),
    (cos_and_sin_swapped, {"rope": 1}),
    (swapped_for_keys_alone, {"rope": 2}),
    (flipped_for_keys_alone, {"rope": 2}),
    (q_in_halves_k_in_pairs, {"rope": 2}),
    (scaled_inside, {"rope": 1}),
    (square_of_a_table, {"rope": 1}),
    (table_changed_between_q_and_k, {"rope": 1}),
    (keys_need_the_queries, {"rope": 2}),
    (halves_wide_with_different_tables, {"rope": 1}),
]


@pytest.mark.parametrize(("near_miss", "pattern", "reason"), LEFT_ALONE, ids=named)
def test_a_near_miss_is_left_alone(near_miss: Any, pattern: str, reason: str | None) -> None:
    check_untouched(near_miss, _inputs_for(near_miss.__name__), pattern, reason)


@pytest.mark.parametrize(("near_miss", "ops"), MATCHED_AS_WHAT_IT_IS, ids=named)
def test_a_near_miss_is_matched_as_what_it_is(near_miss: Any, ops: dict[str, int]) -> None:
    check(near_miss, _inputs_for(near_miss.__name__), ops)
