"""The peak memory of one training step, above what rests in memory between steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def step_peak(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes allocated at the worst moment of a forward and backward pass, gradients included.

    On a GPU from the allocator's own counter; on a CPU from the profiler's record of every
    allocation, since the resident set of a process does not shrink when memory is freed.
    """
    model.zero_grad(set_to_none=True)
    on_gpu = next(model.parameters()).is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**batch, use_cache=False).loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with (
            _no_stderr(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
        ):
            model(**batch, use_cache=False).loss.backward()
        peak = _peak(record)
    model.zero_grad(set_to_none=True)
    return int(peak)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler's library announces its start and end on the process's standard error."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _peak(record: profile) -> int:
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
