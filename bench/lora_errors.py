"""Errors of LoRA layers against float64, beside eager PEFT's, in every combination of dtypes.

    PYTHONPATH=src python bench/lora_errors.py OUT.json [--device cpu|cuda] [--seeds N] [--seconds S]

Two equal blocks of linears that read one x are adapted by PEFT and optimised like any model; y, dx, dA
and dB of both runs are held against the same run in float64. Root mean square over seeds, blocks and
layers of the relative errors. ``worst`` is the largest of ours / PEFT's. On a GPU the rows are made
by many processes at once; the JSON is written whenever one is there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from roofline import table
from torch import nn

import fusewright

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# base, adapters, autocast
DTYPES = [(BF16, BF16, None), (FP16, FP16, None), (FP32, FP32, None), (BF16, FP32, None),
          (FP16, FP32, None), (FP32, FP32, BF16), (BF16, FP32, BF16), (FP32, FP32, FP16)]  # fmt: skip
PARTS = ("y", "dx", "dA", "dB")
COLUMNS = ["base", "adapters", "autocast", "layers", "r", "fired", "worst",
           *(f"{who} {part}" for part in PARTS for who in ("ours", "peft"))]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Rows, width of x, the layers' heights, rank."""

    rows: int
    width: int
    heights: tuple[int, ...]
    rank: int


SHAPES = {
    "cpu": [Shape(200, 256, (256, 128, 128), 16), Shape(200, 1024, (128,), 5)],
    "cuda": [Shape(1000, 1024, (512, 256, 256), 16), Shape(1000, 1024, (2048, 2048), 16),
             Shape(1000, 4096, (1024,), 16), Shape(4096, 2048, (2048, 512, 512), 64),
             Shape(4096, 2048, (8192, 8192), 5)],
}  # fmt: skip


class Block(nn.Module):
    """Linears of one input; returns the result of each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            nn.Linear(shape.width, height, bias=False) for height in shape.heights
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x (1, T, K) to y_j (1, T, N_j)."""
        return tuple(linear(x) for linear in self.linears)


class Blocks(nn.Module):
    """Two blocks, each on an input of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(shape) for _ in range(2))

    def forward(self, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        """All results of all blocks."""
        return [y for layer, x in zip(self.layers, xs, strict=True) for y in layer(x)]


def adapted(shape: Shape, base: torch.dtype, thin: torch.dtype, device: str) -> Any:
    """Blocks under PEFT, drawn as a trained model's are."""
    model = Blocks(shape).to(device, base)
    names = [f"linears.{i}" for i in range(len(shape.heights))]
    settings = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules=names)
    made = get_peft_model(model, settings, autocast_adapter_dtype=False)
    for name, p in made.named_parameters():
        with torch.no_grad():
            p.normal_(0, 0.02)
        if "lora_" in name:
            p.data = p.data.to(thin)
    return made.train()


def run(
    model: Any, xs: list[torch.Tensor], dys: list[torch.Tensor], autocast: Any
) -> dict[str, list[torch.Tensor]]:
    """y, dx, dA and dB of one pass."""
    model.zero_grad()
    xs = [x.detach().requires_grad_() for x in xs]
    with autocast:
        ys = model(xs)
    torch.autograd.backward(ys, [d.to(y.dtype) for d, y in zip(dys, ys, strict=True)])
    found = {"y": [y.detach() for y in ys], "dx": [x.grad for x in xs], "dA": [], "dB": []}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found["dA" if "lora_A" in name else "dB"].append(p.grad)
    return found


def cell(shape: Shape, dtypes: tuple[Any, ...], device: str, seeds: int) -> dict[str, Any]:
    """One row of the table."""
    base, thin, auto = dtypes
    squares: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = {}
    torch.manual_seed(0)
    eager = adapted(shape, base, thin, device)
    ours = fusewright.optimize(copy.deepcopy(eager))
    for _ in range(seeds):
        values = [torch.randn(1, shape.rows, shape.width, device=device) for _ in range(2)]
        xs = [v.to(base) for v in values]
        # The same gradients whatever the dtype of y.
        dys = [torch.randn(1, shape.rows, h, device=device).to(auto or base)
               for _ in range(2) for h in shape.heights]  # fmt: skip
        exact = run(copy.deepcopy(eager).double(), [x.double() for x in xs], dys,
                    contextlib.nullcontext())  # fmt: skip
        for who, model in (("ours", ours), ("peft", eager)):
            context = torch.autocast(device, auto) if auto else contextlib.nullcontext()
            for part, got in run(model, xs, dys, context).items():
                pairs = zip(got, exact[part], strict=True)
                squares[f"{who} {part}"] += [
                    float((g.double() - e).norm() / e.norm()) ** 2 for g, e in pairs
                ]
    for row in fusewright.report(ours).rows:
        if row.status == "fired" and row.verification != "reverted":
            counts[row.kernel] = counts.get(row.kernel, 0) + row.count
    errors = {k: math.sqrt(sum(v) / len(v)) for k, v in squares.items()}
    return {
        "base": str(base)[6:],
        "adapters": str(thin)[6:],
        "autocast": str(auto)[6:] if auto else "",
        "layers": f"{shape.rows} x {shape.width} -> {shape.heights}",
        "r": shape.rank,
        "fired": " ".join(f"{k} {n}" for k, n in sorted(counts.items())),
        "worst": max(errors[f"ours {p}"] / errors[f"peft {p}"] for p in PARTS),
        **errors,
    }


def main() -> None:
    """Measure, write JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=55.0, help="then the rows that are there")
    options = parser.parse_args()
    begin, on_gpu = time.monotonic(), options.device == "cuda"
    found: dict[str, Any] = {
        "command": "PYTHONPATH=src python bench/lora_errors.py OUT.json",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "rows": [],
    }
    jobs = [(shape, dtypes) for dtypes in DTYPES for shape in SHAPES[options.device]]
    made: dict[int, dict[str, Any]] = {}
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    workers = min(16, (os.cpu_count() or 2) - 1) if on_gpu else 1
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    futures = {
        pool.submit(cell, *job, options.device, options.seeds): at for at, job in enumerate(jobs)
    }
    try:
        for future in as_completed(futures, timeout=options.seconds):
            made[futures[future]] = future.result()
            found["rows"] = [made[at] for at in sorted(made)]
            with open(options.out, "w") as file:
                json.dump(found, file, indent=1)
    except TimeoutError:
        print(f"out of time with {len(made)} of {len(jobs)} rows")
    print(table(found["rows"], COLUMNS))
    print(f"{time.monotonic() - begin:.0f} s", flush=True)
    pool.shutdown(wait=len(made) == len(jobs), cancel_futures=True)


if __name__ == "__main__":
    main()
