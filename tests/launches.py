"""Compile what host functions would launch, for GPUs that are not here, and read the resources.

A test module offers ``launches()``, which yields (label, function) pairs; each function calls host
functions on CPU tensors. They run in a process of their own, without Triton's interpreter, under a
driver that names the target and launches nothing::

    def launches() -> Iterator[tuple[str, Callable[[], object]]]:
        yield "wide", lambda: rms_norm.triton_fwd(torch.empty(4, 16384), ...)

    @pytest.mark.parametrize("target", TARGETS)
    def test_compiles_without_spills(target: str) -> None:
        assert_no_spills(__name__, target)

What is compiled is what would run: the host functions' choices are tested along.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Bytes of shared memory that one program may have.
TARGETS = {"sm_75": 65536, "sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target: bytes (or registers, on AMD) spilled, registers, bytes.

    ``chained`` counts the float32 products that go on with a sum instead of starting one of their own.
    """

    target: str
    label: str
    kernel: str
    spills: int
    registers: int
    shared: int
    warps: int
    chained: int


def assert_no_spills(module: str, target: str) -> None:
    """Every launch of the module's ``launches()`` compiles for ``target``, fits and spills nothing."""
    compiled = [c for c in compile_launches(module) if c.target == target]
    assert compiled, f"{module}.launches() launched nothing"
    spilling = [c for c in compiled if c.spills]
    assert not spilling, f"spills: {spilling}"
    threads = 1024 // (64 if target.startswith("gfx") else 32)
    misfits = [c for c in compiled if c.shared > TARGETS[target] or c.warps > threads]
    assert not misfits, f"does not fit: {misfits}"


@functools.cache
def compile_launches(module: str) -> tuple[Compiled, ...]:
    """What the launches of ``module`` compile to on every target; one process for all."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(_HERE), str(_HERE.parent / "src")])
    command = [sys.executable, __file__, module.rpartition(".")[2]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling {module} failed:\n{done.stderr[-4000:]}")
    return tuple(Compiled(**c) for c in json.loads(done.stdout.splitlines()[-1]))


class _Driver:
    """A driver of a GPU that is not here: it names the target and can launch nothing."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        cuda = target.startswith("sm_")
        self._gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
        self._device = list(TARGETS).index(target)  # kernels are cached by device

    def get_current_target(self) -> Any:
        return self._gpu

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling() -> Iterator[list[Any]]:
    """Compile in place of launching; the list receives (kernel's name, compiled)."""
    from triton.runtime.jit import JITFunction

    made: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        made.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        yield made
    finally:
        JITFunction.run = run


def _resources(kernel: Any) -> tuple[int, int]:
    """(spilled, registers) of a compiled kernel."""
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        counts = {n: int(c) for n, c in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
        spills = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
        return spills, counts["vgpr_count"]
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[2]), int(found[1])


def _chained(kernel: Any) -> int:
    """Products of float32 operands whose third operand is not the constant zero."""
    dots = re.findall(r"tt\.dot %\S+, %\S+, %(\S+).*x(f\d+)> \* tensor<", kernel.asm["ttir"])
    return sum(dtype == "f32" and not total.startswith("cst") for total, dtype in dots)


def _main(module: str) -> None:
    from triton.runtime import driver

    from fusewright.kernels import device

    results = []
    with _compiling() as made:
        for target, shared in TARGETS.items():
            driver.set_active(_Driver(target))
            limits = device.Limits(132, shared, 64 if target.startswith("gfx") else 32)
            device.limits = functools.partial(lambda found, _: found, limits)
            for label, launch in importlib.import_module(module).launches():
                first = len(made)
                launch()
                for name, kernel in made[first:]:
                    meta = kernel.metadata
                    numbers = (*_resources(kernel), meta.shared, meta.num_warps, _chained(kernel))
                    results.append(asdict(Compiled(target, label, name, *numbers)))
    print(json.dumps(results))


if __name__ == "__main__":
    _main(sys.argv[1])
