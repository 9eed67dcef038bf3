"""What a benchmark of single calls shares: its rows of results, random inputs, peers, the clock."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from place import DEVICE, ON_GPU

BF16 = torch.bfloat16
PLAIN = (0.0, 0.0, 1.0, 0.0)  # label smoothing, softcap, scale, z-loss
FORM = (-100, "mean", *PLAIN)
COLUMNS = (
    "op", "shape", "pass", "ms", "copy", "gemm", "eager ms", "compile ms", "liger ms", "peak MiB",
    "error", "eager error",
)  # fmt: skip
ROWS: list[dict[str, Any]] = []
DEADLINE = time.monotonic() + 125


def late() -> bool:
    """Whether the peers have to be left out so that the run ends in time."""
    return time.monotonic() > DEADLINE


def liger() -> Any:
    """Liger's functional interface, or None."""
    if not ON_GPU:
        return None
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    return functional


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers on the GPU."""
    return torch.randn(shape, device=DEVICE, dtype=dtype) * scale


def record(op: str, shape: tuple[int, ...], direction: str, ms: float, **more: Any) -> None:
    """Keep a measurement and show that it was made."""
    row = {"op": op, "shape": "x".join(map(str, shape)), "pass": direction, "ms": ms, **more}
    ROWS.append(row)
    print(json.dumps(row), flush=True)
