"""Cross-entropy of a linear head, without ever holding its logits.

    logits = x W^T + b        loss = cross_entropy(logits, labels), as in ``cross_entropy``

Shapes: x (T, H), weight (V, H), bias (V,) or absent, labels (T,), denominator () or absent, loss ().
The rows of x are taken in chunks of at least 2048 (or all of them), a number that depends on the
shapes and on whether the weight is trained: then twice as many, because every chunk reads and
writes all of dW's float32 accumulator. Each chunk's logits live in one scratch buffer, which its d(logits) then overwrites.

The gradients are computed in the forward, chunk by chunk, as if the upstream gradient were 1:
    dx_chunk = D W        dW = sum over chunks of D^T x_chunk        db = column sums of D
where D is d(logits) without its scalar weight, rounded once to x's dtype, as in eager. Nothing is
computed for an input that needs no gradient, and with none of them only the loss. The backward is
    d<input> = round(saved (dloss factor)),   factor = 1 / count, 1 / denominator or 1 (and see below)
into a new tensor, so it can run twice.

Where it rounds: logits and D in x's dtype, exactly where eager's autograd rounds them; dx and dW
are accumulated and saved in float32 and rounded once, after the upstream scalar. Were they saved
in x's dtype, an upstream that is not a power of two would round them a second time and the error
would exceed eager's. The cost is memory: 4 bytes an element of x, and of the weight if it is
trained, from the forward to the backward (for the weight this is the accumulator, which has to
exist in float32 anyway; a frozen head costs nothing).
D is multiplied by a constant that factor takes out again: one that brings a label's entry near -1,
where rounding errs least; and in float16 by 2^14 more, because unlike eager's upstream ours does not
hold the loss scale, and probabilities below 2^-24 would vanish.

Rows whose label is ignored have D = 0; their part of the GEMMs is still computed, because to drop
them the host would have to know how many there are, which is a synchronisation.

Saved: dx, dW, db and factor (float64). x and the weight are not saved.
Traffic: three GEMMs; per chunk D costs two reads and one write of the logits, mostly from cache.
Source: the chunked forward-computed gradient is M. Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models", 2024, and P. Hsu et al., "Liger Kernel", 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fusewright.kernels.cross_entropy import (
    LossForm,
    block_grad,
    block_loss,
    check_loss,
    check_range,
    row_blocks,
)
from fusewright.kernels.cross_entropy_launch import (
    launch_in_place,
    launch_reduce,
    launch_scale,
)
from fusewright.kernels.head_gradients import new_gradients
from fusewright.kernels.launch import launchable
from fusewright.kernels.reduce import absent, compute_dtype
from fusewright.kernels.spec import OpSpec

_MIN_ROWS = 2048
_TILE = 128
SCRATCH_BYTES = 512 * 2**20  # of logits; twice that where the weight's gradient is summed

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def chunk_rows(rows: int, vocab: int, itemsize: int, summed: bool = False) -> int:
    """Rows of a chunk: all equal, at least 2048, the logits of one about 512 MiB or less.

    With ``summed``, when all chunks add to the weight's gradient, about 1 GiB or less.
    """
    fits = max(_MIN_ROWS, (1 + summed) * SCRATCH_BYTES // max(vocab * itemsize, 1))
    if rows <= fits:
        return max(rows, 1)
    # The fewest chunks, of equal size up to a GEMM tile; rounding up never reaches below 2048.
    even = math.ceil(rows / math.ceil(rows / fits))
    return max(_MIN_ROWS, math.ceil(even / _TILE) * _TILE)


def gradient_unit(dtype: torch.dtype, form: LossForm) -> float:
    """By what D is multiplied while it is in ``dtype``, so that a label's entry is about -1.

    Just below a power of two a number is rounded with the smallest relative error there is. In
    float16 it is -2^14 instead, so that small entries do not vanish; a factor of 4 is left to
    float16's largest number, for z-loss.
    """
    size = (1.0 - form.label_smoothing) * abs(form.scale)
    return (2.0**14 if dtype is torch.float16 else 1.0) / (size if size > 0 else 1.0)


def check_inputs(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    denominator: torch.Tensor | None,
    reduction: str,
) -> None:
    """Refuse inputs that do not fit, naming the argument, what was expected and what was got."""
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (T, H), got {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected shape (V, {x.shape[1]}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a float dtype, got {x.dtype}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {t.dtype}")
    if denominator is not None and denominator.numel() != 1:
        raise ValueError(f"denominator: expected one number, got {tuple(denominator.shape)}")
    for name, t in (("weight", weight), ("bias", bias), ("labels", labels),
                    ("denominator", denominator)):  # fmt: skip
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device}, got {t.device}")
    check_loss(x.shape[0], weight.shape[0], labels, reduction)
    if reduction == "none":
        raise ValueError("reduction: expected mean or sum (the gradient is taken before the "
                         "upstream gradient is known), got none")  # fmt: skip
    if denominator is not None and reduction != "sum":
        raise ValueError(f"denominator: expected reduction sum beside it, got {reduction}")


def normaliser(
    labels: torch.Tensor, denominator: torch.Tensor | None, ignore_index: int, reduction: str
) -> torch.Tensor | None:
    """What the sum over rows is divided by, 0-dim float64, or None for 1."""
    if denominator is not None:
        return denominator.reshape(()).double()
    return (labels != ignore_index).sum().double() if reduction == "mean" else None


def reference_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    denominator: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> _Results:
    """loss, dx, dweight, dbias and factor in plain PyTorch; see the module's header."""
    check_inputs(x, weight, bias, labels, denominator, reduction)
    check_range(labels, ignore_index, weight.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        return _reference_chunks(
            x, weight, bias, labels, denominator,
            LossForm(ignore_index, label_smoothing, softcap, scale, z_loss), reduction,
            need_x, need_weight, need_bias and bias is not None,
        )  # fmt: skip


def _reference_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    denominator: torch.Tensor | None,
    form: LossForm,
    reduction: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> _Results:
    wide = compute_dtype(x)
    grads = new_gradients(x, weight, need_x, need_weight, need_bias)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    up = gradient_unit(x.dtype, form)
    unit = torch.full((), up, dtype=wide, device=x.device)
    step = chunk_rows(x.shape[0], weight.shape[0], x.element_size(), need_weight)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        logits = torch.nn.functional.linear(x[rows], weight, bias)
        wanted = need_x or need_weight or need_bias
        total += _loss_and_gradient(logits, labels[rows], unit if wanted else None, form)
        if wanted:
            grads.add(logits, x, weight, rows)
    divisor = normaliser(labels, denominator, form.ignore_index, reduction)
    loss, factor = finish(total, divisor, up, reduction)
    return loss.to(wide), *grads.results(x), factor


def _loss_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, unit: torch.Tensor | None, form: LossForm
) -> torch.Tensor:
    """The rows' losses added up; the logits are overwritten with ``unit`` d(logits), if given."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows in row_blocks(logits):
        z, y = logits[rows], labels[rows]
        losses, lse = block_loss(z, y, form)
        total += losses.sum()
        if unit is not None:
            z.copy_(block_grad(z, y, lse, unit, form))
    return total


def finish(
    total: torch.Tensor, divisor: torch.Tensor | None, up: float, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and in ``factor`` what the saved gradients still lack; both 0-dim float64."""
    factor = torch.full_like(total, 1.0 / up)
    if divisor is None:
        return total, factor
    factor = factor / divisor
    if reduction == "mean":
        # Where no row counts the loss is NaN but every D is 0, and so is eager's gradient.
        factor = torch.where(divisor == 0, 0.0, factor)
    return total / divisor, factor


