"""RMS normalisation of every head of queries and keys, and their rotation, in one pass.

    x^ = x r,  r = (mean(x^2) + eps)^(-1/2)      n = x^ (offset + w)      y = n cos + R(n) sin

Shapes: q (B, Hq, T, D), k (B, Hk, T, D) with any strides; w (D,) or absent, one for q and one for k;
cos and sin as in kernels/rope.py, whose layouts "half" and "interleaved" there are. y has the
input's shape and its order in memory, as have the gradients; rstd r is (B, T, H) in float32. Saved:
q, k, the weights, r and the tables; neither n nor anything rotated.

Where it rounds (x of dtype t, everything else in float32, and once at the output):
    cast="output"   n is rounded to ``norm_dtype``
    cast="input"    x^ is rounded to t before the weight, and n to ``norm_dtype``
``norm_dtype`` is t, or float32 for no rounding. Between the two halves of the backward nothing is
rounded: gradients pass straight through a rounding.

Backward, with R' the transpose of the rotation and means over a head:
    dn = dy cos + R'(dy sin)      g = dn (offset + w)
    dx = r (g - x^ mean(g x^))    dw = sum over heads and tokens of dn x^

Source: B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019, on the heads of
J. Su et al., "Enhanced Transformer with Rotary Position Embedding", 2021.
Traffic: forward reads x and writes y; backward reads x and dy and writes dx; the tables once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fusewright.kernels import qk_norm_rope_launch, rms_norm, rope
from fusewright.kernels.launch import launchable
from fusewright.kernels.reduce import absent, compute_dtype
from fusewright.kernels.rows import check_cast, check_vector, empty_ordered, leading_order
from fusewright.kernels.spec import OpSpec

LAYOUTS = ("half", "interleaved")
Maybe = torch.Tensor | None
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Norm(NamedTuple):
    """The norm's constants."""

    offset: float
    cast: str
    dtype: torch.dtype


class Turn(NamedTuple):
    """The rotation's tables and constants."""

    cos: torch.Tensor
    sin: torch.Tensor
    layout: str
    rotary_dim: int


def check(
    q: torch.Tensor, k: torch.Tensor, weights: Sequence[Maybe], norm: Norm, turn: Turn
) -> None:
    """Refuse wrong shapes, dtypes, devices and modes, by name."""
    rope.check(q, k, *turn)
    if turn.layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {turn.layout!r}")
    for weight, name in zip(weights, ("q_weight", "k_weight"), strict=True):
        check_vector(weight, q, name)
    check_cast(norm.cast)
    wide = compute_dtype(q, *weights)
    if norm.dtype not in (q.dtype, wide):
        raise TypeError(f"norm_dtype: expected {q.dtype} or {wide}, got {norm.dtype}")


def _turned(n: torch.Tensor, turn: Turn, back: bool) -> torch.Tensor:
    """``n`` rotated, or rotated by the transpose."""
    out = torch.empty_like(n)
    angles = rope._angles(*turn, n.dtype)
    return rope._turn(out, n, angles, turn.layout, turn.rotary_dim, back)


def _head(
    x: torch.Tensor, weight: Maybe, eps: float, norm: Norm, turn: Turn, dtype: torch.dtype
) -> Any:
    """One of q and k, rotated, and its rstd (B, T, H)."""
    wide = x.to(dtype)
    r = torch.rsqrt(rms_norm.row_mean(wide.square()) + eps)
    n = wide * r
    n = rms_norm.round_through(n, x.dtype) if norm.cast == "input" else n
    gain = rms_norm.gain(weight, norm.offset, dtype)
    n = rms_norm.round_through(n if gain is None else n * gain, norm.dtype)
    return _turned(n, turn, back=False), r.squeeze(-1).transpose(1, 2).contiguous()


