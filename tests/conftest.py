"""Settings that must stand before torch, triton or transformers are imported by a test."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    # Without a GPU the Triton kernels run in Triton's interpreter; read at triton's import.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator

import pytest
from backends import backend, kernels  # noqa: F401  fixtures, after the choice above


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_code() -> Iterator[None]:
    """Dynamo counts recompilations by code object, and models of many modules share transformers'."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture(autouse=True)
def _give_back_memory() -> Iterator[None]:
    """Several processes share a GPU (tests/gpu.sh): none keeps what its largest test has taken."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()
