"""What a device can do: rates that turn FLOPs and bytes into seconds, and how much memory there is.

The built-in rates are what a training step's kernels sustain, not what a data sheet promises: H200 as
measured (GEMMs of 690 TFLOP/s in bf16 over minutes, copies at 4.2 TB/s, cuDNN's attention); the others
scaled from it by their data sheets. A GPU that is not among them is measured once (``rates``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fusewright.kernels import device as hardware
from fusewright.kernels.device import Limits

GIB = 2**30
HOST_SHARE = 0.75  # of the host's memory: the rest is the program's, its data's and the system's
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

_HOPPER = Limits(132, 232448, 32)


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
        limits: what kernels are cut by; None where the model is on a CPU and none are launched.
        workspace: bytes that a cuBLAS handle takes for itself; see ``workspaces``.
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
    limits: Limits | None = _HOPPER
    workspace: int = 4096 * 8 * 1024

    def copied(self, moved: float) -> float:
        """Seconds of a pass over memory that reads and writes so many bytes; 0 for none."""
        return max(moved / (0.9 * self.bandwidth), self.launch) if moved else 0.0

    def seconds(self, flops: float, moved: float) -> float:
        """Of a kernel that does ``flops`` and moves ``moved`` bytes: the slower of the two."""
        return max(flops / self.products, moved / (0.9 * self.bandwidth), self.launch)


_A100 = Device(
    "a100", int(79.2 * GIB), 250e12, 190e12, 150e12, 1.75e12, host=12e9,
    limits=Limits(108, 166912, 32), workspace=2 * 4096 * 1024 + 8 * 16 * 1024,
)  # fmt: skip
DEVICES = {
    "h200": Device("h200", int(139.8 * GIB), 690e12, 615e12, 474e12, 4.2e12, host=40e9),
    "h100": Device("h100", int(79.1 * GIB), 640e12, 570e12, 440e12, 2.9e12, host=40e9),
    "a100": _A100,
    "a100-40gb": dataclasses.replace(
        _A100, name="a100-40gb", memory=int(39.4 * GIB), bandwidth=1.35e12
    ),
}


def on_cpu(device: Device) -> Device:
    """The device for a model in a CPU's memory: nothing is moved, no kernel of a GPU's is launched."""
    return dataclasses.replace(device, host=0.0, limits=None, workspace=0)


def workspaces(device: Device) -> int:
    """Bytes of the matrix products' library that come from the caching allocator and stay.

    PyTorch gives a cuBLAS handle a workspace for each stream at its first product (ATen's
    ``getChosenWorkspaceSize``): 32 MiB from Hopper on and 8.125 before, or the pairs of KiB and how
    many in CUBLAS_WORKSPACE_CONFIG. The thread of the forward and that of the backward have a handle
    each. cuBLASLt's products use the same memory (TORCH_CUBLASLT_UNIFIED_WORKSPACE, on by default).
    """
    if device.limits is None:
        return 0
    given = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    pairs = re.findall(r":(\d+):(\d+)", given)
    known = pairs and "".join(f":{size}:{count}" for size, count in pairs) == given
    own = sum(1024 * int(size) * int(count) for size, count in pairs) if known else device.workspace
    return 2 * own


def describe(name: str) -> Device:
    """The built-in description of ``name``, for which a card's own long name will do; or a file's.

    Raises:
        UnknownDevice: there is none; the message lists those there are.
    """
    if name.endswith(".json"):
        from fusewright.compiler.planning import rates

        try:
            return rates.read(Path(name))
        except OSError as error:
            raise UnknownDevice(f"device: {name}: {error.strerror}") from error
    wanted = name.lower().replace("_", "-")
    if wanted in DEVICES:
        return DEVICES[wanted]
    for known in ("h200", "h100", "a100"):
        if known in wanted.replace("-", " ").split() or known in wanted:
            small = known == "a100" and "40gb" in wanted
            return DEVICES["a100-40gb" if small else known]
    raise UnknownDevice(
        f"device: unknown {name!r}; known are {', '.join(DEVICES)}, or a description's NAME.json"
    )


def at_hand() -> Device:
    """The description of this machine's first GPU with its own memory; an H100's where there is none.

    Raises:
        UnknownDevice: the GPU is not described, and cannot be measured.
    """
    if not torch.cuda.is_available():
        return describe("h100")
    properties = torch.cuda.get_device_properties(0)
    try:
        described = describe(properties.name)
    except UnknownDevice:
        from fusewright.compiler.planning import rates

        return rates.of(0)
    return dataclasses.replace(
        described,
        name=properties.name,
        memory=int(properties.total_memory),
        host_memory=int(HOST_SHARE * host_memory()),
        limits=hardware.limits(torch.device("cuda", 0)),
    )


def host_memory(limits: Sequence[str] = _LIMITS) -> int:
    """Bytes of this machine's memory, or of the part of it that the process may have."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in limits:
        with contextlib.suppress(OSError, ValueError):  # none, or "max"
            found.append(int(Path(limit).read_text(encoding="ascii")))
    return min(found)
