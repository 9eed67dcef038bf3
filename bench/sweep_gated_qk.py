"""Try tiles of the gated norm's and of the normed and rotated heads' kernels on a GPU.

    python bench/sweep_gated_qk.py OUT.json [--rows 16384] [--budget SECONDS] [--narrow] [--dry]

Prints the three best of each kernel and what the rules choose ("-", timed first and last: what comes
first was seen to be slower than the same tile later). All variants are compiled first, in as many
processes as there are cores and 16 at most. A gated norm's tile is rows, warps, programs per
multiprocessor, stages, hoist, reload, piece; one of heads is rows, warps, programs per
multiprocessor, ahead. The rules, ``forward_tile`` and ``backward_tile`` of
kernels/gated_rms_norm_launch.py and kernels/qk_norm_rope_launch.py, are written by hand from this
table: kernels never choose by measuring.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any, NamedTuple

import place
import torch
from fused_cases import GatedCase, QkCase
from roofline import copy_bandwidth, fresh_milliseconds, sets_for, table
from triton.runtime.errors import TritonError

from fusewright.kernels import device, gated_rms_norm_launch, qk_norm_rope_launch
from fusewright.kernels.norm_tiles import Tile
from fusewright.kernels.qk_norm_rope_launch import Tile as HeadTile

Case = GatedCase | QkCase
# (order, width, group, rows a token): whole rows; then groups of columns, and heads as rows
GATED = (("after", 4096, 4096, 1), ("before", 5120, 5120, 1), ("before", 8192, 8192, 1))
NARROW = (("after", 4096, 128, 1), ("after", 128, 128, 32), ("before", 8192, 1024, 1))
HEADS = ((32, 8), (64, 8))
DIRECTIONS = ("forward", "dx", "dx+dw")
NAMES = ("forward_tile", "backward_tile")
RULES = {m: [getattr(m, n) for n in NAMES] for m in (gated_rms_norm_launch, qk_norm_rope_launch)}
_FAILURES = (RuntimeError, ValueError, AssertionError, TritonError)
COLUMNS = ["name", "shape", "us", "of_copy", "tile"]


class Job(NamedTuple):
    """One tile of one case; no tile is the rule's choice."""

    case: Case
    tile: tuple[int, ...] | None


