"""Cross-entropy over the last dimension, with softcap, scale, label smoothing and z-loss.

Shapes: logits (T, V) in any float dtype and any row stride, labels (T,) integer, loss () or (T,)
in float32, lse (T,) and factor () in float64. factor is what "mean" multiplies a row by, 1 / count,
and 1 otherwise. Saved: logits, labels, lse, factor. What there is one of per element is computed in
float32 (float64 for float64 logits), what there is one of per row in float64.

With a = scale logits, z = c tanh(a / c) for softcap c > 0 and z = a otherwise, y the label,
e = label_smoothing, k = z_loss, and delta_j = [j = y]:
    lse    = log sum_j exp(z_j) = m + log s,  m = max_j z_j,  s = sum_j exp(z_j - m)
    loss_i = (1 - e) (lse - z_y) + e mean_j (lse - z_j) + k lse^2
computed as log s + (1 - e) (m - z_y) + e mean_j (m - z_j), because lse - z_y cancels where the
probability of the label goes to 1. A row whose label is ignore_index has loss 0 and gradient 0.
Reduction: "none" gives the rows, "sum" their sum, "mean" their sum over the number of rows that
count: NaN when there is none, with gradient 0, as torch has it.

Backward, with p_j = exp(z_j - lse) and w_i = dloss factor (dloss_i for "none"):
    dz_j      = w_i (p_j (1 + 2 k lse) - e / V - (1 - e) delta_j)
    dlogits_j = dz_j scale (1 - (z_j / c)^2)
For the label p_y - 1 is expm1(z_y - lse), so nothing cancels as p_y goes to 1; it is computed in
float64, once a row. For the others the rounding of z_j - lse, which exp would turn into a relative
error of |log p_j| ulps, is put back to first order by the kernels; the reference takes a softmax,
where z_j - m is rounded once. lse is kept in float64 because in float32 its own rounding, relative
to z_y - lse, would be that cancellation.

Traffic: forward reads the logits once; backward reads them once and writes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fusewright.kernels.cross_entropy_launch import (
    launch_backward,
    launch_forward,
)
from fusewright.kernels.launch import launchable
from fusewright.kernels.reduce import absent, compute_dtype
from fusewright.kernels.spec import OpSpec

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

REDUCTIONS = ("mean", "sum", "none")
_CACHED = 2**16  # numbers of a block of rows whose temporaries stay in a CPU core's cache


class LossForm(NamedTuple):
    """The parameters of the loss of one row, in the order in which the ops take them."""

    ignore_index: int
    label_smoothing: float
    softcap: float
    scale: float
    z_loss: float


def check_loss(logits_rows: int, vocab: int, labels: torch.Tensor, reduction: str) -> None:
    """Refuse labels or a reduction that do not fit; values of the labels are not looked at."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if labels.shape != (logits_rows,):
        raise ValueError(f"labels: expected shape ({logits_rows},), got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels: expected int64 or int32, got {labels.dtype}")
    if vocab == 0:
        raise ValueError("logits: expected at least one class, got none")


