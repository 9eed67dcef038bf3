"""LoRA: spellings seen in the wild, and look-alikes that are something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import check, check_untouched, named, perturbed, rows, to_bf16

INSIDE, OUTSIDE, RANK = 24, 20, 3


def _inputs() -> list[Any]:
    """x (B, T, I), base weight (O, I) and bias, A (r, I), B (O, r)."""
    x = rows(2, 5, INSIDE)
    w, bias = perturbed(OUTSIDE, INSIDE, around=0.0), perturbed(OUTSIDE, around=0.0)
    return [x, w, bias, perturbed(RANK, INSIDE, around=0.0), perturbed(OUTSIDE, RANK, around=0.0)]


def peft(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(F.linear(x, a), b) * 2.0


def turned_around(x, w, c, a, b):
    return 2.0 * F.linear(F.linear(x, a), b) + F.linear(x, w, c)


def no_scale(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(F.linear(x, a), b)


def no_bias(x, w, c, a, b):
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * 0.5 + 0 * c


def two_scales(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(F.linear(x, a), b) * 0.5 * 3.0


def adapter_in_float32(x, w, c, a, b):
    low = F.linear(F.linear(x.float(), a.float()), b.float()) * 2.0
    return (F.linear(x, w, c) + low).to(x.dtype)


def two_adapters(x, w, c, a, b):
    first = F.linear(x, w, c) + F.linear(F.linear(x, a), b) * 2.0
    return first + F.linear(F.linear(x, 2 * a), b) * 0.5


def dropout_before(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(F.linear(F.dropout(x, 0.3), a), b)


def dropout_in_float32(x, w, c, a, b):
    low = F.linear(F.dropout(x.float(), 0.3), a.float())
    return (F.linear(x, w, c) + F.linear(low, b.float()) * 2.0).to(x.dtype)


def two_adapters_of_which_one_drops(x, w, c, a, b):
    first = F.linear(x, w, c) + F.linear(F.linear(x, a), b) * 2.0
    return first + F.linear(F.linear(F.dropout(x, 0.5), 2 * a), b) * 0.5


SPELLINGS = [
    dropout_before,
    dropout_in_float32,
    two_adapters_of_which_one_drops,
    peft,
    turned_around,
    no_scale,
    no_bias,
    two_scales,
    adapter_in_float32,
    two_adapters,
]


# --- near misses


def base_reads_another_x(x, w, c, a, b):
    return F.linear(x.tanh(), w, c) + F.linear(F.linear(x, a), b)


def adapter_reads_another_x(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(F.linear(x * 2, a), b)


def nonlinear_waist(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(F.relu(F.linear(x, a)), b)


def biased_waist(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(F.linear(x, a, c[:RANK]), b)


def biased_up(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(F.linear(x, a), b, c)


def scaled_waist(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(F.linear(x, a) * 3.0, b)


def dropout_in_the_waist(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(F.dropout(F.linear(x, a), 0.3), b)


def multiplied_instead_of_added(x, w, c, a, b):
    return F.linear(x, w, c) * F.linear(F.linear(x, a), b)


def subtracted(x, w, c, a, b):
    return F.linear(x, w, c) - F.linear(F.linear(x, a), b)


def added_with_a_factor(x, w, c, a, b):
    return torch.add(F.linear(x, w, c), F.linear(F.linear(x, a), b), alpha=0.5)


def scale_with_a_gradient(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(F.linear(x, a), b) * c.mean()


def magnitude_per_feature(x, w, c, a, b):
    return (F.linear(x, w) + F.linear(F.linear(x, a), b)) * c


def no_base(x, w, c, a, b):
    return F.linear(F.linear(x, a), b) + (x.mean() + w.mean() + c)


def two_bases(x, w, c, a, b):
    return F.linear(x, w, c) + F.linear(x, w * 2) + F.linear(F.linear(x, a), b)


def waist_used_outside(x, w, c, a, b):
    low = F.linear(x, a)
    return F.linear(x, w, c) + F.linear(low, b), low


def base_used_outside(x, w, c, a, b):
    base = F.linear(x, w, c)
    return base + F.linear(F.linear(x, a), b), base


def adapter_used_outside(x, w, c, a, b):
    low = F.linear(F.linear(x, a), b)
    return F.linear(x, w, c) + low, low.cos()


def wide_waist(x, w, c, a, b):
    down, up = a.repeat(8, 1), b.repeat(1, 8)
    return F.linear(x, w, c) + F.linear(F.linear(x, down), up)


def transposed_weights(x, w, c, a, b):
    return F.linear(x, w, c) + (x @ a.t()) @ b.t()


def x_changed_in_between(x, w, c, a, b):
    x = x.detach()
    base = F.linear(x, w.detach(), c)
    x.mul_(2)
    return base + F.linear(F.linear(x, a.detach()), b) + 0 * (w.mean() + a.mean())


def x_of_the_base_is_a_changed_view(x, w, c, a, b):
    x = x.detach()
    low = F.linear(x, a.detach())
    x[:, 0].zero_()
    return F.linear(x, w.detach(), c) + F.linear(low, b) + 0 * (w.mean() + a.mean())


def summed_in_place(x, w, c, a, b):
    out = F.linear(x, w, c)
    out += F.linear(F.linear(x, a), b)
    return out


def base_without_gradient(x, w, c, a, b):
    with torch.no_grad():
        base = F.linear(x, w, c)
    return base + F.linear(F.linear(x, a), b)


def waist_rounded(x, w, c, a, b):
    low = F.linear(x.float(), a.float()).to(torch.bfloat16).to(x.dtype)
    return F.linear(x, w, c) + F.linear(low, b)


def adapter_rounded(x, w, c, a, b):
    low = F.linear(F.linear(x, a), b).to(torch.bfloat16).to(x.dtype)
    return F.linear(x, w, c) + low


def dropped_result(x, w, c, a, b):
    return F.dropout(F.linear(x, w, c) + F.linear(F.linear(x, a), b), 0.5)


LEFT_ALONE = [
    (base_reads_another_x, "lora", "grow: no linear layer's output is added to the adapter's"),
    (adapter_reads_another_x, "lora", "grow: no linear layer's output is added to the adapter's"),
    (nonlinear_waist, "lora", None),
    (biased_waist, "lora", "have a bias of their own"),
    (biased_up, "lora", "have a bias of their own"),
    (scaled_waist, "lora", "scales what lies between its two maps"),
    (dropout_in_the_waist, "lora", None),
    (
        multiplied_instead_of_added,
        "lora",
        "grow: no linear layer's output is added to the adapter's",
    ),
    (subtracted, "lora", "grow: no linear layer's output is added to the adapter's"),
    (added_with_a_factor, "lora", "proof: float64: value differs"),
    (scale_with_a_gradient, "lora", "grow: no linear layer's output is added to the adapter's"),
    (no_base, "lora", "grow: no linear layer's output is added to the adapter's"),
    (two_bases, "lora", "grow: the adapter is added to more than one linear layer"),
    (waist_used_outside, "lora", "is also used at"),
    (base_used_outside, "lora", "is also used at"),
    (adapter_used_outside, "lora", "grow: no linear layer's output is added to the adapter's"),
    (wide_waist, "lora", "grow: the waist of 24 is not narrower than the layer, 20 x 24"),
    (transposed_weights, "lora", None),
    (x_changed_in_between, "lora", "grow: no linear layer's output is added to the adapter's"),
    (x_of_the_base_is_a_changed_view, "lora", "legality: an input is changed in place"),
    (summed_in_place, "lora", "grow: no linear layer's output is added to the adapter's"),
    (base_without_gradient, "lora", "legality: gradients are switched off or on inside of it"),
    (waist_rounded, "lora", None),
    (adapter_rounded, "lora", "proof: casting mode: value differs"),
]
MATCHED_AS_WHAT_IT_IS = [
    (magnitude_per_feature, {"lora_group": 1}),
    (dropped_result, {"lora_group": 1}),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_is_matched(spelling: Any) -> None:
    check(spelling, _inputs(), {"lora_group": 1})


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_in_bfloat16(spelling: Any) -> None:
    check(spelling, to_bf16(_inputs()), {"lora_group": 1})


@pytest.mark.parametrize(("near_miss", "pattern", "reason"), LEFT_ALONE, ids=named)
def test_a_near_miss_is_left_alone(near_miss: Any, pattern: str, reason: str | None) -> None:
    check_untouched(near_miss, _inputs(), pattern, reason)


@pytest.mark.parametrize(("near_miss", "ops"), MATCHED_AS_WHAT_IT_IS, ids=named)
def test_a_near_miss_is_matched_as_what_it_is(near_miss: Any, ops: dict[str, int]) -> None:
    check(near_miss, _inputs(), ops)
