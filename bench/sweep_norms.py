"""Try tiles of the norms' and rope's kernels on a GPU; prints the best and the chosen ones.

    python bench/sweep_norms.py OUT.json [--budget SECONDS] [--only NAME] [--rope]

All variants are compiled first, in as many processes as there are cores and 16 at most. A tile is
rows, warps, programs per multiprocessor, stages, hoist, reload, piece; "-" is the chosen one, timed
first and last: what comes first was seen to be up to a tenth slower than the same tile later.

The heuristics in kernels/ are written by hand from this table: kernels never choose by measuring.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from norm_cases import NormCase, RopeCase
from roofline import copy_bandwidth, fresh_milliseconds, sets_for, table
from triton.runtime.errors import TritonError

from fusewright.kernels import device, norm_launch, rope_kernels
from fusewright.kernels.norm_launch import Tile
from fusewright.kernels.norm_tiles import covered

NORMS = (("add", "dx+dw"), ("rms", "dx+dw"), ("rms", "dx"), ("add", "dx"), ("layer", "dx+dw"),
         ("layer", "forward"), ("rms", "forward"))  # fmt: skip
WIDTHS = (11008, 16384, 5120, 2304, 6144, 8192, 1024)
SHORT = (1024, 2304, 5120)  # widths that are measured with few rows too
CHOSEN = {n: getattr(norm_launch, n) for n in ("forward_tile", "backward_tile")}
_FAILURES = (RuntimeError, ValueError, AssertionError, TritonError)
COLUMNS = ["name", "shape", "us", "of_copy", "tile"]


def _stateless(case: NormCase) -> Iterator[Tile]:
    """Tiles of a forward, or of a backward without weight gradients: 8 to 64 numbers a thread."""
    numbers = covered(case.width)
    for rows, threads in itertools.product((1, 2), (32, 64, 128, 256, 512)):
        if not 8 <= rows * numbers // threads <= 64 or (rows == 2 and numbers > 2560):
            continue
        yield Tile(rows, threads // 32)
        if numbers >= 4096 and rows == 1:
            yield Tile(rows, threads // 32, reload=True)
            if numbers > 8192 and case.direction == "dx":
                yield Tile(rows, threads // 32, reload=True, piece=2048)
    if case.direction == "forward" and numbers >= 4096:
        yield Tile(1, 8, 2, 3)
        yield Tile(1, 16, 1, 3)
        yield Tile(1, 16, 2, 2)


def _summing(case: NormCase) -> Iterator[Tile]:
    """Tiles of a backward with weight gradients: loops, with and without prefetching."""
    numbers, inputs = covered(case.width), 3 if case.kind == "add" else 2
    for rows, threads in itertools.product((1, 2, 4), (128, 256, 512)):
        if not 10 <= rows * numbers // threads <= 32 or (rows > 1 and rows * numbers > 8192):
            continue
        warps, per_sm = threads // 32, 512 // threads
        for hoist, stages in itertools.product((False, True), (2, 3, 4)):
            held = (stages - 1) * (inputs + (not hoist)) * rows * numbers * 2 * per_sm
            if held <= 216 * 1024 and not (stages == 4 and numbers > 4096):
                yield Tile(rows, warps, per_sm, stages, hoist)
        if numbers >= 8192:
            yield Tile(rows, warps, per_sm, 1)
            for piece in (2048, 4096, 8192):
                yield Tile(rows, warps, per_sm, 1, reload=True, piece=piece)
        if numbers <= 2560:
            yield Tile(rows, warps, per_sm // 2 or 1, 3)


def tiles(case: NormCase) -> list[Tile]:
    """Tiles worth trying."""
    return list(_summing(case) if case.direction == "dx+dw" else _stateless(case))


def _use(tile: Tile | None) -> None:
    for name, chosen in CHOSEN.items():
        setattr(norm_launch, name, chosen if tile is None else lambda *_, tile=tile: tile)


def _compile(jobs: list[tuple[NormCase, Tile]]) -> None:
    for case, tile in jobs:
        _use(tile)
        try:
            case.ours()()
        except _FAILURES as failure:  # what does not fit is reported when it is timed
            print("skipped", case.name, case.width, tile, type(failure).__name__)
    torch.cuda.synchronize()


def _flat(result: Any) -> list[torch.Tensor]:
    return [t for t in result if t is not None and t.numel()]


class Prepared:
    """Inputs that all tiles of a case are timed on, and results to check them against."""

    def __init__(self, case: NormCase) -> None:
        _use(None)
        self.calls = itertools.cycle([case.ours() for _ in range(sets_for(case.bytes))])
        self.small = NormCase(case.kind, case.direction, 1003, case.width).ours()
        self.expected = _flat(self.small())


def measure(case: NormCase, tile: Tile | None, prepared: Prepared) -> dict[str, Any] | None:
    """The time of one tile, its results checked against the chosen one's."""
    _use(tile)
    try:
        for a, b in zip(_flat(prepared.small()), prepared.expected, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)
        ms = fresh_milliseconds(lambda: next(prepared.calls), case.bytes, 4)
    except _FAILURES as failure:
        print("failed", case.name, case.width, tile, str(failure)[:120])
        torch.cuda.synchronize()
        return None
    return {"name": case.name, "shape": f"{case.rows}x{case.width}", "us": ms * 1e3,
            "rate": case.bytes / ms, "tile": "-" if tile is None else ",".join(str(int(v)) for v in tile)}  # fmt: skip


