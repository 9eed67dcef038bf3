"""Attention written out: spellings seen in the wild, and look-alikes."""

from __future__ import annotations

import copy
import math
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from graphs import Compiled, check, check_untouched, compile_one, named, rows, to_bf16
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import assert_same_step, train_step

import fusewright
from fusewright.patterns import attention_exactness

aten = torch.ops.aten
B, H, T, D = 2, 4, 5, 16
LOW = torch.finfo(torch.float32).min


MEASURED = attention_exactness.shortfall


@pytest.fixture(autouse=True)
def _as_exact(monkeypatch: Any) -> None:
    """The library's fused kernels are less exact on a CPU; what is rewritten is tested all the same."""
    monkeypatch.setattr(attention_exactness, "shortfall", lambda *_: "")


def _inputs() -> list[Any]:
    """q, k, v, then a causal mask to be added, and one that is True where a weight is kept."""
    kept = torch.ones(1, 1, T, T, dtype=torch.bool).tril().expand(B, 1, T, T)
    kept = kept.contiguous()
    added = torch.zeros(B, 1, T, T).masked_fill(~kept, LOW)
    return [rows(B, H, T, D), rows(B, H, T, D), rows(B, H, T, D), added, kept]


def _inputs_for(name: str) -> list[Any]:
    given = _inputs()
    if name.startswith("grouped"):
        given[1:3] = [rows(B, 2, T, D), rows(B, 2, T, D)]
    if name.startswith("tokens_first"):
        given[:3] = [rows(B, T, H, D) for _ in range(3)]
    if name.startswith("heads_in_batch"):
        given[:3] = [rows(B * H, T, D) for _ in range(3)]
        given[3] = given[3].expand(B, H, T, T).reshape(B * H, T, T)
    if "bias" in name:
        given[3] = nn.Parameter(torch.randn(1, H, T, T))
    return given


def repeat_kv(x, n):
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, n, t, d).reshape(b, h * n, t, d)


# --- spellings


def llama(q, k, v, added, kept):
    w = torch.matmul(q, k.transpose(2, 3)) * 0.25
    w = w + added
    w = F.softmax(w, dim=-1, dtype=torch.float32).to(q.dtype)
    w = F.dropout(w, p=0.0, training=True)
    return torch.matmul(w, v).transpose(1, 2).contiguous()


def grouped(q, k, v, added, kept):
    return llama(q, repeat_kv(k, 2), repeat_kv(v, 2), added, kept)


def bert(q, k, v, added, kept):
    w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D)
    w = nn.functional.softmax(w + added, dim=-1)
    w = F.dropout(w, 0.1, training=False)
    return torch.matmul(w, v).permute(0, 2, 1, 3).contiguous().flatten(2)


def nano_gpt(q, k, v, added, kept):
    w = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    w = w.masked_fill(kept[:, :, :T, :T] == 0, float("-inf"))
    return (F.softmax(w, dim=-1) @ v).transpose(1, 2).contiguous().view(B, T, H * D)


def where_kept(q, k, v, added, kept):
    w = torch.where(kept, torch.matmul(q, k.mT) * 0.3, float("-inf"))
    return torch.matmul(w.softmax(-1), v)


def where_left_out(q, k, v, added, kept):
    w = torch.where(~kept, torch.full((), float("-inf")), torch.matmul(q, k.mT))
    return torch.matmul(w.softmax(-1), v)


def two_boolean_masks(q, k, v, added, kept):
    w = torch.matmul(q, k.mT).masked_fill(~kept, -torch.inf)
    w = w.masked_fill(torch.ones_like(kept[..., :1, :]).cumsum(-1) > 3, -torch.inf)
    return torch.matmul(w.softmax(-1), v)


def without_mask(q, k, v, added, kept):
    return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


def scale_on_the_queries(q, k, v, added, kept):
    return torch.softmax((q * D**-0.5) @ k.transpose(-1, -2) + added, dim=-1) @ v


def mask_in_front(q, k, v, added, kept):
    return torch.softmax(added + 0.25 * (q @ k.transpose(-1, -2)), dim=-1) @ v


def keys_laid_out_for_the_product(q, k, v, added, kept):
    w = torch.matmul(q, k.permute(0, 1, 3, 2)) * 0.25
    return torch.matmul(torch.softmax(w + added, -1), v)


def einsum(q, k, v, added, kept):
    w = torch.einsum("bhid,bhjd->bhij", q, k) * D**-0.5
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(w + added, -1), v)


def tokens_first_einsum(q, k, v, added, kept):
    w = torch.einsum("bqhd, bkhd -> bhqk", q, k) * D**-0.5
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(w + added, -1), v).reshape(B, T, -1)


def heads_in_batch(q, k, v, added, kept):
    w = torch.bmm(q, k.transpose(1, 2)) * 0.25 + added
    return torch.bmm(F.softmax(w, dim=-1), v)


def result_taken_by_strides(q, k, v, added, kept):
    return torch.matmul(torch.softmax(q @ k.mT + added, -1), v).view(B * H, T, D)


