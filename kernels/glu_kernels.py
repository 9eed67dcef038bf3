"""Triton kernels of gated linear units and plain activations; the mathematics is in ``glu``.

A program takes BLOCK columns of one row: up to three loads, some thirty operations an element, one
or two stores. Rows may lie any distance apart. The packed layouts differ only in where gate and up
are found: two offsets for the halves, one load of 2 BLOCK adjacent numbers for interleaved pairs.
BLOCK and the number of warps depend on the width and the dtypes alone.
"""

from __future__ import annotations

import torch

from fusewright.kernels.elementary import up_and_slope, value, value_and_slope
from fusewright.kernels.launch import on_device_of, row_stride, rows_of, tl, triton
from fusewright.kernels.launcher import Launcher

_FLAT = 2**30  # columns are counted in 32 bits


@triton.jit
def _clamp(gate, up, limit):
    """min(gate, limit) and up within +-limit; NaN stays NaN."""
    g = tl.where(gate > limit, limit, gate)
    u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return g, u


@triton.jit
def _place(width, column_blocks, BLOCK: tl.constexpr):
    """The row of this program, its first column, its columns and which of them exist."""
    pid = tl.program_id(0)
    row = (pid // column_blocks).to(tl.int64)
    first = (pid % column_blocks) * BLOCK
    columns = first + tl.arange(0, BLOCK)
    return row, first, columns, columns < width


@triton.jit
def _load_pair(
    gate_ptr, up_ptr, row, gate_row, up_row, first, columns, inside, width,
    INTERLEAVED: tl.constexpr, GATE_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gate and up of this program's columns, in float32."""
    if INTERLEAVED:
        pairs = 2 * first + tl.arange(0, 2 * BLOCK)
        both = tl.load(gate_ptr + row * gate_row + pairs, mask=pairs < 2 * width, other=0.0)
        even, odd = tl.split(tl.reshape(both.to(tl.float32), (BLOCK, 2)))
        gate = even if GATE_FIRST else odd
        up = odd if GATE_FIRST else even
    else:
        gate = tl.load(gate_ptr + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def glu_forward(
    gate_ptr, up_ptr, y_ptr, gate_at, up_at, gate_row, up_row, y_row, width, column_blocks,
    alpha, limit,
    ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr,
    GATE_FIRST: tl.constexpr, PRECISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = act(gate) up, or the clamped form."""
    row, first, columns, inside = _place(width, column_blocks, BLOCK)
    gate, up = _load_pair(
        gate_ptr + gate_at, up_ptr + up_at, row, gate_row, up_row, first, columns, inside, width,
        INTERLEAVED, GATE_FIRST, BLOCK,
    )  # fmt: skip
    if CLAMPED:
        g, u = _clamp(gate, up, limit)
        y = (u + 1.0) * value(g, alpha, "swish", PRECISE)
    else:
        h, _ = up_and_slope(up, ACTIVATION, PRECISE)
        y = value(gate, alpha, ACTIVATION, PRECISE) * h
    tl.store(y_ptr + row * y_row + columns, y, mask=inside)


@triton.jit
def glu_backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, y_ptr, gate_at, up_at,
    dy_row, gate_row, up_row, out_row, y_row, width, column_blocks, alpha, limit,
    ACTIVATION: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr,
    GATE_FIRST: tl.constexpr, NEED_GATE: tl.constexpr, NEED_UP: tl.constexpr,
    NEED_Y: tl.constexpr, PRECISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate = dy up act'(gate) and dup = dy act(gate), or those of the clamped form.

    The outputs are laid out like a dense packed input, or are two dense tensors. With NEED_Y the
    forward's result is written once more, by the forward's own expression.
    """
    row, first, columns, inside = _place(width, column_blocks, BLOCK)
    gate, up = _load_pair(
        gate_ptr + gate_at, up_ptr + up_at, row, gate_row, up_row, first, columns, inside, width,
        INTERLEAVED, GATE_FIRST, BLOCK,
    )  # fmt: skip
    dy = tl.load(dy_ptr + row * dy_row + columns, mask=inside, other=0.0).to(tl.float32)
    if CLAMPED:
        g, u = _clamp(gate, up, limit)
        act, slope = value_and_slope(g, alpha, "swish", PRECISE)
        dgate = tl.where(gate > limit, 0.0, dy * (u + 1.0) * slope)
        dup = tl.where(tl.abs(up) > limit, 0.0, dy * act)
        y = (u + 1.0) * act
    else:
        act, slope = value_and_slope(gate, alpha, ACTIVATION, PRECISE)
        h, up_slope = up_and_slope(up, ACTIVATION, PRECISE)
        dgate = dy * h * slope
        dup = dy * act * up_slope
        y = act * h
    if NEED_Y:
        tl.store(y_ptr + row * y_row + columns, y, mask=inside)
    if INTERLEAVED:
        both = tl.interleave(dgate, dup) if GATE_FIRST else tl.interleave(dup, dgate)
        pairs = 2 * first + tl.arange(0, 2 * BLOCK)
        tl.store(dgate_ptr + row * out_row + pairs, both, mask=pairs < 2 * width)
    else:
        if NEED_GATE:
            tl.store(dgate_ptr + gate_at + row * out_row + columns, dgate, mask=inside)
        if NEED_UP:
            tl.store(dup_ptr + up_at + row * out_row + columns, dup, mask=inside)


@triton.jit
def activation_forward(
    x_ptr, y_ptr, x_row, y_row, width, column_blocks,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = act(x)."""
    row, _, columns, inside = _place(width, column_blocks, BLOCK)
    x = tl.load(x_ptr + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    y = value(x, 1.0, ACTIVATION, PRECISE)
    tl.store(y_ptr + row * y_row + columns, y, mask=inside)


@triton.jit
def activation_backward(
    dy_ptr, x_ptr, dx_ptr, dy_row, x_row, dx_row, width, column_blocks,
    ACTIVATION: tl.constexpr, PRECISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dy act'(x)."""
    row, _, columns, inside = _place(width, column_blocks, BLOCK)
    x = tl.load(x_ptr + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_row + columns, mask=inside, other=0.0).to(tl.float32)
    _, slope = value_and_slope(x, 1.0, ACTIVATION, PRECISE)
    tl.store(dx_ptr + row * dx_row + columns, dy * slope, mask=inside)


_glu_forward = Launcher(glu_forward, enable_fp_fusion=True)
_glu_backward = Launcher(glu_backward, enable_fp_fusion=True)
_activation_forward = Launcher(activation_forward, enable_fp_fusion=True)
_activation_backward = Launcher(activation_backward, enable_fp_fusion=True)


def _block(width: int, largest: int) -> int:
    """The power of two that covers the width, at most ``largest``."""
    return min(largest, 1 << max(width - 1, 1).bit_length())


def _shape(width: int, elements: int, dense: bool) -> tuple[int, int]:
    """(rows, width), as one long row where every tensor is dense."""
    if dense and elements < _FLAT:
        return 1, elements
    return elements // width, width


def launch_forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    y: torch.Tensor,
    activation: str,
    clamp: tuple[float, float] | None = None,
) -> None:
    """Write act(gate) up, or the clamped form, into ``y`` (any even row stride)."""
    (gate, gate_row), (up, up_row), y_row = rows_of(gate), rows_of(up), row_stride(y)
    width = gate.shape[-1]
    dense = gate_row == up_row == y_row == width
    rows, columns = _shape(width, gate.numel(), dense)
    _forward(gate, up, y, 0, 0, gate_row, up_row, y_row, rows, columns, activation, clamp, None)


def launch_packed_forward(
    gate_up: torch.Tensor,
    y: torch.Tensor,
    activation: str,
    gate_first: bool,
    interleaved: bool,
    clamp: tuple[float, float] | None = None,
) -> None:
    """The same from a packed input."""
    gate_up, step = rows_of(gate_up)
    width = y.shape[-1]
    dense = interleaved and step == 2 * width and row_stride(y) == width
    rows, columns = _shape(width, y.numel(), dense)
    at = _offsets(width, gate_first, interleaved)
    _forward(
        gate_up, gate_up, y, *at, step, step, row_stride(y), rows, columns, activation, clamp,
        gate_first if interleaved else None,
    )  # fmt: skip


def _offsets(width: int, gate_first: bool, interleaved: bool) -> tuple[int, int]:
    if interleaved:
        return 0, 0
    return (0, width) if gate_first else (width, 0)


def _forward(
    gate, up, y, gate_at, up_at, gate_row, up_row, y_row, rows, width, activation, clamp,
    interleaved,
) -> None:  # fmt: skip
    """``interleaved`` is None, or whether the gate comes first of each pair."""
    block = _block(width, 2048 if gate.element_size() == 2 else 1024)
    column_blocks = -(-width // block)
    alpha, limit = clamp or (1.0, 0.0)
    with on_device_of(gate):
        _glu_forward(
            (rows * column_blocks, 1),
            (gate, up, y),
            (gate_at, up_at, gate_row, up_row, y_row, width, column_blocks, alpha, limit),
            (activation, clamp is not None, interleaved is not None, interleaved is True,
             gate.dtype is torch.float32, block),
            warps=4,
        )  # fmt: skip


def launch_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
    activation: str,
    clamp: tuple[float, float] | None = None,
    y: torch.Tensor | None = None,
) -> None:
    """Write the gradients into dense tensors; None for one that is not wanted.

    The forward's result goes into the dense ``y``, if it is given.
    """
    (dy, dy_row), (gate, gate_row), (up, up_row) = rows_of(dy), rows_of(gate), rows_of(up)
    width = gate.shape[-1]
    dense = dy_row == gate_row == up_row == width
    rows, columns = _shape(width, gate.numel(), dense)
    _backward(
        dy, gate, up, dgate, dup, 0, 0, dy_row, gate_row, up_row, width, rows, columns,
        activation, clamp, None, y, width,
    )  # fmt: skip


def launch_packed_backward(
    dy: torch.Tensor,
    gate_up: torch.Tensor,
    dgate_up: torch.Tensor,
    activation: str,
    gate_first: bool,
    interleaved: bool,
    clamp: tuple[float, float] | None = None,
    y: torch.Tensor | None = None,
) -> None:
    """Write both gradients into one buffer laid out like ``gate_up`` (any even row stride).

    The forward's result goes into ``y`` (any even row stride), if it is given.
    """
    (dy, dy_row), (gate_up, step), out_row = rows_of(dy), rows_of(gate_up), row_stride(dgate_up)
    width = dy.shape[-1]
    y_row = width if y is None else row_stride(y)
    dense = interleaved and step == out_row == 2 * width and dy_row == y_row == width
    rows, columns = _shape(width, dy.numel(), dense)
    at = _offsets(width, gate_first, interleaved)
    _backward(
        dy, gate_up, gate_up, dgate_up, dgate_up, *at, dy_row, step, step, out_row, rows,
        columns, activation, clamp, gate_first if interleaved else None, y, y_row,
    )  # fmt: skip


def _backward(
    dy, gate, up, dgate, dup, gate_at, up_at, dy_row, gate_row, up_row, out_row, rows, width,
    activation, clamp, interleaved, y=None, y_row=0,
) -> None:  # fmt: skip
    block = _block(width, 1024)
    column_blocks = -(-width // block)
    alpha, limit = clamp or (1.0, 0.0)
    with on_device_of(gate):
        _glu_backward(
            (rows * column_blocks, 1),
            (dy, gate, up, dgate, dup, y),
            (gate_at, up_at, dy_row, gate_row, up_row, out_row, y_row, width, column_blocks, alpha,
             limit),
            (activation, clamp is not None, interleaved is not None, interleaved is True,
             dgate is not None, dup is not None, y is not None, gate.dtype is torch.float32, block),
            warps=4,
        )  # fmt: skip


def launch_activation_forward(x: torch.Tensor, y: torch.Tensor, activation: str) -> None:
    """Write act(x) into ``y`` (any even row stride)."""
    (x, x_row), y_row = rows_of(x), row_stride(y)
    if y_row is None:
        raise ValueError(f"y: expected rows at an even distance, got strides {y.stride()}")
    width = x.shape[-1]
    rows, columns = _shape(width, x.numel(), x_row == y_row == width)
    block = _block(columns, 2048 if x.element_size() == 2 else 1024)
    column_blocks = -(-columns // block)
    with on_device_of(x):
        _activation_forward(
            (rows * column_blocks, 1),
            (x, y),
            (x_row, y_row, columns, column_blocks),
            (activation, x.dtype is torch.float32, block),
            warps=4,
        )


def launch_activation_backward(
    dy: torch.Tensor, x: torch.Tensor, dx: torch.Tensor, activation: str
) -> None:
    """Write dy act'(x) into the dense ``dx``."""
    (dy, dy_row), (x, x_row) = rows_of(dy), rows_of(x)
    width = x.shape[-1]
    rows, columns = _shape(width, x.numel(), dy_row == x_row == width)
    block = _block(columns, 2048 if x.element_size() == 2 else 1024)
    column_blocks = -(-columns // block)
    with on_device_of(x):
        _activation_backward(
            (rows * column_blocks, 1),
            (dy, x, dx),
            (dy_row, x_row, width, columns, column_blocks),
            (activation, x.dtype is torch.float32, block),
            warps=4,
        )
