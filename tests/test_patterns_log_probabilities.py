"""Log-probabilities of labels and losses of log-probabilities: spellings, and look-alikes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import check, check_untouched, compile_one, named, perturbed, rows, to_bf16

WIDTH, CLASSES, TOKENS = 8, 11, 6


def _inputs() -> list[Any]:
    """logits (B, T, V), labels (B, T)."""
    return [rows(2, TOKENS, CLASSES), torch.randint(0, CLASSES, (2, TOKENS))]


def _head_inputs() -> list[Any]:
    """hidden (B, T, C), head (V, C), labels (B, T)."""
    labels = torch.randint(0, CLASSES, (2, TOKENS))
    labels[0, 2] = -100
    return [rows(2, TOKENS, WIDTH), perturbed(CLASSES, WIDTH, around=0.0), labels]


def gathered(z, y):
    return torch.log_softmax(z, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def gathered_and_kept(z, y):
    return z.log_softmax(dim=2).gather(2, y[..., None])


def taken_along(z, y):
    return torch.take_along_dim(F.log_softmax(z, dim=-1), y[..., None], dim=-1)[..., 0]


def in_float32(z, y):
    return z.float().log_softmax(-1).gather(2, y.unsqueeze(2)).squeeze(2)


def in_float32_by_the_library(z, y):
    return F.log_softmax(z, -1, dtype=torch.float32).gather(-1, y[..., None]).squeeze(-1)


def less_logsumexp(z, y):
    return torch.gather(z, -1, y.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(z, dim=-1)


def less_logsumexp_kept(z, y):
    return z.gather(-1, y[..., None]) - z.logsumexp(-1, keepdim=True)


def less_logsumexp_of_float32(z, y):
    z = z.float()
    return z.gather(-1, y[..., None]).squeeze(-1) - z.logsumexp(-1)


def of_rows(z, y):
    z, y = z.reshape(-1, CLASSES), y.reshape(-1)
    return z.log_softmax(-1).gather(1, y[:, None])[:, 0]


def of_answers(z, y):
    """A preference loss's own: shifted, masked and summed over the tokens of each answer."""
    labels = y[:, 1:].clone()
    mask = labels != 3
    labels[labels == 3] = 0
    logps = torch.gather(z[:, :-1].log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
    return (logps * mask).sum(-1)


SPELLINGS = [
    gathered,
    gathered_and_kept,
    taken_along,
    in_float32,
    in_float32_by_the_library,
    less_logsumexp,
    less_logsumexp_kept,
    less_logsumexp_of_float32,
    of_rows,
    of_answers,
]


def likelihood(h, w, y):
    logps = F.log_softmax(F.linear(h, w), dim=-1)
    return F.nll_loss(logps.view(-1, CLASSES), y.view(-1))


def likelihood_of_rows(h, w, y):
    logits = F.linear(h, w).view(-1, CLASSES)
    return F.nll_loss(F.log_softmax(logits, -1, dtype=torch.float32), y.view(-1), reduction="sum")


def likelihood_over_items(h, w, y):
    logps = F.linear(h, w).float().view(-1, CLASSES).log_softmax(-1)
    return F.nll_loss(logps, y.view(-1), ignore_index=-100, reduction="sum") / (y != -100).sum()


LIKELIHOODS = [likelihood, likelihood_of_rows, likelihood_over_items]


def over_the_tokens(z, y):
    return z.log_softmax(1).gather(-1, y[..., None]).squeeze(-1)


def gathered_along_the_tokens(z, y):
    return z.log_softmax(-1).gather(1, y[..., None] % TOKENS)


def two_entries(z, y):
    return z.log_softmax(-1).gather(-1, torch.stack((y, y.flip(1)), -1))


def of_probabilities(z, y):
    return z.softmax(-1).gather(-1, y[..., None]).squeeze(-1)


def log_of_probabilities(z, y):
    return z.softmax(-1).gather(-1, y[..., None]).squeeze(-1).log()


def with_the_entropy(z, y):
    logps = z.log_softmax(-1)
    return logps.gather(-1, y[..., None]), (logps.exp() * logps).sum(-1)


def of_fewer_rows(z, y):
    return z.log_softmax(-1).gather(-1, y[:, :3, None])


def less_the_sum_of_others(z, y):
    return z.gather(-1, y[..., None]).squeeze(-1) - (2 * z).logsumexp(-1)


def the_other_way_round(z, y):
    return z.logsumexp(-1) - z.gather(-1, y[..., None]).squeeze(-1)


def less_twice_the_sum(z, y):
    return torch.sub(z.gather(-1, y[..., None]).squeeze(-1), z.logsumexp(-1), alpha=2)


def less_the_sum_over_tokens(z, y):
    return z.gather(-1, y[:, :1, None]).squeeze(-1) - z.logsumexp(1)[:, :1]


def rounded_first(z, y):
    logps = z.log_softmax(-1).to(torch.bfloat16).float()
    return logps.gather(-1, y[..., None]).squeeze(-1)


LEFT_ALONE = [
    (over_the_tokens, "log_probabilities", "grow: it is not of a log_softmax over the"),
    (gathered_along_the_tokens, "log_probabilities", "grow: it does not take one class of each"),
    (two_entries, "log_probabilities", "grow: it does not take one class of each"),
    (of_probabilities, "log_probabilities", None),
    (log_of_probabilities, "log_probabilities", None),
    (with_the_entropy, "log_probabilities", "legality: the intermediate value 'log_softmax'"),
    (of_fewer_rows, "log_probabilities", "grow: there is not one label for each row"),
    (less_the_sum_of_others, "log_probabilities", "grow: it is not of a log_softmax over"),
    (less_twice_the_sum, "log_probabilities", None),
    (less_the_sum_over_tokens, "log_probabilities", None),
    (rounded_first, "log_probabilities", "grow: it is not of a log_softmax over the"),
]
MATCHED_AS_WHAT_IT_IS = [(the_other_way_round, {"cross_entropy": 1})]


def likelihood_of_logits(h, w, y):
    return F.nll_loss(F.linear(h, w).view(-1, CLASSES), y.view(-1))


def likelihood_over_the_rows(h, w, y):
    return F.nll_loss(F.linear(h, w).view(-1, CLASSES).log_softmax(0), y.view(-1))


def weighted_likelihood(h, w, y):
    logps = F.linear(h, w).view(-1, CLASSES).log_softmax(-1)
    return F.nll_loss(logps, y.view(-1), weight=torch.ones(CLASSES))


def likelihood_and_smoothing(h, w, y):
    logps = F.linear(h, w).view(-1, CLASSES).log_softmax(-1)
    return F.nll_loss(logps, y.view(-1)) - 0.1 * logps.mean()


NO_LIKELIHOODS = [
    (likelihood_of_logits, "grow: the loss is not of a log_softmax over the classes"),
    (likelihood_over_the_rows, "grow: the loss is not of a log_softmax over the classes"),
    (weighted_likelihood, "grow: class weights are not offered by the kernel"),
    (likelihood_and_smoothing, "legality: the intermediate value"),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_is_matched(spelling: Any) -> None:
    check(spelling, _inputs(), {"cross_entropy": 1})


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_in_bfloat16(spelling: Any) -> None:
    check(spelling, to_bf16(_inputs()), {"cross_entropy": 1})


@pytest.mark.parametrize("spelling", LIKELIHOODS, ids=named)
def test_a_likelihood_is_a_cross_entropy(spelling: Any) -> None:
    check(spelling, _head_inputs(), {"linear_cross_entropy": 1}, kind="head")
    check(spelling, to_bf16(_head_inputs()), {"linear_cross_entropy": 1}, kind="head")


def test_a_likelihood_whose_logits_are_used_elsewhere() -> None:
    def both(h, w, y):
        logits = F.linear(h, w)
        return F.nll_loss(logits.log_softmax(-1).view(-1, CLASSES), y.view(-1)), logits * 2

    check(both, _head_inputs(), {"cross_entropy": 1}, kind="head")


@pytest.mark.parametrize(("near_miss", "reason"), NO_LIKELIHOODS, ids=named)
def test_no_likelihood_of_ours(near_miss: Any, reason: str) -> None:
    check_untouched(near_miss, _head_inputs(), "cross_entropy", reason, kind="head")


@pytest.mark.parametrize(("near_miss", "pattern", "reason"), LEFT_ALONE, ids=named)
def test_a_near_miss_is_left_alone(near_miss: Any, pattern: str, reason: str | None) -> None:
    check_untouched(near_miss, _inputs(), pattern, reason)


@pytest.mark.parametrize(("near_miss", "ops"), MATCHED_AS_WHAT_IT_IS, ids=named)
def test_a_near_miss_is_matched_as_what_it_is(near_miss: Any, ops: dict[str, int]) -> None:
    check(near_miss, _inputs(), ops)


def test_fewer_labels_than_rows_later_on() -> None:
    """A gather takes those too: the graph is guarded on one label a row."""
    compiled = compile_one(gathered_and_kept)
    z, y = _inputs()
    for labels in (y, y[:, :4], y[:1], y.repeat(1, 2)[:, :TOKENS]):
        torch.testing.assert_close(compiled.run(z, labels), gathered_and_kept(z, labels))
    assert compiled.ops == {"cross_entropy": 1}
    assert len(compiled.session.records) > 1


@pytest.mark.parametrize("label", [CLASSES, -1, -100])
def test_a_label_that_is_none_is_refused_as_by_a_gather(label: int) -> None:
    z, y = _inputs()
    y[1, 2] = label
    compiled = compile_one(gathered)
    for run in (gathered, compiled.run):
        with pytest.raises((RuntimeError, IndexError)):
            run(z, y)