def triton_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    denominator: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> _Results:
    """loss, dx, dweight, dbias and factor: GEMMs, and one kernel a chunk in between."""
    form = LossForm(ignore_index, label_smoothing, softcap, scale, z_loss)
    if not launchable(x):
        return reference_fwd(
            x, weight, bias, labels, denominator, ignore_index, reduction, *form[1:],
            need_x, need_weight, need_bias,
        )  # fmt: skip
    check_inputs(x, weight, bias, labels, denominator, reduction)
    (rows, _), vocab = x.shape, weight.shape[0]
    step = min(rows, chunk_rows(rows, vocab, x.element_size(), need_weight))
    scratch = torch.empty((step, vocab), dtype=x.dtype, device=x.device)
    losses = torch.empty(rows, dtype=torch.float64, device=x.device)
    grads = new_gradients(x, weight, need_x, need_weight, need_bias and bias is not None)
    wanted = any(t is not None for t in grads)
    unit = gradient_unit(x.dtype, form)
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        logits = scratch[: chunk.stop - start]
        # The out= forms: autocast leaves them alone.
        if bias is None:
            torch.mm(x[chunk], weight.t(), out=logits)
        else:
            torch.addmm(bias, x[chunk], weight.t(), out=logits)
        launch_in_place(logits, labels[chunk], losses[chunk], form, unit, wanted)
        if wanted:
            grads.add(logits, x, weight, chunk)
    loss, factor = launch_reduce(
        losses, labels, denominator, vocab, ignore_index, reduction == "mean", unit
    )
    return loss, *grads.results(x), factor


