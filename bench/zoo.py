"""Train every language model type of the installed transformers, optimised against eager.

    python bench/zoo.py                          all of them, resuming what an earlier run left
    python bench/zoo.py llama gemma2             these again
    python bench/zoo.py --modes fp32             one mode only (fp32 fp32+lora bf16 bf16+lora)
    python bench/zoo.py --table                  docs/zoo.md and bench/results/zoo.json again

One process a type, forked from one that has the libraries loaded; one JSON line a type and mode in
artifacts/zoo.jsonl. What is measured: bench/zoo_run.py; what is counted: bench/zoo_census.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

LINES = ROOT / "artifacts" / "zoo.jsonl"


def _child(name: str, mode: str, path: Path) -> None:
    """Run one type in this process and write its line; never returns."""
    import torch
    import zoo_run

    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    path.write_text(json.dumps(zoo_run.run(name, [mode]), default=str))
    os._exit(0)


def _load() -> None:
    """Import now what every child needs, so that all of them run the code as it is now."""
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401

    import fusewright.patterns  # noqa: F401
    from fusewright.runtime.op import register_all

    register_all()


def _fork(name: str, mode: str, path: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        _child(name, mode, path)
    finally:  # a child must not go on as its parent
        _, error, _ = sys.exc_info()
        told = {"type": name, "status": "broken", "reason": repr(error)[:300]}
        path.write_text(json.dumps(told))
        os._exit(1)


def sweep(jobs: list[tuple[str, str]], workers: int, limit: float) -> None:
    """Run the jobs, each in a process of its own, and append one line for each."""
    scratch = LINES.parent / "zoo"
    scratch.mkdir(parents=True, exist_ok=True)
    running: dict[int, tuple[str, str, Path, float]] = {}
    waiting, done = list(reversed(jobs)), 0
    commit = _commit()
    while waiting or running:
        while waiting and len(running) < workers:
            name, mode = waiting.pop()
            path = scratch / f"{name}-{mode}.json"
            path.unlink(missing_ok=True)
            running[_fork(name, mode, path)] = (name, mode, path, time.monotonic())
        for pid, (name, mode, path, started) in list(running.items()):
            ended, _ = os.waitpid(pid, os.WNOHANG)
            late = time.monotonic() - started > limit
            if not ended and late:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if ended or late:
                del running[pid]
                done += 1
                row = _row(name, path, late and not ended, limit)
                row |= {"mode": mode, "commit": commit}
                _append(row)
                print(f"{done}/{len(jobs)} {_line(row)}", flush=True)
        time.sleep(0.05)


def _row(name: str, path: Path, late: bool, limit: float) -> dict[str, Any]:
    if late:
        return {"type": name, "status": "broken", "reason": f"not done in {limit:g} s"}
    if not path.exists():
        return {"type": name, "status": "broken", "reason": "the process died"}
    row: dict[str, Any] = json.loads(path.read_text())
    return row


def _line(row: dict[str, Any]) -> str:
    own = row.get("modes", {}).get(row["mode"], {})
    parts = [row["type"], row["mode"], own.get("status", row["status"])]
    parts += [f"{k} {own[k].get('status')}" for k in ("plain", "gc") if k in own]
    parts += [f"{f} {n}/{row['sites'][f]}" for f, n in own.get("covered", {}).items()]
    return " ".join([*parts, own.get("reason", row.get("reason", "")), f"{row.get('seconds', '')}"])


def _append(row: dict[str, Any]) -> None:
    with LINES.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip()


def latest() -> dict[tuple[str, str], dict[str, Any]]:
    """(type, mode) -> its newest line."""
    if not LINES.exists():
        return {}
    rows = [json.loads(line) for line in LINES.read_text().splitlines()]
    return {(row["type"], row["mode"]): row for row in rows}


def recorded() -> dict[tuple[str, str], dict[str, Any]]:
    """The lines behind bench/results/zoo.json: they stand for what was not run here."""
    path = ROOT / "bench" / "results" / "zoo.json"
    types = json.loads(path.read_text())["types"] if path.exists() else {}
    found = {}
    for name, entry in types.items():
        for mode, own in entry["modes"].items():
            row = {"type": name, "class": entry["class"], "mode": mode, "commit": own["commit"]}
            if "missed" in own:  # the type ran; its mode says how that went
                row |= {"status": "ran", "sites": entry["sites"], "modes": {mode: own}}
            else:
                row |= {"status": own["status"], "reason": own.get("reason", "")}
            found[name, mode] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("types", nargs="*", help="model types; all that have no line yet if none")
    parser.add_argument("--modes", nargs="+", default=None)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, default=400.0, help="seconds a type and mode")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    import zoo_table

    if not given.table:
        import zoo_configs
        import zoo_run

        known = latest()
        modes = given.modes or zoo_run.MODES
        names = given.types or list(zoo_configs.names())
        jobs = [(n, m) for m in modes for n in names if given.types or (n, m) not in known]
        _load()
        os.nice(10)
        sweep(jobs, given.workers, given.limit)
    zoo_table.write(recorded() | latest())


if __name__ == "__main__":
    main()
