"""Time GPU work against the bandwidth of a copy measured in the same run.

Every measurement replays a CUDA graph of several calls, each on inputs of its own and with its
results kept, so that nothing is found in the L2 cache and no host work is counted; the number is the
median over replays divided by the calls.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

FRESH_BYTES = 400 * 2**20  # several times the L2 cache of any GPU
Make = Callable[[], Callable[[], Any]]


def sets_for(bytes_moved: int) -> int:
    """How many sets of inputs a measurement rotates through."""
    return max(2, min(40, math.ceil(FRESH_BYTES / bytes_moved)))


def milliseconds(make: Make, bytes_moved: int, replays: int = 7) -> float:
    """Median time of one call; ``make`` makes inputs and returns the call on them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = [make() for _ in range(sets_for(bytes_moved))]
        calls[0]()
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        kept = []
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                kept.append(call())
        times = []
        for replay in range(replays + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            if replay >= 2:
                times.append(begin.elapsed_time(end) / len(calls))
    del kept, graph, calls
    return statistics.median(times)


def copy_bandwidth(bytes_moved: int) -> float:
    """Bytes per millisecond of a device copy that moves so many bytes, read and written."""

    def make() -> Callable[[], Any]:
        source = torch.empty(bytes_moved // 4, dtype=torch.bfloat16, device="cuda").normal_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return bytes_moved / milliseconds(make, bytes_moved)


def host_microseconds(call: Callable[[], Any], calls: int = 1000) -> float:
    """Wall time of one call on small tensors, the queue drained at the end."""
    for _ in range(50):
        call()
    best = math.inf
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / calls)
    return best * 1e6


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text; numbers with four digits."""

    def show(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    cells = [list(columns)] + [[show(r.get(c)) for c in columns] for r in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells
    )
