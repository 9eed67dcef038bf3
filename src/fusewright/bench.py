"""Time a model's training step here, eager against optimised, in turns on the same machine.

Random weights and random tokens: a step's time does not depend on either. One step is a forward and a
backward pass, without an optimizer.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fusewright

_WARMUP = 2
GIB = 2**30


def compare(
    model: nn.Module, inputs: dict[str, torch.Tensor], steps: int = 10, lowering: str = "auto"
) -> dict[str, Any]:
    """Time ``model``, which stays as it is, against an optimised copy of it.

    Args:
        model: in training mode, on the device to time.
        inputs: what it is called with, labels among them.
        steps: timed steps of each, one and the other by turns, after two that are not counted.
        lowering: as for ``fusewright.optimize``.

    Returns:
        "eager" and "optimised": "milliseconds" a step (the median), "tokens_per_second",
        "first_step_seconds", "loss", and "step_gib", the most bytes that a step allocates beyond the
        weights (None where the device does not count); "speedup", "tokens" a step, and "counts" and
        "coverage" of the report.
    """
    optimised = fusewright.optimize(copy.deepcopy(model), lowering=lowering)
    contenders = {"eager": model, "optimised": optimised}
    device = next(model.parameters()).device
    placed = {name: tensor.to(device) for name, tensor in inputs.items()}
    tokens = inputs["input_ids"].numel()
    out: dict[str, Any] = {"tokens": tokens, "device": _name(device)}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for name, contender in contenders.items():
        first, memory, loss = _step(contender, placed, device)
        out[name] = {"first_step_seconds": round(first, 3), "loss": loss, "step_gib": memory}
    for turn in range(_WARMUP + steps):
        for name, contender in contenders.items():
            seconds, memory, _ = _step(contender, placed, device)
            if turn >= _WARMUP:
                times[name].append(seconds)
                out[name]["step_gib"] = memory
    for name, series in times.items():
        median = statistics.median(series)
        out[name] |= {
            "milliseconds": round(1e3 * median, 3),
            "tokens_per_second": round(tokens / median, 1),
        }
    out["speedup"] = round(out["eager"]["milliseconds"] / out["optimised"]["milliseconds"], 3)
    report = fusewright.report(optimised)
    out |= {"counts": report.counts, "coverage": report.coverage}
    return out


def _step(
    model: nn.Module, inputs: dict[str, torch.Tensor], device: torch.device
) -> tuple[float, float | None, float]:
    """Seconds, GiB beyond what was allocated before (None on a CPU) and loss of one step."""
    model.zero_grad(set_to_none=True)
    wait, held = _counters(device)
    wait()
    before = held()
    started = time.perf_counter()
    loss = model(**inputs).loss
    loss.backward()
    wait()
    seconds = time.perf_counter() - started
    memory = None
    if device.type == "cuda":
        memory = round((torch.cuda.max_memory_allocated(device) - before) / GIB, 3)
    model.zero_grad(set_to_none=True)
    return seconds, memory, float(loss.detach())


def _counters(device: torch.device) -> tuple[Callable[[], None], Callable[[], int]]:
    """How to wait for the device, and what it has allocated, from where its peak is counted anew."""
    if device.type != "cuda":
        return (lambda: None), (lambda: 0)

    def held() -> int:
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)

    return (lambda: torch.cuda.synchronize(device)), held


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
