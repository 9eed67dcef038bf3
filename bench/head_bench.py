"""The chunked head and loss on a GPU, over the bare GEMMs that it cannot do without."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from measured import BF16, FORM, PLAIN, late, liger, random, record
from place import DEVICE, ON_GPU
from roofline import Run, interleaved, milliseconds, peak_mebibytes, root_mean_square

from fusewright.kernels import linear_cross_entropy as head
from fusewright.kernels.cross_entropy import LossForm
from fusewright.kernels.cross_entropy_launch import launch_in_place
from fusewright.kernels.head_gradients import matmul_wide
from fusewright.kernels.linear_cross_entropy import chunk_rows

OPS = torch.ops.fusewright


def bench_chunk(x: torch.Tensor, weight: torch.Tensor, trained: bool) -> None:
    """The GEMMs of one chunk in the dtypes of their results, and the kernel between them."""
    (rows, hidden), vocab = x.shape, weight.shape[0]
    step = min(rows, chunk_rows(rows, vocab, 2, trained))
    rows_x, part = x[:step], x.new_empty(step, vocab)
    wide = torch.zeros(vocab, hidden, dtype=torch.float32, device=DEVICE)
    losses = torch.empty(step, dtype=torch.float64, device=DEVICE)
    labels = torch.randint(vocab, (step,), device=DEVICE)
    form = LossForm(-100, *PLAIN)
    for name, run in {
        "GEMM logits": lambda: torch.mm(rows_x, weight.t(), out=part),
        "kernel in place": lambda: launch_in_place(part, labels, losses, form, 1.0, True),
        "GEMM dx": lambda: torch.mm(part, weight),
        "GEMM dx float32": lambda: torch.mm(part, weight, out_dtype=torch.float32),
        "GEMM dW": lambda: torch.mm(part.t(), rows_x),
        "GEMM dW float32": lambda: matmul_wide(wide, part.t(), rows_x, add=False),
        "GEMM dW += float32": lambda: matmul_wide(wide, part.t(), rows_x, add=True),
    }.items():
        if name == "GEMM dx float32" and not ON_GPU:
            continue  # no CPU has it
        ms = milliseconds(run, repeats=7, warmup=2)
        record(name, (step, hidden, vocab), "chunk", ms)


def beside_gemms(
    x: torch.Tensor, weight: torch.Tensor, trained: bool, forward: Run, backward: Run
) -> tuple[float, float, dict[str, float]]:
    """Milliseconds of both directions, and of one bare GEMM each for logits, dx and dW, in turns."""
    logits = x @ weight.t()
    runs: dict[str, Run] = {"logits": lambda: x @ weight.t(), "dx": lambda: logits @ weight}
    if trained:
        runs["dW"] = lambda: logits.t() @ x
    found = interleaved(runs | {"forward": forward, "backward": backward}, 7)
    return found.pop("forward"), found.pop("backward"), found


def bench_linear(rows: int, hidden: int, vocab: int, trained: bool, peers: bool) -> None:
    """The chunked head and loss over the bare GEMMs that it cannot do without."""
    x, weight = random(rows, hidden), random(vocab, hidden, scale=0.02)
    labels = torch.randint(vocab, (rows,), device=DEVICE)
    bench_chunk(x, weight, trained)
    needs, one = (True, trained, False), torch.ones((), device=DEVICE)

    def forward() -> Any:
        return OPS.linear_cross_entropy_forward(x, weight, None, labels, None, *FORM, *needs)

    peak = peak_mebibytes(forward)
    held = (x.numel() + (weight.numel() if trained else 0)) * 4 / 2**20
    saved = forward()[1:]

    def backward() -> Any:
        return OPS.linear_cross_entropy_backward(one, *saved, BF16, *needs)

    ms, back, gemms = beside_gemms(x, weight, trained, forward, backward)
    floor = sum(gemms.values())
    for part, gemm in gemms.items():
        record("GEMM " + part, (rows, hidden, vocab), "whole", gemm)
    name, shape = "head+loss " + ("trained" if trained else "frozen"), (rows, hidden, vocab)
    record(name, shape, "forward", ms, gemm=ms / floor, **{"peak MiB": peak})
    record(name, shape, "less dx dW", 0.0, **{"peak MiB": peak - held})
    chosen = head.SCRATCH_BYTES
    for factor in (0.5, 2.0):
        head.SCRATCH_BYTES = int(factor * chosen)
        rows_ = min(rows, chunk_rows(rows, vocab, 2, trained))
        other = milliseconds(forward, repeats=3, warmup=1)
        record(name, shape, f"in chunks of {rows_}", other, gemm=other / floor)
    head.SCRATCH_BYTES = chosen
    record(name, shape, "backward", back)
    theirs: dict[str, float] = {}
    if peers and liger() is not None and not late():
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_(trained)]
        wanted = leaves if trained else leaves[:1]
        theirs["liger ms"] = milliseconds(
            lambda: torch.autograd.grad(
                liger().liger_fused_linear_cross_entropy(*leaves, labels), wanted
            ),
            repeats=3,
            warmup=1,
        )
    record(name, shape, "both", ms + back, gemm=(ms + back) / floor, **theirs)


def linear_errors(rows: int, hidden: int, vocab: int) -> None:
    """The chunked head against float64, beside eager, over several chunks."""
    x, weight = random(rows, hidden), random(vocab, hidden, scale=0.1)
    labels = torch.randint(vocab, (rows,), device=DEVICE)
    results = []
    for ours, dtype in ((True, BF16), (False, BF16), (False, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        if ours:
            loss = OPS.linear_cross_entropy(*leaves, None, labels, None, -100, "mean", *PLAIN)[0]
        else:
            logits = F.linear(*leaves)
            wide = logits if dtype is torch.float64 else logits.float()
            loss = F.cross_entropy(wide, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss / 3.0, leaves)))
    for name, mine, eager, oracle in zip(("loss", "dx", "dweight"), *results, strict=True):
        record("linear_cross_entropy", (rows, hidden, vocab), name, 0.0,
               error=root_mean_square(mine, oracle),
               **{"eager error": root_mean_square(eager, oracle)})  # fmt: skip