def reference_bwd(
    dloss: torch.Tensor,
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
    factor: torch.Tensor,
    dtype: torch.dtype,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The saved gradients times the upstream scalar, rounded once into new tensors."""
    weight = dloss.double() * factor
    x, w, b = (
        _scaled(saved, weight, dtype) if need else absent(dloss)
        for saved, need in ((dx, need_x), (dweight, need_weight), (dbias, need_bias))
    )
    return x, w, b


def _scaled(saved: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(saved.shape, dtype=dtype, device=saved.device)
    return torch.mul(saved, weight.to(saved.dtype), out=out)


def triton_bwd(
    dloss: torch.Tensor,
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
    factor: torch.Tensor,
    dtype: torch.dtype,
    *needs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same by a kernel."""
    if not launchable(dloss, dtype):
        return reference_bwd(dloss, dx, dweight, dbias, factor, dtype, *needs)
    results = []
    for saved, need in zip((dx, dweight, dbias), needs, strict=True):
        results.append(absent(dloss))
        if need:
            results[-1] = torch.empty(saved.shape, dtype=dtype, device=saved.device)
            launch_scale(saved, dloss, factor, results[-1])
    x, weight, bias = results
    return x, weight, bias


def _fake_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    denominator: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    *rest: Any,
) -> _Results:
    check_inputs(x, weight, bias, labels, denominator, reduction)
    need_x, need_weight, need_bias = rest[-3:]
    wide = compute_dtype(x)
    return (
        x.new_empty((), dtype=wide),
        torch.empty_like(x, dtype=wide, memory_format=torch.contiguous_format)
        if need_x
        else absent(x),
        torch.empty_like(weight, dtype=wide, memory_format=torch.contiguous_format)
        if need_weight
        else absent(x),
        torch.empty_like(bias, dtype=wide) if need_bias and bias is not None else absent(x),
        x.new_empty((), dtype=torch.float64),
    )


def _fake_bwd(
    dloss: torch.Tensor,
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
    factor: torch.Tensor,
    dtype: torch.dtype,
    *needs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w, b = (
        torch.empty_like(t, dtype=dtype) if need else absent(dloss)
        for t, need in zip((dx, dweight, dbias), needs, strict=True)
    )
    return x, w, b


def _save(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
    return *outputs[1:], inputs["x"].dtype


def _forward_flops(args: Sequence[Any], out: Any) -> Any:
    """Of the logits and of dx; dW would be as much again as one of them."""
    x, weight = args[:2]
    return 4 * x.numel() * weight.shape[0]


def _workspace(args: Sequence[Any], trained: frozenset[str]) -> int:
    """A chunk's logits, dx, and dW with the weight's own gradient, at their largest."""
    x, weight = args[:2]
    summed = "weight" in trained
    step = chunk_rows(x.shape[0], weight.shape[0], x.element_size(), summed)
    wide = compute_dtype(x).itemsize
    scratch = min(step, x.shape[0]) * weight.shape[0] * x.element_size()
    whole = x.numel() * wide + summed * weight.numel() * (wide + weight.element_size())
    return int(scratch + whole)


OPS = (
    OpSpec(
        forward="linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor labels, "
        "Tensor? denominator, int ignore_index, str reduction, float label_smoothing, "
        "float softcap, float scale, float z_loss) "
        "-> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias, Tensor factor)",
        backward="linear_cross_entropy_backward(Tensor dloss, Tensor dx, Tensor dweight, "
        "Tensor dbias, Tensor factor, ScalarType dtype, bool need_x, bool need_weight, "
        "bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        differentiable=("x", "weight", "bias"),
        outputs=1,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        fake=(_fake_fwd, _fake_bwd),
        triton=(triton_fwd, triton_bwd),
        forward_needs=True,
        flops=(_forward_flops, lambda args, out: 0),
        workspace=_workspace,
    ),
)
