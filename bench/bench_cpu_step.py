"""The training step on a CPU: 60 M parameters in float32, LoRA and full fine-tuning, wall clock.

    python bench/bench_cpu_step.py [--seconds 900] [OUT.json]

Ours, with Inductor and as plain FX, against eager and per-layer torch.compile, interleaved as on a
GPU and one process preparing at a time; results/step-cpu.json by default. Options of bench_step.py
may follow.
"""

from __future__ import annotations

import sys

import bench_step

PEERS = "eager,layers,ours,ours:lowering=fx"


def main(typed: list[str]) -> None:
    """bench_step.py with a CPU's workloads; what is typed comes later and so wins."""
    works = [] if {"L", "F"} & set(typed) else ["L", "F"]
    bench_step.main(
        [*works, "--cpu", "--serial", "--peers", PEERS, "--seconds", "900",
         "--steps", "2", "--settle", "1", *typed]
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