def sweep_rope(copy: float) -> list[dict[str, Any]]:
    """Warps and heads per step of the rope kernel."""
    rows = []
    chosen = rope_kernels.tile
    for direction, heads, layout in itertools.product(
        ("forward", "dx"), ((32, 8, 128), (32, 8, 64), (16, 16, 256)), ("half", "interleaved")
    ):
        case = RopeCase(direction, 16384, *heads, layout=layout)
        found = []
        for steps, warps in itertools.product((1, 2, 4), (1, 2, 4, 8)):
            cut = rope_kernels.Tile(heads[0] // steps, max(1, heads[1] // steps), steps, warps)
            rope_kernels.tile = lambda *_, cut=cut: cut
            ms = fresh_milliseconds(case.ours, case.bytes, 4)
            found.append((ms, ",".join(map(str, cut))))
        rope_kernels.tile = chosen
        mine = chosen(*heads, device.limits(torch.device("cuda")))
        for ms, cut in sorted(found)[:3] + [f for f in found if f[1] == ",".join(map(str, mine))]:
            rows.append({"name": case.name, "shape": case.rows, "us": ms * 1e3, "of_copy": case.bytes / ms / copy,
                         "tile": cut})  # fmt: skip
    return rows


def main() -> None:
    """Sweep, write JSON, print the best tiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--budget", type=float, default=140.0)
    parser.add_argument("--only", default="", help="a part of the norm's name, such as 'layer'")
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--rope", action="store_true", help="rope's tiles too")
    options = parser.parse_args()
    begin = time.monotonic()
    cases = [NormCase(*n, options.rows, w) for n in NORMS for w in WIDTHS]
    cases += [NormCase(*n, 4096, w) for n in NORMS for w in SHORT if n[1] == "dx+dw"]
    cases = [c for c in cases if options.only in c.name]
    variants = {
        (NormCase(c.kind, c.direction, 512, c.width), t._replace(per_sm=min(t.per_sm, 1)))
        for c in cases
        for t in tiles(c)
    }
    jobs = sorted(variants, key=str)
    workers = max(1, min(16, os.cpu_count() or 2))
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_compile, [jobs[i::workers] for i in range(workers)]))
    print(f"{len(jobs)} variants compiled in {time.monotonic() - begin:.0f} s", flush=True)
    copy = copy_bandwidth()
    best: list[dict[str, Any]] = sweep_rope(copy) if options.rope else []
    everything = list(best)
    for case in cases:
        if time.monotonic() - begin > options.budget:
            print("out of time before", case.name, case.rows, case.width)
            break
        ready = Prepared(case)
        found = [
            r for t in (None, *tiles(case), None) if (r := measure(case, t, ready)) is not None
        ]
        for row in found:
            row["of_copy"] = row["rate"] / copy
        everything += found
        chosen = [r for r in found if r["tile"] == "-"]
        best += sorted(found, key=lambda r: r["us"])[:3] + chosen
        with open(options.out, "w") as file:
            json.dump({"copy_TB_per_s": copy / 1e9, "sweep": everything}, file)
    print(table(best, COLUMNS))
    print(f"copy {copy / 1e9:.3f} TB/s; {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
