"""Without a GPU the Triton kernels run in Triton's interpreter, which is chosen before its import."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from backends import backend, kernels  # noqa: F401  fixtures, after the choice above
