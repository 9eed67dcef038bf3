"""How far the host is ahead of the GPU at the turns of a training step, and what makes it wait.

    PYTHONPATH=src python bench/host_lead.py W2n W1 [--steps 6] [--options lowering=fx] [--out PATH]

A step is marked where its forward, backward, optimizer and clearing of gradients end, on the host by
its clock and on the GPU by events; the lead is the GPU's moment less the host's. In a row of steps that
nothing holds up it grows by what the GPU takes longer than the host, until the launch queue is full.
Where it falls to nothing at one mark of every step, something before that mark waited for the GPU:
the last step runs under PyTorch's synchronisation warnings, and the names of runtime calls that took
over 0.2 ms of the host are listed from one profiled step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

MARKS = ("begin", "forward", "backward", "optimizer", "cleared")


def marked(trainee: Any, steps: int) -> list[dict[str, float]]:
    """The lead in milliseconds at every mark of every step, and what the host took since the last."""
    import torch

    rows: list[list[tuple[float, torch.cuda.Event]]] = []
    torch.cuda.synchronize()
    zero = torch.cuda.Event(enable_timing=True)
    zero.record()
    zero.synchronize()
    started = time.perf_counter()

    def mark() -> tuple[float, torch.cuda.Event]:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return (time.perf_counter() - started) * 1e3, event

    for _ in range(steps):
        at = [mark()]
        loss = trainee.model(input_ids=trainee.ids, labels=trainee.ids).loss
        at.append(mark())
        loss.backward()
        at.append(mark())
        trainee.optimizer.step()
        at.append(mark())
        trainee.optimizer.zero_grad(set_to_none=True)
        at.append(mark())
        rows.append(at)
    torch.cuda.synchronize()
    out = []
    for at in rows:
        row: dict[str, float] = {}
        before = at[0][0]
        for name, (host, event) in zip(MARKS, at, strict=True):
            row[f"{name} lead"] = round(zero.elapsed_time(event) - host, 2)
            row[f"{name} host"] = round(host - before, 2)
            before = host
        out.append(row)
    return out


def waits(trainee: Any) -> list[str]:
    """What PyTorch calls a synchronising operation in one step."""
    import torch

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainee.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}: {str(w.message)[:120]}" for w in caught]


def calls(trainee: Any) -> list[list[Any]]:
    """Runtime calls of one step in a row of three that held the host up, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        for _ in range(3):
            trainee.step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in record.profiler.kineto_results.events():
        name = event.name()
        if event.device_type() == torch.autograd.DeviceType.CPU and name.startswith("cu"):
            entry = found.setdefault(name, [0.0, 0.0, 0.0, 0.0])
            milliseconds = event.duration_ns() / 1e6
            entry[0] += milliseconds
            entry[1] += 1
            entry[2] += milliseconds > 0.2
            entry[3] = max(entry[3], milliseconds)
    ranked = sorted(found.items(), key=lambda item: -item[1][0])
    return [[name, *(round(v, 2) for v in values)] for name, values in ranked]


def measure(name: str, options: str, steps: int) -> dict[str, Any]:
    """One workload, built and warm."""
    import torch
    from step_models import Trainee
    from step_work import workload

    work = workload(name)
    trainee = Trainee(work, f"ours:{options}" if options else "ours", "cuda", Path("."))
    began = time.perf_counter()
    trainee.step()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    for _ in range(3):
        trainee.step()
    return {
        "work": name, "options": options, "device": torch.cuda.get_device_name(),
        "first_step_s": round(first, 2), "steps": marked(trainee, steps),
        "synchronising": waits(trainee), "calls": calls(trainee),
    }  # fmt: skip


def main(typed: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("works", nargs="+")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--options", default="lowering=fx")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(typed)
    rows = []
    for name in given.works:
        row = measure(name, given.options, given.steps)
        rows.append(row)
        print(f"{name}: first step {row['first_step_s']} s; ms of lead (of the host's since)")
        for step in row["steps"]:
            print("  " + "  ".join(f"{m} {step[f'{m} lead']:7.1f} ({step[f'{m} host']:5.1f})"
                                   for m in MARKS))  # fmt: skip
        print("  waits: " + "; ".join(row["synchronising"] or ["none"]))
        for call in row["calls"][:8]:
            print(f"  {call[0]:<32} {call[1]:9.2f} ms  {call[2]:6.0f} calls  "
                  f"{call[3]:4.0f} over 0.2 ms, longest {call[4]:.2f}")  # fmt: skip
    if given.out:
        given.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
