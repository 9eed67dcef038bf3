"""A layer's seven linears with LoRA on a GPU, forward and backward, over the bare frozen GEMMs.

    python bench/bench_lora.py OUT.json [--budget SECONDS] [--quick | --dry]

Kernels are compiled in many processes at once, then everything is timed in one. Contenders, each a CUDA graph of one layer's forward and backward, replayed in turn, medians:
``base`` the seven frozen GEMMs and their dX alone; ``peft`` PEFT's own formula under autograd;
``addmm`` hand-written products with addmm_ epilogues, as hand-written LoRA kernels do it; ``ours`` the
registered op, with producers that leave room. The table is printed last, the JSON written after every
row; what the budget has no room for is named. ``--dry`` makes every step at tiny shapes, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import place
import torch
import torch.nn.functional as F
from roofline import interleaved, table

from fusewright.kernels import lora, lora_products, room, thin
from fusewright.kernels.lora_group import Group, plan
from fusewright.runtime.op import register_all

# hidden, query heads' width, key and value heads' width, intermediate
SHAPES = {"1B": (2048, 2048, 512, 8192), "8B": (4096, 4096, 1024, 14336),
          "70B": (8192, 8192, 1024, 28672), "dry": (128, 128, 64, 256)}  # fmt: skip
MODELS = ("1B", "8B", "70B")
WANTED = {("1B", 16): 1.10, ("1B", 64): 1.18, ("8B", 16): 1.06, ("8B", 64): 1.12,
          ("70B", 16): 1.06, ("70B", 64): 1.12}  # fmt: skip
COLUMNS = ["shape", "rows", "r", "adapters", "base ms", "peft", "addmm", "ours", "wanted"]
SCALE = 1.0
Run = Callable[[], Any]
Setting = tuple[str, int, int, torch.dtype]  # shape, rows, rank, dtype of the adapters

if not place.ON_GPU:  # the interpreter stands for the GPU
    lora_products._multiply = thin.thin


class Layers(NamedTuple):
    """Linears that read one x: their heights and width, and whether dy arrives as one roomy tensor."""

    heights: tuple[int, ...]
    width: int
    roomy: bool
    packed: bool


def layers(shape: str) -> list[Layers]:
    """qkv, o, gate and up, down of a model's shape, with what their neighbours can do for them."""
    hidden, query, key, inner = SHAPES[shape]
    return [
        Layers((query, key, key), hidden, True, False),
        Layers((hidden,), query, False, False),
        Layers((inner, inner), hidden, True, True),
        Layers((hidden,), inner, True, False),
    ]


