"""Rotary position embedding of queries and keys: y = x cos + R(x) sin on the first features.

Shapes: q (B, Hq, T, D), k (B, Hk, T, D) or absent, with any strides; cos, sin broadcastable to
(B, 1, T, W) where W is ``rotary_dim`` or, when both features of a pair share their angle,
``rotary_dim / 2``. Outputs have the inputs' shapes and lie in memory in the inputs' order (usually
they are views of a (B, T, H, D) buffer), as do the gradients; without k, k_out has shape (0,).
Features from ``rotary_dim`` on pass through. Saved: cos and sin, no activation.

The features form pairs (x1, x2): (x_i, x_{i + W/2}) in the layout "half" and (x_2i, x_2i+1) in
the layout "interleaved". In the layout "interleaved_to_half" x is interleaved and y, like cos and
sin, halved. cos and sin of the two features of a pair are c1, s1 and c2, s2:

    y1 = x1 c1 - x2 s1          y2 = x2 c2 + x1 s2

The backward is the transpose of that 2 x 2 matrix, which needs no c1 = c2 or s1 = s2:

    dx1 = dy1 c1 + dy2 s2       dx2 = dy2 c2 - dy1 s1

Where it rounds: computed in float32 from the inputs as they are, rounded once at the output.
cos and sin are tables; they receive no gradient.

Source: J. Su et al., "Enhanced Transformer with Rotary Position Embedding", 2021.
Traffic: reads x and writes y once, both directions; the tables once for all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fusewright.kernels import rope_kernels
from fusewright.kernels.launch import launchable
from fusewright.kernels.reduce import absent, compute_dtype
from fusewright.kernels.rows import check_rows, empty_ordered, leading_order
from fusewright.kernels.spec import OpSpec

LAYOUTS = ("half", "interleaved", "interleaved_to_half")
_Pair = tuple[torch.Tensor, torch.Tensor]


class Angles(NamedTuple):
    """cos and sin of the first and of the second feature of every pair."""

    c1: Any
    s1: Any
    c2: Any
    s2: Any


def rotate(x1: Any, x2: Any, a: Angles) -> tuple[Any, Any]:
    """The rotated pair, over tensors or symbols."""
    return x1 * a.c1 - x2 * a.s1, x2 * a.c2 + x1 * a.s2


def unrotate(dy1: Any, dy2: Any, a: Angles) -> tuple[Any, Any]:
    """The gradient of the pair: the transpose of ``rotate``."""
    return dy1 * a.c1 + dy2 * a.s2, dy2 * a.c2 - dy1 * a.s1


def ends(layout: str) -> tuple[str, str]:
    """The layouts of x and of y."""
    return ("interleaved", "half") if layout == "interleaved_to_half" else (layout, layout)


def split(x: torch.Tensor, layout: str) -> _Pair:
    """Views of the first and the second features of the pairs of ``x``, which is one end's."""
    half = x.shape[-1] // 2
    if layout == "half":
        return x[..., :half], x[..., half:]
    return x[..., 0::2], x[..., 1::2]


def _angles(
    cos: torch.Tensor, sin: torch.Tensor, layout: str, rotary_dim: int, dtype: torch.dtype
) -> Angles:
    cos, sin = cos.to(dtype), sin.to(dtype)
    if cos.shape[-1] * 2 == rotary_dim:
        return Angles(cos, sin, cos, sin)
    (c1, c2), (s1, s2) = (split(table, ends(layout)[1]) for table in (cos, sin))
    return Angles(c1, s1, c2, s2)


def check(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
) -> None:
    """Refuse wrong shapes, dtypes, devices and layouts, by name."""
    check_rows(q, "q")
    if q.dim() != 4:
        raise ValueError(f"q: expected (batch, heads, tokens, features), got {tuple(q.shape)}")
    batch, _, tokens, width = q.shape
    if k is not None:
        if k.dim() != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (batch, tokens, width):
            raise ValueError(
                f"k: expected shape ({batch}, heads, {tokens}, {width}), got {tuple(k.shape)}"
            )
        if k.dtype != q.dtype or k.device != q.device:
            raise TypeError(
                f"k: expected {q.dtype} on {q.device} like q, got {k.dtype} on {k.device}"
            )
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    if rotary_dim % 2 or not 0 < rotary_dim <= width:
        raise ValueError(f"rotary_dim: expected an even number up to {width}, got {rotary_dim}")
    _check_table(cos, q, rotary_dim, "cos")
    _check_table(sin, q, rotary_dim, "sin")
    if cos.shape[-1] != sin.shape[-1]:
        raise ValueError(f"sin: expected width {cos.shape[-1]} like cos, got {sin.shape[-1]}")


