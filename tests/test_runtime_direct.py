"""The short way to a kernel's launch gives Triton's last function what Triton's launcher gives it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from fusewright.runtime.direct import Direct, direct

FIXED = (1234, (4, 1, 0), None, None, None)
ARGUMENTS = (4096, None, 8192, 77, 1e-6, "half")


class Flat:
    """Constants beside the grid, then every argument by itself."""

    def __init__(self, scratch: int = 0, twice: bool = False) -> None:
        self.scratch, self.twice, self.calls = scratch, twice, []
        self.launch = lambda *given: self.calls.append(given)

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        memory = x * y * z * self.scratch if self.scratch else None
        for _ in range(2 if self.twice else 1):
            self.launch(x, y, z, stream, function, False, True, memory, *rest)


class Reordered(Flat):
    """A constant before the grid."""

    def __call__(self, *given: Any) -> None:
        self.launch(False, *given[:5], None, *given[5:])


class Altered(Flat):
    """Arguments are not handed on as they are."""

    def __call__(self, *given: Any) -> None:
        self.launch(*given[:9], *[repr(v) for v in given[9:]])


def through(way: Direct, grid: tuple[int, int, int], stream: int) -> None:
    tail = (ARGUMENTS,) if way.packed else ARGUMENTS
    way.launch(*way.before, *grid, stream, *way.after, *tail)


@pytest.mark.parametrize("make", [Flat, Reordered])
def test_the_last_function_gets_the_same(make: Any) -> None:
    run = make()
    way = direct(run, FIXED, len(ARGUMENTS))
    assert way.launch is run.launch and not run.calls
    run(7, 2, 1, 55, *FIXED, *ARGUMENTS)
    through(way, (7, 2, 1), 55)
    assert run.calls[0] == run.calls[1]


@pytest.mark.parametrize("run", [Flat(scratch=16), Flat(twice=True), Altered(), print])
def test_other_launchers_are_called_themselves(run: Any) -> None:
    assert direct(run, FIXED, len(ARGUMENTS)) == Direct(run, (), FIXED, False)


@pytest.mark.parametrize("backend", ["nvidia.driver.CudaLauncher", "amd.driver.HIPLauncher"])
@pytest.mark.parametrize("scratch", [0, 128])
def test_tritons_own(backend: str, scratch: int) -> None:
    """The installed launchers, made without a GPU; with scratch memory they are called themselves."""
    pytest.importorskip("triton")
    module, _, name = backend.rpartition(".")
    run: Any = object.__new__(getattr(importlib.import_module(f"triton.backends.{module}"), name))
    for field in ("global_scratch_size", "profile_scratch_size"):
        setattr(run, field, scratch)
    for field in ("global_scratch_align", "profile_scratch_align", "num_ctas", "warp_size"):
        setattr(run, field, 1)
    run.launch_cooperative_grid = run.launch_pdl = False
    run.arg_annotations, run.kernel_signature = ("annotations",), b"signature"
    calls: list[Any] = []
    run.launch = lambda *given: calls.append(given)
    way = direct(run, FIXED, len(ARGUMENTS))
    assert not calls
    if scratch:
        assert way.launch is run
        return
    assert way.launch is run.launch
    run(7, 2, 1, 55, *FIXED, *ARGUMENTS)
    through(way, (7, 2, 1), 55)
    assert calls[0] == calls[1]