SPELLINGS = [
    llama,
    grouped,
    bert,
    nano_gpt,
    where_kept,
    where_left_out,
    two_boolean_masks,
    without_mask,
    scale_on_the_queries,
    mask_in_front,
    keys_laid_out_for_the_product,
    einsum,
    tokens_first_einsum,
    heads_in_batch,
    result_taken_by_strides,
]


def _calls(compiled: Compiled) -> list[Any]:
    """The library's calls in the rewritten graphs."""
    records = [r for r in compiled.session.records if r.rewritten is not None]
    wanted = aten.scaled_dot_product_attention.default
    return [n for r in records for n in r.rewritten.graph.nodes if n.target is wanted]


def _softmaxes(compiled: Compiled) -> int:
    records = [r for r in compiled.session.records if r.rewritten is not None]
    return sum(n.target is aten.softmax.int for r in records for n in r.rewritten.graph.nodes)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_is_the_librarys_call(spelling: Any) -> None:
    compiled = check(spelling, _inputs_for(spelling.__name__), {})
    (call,) = _calls(compiled)
    assert not _softmaxes(compiled), compiled.misses
    scales = {"where_kept": 0.3, "where_left_out": 1.0, "two_boolean_masks": 1.0}
    plain = ("without_mask", "scale_on_the_queries", "result_taken_by_strides")
    expected = scales.get(spelling.__name__, 1.0 if spelling.__name__ in plain else 0.25)
    assert call.kwargs["scale"] == pytest.approx(expected)


@pytest.mark.parametrize("spelling", [llama, grouped, bert, nano_gpt, einsum], ids=named)
def test_a_spelling_in_bfloat16(spelling: Any) -> None:
    given = to_bf16(_inputs_for(spelling.__name__))
    given[3] = torch.zeros(B, 1, T, T).masked_fill(~given[4], torch.finfo(torch.bfloat16).min)
    given[3] = given[3].to(torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        assert len(_calls(check(spelling, given, {}))) == 1


def test_another_number_of_tokens_and_rows_needs_no_other_graph() -> None:
    compiled = compile_one(llama)
    for b, t in ((2, 5), (3, 7)):
        q, k, v = (rows(b, H, t, D) for _ in range(3))
        added = torch.zeros(b, 1, t, t)
        torch.testing.assert_close(
            compiled.run(q, k, v, added, added), llama(q, k, v, added, added)
        )
    assert all(r.matches for r in compiled.session.records)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_library_is_less_exact_it_is_left_alone(monkeypatch: Any, dtype: Any) -> None:
    """As measured here, on a CPU, against float64."""
    monkeypatch.setattr(attention_exactness, "shortfall", MEASURED)
    given = [i.to(dtype) if i.dtype is torch.float32 else i for i in _inputs()]
    given = [i.detach().requires_grad_(n < 3) for n, i in enumerate(given)]
    given[3] = torch.zeros(B, 1, T, T, dtype=dtype)  # float32's least is -inf in bfloat16
    reason = "grow: the library's attention is less exact on cpu"
    check_untouched(nano_gpt, given, "attention", reason)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["none", "added", "boolean"])
def test_on_a_gpu_the_library_is_as_exact(mask: str) -> None:
    assert MEASURED("cuda", torch.bfloat16, (64, 64), mask) == ""


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_written_out_attention_of_a_model(name: str) -> None:
    """As transformers writes it: grouped heads, an added causal mask, a softmax in float32."""
    eager = models.build(name)
    eager.set_attn_implementation("eager")
    ours = fusewright.optimize(copy.deepcopy(eager), lowering="fx")
    batch = models.batch()
    assert_same_step(train_step(ours, batch), train_step(eager, batch), what=name)
    report = fusewright.report(ours)
    assert report.counts["attention"] == models.LAYERS, report
    assert not report.eager_now and not report.delegated
    # Matching and proving a layer, attention and all else, is promised to take less than this.
    assert max(r["seconds"].get("match", 0.0) for r in report.regions) < 1.5


def test_the_librarys_own_call_is_reported_as_left_to_it() -> None:
    ours = fusewright.optimize(models.build("llama"), lowering="fx")
    train_step(ours, models.batch())
    report = fusewright.report(ours)
    assert report.delegated == {"attention": models.LAYERS}
    assert f"left to it: attention {models.LAYERS}" in str(report)


# --- look-alikes


def mask_behind_the_softmax(q, k, v, added, kept):
    return (torch.softmax(q @ k.mT, -1) * kept) @ v


def mask_added_behind(q, k, v, added, kept):
    return (torch.softmax(q @ k.mT, -1) + added.clamp(min=-1)) @ v


def softmax_over_the_queries(q, k, v, added, kept):
    return torch.softmax(q @ k.mT + added.clamp(min=-1), -2) @ v


def weights_returned_too(q, k, v, added, kept):
    w = torch.softmax(q @ k.mT + added, -1)
    return w @ v, w


