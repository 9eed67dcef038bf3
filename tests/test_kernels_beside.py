"""Kernels compile in other processes, and where these fail in the caller's own threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
_HERE = Path(__file__).resolve()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a server forks")
def test_processes_compile_what_the_caller_then_finds() -> None:
    found = _run("sound")
    assert found["hits"] == [True] * found["kernels"] and found["kernels"] >= 2
    assert found["elsewhere"] == found["kernels"]
    assert found["again"] == 0, "what the cache on disk has goes to nobody"


@pytest.mark.parametrize("how", ["killed", "refusing", "none"])
def test_the_caller_compiles_what_no_process_does(how: str) -> None:
    found = _run(how)
    assert found["hits"] == [False] * found["kernels"] and found["kernels"] >= 2
    assert found["elsewhere"] == 0


def _run(how: str) -> dict[str, Any]:
    """What ``_main`` finds, in a process without the interpreter of the other tests."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    source = str(_HERE.parent.parent / "src")
    environment["PYTHONPATH"] = os.pathsep.join([str(_HERE.parent), source])
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = folder
        done = subprocess.run(
            [sys.executable, str(_HERE), how],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


def _kernels() -> list[Any]:
    """What an RMS norm launches, forward and backward."""
    import torch

    from fusewright.runtime.op import register_all
    from fusewright.runtime.rehearsal import Rehearsal

    register_all()
    rehearsal = Rehearsal()
    x, w = torch.ones(4, 256, requires_grad=True), torch.ones(256, requires_grad=True)

    def norm(x: Any, w: Any) -> Any:
        return torch.ops.fusewright.rms_norm(x, w, 1e-6, 0.0, "output", torch.float32)

    rehearsal.run(norm, [rehearsal.stand_in(x), rehearsal.stand_in(w)])
    assert rehearsal.failures == []
    return rehearsal.kernels


def _main(how: str) -> None:
    import launches
    import torch
    from triton import knobs
    from triton.runtime import driver

    from fusewright.kernels import beside, early

    driver.set_active(launches._Driver("sm_90"))
    early._cores = lambda: 1 if how == "none" else 2  # type: ignore[assignment]
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    if how == "refusing":
        described = beside.described

        def wrong(compiling: Any) -> Any:
            job = described(compiling)
            return job and job._replace(kernel="missing")

        beside.described = wrong
    kernels = _kernels()
    if how == "killed":
        server = beside.server(1)
        assert server is not None
        server._process.kill()
        beside.server = lambda _: server  # nor is another one started
    early.start(kernels, torch.device("cpu"))
    early.wait()
    first, elsewhere = list(hits), len(beside.spent)
    for kernel in kernels:  # as in another run: nothing in memory, all of it on disk
        kernel.function.device_caches.clear()
    early.start(kernels, torch.device("cpu"))
    early.wait()
    again = len(beside.spent) - elsewhere
    print(
        json.dumps({"kernels": len(first), "hits": first, "elsewhere": elsewhere, "again": again})
    )


if __name__ == "__main__":
    _main(sys.argv[1])
