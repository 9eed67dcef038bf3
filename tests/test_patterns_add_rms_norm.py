"""The residual sum with its norm: where it fires, and what it leaves to the norm alone."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import training
from graphs import check, named, rows, to_bf16

import fusewright

EPS, WIDTH = 1e-6, 8


def _norm(x, w):
    f = x.float()
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)
    return w * f.to(x.dtype)


def _inputs() -> list[Any]:
    return [rows(2, 5, WIDTH), rows(2, 5, WIDTH), rows(WIDTH)]


def sum_used_again(x, e, w):
    s = x + e
    return _norm(s, w), s * 2


def sum_used_once(x, e, w):
    return _norm(x + e, w)


def sum_used_before_the_norm(x, e, w):
    s = x + e
    t = torch.tanh(s)
    return _norm(s, w) + t


def twice_the_same(x, e, w):
    return _norm(x + x, w) + e


FIRES = [sum_used_again, sum_used_once, sum_used_before_the_norm, twice_the_same]


def scaled_sum(x, e, w):
    return _norm(torch.add(x, e, alpha=2), w)


def literal_added(x, e, w):
    return _norm(x + 1.0, w) + e


def broadcast(x, e, w):
    return _norm(x + e[:, :1], w)


def difference(x, e, w):
    return _norm(x - e, w)


LEFT = [scaled_sum, literal_added, broadcast, difference]


@pytest.mark.parametrize("spelling", FIRES, ids=named)
def test_the_sum_joins_its_norm(spelling: Any) -> None:
    check(spelling, _inputs(), {"add_rms_norm": 1})


@pytest.mark.parametrize("spelling", FIRES, ids=named)
def test_in_bfloat16(spelling: Any) -> None:
    check(spelling, to_bf16(_inputs()), {"add_rms_norm": 1})


@pytest.mark.parametrize("near_miss", LEFT, ids=named)
def test_a_near_miss_stays_a_norm(near_miss: Any) -> None:
    check(near_miss, _inputs(), {"rms_norm": 1})


def test_a_sum_changed_in_place_stays_a_norm() -> None:
    def changed(x, e, w):
        s = x + e
        y = _norm(s, w)
        s.mul_(2)
        return y.detach() + s

    check(changed, _inputs(), {})


def test_a_site_is_covered_once() -> None:
    """Sites that are missed weigh as much beside a norm as beside a norm that took its sum."""
    model = fusewright.optimize(models.build("llama4_text"), lowering="fx")
    training.train_step(model, models.batch())
    report = fusewright.report(model)
    added = [r for r in report.rows if r.pattern == "add_rms_norm"]
    assert report.counts["add_rms_norm"] and all(r.refines for r in added)
    sites = [r for r in report.rows if r not in added]
    fired = sum(r.count for r in sites if r.status == "fired")
    assert report.coverage == fired / sum(r.count for r in sites)
    assert sum(r.count for r in report.rows) > sum(r.count for r in sites)
    assert not any(r.refines for r in sites)
