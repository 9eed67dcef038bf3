"""What a device offers to a kernel, for choices that depend on nothing else but the shapes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Limits(NamedTuple):
    """Multiprocessors, bytes of shared memory for one program, threads in a warp."""

    multiprocessors: int
    shared: int
    warp: int


def ptx(limits: Limits) -> bool:
    """Whether the assembler's language is PTX."""
    return limits.warp == 32 and torch.version.hip is None


@functools.lru_cache(maxsize=64)
def limits(device: torch.device) -> Limits:
    """The limits of a device; those of a small GPU under the interpreter."""
    if device.type != "cuda":
        return Limits(4, 49152, 32)
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return Limits(found.multi_processor_count, shared, found.warp_size)
