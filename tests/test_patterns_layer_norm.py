"""LayerNorm: spellings seen in the wild, and look-alikes that are something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import check, check_untouched, named, perturbed, rows, to_bf16

EPS = 1e-5
WIDTH = 16


def _inputs() -> list[Any]:
    return [rows(2, 5, WIDTH), perturbed(WIDTH), perturbed(WIDTH, around=0.0)]


def library(x, w, b):
    return F.layer_norm(x, (WIDTH,), w, b, EPS)


def library_without_bias(x, w, b):
    return F.layer_norm(x, (WIDTH,), w, None, EPS) + 0 * b


def library_bare(x, w, b):
    return F.layer_norm(x, (WIDTH,), None, None, EPS) * w + b


def library_in_float32(x, w, b):
    return F.layer_norm(x.float(), (WIDTH,), w.float(), b.float(), EPS).to(x.dtype)


def by_hand(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b


def by_hand_centred_twice(x, w, b):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + EPS) * w + b


def by_hand_without_bias(x, w, b):
    f = x.float()
    centred = f - f.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)
    return (w.float() * out).to(x.dtype) + 0 * b


def by_hand_divided(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + EPS) * w + b


def by_librarys_variance(x, w, b):
    f = x.float()
    centred = f - f.mean(dim=-1, keepdim=True)
    out = centred * torch.rsqrt(f.var(dim=-1, keepdim=True, unbiased=False) + EPS)
    return out.to(x.dtype) * w + b


def one_plus_weight(x, w, b):
    return F.layer_norm(x, (WIDTH,), 1 + w, b, EPS)


SPELLINGS = [
    library,
    library_without_bias,
    library_bare,
    library_in_float32,
    by_hand,
    by_hand_centred_twice,
    by_hand_without_bias,
    by_hand_divided,
    by_librarys_variance,
    one_plus_weight,
]


# --- near misses


def centred_along_the_tokens(x, w, b):
    centred = x - x.mean(-2, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b


def variance_about_another_mean(x, w, b):
    centred = x - x.tanh().mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b


def row_not_centred(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b


def variance_not_centred(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)) + b


def difference_turned_around(x, w, b):
    centred = x.mean(-1, keepdim=True) - x
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b


def unbiased_variance(x, w, b):
    root = torch.rsqrt(x.var(-1, keepdim=True) + EPS)
    return w * ((x - x.mean(-1, keepdim=True)) * root) + b


def unbiased_by_hand(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).sum(-1, keepdim=True) / (WIDTH - 1)
    return w * (centred * torch.rsqrt(variance + EPS)) + b


def eps_outside_the_root(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred / (torch.sqrt(centred.pow(2).mean(-1, keepdim=True)) + EPS)) + b


def bias_before_weight(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS) + b)


def detached_mean(x, w, b):
    centred = x - x.mean(-1, keepdim=True).detach()
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b


def mean_without_gradient(x, w, b):
    with torch.no_grad():
        mean = x.mean(-1, keepdim=True)
    centred = x - mean
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b


def over_two_dimensions(x, w, b):
    return F.layer_norm(x, (5, WIDTH)) * w + b


def group_norm(x, w, b):
    return F.group_norm(x.transpose(1, 2), 4, w, b).transpose(1, 2)


def centred_used_outside(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b, centred


def centred_changed_in_place(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    root = torch.rsqrt(centred.detach().pow(2).mean(-1, keepdim=True) + EPS)
    centred.mul_(1.5)
    return w * (centred * root) + b


def row_changed_in_between(x, w, b):
    x = x.detach()
    mean = x.mean(-1, keepdim=True)
    root = torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + EPS)
    x.mul_(1.5)
    return w * ((x - mean) * root) + b


def centred_rounded(x, w, b):
    f = x.float()
    centred = (f - f.mean(-1, keepdim=True)).to(torch.bfloat16).to(x.dtype)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b


def bias_subtracted(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) - b


def bias_doubled(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    out = w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS))
    return torch.add(out, b, alpha=2)


def difference_with_a_factor(x, w, b):
    centred = torch.sub(x, x.mean(-1, keepdim=True), alpha=0.5)
    return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b


LEFT_ALONE = [
    (row_not_centred, "layer_norm", "grow: nothing grew from the anchor"),
    (
        variance_not_centred,
        "rms_norm",
        "grow: the inverse root never multiplies the row it was taken of",
    ),
    (unbiased_variance, "rms_norm", "grow: the root is not taken of a mean over the row"),
    (unbiased_by_hand, "layer_norm", "proof: float64: value differs"),
    (eps_outside_the_root, "layer_norm", None),
    (over_two_dimensions, "layer_norm", "grow: normalises over more than the last dimension"),
    (group_norm, "layer_norm", None),
    (
        centred_changed_in_place,
        "rms_norm",
        "grow: the inverse root never multiplies the row it was taken of",
    ),
    (row_changed_in_between, "layer_norm", "grow: nothing grew from the anchor"),
]
MATCHED_AS_WHAT_IT_IS = [
    (centred_along_the_tokens, {"rms_norm": 1}),
    (variance_about_another_mean, {"rms_norm": 1}),
    (difference_turned_around, {"rms_norm": 1}),
    (bias_before_weight, {"layer_norm": 1}),
    (detached_mean, {"rms_norm": 1}),
    (mean_without_gradient, {"rms_norm": 1}),
    (centred_used_outside, {"rms_norm": 1}),
    (centred_rounded, {"rms_norm": 1}),
    (bias_subtracted, {"layer_norm": 1}),
    (bias_doubled, {"layer_norm": 1}),
    (difference_with_a_factor, {"rms_norm": 1}),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_is_matched(spelling: Any) -> None:
    check(spelling, _inputs(), {"layer_norm": 1})


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_in_bfloat16(spelling: Any) -> None:
    check(spelling, to_bf16(_inputs()), {"layer_norm": 1})


@pytest.mark.parametrize(("near_miss", "pattern", "reason"), LEFT_ALONE, ids=named)
def test_a_near_miss_is_left_alone(near_miss: Any, pattern: str, reason: str | None) -> None:
    check_untouched(near_miss, _inputs(), pattern, reason)


@pytest.mark.parametrize(("near_miss", "ops"), MATCHED_AS_WHAT_IT_IS, ids=named)
def test_a_near_miss_is_matched_as_what_it_is(near_miss: Any, ops: dict[str, int]) -> None:
    check(near_miss, _inputs(), ops)
