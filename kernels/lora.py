"""Linear layers of one input, with low-rank adapters: y_j = x W_j^T + b_j + sum_i s_i (x_i A_i^T) B_i^T.

Shapes: x (..., K); W_j (N_j, K), b_j (N_j,) or absent; A_i (r_i, K), B_i (N_j, r_i) of the adapter i,
which belongs to the layer j = member[i] and reads x_i = x, or its own tensor of x's shape (an input
that was dropped out). The y_j lie behind each other in one buffer (..., sum N_j); they are handed out
as pieces of ``widths``, one per layer or all layers as one piece. Saved: x, the x_i that are not x,
the thin products S, and the weights.

Forward, with rows x (T, K) and S_i = s_i x_i A_i^T (T, r_i), as one product for all layers:

    [y_0 | y_1 ...] = [x | S_0 | S_1 ... | 1] [W | B | b]^T

where W stacks the W_j, and B_i stands in the rows of its layer and the columns of its S_i, zeros
elsewhere; the ones' column adds the biases. The contraction is K + R long instead of K, sums in
float32 and rounds once.

Backward, with g = [dy_0 | dy_1 ...] (T, sum N_j) and P_i = s_i dy_j B_i (T, r_i):

    dx   = [g | P_0 | P_1 ...] [W; A]                 (an own x_i has dx_i = P_i A_i instead)
    dA_i = P_i^T x_i        dB_i = dy_j^T S_i         dW_j = dy_j^T x        db_j = column sums of dy_j

Derivation: y_j is linear in x, W_j, b_j, A_i and B_i each. <dy_j, s_i x_i A_i^T dB^T> = <dy_j^T S_i, dB>;
<dy_j, s_i x_i dA^T B_i^T> = <P_i^T x_i, dA>; <dy_j, s_i dx_i A_i^T B_i^T> = <P_i A_i, dx_i>.

Where it rounds: S and P are sums in float32, scaled and rounded once to the adapters' dtype; y_j and
dx once. Adapters in float32 over 16-bit weights (PEFT's default) keep about 16 bits: every factor is
split in two 16-bit halves, t = hi(t) + lo(t), and hi hi + hi lo + lo hi of three column blocks leaves
out lo lo alone, 2^-18 of the product. The reference computes such branches in float32.
The augmented form needs the weights in a buffer with room for A and B (see ``room``) and no gradient
of W; without it the adapters are added to the base's result, which is rounded twice then, as eager's.

``lora_thin`` gives S alone, for a forward that runs again and whose y nobody reads.

Source: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fusewright.kernels import lora_gemm, lora_scratch
from fusewright.kernels.lora_group import (
    Group,
    Needs,
    Results,
    backward_flops,
    forward_flops,
    takes,
)
from fusewright.kernels.lora_products import scaled
from fusewright.kernels.normed import Norm
from fusewright.kernels.reduce import absent
from fusewright.kernels.room import columns_of
from fusewright.kernels.spec import OpSpec

Tensors = Sequence[torch.Tensor]


class Forward(NamedTuple):
    """The forward's arguments; ``roomy`` and ``grad_roomy`` say whose columns lie behind the rows.

    Attributes:
        group: the layers and their adapters.
        widths: of the pieces in which y is handed out.
        out_dtype: of y.
        roomy: x was made with room behind its rows for the thin products (see ``room``).
        grad_roomy: so will be the gradient of y.
    """

    group: Group
    widths: Sequence[int]
    out_dtype: torch.dtype
    roomy: bool
    grad_roomy: bool

    @classmethod
    def of(cls, *args: Any) -> Forward:
        """From the operator's arguments."""
        return cls(Group(*args[:9]), *args[9:])


class Backward(NamedTuple):
    """The backward's arguments: gradients of the pieces of y, what was saved, and what is wanted."""

    dys: Tensors
    thin: torch.Tensor
    group: Group
    grad_roomy: bool
    needs: Needs

    @classmethod
    def of(cls, dys: Tensors, thin: torch.Tensor, *args: Any) -> Backward:
        """From the operator's arguments."""
        return cls(dys, thin, Group(*args[:9]), args[9], Needs(*args[10:]))


