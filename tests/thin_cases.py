"""Launches of the thin products at the shapes of real models, on tensors that hold nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fusewright.kernels import device, thin_copies
from fusewright.kernels.normed import Norm
from fusewright.kernels.thin import Copy, Term, Wide, thin

BF16, FP32 = torch.bfloat16, torch.float32


def _empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def forward(
    tokens: int, width: int, ranks: list[int], dtype: torch.dtype, thin_dtype: torch.dtype
) -> Callable[[], object]:
    """x A^T of siblings, written behind x, with the refresh of B's columns."""
    buffer = _empty(tokens, width + -(-3 * sum(ranks) // 64) * 64, dtype=dtype)
    x, total = buffer[:, :width], sum(ranks)
    downs = [_empty(r, width, dtype=thin_dtype) for r in ranks]
    ups = [_empty(512, r, dtype=thin_dtype) for r in ranks]
    weight = _empty(512, buffer.shape[1], dtype=dtype)
    step = total if thin_dtype is FP32 and dtype is not FP32 else 0
    end = width + total * (3 if step else 1)
    wide = Wide(buffer, [None], step, (end, buffer.shape[1]))
    starts = [width + sum(ranks[:i]) for i in range(len(ranks))]
    terms = [Term(0, a, True, 2.0, c) for a, c in zip(downs, starts, strict=True)]
    copies = [
        Copy(b, weight[:, c : c + b.shape[1]], step) for b, c in zip(ups, starts, strict=True)
    ]
    return lambda: thin([x], terms, wide, copies)


def backward(
    tokens: int, widths: list[int], r: int, dtype: torch.dtype, thin_dtype: torch.dtype, copy: bool
) -> Callable[[], object]:
    """dy B and dB of siblings from one read of their dy, copied into one buffer with ``copy``."""
    dys = [_empty(tokens, w, dtype=dtype) for w in widths]
    total, starts = sum(widths), [sum(widths[:i]) for i in range(len(widths))]
    buffer = _empty(tokens, total + 3 * r * len(widths) + 64, dtype=dtype)
    step = r * len(widths) if thin_dtype is FP32 and dtype is not FP32 else 0
    end = total + r * len(widths) * (3 if step else 1)
    wide = Wide(buffer, starts, step, (end, buffer.shape[1])) if copy else None
    terms = [
        Term(
            i, _empty(w, r, dtype=thin_dtype), False, 2.0, total + i * r if copy else None,
            left=_empty(tokens, r, dtype=thin_dtype),
        )
        for i, w in enumerate(widths)
    ]  # fmt: skip
    return lambda: thin(dys, terms, wide)


def left(
    tokens: int, width: int, ranks: list[int], dtype: torch.dtype, thin_dtype: torch.dtype
) -> Callable[[], object]:
    """dA = P^T x of siblings from one read of x."""
    x = _empty(tokens, width, dtype=dtype)
    terms = [Term(0, left=_empty(tokens, r, dtype=thin_dtype), left_transposed=True) for r in ranks]
    return lambda: thin([x], terms)


def normed(
    tokens: int, width: int, ranks: list[int], dtype: torch.dtype, thin_dtype: torch.dtype
) -> Callable[[], object]:
    """The same of an RMS norm's output, made of its input."""
    x, norm = _empty(tokens, width, dtype=dtype), Norm(_empty(width), _empty(tokens, dtype=FP32), 0.0, "input")  # fmt: skip
    terms = [Term(0, left=_empty(tokens, r, dtype=thin_dtype), left_transposed=True) for r in ranks]
    return lambda: thin([x], terms, norm=norm)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """What test_kernels_thin compiles for every target."""
    for dtype, thin_dtype in ((BF16, BF16), (BF16, FP32), (FP32, FP32)):
        for r in (16, 32, 64):
            name = f"{dtype} {thin_dtype} {r}"
            yield f"{name} forward", forward(4096, 4096, [r] * 3, dtype, thin_dtype)
            yield f"{name} both", backward(4096, [14336] * 2, r, dtype, thin_dtype, False)
            yield f"{name} copy", backward(4096, [4096, 1024, 1024], r, dtype, thin_dtype, True)
            yield f"{name} left", left(4096, 4096, [r] * 3, dtype, thin_dtype)
            # Elsewhere adapters' gradients read a norm's output: see ``lora_products.left``.
            if dtype is BF16 and device.ptx(device.limits(torch.device("cpu"))):
                yield f"{name} normed", normed(4096, 4096, [r] * 3, dtype, thin_dtype)
    source, target = _empty(4096, 64, dtype=FP32), _empty(4096, 192)
    yield "copies alone", lambda: thin_copies.run([Copy(source, target[:, :64], 64)])
    yield "forward 16 wide", forward(4096, 14336, [16], BF16, BF16)
    yield "forward half", forward(4096, 4096, [8], torch.float16, torch.float16)
    yield "one rank", backward(4096, [8192], 256, BF16, BF16, False)
