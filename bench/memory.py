"""The peak memory of one training step, and what rests in memory between steps."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
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


def strangers(named: Iterable[torch.Tensor], most: int = 10) -> dict[str, Any]:
    """What lies on the GPU, and the largest of it that nobody named, from the allocator's own list.

    Args:
        named: parameters, buffers, what packed ones have beside them, the optimizer's state.
        most: sizes in the list.

    Returns:
        ``allocated``: bytes of all blocks. ``named``: of the tensors' own elements; ``around``: what
        the blocks that hold them have beside that (room, rounding). ``pending``: of blocks that are
        freed and wait for a stream. ``others``: [bytes, how many] of the sizes that take the most among
        the blocks that hold no named tensor.
    """
    sizes: dict[int, int] = {}  # by address: a tensor that several names have counts once
    for t in named:
        if t.is_cuda and t.numel():
            sizes[t.data_ptr()] = max(sizes.get(t.data_ptr(), 0), t.numel() * t.element_size())
    starts = np.array(sorted(sizes), dtype=np.uint64)
    others: Counter[int] = Counter()
    allocated = held = pending = 0
    for segment in torch.cuda.memory_snapshot():
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                allocated += block["size"]
                ends = [block["address"], block["address"] + block["size"]]
                first, last = np.searchsorted(starts, np.array(ends, dtype=np.uint64))
                if first < last:
                    held += block["size"]
                else:
                    others[block["size"]] += 1
            elif block["state"].startswith("active"):
                pending += block["size"]
    own = sum(sizes.values())
    largest = sorted(others.items(), key=lambda pair: -pair[0] * pair[1])[:most]
    return {"allocated": allocated, "named": own, "around": held - own, "pending": pending,
            "others": [list(pair) for pair in largest]}  # fmt: skip


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
