"""Whether a type whose float32 gradients amplify rounding has more error with us than in eager.

    python bench/zoo_noise.py starcoder2 whisper       (--batches 32)

For each batch the ratio of our mean error to eager's, both against float64, as the sweep measures it
(bench/zoo_run.py); over the batches its geometric mean and two standard errors of it. Noise of
rounding has an interval that holds 1; a fault has not.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]


def noise(name: str, batches: int) -> tuple[float, float, float]:
    """(geometric mean of the ratios, and the ends of two standard errors around it)."""
    import zoo_run

    import fusewright

    model, batch = zoo_run._trainable(name)
    ours = fusewright.optimize(copy.deepcopy(model), lowering="fx")
    triples = zoo_run._triples(ours, model, batch, range(batches))
    logs = [math.log(zoo_run._exactness([triple]).ratio) for triple in triples]
    middle = statistics.mean(logs)
    error = 2 * statistics.stdev(logs) / math.sqrt(batches)
    return math.exp(middle), math.exp(middle - error), math.exp(middle + error)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("types", nargs="+")
    parser.add_argument("--batches", type=int, default=32)
    given = parser.parse_args()
    for name in given.types:
        middle, low, high = noise(name, given.batches)
        print(
            f"{name}: {middle:.2f} ({low:.2f} to {high:.2f}), {given.batches} batches", flush=True
        )


if __name__ == "__main__":
    main()