@dataclass
class Case:
    """Inputs of one group of layers, of one dtype of base and one of adapters."""

    kind: Layers
    x: torch.Tensor
    dys: list[torch.Tensor]
    weights: list[torch.Tensor]
    down: list[torch.Tensor]
    up: list[torch.Tensor]

    @classmethod
    def make(
        cls, kind: Layers, rows: int, rank: int, base: torch.dtype, adapters: torch.dtype
    ) -> Case:
        """Random inputs, scaled like a trained layer's."""

        def normal(*extent: int, scale: float = 1.0, dtype: torch.dtype = base) -> torch.Tensor:
            return torch.empty(extent, dtype=dtype, device=place.DEVICE).normal_(0, scale)

        x = normal(rows, kind.width)
        dys = [normal(rows, h) for h in kind.heights]
        weights = [normal(h, kind.width, scale=0.02) for h in kind.heights]
        down = [normal(rank, kind.width, scale=0.02, dtype=adapters) for _ in kind.heights]
        up = [normal(h, rank, scale=0.02, dtype=adapters) for h in kind.heights]
        return cls(kind, x, dys, weights, down, up)

    def base(self) -> None:
        """The frozen GEMMs and their dX."""
        for w, dy in zip(self.weights, self.dys, strict=True):
            torch.mm(self.x, w.t())
            torch.mm(dy, w)

    def peft(self) -> list[torch.Tensor]:
        """PEFT's formula."""
        x = self.x.detach().requires_grad_()
        down, up = ([t.detach().requires_grad_() for t in g] for g in (self.down, self.up))
        ys = []
        for w, a, b in zip(self.weights, down, up, strict=True):
            y = F.linear(x, w)
            low = F.linear(F.linear(x.to(a.dtype), a), b) * SCALE
            ys.append((y + low).to(y.dtype))
        grads = torch.autograd.grad(ys, [x, *down, *up], self.dys)
        return [*[y.detach() for y in ys], *grads]

    def addmm(self) -> None:
        """Thin products by cuBLAS, added by addmm_; 16-bit adapters only."""
        dx = None
        for w, a, b, dy in zip(self.weights, self.down, self.up, self.dys, strict=True):
            a, b = a.to(w.dtype), b.to(w.dtype)
            low = self.x @ a.t()
            y = torch.mm(self.x, w.t())
            y.addmm_(low, b.t(), alpha=SCALE)
            p = torch.mm(dy, b)
            _ = dy.t() @ low, p.t() @ self.x
            dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
            dx.addmm_(p, a, alpha=SCALE)

    def ours(self, roomy: bool = True) -> Callable[[], list[torch.Tensor]]:
        """The op's host functions on what its neighbours hand over."""
        n = len(self.weights)
        group = Group(self.x, [], self.weights, [None] * n, self.down, self.up, list(range(n)),
                      [-1] * n, [SCALE] * n)  # fmt: skip
        how = plan(group)
        space = room.needed(how.columns, how.thin)
        x, dys, widths = self.x, self.dys, list(self.kind.heights)
        weights = room.allocate(self.weights, space) if roomy else self.weights
        given_room = roomy and self.kind.roomy
        if given_room:
            x = room.empty_roomy(x.shape, space.columns, x.dtype, x.device).copy_(x)
        if self.kind.packed:
            widths = [sum(widths)]
            whole = torch.cat(dys, 1)
            dys = [whole]
            if roomy:
                made = room.empty_roomy(whole.shape, space.rows, x.dtype, x.device)
                dys = [made.copy_(whole)]
        rest = (x, [], weights, *group[3:])

        def run() -> list[torch.Tensor]:
            ys, thin = lora.device_fwd(*rest, widths, x.dtype, given_room, self.kind.packed)
            needs = (True, False, False, False, True, True)
            got = lora.device_bwd(dys, thin, *rest, self.kind.packed and roomy, *needs)
            if len(ys) != n:
                ys = list(ys[0].split(self.kind.heights, 1))
            return [*ys, got.x, *got.down, *got.up]

        return run


def settings(quick: bool, dry: bool) -> list[Setting]:
    """What is measured, in this order."""
    half, single = torch.bfloat16, torch.float32
    if dry:
        return [("dry", 64, r, t) for r in (8, 20) for t in (half, single)]
    if quick:
        return [("1B", 8192, 16, half), ("8B", 4096, 16, half), ("8B", 4096, 64, half),
                ("8B", 4096, 16, single)]  # fmt: skip
    found = [(s, t, r, half) for s in MODELS for t in (4096, 8192) for r in (16, 64)]
    return found + [(s, 4096, 16, single) for s in MODELS]


def _compile(jobs: list[tuple[Setting, int]]) -> None:
    register_all()
    for (shape, rows, rank, adapters), at in jobs:
        Case.make(layers(shape)[at], rows, rank, torch.bfloat16, adapters).ours()()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def graph(run: Run, pool: Any) -> Run:
    """Replay of the run as a CUDA graph; nobody reads results, so graphs share one pool of memory."""
    if not place.ON_GPU:
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made, pool=pool):
        run()
    return made.replay


def pool_of_graphs() -> Any:
    """A pool of memory for ``graph``."""
    return torch.cuda.graph_pool_handle() if place.ON_GPU else None


def agree(run: Run, peft: Run) -> None:
    """Refuse results that are not PEFT's but for rounding."""
    for a, b in zip(run(), peft(), strict=True):
        difference = float((a.float() - b.float()).norm() / b.float().norm())
        assert difference < 0.02, f"ours and PEFT's differ by {difference}"


