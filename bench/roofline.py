"""Time on a GPU against what its memory can do: medians by events, copy bandwidth, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]


def milliseconds(run: Run, repeats: int = 21, warmup: int = 3) -> float:
    """Median time of one call on the GPU; the calls are queued without waiting in between."""
    for _ in range(warmup):
        run()
    torch.cuda.synchronize()
    pairs = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(b.elapsed_time(e) for b, e in pairs)


def copy_bandwidth(mebibytes: int = 1024) -> float:
    """Bytes a millisecond of a device-to-device copy, read and write counted."""
    source = torch.empty(mebibytes * 2**20, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def host_microseconds(run: Run, calls: int = 300) -> float:
    """What the host spends to issue one call, the GPU never being waited for; best of five."""
    best = float("inf")
    for _ in range(5):
        run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, time.perf_counter() - begin)
        torch.cuda.synchronize()
    return best / calls * 1e6


def peak_mebibytes(run: Run) -> float:
    """Most memory that a call holds above what was allocated before it, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak / 2**20


def root_mean_square(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """Root mean square of the error, relative to the oracle's."""
    size = oracle.double().square().mean().sqrt()
    return float((actual.double() - oracle.double()).square().mean().sqrt() / size)


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """The rows as aligned text; a missing value is a dash."""
    cells = [list(columns)]
    for row in rows:
        cells.append([_shown(row.get(c)) for c in columns])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in
                  enumerate(zip(line, widths, strict=True)))
        for line in cells
    )  # fmt: skip


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
