"""Left products of an RMS norm's output that is made of the norm's input: the bits of two launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend

from fusewright.kernels import rms_norm
from fusewright.kernels.normed import Norm
from fusewright.kernels.thin import Term, reference, thin

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _norm(backend: Backend, x: torch.Tensor, weight: Any, offset: float, cast: str) -> Any:
    forward = rms_norm.reference_fwd if backend.name == "reference" else rms_norm.triton_fwd
    return forward(x, weight, 1e-5, offset, cast, x.dtype)


@pytest.mark.parametrize("cast", ["input", "output"])
@pytest.mark.parametrize("weighted", [None, 0.0, 1.0])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP32)],
                         ids=str)  # fmt: skip
def test_bits_are_those_of_the_norm(
    backend: Backend, dtypes: Any, weighted: float | None, cast: str
) -> None:
    kind, narrow = dtypes
    rows, width, ranks = (300, 1000, [16] * 3) if backend.device == "cuda" else (70, 150, [3, 3])
    x = (3 * torch.randn(rows, width, device=backend.device)).to(kind)
    weight = None if weighted is None else torch.randn(width, device=backend.device).to(kind)
    offset = weighted or 0.0
    y, rstd = _norm(backend, x, weight, offset, cast)
    terms = [Term(0, left=torch.randn(rows, r, device=backend.device).to(narrow),
                  left_transposed=True) for r in ranks]  # fmt: skip
    norm = Norm(weight, rstd, offset, cast)
    assert torch.equal(norm.of(x), y) or not backend.rounds_bfloat16
    run = reference if backend.name == "reference" else thin
    for a, b in zip(run([x], terms, norm=norm), run([y], terms), strict=True):
        assert a.left is not None and b.left is not None and torch.equal(a.left, b.left)


@pytest.mark.gpu
@pytest.mark.parametrize("r", [16, 64])
def test_bits_at_real_shapes(r: int) -> None:
    x = torch.randn(4096, 4096, device="cuda").to(BF16)
    weight = torch.randn(4096, device="cuda").to(BF16)
    y, rstd = rms_norm.triton_fwd(x, weight, 1e-5, 0.0, "input", BF16)
    terms = [Term(0, left=torch.randn(4096, r, device="cuda").to(BF16), left_transposed=True)] * 3
    expected = thin([y], terms)
    for _ in range(20):
        for a, b in zip(thin([x], terms, norm=Norm(weight, rstd, 0.0, "input")), expected,
                        strict=True):  # fmt: skip
            assert a.left is not None and b.left is not None and torch.equal(a.left, b.left)


OP = torch.ops.fusewright
ROWS, WIDTH, HEIGHTS, R = 24, 64, (48, 32), 4


@pytest.mark.parametrize("cast", ["input", "output"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP32, FP32)], ids=str)
def test_the_backward_of_a_group(backend: Backend, dtypes: Any, cast: str) -> None:
    kind, narrow = dtypes

    def new(*shape: int, dtype: torch.dtype = kind) -> torch.Tensor:
        return torch.randn(shape, device=backend.device).to(dtype)

    h, weight = new(2, ROWS, WIDTH), new(WIDTH)
    x, rstd = _norm(backend, h, weight, 0.0, cast)
    if backend.device == "cpu":  # the products are the library's there, and so is x
        x = Norm(weight, rstd, 0.0, cast).of(h)
    ranks = [R] * len(HEIGHTS)
    layers = ([new(n, WIDTH) for n in HEIGHTS], [None] * len(HEIGHTS))
    down = [new(r, WIDTH, dtype=narrow) for r in ranks]
    up = [new(n, r, dtype=narrow) for n, r in zip(HEIGHTS, ranks, strict=True)]
    rest = (*layers, down, up, [0, 1], [-1, -1], [2.0, 0.5], False, True, False, False, False,
            True, True)  # fmt: skip
    first = ([new(2, ROWS, sum(HEIGHTS))], new(2 * ROWS, sum(ranks), dtype=narrow))
    expected = backend.ops.lora_group_backward(*first, x, [], *rest)
    found = backend.ops.lora_group_norm_backward(*first, h, [], *rest, weight, rstd, 0.0, cast)
    assert torch.equal(found[0], expected[0])
    for at in (4, 5):
        assert all(torch.equal(a, b) for a, b in zip(found[at], expected[at], strict=True))
