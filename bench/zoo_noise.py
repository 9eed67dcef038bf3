"""Whether a type whose gradients amplify rounding has more error with us than in eager.

    python bench/zoo_noise.py starcoder2 whisper       (--batches 32)
    python bench/zoo_noise.py gemma4_text --mode bf16+lora --batches 192

For each batch the ratio of our mean error to eager's, both against float64, as the sweep measures it
(bench/zoo_exact.py), each on another draw of the weights; over the batches its geometric mean and two
standard errors of it. Noise of rounding has an interval that holds 1; a fault has not.

Beside it the same of a control: eager itself, whose weights are moved by one last place or not at all,
at random, against float64 with the same weights. It rounds otherwise and as often, so that its ratio is
1 but for chance; where its interval does not hold 1, it is the measure that is wrong.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import torch
import training
import zoo_exact
import zoo_run
from zoo_exact import Noise

import fusewright


def noise(name: str, mode: str, batches: int) -> tuple[Noise, Noise]:
    """Of our error over eager's, and of the control's over eager's."""
    eager, batch = zoo_run.of_mode(name, mode)
    ours = fusewright.optimize(copy.deepcopy(eager), lowering="fx")
    other = copy.deepcopy(eager)
    logs: tuple[list[float], list[float]] = [], []
    for seed, weights in zoo_exact.redraws((eager, ours, other), range(batches)):
        zoo_exact.put(other, {n: _moved(p, seed) for n, p in weights.items()})
        given = zoo_exact.drawn(batch, seed)
        theirs, exact = zoo_exact.pair(eager, given)
        second = training.relative_errors(*zoo_exact.pair(other, given))
        first = training.relative_errors(training.train_step(ours, given), exact)
        against = training.relative_errors(theirs, exact)
        for log, errors in zip(logs, (first, second), strict=True):
            log.append(math.log(zoo_exact.compared([(errors, against)]).ratio))
    return Noise.of(logs[0]), Noise.of(logs[1])


def _moved(p: torch.Tensor, seed: int) -> torch.Tensor:
    """Each number one last place up, down, or as it is."""
    where = torch.randint(-1, 2, p.shape, generator=torch.Generator().manual_seed(seed + 1))
    up, down = (torch.nextafter(p, torch.full_like(p, s * math.inf)) for s in (1, -1))
    return torch.where(where > 0, up, torch.where(where < 0, down, p))


def _shown(found: Noise) -> str:
    return f"{found.middle:.3f} ({found.low:.3f} to {found.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("types", nargs="+")
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--mode", choices=zoo_run.MODES, default="fp32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.types:
        ours, control = noise(name, given.mode, given.batches)
        print(
            f"{name} {given.mode}: ours {_shown(ours)}, control {_shown(control)}, "
            f"{given.batches} batches",
            flush=True,
        )


if __name__ == "__main__":
    main()