def weights_summed_elsewhere(q, k, v, added, kept):
    w = torch.softmax(q @ k.mT + added, -1)
    return w @ v + w.sum(-1, keepdim=True)


def weights_that_drop_out(q, k, v, added, kept):
    return F.dropout(torch.softmax(q @ k.mT + added, -1), 0.5) @ v


def capped_scores(q, k, v, added, kept):
    return torch.softmax(5.0 * torch.tanh(q @ k.mT / 5.0) + added, -1) @ v


def clamped_scores(q, k, v, added, kept):
    return torch.softmax((q @ k.mT).clamp(-1, 1) + added, -1) @ v


def sink_column(q, k, v, added, kept):
    w = q @ k.mT + added
    w = torch.cat((w, torch.zeros_like(w[..., :1])), -1)
    return torch.softmax(w, -1)[..., :-1] @ v


def mask_before_the_scale(q, k, v, added, kept):
    return torch.softmax((q @ k.mT + added) * 0.25, -1) @ v


def finite_fill(q, k, v, added, kept):
    return torch.softmax((q @ k.mT).masked_fill(~kept, -1e4), -1) @ v


def learned_bias(q, k, v, added, kept):
    return torch.softmax(q @ k.mT + added, -1) @ v


def scale_that_is_learned(q, k, v, added, kept):
    return torch.softmax(q @ k.mT * v.mean() + added, -1) @ v


def two_added_masks(q, k, v, added, kept):
    return torch.softmax(q @ k.mT + added + added.clamp(min=-2), -1) @ v


def values_shared_by_all_heads(q, k, v, added, kept):
    return torch.softmax(q @ k.mT + added, -1) @ v[:, :1]


def values_on_the_other_side(q, k, v, added, kept):
    return v.mT @ torch.softmax(q @ k.mT + added, -1)


def summed_over_the_queries(q, k, v, added, kept):
    w = torch.softmax(q @ k.mT + added, -1)
    return torch.einsum("bhij,bhid->bhjd", w, v)


def transposed_weights(q, k, v, added, kept):
    return torch.softmax(q @ k.mT + added, -1).mT @ v


def scores_changed_in_place(q, k, v, added, kept):
    w = q @ k.mT
    w += added
    return torch.softmax(w, -1) @ v


def weights_without_gradient(q, k, v, added, kept):
    with torch.no_grad():
        w = torch.softmax(q @ k.mT + added, -1)
    return w @ v


def detached_weights(q, k, v, added, kept):
    return torch.softmax(q @ k.mT + added, -1).detach() @ v


def log_of_the_weights(q, k, v, added, kept):
    return torch.log_softmax(q @ k.mT + added.clamp(min=-1), -1) @ v


def scores_in_bfloat16(q, k, v, added, kept):
    w = (q @ k.mT).to(torch.bfloat16).float()
    return torch.softmax(w + added, -1) @ v


LEFT_ALONE = [
    (mask_behind_the_softmax, "attention", "grow: the weights go through mul"),
    (mask_added_behind, "attention", "grow: the weights go through add"),
    (softmax_over_the_queries, "attention", "grow: the softmax is not over the last dimension"),
    (weights_returned_too, "attention", "legality: the intermediate value 'softmax' is also used"),
    (weights_summed_elsewhere, "attention", "legality: the intermediate value 'softmax' is also"),
    (weights_that_drop_out, "attention", "grow: the weights drop out"),
    (capped_scores, "attention", "grow: the scores are capped by tanh"),
    (clamped_scores, "attention", "grow: the scores go through clamp"),
    (sink_column, "attention", "grow: weights are cut off behind the softmax"),
    (mask_before_the_scale, "attention", "grow: the scores are scaled behind their mask"),
    (finite_fill, "attention", "grow: masked scores are set to -1e+04"),
    (learned_bias, "attention", "legality: mask needs a gradient"),
    (scale_that_is_learned, "attention", "grow: the scores are scaled by a tensor"),
    (two_added_masks, "attention", "grow: several masks"),
    (values_shared_by_all_heads, "attention", "grow: q, k and v are not of one batch"),
    (values_on_the_other_side, "attention", "grow: the weights are the right operand"),
    (summed_over_the_queries, "attention", "grow: the weights are not summed over"),
    (transposed_weights, "attention", "grow: the weights go through mT"),
    (scores_changed_in_place, "attention", "grow: the scores go through add_"),
    (weights_without_gradient, "attention", "legality: gradients are switched off"),
    (detached_weights, "attention", "grow: the weights go through detach"),
    (log_of_the_weights, "attention", None),
    (scores_in_bfloat16, "attention", "grow: the scores go through to"),
]
MATCHED_AS_WHAT_IT_IS: list[Any] = []


@pytest.mark.parametrize(("look_alike", "pattern", "reason"), LEFT_ALONE, ids=named)
def test_a_look_alike_is_left_alone(look_alike: Any, pattern: str, reason: str) -> None:
    compiled = check_untouched(look_alike, _inputs_for(look_alike.__name__), pattern, reason)
    assert not _calls(compiled)