def check_logits(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse logits that are not a float matrix on the device of the labels."""
    if logits.dim() != 2:
        raise ValueError(f"logits: expected shape (T, V), got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a float dtype, got {logits.dtype}")
    if logits.device != labels.device:
        raise ValueError(f"labels: expected device {logits.device}, got {labels.device}")


def check_range(labels: torch.Tensor, ignore_index: int, vocab: int) -> None:
    """Every label is ignore_index or in [0, vocab): an IndexError, or an assertion on the device.

    Off the CPU nothing is brought to the host; the assertion fails at the next synchronisation.
    """
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if labels.device.type == "cpu":
        if bool(bad.any()):
            value = int(labels[bad][0])
            raise IndexError(
                f"labels: expected {ignore_index} or 0 <= label < {vocab}, got {value}"
            )
    elif labels.device.type != "meta":
        torch._assert_async(~bad.any(), f"labels: expected {ignore_index} or 0 <= label < {vocab}")


def transform(logits: torch.Tensor, form: LossForm) -> torch.Tensor:
    """z: the scaled and softcapped logits, in the dtype of computation."""
    z = logits.to(compute_dtype(logits))
    if form.scale != 1.0:
        z = z * form.scale
    return torch.tanh(z / form.softcap) * form.softcap if form.softcap > 0 else z


def row_blocks(logits: torch.Tensor) -> list[slice]:
    """Blocks of rows that are best worked on one after the other: a CPU's stay in its cache."""
    rows, vocab = logits.shape
    step = max(1, _CACHED // vocab if logits.device.type == "cpu" else rows)
    return [slice(at, at + step) for at in range(0, rows, step)] or [slice(0, 0)]


def row_loss(
    logits: torch.Tensor, labels: torch.Tensor, form: LossForm
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss (T,) and lse (T,), both in float64."""
    parts = [block_loss(logits[rows], labels[rows], form) for rows in row_blocks(logits)]
    losses, lse = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(lse)


def block_loss(
    logits: torch.Tensor, labels: torch.Tensor, form: LossForm
) -> tuple[torch.Tensor, torch.Tensor]:
    """``row_loss`` of rows that are worked on at once."""
    z = transform(logits, form)
    valid = labels != form.ignore_index
    top = z.amax(-1)
    top = torch.where(top == -float("inf"), 0.0, top)
    log_s = torch.log(torch.exp(z - top[:, None]).sum(-1, dtype=torch.float64))
    at_label = z.gather(1, torch.where(valid, labels, 0).long()[:, None])[:, 0]
    loss = log_s + (1.0 - form.label_smoothing) * (top - at_label).double()
    if form.label_smoothing > 0:
        loss = loss + form.label_smoothing * (top[:, None] - z).mean(-1, dtype=torch.float64)
    lse = top.double() + log_s
    if form.z_loss > 0:
        loss = loss + form.z_loss * lse * lse
    return torch.where(valid, loss, 0.0), lse


def row_grad(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    weight: torch.Tensor,
    form: LossForm,
) -> torch.Tensor:
    """dlogits (T, V) in the logits' dtype; ``weight`` () or (T,) multiplies every row."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    weight = weight.expand(labels.shape)
    for rows in row_blocks(logits):
        out[rows] = block_grad(logits[rows], labels[rows], lse[rows], weight[rows], form)
    return out


def block_grad(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    weight: torch.Tensor,
    form: LossForm,
) -> torch.Tensor:
    """``row_grad`` of rows that are worked on at once, in the dtype of computation."""
    z = transform(logits, form)
    vocab = z.shape[1]
    valid = labels != form.ignore_index
    index = torch.where(valid, labels, 0).long()[:, None]
    lse = lse[:, None]
    weight = torch.where(valid, weight.double(), 0.0)[:, None]
    pull = 1.0 + 2.0 * form.z_loss * lse
    dz = torch.softmax(z, -1)  # rounds z - max, where exp(z - lse) would round twice
    dz.mul_((pull * weight).to(z.dtype))
    if form.label_smoothing > 0:
        dz -= (weight * (form.label_smoothing / vocab)).to(z.dtype)
    # The label's entry, one a row, in float64: most of a row's gradient is there.
    log_p = z.gather(1, index).double() - lse
    at_label = torch.expm1(log_p) + form.label_smoothing - form.label_smoothing / vocab
    at_label = at_label + torch.exp(log_p) * (pull - 1.0)
    dz.scatter_(1, index, (weight * at_label).to(z.dtype))
    dz.masked_fill_(~valid[:, None], 0.0)
    if form.softcap > 0:
        dz = dz * (1.0 - (z / form.softcap) ** 2)
    return dz * form.scale if form.scale != 1.0 else dz


def reduce_rows(
    rows: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss as ``reduction`` asks for it, from the float64 losses of the rows, and factor."""
    one = torch.ones((), dtype=torch.float64, device=rows.device)
    if reduction == "none":
        return rows, one
    if reduction == "sum":
        return rows.sum(), one
    count = (labels != ignore_index).sum()
    return rows.sum() / count, torch.where(count > 0, one / count, 0.0)


def reference_fwd(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
) -> _Results:
    """loss, lse and factor in plain PyTorch; see the module's header."""
    check_logits(logits, labels)
    check_loss(logits.shape[0], logits.shape[1], labels, reduction)
    check_range(labels, ignore_index, logits.shape[1])
    form = LossForm(ignore_index, label_smoothing, softcap, scale, z_loss)
    rows, lse = row_loss(logits, labels, form)
    loss, factor = reduce_rows(rows, labels, ignore_index, reduction)
    return loss.to(compute_dtype(logits)), lse, factor


def reference_bwd(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    factor: torch.Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
    need_logits: bool,
) -> torch.Tensor:
    """dlogits in plain PyTorch; see the module's header."""
    if not need_logits:
        return absent(logits)
    form = LossForm(ignore_index, label_smoothing, softcap, scale, z_loss)
    return row_grad(logits, labels, lse, dloss.double() * factor, form)


def triton_fwd(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
) -> _Results:
    """loss, lse and factor by kernels."""
    form = LossForm(ignore_index, label_smoothing, softcap, scale, z_loss)
    if not launchable(logits):
        return reference_fwd(logits, labels, ignore_index, reduction, *form[1:])
    check_logits(logits, labels)
    rows, vocab = logits.shape
    check_loss(rows, vocab, labels, reduction)
    logits = _with_adjacent_columns(logits)
    lse = torch.empty(rows, dtype=torch.float64, device=logits.device)
    each = reduction == "none"
    losses = torch.empty_like(lse, dtype=torch.float32 if each else torch.float64)
    loss, factor = launch_forward(logits, labels, losses, lse, form, reduction)
    return losses if loss is None else loss, lse, factor


def _with_adjacent_columns(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def triton_bwd(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    factor: torch.Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
    need_logits: bool,
) -> torch.Tensor:
    """dlogits by a kernel."""
    form = LossForm(ignore_index, label_smoothing, softcap, scale, z_loss)
    if not need_logits or not launchable(logits):
        return reference_bwd(
            dloss, logits, labels, lse, factor, ignore_index, reduction, *form[1:], need_logits
        )
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch_backward(dloss, _with_adjacent_columns(logits), labels, lse, factor, out, form)
    return out


def _fake_fwd(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str, *rest: Any
) -> _Results:
    check_logits(logits, labels)
    rows = logits.shape[:1]
    shape = rows if reduction == "none" else ()
    return (
        logits.new_empty(shape, dtype=compute_dtype(logits)),
        logits.new_empty(rows, dtype=torch.float64),
        logits.new_empty((), dtype=torch.float64),
    )


def _fake_bwd(dloss: torch.Tensor, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
    if not rest[-1]:
        return absent(logits)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(inputs: dict[str, Any], outputs: tuple[torch.Tensor, ...]) -> Sequence[Any]:
    logits, labels, *form = inputs.values()
    return logits, labels, *outputs[1:], *form


_FORM = (
    "int ignore_index, str reduction, float label_smoothing, float softcap, float scale, "
    "float z_loss"
)

OPS = (
    OpSpec(
        forward=f"cross_entropy(Tensor logits, Tensor labels, {_FORM}) "
        "-> (Tensor loss, Tensor lse, Tensor factor)",
        backward="cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, "
        f"Tensor factor, {_FORM}, bool need_logits) -> Tensor dlogits",
        differentiable=("logits",),
        outputs=1,
        save=_save,
        reference=(reference_fwd, reference_bwd),
        fake=(_fake_fwd, _fake_bwd),
        triton=(triton_fwd, triton_bwd),
    ),
)