def check(group: Group) -> None:
    """Refuse what does not fit together, naming the argument, what was expected and what was got."""
    x, width = group.x, group.x.shape[-1]
    if not group.weights or len(group.biases) != len(group.weights):
        got = f"{len(group.biases)} for {len(group.weights)} weights"
        raise ValueError(f"biases: expected one entry per weight, got {got}")
    for j, (w, b) in enumerate(zip(group.weights, group.biases, strict=True)):
        if w.dim() != 2 or w.shape[1] != width:
            raise ValueError(f"weights[{j}]: expected shape (N, {width}), got {tuple(w.shape)}")
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"biases[{j}]: expected ({w.shape[0]},), got {tuple(b.shape)}")
    lists = (group.down, group.up, group.member, group.source, group.scales)
    if len({len(t) for t in lists}) != 1:
        raise ValueError("down, up, member, source, scales: expected one entry per adapter")
    for i, (a, b) in enumerate(zip(group.down, group.up, strict=True)):
        height = group.weights[group.member[i]].shape[0]
        if a.dim() != 2 or a.shape[1] != width:
            raise ValueError(f"down[{i}]: expected shape (r, {width}), got {tuple(a.shape)}")
        if b.shape != (height, a.shape[0]):
            wanted = (height, a.shape[0])
            raise ValueError(f"up[{i}]: expected shape {wanted}, got {tuple(b.shape)}")
    for i, t in enumerate(group.inputs):
        if t.shape != x.shape:
            raise ValueError(f"inputs[{i}]: expected {tuple(x.shape)} like x, got {tuple(t.shape)}")
    for name in ("inputs", "weights", "down", "up"):
        if any(t.device != x.device for t in getattr(group, name)):
            raise ValueError(f"{name}: expected device {x.device} like x")


