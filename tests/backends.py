"""The same ops on every implementation: reference, Triton interpreted on the CPU, Triton on a GPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import pytest
import torch

from fusewright.kernels import catalogue
from fusewright.runtime import op

INTERPRETED = "fusewright_interpreted"


class Backend(NamedTuple):
    """A namespace of ops and the device on which they are tested.

    The interpreter cuts float32 off to bfloat16 where hardware rounds, so that an error against
    float64 says nothing there about bfloat16 results.
    """

    name: str
    ops: Any
    device: str

    @property
    def rounds_bfloat16(self) -> bool:
        return self.name != "interpreted"


@functools.cache
def _interpreted_library() -> torch.library.Library:
    """Every op that has a kernel, registered again with the kernel in the reference's place."""
    library = torch.library.Library(INTERPRETED, "DEF")
    original = op._NAMESPACE
    op._NAMESPACE = INTERPRETED
    try:
        for spec in catalogue():
            if spec.triton is not None:
                op.register(dataclasses.replace(spec, reference=spec.triton, triton=None), library)
    finally:
        op._NAMESPACE = original
    return library


def _backend(name: str) -> Backend:
    op.register_all()
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if name != "interpreted":
        return Backend(name, torch.ops.fusewright, "cuda" if name == "cuda" else "cpu")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled in this process")
    _interpreted_library()
    return Backend(name, getattr(torch.ops, INTERPRETED), "cpu")


@pytest.fixture(params=["reference", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """One implementation after the other."""
    return _backend(request.param)


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Backend:
    """The implementations that are kernels."""
    return _backend(request.param)
