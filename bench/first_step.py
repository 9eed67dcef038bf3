"""Where the seconds to the first training step go, and which kernels were compiled late.

    python bench/first_step.py [W1] [--lowering fx] [--json PATH]

Triton's cache is a new folder, and so is Inductor's: what is timed is a first step on a new machine.
Times of stages are the compiler's own (``GraphRecord.seconds``); those of kernels are Triton's, added
up over processes and threads, so that they may be more than the step took. A kernel is late when the
thread that launches it compiles it: nobody foresaw it. ``--late`` compiles nothing ahead, and
``--threads`` does it in threads of this process instead of others. ``--for-gpu 90 --tiny`` shows on a
CPU what compiling ahead costs the step: the kernels that a GPU of that capability would launch are
compiled beside a step on the CPU, which launches none. ``--memory-budget 0.3`` plans for a budget that
lies so far between the least that holds the step and the most that it makes use of.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

STAGES = ("normalize", "match", "foresee", "lower", "verify")


class Compiled:
    """What Triton compiles, by the thread that does it."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, bool, float]] = []
        self.lock = threading.Lock()

    def __call__(self, *, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        name = getattr(getattr(src, "fn", None), "__name__", "?")
        here = threading.current_thread() is threading.main_thread()
        late = here and getattr(getattr(src, "fn", None), "module", "").startswith("fusewright")
        if not cache_hit:
            with self.lock:
                self.rows.append((name, late, times.total / 1e6))

    def summary(self) -> dict[str, Any]:
        """Counts, seconds and names."""
        from fusewright.kernels import beside

        elsewhere = [(name, False, seconds) for name, seconds in beside.spent]
        rows = [*self.rows, *elsewhere]
        return {
            "compiles": len(rows),
            "in_processes": len(elsewhere),
            "compile_s": round(sum(s for *_, s in rows), 2),
            "longest_s": round(max((s for *_, s in rows), default=0.0), 2),
            "late": dict(Counter(n for n, late, _ in rows if late)),
            "kernels": dict(Counter(n for n, *_ in rows)),
        }


compiled = Compiled()


def waiting() -> list[float]:
    """Seconds that launches waited for kernels under way; grows while the step runs."""
    from fusewright.kernels import early

    spent: list[float] = []
    wait = early.wait

    def timed() -> None:
        started = time.perf_counter()
        wait()
        spent.append(time.perf_counter() - started)

    early.wait = timed
    return spent


class Elsewhere:
    """A driver of a GPU that is not here: it names the target and can launch nothing."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def foresee_for(capability: int) -> None:
    """Have what runs on the CPU foreseen for a GPU that is not here, weights with room included."""
    import torch
    from triton import knobs
    from triton.runtime import driver

    from fusewright.compiler import foresee, pipeline
    from fusewright.kernels import beside, device, early, lora_products, room, thin

    limits = device.Limits(132, 232448, 32)  # an H100's
    for module in (device, *(m for n, m in sys.modules.items() if n.startswith("fusewright"))):
        if hasattr(module, "limits"):
            module.limits = lambda _: limits
    driver.set_active(Elsewhere(capability))
    room.serves = lambda *_: True

    def foreseeing(rewritten: Any, canonical: Any, inputs: Any, verified: bool, _: Any) -> int:
        if any(isinstance(v, torch.Tensor) and v.is_meta for v in inputs):
            return 0  # a memory plan's, that nothing launches
        reference, lora_products.thin.reference = lora_products.thin.reference, thin.thin
        try:
            found = foresee.rehearse(rewritten, canonical, inputs, verified)
        finally:
            lora_products.thin.reference = reference
        early.start(found.kernels, torch.device("cpu"))
        return len({kernel.key for kernel in found.kernels})

    pipeline.foresee = foreseeing
    knobs.compilation.listener = compiled
    beside.server(early._cores() - 1)  # as optimize does where there is a GPU


def trainee(given: argparse.Namespace, options: str) -> Any:
    """The workload's model, its optimizer and its batch."""
    import torch
    from step_models import Trainee
    from step_work import workload

    work = workload(given.work, given.tiny)
    if given.layers:
        work = replace(work, shape=work.shape | {"num_hidden_layers": given.layers})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    saved = Path(tempfile.mkdtemp()) / "saved"
    return Trainee(work, f"ours:lowering={given.lowering}{options}", device, saved)


def move_from_cpu() -> None:
    """Plan on a CPU as on a GPU: values may be moved to the host's memory."""
    from fusewright.compiler import driver

    driver._where = lambda model, device: dataclasses.replace(device, host=25e9)


def budget(given: argparse.Namespace) -> int:
    """Bytes that lie ``given.memory_budget`` of the way from the least to the most, for a process of
    its own: what it proves and imports is then not known to the step that is timed."""
    import torch

    from fusewright.compiler import driver
    from fusewright.compiler.planning.timeline import needed

    if not torch.cuda.is_available():
        move_from_cpu()
    made = trainee(given, ":memory_budget=90%")
    made.forward_backward()
    memory = driver._required(made.model).memory
    assert memory is not None and memory.plan is not None and memory._planner is not None
    least = memory.plan.table[-1].budget
    most = needed(memory.plan.table[0].peak, memory._planner.footing)
    return int(least + given.memory_budget * max(most - least, 0)) + 1


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """One first step and two after it, in this process."""
    import torch

    from fusewright.kernels import early

    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ["FUSEWRIGHT_VERIFY"] = given.verify
    options = ""
    if given.memory_budget is not None:
        spawned = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawned) as other:
            options = f":memory_budget={other.submit(budget, given).result()} B"
        if device == "cpu":
            move_from_cpu()
    started = time.perf_counter()
    if given.for_gpu:
        foresee_for(given.for_gpu)
    trained = trainee(given, options)
    built = time.perf_counter() - started
    if device == "cuda":
        from triton import knobs

        knobs.compilation.listener = compiled
    finish = early.wait
    spent, steps, cpu = waiting(), [], {}
    for _ in range(3):
        started, clocks = time.perf_counter(), (time.thread_time(), time.process_time())
        trained.step()
        if device == "cuda":
            torch.cuda.synchronize()
        steps.append(round(time.perf_counter() - started, 3))
        if not cpu:
            finish()
            found = time.thread_time() - clocks[0], time.process_time() - clocks[1]
            cpu = dict(zip(("thread", "process"), (round(f, 2) for f in found), strict=True))
    seconds: dict[str, Any] = {"build_s": round(built, 2), "steps_s": steps, "cpu_of_first_s": cpu}
    waited = {"waited_s": round(sum(spent), 2)}
    return seconds | waited | stages(trained.model) | compiled.summary()