def reference_fwd(*args: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The pieces of y, and the thin products; see the module's header."""
    given = Forward.of(*args)
    group, x = given.group, given.group.x
    check(group)
    pairs = zip(group.weights, group.biases, strict=True)
    results = [F.linear(x.to(w.dtype), w, b) for w, b in pairs]
    thin = []
    for i, (a, b) in enumerate(zip(group.down, group.up, strict=True)):
        low = scaled(group.input_of(i).to(a.dtype), a.t(), group.scales[i])
        results[group.member[i]] = results[group.member[i]] + F.linear(low, b)
        thin.append(low.reshape(-1, a.shape[0]))
    whole = torch.cat([y.to(given.out_dtype) for y in results], -1)
    return columns_of(whole, given.widths), torch.cat(thin, -1) if thin else absent(x)


def reference_bwd(*args: Any) -> Results:
    """The gradients; see the module's header."""
    given = Backward.of(*args)
    group, needs, x = given.group, given.needs, given.group.x
    rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
    whole = torch.cat([d.reshape(-1, d.shape[-1]) for d in given.dys], -1)
    g = whole.split([w.shape[0] for w in group.weights], -1)
    shares: list[torch.Tensor] = []
    dinputs = [t.new_zeros(rows.shape) if needs.inputs else absent(x) for t in group.inputs]
    ddown, dup = [], []
    start = 0
    for i, (a, b) in enumerate(zip(group.down, group.up, strict=True)):
        branch, own = g[group.member[i]].to(b.dtype), group.input_of(i).reshape(-1, width)
        low = given.thin[:, start : start + a.shape[0]]
        start += a.shape[0]
        p = scaled(branch, b, group.scales[i])
        ddown.append(p.T @ own.to(a.dtype) if needs.down else absent(a))
        dup.append(branch.T @ low.to(b.dtype) if needs.up else absent(b))
        if group.source[i] < 0 and needs.x:
            shares.append(p @ a)
        elif group.source[i] >= 0 and needs.inputs:
            at = group.source[i]
            dinputs[at] = dinputs[at] + (p @ a).to(dinputs[at].dtype)
    if needs.x:
        shares += [d.to(w.dtype) @ w for d, w in zip(g, group.weights, strict=True)]
    return Results(
        _sum(shares).reshape(x.shape).to(x.dtype) if needs.x else absent(x),
        [d.reshape(x.shape) if needs.inputs else d for d in dinputs],
        [
            d.to(w.dtype).T @ rows.to(w.dtype) if needs.weights else absent(w)
            for d, w in zip(g, group.weights, strict=True)
        ],
        [
            d.sum(0).to(b.dtype) if needs.biases and b is not None else absent(x)
            for d, b in zip(g, group.biases, strict=True)
        ],
        ddown,
        dup,
    )


def _thin_group(*args: Any) -> Group:
    """The group of ``lora_thin``'s arguments: without layers."""
    x, inputs, down, up, source, scales = args
    group = Group(x, inputs, [], [], down, up, [0] * len(down), source, scales)
    for i, a in enumerate(down):
        if a.dim() != 2 or a.shape[1] != x.shape[-1]:
            wanted = f"(r, {x.shape[-1]})"
            raise ValueError(f"down[{i}]: expected shape {wanted}, got {tuple(a.shape)}")
    return group


def reference_thin(*args: Any) -> torch.Tensor:
    """The thin products of a group alone, as its forward gives them: see the module's header."""
    group = _thin_group(*args)
    lows = [
        scaled(group.input_of(i).to(a.dtype), a.t(), s).reshape(-1, a.shape[0])
        for i, (a, s) in enumerate(zip(group.down, group.scales, strict=True))
    ]
    return torch.cat(lows, -1) if lows else absent(group.x)


def device_thin(*args: Any) -> torch.Tensor:
    """The thin products of a group alone, by as few launches as there can be."""
    group = _thin_group(*args)
    return lora_gemm.thin(group) if takes(group, group.x.dtype) else reference_thin(*args)


def _fake_thin(*args: Any) -> torch.Tensor:
    group = _thin_group(*args)
    ranks, rows = sum(a.shape[0] for a in group.down), group.x.numel() // group.x.shape[-1]
    return group.x.new_empty((rows, ranks), dtype=group.dtype)


def _nothing(*_: Any) -> Sequence[Any]:
    return ()


def _sum(shares: Tensors) -> torch.Tensor:
    """The sum in float32 at least, in the order given."""
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in shares]
    return sum(wide[1:], wide[0])


