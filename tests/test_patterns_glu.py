"""Gated linear units: spellings seen in the wild."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import check, compile_one, named, rows, to_bf16

WIDTH = 12


def _inputs() -> list[Any]:
    return [rows(2, 5, WIDTH), rows(2, 5, WIDTH)]


def silu(g, u):
    return F.silu(g) * u


def silu_behind(g, u):
    return u * F.silu(g)


def silu_by_hand(g, u):
    return g * torch.sigmoid(g) * u


def silu_by_hand_turned_around(g, u):
    return u * (torch.sigmoid(g) * g)


def silu_in_float32(g, u):
    return (F.silu(g.float()) * u.float()).to(g.dtype)


def gelu(g, u):
    return F.gelu(g) * u


def gelu_tanh(g, u):
    return F.gelu(g, approximate="tanh") * u


def gelu_by_erf(g, u):
    return 0.5 * g * (1.0 + torch.erf(g / math.sqrt(2.0))) * u


def gelu_by_tanh(g, u):
    inner = math.sqrt(2.0 / math.pi) * (g + 0.044715 * torch.pow(g, 3.0))
    return 0.5 * g * (1.0 + torch.tanh(inner)) * u


def relu(g, u):
    return torch.relu(g) * u


def relu_as_a_clamp(g, u):
    return g.clamp(min=0) * u


def squared_relu(g, u):
    return F.relu(g).square() * u


def sigmoid(g, u):
    return torch.sigmoid(g) * u


def tanh(g, u):
    return torch.tanh(g) * u


def packed_halves(g, u):
    a, b = torch.cat((g, u), dim=-1).chunk(2, dim=-1)
    return F.silu(a) * b


def packed_halves_gate_second(g, u):
    a, b = torch.cat((g, u), dim=-1).chunk(2, dim=-1)
    return a * F.silu(b)


def packed_slices(g, u):
    both = torch.cat((g, u), dim=-1)
    return F.gelu(both[..., :WIDTH]) * both[..., WIDTH:]


def library_glu(g, u):
    return F.glu(torch.cat((g, u), dim=-1))


def packed_interleaved(g, u):
    both = torch.cat((g, u), dim=-1)
    return F.silu(both[..., ::2]) * both[..., 1::2]


def packed_interleaved_gate_second(g, u):
    both = torch.cat((g, u), dim=-1)
    return both[..., 0::2] * F.gelu(both[..., 1::2])


def packed_split(g, u):
    a, b = torch.split(torch.cat((g, u), dim=-1), WIDTH, dim=-1)
    return F.silu(a) * b


def packed_split_with_sizes(g, u):
    a, b = torch.cat((g, u), dim=-1).split([WIDTH, WIDTH], dim=-1)
    return torch.mul(b, F.silu(a))


def packed_view_and_index(g, u):
    both = torch.cat((g, u), dim=-1).view(2, -1, 2, WIDTH)
    return F.silu(both[..., 0, :]) * both[..., 1, :]


def packed_view_and_unbind(g, u):
    gate, up = torch.cat((g, u), dim=-1).unflatten(-1, (WIDTH, 2)).unbind(-1)
    return F.silu(gate) * up


def in_float32_after_the_chunk(g, u):
    a, b = torch.cat((g, u), dim=-1).chunk(2, dim=-1)
    return (F.silu(a.float()) * b.float()).to(g.dtype)


def torch_mul(g, u):
    return torch.mul(torch.nn.SiLU()(g), u)


def quick_gelu(g, u):
    return g * torch.sigmoid(1.702 * g) * u


def factors_in_any_order(g, u):
    return torch.sigmoid(g) * u * g


def scaled(g, u):
    return F.silu(g * 0.5) * u * 0.25


def silu_by_exp(g, u):
    return g / (1 + torch.exp(-g)) * u


def mish(g, u):
    return F.mish(g) * u


def clamped_unit(g, u):
    gate, up = g.clamp(min=None, max=1.5), u.clamp(min=-1.5, max=1.5)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def clamped_unit_interleaved(g, u):
    both = torch.cat((g, u), dim=-1)
    return clamped_unit(both[..., ::2], both[..., 1::2])


def clamp_before_silu(g, u):
    return F.silu(g.clamp(max=1.0)) * u.clamp(-1.0, 1.0)


def clamp_after_silu(g, u):
    return F.silu(g).clamp(max=1.0) * u.clamp(-1.0, 1.0)


SPELLINGS = [
    (packed_interleaved, "glu_packed"),
    (packed_interleaved_gate_second, "glu_packed"),
    (packed_split, "glu_packed"),
    (packed_split_with_sizes, "glu_packed"),
    (packed_view_and_index, "glu_packed"),
    (packed_view_and_unbind, "glu_packed"),
    (in_float32_after_the_chunk, "glu_packed"),
    (library_glu, "glu_packed"),
    (torch_mul, "glu"),
    (quick_gelu, "glu"),
    (factors_in_any_order, "glu"),
    (scaled, "glu"),
    (silu_by_exp, "glu"),
    (mish, "glu"),
    (clamped_unit, "glu_clamped"),
    (clamped_unit_interleaved, "glu_clamped_packed"),
    (clamp_before_silu, "glu"),
    (clamp_after_silu, "glu"),
    (silu, "glu"),
    (silu_behind, "glu"),
    (silu_by_hand, "glu"),
    (silu_by_hand_turned_around, "glu"),
    (silu_in_float32, "glu"),
    (gelu, "glu"),
    (gelu_tanh, "glu"),
    (gelu_by_erf, "glu"),
    (gelu_by_tanh, "glu"),
    (relu, "glu"),
    (relu_as_a_clamp, "glu"),
    (squared_relu, "glu"),
    (sigmoid, "glu"),
    (tanh, "glu"),
    (packed_halves, "glu_packed"),
    (packed_halves_gate_second, "glu_packed"),
    (packed_slices, "glu_packed"),
]


@pytest.mark.parametrize(("spelling", "op"), SPELLINGS, ids=named)
def test_a_spelling_is_matched(spelling: Any, op: str) -> None:
    check(spelling, _inputs(), {op: 1})


@pytest.mark.parametrize(("spelling", "op"), SPELLINGS, ids=named)
def test_a_spelling_in_bfloat16(spelling: Any, op: str) -> None:
    check(spelling, to_bf16(_inputs()), {op: 1})


def test_dropout_behind_a_unit_draws_in_the_order_of_its_layout() -> None:
    """A mask is drawn in the order of memory; the unit of transposed inputs is transposed in eager."""

    def dropped(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return F.dropout(F.silu(g.transpose(1, 2)) * u.transpose(1, 2), 0.5)

    g, u = _inputs()
    compiled = compile_one(lambda g, u: F.dropout(F.silu(g.mT) * u.mT, 0.5))
    torch.manual_seed(7)
    got = compiled.run(g, u)
    assert compiled.ops == {"glu": 1}
    torch.testing.assert_close(got, dropped(g, u))
