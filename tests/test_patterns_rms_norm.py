"""RMSNorm: spellings seen in the wild."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import check, check_untouched, named, perturbed, rows, to_bf16

EPS = 1e-6
WIDTH = 16


def _inputs() -> list[Any]:
    return [rows(2, 5, WIDTH), perturbed(WIDTH)]


def llama(x, w):
    f = x.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def product_of_itself(x, w):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w


def square_method(x, w):
    return w * (x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt())


def torch_spelled(x, w):
    variance = torch.mean(torch.square(x), -1, keepdim=True)
    return torch.mul(torch.mul(x, torch.rsqrt(torch.add(variance, EPS))), w)


def one_over_root(x, w):
    return x * (1.0 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)) * w


def divided_by_root(x, w):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def power_of_minus_half(x, w):
    f = x.float()
    return (f * torch.pow(f.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w.float()).to(x.dtype)


def library(x, w):
    return F.rms_norm(x, (WIDTH,), w, EPS)


def library_without_weight(x, w):
    return F.rms_norm(x, (WIDTH,), eps=EPS) + 0 * w


def weight_before_the_cast(x, w):
    f = x.to(torch.float32)
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)
    return (w * f).to(x.dtype)


def gemma(x, w):
    f = x.float()
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)
    return (f * (1.0 + w.float())).type_as(x)


def one_added_behind(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (w + 1)


def without_weight(x, w):
    f = x.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) + 0 * w


def root_first(x, w):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * x * w


def eps_in_front(x, w):
    return w * (x * torch.rsqrt(EPS + x.pow(2).mean(-1, True)))


def positive_last_axis(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + EPS))


def no_eps(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))


def row_kept_in_float32(x, w):
    dtype, x = x.dtype, x.to(torch.float32)
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)).to(dtype)


def mean_unsqueezed(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(-1) + EPS))


def weight_folded_into_the_root(x, w):
    return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w)


def expand_as(x, w):
    return w.expand_as(x) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def sum_over_width(x, w):
    return w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / WIDTH + EPS))


def length(x, w):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS) + 0 * w


def length_by_root(x, w):
    f = x.float().contiguous()
    return (f / torch.sqrt((f * f).sum(-1, keepdim=True) + EPS)).to(x.dtype) + 0 * w


def norm_method(x, w):
    return w * (x / (x.norm(dim=-1, keepdim=True) * WIDTH**-0.5))


def scaled_linear_before(x, w):
    x = F.silu(x)
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def twice(x, w):
    return llama(llama(x, w), w)


SPELLINGS = [
    llama,
    product_of_itself,
    square_method,
    torch_spelled,
    one_over_root,
    divided_by_root,
    power_of_minus_half,
    library,
    library_without_weight,
    weight_before_the_cast,
    gemma,
    one_added_behind,
    without_weight,
    root_first,
    eps_in_front,
    positive_last_axis,
    no_eps,
    row_kept_in_float32,
    mean_unsqueezed,
    weight_folded_into_the_root,
    expand_as,
    sum_over_width,
    length,
    length_by_root,
    scaled_linear_before,
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_is_matched(spelling: Any) -> None:
    check(spelling, _inputs(), {"rms_norm": 1})


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_in_bfloat16(spelling: Any) -> None:
    check(spelling, to_bf16(_inputs()), {"rms_norm": 1})


def test_each_of_two_norms_in_a_row() -> None:
    check(twice, _inputs(), {"rms_norm": 2})


def test_a_spelling_not_offered_is_left_alone() -> None:
    check_untouched(norm_method, _inputs(), "rms_norm", None)
