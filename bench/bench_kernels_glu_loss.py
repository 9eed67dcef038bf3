"""Gated linear units, the losses and 4-bit dequantisation on a GPU, beside their peers.

    python bench/bench_kernels_glu_loss.py results.json [--quick]

One process, random data, every input larger than the L2 cache. "copy" is the share of the device's
copy bandwidth, measured in the same run, that the bytes a kernel has to move amount to; for the
chunked head "gemm" is its time over that of the bare GEMMs. Errors are root mean squares against
float64, relative to its size: ours over eager's. Peers that cannot be imported are left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from roofline import (
    copy_bandwidth,
    host_microseconds,
    milliseconds,
    peak_mebibytes,
    root_mean_square,
    table,
)

from fusewright.kernels import linear_cross_entropy as head
from fusewright.kernels.cross_entropy import LossForm
from fusewright.kernels.cross_entropy_launch import launch_in_place
from fusewright.kernels.head_gradients import matmul_wide
from fusewright.kernels.linear_cross_entropy import chunk_rows
from fusewright.runtime.op import register_all

register_all()
OPS = torch.ops.fusewright
BF16 = torch.bfloat16
PLAIN = (0.0, 0.0, 1.0, 0.0)  # label smoothing, softcap, scale, z-loss
FORM = (-100, "mean", *PLAIN)
COLUMNS = (
    "op", "shape", "pass", "ms", "copy", "gemm", "eager ms", "compile ms", "liger ms", "peak MiB",
    "error", "eager error",
)  # fmt: skip
ROWS: list[dict[str, Any]] = []
DEADLINE = time.monotonic() + 125


def late() -> bool:
    """Whether the peers have to be left out so that the run ends in time."""
    return time.monotonic() > DEADLINE


def liger() -> Any:
    """Liger's functional interface, or None."""
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    return functional


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers on the GPU."""
    return torch.randn(shape, device="cuda", dtype=dtype) * scale


def record(op: str, shape: tuple[int, ...], direction: str, ms: float, **more: Any) -> None:
    """Keep a measurement and show that it was made."""
    row = {"op": op, "shape": "x".join(map(str, shape)), "pass": direction, "ms": ms, **more}
    ROWS.append(row)
    print(json.dumps(row), flush=True)


def glu_errors(activation: Any, name: str) -> dict[str, tuple[float, float]]:
    """(ours, eager's) of y and of the gradients together, on a small problem."""
    gate, up, dy = random(512, 2048, scale=2.0), random(512, 2048), random(512, 2048)
    results = []
    for f, dtype in (
        (lambda g, u: OPS.glu(g, u, name, BF16), BF16),
        (lambda g, u: activation(g) * u, BF16),
        (lambda g, u: activation(g) * u, torch.float64),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in (gate, up)]
        y = f(*leaves)
        grads = torch.autograd.grad(y, leaves, dy.to(dtype))
        results.append((y.detach(), torch.cat([g.reshape(-1) for g in grads])))
    ours, eager, oracle = results
    return {
        "forward": (root_mean_square(ours[0], oracle[0]), root_mean_square(eager[0], oracle[0])),
        "backward": (root_mean_square(ours[1], oracle[1]), root_mean_square(eager[1], oracle[1])),
    }


def bench_glu(copy: float, shapes: list[tuple[int, int]], peers: bool) -> None:
    """Separate gate and up, silu."""
    errors = glu_errors(F.silu, "silu")
    for at, shape in enumerate(shapes):
        gate, up, dy = (random(*shape) for _ in range(3))
        size = gate.numel() * 2
        ours = {
            "forward": lambda g=gate, u=up: OPS.glu(g, u, "silu", BF16),
            "backward": lambda d=dy, g=gate, u=up: OPS.glu_backward(d, g, u, "silu", True, True),
        }
        rivals = {"eager ms": lambda g, u: F.silu(g) * u}
        if peers and at == 0 and not late():
            rivals["compile ms"] = torch.compile(lambda g, u: F.silu(g) * u)
            if liger() is not None:
                rivals["liger ms"] = liger().liger_swiglu
        theirs: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
        for name, f in rivals.items():
            leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
            theirs["forward"][name] = milliseconds(lambda f=f, v=leaves: f(*v))
            if name != "liger ms":  # its backward writes over what it saved
                y = f(*leaves)
                theirs["backward"][name] = milliseconds(
                    lambda y=y, v=leaves, d=dy: torch.autograd.grad(y, v, d, retain_graph=True)
                )
        for direction, tensors in (("forward", 3), ("backward", 5)):
            ms = milliseconds(ours[direction])
            mine, eager = errors[direction]
            record(
                "glu", shape, direction, ms, copy=tensors * size / ms / copy,
                **theirs[direction], error=mine, **{"eager error": eager},
            )  # fmt: skip


def bench_packed(copy: float, shape: tuple[int, int]) -> None:
    """One tensor that holds both: halves with gelu_tanh, interleaved pairs with the clamped form."""
    both, dy = random(shape[0], 2 * shape[1]), random(*shape)
    size = dy.numel() * 2
    clamped = (1.702, 7.0, True, True)
    for name, forward, backward in (
        (
            "glu_packed gelu_tanh",
            lambda: OPS.glu_packed(both, "gelu_tanh", True, False, BF16),
            lambda: OPS.glu_packed_backward(dy, both, "gelu_tanh", True, False, True),
        ),
        (
            "glu_packed gelu",
            lambda: OPS.glu_packed(both, "gelu", True, False, BF16),
            lambda: OPS.glu_packed_backward(dy, both, "gelu", True, False, True),
        ),
        (
            "glu_clamped_packed interleaved",
            lambda: OPS.glu_clamped_packed(both, *clamped, BF16),
            lambda: OPS.glu_clamped_packed_backward(dy, both, *clamped, True),
        ),
    ):
        for direction, run, tensors in (("forward", forward, 3), ("backward", backward, 5)):
            ms = milliseconds(run)
            record(name, shape, direction, ms, copy=tensors * size / ms / copy)
    ms = milliseconds(lambda: OPS.activation(both, "relu2", BF16))
    record("activation relu2", tuple(both.shape), "forward", ms, copy=4 * size / ms / copy)


def loss_errors() -> dict[str, tuple[float, float]]:
    """(ours, eager's) of the rows' losses and of d(logits), on a small problem."""
    logits, labels = random(256, 32000, scale=3.0), torch.randint(32000, (256,), device="cuda")
    results = []
    for f, dtype in (
        (lambda t: OPS.cross_entropy(t, labels, -100, "none", *PLAIN)[0], BF16),
        (lambda t: F.cross_entropy(t.float(), labels, reduction="none"), BF16),
        (lambda t: F.cross_entropy(t, labels, reduction="none"), torch.float64),
    ):
        leaf = logits.to(dtype).requires_grad_()
        loss = f(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss.mean(), leaf)[0]))
    ours, eager, oracle = results
    return {
        name: (root_mean_square(ours[i], oracle[i]), root_mean_square(eager[i], oracle[i]))
        for i, name in enumerate(("forward", "backward"))
    }