def host_fwd(*args: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The reference, or the device's products where the weights have room for them."""
    given = Forward.of(*args)
    group = given.group
    roomy = takes(group, given.out_dtype) and lora_gemm.has_room(group)
    return device_fwd(*args) if roomy else reference_fwd(*args)


def host_bwd(*args: Any, norm: Norm | None = None) -> Results:
    """The reference, or the device's products where the weights have room for them."""
    given = Backward.of(*args)
    group = given.group
    roomy = takes(group, given.dys[0].dtype) and lora_gemm.has_room(group)
    return device_bwd(*args, norm=norm) if roomy else reference_bwd(*_normed(args, norm))


def _normed(args: Sequence[Any], norm: Norm | None) -> Sequence[Any]:
    """A backward's arguments with the output of a norm whose input they have for x."""
    return args if norm is None else (*args[:2], norm.of(args[2]), *args[3:])


def device_fwd(*args: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The pieces of y, and the thin products, by as few products as there can be."""
    given = Forward.of(*args)
    check(given.group)
    if not takes(given.group, given.out_dtype):
        return reference_fwd(*args)
    whole, thin = lora_gemm.forward(given.group, given.roomy)
    return columns_of(whole, given.widths), thin


def device_bwd(*args: Any, norm: Norm | None = None) -> Results:
    """The gradients, by as few products as there can be."""
    given = Backward.of(*args)
    if not takes(given.group, given.dys[0].dtype):
        return reference_bwd(*_normed(args, norm))
    return lora_gemm.backward(
        given.dys, given.thin, given.group, given.grad_roomy, given.needs, norm=norm
    )


def _fake_fwd(*args: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    given = Forward.of(*args)
    group, x = given.group, given.group.x
    check(group)
    lead = x.shape[:-1]
    whole = x.new_empty((*lead, sum(w.shape[0] for w in group.weights)), dtype=given.out_dtype)
    pieces = [whole]
    if len(given.widths) > 1:
        strides, new = whole.stride(), x.new_empty_strided
        pieces = [new((*lead, w), strides, dtype=given.out_dtype) for w in given.widths]
    if not group.down:
        return pieces, absent(x)
    ranks, rows = sum(a.shape[0] for a in group.down), x.numel() // x.shape[-1]
    return pieces, x.new_empty((rows, ranks), dtype=group.dtype)


def _fake_bwd(*args: Any) -> Results:
    given = Backward.of(*args)
    group, needs, x = given.group, given.needs, given.group.x

    def like(tensors: Sequence[torch.Tensor | None], wanted: bool) -> list[torch.Tensor]:
        return [
            t.new_empty(t.shape) if wanted and t is not None else absent(x if t is None else t)
            for t in tensors
        ]

    return Results(
        x.new_empty(x.shape) if needs.x else absent(x),
        like(group.inputs, needs.inputs),
        like(group.weights, needs.weights),
        like(group.biases, needs.biases),
        like(group.down, needs.down),
        like(group.up, needs.up),
    )


def _forward_passing(args: Sequence[Any], out: Any) -> Any:
    given = Forward.of(*args)
    return lora_scratch.forward(given.group, given.roomy, packed=False)


def _backward_passing(args: Sequence[Any], out: Any) -> Any:
    given = Backward.of(*args)
    need = given.needs.x and not given.needs.weights
    return lora_scratch.backward(given.dys, given.group, given.grad_roomy, False, need)


_GROUP = (
    "Tensor x, Tensor[] inputs, Tensor[] weights, Tensor?[] biases, Tensor[] down, Tensor[] up, "
    "int[] member, int[] source, float[] scales"
)


def _save(inputs: dict[str, Any], outputs: tuple[Any, ...]) -> Sequence[Any]:
    return (outputs[-1], *list(inputs.values())[:9], inputs["grad_roomy"])


OPS = (
    OpSpec(
        forward=f"lora_group({_GROUP}, int[] widths, ScalarType out_dtype, bool roomy, "
        "bool grad_roomy) -> (Tensor[] ys, Tensor thin)",
        backward=f"lora_group_backward(Tensor[] dys, Tensor thin, {_GROUP}, bool grad_roomy, "
        "bool need_x, bool need_inputs, bool need_weights, bool need_biases, bool need_down, "
        "bool need_up) -> (Tensor dx, Tensor[] dinputs, Tensor[] dweights, Tensor[] dbiases, "
        "Tensor[] ddown, Tensor[] dup)",
        differentiable=("x", "inputs", "weights", "biases", "down", "up"),
        outputs=1,
        save=_save,
        reference=(host_fwd, host_bwd),
        triton=(device_fwd, device_bwd),
        fake=(_fake_fwd, _fake_bwd),
        flops=(forward_flops, backward_flops),
        passing=(_forward_passing, _backward_passing),
    ),
    OpSpec(
        forward="lora_thin(Tensor x, Tensor[] inputs, Tensor[] down, Tensor[] up, int[] source, "
        "float[] scales) -> Tensor thin",
        backward="",
        differentiable=(),
        outputs=1,
        save=_nothing,
        reference=(reference_thin, _nothing),
        triton=(device_thin, _nothing),
        fake=(_fake_thin, _nothing),
    ),
)
