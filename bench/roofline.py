"""Time on a GPU against what its memory can do: medians, copy bandwidth, host time, peak memory.

Two ways to time a call. ``milliseconds`` runs it again and again on the same inputs, which must be
larger than the L2 cache. ``fresh_milliseconds`` rotates through several sets of inputs in a CUDA
graph, for calls that move little. Neither counts the host's work. Without a GPU every call is made
once and its time is the clock's: a dry run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from place import DEVICE

FRESH_BYTES = 400 * 2**20  # several times the L2 cache of any GPU
_SPIN_PER_SECOND = 2.2e9  # at least a GPU's clock
_LONGEST_SPIN = 0.1
_RAMP = 0.03  # seconds of work before the first timing: a GPU that waited has slower clocks

Run = Callable[[], Any]
Make = Callable[[], Run]


def milliseconds(run: Run, repeats: int = 21, warmup: int = 3) -> float:
    """Median time of one call on the GPU.

    The calls are queued behind a spinning kernel, so that the GPU never waits for the host: without
    it a call that the host takes longer to issue than the GPU to run measures the host.
    """
    if not torch.cuda.is_available():
        return _once(run)
    run()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(max(1, warmup)):
        run()
    issue = (time.perf_counter() - begun) / max(1, warmup)
    torch.cuda.synchronize()
    spin = min(_LONGEST_SPIN, 1e-3 + 1.5 * repeats * issue)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(int(spin * _SPIN_PER_SECOND))
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(b.elapsed_time(e) for b, e in pairs)


def interleaved(runs: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turn without a pause; the first two rounds do not count.

    For ratios: a GPU that has worked for a while has slower clocks, for all of them alike.
    """
    times: dict[str, list[Any]] = {name: [] for name in runs}
    for _ in range(repeats + 2):
        for name, run in runs.items():
            times[name].append(_timed(run))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {
        name: statistics.median(b if a is None else a.elapsed_time(b) for a, b in found[2:])
        for name, found in times.items()
    }


def _timed(run: Run) -> tuple[Any, Any]:
    """The events around a call; without a GPU None and its milliseconds."""
    if not torch.cuda.is_available():
        return None, _once(run)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    return begin, end


def _once(run: Run) -> float:
    begun = time.perf_counter()
    run()
    return (time.perf_counter() - begun) * 1e3


def sets_for(bytes_moved: int) -> int:
    """How many sets of inputs ``fresh_milliseconds`` rotates through."""
    return max(2, min(40, math.ceil(FRESH_BYTES / bytes_moved)))


def fresh_milliseconds(make: Make, bytes_moved: int, replays: int = 7) -> float:
    """Median time of one call; ``make`` makes inputs and returns the call on them.

    Every call has inputs of its own and its results are kept: nothing is found in the L2 cache.
    """
    if not torch.cuda.is_available():
        return _once(make())
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
        warm = time.perf_counter() + _RAMP
        while len(times) < replays:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            if time.perf_counter() > warm:
                times.append(begin.elapsed_time(end) / len(calls))
    del kept, graph, calls
    return statistics.median(times)


def copy_bandwidth(bytes_moved: int = 2**31) -> float:
    """Bytes a millisecond of a device-to-device copy, read and write counted."""
    if not torch.cuda.is_available():
        bytes_moved = 2**20
    source = torch.empty(bytes_moved // 2, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def fresh_bandwidth(bytes_moved: int) -> float:
    """Bytes a millisecond of a kernel that reads and writes so many in all, as timed by a graph.

    It negates, because a copy would become a node of the graph that no kernel runs: on an H200 that
    reaches 2.7 TB/s where a copy outside of a graph reaches 4.2.
    """

    def make() -> Run:
        source = torch.empty(bytes_moved // 4, dtype=torch.bfloat16, device=DEVICE).normal_()
        target = torch.empty_like(source)
        return lambda: torch.neg(source, out=target)

    return bytes_moved / fresh_milliseconds(make, bytes_moved)


def host_microseconds(run: Run, calls: int = 300) -> float:
    """What the host spends to issue one call, the GPU never being waited for; best of five."""
    if not torch.cuda.is_available():
        return _once(run) * 1e3
    best = math.inf
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
    if not torch.cuda.is_available():
        run()
        return 0.0
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


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
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