def measure(
    shape: str, rows: int, rank: int, adapters: torch.dtype, repeats: int
) -> dict[str, Any]:
    """One layer of a model's shape: every contender over the bare GEMMs."""
    cases = [Case.make(k, rows, rank, torch.bfloat16, adapters) for k in layers(shape)]
    ours, pool = [c.ours() for c in cases], pool_of_graphs()
    for case, run in zip(cases, ours, strict=True):
        agree(run, case.peft)
    with torch.no_grad():
        runs = {
            "base": graph(lambda: [c.base() for c in cases], pool),
            "addmm": graph(lambda: [c.addmm() for c in cases], pool),
            "ours": graph(lambda: [run() for run in ours], pool),
        }
        parts = {f"ours {i}": graph(run, pool) for i, run in enumerate(ours)}
        parts |= {f"base {i}": graph(c.base, pool) for i, c in enumerate(cases)}
    with torch.enable_grad():
        runs["peft"] = graph(lambda: [c.peft() for c in cases], pool)
    found = interleaved(runs, repeats)
    each = interleaved(parts, -(-repeats // 2))
    row: dict[str, Any] = {"shape": shape, "rows": rows, "r": rank, "adapters": str(adapters)[6:],
                           "base ms": found["base"]}  # fmt: skip
    row |= {n: found[n] / found["base"] for n in ("peft", "addmm", "ours")}
    row["wanted"] = WANTED.get((shape, rank))
    row["groups"] = {
        name: [each[f"base {i}"], each[f"ours {i}"]]
        for i, name in enumerate(("qkv", "o", "gate up", "down"))
    }
    return row


def memory() -> list[dict[str, Any]]:
    """How much larger the weights are with room, of all linears of a layer."""
    out = []
    for shape in MODELS:
        for rank in (16, 64):
            plain = sum(sum(k.heights) * k.width for k in layers(shape))
            roomy = 0
            for k in layers(shape):
                space = room.needed(rank * len(k.heights), rank * len(k.heights))
                roomy += (sum(k.heights) + space.rows) * (k.width + space.columns)
            out.append({"shape": shape, "r": rank, "growth": roomy / plain - 1})
    return out


def run(
    name: str,
    doc: str | None,
    budget: float,
    settings_of: Callable[[bool, bool], list[Setting]],
    warm: Callable[..., None],
    row_of: Callable[..., Any],
    facts: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Compile in processes, measure setting after setting within the budget, write JSON after each.

    Args:
        name: of the script, which the file's command names.
        doc: what ``--help`` says.
        budget: seconds unless the command line says others.
        settings_of: (quick, dry) -> what to measure, the most telling first.
        warm: compiles some (setting, place of a layer).
        row_of: a setting and repeats -> its row.
        facts: what else the file holds.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("out")
    parser.add_argument(
        "--budget", type=float, default=budget, help="seconds, compilation included"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on whatever is here")
    options = parser.parse_args()
    begin = time.monotonic()
    cases = settings_of(options.quick, options.dry)
    if place.ON_GPU:
        place.in_processes(warm, [(case, at) for case in cases for at in range(4)])
        print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    register_all()
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "command": f"PYTHONPATH=src python bench/{name} OUT.json",
        "device": place.name(),
        "torch": torch.__version__,
        **facts(),
        "rows": [],
    }
    for case in cases:
        if time.monotonic() - begin > options.budget:
            print("out of time before", *case)
            continue
        found["rows"].append(row_of(*case, repeats=1 if options.dry else 12))
        if place.ON_GPU:
            torch.cuda.empty_cache()
        with open(options.out, "w") as file:
            json.dump(found, file, indent=1)
    print(f"measured in {time.monotonic() - begin:.0f} s")
    return found


def main() -> None:
    """Measure, write JSON, print tables."""
    found = run(
        "bench_lora.py", __doc__, 140.0, settings, _compile, measure, lambda: {"memory": memory()}
    )
    for row in found["rows"]:
        parts = {k: f"{o / b:.3f}" for k, (b, o) in row["groups"].items()}
        print(row["shape"], row["rows"], row["r"], row["adapters"], parts)
    print(table(found["rows"], COLUMNS))
    print({f"{m['shape']} r={m['r']}": f"{m['growth']:.2%}" for m in found["memory"]})


if __name__ == "__main__":
    main()
