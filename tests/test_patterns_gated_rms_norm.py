"""A norm with its gate: where the two join, and where rounding keeps them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import check, named, perturbed, rows, to_bf16

from fusewright.kernels.activations import ACTIVATIONS

EPS, WIDTH = 1e-6, 8


def _inputs() -> list[Any]:
    return [rows(2, 5, WIDTH), rows(2, 5, WIDTH), perturbed(WIDTH)]


def _unit(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def gate_after_a_rounded_norm(x, z, w):
    h = w * _unit(x.float()).to(x.dtype)
    return (h * F.silu(z.float())).to(x.dtype)


def gate_before(x, z, w):
    h = x.float() * F.silu(z.float())
    return w * _unit(h).to(x.dtype)


def gate_before_a_norm_in_float32(x, z, w):
    return (w.float() * _unit(x.float() * F.silu(z.float()))).to(x.dtype)


def groups_with_a_gate_after(x, z, w):
    h = _unit(x.float().view(2, 5, 2, 4))
    h = (w.view(2, 4) * h).view(2, 5, WIDTH)
    return (h * F.silu(z.float())).to(x.dtype)


def groups_with_a_gate_before(x, z, w):
    h = x.float() * F.silu(z.float())
    h = _unit(h.view(2, 5, 2, 4)).view(2, 5, WIDTH)
    return w * h.to(x.dtype)


def sigmoid_in_float32(x, z, w):
    return (w.float() * _unit(x.float()) * torch.sigmoid(z.float())).to(x.dtype)


def without_weight(x, z, w):
    return _unit(x.float() * F.silu(z.float())).to(x.dtype) + 0 * w


FIRES = [
    gate_after_a_rounded_norm,
    gate_before,
    gate_before_a_norm_in_float32,
    groups_with_a_gate_after,
    groups_with_a_gate_before,
    sigmoid_in_float32,
    without_weight,
]


def norm_rounded_on_purpose(x, z, w):
    h = (w.float() * _unit(x.float())).to(x.dtype)
    return (h * F.silu(z.float())).to(x.dtype)


def gated_rows_rounded_on_purpose(x, z, w):
    h = (x.float() * F.silu(z.float())).to(x.dtype)
    return w * _unit(h.float()).to(x.dtype)


def norm_used_again(x, z, w):
    h = w * _unit(x.float()).to(x.dtype)
    return (h * F.silu(z.float())).to(x.dtype), h * 2


def gated_rows_used_again(x, z, w):
    h = x.float() * F.silu(z.float())
    return w * _unit(h).to(x.dtype), h * 2


LEFT = [norm_rounded_on_purpose, gated_rows_rounded_on_purpose, norm_used_again]
LEFT += [gated_rows_used_again]


@pytest.mark.parametrize("spelling", FIRES, ids=named)
def test_they_join(spelling: Any) -> None:
    compiled = check(spelling, _inputs(), {"gated_rms_norm": 1})
    (record,) = compiled.session.records
    assert sorted(m.pattern for m in record.matches) == ["gated_rms_norm", "glu", "rms_norm"]


@pytest.mark.parametrize("spelling", FIRES, ids=named)
def test_in_bfloat16(spelling: Any) -> None:
    check(spelling, to_bf16(_inputs()), {"gated_rms_norm": 1})


@pytest.mark.parametrize("near_miss", LEFT, ids=named)
def test_a_near_miss_stays_two(near_miss: Any) -> None:
    compiled = check(near_miss, to_bf16(_inputs()), {"rms_norm": 1, "glu": 1})
    assert all(m.refines for m in compiled.misses), compiled.misses


def test_a_reason_is_given() -> None:
    compiled = check(norm_rounded_on_purpose, to_bf16(_inputs()), {"rms_norm": 1, "glu": 1})
    assert any("rounded on purpose" in m.reason for m in compiled.misses)


def test_a_wrong_claim_is_disproved(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.patterns import gated_rms_norm

    monkeypatch.setattr(gated_rms_norm, "lookup", lambda name: ACTIVATIONS["sigmoid"])
    compiled = check(gate_before, _inputs(), {"rms_norm": 1, "glu": 1})
    assert any(m.step == "proof" for m in compiled.misses)