def _head_back(
    dy: torch.Tensor, x: torch.Tensor, weight: Maybe, rstd: torch.Tensor, norm: Norm, turn: Turn
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and the gradient of the weight, both wide."""
    r = rstd.transpose(1, 2).unsqueeze(-1)
    dn = _turned(dy.to(r.dtype), turn, back=True)
    xhat = x.to(r.dtype) * r
    kept = rms_norm.round_through(xhat, x.dtype) if norm.cast == "input" else xhat
    gain = rms_norm.gain(weight, norm.offset, r.dtype)
    g = dn if gain is None else dn * gain
    return rms_norm.row_gradient(g, xhat, r, rms_norm.row_mean), (dn * kept).sum((0, 1, 2))


def reference_fwd(
    q: torch.Tensor, k: torch.Tensor, q_weight: Maybe, k_weight: Maybe, eps: float, offset: float,
    cast: str, norm_dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor, layout: str,
    rotary_dim: int, out_dtype: torch.dtype,
) -> Four:  # fmt: skip
    """q and k normalised and rotated, and their rstd, in plain PyTorch; see the module's header."""
    norm, turn = Norm(offset, cast, norm_dtype), Turn(cos, sin, layout, rotary_dim)
    check(q, k, (q_weight, k_weight), norm, turn)
    dtype = compute_dtype(q, q_weight, k_weight, cos)
    made = [_head(x, w, eps, norm, turn, dtype) for x, w in ((q, q_weight), (k, k_weight))]
    outs = [
        empty_ordered(x, x.shape, leading_order(x), out_dtype).copy_(y)
        for x, (y, _) in zip((q, k), made, strict=True)
    ]
    return outs[0], outs[1], made[0][1], made[1][1]


def reference_bwd(
    dq_out: torch.Tensor, dk_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, q_weight: Maybe,
    k_weight: Maybe, q_rstd: torch.Tensor, k_rstd: torch.Tensor, offset: float, cast: str,
    norm_dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor, layout: str, rotary_dim: int,
    need_q: bool, need_k: bool, need_q_weight: bool, need_k_weight: bool,
) -> Four:  # fmt: skip
    """dq, dk and the gradients of the weights in plain PyTorch; see the module's header."""
    norm, turn = Norm(offset, cast, norm_dtype), Turn(cos, sin, layout, rotary_dim)
    grads = _gradients(q, k, q_weight, k_weight, need_q, need_k, need_q_weight, need_k_weight)
    sides = ((dq_out, q, q_weight, q_rstd), (dk_out, k, k_weight, k_rstd))
    for at, (dy, x, weight, rstd) in enumerate(sides):
        if grads[at].numel() or grads[2 + at].numel():
            for out, value in zip(
                grads[at::2], _head_back(dy, x, weight, rstd, norm, turn), strict=True
            ):
                if out.numel():
                    out.copy_(value)
    return grads


def triton_fwd(
    q: torch.Tensor, k: torch.Tensor, q_weight: Maybe, k_weight: Maybe, eps: float, offset: float,
    cast: str, norm_dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor, layout: str,
    rotary_dim: int, out_dtype: torch.dtype,
) -> Four:  # fmt: skip
    """q and k normalised and rotated, and their rstd, on the GPU."""
    norm, turn = (offset, cast, norm_dtype), (cos, sin, layout, rotary_dim)
    given = (q, k, q_weight, k_weight, eps, *norm, *turn, out_dtype)
    if not _takes(q, k, cos, sin, q_weight, k_weight, out_dtype):
        return reference_fwd(*given)
    made = _fake_fwd(*given)
    qk_norm_rope_launch.forward((q, k), (q_weight, k_weight), made, eps, Norm(*norm), Turn(*turn))
    return made


def triton_bwd(
    dq_out: torch.Tensor, dk_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, q_weight: Maybe,
    k_weight: Maybe, q_rstd: torch.Tensor, k_rstd: torch.Tensor, offset: float, cast: str,
    norm_dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor, layout: str, rotary_dim: int,
    need_q: bool, need_k: bool, need_q_weight: bool, need_k_weight: bool,
) -> Four:  # fmt: skip
    """dq, dk and the gradients of the weights, on the GPU."""
    needs = (need_q, need_k, need_q_weight, need_k_weight)
    if not _takes(q, k, cos, sin, q_weight, k_weight, dq_out.dtype):
        return reference_bwd(
            dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, offset, cast, norm_dtype,
            cos, sin, layout, rotary_dim, *needs,
        )  # fmt: skip
    grads = _gradients(q, k, q_weight, k_weight, *needs)
    if any(g.numel() for g in grads):
        qk_norm_rope_launch.backward(
            (dq_out, dk_out), (q, k), (q_weight, k_weight), (q_rstd, k_rstd), grads,
            Norm(offset, cast, norm_dtype), Turn(cos, sin, layout, rotary_dim),
        )  # fmt: skip
    return grads


def _takes(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any
) -> bool:
    """Whether the kernels take these; heads wider than 512 are left to the reference."""
    dtypes = [o.dtype if isinstance(o, torch.Tensor) else o for o in others if o is not None]
    fits = q.shape[-1] <= 512 and k.numel() > 0
    return fits and launchable(q, cos.dtype, sin.dtype, *dtypes)


def _gradients(
    q: torch.Tensor, k: torch.Tensor, q_weight: Maybe, k_weight: Maybe, *needs: bool
) -> Four:
    """Room for the gradients, of shape (0,) where nobody asked."""
    none = absent(q)
    dq, dk = (
        empty_ordered(x, x.shape, leading_order(x), x.dtype) if need else none
        for x, need in zip((q, k), needs[:2], strict=True)
    )
    dqw, dkw = (
        torch.empty_like(w) if need and w is not None else none
        for w, need in zip((q_weight, k_weight), needs[2:], strict=True)
    )
    return dq, dk, dqw, dkw


def _fake_fwd(
    q: torch.Tensor, k: torch.Tensor, q_weight: Maybe, k_weight: Maybe, eps: float, offset: float,
    cast: str, norm_dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor, layout: str,
    rotary_dim: int, out_dtype: torch.dtype,
) -> Four:  # fmt: skip
    turn = Turn(cos, sin, layout, rotary_dim)
    check(q, k, (q_weight, k_weight), Norm(offset, cast, norm_dtype), turn)
    outs = [empty_ordered(x, x.shape, leading_order(x), out_dtype) for x in (q, k)]
    dtype = compute_dtype(q, q_weight, k_weight, cos)
    stats = [q.new_empty((x.shape[0], x.shape[2], x.shape[1]), dtype=dtype) for x in (q, k)]
    return outs[0], outs[1], stats[0], stats[1]


def _fake_bwd(
    dq_out: torch.Tensor, dk_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, q_weight: Maybe,
    k_weight: Maybe, q_rstd: torch.Tensor, k_rstd: torch.Tensor, offset: float, cast: str,
    norm_dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor, layout: str, rotary_dim: int,
    need_q: bool, need_k: bool, need_q_weight: bool, need_k_weight: bool,
) -> Four:  # fmt: skip
    needs = (need_q, need_k, need_q_weight, need_k_weight)
    return _gradients(q, k, q_weight, k_weight, *needs)


def _save(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
    kept = [inputs[n] for n in ("q", "k", "q_weight", "k_weight")]
    rest = ("offset", "cast", "norm_dtype", "cos", "sin", "layout", "rotary_dim")
    return *kept, outputs[2], outputs[3], *(inputs[n] for n in rest)


OPS = (
    OpSpec(
        forward="qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, float eps, "
        "float offset, str cast, ScalarType norm_dtype, Tensor cos, Tensor sin, str layout, "
        "int rotary_dim, ScalarType out_dtype) "
        "-> (Tensor q_out, Tensor k_out, Tensor q_rstd, Tensor k_rstd)",
        backward="qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, "
        "Tensor? q_weight, Tensor? k_weight, Tensor q_rstd, Tensor k_rstd, float offset, str cast, "
        "ScalarType norm_dtype, Tensor cos, Tensor sin, str layout, int rotary_dim, bool need_q, "
        "bool need_k, bool need_q_weight, bool need_k_weight) "
        "-> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)",
        differentiable=("q", "k", "q_weight", "k_weight"),
        outputs=2,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        triton=(triton_fwd, triton_bwd),
        cheap=True,
        fake=(_fake_fwd, _fake_bwd),
    ),
)
