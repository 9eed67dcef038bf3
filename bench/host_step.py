"""What a training step costs the host, by layer: ``python bench/host_step.py W1 W4``.

The workloads of ``step_work`` with tiny widths and two depths, on a CPU that poses for a GPU: the ops
are registered with their host functions and stubs stand where compiled kernels would be launched (as in
``host_cost``), so all of the step's Python runs and hardly anything is computed. The difference of the
two depths by layers is what one layer costs; the rest is the head, the embedding and the loss. What
the CPU computes (products, attention) is in the figures; ``--profile`` tells it from the host's own.

Columns: milliseconds of a step, microseconds, function calls and launches of one layer, and the eager operation of
``host_cost`` that tells how fast the machine is.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from host_cost import eager

_WIDTHS = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 512,
}


class _Compiled:
    """Stands for a compiled kernel; launching it counts."""

    function, packed_metadata = 1, (4, 1, 0)
    launched = 0

    @staticmethod
    def run(*arguments: Any) -> None:
        _Compiled.launched += 1


class _Kernel:
    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., _Compiled]:
        _Compiled.launched += 1
        return lambda *arguments, **options: _Compiled()


def pose() -> None:
    """Have the ops take the CPU for their GPU, with nothing behind the launches."""
    from fusewright.kernels import launcher, lora_products, room, thin
    from fusewright.runtime import op, recording

    register = op.register
    op.register = lambda spec, library: register(spec, library, "cpu")
    launcher.Launcher.kernel = property(  # type: ignore[assignment]
        lambda self: _Kernel(), lambda self, kernel: None
    )
    torch._assert_async = lambda *arguments: None  # type: ignore[assignment]
    launcher.current_stream = recording.current_stream = lambda index: 0
    room.serves = lambda device, dtype: dtype is not torch.float32
    lora_products._multiply = lambda blocks, terms, wide, copies: thin.thin(
        blocks, terms, wide, copies
    )


def trainee(name: str, layers: int, lowering: str) -> Any:
    """A workload's model with this many layers, optimised."""
    from step_models import Trainee
    from step_work import WORK

    work = WORK[name]
    shape = work.shape | _WIDTHS | {"num_hidden_layers": layers}
    tiny = replace(work, shape=shape, batch=(2, 16))
    saved = Path(tempfile.mkdtemp()) / "saved"
    return Trainee(tiny, f"ours:lowering={lowering}:verify=off", "cpu", saved)


def stepper(made: Any) -> Callable[[], None]:
    """Forward and backward; gradients are dropped as an optimizer's zero_grad does."""
    trained = [p for p in made.raw.parameters() if p.requires_grad]

    def step() -> None:
        made.forward_backward()
        for p in trained:
            p.grad = None

    return step


def timed(steps: list[Callable[[], None]], rounds: int) -> tuple[list[float], list[int], float]:
    """Milliseconds of each step and its launches, and the microseconds of ``host_cost.eager``.

    The best of some rounds; in a round each has its turn, so that a machine which is slow for a while
    is slow for all of them.
    """
    reference = eager()
    for step in steps:
        for _ in range(4):  # captures, plans, guards that are learned
            step()
    best, launches, least = [float("inf")] * len(steps), [0] * len(steps), float("inf")
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for at, step in enumerate(steps):
            before, started = _Compiled.launched, time.process_time()
            step()
            best[at] = min(best[at], time.process_time() - started)
            launches[at] = _Compiled.launched - before
        started = time.process_time()
        for _ in range(200):
            reference()
        least = min(least, (time.process_time() - started) / 200)
    gc.enable()
    return [b * 1e3 for b in best], launches, least * 1e6


def calls(step: Callable[[], None]) -> int:
    """How many functions, Python's and C's, are called in a step: what other processes cannot alter."""
    profile = cProfile.Profile()
    profile.enable()
    step()
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


class _Sampler:
    """Looks every so often at what Python is doing; a timer of the process's own time wakes it."""

    def __init__(self, interval: float = 0.0004) -> None:
        self.interval, self.samples = interval, 0
        self.own: Counter[str] = Counter()  # functions by the samples that found them running
        self.whole: Counter[str] = Counter()  # and those that found them on the stack

    def __call__(self, number: int, frame: FrameType | None) -> None:
        names = []
        while frame is not None:
            code = frame.f_code
            where = code.co_filename.rpartition("site-packages/")[2][-60:]
            names.append(f"{where}:{code.co_firstlineno} {code.co_name}")
            frame = frame.f_back
        self.samples += 1
        self.own[names[0]] += 1
        self.whole.update(set(names))

    def run(self, step: Callable[[], None], steps: int) -> None:
        """Sample while ``step`` runs so often."""
        before = signal.signal(signal.SIGPROF, self)
        signal.setitimer(signal.ITIMER_PROF, self.interval, self.interval)
        for _ in range(steps):
            step()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)

    def told(self, microseconds: float, most: int) -> str:
        """Microseconds of functions alone, and with what they call."""
        lines = []
        for title, found in (("alone", self.own), ("whole", self.whole)):
            lines.append(f"-- {title}")
            for name, count in found.most_common(most):
                lines.append(f"{count / self.samples * microseconds:10.0f}  {name}")
        return "\n".join(lines)


def main() -> None:
    """Print a line per workload; ``--json PATH`` writes them too."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("works", nargs="*", default=["W1", "W4"])
    parser.add_argument("--lowering", default="fx", choices=("fx", "inductor"))
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 12))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--profile", type=int, metavar="N", help="tell the N dearest functions")
    parser.add_argument("--json", help="where to write the numbers")
    given = parser.parse_args()
    os.environ["FUSEWRIGHT_VERIFY"] = "off"
    torch.set_num_threads(1)
    pose()
    rows = []
    few, many = given.layers
    print(
        f"{'':>6}{'step ms':>10}{'us a layer':>12}{'calls':>8}{'launches':>10}{'rest ms':>10}{'eager us':>10}"
    )
    for name in given.works:
        steps = [stepper(trainee(name, n, given.lowering)) for n in given.layers]
        (less, more), launched, reference = timed(steps, given.rounds)
        step, layer = steps[1], (more - less) / (many - few)
        called = (calls(steps[1]) - calls(steps[0])) / (many - few)
        each, rest = (launched[1] - launched[0]) / (many - few), more - many * layer
        print(
            f"{name:>6}{more:10.2f}{layer * 1e3:12.0f}{called:8.0f}{each:10.1f}{rest:10.2f}{reference:10.2f}",
            flush=True,
        )
        rows.append({"work": name, "layers": many, "step_ms": more, "layer_us": layer * 1e3,
                     "calls_a_layer": called, "launches_a_layer": each, "rest_ms": rest, "eager_us": reference})  # fmt: skip
        if given.profile:
            sampler = _Sampler()
            sampler.run(step, max(1, int(4000 / more)))
            print(sampler.told(more * 1e3 / many, given.profile))
    if given.json:
        whole = {"torch": torch.__version__, "lowering": given.lowering, "rows": rows}
        Path(given.json).write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
