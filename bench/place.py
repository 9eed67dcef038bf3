"""Where a kernels' benchmark runs: on the GPU, or on the CPU for a dry run of every case.

To be imported before Triton is, whose interpreter stands for the GPU in a dry run.
"""

from __future__ import annotations

import os

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def name() -> str:
    """The device's name; without a GPU a remark that no figure means anything."""
    return torch.cuda.get_device_name() if ON_GPU else "CPU, a dry run without meaning"
