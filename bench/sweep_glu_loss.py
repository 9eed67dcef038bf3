"""Every sensible block and number of warps of the GLU and loss kernels, as shares of copy bandwidth.

    python bench/sweep_glu_loss.py

For choosing the constants in the launch functions, which are fixed afterwards: nothing is measured
when the kernels are used.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from roofline import copy_bandwidth, milliseconds

from fusewright.kernels.cross_entropy_kernels import (
    cross_entropy_backward,
    cross_entropy_forward,
    loss_and_gradient_in_place,
)
from fusewright.kernels.glu_kernels import glu_backward, glu_forward
from fusewright.kernels.nf4_kernels import dequantize_blocks

BF16 = torch.bfloat16
GLU = {
    "ACTIVATION": "silu", "CLAMPED": False, "INTERLEAVED": False, "GATE_FIRST": False,
    "PRECISE": False, "enable_fp_fusion": True,
}  # fmt: skip
LOSS = {n: False for n in ("SCALED", "CAPPED", "SMOOTH", "Z_LOSS", "PRECISE", "SHIFTED")}
LOSS["enable_fp_fusion"] = True
NUMBERS = (0.0, 0.0, 1.0, 0.0, 0.0)


def show(name: str, copy: float, moved: float, runs: dict[str, Callable[[], Any]]) -> None:
    """One line: the share of copy bandwidth of every configuration, best first."""
    shares = {}
    for key, run in runs.items():
        shares[key] = moved / milliseconds(run, repeats=11, warmup=2) / copy
    best = sorted(shares.items(), key=lambda item: -item[1])
    print(f"{name}: " + "  ".join(f"{key} {share:.3f}" for key, share in best), flush=True)


def glu(copy: float) -> None:
    """Forward and backward, as one flat row and from packed halves."""
    rows, width = 16384, 14336
    both = torch.randn(rows, 2 * width, device="cuda", dtype=BF16)
    y, out = both.new_empty(rows, width), torch.empty_like(both)
    dy = torch.randn_like(y)
    for layout, columns, n, at, step in (
        ("flat", rows * width, 1, rows * width, 0),
        ("halves", width, rows, width, 2 * width),
    ):
        forward, backward = {}, {}
        for block, warps in product((512, 1024, 2048, 4096), (2, 4, 8)):
            blocks = -(-columns // block)
            forward[f"{block}/{warps}"] = lambda b=block, w=warps, c=blocks, s=step, k=columns, n=n, a=at: (
                glu_forward[(n * c,)](
                    both, both, y, 0, a, s, s, k, k, c, 1.0, 0.0, **GLU, BLOCK=b, num_warps=w
                )
            )  # fmt: skip
            backward[f"{block}/{warps}"] = lambda b=block, w=warps, c=blocks, s=step, k=columns, n=n, a=at: (
                glu_backward[(n * c,)](
                    dy, both, both, out, out, 0, a, k, s, s, s, k, c, 1.0, 0.0,
                    **GLU, NEED_GATE=True, NEED_UP=True, BLOCK=b, num_warps=w,
                )
            )  # fmt: skip
        show(f"glu forward {layout}", copy, 6 * y.numel(), forward)
        show(f"glu backward {layout}", copy, 10 * y.numel(), backward)


def loss(copy: float, rows: int, vocab: int) -> None:
    """The cross-entropy, and the kernel of one chunk of the head."""
    logits = torch.randn(rows, vocab, device="cuda", dtype=BF16)
    labels = torch.randint(vocab, (rows,), device="cuda")
    losses, lse = (torch.ones(rows, dtype=torch.float64, device="cuda") for _ in range(2))
    one, factor = torch.ones((), device="cuda"), torch.ones((), device="cuda").double()
    out = torch.empty_like(logits)
    forward, backward, in_place = {}, {}, {}
    for block, warps in product((2048, 4096, 8192, 16384), (4, 8, 16, 32)):
        if block < 128 * warps:
            continue
        forward[f"{block}/{warps}"] = lambda b=block, w=warps: cross_entropy_forward[(rows,)](
            logits, labels, losses, lse, vocab, 1, vocab, -100, *NUMBERS,
            **LOSS, BLOCK=b, WIDE=8, num_warps=w,
        )  # fmt: skip
        in_place[f"{block}/{warps}"] = lambda b=block, w=warps: loss_and_gradient_in_place[(2048,)](
            out, labels, losses, vocab, 1, vocab, -100, *NUMBERS, 1.0,
            **LOSS, GRADIENT=True, BLOCK=b, WIDE=8, num_warps=w,
        )  # fmt: skip
    for block, warps in product((1024, 2048, 4096, 8192), (2, 4, 8, 16)):
        blocks = -(-vocab // block)
        backward[f"{block}/{warps}"] = lambda b=block, w=warps, c=blocks: (
            cross_entropy_backward[(rows * c,)](
                one, logits, labels, lse, factor, out, 0, vocab, 1, vocab, c, -100, *NUMBERS,
                **LOSS, BLOCK=b, WIDE=8, num_warps=w,
            )
        )  # fmt: skip
    show(f"cross_entropy forward {rows}x{vocab}", copy, 2 * logits.numel(), forward)
    show(f"cross_entropy backward {rows}x{vocab}", copy, 4 * logits.numel(), backward)
    out.copy_(logits)
    show(f"in place 2048x{vocab} (2 reads, 1 write)", copy, 6 * 2048 * vocab, in_place)


def nf4(copy: float) -> None:
    """Double quantisation in blocks of 64, dense and wide."""
    rows, columns = 28672, 8192
    blocks = rows * columns // 64
    packed = torch.randint(256, (rows * columns // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device="cuda")
    code, nested = (torch.randn(n, device="cuda") for n in (16, 256))
    offset, outer = (torch.randn(n, device="cuda") for n in (1, -(-blocks // 256)))
    out = torch.empty(rows, columns + 64, dtype=BF16, device="cuda")
    for dense in (True, False):
        runs = {}
        for tile, steps, warps in product((16, 32, 64), (1, 2, 4, 8), (4, 8)):
            runs[f"{tile}/{steps}/{warps}"] = lambda t=tile, s=steps, w=warps, d=dense: (
                dequantize_blocks[(-(-blocks // (t * s)),)](
                    packed, absmax, code, offset, outer, nested, out,
                    blocks, columns // 64, columns + 64,
                    NESTED=True, NESTED_BLOCKSIZE=256, BLOCKSIZE=64, DENSE=d, BLOCKS=t, STEPS=s,
                    num_warps=w, enable_fp_fusion=False,
                )
            )  # fmt: skip
        show(f"nf4 {'dense' if dense else 'wide'}", copy, 2.5 * rows * columns, runs)


def main() -> None:
    """Print one line a kernel."""
    copy = copy_bandwidth()
    print(f"copy {copy / 1e9:.2f} TB/s", flush=True)
    nf4(copy)
    loss(copy, 8192, 128256)
    loss(copy, 16384, 32000)
    glu(copy)


if __name__ == "__main__":
    main()
