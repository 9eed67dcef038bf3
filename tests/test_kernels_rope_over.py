"""Rotary embedding written over its input: the same bits as beside it, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import Backend
from launches import TARGETS, assert_no_spills
from rows import DTYPES
from test_kernels_rope import LAYOUTS, tables

from fusewright.kernels import rope_over
from fusewright.runtime.op import register_all

register_all()

# Heads of q and of k, a head's width, how much of it turns, and the columns before, between and behind.
SHAPES = [
    (4, 2, 16, 16, (0, 0, 32)),
    (5, 3, 80, 40, (8, 8, 0)),
    (71, 1, 64, 64, (0, 0, 64)),  # heads of k are fewer numbers than a program has threads
    (3, 1, 6, 4, (3, 5, 1)),
    (1, 4, 256, 64, (0, 0, 0)),
    (6, 0, 32, 32, (0, 0, 7)),
]
Where = tuple[int, int, int, int, int]


def laid_out(shape: tuple[Any, ...], k_first: bool) -> tuple[Where, int]:
    """Where q and k are, and how many columns there are."""
    q_heads, k_heads, width, _, (before, between, behind) = shape
    sizes = (q_heads * width, k_heads * width)
    first, second = (1, 0) if k_first else (0, 1)
    starts = [0, 0]
    starts[first] = before
    starts[second] = before + sizes[first] + between
    columns = before + sizes[0] + between + sizes[1] + behind
    return (starts[0], q_heads, starts[1], k_heads, width), columns


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k_first", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_rope_and_nothing_else(
    backend: Backend, shape: tuple[Any, ...], k_first: bool, layout: str, dtype: torch.dtype
) -> None:
    where, columns = laid_out(shape, k_first)
    turned = shape[3]
    cos, sin = (t.to(backend.device) for t in tables(2, 3, turned, layout, torch.float32))
    whole = torch.randn(2, 3, columns + 4).to(dtype).to(backend.device)[..., :columns]
    given = whole.clone()
    copy = backend.ops.rope_over(whole, cos, sin, layout, turned, *where)
    assert torch.equal(whole, given)
    wanted = given.clone()
    q, k = rope_over.pieces(wanted, *where)
    rotated = backend.ops.rope(q, k, cos, sin, layout, turned, dtype)
    for piece, made in zip((q, k), rotated, strict=True):
        if piece is not None:
            piece.copy_(made)
    assert not torch.equal(wanted, given)
    assert backend.ops.rope_over_(whole, cos, sin, layout, turned, *where) is None
    assert torch.equal(whole, wanted) and torch.equal(copy, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 8, 128, 128), (128, 1, 64, 48), (71, 1, 80, 40)])
def test_real_shapes(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Many programs at once, several times: a thread that read what another had written would show."""
    ops = torch.ops.fusewright
    q_heads, k_heads, width, turned = shape
    where = (0, q_heads, q_heads * width, k_heads, width)
    cos, sin = (t.cuda() for t in tables(2, 2048, turned, layout, torch.float32))
    whole = torch.randn(2, 2048, (q_heads + 2 * k_heads) * width, device="cuda").to(dtype)
    wanted = whole.clone()
    for piece, made in zip(
        rope_over.pieces(wanted, *where),
        ops.rope(*rope_over.pieces(whole, *where), cos, sin, layout, turned, dtype),
        strict=True,
    ):
        piece.copy_(made)
    for _ in range(10):
        out = whole.clone()
        ops.rope_over_(out, cos, sin, layout, turned, *where)
        assert torch.equal(out, wanted)


def test_columns_that_are_not_contiguous_and_no_tokens(backend: Backend) -> None:
    cos, sin = (t.to(backend.device) for t in tables(1, 5, 8, "half", torch.float32))
    whole = torch.randn(40, 5, 2).to(backend.device).permute(2, 1, 0)
    wanted = backend.ops.rope_over(whole.contiguous(), cos, sin, "half", 8, 0, 3, 24, 1, 8)
    backend.ops.rope_over_(whole, cos, sin, "half", 8, 0, 3, 24, 1, 8)
    assert torch.equal(whole, wanted)
    empty = torch.randn(2, 0, 40, device=backend.device)
    backend.ops.rope_over_(empty, cos[:, :, :0], sin[:, :, :0], "half", 8, 0, 3, 24, 1, 8)


@pytest.mark.parametrize(
    "where", [(0, 3, 16, 2, 8), (0, 3, 24, 3, 8), (-8, 1, 24, 1, 8), (0, 0, 24, 1, 8)]
)
def test_heads_that_overlap_or_are_not_there_are_refused(backend: Backend, where: Where) -> None:
    table = torch.randn(1, 1, 5, 8, device=backend.device)
    whole = torch.randn(2, 5, 40, device=backend.device)
    with pytest.raises(ValueError, match="whole: expected"):
        backend.ops.rope_over_(whole, table, table, "half", 8, *where)


def test_fake_agrees(backend: Backend) -> None:
    cos, sin = (t.to(backend.device) for t in tables(1, 5, 8, "half", torch.float32))
    whole = torch.randn(2, 5, 40, device=backend.device)
    args = (whole, cos, sin, "half", 8, 0, 3, 24, 1, 8)
    for op in (backend.ops.rope_over.default, backend.ops.rope_over_.default):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    for layout in LAYOUTS:
        for q_heads, k_heads, width, turned in ((32, 8, 128, 128), (71, 1, 80, 40)):
            whole = torch.empty(2, 4, (q_heads + 2 * k_heads) * width).bfloat16()
            table = torch.empty(1, 1, 4, turned)
            where = (0, q_heads, q_heads * width, k_heads, width)
            args = (whole, table, table, layout, turned, *where)
            yield f"{layout} {width}", lambda a=args: rope_over.device_(*a)


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str) -> None:
    assert_no_spills(__name__, target)
