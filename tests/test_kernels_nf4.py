"""4-bit dequantisation: bit for bit what bitsandbytes computes."""

from __future__ import annotations

import pytest
import torch
from backends import Backend
from targets import Case, assert_compiles

from fusewright.kernels import nf4
from fusewright.runtime.op import register_all

bnb = pytest.importorskip("bitsandbytes.functional")
register_all()
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
def quantised(
    backend: Backend, shape: tuple[int, int], dtype: torch.dtype, **options: object
) -> tuple:
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(backend.device, dtype)
    return bnb.quantize_4bit(weight, **options)


def same(backend: Backend, actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit; the interpreter cuts bfloat16 off, which may cost one unit in the last place."""
    if actual.dtype is torch.bfloat16 and not backend.rounds_bfloat16:
        units = (actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        return int(units.max()) <= 1
    return torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128, 1024])
def test_bit_exact(
    backend: Backend, blocksize: int, kind: str, double: bool, dtype: torch.dtype
) -> None:
    packed, state = quantised(
        backend, (24, 1024), dtype, blocksize=blocksize, compress_statistics=double, quant_type=kind
    )
    weight = backend.ops.nf4_dequantize(*arguments(packed, state))
    assert same(backend, weight, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(1, 64), (7, 33), (3, 130), (5, 1), (257, 65)])
def test_odd_shapes(backend: Backend, shape: tuple[int, int]) -> None:
    packed, state = quantised(backend, shape, torch.float16, quant_type="nf4")
    expected = bnb.dequantize_4bit(packed, state)
    for stride in (0, shape[1] + 3):
        weight = backend.ops.nf4_dequantize(*arguments(packed, state, stride))
        assert torch.equal(weight, expected.reshape(shape))


def test_into_a_wider_buffer(backend: Backend) -> None:
    packed, state = quantised(
        backend, (48, 64), torch.float16, quant_type="nf4", compress_statistics=True
    )
    wide = backend.ops.nf4_dequantize(*arguments(packed, state, row_stride=96))
    assert wide.shape == (48, 64) and wide.stride() == (96, 1)
    assert torch.equal(wide, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("width", [64, 96])  # whole blocks in a row, or not
@pytest.mark.parametrize("behind", [16, 48])
def test_zeros_behind_the_rows(backend: Backend, width: int, behind: int) -> None:
    """As many columns as asked for, and not one more."""
    packed, state = quantised(backend, (70, width), torch.float16, quant_type="nf4")
    buffer = torch.full((70, width + 64), torch.nan, dtype=torch.float16, device=backend.device)
    given = nf4.Quantised(*arguments(packed, state)[:6], state.blocksize, 256)
    into = nf4.reference_into if backend.name == "reference" else nf4.triton_into
    into(buffer[:, :width], given, behind)
    dense = backend.ops.nf4_dequantize(*arguments(packed, state))
    assert torch.equal(buffer[:, :width], dense)
    assert bool((buffer[:, width : width + behind] == 0).all())
    assert bool(buffer[:, width + behind :].isnan().all())


def compiled_cases() -> list[Case]:
    """Both kernels, nested, into bfloat16."""
    module = "fusewright.kernels.nf4_kernels:"
    types = {"packed_ptr": "*u8:16", "absmax_ptr": "*u8:16", "out_ptr": "*bf16:16"}
    for name in ("code_ptr", "offset_ptr", "nested_absmax_ptr", "nested_code_ptr"):
        types[name] = "*fp32:16"
    flags = {"NESTED": True, "NESTED_BLOCKSIZE": 256, "BLOCKSIZE": 64}
    sizes = {"blocks": "i32:16", "row_blocks": "i32:16", "out_row": "i32:16", "behind": "i32:16"}
    tile, none = {"BLOCKS": 64}, {"BEHIND": 0}
    blocks = module + "dequantize_blocks"
    any_sizes = {"elements": "i32", "columns": "i32", "out_row": "i32"}
    return [
        Case(blocks, types | sizes, flags | tile | none | {"DENSE": True, "STEPS": 1}, 4),
        Case(blocks, types | sizes, flags | tile | none | {"DENSE": False, "STEPS": 2}, 4),
        Case(blocks, types | sizes, flags | tile | {"DENSE": False, "STEPS": 2, "BEHIND": 64}, 4),
        Case(module + "dequantize_elements", types | any_sizes, flags | {"BLOCK": 1024}, 4),
    ]


def test_kernels_compile_without_spills() -> None:
    assert_compiles(compiled_cases())


def test_bad_input_is_named(backend: Backend) -> None:
    packed, state = quantised(
        backend, (16, 64), torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
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
            backend.ops.nf4_dequantize(*bad)
