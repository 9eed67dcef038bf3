"""Compile Triton kernels for GPUs that are not here, and count what they spill.

A test lists its kernels as ``Case`` values and calls ``assert_compiles``. That runs this file as a
program in a process of its own, because the interpreter of the other tests must not be on there.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = {
    "sm_75": ("cuda", 75, 32),
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


class Case(NamedTuple):
    """One specialisation of a kernel.

    Attributes:
        kernel: "module:function", e.g. "fusewright.kernels.glu_kernels:glu_forward".
        types: Triton's type of every argument that is not a constexpr; ":16" marks a pointer or an
            integer known to be divisible by 16.
        constants: the constexpr arguments.
        warps: the number of warps.
        options: other options of the compiler.
    """

    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    options: tuple[tuple[str, bool], ...] = ()


def assert_compiles(cases: list[Case], targets: tuple[str, ...] = tuple(TARGETS)) -> None:
    """Every case compiles for every target, and no register is spilled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    here = Path(__file__).resolve()
    source = str(here.parent.parent / "src")
    environment["PYTHONPATH"] = os.pathsep.join(
        [source, *filter(None, [environment.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, str(here)],
        input=json.dumps([[list(c) for c in cases], list(targets)]),
        capture_output=True,
        text=True,
        env=environment,
        cwd=here.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    spills = {k: v for k, v in json.loads(done.stdout.splitlines()[-1]).items() if v}
    assert not spills, f"bytes spilled: {spills}"


def spilled(case: Case, target: str) -> int:
    """Compile one case for one target; the bytes that it spills to memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    divisible = {}
    signature = {k: "constexpr" for k in case.constants}
    for at, argument in enumerate(kernel.arg_names):
        if argument in case.types:
            kind, _, mark = case.types[argument].partition(":")
            signature[argument] = kind
            if mark:
                divisible[(at,)] = [["tt.divisibility", 16]]
    signature = {k: signature[k] for k in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=case.constants, attrs=divisible)
    options = {"num_warps": case.warps} | dict(case.options)
    built = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    if ("debug", True) in case.options:
        assert "assertfail" in built.asm.get("ptx", "assertfail"), f"{case.kernel} asserts nothing"
    if target.startswith("gfx"):
        counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", built.asm["amdgcn"])
        return 4 * sum(map(int, counts))
    return _ptxas_spills(built.asm["ptx"])


def _ptxas_spills(ptx: str) -> int:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newest = tools / "ptxas-blackwell"  # it knows the older architectures too
    tool = newest if newest.exists() else tools / "ptxas"
    architecture = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert architecture is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run(
            [str(tool), "-v", f"-arch={architecture.group(1)}", file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        )
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def main() -> None:
    """Read cases and targets from the standard input; write the spills of each as one line."""
    cases, targets = json.load(sys.stdin)
    result = {}
    for case in (Case(*c) for c in cases):
        for target in targets:
            result[f"{case.kernel} {case.constants} {target}"] = spilled(case, target)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
