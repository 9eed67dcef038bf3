"""Compiled kernels for plans where there is only Triton's interpreter.

What a plan takes for a compiled kernel is an object that gets pointers, as a compiled kernel does, and
makes tensors of them for the interpreter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fusewright.kernels import launcher
from fusewright.runtime import recording


class _Compiled:
    function = packed_metadata = 1

    def __init__(self, owner: Any, tensors: Any, warps: int) -> None:
        self.owner, self.warps = owner, warps
        self.dtypes = [None if t is None else t.dtype for t in tensors]

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        given = rest[6:]
        count = len(self.dtypes)
        tensors = [_at(p, d) for p, d in zip(given[:count], self.dtypes, strict=True)]
        kernel, options = self.owner.kernel, self.owner._options
        kernel[(x, y)](*tensors, *given[count:], num_warps=self.warps, **options)


def _at(pointer: int | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    if pointer is None or dtype is None:
        return None
    memory = (ctypes.c_char * dtype.itemsize).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype)


@contextmanager
def interpreted_launches() -> Iterator[None]:
    """Launches that give something to repeat them by."""
    original = launcher.Launcher._launch

    def launch(self: Any, grid: Any, tensors: Any, numbers: Any, constants: Any, warps: int) -> Any:
        original(self, grid, tensors, numbers, constants, warps)
        return _Compiled(self, tensors, warps)

    stream = launcher.current_stream
    launcher.Launcher._launch = launch  # type: ignore[method-assign]
    launcher.current_stream = recording.current_stream = lambda index: (
        0
    )  # there is no driver to ask
    try:
        yield
    finally:
        launcher.Launcher._launch = original  # type: ignore[method-assign]
        launcher.current_stream = recording.current_stream = stream