def _gated(order: str, width: int, direction: str) -> list[Tile]:
    """Tiles of 8 to 40 numbers a thread; those of sums walk over the tokens."""
    again = (False, True) if order == "before" else (False,)
    threads = [t for t in (128, 256, 512, 1024) if 8 <= width // t <= 40]
    if direction == "forward":
        return [Tile(1, t // 32) for t in threads] + [
            Tile(2, t // 32) for t in (256, 512, 1024) if 16 <= 2 * width // t <= 32
        ]
    if direction == "dx":
        single = [Tile(1, t // 32, hoist=True, reload=a) for t in threads for a in again]
        pieces = [t for t in threads if 8 * t < width and width % (8 * t) == 0]
        cut = [Tile(1, t // 32, hoist=True, reload=again[-1], piece=8 * t) for t in pieces]
        return [
            *single,
            *cut,
            *(Tile(1, t // 32, 512 // t, 2, True, again[-1]) for t in (256, 512)),
        ]
    shapes = [(t, 512 // t) for t in (256, 512) if width // t <= 20]
    flags = itertools.product(shapes, (1, 2, 3), (False, True), again[-1:])
    tiles = [Tile(1, t // 32, p, s, h, a) for (t, p), s, h, a in flags if s < 3 or not h]
    return [*tiles, Tile(1, 8, 2, 2, True, again[-1], 1024), Tile(1, 32, 1, 2, False, again[-1])]


def _narrow(group: int) -> list[Tile]:
    """Tiles of several rows of a narrow group, which walk over the tokens."""
    shapes = itertools.product((1024, 2048, 4096, 8192), (1, 2, 4, 8), (1, 2), (1, 2, 3))
    return [
        Tile(numbers // group, warps, few * 16 // warps, stages)
        for numbers, warps, few, stages in shapes
        if 8 <= numbers // (32 * warps) <= 32 and numbers // group >= 1 and few * 16 // warps <= 8
    ]


def _heads(direction: str) -> list[HeadTile]:
    """Tiles of heads of 128: 8 to 32 numbers a thread."""
    cuts = ((16, 4), (8, 2), (4, 1), (32, 8), (32, 4), (8, 4), (16, 2), (16, 8))
    if direction == "forward":
        return [HeadTile(*c) for c in cuts]
    if direction == "dx":
        return [*(HeadTile(*c) for c in cuts), HeadTile(16, 4, 6, True), HeadTile(16, 4, 8, False)]
    walks = ((16, 4, 4), (16, 4, 5), (16, 4, 6), (8, 2, 10), (8, 2, 12), (4, 1, 20), (8, 4, 6))
    return [*(HeadTile(*w, True) for w in walks), HeadTile(16, 4, 5, False),
            HeadTile(16, 4, 6, False), HeadTile(16, 4, 8, False), HeadTile(32, 8, 2, True)]  # fmt: skip


def jobs(rows: int, dry: bool, narrow: bool) -> list[list[Job]]:
    """The cases with their tiles; a dry run has small cases and few tiles."""
    found = []
    if narrow:
        for order, width, group, each in NARROW:
            cut = 1024 if dry else 1
            case = GatedCase(order, "dx+dw", max(8, rows * each // cut), width, group)
            found.append([Job(case, t) for t in _narrow(group)])
        return [tiles[:2] if dry else tiles for tiles in found]
    for direction in DIRECTIONS:
        for order, width, group, _ in GATED:
            shown = 64 if dry else width
            gated = GatedCase(order, direction, rows, shown, 64 if dry else group)
            found.append([Job(gated, t) for t in _gated(order, width, direction)])
        for heads in HEADS:
            width = 32 if dry else 128
            case = QkCase(direction, rows, *(n // 16 + 1 if dry else n for n in heads), width)
            found.append([Job(case, t) for t in _heads(direction)])
    return [group[:2] if dry else group for group in found]


def _use(job: Job) -> None:
    """Put the job's tile, or the rules, where the launches look."""
    for module, rules in RULES.items():
        for name, rule in zip(NAMES, rules, strict=True):
            setattr(module, name, rule if job.tile is None else lambda *_, t=job.tile: t)


def _compile(some: list[Job]) -> None:
    for job in some:
        _use(job)
        try:
            job.case.ours()()
        except _FAILURES as failure:  # what does not fit is reported when it is timed
            print("skipped", job.case.name, job.tile, type(failure).__name__)
        if place.ON_GPU:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # many processes share the memory


def _flat(result: Any) -> list[torch.Tensor]:
    return [t for t in result if t is not None and t.numel()]


class Prepared:
    """Inputs that all tiles of a case are timed on, and results to check them against."""

    def __init__(self, case: Case) -> None:
        _use(Job(case, None))
        self.calls = itertools.cycle([case.ours() for _ in range(sets_for(case.bytes))])
        self.one = next(self.calls)
        self.expected = _flat(self.one())


def _chosen(case: Case) -> tuple[int, ...]:
    """What the rule chooses."""
    limits = device.limits(torch.device(place.DEVICE))
    forward, backward = RULES[
        gated_rms_norm_launch if isinstance(case, GatedCase) else qk_norm_rope_launch
    ]
    width = case.group if isinstance(case, GatedCase) else case.width
    after = (case.order == "after",) if isinstance(case, GatedCase) else ()
    if case.direction == "forward":
        return tuple(forward(width, case.dtype.itemsize, *after, limits))
    summing = case.direction == "dx+dw"
    return tuple(backward(width, case.dtype.itemsize, *after, summing, limits))


def measure(job: Job, ready: Prepared, copy: float) -> dict[str, Any] | None:
    """The time of one tile, its results checked against the rule's."""
    _use(job)
    case = job.case
    try:
        for a, b in zip(_flat(ready.one()), ready.expected, strict=True):
            # Sums over all rows in another order: as close as their size allows.
            torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2 * max(1.0, float(b.abs().max())))
        ms = fresh_milliseconds(lambda: next(ready.calls), case.bytes, 4)
    except _FAILURES as failure:
        print("failed", case.name, case.width, job.tile, str(failure)[:120])
        return None
    shown = [int(v) for v in (_chosen(case) if job.tile is None else job.tile)]
    tile = ("-" if job.tile is None else "") + ",".join(map(str, shown))
    width = f"{case.width}/{case.group}" if isinstance(case, GatedCase) else case.width
    return {"name": case.name, "shape": f"{case.rows}x{width}", "us": ms * 1e3,
            "of_copy": case.bytes / ms / copy, "tile": tile}  # fmt: skip


def main() -> None:
    """Sweep, write JSON, print the best tiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--rows", type=int, default=16384, help="rows, or tokens")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds, compilation included")
    parser.add_argument("--narrow", action="store_true", help="groups of columns alone")
    parser.add_argument("--dry", action="store_true", help="tiny cases, on whatever is here")
    options = parser.parse_args()
    begin = time.monotonic()
    groups = jobs(8 if options.dry else options.rows, options.dry, options.narrow)
    if not options.dry:
        everyone = [job for group in groups for job in group]
        place.in_processes(_compile, everyone)
        print(f"{len(everyone)} variants compiled in {time.monotonic() - begin:.0f} s", flush=True)
    copy = copy_bandwidth()
    best: list[dict[str, Any]] = []
    everything: list[dict[str, Any]] = []
    for group in groups:
        case = group[0].case
        if time.monotonic() - begin > options.budget:
            print("out of time before", case.name, case.rows, case.width)
            break
        ready, rule = Prepared(case), Job(case, None)
        found = [r for j in (rule, *group, rule) if (r := measure(j, ready, copy)) is not None]
        everything += found
        best += sorted(found, key=lambda r: r["us"])[:3] + [r for r in found if "-" in r["tile"]]
        with open(options.out, "w") as file:
            json.dump({"device": place.name(), "copy_TB_per_s": copy / 1e9, "sweep": everything},
                      file)  # fmt: skip
    print(table(best, COLUMNS))
    print(f"copy {copy / 1e9:.3f} TB/s; {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
