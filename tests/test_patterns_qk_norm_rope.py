"""Heads that are normalised and then rotated: where the two join, and what they are left for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import check, named, perturbed, rows, to_bf16

EPS, WIDTH = 1e-6, 8


def _inputs() -> list[Any]:
    angles = torch.rand(1, 1, 5, WIDTH // 2).repeat(1, 1, 1, 2) * 6
    heads = [rows(2, 5, n, WIDTH) for n in (4, 2)]
    return [*heads, perturbed(WIDTH), perturbed(WIDTH), angles.cos(), angles.sin()]


def _norm(x, w, offset=0.0, eps=EPS):
    f = x.float()
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    return (offset + w.float()) * f if offset else w * f.to(x.dtype)


def _turn(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def _heads(q, k, cos, sin):
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def normed_then_transposed(q, k, a, b, cos, sin):
    return _heads(_norm(q, a), _norm(k, b), cos, sin)


def transposed_then_normed(q, k, a, b, cos, sin):
    q, k = _norm(q.transpose(1, 2), a), _norm(k.transpose(1, 2), b)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def one_added_to_the_weight(q, k, a, b, cos, sin):
    q, k = _norm(q, a, 1.0).type_as(q), _norm(k, b, 1.0).type_as(k)
    return _heads(q, k, cos, sin)


def tokens_second(q, k, a, b, cos, sin):
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    return _turn(_norm(q, a), cos, sin), _turn(_norm(k, b), cos, sin)


def shared_weight(q, k, a, b, cos, sin):
    q, k = _heads(_norm(q, a), _norm(k, a), cos, sin)
    return q, k, b * 2


def a_part_turns(q, k, a, b, cos, sin):
    cos, sin = cos[..., ::2], sin[..., ::2]
    q, k = _norm(q, a).transpose(1, 2), _norm(k, b).transpose(1, 2)
    half = WIDTH // 2
    return tuple(torch.cat((_turn(x[..., :half], cos, sin), x[..., half:]), dim=-1) for x in (q, k))


FIRES = [
    normed_then_transposed,
    transposed_then_normed,
    one_added_to_the_weight,
    tokens_second,
    shared_weight,
    a_part_turns,
]


def queries_alone(q, k, a, b, cos, sin):
    q, k = _heads(_norm(q, a), k, cos, sin)
    return q, k, b * 2


def unlike_eps(q, k, a, b, cos, sin):
    return _heads(_norm(q, a), _norm(k, b, eps=1e-3), cos, sin)


def norm_used_again(q, k, a, b, cos, sin):
    n = _norm(q, a)
    return (*_heads(n, _norm(k, b), cos, sin), n * 2)


LEFT = {
    queries_alone: {"rms_norm": 1, "rope": 1},
    unlike_eps: {"rms_norm": 2, "rope": 1},
    norm_used_again: {"rms_norm": 2, "rope": 1},
}


@pytest.mark.parametrize("spelling", FIRES, ids=named)
def test_they_join(spelling: Any) -> None:
    compiled = check(spelling, _inputs(), {"qk_norm_rope": 1})
    (record,) = compiled.session.records
    patterns = sorted(m.pattern for m in record.matches)
    assert patterns == ["qk_norm_rope", "rms_norm", "rms_norm", "rope"]


@pytest.mark.parametrize("spelling", FIRES, ids=named)
def test_in_bfloat16(spelling: Any) -> None:
    check(spelling, to_bf16(_inputs()), {"qk_norm_rope": 1})


@pytest.mark.parametrize("near_miss", LEFT, ids=named)
def test_a_near_miss_is_left(near_miss: Any) -> None:
    compiled = check(near_miss, _inputs(), LEFT[near_miss])
    said = [m for m in compiled.misses if m.pattern == "qk_norm_rope"]
    assert said and all(m.refines and m.reason for m in said)


def test_a_wrong_claim_is_disproved(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.patterns import qk_norm_rope

    right = qk_norm_rope._rotated
    monkeypatch.setattr(qk_norm_rope, "_rotated", lambda x, c, s, *a: right(x, c, -s, *a))
    compiled = check(normed_then_transposed, _inputs(), {"rms_norm": 2, "rope": 1})
    assert any(m.step == "proof" for m in compiled.misses)
