"""Gated linear units: spellings seen in the wild, and look-alikes that are something else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import check, check_untouched, named, rows, to_bf16

WIDTH = 12


def _inputs() -> list[Any]:
    return [rows(2, 5, WIDTH), rows(2, 5, WIDTH)]


def silu(g, u):
    return F.silu(g) * u


def silu_behind(g, u):
    return u * F.silu(g)


def silu_by_hand(g, u):
    return g * torch.sigmoid(g) * u


def silu_by_hand_turned_around(g, u):
    return u * (torch.sigmoid(g) * g)


def silu_in_float32(g, u):
    return (F.silu(g.float()) * u.float()).to(g.dtype)


def gelu(g, u):
    return F.gelu(g) * u


def gelu_tanh(g, u):
    return F.gelu(g, approximate="tanh") * u


def gelu_by_erf(g, u):
    return 0.5 * g * (1.0 + torch.erf(g / math.sqrt(2.0))) * u


def gelu_by_tanh(g, u):
    inner = math.sqrt(2.0 / math.pi) * (g + 0.044715 * torch.pow(g, 3.0))
    return 0.5 * g * (1.0 + torch.tanh(inner)) * u


def relu(g, u):
    return torch.relu(g) * u


def relu_as_a_clamp(g, u):
    return g.clamp(min=0) * u


def squared_relu(g, u):
    return F.relu(g).square() * u


def sigmoid(g, u):
    return torch.sigmoid(g) * u


def tanh(g, u):
    return torch.tanh(g) * u


def packed_halves(g, u):
    a, b = torch.cat((g, u), dim=-1).chunk(2, dim=-1)
    return F.silu(a) * b


def packed_halves_gate_second(g, u):
    a, b = torch.cat((g, u), dim=-1).chunk(2, dim=-1)
    return a * F.silu(b)


def packed_slices(g, u):
    both = torch.cat((g, u), dim=-1)
    return F.gelu(both[..., :WIDTH]) * both[..., WIDTH:]


def library_glu(g, u):
    return F.glu(torch.cat((g, u), dim=-1))


def packed_interleaved(g, u):
    both = torch.cat((g, u), dim=-1)
    return F.silu(both[..., ::2]) * both[..., 1::2]


def packed_interleaved_gate_second(g, u):
    both = torch.cat((g, u), dim=-1)
    return both[..., 0::2] * F.gelu(both[..., 1::2])


def packed_split(g, u):
    a, b = torch.split(torch.cat((g, u), dim=-1), WIDTH, dim=-1)
    return F.silu(a) * b


def packed_split_with_sizes(g, u):
    a, b = torch.cat((g, u), dim=-1).split([WIDTH, WIDTH], dim=-1)
    return torch.mul(b, F.silu(a))


def packed_view_and_index(g, u):
    both = torch.cat((g, u), dim=-1).view(2, -1, 2, WIDTH)
    return F.silu(both[..., 0, :]) * both[..., 1, :]


def packed_view_and_unbind(g, u):
    gate, up = torch.cat((g, u), dim=-1).unflatten(-1, (WIDTH, 2)).unbind(-1)
    return F.silu(gate) * up


def in_float32_after_the_chunk(g, u):
    a, b = torch.cat((g, u), dim=-1).chunk(2, dim=-1)
    return (F.silu(a.float()) * b.float()).to(g.dtype)


def torch_mul(g, u):
    return torch.mul(torch.nn.SiLU()(g), u)


def quick_gelu(g, u):
    return g * torch.sigmoid(1.702 * g) * u


def factors_in_any_order(g, u):
    return torch.sigmoid(g) * u * g


def scaled(g, u):
    return F.silu(g * 0.5) * u * 0.25


def silu_by_exp(g, u):
    return g / (1 + torch.exp(-g)) * u


def mish(g, u):
    return F.mish(g) * u


def clamped_unit(g, u):
    gate, up = g.clamp(min=None, max=1.5), u.clamp(min=-1.5, max=1.5)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def clamped_unit_interleaved(g, u):
    both = torch.cat((g, u), dim=-1)
    return clamped_unit(both[..., ::2], both[..., 1::2])


def clamp_before_silu(g, u):
    return F.silu(g.clamp(max=1.0)) * u.clamp(-1.0, 1.0)


def clamp_after_silu(g, u):
    return F.silu(g).clamp(max=1.0) * u.clamp(-1.0, 1.0)


SPELLINGS = [
    (packed_interleaved, "glu_packed"),
    (packed_interleaved_gate_second, "glu_packed"),
    (packed_split, "glu_packed"),
    (packed_split_with_sizes, "glu_packed"),
    (packed_view_and_index, "glu_packed"),
    (packed_view_and_unbind, "glu_packed"),
    (in_float32_after_the_chunk, "glu_packed"),
    (library_glu, "glu_packed"),
    (torch_mul, "glu"),
    (quick_gelu, "glu"),
    (factors_in_any_order, "glu"),
    (scaled, "glu"),
    (silu_by_exp, "glu"),
    (mish, "glu"),
    (clamped_unit, "glu_clamped"),
    (clamped_unit_interleaved, "glu_clamped_packed"),
    (clamp_before_silu, "glu"),
    (clamp_after_silu, "glu"),
    (silu, "glu"),
    (silu_behind, "glu"),
    (silu_by_hand, "glu"),
    (silu_by_hand_turned_around, "glu"),
    (silu_in_float32, "glu"),
    (gelu, "glu"),
    (gelu_tanh, "glu"),
    (gelu_by_erf, "glu"),
    (gelu_by_tanh, "glu"),
    (relu, "glu"),
    (relu_as_a_clamp, "glu"),
    (squared_relu, "glu"),
    (sigmoid, "glu"),
    (tanh, "glu"),
    (packed_halves, "glu_packed"),
    (packed_halves_gate_second, "glu_packed"),
    (packed_slices, "glu_packed"),
]


# --- near misses


def gate_and_up_swapped(g, u):
    return g * F.silu(u)


def both_sides_active(g, u):
    return F.silu(g) * torch.tanh(u)


def clamped_gate(g, u):
    return F.silu(g.clamp(max=1.0)) * u


def clamped_both_ways(g, u):
    return F.silu(g) * u.clamp(-1.0, 1.0)


def one_added_to_up(g, u):
    return F.silu(g) * (u + 1)


def sharpened_sigmoid(g, u):
    return g * torch.sigmoid(1.702 * g) * u


def sigmoid_of_the_other(g, u):
    return g * torch.sigmoid(u) * u


def gate_with_itself(g, u):
    return F.silu(g) * g + u


def leaky(g, u):
    return F.leaky_relu(g, 0.1) * u


def softplus(g, u):
    return F.softplus(g) * u


def clamped_at_another_value(g, u):
    return g.clamp(min=0.1) * u


def cubed_relu(g, u):
    return F.relu(g).pow(3) * u


def square_before_relu(g, u):
    return F.relu(g.square() - 0.5) * u


def gelu_with_another_constant(g, u):
    inner = math.sqrt(2.0 / math.pi) * (g + 0.04 * torch.pow(g, 3.0))
    return 0.5 * g * (1.0 + torch.tanh(inner)) * u


def gelu_without_its_half(g, u):
    return g * (1.0 + torch.erf(g / math.sqrt(2.0))) * u


def erf_without_its_root(g, u):
    return 0.5 * g * (1.0 + torch.erf(g / 2.0)) * u


def detached_activation(g, u):
    return g * torch.sigmoid(g).detach() * u


def dropout_inside(g, u):
    return F.dropout(F.silu(g), 0.5) * u


def activation_used_outside(g, u):
    active = F.silu(g)
    return active * u, active


def sum_instead_of_product(g, u):
    return F.silu(g) + u


def quotient_instead_of_product(g, u):
    return F.silu(g) / (u.abs() + 1)


def gate_broadcast(g, u):
    return F.silu(g[..., :1]) * u


def gate_per_feature(g, u):
    return torch.sigmoid(g.mean((0, 1))) * u


def gate_transposed(g, u):
    return F.silu(g[:, :, :5].transpose(1, 2)) * u[:, :, :5]


def gate_changed_in_place_in_between(g, u):
    g = g.detach()
    active = torch.sigmoid(g)
    g.mul_(2)
    return g * active * u


def gate_activated_in_place(g, u):
    g = g * 1.0
    return F.silu(g, inplace=True) * u


def activation_changed_in_place(g, u):
    active = F.silu(g)
    active.add_(0.5)
    return active * u


def up_changed_in_place_in_between(g, u):
    u = u.detach()
    low = torch.tanh(g)
    u.mul_(3)
    return low * u


def without_gradient(g, u):
    with torch.no_grad():
        active = F.silu(g)
    return active * u


def activation_rounded(g, u):
    return F.silu(g.float()).to(torch.bfloat16).to(g.dtype) * u


def gate_rounded(g, u):
    return F.silu(g.to(torch.bfloat16).to(g.dtype)) * u


def packed_uneven(g, u):
    both = torch.cat((g, u), dim=-1)
    return F.silu(both[..., : WIDTH - 1]) * both[..., WIDTH + 1 :]


def packed_overlapping(g, u):
    both = torch.cat((g, u), dim=-1)
    return F.silu(both[..., :WIDTH]) * both[..., 1 : WIDTH + 1]


def packed_halves_used_outside(g, u):
    a, b = torch.cat((g, u), dim=-1).chunk(2, dim=-1)
    return F.silu(a) * b, a.cos(), b


def packed_along_the_tokens(g, u):
    a, b = torch.cat((g, u), dim=1).chunk(2, dim=1)
    return F.silu(a) * b


def packed_changed_in_place(g, u):
    both = torch.cat((g, u), dim=-1).detach()
    a, b = both.chunk(2, dim=-1)
    active = F.silu(a)
    both.mul_(2)
    return active * b + g + u


def gate_changed_in_place_afterwards(g, u):
    g = g * 1.0
    y = torch.sigmoid(g) * u
    g.mul_(2)
    return y


def clamped_far_away(g, u):
    return g.clamp(min=0, max=1e6) * u


def gate_wider_than_up(g, u):
    return F.silu(g.to(torch.bfloat16)) * u


LEFT_ALONE = [
    (gate_with_itself, "glu", None),
    (detached_activation, "glu", "grow: the activation passes a detach before the product"),
    (dropout_inside, "glu", "grow: the activation passes a dropout before the product"),
    (activation_used_outside, "glu", "is also used at"),
    (sum_instead_of_product, "glu", None),
    (quotient_instead_of_product, "glu", None),
    (gate_broadcast, "glu", None),
    (gate_per_feature, "glu", None),
    (gate_changed_in_place_in_between, "glu", "legality: an input is changed in place at"),
    (gate_activated_in_place, "glu", "grow: the activation is changed in place before the product"),
    (activation_changed_in_place, "glu", "grow: the activation is changed in place"),
    (up_changed_in_place_in_between, "glu", "legality: an input is changed in place at"),
    (without_gradient, "glu", "legality: gradients are switched off or on inside of it"),
    (activation_rounded, "glu", "proof: casting mode: value differs"),
    (packed_along_the_tokens, "glu", None),
    (packed_changed_in_place, "glu", "legality: an input is changed in place"),
    (gate_changed_in_place_afterwards, "glu", "legality: an input is changed in place at"),
    (gate_wider_than_up, "glu", "grow: gate is torch.bfloat16, up torch.float32"),
]
MATCHED_AS_WHAT_IT_IS = [
    (gate_and_up_swapped, {"glu": 1}),
    (both_sides_active, {"glu": 1}),
    (clamped_gate, {"glu": 1}),
    (clamped_both_ways, {"glu": 1}),
    (one_added_to_up, {"glu": 1}),
    (sharpened_sigmoid, {"glu": 1}),
    (sigmoid_of_the_other, {"glu": 1}),
    (square_before_relu, {"glu": 1}),
    (gate_transposed, {"glu": 1}),
    (gate_rounded, {"glu": 1}),
    (leaky, {"glu": 1}),
    (softplus, {"glu": 1}),
    (clamped_at_another_value, {"glu": 1}),
    (clamped_far_away, {"glu": 1}),
    (cubed_relu, {"glu": 1}),
    (gelu_with_another_constant, {"glu": 1}),
    (gelu_without_its_half, {"glu": 1}),
    (erf_without_its_root, {"glu": 1}),
    (packed_uneven, {"glu": 1}),
    (packed_overlapping, {"glu": 1}),
    (packed_halves_used_outside, {"glu": 1}),
]


@pytest.mark.parametrize(("spelling", "op"), SPELLINGS, ids=named)
def test_a_spelling_is_matched(spelling: Any, op: str) -> None:
    check(spelling, _inputs(), {op: 1})


@pytest.mark.parametrize(("spelling", "op"), SPELLINGS, ids=named)
def test_a_spelling_in_bfloat16(spelling: Any, op: str) -> None:
    check(spelling, to_bf16(_inputs()), {op: 1})


@pytest.mark.parametrize(("near_miss", "pattern", "reason"), LEFT_ALONE, ids=named)
def test_a_near_miss_is_left_alone(near_miss: Any, pattern: str, reason: str | None) -> None:
    check_untouched(near_miss, _inputs(), pattern, reason)


@pytest.mark.parametrize(("near_miss", "ops"), MATCHED_AS_WHAT_IT_IS, ids=named)
def test_a_near_miss_is_matched_as_what_it_is(near_miss: Any, ops: dict[str, int]) -> None:
    check(near_miss, _inputs(), ops)
