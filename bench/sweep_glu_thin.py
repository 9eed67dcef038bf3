"""Tiles of the gated unit's kernels that make thin products too, beside the kernels apart, on a GPU.

    python bench/sweep_glu_thin.py OUT.json [--budget SECONDS] [--dry]

"apart" is the unit's own kernel, and thin products that read what it wrote; "-" is what the rules of
kernels/glu_thin.py choose, timed first and last. A tile is rows, columns, stages, warps, programs per
multiprocessor. The rules are written by hand from this table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import place
import torch
from roofline import copy_bandwidth, fresh_milliseconds, sets_for, table
from triton.runtime.errors import TritonError

from fusewright.kernels import glu_thin, room
from fusewright.kernels.glu_kernels import launch_packed_backward, launch_packed_forward
from fusewright.kernels.thin import thin
from fusewright.kernels.thin_plan import Term, Tile, Wide

RULES = {n: getattr(glu_thin, n) for n in ("forward_tile", "backward_tile")}
_FAILURES = (RuntimeError, ValueError, AssertionError, TritonError)
COLUMNS = ["name", "shape", "us", "of_apart", "tile"]
SHAPES = ((8192, 8192, 16), (4096, 14336, 16))
BACKWARD = [
    Tile(*t) for t in (
        (32, 128, 2, 4, 2), (32, 128, 1, 4, 2), (32, 128, 2, 4, 3), (32, 128, 2, 8, 1),
        (32, 128, 2, 8, 2), (32, 128, 3, 8, 2), (32, 128, 1, 8, 3), (64, 128, 2, 8, 1),
        (64, 128, 1, 8, 2), (64, 128, 3, 8, 1), (32, 256, 2, 8, 1), (32, 256, 1, 8, 1),
        (16, 256, 2, 8, 2), (16, 128, 2, 4, 3), (16, 128, 3, 4, 3), (32, 64, 3, 4, 3),
        (64, 64, 2, 4, 2), (64, 64, 2, 8, 2), (16, 64, 3, 2, 6),
    )
]  # fmt: skip
FORWARD = [
    Tile(*t) for t in (
        (64, 128, 3, 8, 2), (64, 128, 2, 8, 2), (64, 128, 2, 4, 2), (64, 64, 3, 4, 3),
        (64, 64, 4, 4, 2), (32, 128, 3, 4, 3), (32, 128, 2, 4, 4), (32, 64, 4, 4, 4),
        (128, 64, 3, 8, 2), (64, 256, 2, 8, 1), (32, 256, 2, 8, 2), (64, 128, 1, 8, 3),
        (16, 256, 3, 4, 3), (32, 128, 2, 8, 3), (16, 128, 3, 4, 4),
    )
]  # fmt: skip


class Case(NamedTuple):
    """One direction at T rows, F columns, adapters of rank r."""

    direction: str
    rows: int
    width: int
    rank: int

    @property
    def bytes(self) -> int:
        """The least that must move."""
        return (3 if self.direction == "forward" else 5) * 2 * self.rows * self.width

    def operands(self) -> dict[str, torch.Tensor]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=place.DEVICE, dtype=torch.bfloat16)

        t, f, r = self.rows, self.width, self.rank
        made = {"gate_up": normal(t, 2 * f), "a": normal(r, f), "b0": normal(f, r)}
        made |= {"dh": normal(t, f), "p": normal(t, r), "b1": normal(f, r), "s": normal(t, 2 * r)}
        return made

    def calls(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Ours, and the kernels apart, on fresh operands."""
        o, r, f = self.operands(), self.rank, self.width
        if self.direction == "forward":
            h = room.empty_roomy((self.rows, f), 16, torch.bfloat16, torch.device(place.DEVICE))
            whole = room.widened(h, 16)
            term, wide = (
                Term(0, o["a"], True, 2.0, f),
                Wide(whole, [None], 0, (f + r, f + 16), True),
            )

            def apart() -> Any:
                launch_packed_forward(o["gate_up"], h, "silu", True, False)
                return [h, thin([h], [term], wide)[0].right]

            return lambda: [
                h, glu_thin.forward(o["gate_up"], h, "silu", True, term, wide, ())
            ], apart  # fmt: skip
        out = room.empty_roomy((self.rows, 2 * f), 32, torch.bfloat16, torch.device(place.DEVICE))
        whole = room.widened(out, 32)
        wide = Wide(whole, [None, None], 0, (2 * f + 2 * r, 2 * f + 32), True)
        terms = [
            Term(i, o[f"b{i}"], False, 2.0, 2 * f + i * r, o["s"][:, i * r : (i + 1) * r])
            for i in range(2)
        ]

        def separate() -> Any:
            h = torch.empty_like(o["dh"])
            launch_packed_backward(o["dh"], o["gate_up"], out, "silu", True, False, None, h)
            made = thin([out[:, :f], out[:, f:]], terms, wide)
            own = thin([h], [Term(0, left=o["p"], left_transposed=True)])
            return [out, *(t for m in made for t in m), own[0].left]

        def joint() -> Any:
            made = glu_thin.backward(
                o["dh"], o["gate_up"], out, "silu", True, o["p"], terms, wide, ()
            )
            pairs = zip(made.right, made.left, strict=True)
            return [out, *(t for pair in pairs for t in pair), made.own]

        return joint, separate