def stages(model: Any) -> dict[str, Any]:
    """Seconds by stage, added up over the captured graphs, and what torch says of its own."""
    import torch

    from fusewright.compiler import driver

    session = driver._required(model)
    total: Counter[str] = Counter()
    for record in session.records:
        total.update(record.seconds)
    dynamo = torch._dynamo.utils.compilation_time_metrics
    wanted = ("entire_frame_compile", "compile_fx_inner", "create_aot_dispatcher_function")
    found = {k: round(sum(v), 2) for k, v in dynamo.items() if any(w in k for w in wanted)}
    return {
        "stages_s": {s: round(total[s], 2) for s in STAGES},
        "foreseen": sum(r.foreseen for r in session.records),
        "torch_s": found,
    }


def main() -> None:
    """Print the split."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("work", nargs="?", default="W1")
    parser.add_argument("--lowering", default="inductor", choices=("inductor", "fx"))
    parser.add_argument("--verify", default="first_step", choices=("first_step", "off"))
    parser.add_argument("--tiny", action="store_true", help="shrunk, for a CPU")
    parser.add_argument(
        "--layers", type=int, default=0, help="as many as the workload has, or these"
    )
    parser.add_argument("--memory-budget", type=float, metavar="SHARE", help="0: the least")
    parser.add_argument("--for-gpu", type=int, default=0, metavar="CAPABILITY", help="90: an H100")
    parser.add_argument("--late", action="store_true", help="without compiling ahead, to compare")
    parser.add_argument("--threads", action="store_true", help="ahead, in this process alone")
    parser.add_argument("--json", help="where to write the numbers")
    given = parser.parse_args()
    cache = tempfile.mkdtemp()
    os.environ["TRITON_CACHE_DIR"] = os.path.join(cache, "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(cache, "inductor")
    if given.late:
        from fusewright.kernels import early

        early.start = lambda *_: None
        from fusewright.compiler import foresee

        foresee.start = early.start
    if given.threads:
        from fusewright.kernels import beside

        beside.server = lambda *_: None
    out = measure(given)
    out = {"work": given.work, "lowering": given.lowering, "ahead": not given.late} | out
    print(json.dumps(out, indent=1))
    if given.json:
        Path(given.json).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