def bench_cross_entropy(copy: float, rows: int, vocab: int, peers: bool) -> None:
    """Forward and backward over bfloat16 logits, and the peers' sum of both."""
    logits, labels = random(rows, vocab), torch.randint(vocab, (rows,), device="cuda")
    size, one = logits.numel() * 2, torch.ones((), device="cuda")
    saved = OPS.cross_entropy(logits, labels, *FORM)[1:]
    forward = milliseconds(lambda: OPS.cross_entropy(logits, labels, *FORM))
    backward = milliseconds(
        lambda: OPS.cross_entropy_backward(one, logits, labels, *saved, *FORM, True)
    )
    rivals = {"eager ms": lambda x, y: F.cross_entropy(x.float(), y)}
    if peers and not late():
        rivals["compile ms"] = torch.compile(lambda x, y: F.cross_entropy(x.float(), y))
        if liger() is not None:  # it writes over its input: the copy is ours to grant
            rivals["liger ms"] = lambda x, y: liger().liger_cross_entropy(x.clone(), y)
    leaf = logits.detach().requires_grad_()
    theirs = {
        name: milliseconds(
            lambda f=f: torch.autograd.grad(f(leaf, labels), leaf), repeats=5, warmup=2
        )
        for name, f in rivals.items()
    }
    errors = loss_errors()
    for direction, ms, tensors in (("forward", forward, 1), ("backward", backward, 2)):
        mine, eager = errors[direction]
        record("cross_entropy", (rows, vocab), direction, ms, copy=tensors * size / ms / copy,
               error=mine, **{"eager error": eager})  # fmt: skip
    both = forward + backward
    record("cross_entropy", (rows, vocab), "both", both, copy=3 * size / both / copy, **theirs)


def gemm_floors(x: torch.Tensor, weight: torch.Tensor) -> tuple[float, float, float]:
    """Milliseconds of logits, dx and dW as one bare bfloat16 GEMM each."""
    logits = x @ weight.t()
    return (
        milliseconds(lambda: x @ weight.t(), repeats=7, warmup=2),
        milliseconds(lambda: logits @ weight, repeats=7, warmup=2),
        milliseconds(lambda: logits.t() @ x, repeats=7, warmup=2),
    )


def bench_chunk(x: torch.Tensor, weight: torch.Tensor, trained: bool) -> None:
    """The GEMMs of one chunk in the dtypes of their results, and the kernel between them."""
    (rows, hidden), vocab = x.shape, weight.shape[0]
    step = min(rows, chunk_rows(rows, vocab, 2, trained))
    rows_x, part = x[:step], x.new_empty(step, vocab)
    wide = torch.zeros(vocab, hidden, dtype=torch.float32, device="cuda")
    losses = torch.empty(step, dtype=torch.float64, device="cuda")
    labels = torch.randint(vocab, (step,), device="cuda")
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
        ms = milliseconds(run, repeats=7, warmup=2)
        record(name, (step, hidden, vocab), "chunk", ms)


