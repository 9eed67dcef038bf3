"""Cross-entropy: spellings seen in the wild, and look-alikes that are something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import check, check_untouched, named, perturbed, rows, to_bf16
from torch import nn

WIDTH, CLASSES, TOKENS = 8, 11, 6
KIND = "head"


def _inputs() -> list[Any]:
    """hidden (B, T, C), head (V, C), labels (B, T)."""
    labels = torch.randint(0, CLASSES, (2, TOKENS))
    labels[0, 2] = -100
    return [rows(2, TOKENS, WIDTH), perturbed(CLASSES, WIDTH, around=0.0), labels]


def _shifted(logits, labels):
    return logits[:, :-1].reshape(-1, CLASSES), labels[:, 1:].reshape(-1)


def transformers_loss(h, w, labels):
    logits = F.linear(h, w).float().view(-1, CLASSES)
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    return F.cross_entropy(logits, shifted, ignore_index=-100, reduction="mean")


def plain(h, w, labels):
    return F.cross_entropy(F.linear(h, w).view(-1, CLASSES), labels.view(-1))


def summed(h, w, labels):
    return F.cross_entropy(F.linear(h, w).view(-1, CLASSES), labels.view(-1), reduction="sum")


def over_items(h, w, labels):
    loss = F.cross_entropy(F.linear(h, w).view(-1, CLASSES), labels.view(-1), reduction="sum")
    return loss / (labels != -100).sum()


def smoothed(h, w, labels):
    logits = F.linear(h, w).view(-1, CLASSES)
    return F.cross_entropy(logits, labels.view(-1), label_smoothing=0.1)


def softcapped(h, w, labels):
    logits = F.linear(h, w) / 5.0
    logits = torch.tanh(logits) * 5.0
    return F.cross_entropy(logits.float().view(-1, CLASSES), labels.view(-1))


def scaled(h, w, labels):
    logits = F.linear(h, w) * 0.25
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def divided(h, w, labels):
    logits = F.linear(h, w) / 3.0
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def another_ignored_label(h, w, labels):
    labels = labels.clamp(min=0)
    return F.cross_entropy(F.linear(h, w).view(-1, CLASSES), labels.view(-1), ignore_index=0)


def biased(h, w, labels):
    logits = F.linear(h, w, w.mean(1))
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def rows_first(h, w, labels):
    return F.cross_entropy(F.linear(h.reshape(-1, WIDTH), w), labels.reshape(-1))


def module_loss(h, w, labels):
    return nn.CrossEntropyLoss()(F.linear(h, w).flatten(0, 1), labels.flatten())


def shifted_by_slicing(h, w, labels):
    return F.cross_entropy(*_shifted(F.linear(h, w), labels))


def shifted_after_the_cast(h, w, labels):
    logits = F.linear(h, w).float()
    logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    return nn.CrossEntropyLoss()(logits.view(-1, CLASSES), labels.view(-1))


def shifted_and_softcapped(h, w, labels):
    logits = torch.tanh(F.linear(h, w) / 5.0) * 5.0
    return F.cross_entropy(*_shifted(logits, labels))


def product_with_the_transposed_head(h, w, labels):
    return F.cross_entropy((h @ w.T).view(-1, CLASSES), labels.view(-1))


def product_with_the_turned_head(h, w, labels):
    return F.cross_entropy(*_shifted(torch.matmul(h, w.transpose(0, 1)), labels))


FUSED = "linear_cross_entropy"
ALONE = "cross_entropy"
SPELLINGS = [
    transformers_loss,
    plain,
    summed,
    over_items,
    smoothed,
    softcapped,
    scaled,
    divided,
    another_ignored_label,
    biased,
    rows_first,
    module_loss,
    shifted_by_slicing,
    shifted_after_the_cast,
    shifted_and_softcapped,
    product_with_the_transposed_head,
    product_with_the_turned_head,
]


# --- near misses


def sliced_classes(h, w, labels):
    logits = F.linear(h, w)[..., : CLASSES - 1]
    labels = labels.clamp(max=CLASSES - 2)
    return F.cross_entropy(logits.reshape(-1, CLASSES - 1), labels.view(-1))


def sliced_flat_rows(h, w, labels):
    logits = F.linear(h, w).view(-1, CLASSES)[1:]
    return F.cross_entropy(logits, labels.view(-1)[1:])


def product_with_a_head_of_each_row(h, w, labels):
    heads = w.expand(2, CLASSES, WIDTH)
    return F.cross_entropy((h @ heads.transpose(1, 2)).view(-1, CLASSES), labels.view(-1))


def class_weights(h, w, labels):
    weight = torch.linspace(0.5, 1.5, CLASSES)
    return F.cross_entropy(F.linear(h, w).view(-1, CLASSES), labels.view(-1), weight=weight)


def classes_second(h, w, labels):
    return F.cross_entropy(F.linear(h, w).transpose(1, 2), labels)


def class_axis_transposed(h, w, labels):
    square = F.linear(h, w)[:, :, : 2 * TOKENS].reshape(2 * TOKENS, -1)
    return F.cross_entropy(square.t(), labels.view(-1)[:CLASSES].clamp(0, 5))


def label_probabilities(h, w, labels):
    target = F.one_hot(labels.clamp(min=0), CLASSES).float().view(-1, CLASSES)
    return F.cross_entropy(F.linear(h, w).view(-1, CLASSES), target)


def softcap_with_two_constants(h, w, labels):
    logits = 4.0 * torch.tanh(F.linear(h, w) / 5.0)
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def softcap_twice(h, w, labels):
    logits = 5.0 * torch.tanh(F.linear(h, w) / 5.0)
    logits = 3.0 * torch.tanh(logits / 3.0)
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def tanh_without_constants(h, w, labels):
    return F.cross_entropy(torch.tanh(F.linear(h, w)).view(-1, CLASSES), labels.view(-1))


def scale_behind_the_softcap(h, w, labels):
    logits = 0.5 * (5.0 * torch.tanh(F.linear(h, w) / 5.0))
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def scale_before_the_softcap(h, w, labels):
    logits = 5.0 * torch.tanh(F.linear(h, w) * 0.5 / 5.0)
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def clamped_logits(h, w, labels):
    return F.cross_entropy(F.linear(h, w).clamp(-1, 1).view(-1, CLASSES), labels.view(-1))


def z_loss_by_hand(h, w, labels):
    logits = F.linear(h, w).view(-1, CLASSES)
    z = torch.logsumexp(logits, -1).square().mean()
    return F.cross_entropy(logits, labels.view(-1)) + 1e-2 * z


def logits_returned(h, w, labels):
    logits = F.linear(h, w)
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1)), logits


def per_token(h, w, labels):
    logits = F.linear(h, w).view(-1, CLASSES)
    return F.cross_entropy(logits, labels.view(-1), reduction="none")


def per_token_weighted(h, w, labels):
    logits = F.linear(h, w).view(-1, CLASSES)
    each = F.cross_entropy(logits, labels.view(-1), reduction="none")
    return (each * torch.linspace(0, 1, each.shape[0])).sum()


def denominator_with_a_gradient(h, w, labels):
    loss = F.cross_entropy(F.linear(h, w).view(-1, CLASSES), labels.view(-1), reduction="sum")
    return loss / (h.square().mean() + 1)


def denominator_above(h, w, labels):
    loss = F.cross_entropy(F.linear(h, w).view(-1, CLASSES), labels.view(-1), reduction="sum")
    return (labels != -100).sum() / loss


def sum_used_outside_of_the_mean(h, w, labels):
    loss = F.cross_entropy(F.linear(h, w).view(-1, CLASSES), labels.view(-1), reduction="sum")
    return loss / (labels != -100).sum(), loss


def mean_divided_again(h, w, labels):
    loss = F.cross_entropy(F.linear(h, w).view(-1, CLASSES), labels.view(-1))
    return loss / (labels != -100).sum()


def log_softmax_with_another_axis(h, w, labels):
    z = F.log_softmax(F.linear(h, w), dim=1).view(-1, CLASSES)
    return F.nll_loss(z, labels.view(-1))


def negative_scale(h, w, labels):
    return F.cross_entropy(-1.0 * F.linear(h, w).view(-1, CLASSES), labels.view(-1))


def reciprocal_of_the_logits(h, w, labels):
    logits = 1.0 / (F.linear(h, w) + 9.0)
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def logits_rounded(h, w, labels):
    logits = F.linear(h, w).to(torch.bfloat16).float()
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def logits_changed_in_place(h, w, labels):
    logits = F.linear(h, w)
    logits[..., 0] = -1e4
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1).clamp(min=1))


def logits_halved_in_place(h, w, labels):
    logits = F.linear(h, w)
    logits.div_(2)
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def dropout_on_the_logits(h, w, labels):
    logits = F.dropout(F.linear(h, w), 0.4)
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def temperature_with_a_gradient(h, w, labels):
    logits = F.linear(h, w) / (1 + h.square().mean())
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def rows_interleaved(h, w, labels):
    logits = F.linear(h, w).transpose(0, 1).reshape(-1, CLASSES)
    return F.cross_entropy(logits, labels.view(-1))


LEFT_ALONE = [
    (class_weights, "linear_cross_entropy", "grow: class weights are not offered by the kernel"),
    (
        classes_second,
        "linear_cross_entropy",
        "grow: the logits are not rows of classes with one label each",
    ),
    (class_axis_transposed, "linear_cross_entropy", "grow: no plain projection makes the logits"),
    (
        label_probabilities,
        "linear_cross_entropy",
        "grow: the logits are not rows of classes with one label each",
    ),
    (log_softmax_with_another_axis, "cross_entropy", "grow: the loss is not of a log_softmax over"),
]
MATCHED_AS_WHAT_IT_IS = [
    (sliced_classes, {"cross_entropy": 1}),
    (sliced_flat_rows, {"cross_entropy": 1}),
    (product_with_a_head_of_each_row, {"cross_entropy": 1}),
    (softcap_with_two_constants, {"linear_cross_entropy": 1}),
    (softcap_twice, {"cross_entropy": 1, "activation": 1}),
    (tanh_without_constants, {"cross_entropy": 1}),
    (scale_behind_the_softcap, {"cross_entropy": 1, "activation": 1}),
    (scale_before_the_softcap, {"linear_cross_entropy": 1}),
    (clamped_logits, {"cross_entropy": 1}),
    (z_loss_by_hand, {"cross_entropy": 1}),
    (logits_returned, {"cross_entropy": 1}),
    (per_token, {"cross_entropy": 1}),
    (per_token_weighted, {"cross_entropy": 1}),
    (denominator_with_a_gradient, {"linear_cross_entropy": 1}),
    (denominator_above, {"linear_cross_entropy": 1}),
    (sum_used_outside_of_the_mean, {"linear_cross_entropy": 1}),
    (mean_divided_again, {"linear_cross_entropy": 1}),
    (negative_scale, {"linear_cross_entropy": 1}),
    (reciprocal_of_the_logits, {"cross_entropy": 1}),
    (logits_rounded, {"cross_entropy": 1}),
    (logits_changed_in_place, {"cross_entropy": 1}),
    (logits_halved_in_place, {"cross_entropy": 1}),
    (dropout_on_the_logits, {"cross_entropy": 1}),
    (temperature_with_a_gradient, {"cross_entropy": 1}),
    (rows_interleaved, {"cross_entropy": 1}),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_is_matched(spelling: Any) -> None:
    check(spelling, _inputs(), {"linear_cross_entropy": 1}, kind="head")


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_in_bfloat16(spelling: Any) -> None:
    check(spelling, to_bf16(_inputs()), {"linear_cross_entropy": 1}, kind="head")


@pytest.mark.parametrize(("near_miss", "pattern", "reason"), LEFT_ALONE, ids=named)
def test_a_near_miss_is_left_alone(near_miss: Any, pattern: str, reason: str | None) -> None:
    check_untouched(near_miss, _inputs(), pattern, reason, kind="head")


@pytest.mark.parametrize(("near_miss", "ops"), MATCHED_AS_WHAT_IT_IS, ids=named)
def test_a_near_miss_is_matched_as_what_it_is(near_miss: Any, ops: dict[str, int]) -> None:
    check(near_miss, _inputs(), ops, kind="head")
