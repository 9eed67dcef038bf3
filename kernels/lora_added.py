"""Low-rank adapters added to a layer's result that is known only as a tensor.

    y = base + sum_i s_i (x_i A_i^T) B_i^T

Shapes: base (..., N); x (..., K); A_i (r_i, K), B_i (N, r_i); x_i = x or an own tensor of x's shape, as
in ``lora``. Saved: x, the x_i that are not x, and the thin products S.

Forward, with S_i = s_i x_i A_i^T (T, r_i): y = base + [S_0 | S_1 ...] [B_0 | B_1 ...]^T, one product with
the sum in its epilogue. Backward, with P_i = s_i dy B_i:

    dbase = dy      dx = [P_0 | P_1 ...] [A_0; A_1; ...]      dA_i = P_i^T x_i      dB_i = dy^T S_i

Derivation: as in ``lora``; y is linear in base with the identity for its slope. An own x_i has
dx_i = P_i A_i instead of its share of dx.
For a base that the augmented product of ``lora`` cannot take in: one over 8-bit weights, or one that
works in another dtype than the adapters' sum. Where it rounds: S and P as in ``lora``, y and dx once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fusewright.kernels import lora_products as products
from fusewright.kernels.lora_gemm import _of_inputs
from fusewright.kernels.lora_group import Group, Needs, Tensors, plan, takes
from fusewright.kernels.lora_products import scaled
from fusewright.kernels.reduce import absent
from fusewright.kernels.spec import OpSpec


class Results(NamedTuple):
    """The gradients, as in the operator's results; of shape (0,) where nobody asked."""

    base: torch.Tensor
    x: torch.Tensor
    inputs: list[torch.Tensor]
    down: list[torch.Tensor]
    up: list[torch.Tensor]


def _group(
    x: torch.Tensor, inputs: Tensors, down: Tensors, up: Tensors, source: Any, scales: Any
) -> Group:
    """The adapters as a group of one layer, whose weight has a shape and no values."""
    weight = x.new_empty(()).expand(up[0].shape[0], x.shape[-1])
    return Group(x, inputs, [weight], [None], down, up, [0] * len(down), source, scales)


def check(base: torch.Tensor, group: Group) -> None:
    """Refuse what does not fit together, naming the argument."""
    from fusewright.kernels.lora import check as check_group

    check_group(group)
    wanted = (*group.x.shape[:-1], group.up[0].shape[0])
    if base.shape != wanted:
        raise ValueError(f"base: expected shape {wanted}, got {tuple(base.shape)}")
    if base.device != group.x.device:
        raise ValueError(f"base: expected device {group.x.device} like x, got {base.device}")


