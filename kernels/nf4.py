"""Dequantisation of bitsandbytes' 4-bit weights (nf4 and fp4), bit for bit.

Shapes: the weight W is (rows, columns), element e = row columns + column. packed is uint8 with
two elements a byte, the first in the high nibble; block e // blocksize has one scale; code (16,)
float32 is the value of each nibble. With one level of quantisation absmax (blocks,) is the scales in
float32. With two, absmax is uint8 and
    scale_b = nested_code[absmax_b] nested_absmax[b // nested_blocksize] + offset
    W_e     = round(code[nibble_e] scale_b)
The product and the sum of the scale are two float32 roundings, never one fused multiply-add, and W
is rounded once, to the output's dtype: exactly bitsandbytes' order.

The result has any row stride >= columns, so that a GEMM may have more columns behind the weight.
Not differentiable: the quantised weight is frozen. Nothing is saved.
Source: T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
Traffic: half a byte read and one element written per element, and the scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fusewright.kernels.launch import HAS_TRITON, on_device_of
from fusewright.kernels.launcher import Launcher
from fusewright.kernels.nf4_kernels import dequantize_blocks, dequantize_elements
from fusewright.kernels.spec import OpSpec

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Quantised(NamedTuple):
    """The tensors of a 4-bit weight and its block sizes; the last three are None unless nested."""

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    offset: torch.Tensor | None
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    blocksize: int
    nested_blocksize: int


def check(q: Quantised, rows: int, columns: int) -> None:
    """Refuse tensors that cannot be a (rows, columns) weight, naming the argument."""
    elements = rows * columns
    blocks = -(-elements // q.blocksize)
    nested = q.offset is not None
    wanted = [
        ("packed", q.packed, torch.uint8, -(-elements // 2)),
        ("absmax", q.absmax, torch.uint8 if nested else torch.float32, blocks),
        ("code", q.code, torch.float32, 16),
    ]
    if q.offset is not None:
        if q.nested_absmax is None or q.nested_code is None:
            raise ValueError("nested_absmax and nested_code: expected beside offset, got None")
        wanted += [
            ("offset", q.offset, torch.float32, 1),
            ("nested_absmax", q.nested_absmax, torch.float32, -(-blocks // q.nested_blocksize)),
            ("nested_code", q.nested_code, torch.float32, 256),
        ]
    for name, tensor, dtype, size in wanted:
        if tensor.dtype is not dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.numel() != size:
            raise ValueError(f"{name}: expected {size} elements, got {tensor.numel()}")
        if tensor.device != q.packed.device:
            raise ValueError(f"{name}: expected device {q.packed.device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def check_out(out: torch.Tensor, q: Quantised) -> None:
    """Refuse an output that is not a float matrix with adjacent columns."""
    if out.dim() != 2 or (out.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(
            f"out: expected (rows, columns) with column stride 1, got {tuple(out.shape)} "
            f"with strides {out.stride()}"
        )
    if out.dtype not in FLOATS:
        raise TypeError(f"out: expected one of {FLOATS}, got {out.dtype}")
    if out.device != q.packed.device:
        raise ValueError(f"out: expected device {q.packed.device}, got {out.device}")


def new_output(
    like: torch.Tensor, rows: int, columns: int, row_stride: int, dtype: torch.dtype
) -> torch.Tensor:
    """An uninitialised (rows, columns) matrix whose rows lie ``row_stride`` apart; 0 is dense."""
    if row_stride and row_stride < columns:
        raise ValueError(f"row_stride: expected 0 or at least {columns}, got {row_stride}")
    buffer = like.new_empty((rows, row_stride or columns), dtype=dtype)
    return buffer[:, :columns]


def scales(q: Quantised) -> torch.Tensor:
    """The scale of every block, (blocks,) float32."""
    if q.offset is None or q.nested_absmax is None or q.nested_code is None:
        return q.absmax
    outer = q.nested_absmax.repeat_interleave(q.nested_blocksize)[: q.absmax.numel()]
    return q.nested_code[q.absmax.long()] * outer + q.offset


def clear_behind(out: torch.Tensor, behind: int) -> None:
    """Zeros in as many columns behind the rows of ``out``, which has that room."""
    if behind:
        at = out.storage_offset() + out.shape[1]
        out.as_strided((out.shape[0], behind), (out.stride(0), 1), at).zero_()


def reference_into(out: torch.Tensor, q: Quantised, behind: int = 0) -> None:
    """Write the weight into ``out``, and zeros behind its rows, in plain PyTorch."""
    check(q, *out.shape)
    check_out(out, q)
    packed = q.packed.reshape(-1)
    nibbles = torch.stack((packed >> 4, packed & 15), -1).reshape(-1)[: out.numel()]
    scale = scales(q).repeat_interleave(q.blocksize)[: out.numel()]
    out.copy_((q.code[nibbles.long()] * scale).reshape(out.shape))
    clear_behind(out, behind)


def reference_fwd(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    offset: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    row_stride: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight in plain PyTorch; see the module's header."""
    q = Quantised(
        packed, absmax, code, offset, nested_absmax, nested_code, blocksize, nested_blocksize
    )
    out = new_output(packed, rows, columns, row_stride, dtype)
    reference_into(out, q)
    return out