def _check_table(table: torch.Tensor, q: torch.Tensor, rotary_dim: int, name: str) -> None:
    check_rows(table, name)
    allowed = ((1, q.shape[0]), (1,), (1, q.shape[2]), (rotary_dim, rotary_dim // 2))
    sizes = (1,) * (4 - table.dim()) + tuple(table.shape)
    if len(sizes) != 4 or any(n not in a for n, a in zip(sizes, allowed, strict=True)):
        raise ValueError(
            f"{name}: expected a shape broadcastable to ({q.shape[0]}, 1, {q.shape[2]}, "
            f"{rotary_dim} or {rotary_dim // 2}), got {tuple(table.shape)}"
        )
    if table.device != q.device:
        raise ValueError(f"{name}: expected the device of q {q.device}, got {table.device}")


def turn(
    out: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
) -> None:
    """Fill ``out``, which may be ``x``, with ``x`` rotated."""
    _turn(out, x, _angles(cos, sin, layout, rotary_dim, compute_dtype(x, cos)), layout, rotary_dim)


def _turn(
    out: torch.Tensor,
    x: torch.Tensor,
    angles: Angles,
    layout: str,
    rotary_dim: int,
    back: bool = False,
) -> torch.Tensor:
    """Fill ``out``, which may be ``x``, with ``x`` rotated, or rotated by the transpose."""
    dtype = angles.c1.dtype
    given, made = ends(layout)[::-1] if back else ends(layout)
    pieces = split(x[..., :rotary_dim].to(dtype), given)
    turned = (unrotate if back else rotate)(*pieces, angles)
    for target, value in zip(split(out[..., :rotary_dim], made), turned, strict=True):
        target.copy_(value)
    if out is not x:
        out[..., rotary_dim:].copy_(x[..., rotary_dim:])
    return out


def reference_fwd(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    out_dtype: torch.dtype,
) -> _Pair:
    """q and k rotated, in plain PyTorch; see the module's header."""
    q_out, k_out = _fake_fwd(q, k, cos, sin, layout, rotary_dim, out_dtype)
    turn(q_out, q, cos, sin, layout, rotary_dim)
    if k is not None:
        turn(k_out, k, cos, sin, layout, rotary_dim)
    return q_out, k_out


def reference_bwd(
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    dtype: torch.dtype,
    q_order: Sequence[int],
    k_order: Sequence[int],
    need_q: bool,
    need_k: bool,
) -> _Pair:
    """dq and dk in plain PyTorch; see the module's header."""
    orders = (q_order, k_order)
    dq, dk = _fake_bwd(dq_out, dk_out, cos, sin, layout, rotary_dim, dtype, *orders, need_q, need_k)
    angles = _angles(cos, sin, layout, rotary_dim, compute_dtype(dq_out, cos))
    for need, out, grad in ((need_q, dq, dq_out), (need_k, dk, dk_out)):
        if need:
            _turn(out, grad, angles, layout, rotary_dim, back=True)
    return dq, dk


def triton_fwd(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    out_dtype: torch.dtype,
) -> _Pair:
    """q and k rotated, on the GPU."""
    if not launchable(q, cos.dtype, sin.dtype, out_dtype):
        return reference_fwd(q, k, cos, sin, layout, rotary_dim, out_dtype)
    q_out, k_out = _fake_fwd(q, k, cos, sin, layout, rotary_dim, out_dtype)
    to = k_out if k is not None else None
    rope_kernels.turn(q, k, q_out, to, cos, sin, layout, rotary_dim, back=False)
    return q_out, k_out


def triton_bwd(
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    dtype: torch.dtype,
    q_order: Sequence[int],
    k_order: Sequence[int],
    need_q: bool,
    need_k: bool,
) -> _Pair:
    """dq and dk, on the GPU."""
    rest = (cos, sin, layout, rotary_dim, dtype, q_order, k_order, need_q, need_k)
    if not launchable(dq_out, cos.dtype, sin.dtype, dtype):
        return reference_bwd(dq_out, dk_out, *rest)
    dq, dk = _fake_bwd(dq_out, dk_out, *rest)
    q_pair = (dq_out, dq) if need_q else (None, None)
    k_pair = (dk_out, dk) if need_k else (None, None)
    pairs = (q_pair[0], k_pair[0], q_pair[1], k_pair[1])
    rope_kernels.turn(*pairs, cos, sin, layout, rotary_dim, back=True)
    return dq, dk


def _fake_fwd(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    out_dtype: torch.dtype,
) -> _Pair:
    check(q, k, cos, sin, layout, rotary_dim)
    q_out = empty_ordered(q, q.shape, leading_order(q), out_dtype)
    if k is None:
        return q_out, q.new_empty(0, dtype=out_dtype)
    return q_out, empty_ordered(k, k.shape, leading_order(k), out_dtype)


def _fake_bwd(
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    dtype: torch.dtype,
    q_order: Sequence[int],
    k_order: Sequence[int],
    need_q: bool,
    need_k: bool,
) -> _Pair:
    dq, dk = absent(dq_out), absent(dk_out)
    if need_q:
        dq = empty_ordered(dq_out, dq_out.shape, q_order, dtype)
    if need_k:
        dk = empty_ordered(dk_out, dk_out.shape, k_order, dtype)
    return dq, dk


def _save(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
    q, k = inputs["q"], inputs["k"]
    table = inputs["cos"], inputs["sin"], inputs["layout"], inputs["rotary_dim"]
    return *table, q.dtype, leading_order(q), [] if k is None else leading_order(k)


OPS = (
    OpSpec(
        forward="rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, str layout, int rotary_dim, "
        "ScalarType out_dtype) -> (Tensor q_out, Tensor k_out)",
        backward="rope_backward(Tensor dq_out, Tensor dk_out, Tensor cos, Tensor sin, str layout, "
        "int rotary_dim, ScalarType dtype, int[] q_order, int[] k_order, bool need_q, bool need_k) "
        "-> (Tensor dq, Tensor dk)",
        differentiable=("q", "k"),
        outputs=2,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        triton=(triton_fwd, triton_bwd),
        cheap=True,
        fake=(_fake_fwd, _fake_bwd),
    ),
)
