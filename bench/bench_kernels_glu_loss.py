"""Gated linear units, the losses and 4-bit dequantisation on a GPU, beside their peers.

    python bench/bench_kernels_glu_loss.py results.json [--quick | --dry]

One process, random data, every input larger than the L2 cache. "copy" is the share of the device's
copy bandwidth, measured in the same run, that the bytes a kernel has to move amount to; for the
chunked head "gemm" is its time over that of the bare GEMMs. Errors are root mean squares against
float64, relative to its size. Peers that cannot be imported are left out. ``--dry`` makes every
step at tiny shapes, and needs no GPU: then kernels run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import head_bench
import place
import torch
import torch.nn.functional as F
from measured import BF16, COLUMNS, FORM, PLAIN, ROWS, late, liger, random, record
from place import DEVICE
from roofline import (
    copy_bandwidth,
    milliseconds,
    peak_mebibytes,
    root_mean_square,
    table,
)

from fusewright.kernels import nf4
from fusewright.runtime.op import register_all

register_all()
OPS = torch.ops.fusewright


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
        if peers and at == 0 and place.ON_GPU and not late():
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
                **theirs[direction], error=mine,
                **{"eager error": eager, "peak MiB": peak_mebibytes(ours[direction])},
            )  # fmt: skip


def bench_packed(copy: float, shape: tuple[int, int]) -> None:
    """One tensor that holds both: halves with gelu and gelu_tanh, interleaved, the clamped form."""
    clamped = (1.702, 7.0, True, True)

    def bounded(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    def halves(function: Any) -> Any:
        return lambda both: function(*both.chunk(2, -1))

    for op, backward, form, eager in (
        (OPS.glu_packed, OPS.glu_packed_backward, ("gelu_tanh", True, False),
         halves(lambda g, u: F.gelu(g, approximate="tanh") * u)),
        (OPS.glu_packed, OPS.glu_packed_backward, ("gelu", True, False),
         halves(lambda g, u: F.gelu(g) * u)),
        (OPS.glu_clamped_packed, OPS.glu_clamped_packed_backward, clamped,
         lambda both: bounded(both[..., ::2], both[..., 1::2])),
    ):  # fmt: skip
        name = f"{op.__name__} {form[0] if isinstance(form[0], str) else 'interleaved'}"
        pair(copy, name, shape, 2, lambda b, op=op, form=form: op(b, *form, BF16),
             lambda d, b, back=backward, form=form: back(d, b, *form, True), eager)  # fmt: skip
    pair(copy, "activation relu2", shape, 1, lambda x: OPS.activation(x, "relu2", BF16),
         lambda d, x: OPS.activation_backward(d, x, "relu2", True), lambda x: F.relu(x).square())  # fmt: skip


def pair(
    copy: float,
    name: str,
    shape: tuple[int, int],
    wide: int,
    forward: Any,
    backward: Any,
    eager: Any,
) -> None:
    """Both directions of an op of one tensor, ``wide`` times as wide as its result, beside eager."""
    x, dy = random(shape[0], wide * shape[1]), random(*shape)
    small, dsmall = random(min(512, shape[0]), wide * min(2048, shape[1])), None
    found = []
    for f, dtype in ((forward, BF16), (eager, BF16), (eager, torch.float64)):
        leaf = small.to(dtype).requires_grad_()
        y = f(leaf)
        dsmall = torch.randn_like(y) if dsmall is None else dsmall
        found.append((y.detach(), torch.autograd.grad(y, leaf, dsmall.to(dtype))[0]))
    leaf = x.detach().requires_grad_()
    y = eager(leaf)
    theirs = (
        milliseconds(lambda: eager(leaf)),
        milliseconds(lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)),
    )
    for at, (direction, run, tensors) in enumerate((
        ("forward", lambda: forward(x), wide + 1),
        ("backward", lambda: backward(dy, x), 2 * wide + 1),
    )):  # fmt: skip
        ms = milliseconds(run)
        mine, rival = (root_mean_square(f[at], found[2][at]) for f in found[:2])
        more = {"eager ms": theirs[at], "peak MiB": peak_mebibytes(run), "eager error": rival}
        moved = tensors * dy.numel() * 2
        record(name, shape, direction, ms, copy=moved / ms / copy, error=mine, **more)


def loss_errors(vocab: int) -> dict[str, tuple[float, float]]:
    """(ours, eager's) of the rows' losses and of d(logits), on a small problem."""
    logits = random(256, vocab, scale=3.0)
    labels = torch.randint(vocab, (256,), device=DEVICE)
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
    logits, labels = random(rows, vocab), torch.randint(vocab, (rows,), device=DEVICE)
    size, one = logits.numel() * 2, torch.ones((), device=DEVICE)
    saved = OPS.cross_entropy(logits, labels, *FORM)[1:]
    forward = milliseconds(lambda: OPS.cross_entropy(logits, labels, *FORM))
    backward = milliseconds(
        lambda: OPS.cross_entropy_backward(one, logits, labels, *saved, *FORM, True)
    )
    rivals = {"eager ms": lambda x, y: F.cross_entropy(x.float(), y)}
    if peers and place.ON_GPU and not late():
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
    errors = loss_errors(min(vocab, 32000))
    for direction, ms, tensors in (("forward", forward, 1), ("backward", backward, 2)):
        mine, eager = errors[direction]
        record("cross_entropy", (rows, vocab), direction, ms, copy=tensors * size / ms / copy,
               error=mine, **{"eager error": eager})  # fmt: skip
    both = forward + backward

    def step() -> Any:
        return torch.autograd.grad(OPS.cross_entropy(leaf, labels, *FORM)[0], leaf)

    record("cross_entropy", (rows, vocab), "both", both, copy=3 * size / both / copy, **theirs,
           **{"peak MiB": peak_mebibytes(step)})  # fmt: skip


def bench_nf4(copy: float, shape: tuple[int, int]) -> None:
    """Double quantisation in blocks of 64, dense and into a wider buffer."""
    rows, columns = shape
    elements = rows * columns
    blocks = elements // 64

    def bytes_(n: int) -> torch.Tensor:
        return torch.randint(256, (n,), dtype=torch.uint8, device=DEVICE)

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
        plain = nf4.reference_fwd(*args)
        error = root_mean_square(OPS.nf4_dequantize(*args), plain)  # bit for bit: zero
        more = {"eager ms": milliseconds(lambda a=args: nf4.reference_fwd(*a), repeats=5)}
        more["peak MiB"] = peak_mebibytes(lambda a=args: OPS.nf4_dequantize(*a))
        record(name, shape, "forward", ms, copy=moved / ms / copy, error=error, **more)


TINY = {
    "glu": [(64, 96)],
    "packed": (64, 96),
    "losses": [(8, 300)],
    "nf4": [(32, 64)],
    "head": (64, 32, 300),
}
FULL = {
    "glu": [(16384, 14336), (4096, 14336), (16384, 8192), (8192, 11008), (65536, 4864)],
    "packed": (16384, 14336),
    "losses": [(16384, 128256), (16384, 32000), (4096, 151936), (4096, 262144), (4096, 50257)],
    "nf4": [(14336, 4096), (28672, 8192)],
    "head": (16384, 4096, 128256),
}


def main() -> None:
    """Measure everything, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one shape of each, no peers")
    parser.add_argument("--dry", action="store_true", help="tiny shapes; needs no GPU")
    options = parser.parse_args()
    if not (place.ON_GPU or options.dry):
        parser.error("there is no GPU; --dry needs none")
    quick, shapes = options.quick, TINY if options.dry else FULL
    most = 1 if quick else None
    torch.manual_seed(0)
    copy = copy_bandwidth()
    print(f"{place.name()}: copy {copy / 1e9:.2f} TB/s", flush=True)
    bench_glu(copy, shapes["glu"][:most], not quick)
    bench_packed(copy, shapes["packed"])
    for at, (rows, vocab) in enumerate(shapes["losses"][:most]):
        bench_cross_entropy(copy, rows, vocab, not quick and at == 0)
    for shape in shapes["nf4"]:
        bench_nf4(copy, shape)
    head_bench.linear_errors(*((100, 32, 300) if options.dry else (5000, 512, 8000)))
    for trained in (False, True):
        head_bench.bench_linear(*shapes["head"], trained, not quick)
    again = copy_bandwidth()
    print(table([r for r in ROWS if r["pass"] != "chunk"], COLUMNS))
    print(f"copy {copy / 1e9:.2f} TB/s at the start, {again / 1e9:.2f} at the end")
    found = {"device": place.name(), "torch": torch.__version__}
    found |= {"copy_bytes_per_ms": copy, "rows": ROWS}
    options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
