"""The counters on the device by which the last program of a launch knows that it is the last.

Every program adds one when its results are written, and the program that finds all others there does
what needs the results of all. In the upper half of the 64 bits whatever else is to be counted is
added up. The last program leaves zero, so that the next launch finds the counter as this one did.

Launches that may run beside each other must not share one: there is a counter for each stream, and
what is captured into a CUDA graph, which may be replayed on any, has one of its own that the graph
clears.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fusewright.kernels import recording
from fusewright.kernels.launcher import current_stream
from fusewright.kernels.recording import recorder

Counter = tuple[torch.Tensor, int]
_counters: dict[tuple[int, int], Counter] = {}  # with their addresses, by device and stream


def counter(device: torch.device) -> torch.Tensor:
    """The counter of the current stream of ``device``, (1,) int64, zero between launches."""
    if recorder.rehearsing:
        return torch.empty(1, dtype=torch.int64, device=device)
    fetch: Callable[[], Counter]
    fetch = functools.partial(_current if device.type == "cuda" else _zero, device)
    made, _ = fetch()
    recording.fetched(made, fetch)
    return made


def _current(device: torch.device) -> Counter:
    if torch.cuda.is_current_stream_capturing():
        return _zero(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    key = index, current_stream(index)
    found = _counters.get(key)
    if found is None:
        found = _counters[key] = _zero(device)
    return found


def _zero(device: torch.device) -> Counter:
    # It may be kept for good: it must not be what a mode that is active now makes of it.
    with torch._C._DisableTorchDispatch(), torch.inference_mode(False), torch.no_grad():
        made = torch.zeros(1, dtype=torch.int64, device=device)
    return made, made.data_ptr()