# Without fusion: the scale is a product and a sum, each rounded.
_dequantize_blocks = Launcher(dequantize_blocks, enable_fp_fusion=False)
_dequantize_elements = Launcher(dequantize_elements, enable_fp_fusion=False)


def triton_into(out: torch.Tensor, q: Quantised, behind: int = 0) -> None:
    """Write the weight into ``out``, which may have any row stride, by a kernel.

    Args:
        behind: so many columns behind the rows, which ``out`` has room for, become zeros.
    """
    rows, columns = out.shape
    check(q, rows, columns)
    check_out(out, q)
    if out.numel() == 0:
        return
    out_row = out.stride(0)
    dense = not behind and (out_row == columns or rows == 1)
    whole = (out.numel() if dense else columns) % q.blocksize == 0
    tensors = (
        q.packed, q.absmax, q.code, q.offset, q.nested_absmax, q.nested_code, out
    )  # fmt: skip
    shared = (q.offset is not None, q.nested_blocksize, q.blocksize)
    with on_device_of(out):
        if whole:
            blocks, tile = out.numel() // q.blocksize, max(1, 4096 // q.blocksize)
            steps = 1 if dense else 2  # a wide output has more to compute before it can write
            _dequantize_blocks(
                (-(-blocks // (tile * steps)), 1), tensors,
                (blocks, columns // q.blocksize, out_row, behind),
                (*shared, dense, tile, steps, 1 << (behind - 1).bit_length() if behind else 0),
                warps=4,
            )  # fmt: skip
        else:
            numbers = (out.numel(), columns, out_row)
            grid = (-(-out.numel() // 1024), 1)
            _dequantize_elements(grid, tensors, numbers, (*shared, 1024), warps=4)
            clear_behind(out, behind)


def triton_fwd(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    offset: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    nested_blocksize: int,
    row_stride: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight by a kernel."""
    q = Quantised(
        packed, absmax, code, offset, nested_absmax, nested_code, blocksize, nested_blocksize
    )
    out = new_output(packed, rows, columns, row_stride, dtype)
    triton_into(out, q)
    return out


def _fake_fwd(packed: torch.Tensor, *rest: Any) -> torch.Tensor:
    rows, columns, _, _, row_stride, dtype = rest[5:]
    return new_output(packed, rows, columns, row_stride, dtype)


def _nothing(*_: Any) -> Sequence[Any]:
    return ()


OPS = (
    OpSpec(
        forward="nf4_dequantize(Tensor packed, Tensor absmax, Tensor code, Tensor? offset, "
        "Tensor? nested_absmax, Tensor? nested_code, int rows, int columns, int blocksize, "
        "int nested_blocksize, int row_stride, ScalarType dtype) -> Tensor weight",
        backward="",
        differentiable=(),
        outputs=1,
        save=_nothing,
        reference=(reference_fwd, _nothing),
        fake=(_fake_fwd, _nothing),
        triton=(triton_fwd, _nothing) if HAS_TRITON else None,
    ),
)
