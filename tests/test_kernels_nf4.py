"""4-bit dequantisation: bit for bit what bitsandbytes computes."""

from __future__ import annotations

import pytest
import torch

from fusewright.runtime.op import register_all

bnb = pytest.importorskip("bitsandbytes.functional")
register_all()
OP = torch.ops.fusewright.nf4_dequantize
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def arguments(packed: torch.Tensor, state: bnb.QuantState, row_stride: int = 0) -> tuple:
    """The op's arguments for a bitsandbytes weight."""
    nested = state.state2
    return (
        packed,
        state.absmax,
        state.code,
        state.offset if nested else None,
        nested.absmax if nested else None,
        nested.code if nested else None,
        *state.shape,
        state.blocksize,
        nested.blocksize if nested else 0,
        row_stride,
        state.dtype,
    )


# bitsandbytes' CPU kernel is right only where no block crosses a row, hence rows of 1024.
def quantised(shape: tuple[int, int], dtype: torch.dtype, **options: object) -> tuple:
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    return bnb.quantize_4bit(weight, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128, 1024])
def test_bit_exact(blocksize: int, kind: str, double: bool, dtype: torch.dtype) -> None:
    packed, state = quantised(
        (24, 1024), dtype, blocksize=blocksize, compress_statistics=double, quant_type=kind
    )
    assert torch.equal(OP(*arguments(packed, state)), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(1, 64), (7, 33), (3, 130), (5, 1), (257, 65)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    packed, state = quantised(shape, torch.bfloat16, quant_type="nf4")
    expected = bnb.dequantize_4bit(packed, state)
    assert torch.equal(OP(*arguments(packed, state)), expected.reshape(shape))


def test_into_a_wider_buffer() -> None:
    packed, state = quantised((16, 64), torch.bfloat16, quant_type="nf4", compress_statistics=True)
    wide = OP(*arguments(packed, state, row_stride=96))
    assert wide.shape == (16, 64) and wide.stride() == (96, 1)
    assert torch.equal(wide, bnb.dequantize_4bit(packed, state))


def test_bad_input_is_named() -> None:
    packed, state = quantised((16, 64), torch.bfloat16, quant_type="nf4", compress_statistics=True)
    good = list(arguments(packed, state))
    for at, value, error, message in [
        (0, packed[:-1], ValueError, "packed: expected 512 elements, got 511"),
        (1, state.absmax.float(), TypeError, "absmax: expected torch.uint8, got torch.float32"),
        (2, state.code[:8].clone(), ValueError, "code: expected 16 elements, got 8"),
        (4, None, ValueError, "nested_absmax and nested_code: expected beside offset"),
        (10, 60, ValueError, "row_stride: expected 0 or at least 64, got 60"),
        (11, torch.int32, TypeError, "out: expected one of .*got torch.int32"),
    ]:
        bad = good.copy()
        bad[at] = value
        with pytest.raises(error, match=message):
            OP(*bad)
