"""RoPE by complex multiplication: spellings seen in the wild, and look-alikes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import check, check_untouched, named, rows, to_bf16

WIDTH = 8


def _inputs(tokens_first: bool) -> list[Any]:
    """q, k and the complex table (batch, tokens, width / 2)."""
    angle = torch.randn(2, 5, WIDTH // 2)
    shapes = (
        ((2, 5, 4, WIDTH), (2, 5, 2, WIDTH))
        if tokens_first
        else ((2, 4, 5, WIDTH), (2, 2, 5, WIDTH))
    )
    return [rows(*shapes[0]), rows(*shapes[1]), torch.polar(torch.ones_like(angle), angle)]


def _complex(x):
    return torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))


def heads_first(q, k, table):
    table = table.unsqueeze(1)
    return (
        torch.view_as_real(_complex(q) * table).flatten(3).type_as(q),
        torch.view_as_real(_complex(k) * table).flatten(3).type_as(k),
    )


def tokens_first(q, k, table):
    a = torch.view_as_real(_complex(q) * table[:, :, None, :]).flatten(3)
    b = torch.view_as_real(_complex(k) * table[:, :, None, :]).flatten(3)
    return a.type_as(q), b.type_as(k)


def table_on_the_left(q, k, table):
    table = table[:, None]
    a = torch.view_as_real(table * _complex(q)).reshape(q.shape)
    return a.to(q.dtype), torch.view_as_real(table * _complex(k)).reshape(k.shape).to(k.dtype)


def one_tensor(q, k, table):
    return torch.view_as_real(_complex(q) * table.unsqueeze(1)).flatten(3).type_as(q), k


SPELLINGS = [heads_first, tokens_first, table_on_the_left, one_tensor]


def conjugated(q, k, table):
    return torch.view_as_real(_complex(q) * table.unsqueeze(1).conj()).flatten(3).type_as(q), k


def divided(q, k, table):
    return torch.view_as_real(_complex(q) / table.unsqueeze(1)).flatten(3).type_as(q), k


def of_halves(q, k, table):
    a, b = q.float().chunk(2, dim=-1)
    z = torch.view_as_complex(torch.stack((a, b), dim=-1))
    return torch.view_as_real(z * table.unsqueeze(1)).flatten(3).type_as(q), k


def swapped_back(q, k, table):
    out = torch.view_as_real(_complex(q) * table.unsqueeze(1)).transpose(-1, -2)
    return out.reshape(q.shape).type_as(q), k


def used_elsewhere(q, k, table):
    z = _complex(q) * table.unsqueeze(1)
    return torch.view_as_real(z).flatten(3).type_as(q), k * z.real.mean()


def table_with_a_gradient(q, k, table):
    turned = _complex(q) * (table.unsqueeze(1) * k.mean())
    return torch.view_as_real(turned).flatten(3).type_as(q), k


LEFT_ALONE = [
    (divided, "grow: the complex value is not multiplied by one table"),
    (of_halves, "grow: the complex view is not of pairs of features"),
    (swapped_back, "grow: the product does not go back to one real tensor"),
    (used_elsewhere, "grow: the product does not go back to one real tensor"),
    (table_with_a_gradient, "legality: table needs a gradient, and the kernel gives none"),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_is_matched(spelling: Any) -> None:
    check(spelling, _inputs(spelling is tokens_first), {"rope": 1})


@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_a_spelling_in_bfloat16(spelling: Any) -> None:
    check(spelling, to_bf16(_inputs(spelling is tokens_first)), {"rope": 1})


def test_a_conjugate_is_another_table() -> None:
    check(conjugated, _inputs(False), {"rope": 1})


@pytest.mark.parametrize(("near_miss", "reason"), LEFT_ALONE, ids=named)
def test_a_near_miss_is_left_alone(near_miss: Any, reason: str) -> None:
    check_untouched(near_miss, _inputs(False), "rope", reason)
