"""Look-alikes of RMSNorm that are something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import check, check_untouched, named, perturbed, rows

EPS = 1e-6
WIDTH = 16


def _inputs() -> list[Any]:
    return [rows(2, 5, WIDTH), perturbed(WIDTH)]


def wrong_axis(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + EPS))


def over_two_axes(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean((-2, -1), keepdim=True) + EPS))


def eps_outside_the_root(x, w):
    return w * (x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + EPS))


def eps_behind_rsqrt(x, w):
    return w * (x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + EPS))


def sum_without_width(x, w):
    return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS))


def divided_by_another_width(x, w):
    return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (WIDTH - 1) + EPS))


def weight_added(x, w):
    return w + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def cubes(x, w):
    return w * (x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS))


def absolute_values(x, w):
    return w * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + EPS))


def of_another_row(x, w):
    y = x.sin()
    return w * (x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS))


def product_of_two_rows(x, w):
    y = x.sin()
    return w * (x * torch.rsqrt((x * y).mean(-1, keepdim=True).abs() + EPS))


def root_instead_of_its_inverse(x, w):
    return w * (x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def row_divided_by_inverse_root(x, w):
    return w * (x / torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def detached_root(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS).detach())


def clamped_mean(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=0.5) + EPS))


def dropout_inside(x, w):
    return w * (F.dropout(x, 0.5) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def eps_as_a_tensor(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w.mean().abs()))


def weight_per_token(x, w):
    gain = 1 + 0.1 * torch.arange(5.0)[:, None]
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)) + 0 * w


def subset_of_the_row(x, w):
    return w * (x * torch.rsqrt(x[..., : WIDTH // 2].pow(2).mean(-1, keepdim=True) + EPS))


def gated_between(x, w):
    f = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return w * torch.tanh(f)


def root_used_outside(x, w):
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return w * (x * root), root


def normalised_used_outside(x, w):
    f = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return w * f, f.cos()


def row_changed_in_between(x, w):
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    x = x * 1.5
    return w * (x * root)


def row_changed_in_place_in_between(x, w):
    x = x.detach()
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    x.mul_(1.5)
    return w * (x * root)


def view_of_row_changed_in_between(x, w):
    x = x.detach()
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    x[..., 0].zero_()
    return w * (x * root)


def mean_changed_in_place(x, w):
    mean = x.pow(2).mean(-1, keepdim=True)
    mean.add_(0.5)
    return w * (x * torch.rsqrt(mean + EPS))


def result_changed_in_place(x, w):
    y = w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))
    y.mul_(2)
    return y


def normalised_changed_in_place(x, w):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    y.add_(1)
    return w * y


def row_changed_before(x, w):
    x.mul_(0.5)
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def shape_dependent(x, w):
    if x.shape[1] > 4:
        return w + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def square_of_rounded_row(x, w):
    low = x.to(torch.bfloat16).to(x.dtype)
    return w * (x * torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + EPS))


def root_rounded(x, w):
    root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS).to(torch.bfloat16)
    return w * (x * root.to(x.dtype))


def mean_rounded(x, w):
    mean = x.float().pow(2).mean(-1, keepdim=True).to(torch.bfloat16)
    return w * (x * torch.rsqrt(mean.float() + EPS).to(x.dtype))


LEFT_ALONE = [
    (wrong_axis, "rms_norm", None),
    (over_two_axes, "rms_norm", "grow: the mean is not over the last dimension alone"),
    (eps_outside_the_root, "rms_norm", None),
    (
        eps_behind_rsqrt,
        "rms_norm",
        "grow: the inverse root never multiplies the row it was taken of",
    ),
    (divided_by_another_width, "rms_norm", "proof: float64: value differs"),
    (cubes, "rms_norm", "grow: the mean is of powers 3, not of squares"),
    (absolute_values, "rms_norm", "grow: the mean is not of squares"),
    (of_another_row, "rms_norm", "grow: the inverse root never multiplies the row it was taken of"),
    (product_of_two_rows, "rms_norm", "grow: the root is not taken of a mean over the row"),
    (root_instead_of_its_inverse, "rms_norm", None),
    (row_divided_by_inverse_root, "rms_norm", "proof: float64: value differs"),
    (detached_root, "rms_norm", "grow: the inverse root never multiplies the row it was taken of"),
    (clamped_mean, "rms_norm", "grow: the root is not taken of a mean over the row"),
    (dropout_inside, "rms_norm", "grow: the inverse root never multiplies the row it was taken of"),
    (eps_as_a_tensor, "rms_norm", "grow: what is added under the root is not a literal"),
    (
        subset_of_the_row,
        "rms_norm",
        "grow: the inverse root never multiplies the row it was taken of",
    ),
    (root_used_outside, "rms_norm", "is also used at"),
    (
        row_changed_in_between,
        "rms_norm",
        "grow: the inverse root never multiplies the row it was taken of",
    ),
    (
        row_changed_in_place_in_between,
        "rms_norm",
        "grow: the inverse root never multiplies the row it was taken of",
    ),
    (view_of_row_changed_in_between, "rms_norm", "legality: an input is changed in place"),
    (mean_changed_in_place, "rms_norm", "grow: the root is not taken of a mean over the row"),
    (
        normalised_changed_in_place,
        "rms_norm",
        "legality: the region's own value is changed in place",
    ),
    (
        square_of_rounded_row,
        "rms_norm",
        "grow: the inverse root never multiplies the row it was taken of",
    ),
    (root_rounded, "rms_norm", "proof: casting mode: value differs"),
    (mean_rounded, "rms_norm", "proof: casting mode: value differs"),
]
MATCHED_AS_WHAT_IT_IS = [
    (sum_without_width, {"rms_norm": 1}),
    (weight_added, {"rms_norm": 1}),
    (weight_per_token, {"rms_norm": 1}),
    (gated_between, {"rms_norm": 1}),
    (normalised_used_outside, {"rms_norm": 1}),
    (result_changed_in_place, {"rms_norm": 1}),
    (row_changed_before, {"rms_norm": 1}),
    (shape_dependent, {"rms_norm": 1}),
]


@pytest.mark.parametrize(("near_miss", "pattern", "reason"), LEFT_ALONE, ids=named)
def test_a_near_miss_is_left_alone(near_miss: Any, pattern: str, reason: str | None) -> None:
    check_untouched(near_miss, _inputs(), pattern, reason)


@pytest.mark.parametrize(("near_miss", "ops"), MATCHED_AS_WHAT_IT_IS, ids=named)
def test_a_near_miss_is_matched_as_what_it_is(near_miss: Any, ops: dict[str, int]) -> None:
    check(near_miss, _inputs(), ops)
