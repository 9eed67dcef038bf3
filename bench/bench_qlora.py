"""A layer's seven linears over nf4 weights with LoRA on a GPU, over dequantising and the bare GEMMs.

    python bench/bench_qlora.py OUT.json [--budget SECONDS] [--quick | --dry]

Contenders, each a CUDA graph of one layer's forward and backward, replayed in turn, medians: ``base``
dequantises by our kernel and multiplies, in each direction; ``peft`` bitsandbytes' dequantisation,
F.linear and PEFT's formula under autograd; ``ours`` the registered op. Wanted: 1.15 over ``base``. The
JSON is written after every row; ``--dry`` makes every step at tiny shapes, without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from bench_lora import (
    MODELS,
    SCALE,
    Case,
    Run,
    Setting,
    agree,
    graph,
    layers,
    pool_of_graphs,
    run,
)
from roofline import interleaved, table

from fusewright.kernels import nf4, qlora
from fusewright.kernels.lora_group import Group, plan
from fusewright.kernels.room import empty_roomy, needed
from fusewright.runtime.op import register_all

WANTED = 1.15
COLUMNS = ["shape", "rows", "r", "adapters", "base ms", "peft", "ours", "wanted"]


class Quantised:
    """A case of ``bench_lora`` whose weights are nf4 with double quantisation."""

    def __init__(self, case: Case) -> None:
        from bitsandbytes import functional

        self.case, self.functional = case, functional
        self.packed, self.states = [], []
        for w in case.weights:
            packed, state = functional.quantize_4bit(
                w, blocksize=64, quant_type="nf4", compress_statistics=True
            )
            self.packed.append(packed)
            self.states.append(state)
        states = self.states
        n = len(states)
        self.rest = (
            [s.absmax for s in states],
            [s.offset for s in states],
            [s.state2.absmax for s in states],
            [s.state2.code for s in states],
            list(case.kind.heights),
            ["nf4"] * n,
            [64] * n,
            [s.state2.blocksize for s in states],
        )
        case.weights = []

    def base(self) -> None:
        """Dequantise and multiply, in each direction."""
        weights = qlora.Weights(self.packed, *self.rest)
        for j, dy in enumerate(self.case.dys):
            shape = (self.case.kind.heights[j], self.case.kind.width)
            for direction in range(2):
                w = self.case.x.new_empty(shape)
                nf4.triton_into(w, weights.layer(j))
                torch.mm(self.case.x, w.t()) if direction == 0 else torch.mm(dy, w)

    def peft(self) -> list[torch.Tensor]:
        """bitsandbytes' dequantisation in each direction, PEFT's formula beside it."""
        case, functional = self.case, self.functional

        class Layer(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor, j: int) -> torch.Tensor:
                ctx.j = j
                w = functional.dequantize_4bit(self.packed[j], self.states[j])
                return F.linear(x, w.to(x.dtype))

            @staticmethod
            def backward(ctx: Any, dy: torch.Tensor) -> Any:
                w = functional.dequantize_4bit(self.packed[ctx.j], self.states[ctx.j])
                return torch.matmul(dy, w.to(dy.dtype)), None

        x = case.x.detach().requires_grad_()
        down, up = ([t.detach().requires_grad_() for t in g] for g in (case.down, case.up))
        ys = []
        for j, (a, b) in enumerate(zip(down, up, strict=True)):
            y = Layer.apply(x, j)
            low = F.linear(F.linear(x.to(a.dtype), a), b) * SCALE
            ys.append((y + low).to(y.dtype))
        grads = torch.autograd.grad(ys, [x, *down, *up], case.dys)
        return [*[y.detach() for y in ys], *grads]

    def ours(self) -> Run:
        """The op's host functions on what its neighbours hand over."""
        case, n = self.case, len(self.packed)
        x, dys, widths = case.x, case.dys, list(case.kind.heights)
        shapes = [x.new_empty(()).expand(h, case.kind.width) for h in widths]
        tail = ([None] * n, case.down, case.up, list(range(n)), [-1] * n, [SCALE] * n)
        how = plan(Group(x, [], shapes, *tail))
        space = needed(how.columns, how.thin)
        if case.kind.roomy:
            x = empty_roomy(x.shape, space.columns, x.dtype, x.device).copy_(x)
        packed = case.kind.packed
        if packed:
            whole = torch.cat(dys, 1)
            dys, widths = [whole], [sum(widths)]
            dys = [empty_roomy(whole.shape, space.rows, x.dtype, x.device).copy_(whole)]
        group = (x, [], self.packed, *tail)

        def run() -> list[torch.Tensor]:
            layout = (widths, x.dtype, case.kind.roomy, packed)
            ys, thin = qlora.triton_fwd(*group, *layout, *self.rest)
            wanted = (True, False, False, True, True)
            dx, _, _, ddown, dup = qlora.triton_bwd(dys, thin, *group, packed, *self.rest, *wanted)
            if len(ys) != n:
                ys = list(ys[0].split(case.kind.heights, 1))
            return [*ys, dx, *ddown, *dup]

        return run


def settings(quick: bool, dry: bool) -> list[Setting]:
    """What is measured, in this order."""
    half, single = torch.bfloat16, torch.float32
    if dry:
        return [("dry", 64, 8, half), ("dry", 64, 20, single)]
    if quick:
        return [("1B", 8192, 16, half), ("8B", 4096, 16, half), ("8B", 4096, 16, single)]
    found = [(s, t, r, half) for s in MODELS for t in (4096, 8192) for r in (16, 64)]
    return found + [(s, 4096, 16, single) for s in MODELS]


def _compile(jobs: list[tuple[Setting, int]]) -> None:
    register_all()
    for (shape, rows, rank, adapters), at in jobs:
        Quantised(Case.make(layers(shape)[at], rows, rank, torch.bfloat16, adapters)).ours()()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure(shape: str, rows: int, rank: int, adapters: torch.dtype, repeats: int) -> Any:
    """One layer of a model's shape: every contender over ``base``."""
    cases = [Quantised(Case.make(k, rows, rank, torch.bfloat16, adapters)) for k in layers(shape)]
    ours, pool = [c.ours() for c in cases], pool_of_graphs()
    for case, one in zip(cases, ours, strict=True):
        agree(one, case.peft)
    with torch.no_grad():
        runs = {
            "base": graph(lambda: [c.base() for c in cases], pool),
            "ours": graph(lambda: [run() for run in ours], pool),
        }
    with torch.enable_grad():
        runs["peft"] = graph(lambda: [c.peft() for c in cases], pool)
    found = interleaved(runs, repeats)
    row = {"shape": shape, "rows": rows, "r": rank, "adapters": str(adapters)[6:],
           "base ms": found["base"], "wanted": WANTED}  # fmt: skip
    return row | {n: found[n] / found["base"] for n in ("peft", "ours")}


def main() -> None:
    """Measure, write JSON, print a table."""
    found = run("bench_qlora.py", __doc__, 55.0, settings, _compile, measure)
    print(table(found["rows"], COLUMNS))


if __name__ == "__main__":
    main()