def bench_linear(rows: int, hidden: int, vocab: int, trained: bool, peers: bool) -> None:
    """The chunked head and loss over the bare GEMMs that it cannot do without."""
    x, weight = random(rows, hidden), random(vocab, hidden, scale=0.02)
    labels = torch.randint(vocab, (rows,), device="cuda")
    floors = gemm_floors(x, weight)
    floor = sum(floors) if trained else floors[0] + floors[1]
    for part, ms in zip(("logits", "dx", "dW"), floors, strict=True):
        record("GEMM " + part, (rows, hidden, vocab), "whole", ms)
    bench_chunk(x, weight, trained)
    needs = (True, trained, False)

    def forward() -> Any:
        return OPS.linear_cross_entropy_forward(x, weight, None, labels, None, *FORM, *needs)

    ms = milliseconds(forward, repeats=5, warmup=2)
    peak = peak_mebibytes(forward)
    held = (x.numel() + (weight.numel() if trained else 0)) * 4 / 2**20
    saved, one = forward()[1:], torch.ones((), device="cuda")
    back = milliseconds(
        lambda: OPS.linear_cross_entropy_backward(one, *saved, BF16, *needs), repeats=5
    )
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


def linear_errors() -> None:
    """The chunked head against float64, beside eager, over several chunks."""
    rows, hidden, vocab = 5000, 512, 8000
    x, weight = random(rows, hidden), random(vocab, hidden, scale=0.1)
    labels = torch.randint(vocab, (rows,), device="cuda")
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


def bench_nf4(copy: float, shape: tuple[int, int]) -> None:
    """Double quantisation in blocks of 64, dense and into a wider buffer."""
    rows, columns = shape
    elements = rows * columns
    blocks = elements // 64

    def bytes_(n: int) -> torch.Tensor:
        return torch.randint(256, (n,), dtype=torch.uint8, device="cuda")

    tensors = (
        bytes_(elements // 2), bytes_(blocks), random(16, dtype=torch.float32),
        random(1, dtype=torch.float32), random(-(-blocks // 256), dtype=torch.float32),
        random(256, dtype=torch.float32),
    )  # fmt: skip
    moved = elements * 2.5 + blocks * (1 + 4 / 256)
    for stride in (0, columns + 64):
        args = (*tensors, rows, columns, 64, 256, stride, BF16)
        ms = milliseconds(lambda a=args: OPS.nf4_dequantize(*a))
        name = "nf4_dequantize" + (" wide" if stride else "")
        record(name, shape, "forward", ms, copy=moved / ms / copy)


def bench_host() -> None:
    """Microseconds of the host for one forward with grad."""
    small = random(64, 256).requires_grad_()
    both = random(64, 512).requires_grad_()
    labels = torch.randint(256, (64,), device="cuda")
    for name, run in (
        ("glu", lambda: OPS.glu(small, small, "silu", BF16)),
        ("glu_packed", lambda: OPS.glu_packed(both, "silu", True, False, BF16)),
        ("activation", lambda: OPS.activation(small, "silu", BF16)),
        ("cross_entropy", lambda: OPS.cross_entropy(small, labels, -100, "mean", *PLAIN)),
        ("eager silu*up", lambda: F.silu(small) * small),
    ):
        record("host us", (), name, host_microseconds(run))


def main() -> None:
    """Measure everything, print a table and write the numbers."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("json", type=Path)
    arguments.add_argument("--quick", action="store_true", help="one shape of each, no peers")
    options = arguments.parse_args()
    quick = options.quick
    torch.manual_seed(0)
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.2f} TB/s", flush=True)
    bench_host()
    wide = [(16384, 14336), (4096, 14336), (16384, 8192), (8192, 11008), (65536, 4864)]
    bench_glu(copy, wide[:1] if quick else wide, not quick)
    bench_packed(copy, (16384, 14336))
    vocabularies = [(16384, 128256), (16384, 32000), (4096, 151936), (4096, 262144), (4096, 50257)]
    for at, (rows, vocab) in enumerate(vocabularies[:1] if quick else vocabularies):
        bench_cross_entropy(copy, rows, vocab, not quick and at == 0)
    bench_nf4(copy, (14336, 4096))
    bench_nf4(copy, (28672, 8192))
    linear_errors()
    for trained in (False, True):
        bench_linear(16384, 4096, 128256, trained, not quick)
    again = copy_bandwidth()
    print(table(ROWS, COLUMNS))
    print(f"copy {copy / 1e9:.2f} TB/s at the start, {again / 1e9:.2f} at the end")
    record_ = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    record_ |= {"copy_bytes_per_ms": copy, "rows": ROWS}
    options.json.write_text(json.dumps(record_, indent=1))


if __name__ == "__main__":
    main()
