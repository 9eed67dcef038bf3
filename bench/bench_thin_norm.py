"""dA of an RMS norm's output: by the norm and a product, and by the product that makes it of the norm's input.

    PYTHONPATH=src python bench/bench_thin_norm.py [OUT.json]

At the shapes of models of 1B and 8B parameters, in microseconds, each way in turn, calls queued so that the
GPU never waits for the host: ``norm`` a residual sum with its norm, ``left`` the product of an output that is
there, ``both`` one after the other, ``normed`` the product of the input; ``same``: in the same bits.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_thin import Case
from place import DEVICE
from roofline import sets_for, table

from fusewright.kernels import add_rms_norm
from fusewright.kernels.normed import Norm
from fusewright.kernels.thin import Result, thin

WAYS = ("norm", "left", "both", "normed")
_SPIN_PER_SECOND = 2.2e9
Call = Callable[[], Any]


def ways(case: Case) -> dict[str, Call]:
    """The calls on operands of their own."""
    (x,), terms, _ = case.operands()
    residual, weight = torch.randn_like(x), torch.randn_like(x[0])
    rest = (weight, 1e-5, 0.0, "input", x.dtype)
    _, total, rstd = add_rms_norm.triton_fwd(x, residual, *rest)
    norm = Norm(weight, rstd, 0.0, "input")

    def both() -> list[Result]:
        return thin([add_rms_norm.triton_fwd(x, residual, *rest)[0]], terms)

    return {
        "norm": lambda: add_rms_norm.triton_fwd(x, residual, *rest),
        "left": lambda: thin([x], terms),
        "both": both,
        "normed": lambda: thin([total], terms, norm=norm),
    }


def queued(calls: Sequence[Call]) -> float:
    """Microseconds of one of these calls, queued behind a kernel that spins while they are issued."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int((1e-3 + 1.2e-4 * len(calls)) * _SPIN_PER_SECOND))
    begin.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / len(calls)


def measure(case: Case, repeats: int = 9) -> dict[str, Any]:
    """The median time of each way, and whether the bits are alike."""
    sets = [ways(case) for _ in range(min(6, sets_for(case.bytes)))]
    a, b = sets[0]["both"](), sets[0]["normed"]()
    same = all(torch.equal(s.left, t.left) for s, t in zip(a, b, strict=True))
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            taken[way].append(queued([one[way] for one in sets]))
    return case.label | {w: statistics.median(t) for w, t in taken.items()} | {"same": str(same)}


def main(typed: Sequence[str]) -> None:
    """Measure, write, print."""
    if DEVICE != "cuda":
        sys.exit("there is no GPU to time")
    rows = [
        measure(Case("left", tokens, (width,), slots, r))
        for width in (4096, 2048)
        for r in (16, 64)
        for slots in (3, 2)
        for tokens in (4096, 8192)
    ]
    if typed:
        with open(typed[0], "w", encoding="utf-8") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)
    print(table(rows, ["name", "shape", "r", *WAYS, "same"]))


if __name__ == "__main__":
    main(sys.argv[1:])
