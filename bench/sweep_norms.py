"""Try tiles of the norms' and rope's kernels on a GPU; prints the best and the chosen ones.

    python bench/sweep_norms.py OUT.json [--budget SECONDS] [--only NAME]

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

NORMS = (("rms", "forward"), ("add", "forward"), ("rms", "dx"), ("rms", "dx+dw"), ("add", "dx+dw"),
         ("layer", "forward"), ("layer", "dx+dw"))  # fmt: skip
WIDTHS = (1024, 2048, 4096, 5120, 8192, 16384, 128)
CHOSEN = {n: getattr(norm_launch, n) for n in ("forward_tile", "backward_tile")}
_FAILURES = (RuntimeError, ValueError, AssertionError, TritonError)
COLUMNS = ["name", "width", "us", "of_copy", "tile", "chosen"]


def _block(width: int) -> int:
    return 1 << (width - 1).bit_length()


def tiles(case: NormCase) -> Iterator[Tile]:
    """Tiles worth trying, those of 8 to 64 numbers a thread."""
    block = _block(case.width)
    for rows, warps in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32)):
        numbers = rows * block
        per_thread = numbers // (warps * 32)
        if not 8 <= per_thread <= 32 or numbers > max(8192, block) or numbers < 1024:
            continue
        if block >= 1024 and numbers < 2048:
            continue
        if case.direction == "forward" and not (rows > 1 and numbers > 4096):
            yield Tile(rows, warps, 0, 1, False)
            yield Tile(rows, warps, 0, 1, True)
        elif case.direction == "dx" and not (rows > 1 and numbers > 4096):
            yield Tile(rows, warps, 0, 1, False)
        for threads in (512, 1024):  # of a multiprocessor
            per_sm = max(1, threads // (warps * 32))
            stages = (1, 2, 3) if case.direction == "dx+dw" else (2, 3)
            for stage in stages if numbers >= 4096 else stages[:-1]:
                if (stage - 1) * numbers * 2 * 4 * per_sm < 200 * 1024 and per_sm <= 16:
                    yield Tile(rows, warps, per_sm, stage, False)
            if case.direction == "dx+dw" and rows == 1:
                yield Tile(rows, warps, per_sm, 1, False, True)


def _use(tile: Tile | None) -> None:
    for name, chosen in CHOSEN.items():
        setattr(norm_launch, name, chosen if tile is None else lambda *_, tile=tile: tile)


def _compile(jobs: list[tuple[NormCase, Tile]]) -> None:
    for case, tile in jobs:
        _use(tile)
        try:
            NormCase(case.kind, case.direction, 512, case.width).ours()()
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
    return {"name": case.name, "width": case.width, "us": ms * 1e3, "rate": case.bytes / ms,
            "tile": "-" if tile is None else ",".join(str(int(v)) for v in tile)}  # fmt: skip


def sweep_rope(copy: float) -> list[dict[str, Any]]:
    """Warps and heads per step of the rope kernel."""
    rows = []
    chosen = rope_kernels.tile
    for direction, heads, layout in itertools.product(
        ("forward", "backward"), ((32, 8, 128), (32, 8, 64), (16, 16, 256)), ("half", "interleaved")
    ):
        case = RopeCase(direction, 16384, *heads, layout)
        found = []
        for steps, warps in itertools.product((1, 2, 4), (1, 2, 4, 8)):
            cut = rope_kernels.Tile(heads[0] // steps, max(1, heads[1] // steps), steps, warps)
            rope_kernels.tile = lambda *_, cut=cut: cut
            ms = fresh_milliseconds(case.ours, case.bytes, 4)
            found.append((ms, ",".join(map(str, cut))))
        rope_kernels.tile = chosen
        mine = chosen(*heads, device.limits(torch.device("cuda")))
        for ms, cut in sorted(found)[:3] + [f for f in found if f[1] == ",".join(map(str, mine))]:
            rows.append({"name": case.name, "us": ms * 1e3, "of_copy": case.bytes / ms / copy,
                         "tile": cut, "chosen": cut == ",".join(map(str, mine))})  # fmt: skip
    return rows


def main() -> None:
    """Sweep, write JSON, print the best tiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--budget", type=float, default=240.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", type=int, default=16384)
    options = parser.parse_args()
    begin = time.monotonic()
    cases = [NormCase(*n, options.rows * (16 if w == 128 else 1), w) for w in WIDTHS for n in NORMS]
    alike = (("add", "forward"), ("layer", "forward"), ("rms", "dx"))  # like rms, at most widths
    cases = [c for c in cases if c.width in (4096, 16384) or (c.kind, c.direction) not in alike]
    cases = [c for c in cases if c.width != 128 or c.kind == "rms"]
    cases = [c for c in cases if options.only in c.name]
    variants = {
        (c, t._replace(per_sm=min(t.per_sm, 1))) for c in cases for t in (*tiles(c), None) if t
    }
    jobs = sorted(variants, key=str)
    workers = max(1, min(16, os.cpu_count() or 2))
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_compile, [jobs[i::workers] for i in range(workers)]))
    print(f"{len(jobs)} variants compiled in {time.monotonic() - begin:.0f} s", flush=True)
    copy = copy_bandwidth()
    best: list[dict[str, Any]] = sweep_rope(copy) if options.only in "rope" else []
    everything = list(best)
    for case in cases:
        if time.monotonic() - begin > options.budget:
            print("out of time before", case.name, case.width)
            break
        ready = Prepared(case)
        found = [r for t in (None, *tiles(case)) if (r := measure(case, t, ready)) is not None]
        for row in found:
            row["of_copy"] = row["rate"] / copy
        everything += found
        chosen = [r for r in found if r["tile"] == "-"]
        best += sorted(found, key=lambda r: r["us"])[:4] + chosen
        with open(options.out, "w") as file:
            json.dump({"copy_TB_per_s": copy / 1e9, "sweep": everything}, file)
    print(table(best, COLUMNS))
    print(f"copy {copy / 1e9:.3f} TB/s; {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
