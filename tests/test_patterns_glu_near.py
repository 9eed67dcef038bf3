"""Look-alikes of gated linear units: left alone with a reason, or matched as what they are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import check, check_untouched, named, rows

WIDTH = 12


def _inputs() -> list[Any]:
    return [rows(2, 5, WIDTH), rows(2, 5, WIDTH)]


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


def one_gate_for_all_rows(g, u):
    return F.silu(g[:, :1]) * u


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
    (one_gate_for_all_rows, "glu", None),
    (packed_changed_in_place, "glu", "legality: an input is changed in place"),
    (gate_changed_in_place_afterwards, "glu", "legality: an input is changed in place at"),
    (gate_wider_than_up, "glu", "grow: gate is torch.bfloat16, up torch.float32"),
]
MATCHED_AS_WHAT_IT_IS = [
    (packed_along_the_tokens, {"glu": 1}),  # two tensors, not the packed op's halves of a row
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


@pytest.mark.parametrize(("near_miss", "pattern", "reason"), LEFT_ALONE, ids=named)
def test_a_near_miss_is_left_alone(near_miss: Any, pattern: str, reason: str | None) -> None:
    check_untouched(near_miss, _inputs(), pattern, reason)


@pytest.mark.parametrize(("near_miss", "ops"), MATCHED_AS_WHAT_IT_IS, ids=named)
def test_a_near_miss_is_matched_as_what_it_is(near_miss: Any, ops: dict[str, int]) -> None:
    check(near_miss, _inputs(), ops)
