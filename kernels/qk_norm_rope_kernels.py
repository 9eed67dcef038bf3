"""The Triton kernels of normalised and rotated heads, and their launches; see ``qk_norm_rope``.

A program takes one token at a time: it loads the token's cos and sin once and goes through the heads
of q and of k, HEADS of them at a time. The backward's programs walk over the tokens with the next
one's loads in flight and the weights' gradients in registers; ``column_sums`` adds the programs' sums
in a fixed order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fusewright.kernels import device
from fusewright.kernels.device import Limits
from fusewright.kernels.launch import on_device_of, tl, triton
from fusewright.kernels.launcher import Launcher
from fusewright.kernels.norm_sum_kernels import column_sums
from fusewright.kernels.norm_tiles import power_of_two
from fusewright.kernels.rope_kernels import (
    _angles,
    _features_contiguous,
    _load_pairs,
    _store_pairs,
    _strides,
    _table,
    _turn,
)

Maybe = torch.Tensor | None
Pair = tuple[torch.Tensor, torch.Tensor]


@triton.jit
def _mean(first, second, rest, width, SHORT: tl.constexpr):
    """The mean over each head of what its pairs and the features beyond them hold, as a column."""
    total = tl.sum(first + second, 1)
    if SHORT:
        total += tl.sum(rest, 1)
    return tl.div_rn(total, tl.full(total.shape, 0.0, tl.float32) + width)[:, None]


@triton.jit
def _beyond(there, ROTARY: tl.constexpr, WIDTH: tl.constexpr, PASS: tl.constexpr):
    """The columns that do not turn, and which of them exist."""
    columns = ROTARY + tl.arange(0, PASS)[None, :]
    return columns, there & (columns < WIDTH)


@triton.jit
def _gains(
    ptr, pairs, OFFSET: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr,
    PASS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """offset + w for the pairs and for the features beyond them, as rows; ones without a weight."""
    HALF: tl.constexpr = ROTARY // 2
    first = tl.full([1, pairs.shape[0]], 1.0, tl.float32)
    second = first
    rest = tl.full([1, PASS], 1.0, tl.float32)
    if ptr is not None:
        first, second = _angles(ptr, pairs, pairs < HALF, HALF, True, INTERLEAVED)
        first, second = first + OFFSET, second + OFFSET
        columns = ROTARY + tl.arange(0, PASS)[None, :]
        rest = tl.load(ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32) + OFFSET
    return first, second, rest


@triton.jit
def _rounded(t, like, ROUND: tl.constexpr):
    """``t`` with its values rounded to what ``like`` points to."""
    return t.to(like.dtype.element_ty).to(tl.float32) if ROUND else t


@triton.jit
def _heads_forward(
    x_ptr, out_ptr, rstd_ptr, gain1, gain2, gain3, c1, s1, c2, s2, pairs, heads, x_head, out_head,
    eps, ROUND_INPUT: tl.constexpr, ROUND_NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROTARY: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PASS: tl.constexpr,
    HEADS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The heads of one token of q or of k; the pointers are at the token."""
    HALF: tl.constexpr = ROTARY // 2
    SHORT: tl.constexpr = ROTARY < WIDTH
    for step in tl.static_range(STEPS):
        head = (step * HEADS + tl.arange(0, HEADS))[:, None]
        there = head < heads
        at = x_ptr + head.to(tl.int64) * x_head
        to = out_ptr + head.to(tl.int64) * out_head
        x1, x2 = _load_pairs(at, pairs, there, HALF, BLOCK, INTERLEAVED)
        x3 = x1
        if SHORT:
            columns, mask = _beyond(there, ROTARY, WIDTH, PASS)
            x3 = tl.load(at + columns, mask=mask, other=0.0).to(tl.float32)
        mean = _mean(x1 * x1, x2 * x2, x3 * x3, WIDTH, SHORT)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        tl.store(rstd_ptr + head, rstd, mask=there)
        n1 = _rounded(_rounded(x1 * rstd, x_ptr, ROUND_INPUT) * gain1, x_ptr, ROUND_NORM)
        n2 = _rounded(_rounded(x2 * rstd, x_ptr, ROUND_INPUT) * gain2, x_ptr, ROUND_NORM)
        y1, y2 = _turn(n1, n2, c1, s1, c2, s2, False)
        _store_pairs(to, y1, y2, pairs, there, HALF, BLOCK, INTERLEAVED)
        if SHORT:
            n3 = _rounded(_rounded(x3 * rstd, x_ptr, ROUND_INPUT) * gain3, x_ptr, ROUND_NORM)
            tl.store(to + columns, n3.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def qk_forward(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, q_rstd_ptr, k_rstd_ptr,
    cos_ptr, sin_ptr, tokens, q_heads, k_heads,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    table_batch, table_token, eps,
    OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, ROUND_NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr, FULL: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, PASS: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """q_out, k_out and both rstd of one token."""
    HALF: tl.constexpr = ROTARY // 2
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    pairs = tl.arange(0, BLOCK)
    there = pairs < HALF
    cos_at = cos_ptr + batch * table_batch + token * table_token
    sin_at = sin_ptr + batch * table_batch + token * table_token
    c1, c2 = _angles(cos_at, pairs, there, HALF, FULL, INTERLEAVED)
    s1, s2 = _angles(sin_at, pairs, there, HALF, FULL, INTERLEAVED)
    w1, w2, w3 = _gains(q_weight_ptr, pairs, OFFSET, ROTARY, WIDTH, PASS, INTERLEAVED)
    _heads_forward(
        q_ptr + batch * q_batch + token * q_token,
        q_out_ptr + batch * q_out_batch + token * q_out_token, q_rstd_ptr + row * q_heads,
        w1, w2, w3, c1, s1, c2, s2, pairs, q_heads, q_head, q_out_head, eps,
        ROUND_INPUT, ROUND_NORM, INTERLEAVED, ROTARY, WIDTH, BLOCK, PASS, Q_HEADS, STEPS,
    )  # fmt: skip
    w1, w2, w3 = _gains(k_weight_ptr, pairs, OFFSET, ROTARY, WIDTH, PASS, INTERLEAVED)
    _heads_forward(
        k_ptr + batch * k_batch + token * k_token,
        k_out_ptr + batch * k_out_batch + token * k_out_token, k_rstd_ptr + row * k_heads,
        w1, w2, w3, c1, s1, c2, s2, pairs, k_heads, k_head, k_out_head, eps,
        ROUND_INPUT, ROUND_NORM, INTERLEAVED, ROTARY, WIDTH, BLOCK, PASS, K_HEADS, STEPS,
    )  # fmt: skip


@triton.jit
def _added(total, t, WANTED: tl.constexpr):
    """The sum with the heads of a step added."""
    return total + t if WANTED else total


@triton.jit
def _heads_backward(
    dy_ptr, x_ptr, rstd_ptr, dx_ptr, dw1, dw2, dw3, gain1, gain2, gain3, c1, s1, c2, s2, pairs,
    heads, dy_head, x_head, dx_head,
    ROUND_INPUT: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PASS: tl.constexpr, HEADS: tl.constexpr,
    STEPS: tl.constexpr, STORE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Store dx of the heads of one token; the weight's sums with them added."""
    HALF: tl.constexpr = ROTARY // 2
    SHORT: tl.constexpr = ROTARY < WIDTH
    for step in tl.static_range(STEPS):
        head = (step * HEADS + tl.arange(0, HEADS))[:, None]
        there = head < heads
        at = x_ptr + head.to(tl.int64) * x_head
        dy_at = dy_ptr + head.to(tl.int64) * dy_head
        x1, x2 = _load_pairs(at, pairs, there, HALF, BLOCK, INTERLEAVED)
        y1, y2 = _load_pairs(dy_at, pairs, there, HALF, BLOCK, INTERLEAVED)
        rstd = tl.load(rstd_ptr + head, mask=there, other=0.0)
        d1, d2 = _turn(y1, y2, c1, s1, c2, s2, True)
        x1, x2 = x1 * rstd, x2 * rstd
        dw1 = _added(dw1, d1 * _rounded(x1, x_ptr, ROUND_INPUT), SUM)
        dw2 = _added(dw2, d2 * _rounded(x2, x_ptr, ROUND_INPUT), SUM)
        g1, g2 = d1 * gain1, d2 * gain2
        x3, g3 = x1, g1
        if SHORT:
            columns, mask = _beyond(there, ROTARY, WIDTH, PASS)
            x3 = tl.load(at + columns, mask=mask, other=0.0).to(tl.float32) * rstd
            d3 = tl.load(dy_at + columns, mask=mask, other=0.0).to(tl.float32)
            dw3 = _added(dw3, d3 * _rounded(x3, x_ptr, ROUND_INPUT), SUM)
            g3 = d3 * gain3
        if STORE:
            along = _mean(g1 * x1, g2 * x2, g3 * x3, WIDTH, SHORT)
            to = dx_ptr + head.to(tl.int64) * dx_head
            z1, z2 = rstd * (g1 - x1 * along), rstd * (g2 - x2 * along)
            _store_pairs(to, z1, z2, pairs, there, HALF, BLOCK, INTERLEAVED)
            if SHORT:
                z3 = rstd * (g3 - x3 * along)
                tl.store(to + columns, z3.to(dx_ptr.dtype.element_ty), mask=mask)
    return dw1, dw2, dw3


@triton.jit
def _store_sums(
    ptr, dw1, dw2, dw3, pairs, ROTARY: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PASS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """This program's row of a weight's partial sums, where they are wanted."""
    if ptr is not None:
        start = ptr + tl.program_id(0).to(tl.int64) * WIDTH
        one = tl.full([1, 1], 0, tl.int32) == 0
        first, second = tl.sum(dw1, 0)[None, :], tl.sum(dw2, 0)[None, :]
        _store_pairs(start, first, second, pairs, one, ROTARY // 2, BLOCK, INTERLEAVED)
        if ROTARY < WIDTH:
            columns, mask = _beyond(one, ROTARY, WIDTH, PASS)
            tl.store(start + columns, tl.sum(dw3, 0)[None, :], mask=mask)


@triton.jit
def qk_backward(
    dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_rstd_ptr, k_rstd_ptr,
    dq_ptr, dk_ptr, dq_weight_ptr, dk_weight_ptr, cos_ptr, sin_ptr, rows, tokens, q_heads, k_heads,
    dq_out_batch, dq_out_head, dq_out_token, dk_out_batch, dk_out_head, dk_out_token,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    dq_batch, dq_head, dq_token, dk_batch, dk_head, dk_token, table_batch, table_token,
    OFFSET: tl.constexpr, ROUND_INPUT: tl.constexpr, INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr, ROTARY: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PASS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dq and dk, and one row of partial sums of each weight's gradient per program.

    Q and K: whether anything is wanted of q and of k.
    """
    HALF: tl.constexpr = ROTARY // 2
    pairs = tl.arange(0, BLOCK)
    there = pairs < HALF
    QW: tl.constexpr = dq_weight_ptr is not None
    KW: tl.constexpr = dk_weight_ptr is not None
    q1 = tl.zeros([Q_HEADS if QW else 1, BLOCK if QW else 1], tl.float32)
    q2 = tl.zeros([Q_HEADS if QW else 1, BLOCK if QW else 1], tl.float32)
    q3 = tl.zeros([Q_HEADS if QW else 1, PASS if QW else 1], tl.float32)
    k1 = tl.zeros([K_HEADS if KW else 1, BLOCK if KW else 1], tl.float32)
    k2 = tl.zeros([K_HEADS if KW else 1, BLOCK if KW else 1], tl.float32)
    k3 = tl.zeros([K_HEADS if KW else 1, PASS if KW else 1], tl.float32)
    for at in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(at, tl.int64)
        batch, token = row // tokens, row % tokens
        cos_at = cos_ptr + batch * table_batch + token * table_token
        sin_at = sin_ptr + batch * table_batch + token * table_token
        c1, c2 = _angles(cos_at, pairs, there, HALF, FULL, INTERLEAVED)
        s1, s2 = _angles(sin_at, pairs, there, HALF, FULL, INTERLEAVED)
        if Q:
            # The weights come from the first cache each time: registers are what is short.
            w1, w2, w3 = _gains(q_weight_ptr, pairs, OFFSET, ROTARY, WIDTH, PASS, INTERLEAVED)
            to = dq_ptr
            if dq_ptr is not None:
                to = dq_ptr + batch * dq_batch + token * dq_token
            q1, q2, q3 = _heads_backward(
                dq_out_ptr + batch * dq_out_batch + token * dq_out_token,
                q_ptr + batch * q_batch + token * q_token, q_rstd_ptr + row * q_heads, to,
                q1, q2, q3, w1, w2, w3, c1, s1, c2, s2, pairs,
                q_heads, dq_out_head, q_head, dq_head, ROUND_INPUT, INTERLEAVED, ROTARY, WIDTH,
                BLOCK, PASS, Q_HEADS, STEPS, dq_ptr is not None, QW,
            )  # fmt: skip
        if K:
            w1, w2, w3 = _gains(k_weight_ptr, pairs, OFFSET, ROTARY, WIDTH, PASS, INTERLEAVED)
            to = dk_ptr
            if dk_ptr is not None:
                to = dk_ptr + batch * dk_batch + token * dk_token
            k1, k2, k3 = _heads_backward(
                dk_out_ptr + batch * dk_out_batch + token * dk_out_token,
                k_ptr + batch * k_batch + token * k_token, k_rstd_ptr + row * k_heads, to,
                k1, k2, k3, w1, w2, w3, c1, s1, c2, s2, pairs,
                k_heads, dk_out_head, k_head, dk_head, ROUND_INPUT, INTERLEAVED, ROTARY, WIDTH,
                BLOCK, PASS, K_HEADS, STEPS, dk_ptr is not None, KW,
            )  # fmt: skip
    _store_sums(dq_weight_ptr, q1, q2, q3, pairs, ROTARY, WIDTH, BLOCK, PASS, INTERLEAVED)
    _store_sums(dk_weight_ptr, k1, k2, k3, pairs, ROTARY, WIDTH, BLOCK, PASS, INTERLEAVED)


_forward, _backward, _sums = Launcher(qk_forward), Launcher(qk_backward), Launcher(column_sums)


class Tile(NamedTuple):
    """Heads of q and of k that a program takes at a time, how many times, and its warps."""

    q_heads: int
    k_heads: int
    steps: int
    warps: int


@functools.lru_cache(maxsize=512)
def tile(q_heads: int, k_heads: int, width: int, least: int, most: int, limits: Limits) -> Tile:
    """Up to ``least`` numbers of q at a time, or up to 4096 in two steps, and ``most`` threads."""
    heads = max(q_heads, k_heads)
    half = power_of_two(-(-heads // 2)) * power_of_two(width)
    at_once = max(1, min(4096, max(least, half)) // power_of_two(width))
    steps = -(-heads // at_once)
    q_step, k_step = (power_of_two(-(-h // steps)) for h in (q_heads, k_heads))
    threads = max(limits.warp, min(most, max(q_step, k_step) * power_of_two(width) // 4))
    return Tile(q_step, k_step, steps, threads // limits.warp)


def _shape(turn: Any, width: int) -> tuple[int | bool, ...]:
    """The kernels' constants from INTERLEAVED to PASS."""
    full = turn.cos.shape[-1] == turn.rotary_dim
    block, rest = power_of_two(turn.rotary_dim // 2), width - turn.rotary_dim
    passed = power_of_two(rest) if rest else 1
    return turn.layout == "interleaved", full, turn.rotary_dim, width, block, passed


def _contiguous(vector: Maybe) -> Maybe:
    return None if vector is None else vector.contiguous()


def _tables(turn: Any) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """cos and sin with the strides of batch and token that they share."""
    (cos, *strides), (sin, *others) = _table(turn.cos), _table(turn.sin)
    if strides != others:
        pair = torch.broadcast_tensors(cos, sin)
        (cos, *strides), (sin, *_) = (_table(t.contiguous()) for t in pair)
    return cos, sin, strides[0], strides[1]


def forward(
    xs: Pair, weights: tuple[Maybe, Maybe], made: tuple[torch.Tensor, ...], eps: float,
    norm: Any, turn: Any,
) -> None:  # fmt: skip
    """Fill q_out, k_out, and the dense rstd of both."""
    q, k = (_features_contiguous(x) for x in xs)
    assert q is not None and k is not None
    batch, q_heads, tokens, width = q.shape
    cut = tile(q_heads, k.shape[1], width, 4096, 256, device.limits(q.device))
    cos, sin, *table = _tables(turn)
    strides = [s for t in (q, k, made[0], made[1]) for s in _strides(t)]
    rounds = (norm.cast == "input", norm.dtype is q.dtype and q.dtype is not torch.float32)
    with on_device_of(q):
        _forward(
            (batch * tokens, 1),
            (q, k, *(_contiguous(w) for w in weights), *made, cos, sin),
            (tokens, q_heads, k.shape[1], *strides, *table, eps),
            (norm.offset, *rounds, *_shape(turn, width), *cut[:3]),
            cut.warps,
        )


def backward(
    dys: Pair, xs: Pair, weights: tuple[Maybe, Maybe], stats: Pair,
    grads: tuple[torch.Tensor, ...], norm: Any, turn: Any,
) -> None:  # fmt: skip
    """Fill those of dq, dk and the weights' gradients that are not empty."""
    dq_out, dk_out, q, k = (_features_contiguous(t) for t in (*dys, *xs))
    assert q is not None and k is not None
    batch, q_heads, tokens, width = q.shape
    dq, dk, dqw, dkw = (g if g.numel() else None for g in grads)
    limits, rows = device.limits(q.device), batch * tokens
    summing = dqw is not None or dkw is not None
    # Twice the bytes on their way need half the threads, which then have the registers.
    most = 512 if summing and q.element_size() == 2 else 256
    cut = tile(q_heads, k.shape[1], width, 2048, most, limits)
    programs = rows
    partial = None
    if summing:
        most = min(rows, max(1, 512 // (cut.warps * limits.warp)) * limits.multiprocessors)
        programs = -(-rows // -(-rows // most))
        partial = q.new_empty((2, programs, width), dtype=torch.float32)
    cos, sin, *table = _tables(turn)
    strides = [s for t in (dq_out, dk_out, q, k, dq, dk) for s in _strides(t)]
    sums = [None if partial is None or g is None else partial[i] for i, g in enumerate((dqw, dkw))]
    wanted = [dq is not None or dqw is not None, dk is not None or dkw is not None]
    # What a token's rows take of shared memory while they are on their way.
    held = (q_heads + k.shape[1]) * power_of_two(width) * (q.element_size() + dys[0].element_size())
    stages = max(1, min(3 if q.element_size() == 2 else 2, 1 + (limits.shared - 8192) // held))
    stages = stages if programs < rows else 1
    # Wavefronts have too few scalar registers for the strides of q and of k together.
    sides = [wanted] if limits.warp == 32 else [[wanted[0], False], [False, wanted[1]]]
    with on_device_of(q):
        for side in filter(any, sides):
            out = [t if side[i % 2] else None for i, t in enumerate((dq, dk, *sums))]
            _backward(
                (programs, 1),
                (dq_out, dk_out, q, k, *(_contiguous(w) for w in weights),
                 *(s.contiguous() for s in stats), *out, cos, sin),
                (rows, tokens, q_heads, k.shape[1], *strides, *table),
                (norm.offset, norm.cast == "input", *_shape(turn, width), *cut[:3],
                 stages, *side),
                cut.warps,
            )  # fmt: skip
        for row, result in zip(sums, (dqw, dkw), strict=True):
            if row is not None:
                _sums(
                    (-(-width // 8), 1),
                    (row, result, None),
                    (programs, width),
                    (max(8, min(512, power_of_two(programs))), 8),
                    4,
                )
