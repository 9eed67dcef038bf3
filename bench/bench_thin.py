"""Thin products on a GPU: errors, share of the copy bandwidth, cuBLAS beside it, tiles around ours.

    python bench/bench_thin.py OUT.json [--budget SECONDS] [--no-sweep | --only-sweep]

``right`` is x A^T of siblings, ``left`` dA of siblings, ``both`` dy B and dB of siblings from one
read of their dy, ``copy`` the same with dy copied into one buffer and dy B written behind it. The
peer is what torch.mm (and copy_) need for the same; it makes its products one after the other.
The share counts the wide matrices only: read once, and written once where they are copied.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from roofline import (
    copy_bandwidth,
    fresh_milliseconds,
    host_microseconds,
    root_mean_square,
    sets_for,
    table,
)
from triton.runtime.errors import TritonError

from fusewright.kernels import thin_plan
from fusewright.kernels.thin import Result, Term, Wide, thin
from fusewright.kernels.thin_plan import Tile

CHOSEN = {n: getattr(thin_plan, n) for n in ("right_tile", "left_tile", "split")}
_FAILURES = (RuntimeError, ValueError, AssertionError, TritonError)
COLUMNS = ["name", "shape", "r", "us", "of_copy", "mm_us", "mm_over_ours", "tile"]
X_WIDTHS = ((2048, 3), (4096, 3), (8192, 2), (14336, 1), (28672, 1))
DY_WIDTHS = ((2048,), (4096,), (8192,), (4096, 1024, 1024), (14336, 14336), (8192, 1024, 1024),
             (28672, 28672))  # fmt: skip
RIGHT_TILES = (Tile(64, 128, 3, 4, 2), Tile(64, 128, 4, 4, 2), Tile(64, 64, 6, 4, 2),
               Tile(128, 64, 4, 4, 2), Tile(128, 128, 3, 8, 1), Tile(64, 256, 3, 8, 1),
               Tile(32, 128, 4, 4, 2), Tile(32, 256, 3, 4, 2),
               Tile(64, 64, 4, 8, 1))  # fmt: skip
LEFT_TILES = (Tile(64, 128, 4, 4, 2), Tile(64, 128, 3, 4, 3), Tile(128, 128, 3, 4, 2),
              Tile(64, 256, 3, 8, 2), Tile(64, 64, 6, 4, 2), Tile(64, 128, 4, 8, 2))  # fmt: skip
BOTH_TILES = (Tile(64, 512, 3, 8, 1), Tile(64, 512, 2, 8, 1), Tile(64, 256, 3, 8, 2),
              Tile(64, 256, 2, 8, 2), Tile(64, 256, 4, 8, 1), Tile(128, 256, 3, 8, 1),
              Tile(64, 256, 3, 4, 2))  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Products of one kind at one shape; bfloat16, the thin operands perhaps in float32."""

    kind: str
    tokens: int
    widths: tuple[int, ...]
    slots: int
    r: int
    thin: torch.dtype = torch.bfloat16

    @property
    def bytes(self) -> int:
        return self.tokens * sum(self.widths) * (4 if self.kind == "copy" else 2)

    @property
    def label(self) -> dict[str, Any]:
        name = self.kind + ("" if self.thin is torch.bfloat16 else " fp32")
        shape = f"{self.tokens} x {'+'.join(map(str, self.widths))}"
        return {"name": name, "shape": shape, "r": f"{len(self.widths) * self.slots}x{self.r}"}

    def operands(self) -> tuple[list[torch.Tensor], list[Term], Wide | None]:
        """Random operands of ``thin``."""

        def new(*shape: int, dtype: torch.dtype = self.thin) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda").normal_()

        ms = [new(self.tokens, w, dtype=torch.bfloat16) for w in self.widths]
        if self.kind == "right":
            x = ms[0]
            return ms, [Term(0, new(self.r, x.shape[1]), True) for _ in range(self.slots)], None
        if self.kind == "left":
            us = [new(self.tokens, self.r) for _ in range(self.slots)]
            return ms, [Term(0, left=u, left_transposed=True) for u in us], None
        total, count = sum(self.widths), len(self.widths)
        wide, step = None, self.r * count if self.thin is torch.float32 else 0
        used = total + self.r * count * (3 if step else 1)
        if self.kind == "copy":
            buffer = torch.empty(self.tokens, -(-used // 64) * 64, dtype=ms[0].dtype, device="cuda")
            starts = [sum(self.widths[:i]) for i in range(count)]
            wide = Wide(buffer, starts, step, (used, buffer.shape[1]))
        terms = [
            Term(i, new(w, self.r), column=total + i * self.r if wide else None,
                 left=new(self.tokens, self.r))
            for i, w in enumerate(self.widths)
        ]  # fmt: skip
        return ms, terms, wide

    def ours(self) -> Callable[[], list[Result]]:
        """Our call on fresh operands."""
        operands = self.operands()
        return lambda: thin(*operands)

    def peer(self) -> Callable[[], Any]:
        """torch.mm on fresh operands; float32 operands are rounded to bfloat16 beforehand."""
        ms, terms, wide = self.operands()
        rights = [None if t.right is None else t.right.to(ms[0].dtype) for t in terms]
        lefts = [None if t.left is None else t.left.to(ms[0].dtype) for t in terms]
        if self.kind in ("right", "left"):  # siblings in one product
            joined = torch.cat(
                [t for t in rights + lefts if t is not None], int(self.kind == "left")
            )
            if self.kind == "right":
                return lambda: torch.mm(ms[0], joined.t())
            return lambda: torch.mm(joined.t(), ms[0])

        def run() -> list[torch.Tensor]:
            out = []
            for m, v, u in zip(ms, rights, lefts, strict=True):
                out += [torch.mm(m, v), torch.mm(m.t(), u)]
            if wide is not None:
                for m, column in zip(ms, wide.columns, strict=True):
                    wide.buffer[:, column : column + m.shape[1]].copy_(m)
            return out

        return run

    def worst(self) -> float:
        """The largest relative error of all results against float64, on at most 1000 tokens."""
        ms, terms, wide = replace(self, tokens=min(self.tokens, 1000)).operands()
        worst = 0.0
        for term, found in zip(terms, thin(ms, terms, wide), strict=True):
            m = ms[term.block].double()
            if term.right is not None:
                v = term.right.double()
                oracle = m @ (v.t() if term.right_transposed else v)
                worst = max(worst, root_mean_square(found.right, oracle))
            if term.left is not None:
                oracle = m.t() @ term.left.double()
                oracle = oracle.t() if term.left_transposed else oracle
                worst = max(worst, root_mean_square(found.left, oracle))
        if wide is not None:
            copied = torch.equal(wide.buffer[:, : sum(self.widths)], torch.cat(ms, 1))
            assert copied and not wide.buffer[:, wide.zero[0] :].any(), "the buffer is wrong"
        return worst


def cases() -> Iterator[Case]:
    """Every kind at the widths of models of 1B, 8B and 70B parameters."""
    for tokens, r in itertools.product((4096, 8192), (16, 64)):
        for (width, slots), kind in itertools.product(X_WIDTHS, ("right", "left")):
            yield Case(kind, tokens, (width,), slots, r)
        for widths, kind in itertools.product(DY_WIDTHS, ("both", "copy")):
            yield Case(kind, tokens, widths, 1, r)
    for kind in ("right", "left"):
        yield Case(kind, 4096, (4096,), 3, 16, torch.float32)
    for kind in ("both", "copy"):
        yield Case(kind, 4096, (14336, 14336), 1, 16, torch.float32)


def variants() -> Iterator[tuple[Case, Tile, int]]:
    """(case, tile, slabs or parts; 0 as the plan has it) around what is chosen, at 1B and 8B shapes."""
    wide = (
        (2048, 3, 16),
        (2048, 3, 64),
        (4096, 3, 16),
        (4096, 3, 64),
        (8192, 1, 16),
        (14336, 1, 16),
    )
    for width, slots, r in wide:
        for tile, parts in itertools.product(RIGHT_TILES, (0, 1, 2)):
            yield Case("right", 4096, (width,), slots, r), tile, parts
        for tile, parts in itertools.product(LEFT_TILES, (0, 4, 8)):
            yield Case("left", 4096, (width,), slots, r), tile, parts
    for widths in ((2048,), (4096,), (8192, 8192), (14336, 14336)):
        for tile, parts in itertools.product(BOTH_TILES, (0, 2, 8)):
            yield Case("both", 4096, widths, 1, 16), tile, parts


def _use(tile: Tile | None, parts: int = 0) -> None:
    """Plan with this tile, cut into as many parts; None: as chosen."""
    thin_plan.right_cut.cache_clear()
    thin_plan.left_cut.cache_clear()
    for name in ("right_tile", "left_tile"):
        setattr(thin_plan, name, CHOSEN[name] if tile is None else lambda *_, tile=tile: tile)
    thin_plan.split = CHOSEN["split"]
    if parts:
        thin_plan.split = lambda tiles, steps, *_: -(-steps // parts)


def _compile(jobs: list[tuple[Case, Tile | None, int]]) -> None:
    for case, tile, parts in jobs:
        _use(tile, parts)
        try:
            case.ours()()
            torch.cuda.synchronize()
        except _FAILURES as failure:  # what does not fit is reported when it is timed
            print("skipped", case, tile, type(failure).__name__)


def measure(case: Case, copy: float) -> dict[str, Any]:
    """Error, time, share, the peer's time."""
    worst, ms = case.worst(), fresh_milliseconds(case.ours, case.bytes, 5)
    limit = 2e-3 if case.thin is torch.bfloat16 else 2.0**-21
    assert worst <= limit, f"{case}: error {worst:.2e}"
    peer = fresh_milliseconds(case.peer, case.bytes, 5)
    return case.label | {
        "us": ms * 1e3, "of_copy": case.bytes / ms / copy, "mm_us": peer * 1e3,
        "mm_over_ours": peer / ms, "error": worst,
    }  # fmt: skip


def sweep(
    copy: float, deadline: float, save: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """The time of every variant, operands shared between the variants of one case; saved per case."""
    rows: list[dict[str, Any]] = []
    for case, group in itertools.groupby(variants(), key=lambda v: v[0]):
        calls = itertools.cycle([case.ours() for _ in range(sets_for(case.bytes))])
        found = []
        for tile, parts in ((None, 0), *(v[1:] for v in group)):
            if time.monotonic() > deadline:
                print("out of time in", case)
                break
            _use(tile, parts)
            try:
                ms = fresh_milliseconds(lambda calls=calls: next(calls), case.bytes, 3)
            except _FAILURES as failure:
                print("failed", case.label, tile, parts, str(failure)[:100])
                continue
            name = "chosen" if tile is None else ",".join(map(str, (*tile, parts)))
            row = {"us": ms * 1e3, "of_copy": case.bytes / ms / copy, "tile": name}
            found.append(case.label | row)
        rows += sorted(found, key=lambda row: row["us"])
        save(rows)
    _use(None)
    return rows


def _best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every case the four best and the chosen one."""
    out = []
    for _, group in itertools.groupby(rows, key=lambda r: (r["name"], r["shape"], r["r"])):
        ranked = list(group)
        out += ranked[:4] + [r for r in ranked[4:] if r["tile"] == "chosen"]
    return out


def main() -> None:
    """Compile, check, time, sweep, write JSON, print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--budget", type=float, default=110.0)
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--only-sweep", action="store_true")
    options = parser.parse_args()
    begin = time.monotonic()
    table_of = [] if options.only_sweep else list(cases())
    # Variants of one tile share kernels: one process compiles them.
    jobs = [[(c, None, 0)] for c in table_of] + [
        list(group)
        for _, group in itertools.groupby([] if options.no_sweep else variants(), lambda v: v[:2])
    ]
    workers = max(1, min(16, os.cpu_count() or 2))
    shares = [list(itertools.chain(*jobs[i::workers])) for i in range(workers)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(_compile, shares))
    print(f"{len(jobs)} tiles compiled in {time.monotonic() - begin:.0f} s", flush=True)
    copy, rows, tried = copy_bandwidth(), [], []
    for case in table_of:
        if time.monotonic() - begin > options.budget:
            print("out of time before", case)
            break
        rows.append(measure(case, copy))
    small = Case("both", 64, (4096, 1024, 1024), 1, 16).ours()
    small()
    result = {
        "device": torch.cuda.get_device_name(), "copy_TB_per_s": copy / 1e9, "rows": rows,
        "host_us": host_microseconds(small),
    }  # fmt: skip

    def save(tried: list[dict[str, Any]]) -> None:
        with open(options.out, "w") as file:
            json.dump(result | {"sweep": tried}, file)

    save([])
    if not options.no_sweep:
        tried = sweep(copy, begin + options.budget, save)
    if tried:
        print(table(_best(tried), ["name", "shape", "r", "us", "of_copy", "tile"]))
    if rows:
        print(table(rows, COLUMNS[:-1]))
    print(f"copy {copy / 1e9:.3f} TB/s; host {result['host_us']:.0f} us a call of two launches; "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
