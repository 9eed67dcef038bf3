"""The Triton kernel of rotary embeddings and its launch; the mathematics is in ``rope``.

A program takes one token: it loads the token's cos and sin once and turns all heads of q and of k,
HEADS of them at a time, forth (``rotate``) or back (``unrotate``). Of halves a tile is two loads of
half a head's width; of interleaved features it is one load, split in registers, and likewise the
stores: x and y may differ in it. Every tensor has its own strides of batch, head and token; only features
must be contiguous.

Products are rounded before they are added, as eager rounds them. A compiler that joins a product and a sum
chooses which, and chooses otherwise in the next variant: bits would hang on how tensors are aligned.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fusewright.kernels import device
from fusewright.kernels.device import Limits
from fusewright.kernels.launch import on_device_of, tl, triton
from fusewright.kernels.launcher import Launcher

Maybe = torch.Tensor | None


@triton.jit
def _angles(ptr, pairs, there, HALF: tl.constexpr, FULL: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A table's values for the first and the second features of the pairs, as rows."""
    if not FULL:
        first = tl.load(ptr + pairs, mask=there, other=0.0).to(tl.float32)
        second = first
    elif INTERLEAVED:
        first = tl.load(ptr + 2 * pairs, mask=there, other=0.0).to(tl.float32)
        second = tl.load(ptr + 2 * pairs + 1, mask=there, other=0.0).to(tl.float32)
    else:
        first = tl.load(ptr + pairs, mask=there, other=0.0).to(tl.float32)
        second = tl.load(ptr + HALF + pairs, mask=there, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def _stored_pairs(
    ptr, pairs, there, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The first and the second features of every pair of some heads, as they are stored."""
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.load(ptr + both, mask=there & (both < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(x, (x.shape[0], BLOCK, 2)))
    else:
        mask = there & (pairs < HALF)[None, :]
        first = tl.load(ptr + pairs[None, :], mask=mask, other=0.0)
        second = tl.load(ptr + HALF + pairs[None, :], mask=mask, other=0.0)
    return first, second


@triton.jit
def _load_pairs(
    ptr, pairs, there, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The first and the second features of every pair of some heads, in float32."""
    first, second = _stored_pairs(ptr, pairs, there, HALF, BLOCK, INTERLEAVED)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(
    ptr, first, second, pairs, there,
    HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK)[None, :]
        y = tl.interleave(first, second).to(ptr.dtype.element_ty)
        tl.store(ptr + both, y, mask=there & (both < 2 * HALF))
    else:
        mask = there & (pairs < HALF)[None, :]
        tl.store(ptr + pairs[None, :], first.to(ptr.dtype.element_ty), mask=mask)
        tl.store(ptr + HALF + pairs[None, :], second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _turn(x1, x2, c1, s1, c2, s2, BACK: tl.constexpr):
    """``rotate``, or its transpose."""
    if BACK:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    return y1, y2


@triton.jit
def _pass(from_ptr, to_ptr, there, ROTARY: tl.constexpr, WIDTH: tl.constexpr, PASS: tl.constexpr):
    """Copy the features that do not turn."""
    columns = ROTARY + tl.arange(0, PASS)[None, :]
    mask = there & (columns < WIDTH)
    x = tl.load(from_ptr + columns, mask=mask, other=0.0)
    tl.store(to_ptr + columns, x.to(to_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, tokens, q_heads, k_heads,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    cos_batch, cos_token, sin_batch, sin_token,
    BACK: tl.constexpr, INTERLEAVED: tl.constexpr, TO_PAIRS: tl.constexpr, FULL: tl.constexpr,
    ROTARY: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PASS: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, STEPS: tl.constexpr, OVER: tl.constexpr,
):  # fmt: skip
    """q and k turned; either may be absent. INTERLEAVED: what is read; TO_PAIRS: what is written.

    OVER: they are written where they were read, so features that do not turn are there already.
    """
    HALF: tl.constexpr = ROTARY // 2
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    pairs = tl.arange(0, BLOCK)
    there = pairs < HALF
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * sin_batch + token * sin_token
    # The tables are laid out as y is, which the backward reads and the forward writes.
    c1, c2 = _angles(cos_ptr, pairs, there, HALF, FULL, INTERLEAVED if BACK else TO_PAIRS)
    s1, s2 = _angles(sin_ptr, pairs, there, HALF, FULL, INTERLEAVED if BACK else TO_PAIRS)
    for step in tl.static_range(STEPS):
        # Both are loaded before either is stored: more bytes are in flight.
        if q_ptr is not None:
            head = (step * Q_HEADS + tl.arange(0, Q_HEADS))[:, None]
            q_there = head < q_heads
            q_from = q_ptr + (batch * q_batch + token * q_token + head.to(tl.int64) * q_head)
            at = batch * q_out_batch + token * q_out_token + head.to(tl.int64) * q_out_head
            q_to = q_out_ptr + at
            q1, q2 = _load_pairs(q_from, pairs, q_there, HALF, BLOCK, INTERLEAVED)
        if k_ptr is not None:
            head = (step * K_HEADS + tl.arange(0, K_HEADS))[:, None]
            k_there = head < k_heads
            k_from = k_ptr + (batch * k_batch + token * k_token + head.to(tl.int64) * k_head)
            at = batch * k_out_batch + token * k_out_token + head.to(tl.int64) * k_out_head
            k_to = k_out_ptr + at
            k1, k2 = _load_pairs(k_from, pairs, k_there, HALF, BLOCK, INTERLEAVED)
        if OVER:
            tl.debug_barrier()  # another thread may be the one that stores where this one loads
        if q_ptr is not None:
            y1, y2 = _turn(q1, q2, c1, s1, c2, s2, BACK)
            _store_pairs(q_to, y1, y2, pairs, q_there, HALF, BLOCK, TO_PAIRS)
            if ROTARY < WIDTH and not OVER:
                _pass(q_from, q_to, q_there, ROTARY, WIDTH, PASS)
        if k_ptr is not None:
            y1, y2 = _turn(k1, k2, c1, s1, c2, s2, BACK)
            _store_pairs(k_to, y1, y2, pairs, k_there, HALF, BLOCK, TO_PAIRS)
            if ROTARY < WIDTH and not OVER:
                _pass(k_from, k_to, k_there, ROTARY, WIDTH, PASS)


_launch = Launcher(rope_kernel, enable_fp_fusion=False)


class Tile(NamedTuple):
    """Heads of q and of k that a program takes at a time, how many times, and its warps."""

    q_heads: int
    k_heads: int
    steps: int
    warps: int


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length() if n else 1


@functools.lru_cache(maxsize=512)
def tile(q_heads: int, k_heads: int, width: int, limits: Limits) -> Tile:
    """Up to 4096 numbers of q at a time, 16 to a thread."""
    most = max(1, 4096 // _power_of_two(width))
    steps = max(1, -(-max(q_heads, k_heads) // most))
    q_step, k_step = (_power_of_two(-(-h // steps)) for h in (q_heads, k_heads))
    threads = max(q_step, k_step) * _power_of_two(width) // 16
    return Tile(q_step, k_step, steps, max(1, min(8 * 32, threads) // limits.warp))


def _strides(t: Maybe) -> tuple[int, int, int]:
    if t is None:
        return 0, 0, 0
    batch, head, token, _ = t.stride()
    return batch, head, token


def _features_contiguous(t: Maybe) -> Maybe:
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _table(table: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """A table with its strides of batch and token, 0 where it is broadcast."""
    if table.stride(-1) != 1:
        table = table.contiguous()
    shape, strides = table.shape, table.stride()
    token = strides[-2] if len(shape) > 1 and shape[-2] > 1 else 0
    batch = strides[-4] if len(shape) > 3 and shape[-4] > 1 else 0
    return table, batch, token


def turn(
    q: Maybe,
    k: Maybe,
    q_out: Maybe,
    k_out: Maybe,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    back: bool,
    over: bool = False,
) -> None:
    """Turn q into q_out and k into k_out; either pair may be absent, and empty tensors are left.

    ``over``: q_out is q and k_out is k, whose features are contiguous and which do not overlap.
    """
    q, k = (_features_contiguous(t) for t in (q, k))
    shaped = q if q is not None else k
    if shaped is None or not shaped.shape[0] * shaped.shape[2] * shaped.shape[3]:
        return
    heads = [0 if t is None else t.shape[1] for t in (q, k)]
    width, half = shaped.shape[3], rotary_dim // 2
    cut = tile(*heads, width, device.limits(shaped.device))
    ends = (layout.startswith("interleaved"), layout == "interleaved")
    given, made = ends[::-1] if back else ends
    cos, *cos_strides = _table(cos)
    sin, *sin_strides = _table(sin)
    with on_device_of(shaped):
        _launch(
            (shaped.shape[0] * shaped.shape[2], 1),
            (q, k, q_out, k_out, cos, sin),
            (shaped.shape[2], *heads, *_strides(q), *_strides(k), *_strides(q_out),
             *_strides(k_out), *cos_strides, *sin_strides),
            (back, given, made, cos.shape[-1] == rotary_dim, rotary_dim, width,
             _power_of_two(half), _power_of_two(width - rotary_dim), *cut[:3], over),
            cut.warps,
        )  # fmt: skip
