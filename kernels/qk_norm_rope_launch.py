"""Launches of the kernels of normalised and rotated heads: tiles, strides, partial sums.

Tiles depend on the shapes, the dtypes and the device, never on a measurement or on what else runs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fusewright.kernels import device
from fusewright.kernels.device import Limits
from fusewright.kernels.launch import on_device_of
from fusewright.kernels.launcher import Launcher
from fusewright.kernels.norm_tiles import power_of_two
from fusewright.kernels.qk_norm_rope_kernels import qk_backward, qk_forward, side_sums
from fusewright.kernels.rope_kernels import _features_contiguous, _strides, _table

Maybe = torch.Tensor | None
Pair = tuple[torch.Tensor, torch.Tensor]
_forward, _backward, _sums = Launcher(qk_forward), Launcher(qk_backward), Launcher(side_sums)


class Tile(NamedTuple):
    """Rows that a program takes at a time, and its warps.

    With ``per_sm`` programs per multiprocessor each walks over the rows, as sums need it, and with
    ``ahead`` has the next ones in flight, in registers; with 0 there are as many programs as tiles.
    """

    rows: int
    warps: int
    per_sm: int = 0
    ahead: bool = False


def _tile(width: int, itemsize: int, limits: Limits, per_sm: int = 0, ahead: bool = False) -> Tile:
    """16 numbers a thread: 16 bytes of each half of a head.

    In float32 the order of a sum shows: a program adds a tile's rows up last, so it has few of them.
    """
    block = power_of_two(width)
    rows = max(1, min(4 if itemsize == 4 else 64, 2048 // block))
    threads = max(limits.warp, min(128, rows * block // 16)) if itemsize == 4 else 128
    return Tile(rows, threads // limits.warp, per_sm, ahead)


@functools.lru_cache(maxsize=512)
def forward_tile(width: int, itemsize: int, limits: Limits) -> Tile:
    """The tile of a forward."""
    return _tile(width, itemsize, limits)


@functools.lru_cache(maxsize=512)
def backward_tile(width: int, itemsize: int, summing: bool, limits: Limits) -> Tile:
    """The tile of a backward; with sums, as many programs as registers allow."""
    if summing:
        return _tile(width, itemsize, limits, 8 if itemsize == 4 else 5, itemsize == 2)
    return _tile(width, itemsize, limits)


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
    cut = forward_tile(width, q.element_size(), device.limits(q.device))
    rows = [batch * tokens * t.shape[1] for t in (q, k)]
    programs = [-(-n // cut.rows) for n in rows]
    cos, sin, *table = _tables(turn)
    strides = [s for t in (q, k, made[0], made[1]) for s in _strides(t)]
    rounds = (norm.cast == "input", norm.dtype is q.dtype and q.dtype is not torch.float32)
    with on_device_of(q):
        _forward(
            (sum(programs), 1),
            (q, k, *(_contiguous(w) for w in weights), *made, cos, sin),
            (programs[0], *rows, tokens, *strides, *table, eps),
            (q_heads, k.shape[1], norm.offset, *rounds, *_shape(turn, width), cut.rows),
            cut.warps,
        )


def _walking(tiles: list[int], most: int) -> list[int]:
    """How many programs walk over the tiles of each side: so many in all, with tiles spread evenly."""
    programs = []
    for count in tiles:
        share = max(1, min(count, most * count // max(1, sum(tiles))))
        programs.append(-(-count // -(-count // share)) if count else 0)
    return programs


def backward(
    dys: Pair, xs: Pair, weights: tuple[Maybe, Maybe], stats: Pair,
    grads: tuple[torch.Tensor, ...], norm: Any, turn: Any,
) -> None:  # fmt: skip
    """Fill those of dq, dk and the weights' gradients that are not empty."""
    dq_out, dk_out, q, k = (_features_contiguous(t) for t in (*dys, *xs))
    assert q is not None and k is not None
    batch, q_heads, tokens, width = q.shape
    heads = (q_heads, k.shape[1])
    dq, dk, dqw, dkw = (g if g.numel() else None for g in grads)
    limits = device.limits(q.device)
    wanted = [dq is not None or dqw is not None, dk is not None or dkw is not None]
    summing = dqw is not None or dkw is not None
    cut = backward_tile(width, q.element_size(), summing, limits)
    rows = [batch * tokens * n for n in heads]
    programs = [-(-n // cut.rows) if side else 0 for n, side in zip(rows, wanted, strict=True)]
    if cut.per_sm:
        programs = _walking(programs, cut.per_sm * limits.multiprocessors)
    sums: list[Maybe] = [None, None]
    if summing:
        partial = q.new_empty((sum(programs), width), dtype=torch.float32).split(programs)
        sums = [None if g is None else p for p, g in zip(partial, (dqw, dkw), strict=True)]
    cos, sin, *table = _tables(turn)
    strides = [s for t in (dq_out, dk_out, q, k, dq, dk) for s in _strides(t)]
    # Wavefronts have too few scalar registers for the strides of q and of k together.
    sides = [wanted] if limits.warp == 32 else [[wanted[0], False], [False, wanted[1]]]
    with on_device_of(q):
        for side in filter(any, sides):
            out = [t if side[i % 2] else None for i, t in enumerate((dq, dk, *sums))]
            count = [p if one else 0 for p, one in zip(programs, side, strict=True)]
            _backward(
                (sum(count), 1),
                (dq_out, dk_out, q, k, *(_contiguous(w) for w in weights),
                 *(s.contiguous() for s in stats), *out, cos, sin),
                (*count, *rows, tokens, *strides, *table),
                (*heads, norm.offset, norm.cast == "input", *_shape(turn, width),
                 cut.rows, cut.ahead, *side),
                cut.warps,
            )  # fmt: skip
        if summing:
            _sums(
                (-(-width // 8), 2),
                (*sums, dqw, dkw),
                (*programs,),
                (width, max(8, min(512, power_of_two(max(programs)))), 8),
                4,
            )