Job = tuple[Case, Tile | None]


def _use(job: Job) -> None:
    """Put the job's tile, or the rules, where the launches look."""
    glu_thin.forward_cut.cache_clear()
    glu_thin.backward_cut.cache_clear()
    for name, rule in RULES.items():
        setattr(glu_thin, name, rule if job[1] is None else lambda *_, t=job[1]: t)


def _compile(some: list[Job]) -> None:
    for job in some:
        _use(job)
        try:
            for call in job[0].calls():
                call()
        except _FAILURES as failure:  # what does not fit is reported when it is timed
            print("skipped", job, type(failure).__name__)
        if place.ON_GPU:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _same(ours: list[torch.Tensor], apart: list[torch.Tensor]) -> None:
    for a, b in zip(ours, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2 * float(b.abs().max()))


def measure(group: list[Job]) -> list[dict[str, Any]]:
    """A case's tiles, its rule and the kernels apart."""
    case = group[0][0]
    sets = [case.calls() for _ in range(sets_for(case.bytes))]
    ours, apart = (itertools.cycle([s[i] for s in sets]) for i in (0, 1))
    once, against = sets[0]

    def milliseconds(calls: Any) -> float:
        return fresh_milliseconds(lambda: next(calls), case.bytes, 4)

    found, base = [], milliseconds(apart)
    for job in ((case, None), *group, (case, None)):
        _use(job)
        try:
            result = [t.clone() for t in once()]
            _same(result, against())
            ms = milliseconds(ours)
        except _FAILURES as failure:
            print("failed", *job, str(failure)[:100])
            continue
        tile = "-" if job[1] is None else ",".join(map(str, job[1]))
        found.append({"name": case.direction, "shape": f"{case.rows}x{case.width}", "us": ms * 1e3,
                      "of_apart": ms / base, "tile": tile})  # fmt: skip
    again = milliseconds(apart)
    for ms in (base, again):
        found.append({"name": case.direction, "shape": f"{case.rows}x{case.width}", "us": ms * 1e3,
                      "of_apart": ms / base, "tile": "apart"})  # fmt: skip
    return found


def main() -> None:
    """Sweep, write JSON, print the best tiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--budget", type=float, default=70.0, help="seconds, compilation included")
    parser.add_argument("--dry", action="store_true", help="tiny cases, on whatever is here")
    options = parser.parse_args()
    begin = time.monotonic()
    shapes = [(32, 64, 8)] if options.dry else SHAPES
    tiles = {"forward": FORWARD, "backward": BACKWARD}
    groups: list[list[Job]] = [
        [(Case(direction, *shape), t) for t in tiles[direction][: 2 if options.dry else None]]
        for direction in ("backward", "forward")
        for shape in shapes
    ]
    everyone = [job for group in groups for job in group] + [(g[0][0], None) for g in groups]
    if not options.dry:
        place.in_processes(_compile, everyone)
        print(f"{len(everyone)} variants compiled in {time.monotonic() - begin:.0f} s", flush=True)
    copy = copy_bandwidth()
    best: list[dict[str, Any]] = []
    everything: list[dict[str, Any]] = []
    for group in groups:
        if time.monotonic() - begin > options.budget:
            print("out of time before", group[0][0])
            break
        found = measure(group)
        everything += found
        best += sorted(found, key=lambda r: r["us"])[:5]
        best += [r for r in found if r["tile"] in ("-", "apart")]
        with open(options.out, "w") as file:
            json.dump({"device": place.name(), "copy_TB_per_s": copy / 1e9, "sweep": everything},
                      file)  # fmt: skip
    print(table(best, COLUMNS))
    print(f"copy {copy / 1e9:.3f} TB/s; {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
