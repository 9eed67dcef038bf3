"""One peer on one workload, in a process of its own; bench_step.py drives it over two pipes.

Each line on standard input is a command, {"do": "turn", "steps": 2}; each answer is one line on
what was standard output, which itself goes to the log with everything that libraries print.
The process imports first and then waits, so that many can import side by side.
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("bench_step")


def _import(peer: str) -> None:
    """What the peer imports in a user's process as well; Unsloth asks to be the first."""
    if peer.startswith("unsloth"):
        importlib.import_module("unsloth")
    for name in ("torch", "torch._dynamo", "torch._inductor.compile_fx", "transformers", "peft"):
        importlib.import_module(name)


class Worker:
    """The state between commands. Every method answers with what goes into the results."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        from step_work import workload

        self.torch, self.spec = torch, spec
        self.cuda = torch.cuda.is_available() and not spec["cpu"]
        self.device = "cuda" if self.cuda else "cpu"
        self.work = workload(spec["work"], spec["tiny"])
        shape = self.work.shape  # workloads of one shape share their saved weights
        name = f"saved-{shape['hidden_size']}-{shape['num_hidden_layers']}"
        self.saved = Path(spec["scratch"]) / name
        self.prepared = 0.0
        self.trainee: Any = None

    def machine(self) -> dict[str, Any]:
        """Device, memory and versions."""
        from importlib import metadata

        names = ("torch", "triton", "transformers", "peft", "liger_kernel", "unsloth",
                 "cut_cross_entropy", "bitsandbytes")  # fmt: skip
        found = {d.metadata["Name"].replace("-", "_") for d in metadata.distributions()}
        out: dict[str, Any] = {"versions": {n: metadata.version(n) for n in names if n in found}}
        if self.cuda:
            properties = self.torch.cuda.get_device_properties(0)
            out |= {"device": properties.name, "memory_gib": properties.total_memory / 2**30}
            out["clock"] = "as found"
        else:
            out |= {"device": "cpu", "memory_gib": None}
            out["threads"] = self.torch.get_num_threads()
        return out

    def build(self) -> dict[str, Any]:
        """Weights, adapters, optimizer; the peer's own preparation is timed with them."""
        from step_models import Trainee

        if self.spec["peer"] == "fp32":
            self.torch.backends.cuda.matmul.allow_tf32 = False
        started = time.perf_counter()
        self.trainee = Trainee(self.work, self.spec["peer"], self.device, self.saved)
        self._wait()
        trained = [p for p in self.trainee.raw.parameters() if p.requires_grad]
        return {
            "build_s": round(time.perf_counter() - started, 2),
            "trained": sum(p.numel() for p in trained),
            "trained_dtypes": sorted({str(p.dtype) for p in trained}),
        }

    def warm(self, steps: int) -> dict[str, Any]:
        """The first steps, each to its end: the first one compiles."""
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            self.trainee.step()
            self._wait()
            seconds.append(round(time.perf_counter() - started, 3))
        out = {"first_step_s": seconds[0], "warm_s": seconds} | self._dynamo()
        if self.cuda:
            out["warm_peak_gib"] = self.torch.cuda.max_memory_allocated() / 2**30
            self.torch.cuda.empty_cache()
        return out | self._coverage() | self._losses()

    def turn(self, steps: int, settle: int, release: bool) -> dict[str, Any]:
        """``settle`` steps that are not counted, ``steps`` that are; ``release`` frees the cache.

        The steps follow one another as in training: the host waits for the device after the last.
        ``ms`` is the device's time by events, or the wall's on a CPU; ``issue_ms`` is what the host
        took to issue the step, waiting for room in the launch queue included.
        """
        cuda = self.torch.cuda
        for _ in range(settle):
            self.trainee.step()
        if not self.cuda:
            milliseconds = [self._timed_on_cpu() for _ in range(steps)]
            return {"ms": milliseconds, "issue_ms": []} | self._losses()
        cuda.reset_peak_memory_stats()
        marks, issued = [cuda.Event(enable_timing=True) for _ in range(steps + 1)], []
        marks[0].record()
        for mark in marks[1:]:
            started = time.perf_counter()
            self.trainee.step()
            mark.record()
            issued.append((time.perf_counter() - started) * 1e3)
        cuda.synchronize()
        milliseconds = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
        out = {"ms": milliseconds, "issue_ms": issued} | self._losses()
        out["peak_gib"] = cuda.max_memory_allocated() / 2**30
        if release:
            cuda.empty_cache()
        return out

    def _timed_on_cpu(self) -> float:
        started = time.perf_counter()
        self.trainee.step()
        return (time.perf_counter() - started) * 1e3

    def memory(self) -> dict[str, Any]:
        """On a CPU: the peak of one step above what rests, by the profiler's record."""
        from memory import step_peak

        batch = {"input_ids": self.trainee.ids, "labels": self.trainee.ids}
        return {"step_peak_mib": step_peak(self.trainee.model, batch) / 2**20}

    def profile(self) -> dict[str, Any]:
        """Kernels of one step."""
        from step_profile import profile_step

        out = profile_step(self.trainee.step)
        self.torch.cuda.empty_cache()
        return {"profile": out}

    def gradients(self) -> dict[str, Any]:
        """Gradients of the second pass (the first compiles), against the float32 model's.

        The relative error is the norm of the difference over the norm, averaged over parameters.
        """
        torch, path = self.torch, Path(self.spec["scratch"]) / "gradients.pt"
        for _ in range(2):
            self.trainee.raw.zero_grad(set_to_none=True)
            loss = self.trainee.forward_backward()
        own = self.trainee.gradients()
        out = {"loss": float(loss)} | self._dynamo() | self._coverage()
        if self.spec["peer"] == "fp32":
            torch.save(own, path)
            return out
        true = torch.load(path)
        if sorted(true) != sorted(own):
            raise RuntimeError(f"gradients of {len(own)} parameters, not of the {len(true)}")
        errors = {n: float((own[n] - g).norm() / g.norm()) for n, g in true.items()}
        for which in ("A", "B"):
            each = [e for n, e in errors.items() if f"lora_{which}" in n]
            out[f"error_{which}"] = sum(each) / len(each)
        out |= {"error_mean": sum(errors.values()) / len(errors), "error_max": max(errors.values())}
        return out

    def save(self) -> dict[str, Any]:
        """The weights as files, for a peer that loads them."""
        from step_models import save

        started = time.perf_counter()
        if not (self.saved / "config.json").exists():
            save(self.work, self.device, self.saved)
        return {"save_s": round(time.perf_counter() - started, 1)}

    def floor(self) -> dict[str, Any]:
        """GEMM, attention and copy rates of this workload's shapes."""
        from step_floor import measure

        return measure(self.work)

    def _wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def _losses(self) -> dict[str, Any]:
        losses = [float(loss) for loss in self.trainee.losses]
        out: dict[str, Any] = {"losses": losses}
        if not all(map(math.isfinite, losses)):
            out["warning"] = "a loss is not finite"
        return out

    def _dynamo(self) -> dict[str, Any]:
        counters = self.torch._dynamo.utils.counters
        breaks = counters["graph_break"]
        return {
            "graphs": counters["stats"].get("unique_graphs", 0),
            "graph_breaks": sum(breaks.values()),
            "graph_break_reasons": [reason[:150] for reason in list(breaks)[:4]],
        }

    def _coverage(self) -> dict[str, Any]:
        if not self.spec["peer"].startswith("ours"):
            return {}
        import fusewright

        return {"coverage": json.loads(fusewright.report(self.trainee.raw).to_json())}


def main() -> None:
    """Import, then answer commands until standard input ends."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    worker = None
    for line in _commands():
        command = json.loads(line)
        action = command.pop("do")
        try:
            if action == "import":
                _import(spec["peer"])
                worker = Worker(spec)
                reply = {"import_s": round(time.perf_counter() - started, 1)}
            else:
                reply = getattr(worker, action)(**command)
        except Exception as error:
            # Whatever a peer does wrong is its line in the table, not the end of the benchmark.
            log.exception("%s %s: %s", spec["work"], spec["peer"], action)
            text = f"{type(error).__name__}: {str(error)[:400]}"
            reply = {"error": text, "traceback": traceback.format_exc()[-3000:]}
        answers.write(json.dumps(reply) + "\n")
    os._exit(0)  # compile workers and libraries' threads are not waited for


def _commands() -> Iterator[str]:
    """To import is the first command and needs no asking."""
    yield json.dumps({"do": "import"})
    yield from sys.stdin


if __name__ == "__main__":
    main()
