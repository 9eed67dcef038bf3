"""Where one training step's GPU time goes: kernels by name, sorted into classes, and the idle rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

CLASSES = ("gemm", "attention", "pointwise", "loss", "copy", "dequantise", "optimizer")
TOP = 40
# Looked for in this order in a kernel's name in small letters. A class with nothing to find is
# everything else: element by element, norms, rotary embeddings, reductions.
_WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("copy", ("memcpy", "memset", "direct_copy_kernel", "catarraybatchedcopy", "copy_device")),
    ("attention", ("flash", "fmha", "cudnn_generated", "sdpa", "attention", "attn")),
    (
        "loss",
        ("cross_entropy", "softmax", "nll_loss", "cce_", "indexed_neg_dot", "indexed_dot", "_fl_",
         "loss_and_gradient", "scale_to"),
    ),
    ("dequantise", ("dequant", "quantize", "4bit", "nf4")),
    (
        "gemm",
        ("gemm", "cutlass", "nvjet", "cublas", "xmma", "gemv", "splitk", "split_k", "dot_kernel",
         "thin", "skinny"),
    ),
    ("optimizer", ("adam", "multi_tensor", "foreach")),
)  # fmt: skip
# Ranges that the profiler mirrors on the GPU's timeline: no kernels.
_RANGES = ("##", "ProfilerStep", "Optimizer.", "Torch-Compiled", "Lock", "aten::", "autograd::")

_MARK, _IN_A_ROW = "spin_kernel", 4  # torch.cuda._sleep's, between two steps
_LEAD = 700_000_000  # cycles, some 0.4 s

Event = tuple[int, int, str]  # start in ns, duration in ns, name


def kind_of(name: str) -> str:
    """The class of a kernel, by its name."""
    small = name.lower()
    if small.startswith("triton_") and not small.startswith("triton_tem"):
        # Inductor names a kernel by what it fuses: a copy or a product among it does not make it one.
        return "loss" if "softmax" in small or "nll" in small else "pointwise"
    for kind, words in _WORDS:
        if any(word in small for word in words):
            return kind
    return "pointwise"


def busy(events: Sequence[Event]) -> int:
    """Nanoseconds in which at least one of the events runs."""
    total = end = 0
    for start, duration, _ in sorted(events):
        begin = max(start, end)
        total += max(0, start + duration - begin)
        end = max(end, start + duration)
    return total


def gaps(events: Sequence[Event]) -> list[list[Any]]:
    """Where nothing runs for over 2 us: [kernel before, kernel after, milliseconds, times]."""
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    end, before = None, ""
    for start, duration, name in sorted(events):
        if end is not None and start - end > 2000:
            found[before[:60], name[:60]][0] += start - end
            found[before[:60], name[:60]][1] += 1
        if end is None or start + duration > end:
            end, before = start + duration, name
    ranked = sorted(found.items(), key=lambda item: -item[1][0])[: TOP // 2]
    return [[a, b, round(ns / 1e6, 3), count] for (a, b), (ns, count) in ranked]


def summary(events: Sequence[Event], began: int) -> dict[str, Any]:
    """Milliseconds by class, busy time, launches, and the kernels that take the most time.

    ``began`` is the nanosecond from which on the step could run: what nothing runs in is ``idle``.
    ``top`` lists [name, class, milliseconds, launches, microseconds a launch].
    """
    kinds: dict[str, int] = defaultdict(int)
    names: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for _, duration, name in events:
        kinds[kind_of(name)] += duration
        names[name][0] += duration
        names[name][1] += 1
    top = sorted(names.items(), key=lambda item: -item[1][0])[:TOP]
    whole = sum(kinds.values()) or 1
    span = max(s + d for s, d, _ in events) - began
    return {
        "busy_ms": round(busy(events) / 1e6, 3),
        "span_ms": round(span / 1e6, 3),
        "idle": round(1 - busy(events) / span, 4),
        "gaps": gaps(events),
        "kernels": len(events),
        "launches": sum("memcpy" not in n.lower() and "memset" not in n.lower()
                        for _, _, n in events),
        "class_ms": {k: round(kinds[k] / 1e6, 3) for k in CLASSES},
        "share": {k: round(kinds[k] / whole, 4) for k in CLASSES},
        "top": [
            [name[:160], kind_of(name), round(ns / 1e6, 3), count, round(ns / count / 1e3, 1)]
            for name, (ns, count) in top
        ],
    }  # fmt: skip


def last_step(events: Sequence[Event]) -> tuple[list[Event], int]:
    """The events of the last step, and the nanosecond at which the step before it had ended."""
    marks = sorted(start + duration for start, duration, name in events if _MARK in name)
    began = marks[-2] if len(marks) > 1 else min(events)[0]
    return [e for e in events if e[0] >= began and _MARK not in e[2]], began


def profile_step(step: Callable[[], Any]) -> dict[str, Any]:
    """Run steps in a row under the profiler and tell of the last one, as it is in training.

    One step by itself would begin with a GPU that waits for the host, at other clocks. In training the
    host is ahead by as much as the launch queue holds (``host_lead``); recording takes it more time for
    every launch, so it gets its lead before the first. The GPU's side alone is recorded, unless that
    records nothing.
    """
    for activities in ([ProfilerActivity.CUDA], [ProfilerActivity.CUDA, ProfilerActivity.CPU]):
        step()
        torch.cuda.synchronize()
        with profile(activities=activities) as record:
            torch.cuda._sleep(_LEAD)
            for _ in range(_IN_A_ROW):
                step()
                torch.cuda._sleep(1)
            torch.cuda.synchronize()
        events = [
            (e.start_ns(), e.duration_ns(), e.name())
            for e in record.profiler.kineto_results.events()
            if e.device_type() == torch.autograd.DeviceType.CUDA
            and e.duration_ns() > 0
            and not e.name().startswith(_RANGES)
        ]
        if events:
            return summary(*last_step(events))
    raise RuntimeError("the profiler recorded no kernel")
