"""Where a kernels' benchmark runs: on the GPU, or on the CPU for a dry run of every case.

To be imported before Triton is, whose interpreter stands for the GPU in a dry run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def name() -> str:
    """The device's name; without a GPU a remark that no figure means anything."""
    return torch.cuda.get_device_name() if ON_GPU else "CPU, a dry run without meaning"


def in_processes(function: Callable[[list[Any]], Any], jobs: Iterable[Any]) -> None:
    """Compile into Triton's cache in as many processes as there are cores."""
    found = list(jobs)
    count = max(1, min(16, (os.cpu_count() or 2) - 1, len(found)))
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        list(pool.map(function, [found[i::count] for i in range(count)]))
