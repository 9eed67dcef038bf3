"""What a device can do: rates that turn FLOPs and bytes into seconds, and how much memory there is.

The built-in rates are what a training step's kernels sustain, not what a data sheet promises: H200 as
measured (GEMMs of 690 TFLOP/s in bf16 over minutes, copies at 4.2 TB/s, cuDNN's attention); the others
scaled from it by their data sheets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
_PINNED = 0.75  # of the host's memory: the rest is the program's, its data's and the system's
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class UnknownDevice(ValueError):
    """The device is not among those that are described."""


@dataclass(frozen=True)
class Device:
    """One device's rates.

    Attributes:
        name: as users write it.
        memory: bytes.
        products: FLOP/s of large 16-bit matrix products.
        attention, attention_backward: FLOP/s of fused causal attention.
        bandwidth: bytes/s of a copy, read and written bytes counted.
        launch: seconds that a kernel takes at least.
        host: bytes/s to the host's pinned memory and back, each way; 0 where nothing is moved there.
        host_memory: bytes of the host's that may be pinned for that.
    """

    name: str
    memory: int
    products: float
    attention: float
    attention_backward: float
    bandwidth: float
    launch: float = 4e-6
    host: float = 0.0
    host_memory: int = 96 * GIB

    def copied(self, moved: float) -> float:
        """Seconds of a pass over memory that reads and writes so many bytes; 0 for none."""
        return max(moved / (0.9 * self.bandwidth), self.launch) if moved else 0.0

    def seconds(self, flops: float, moved: float) -> float:
        """Of a kernel that does ``flops`` and moves ``moved`` bytes: the slower of the two."""
        return max(flops / self.products, moved / (0.9 * self.bandwidth), self.launch)


DEVICES = {
    "h200": Device("h200", int(139.8 * GIB), 690e12, 615e12, 474e12, 4.2e12, host=40e9),
    "h100": Device("h100", int(79.1 * GIB), 640e12, 570e12, 440e12, 2.9e12, host=40e9),
    "a100": Device("a100", int(79.2 * GIB), 250e12, 190e12, 150e12, 1.75e12, host=12e9),
    "a100-40gb": Device("a100-40gb", int(39.4 * GIB), 250e12, 190e12, 150e12, 1.35e12, host=12e9),
}


def describe(name: str) -> Device:
    """The built-in description of ``name``; a card's own long name will do.

    Raises:
        UnknownDevice: there is none; the message lists those there are.
    """
    wanted = name.lower().replace("_", "-")
    if wanted in DEVICES:
        return DEVICES[wanted]
    for known in ("h200", "h100", "a100"):
        if known in wanted.replace("-", " ").split() or known in wanted:
            small = known == "a100" and "40gb" in wanted
            return DEVICES["a100-40gb" if small else known]
    raise UnknownDevice(f"device: unknown {name!r}; known are {', '.join(DEVICES)}")


def at_hand() -> Device:
    """The description of this machine's first GPU with its own memory; an H100's where there is none.

    Raises:
        UnknownDevice: the GPU is not among those that are described.
    """
    if not torch.cuda.is_available():
        return describe("h100")
    properties = torch.cuda.get_device_properties(0)
    return dataclasses.replace(
        describe(properties.name),
        name=properties.name,
        memory=int(properties.total_memory),
        host_memory=int(_PINNED * host_memory()),
    )


def host_memory(limits: Sequence[str] = _LIMITS) -> int:
    """Bytes of this machine's memory, or of the part of it that the process may have."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in limits:
        with contextlib.suppress(OSError, ValueError):  # none, or "max"
            found.append(int(Path(limit).read_text(encoding="ascii")))
    return min(found)