def fwd(base: torch.Tensor, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """y in ``out_dtype``, and the thin products (T, sum r_i)."""
    *adapters, out_dtype = args
    group = _group(x, *adapters)
    check(base, group)
    if not takes(group, out_dtype) or base.dtype is not out_dtype:
        return _plain_fwd(base, group, out_dtype)
    rows = x.reshape(-1, x.shape[-1])
    thin = products.right(group, rows, plan(group), None, False, ())
    lows = thin.split([a.shape[0] for a in group.down], 1)
    pairs = [products.paired(s, b, rows.dtype) for s, b in zip(lows, group.up, strict=True)]
    y = products.with_products(base.reshape(-1, base.shape[-1]), pairs, plan(group).split)
    return y.view(base.shape), thin


def _plain_fwd(
    base: torch.Tensor, group: Group, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    y, thin = base, []
    for i, (a, b) in enumerate(zip(group.down, group.up, strict=True)):
        low = scaled(group.input_of(i).to(a.dtype), a.t(), group.scales[i])
        y = y + F.linear(low, b)
        thin.append(low.reshape(-1, a.shape[0]))
    return y.to(out_dtype), torch.cat(thin, 1).to(group.dtype)


def bwd(dy: torch.Tensor, thin: torch.Tensor, *args: Any) -> Results:
    """The gradients; see the module's header."""
    *adapters, base_dtype, need_base, need_x, need_inputs, need_down, need_up = args
    group = _group(*adapters)
    needs = Needs(need_x, need_inputs, False, False, need_down, need_up)
    # The gradient is handed on as it is: nobody may write into what a backward returns.
    dbase = dy.to(base_dtype, copy=True) if need_base else absent(dy)
    if not takes(group, dy.dtype):
        return _plain_bwd(dy, thin, group, needs, dbase)
    x, how = group.x, plan(group)
    rows, g = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    p, dup, _ = products.both(group, [g], thin, how, None, False, needs, ())
    dx = absent(x)
    if need_x:
        shared = [i for i, source in enumerate(group.source) if source < 0]
        pairs = [products.paired(p[i], group.down[i].t(), x.dtype) for i in shared]
        dx = torch.mm(*products.joined(pairs)).view(x.shape) if pairs else torch.zeros_like(x)
    ddown = products.left(group, rows, p, need_down)
    return Results(dbase, dx, _of_inputs(group, p, need_inputs), ddown, dup)


def _plain_bwd(
    dy: torch.Tensor, thin: torch.Tensor, group: Group, needs: Needs, dbase: torch.Tensor
) -> Results:
    x, width = group.x, group.x.shape[-1]
    rows, g = x.reshape(-1, width), dy.reshape(-1, dy.shape[-1])
    dx = rows.new_zeros(rows.shape) if needs.x else absent(x)
    dinputs = [t.new_zeros(rows.shape) if needs.inputs else absent(t) for t in group.inputs]
    ddown, dup = [], []
    lows = thin.split([a.shape[0] for a in group.down], 1)
    for i, (a, b, low) in enumerate(zip(group.down, group.up, lows, strict=True)):
        p, own = scaled(g.to(b.dtype), b, group.scales[i]), group.input_of(i).reshape(-1, width)
        ddown.append(p.T @ own.to(a.dtype) if needs.down else absent(a))
        dup.append(g.to(b.dtype).T @ low.to(b.dtype) if needs.up else absent(b))
        at = group.source[i]
        if at < 0 and needs.x:
            dx = dx + (p @ a).to(dx.dtype)
        elif at >= 0 and needs.inputs:
            dinputs[at] = dinputs[at] + (p @ a).to(dinputs[at].dtype)
    dx = dx.view(x.shape) if needs.x else dx
    return Results(dbase, dx, [d.view(x.shape) if needs.inputs else d for d in dinputs], ddown, dup)


def _fake_fwd(base: torch.Tensor, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *adapters, out_dtype = args
    group = _group(x, *adapters)
    check(base, group)
    ranks, rows = sum(a.shape[0] for a in group.down), x.numel() // x.shape[-1]
    y = x.new_empty(base.shape, dtype=out_dtype)
    return y, x.new_empty((rows, ranks), dtype=group.dtype)


def _fake_bwd(dy: torch.Tensor, thin: torch.Tensor, *args: Any) -> Results:
    *adapters, base_dtype, need_base, need_x, need_inputs, need_down, need_up = args
    group = _group(*adapters)

    def like(tensors: Tensors, wanted: bool) -> list[torch.Tensor]:
        return [t.new_empty(t.shape) if wanted else absent(t) for t in tensors]

    return Results(
        dy.new_empty(dy.shape, dtype=base_dtype) if need_base else absent(dy),
        like([group.x], need_x)[0],
        like(group.inputs, need_inputs),
        like(group.down, need_down),
        like(group.up, need_up),
    )


_ADAPTERS = "Tensor x, Tensor[] inputs, Tensor[] down, Tensor[] up, int[] source, float[] scales"


def _save(inputs: dict[str, Any], outputs: tuple[Any, ...]) -> Sequence[Any]:
    return (outputs[-1], *list(inputs.values())[1:7], inputs["base"].dtype)


OPS = (
    OpSpec(
        forward=f"lora_added(Tensor base, {_ADAPTERS}, ScalarType out_dtype) "
        "-> (Tensor y, Tensor thin)",
        backward=f"lora_added_backward(Tensor dy, Tensor thin, {_ADAPTERS}, ScalarType base_dtype, "
        "bool need_base, bool need_x, bool need_inputs, bool need_down, bool need_up) "
        "-> (Tensor dbase, Tensor dx, Tensor[] dinputs, Tensor[] ddown, Tensor[] dup)",
        differentiable=("base", "x", "inputs", "down", "up"),
        outputs=1,
        save=_save,
        reference=(fwd, bwd),
        triton=(fwd, bwd),
        fake=(_fake_fwd, _fake_bwd),
    ),
)
