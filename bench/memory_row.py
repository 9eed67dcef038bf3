"""One row of bench_memory.py, in a process of its own: a model under one budget, planned and run.

python bench/memory_row.py SPEC      (JSON, from bench_memory.py; the last line of the answer is the row)
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2**30
NEAR = 4096  # tokens whose loss a long row's is checked against


class Row:
    """One model under one budget; what a process of its own measures."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch

        self.torch, self.spec = torch, spec
        self.cuda = torch.cuda.is_available() and not spec["tiny"]
        self.device = "cuda" if self.cuda else "cpu"
        self.out: dict[str, Any] = {"device": "cpu"}
        self.near: Any = None  # the last norm's output for a long row's first tokens
        self.done: dict[str, float] = {}  # seconds at which a part was issued
        if self.cuda:
            card = torch.cuda.get_device_properties(0)
            self.out["device"] = card.name
            if spec["limit"]:
                share = min(1.0, spec["limit"] * 1e9 / card.total_memory)
                torch.cuda.set_per_process_memory_fraction(share)

    def build(self) -> Any:
        """The trainee, not optimised; its checkpoints are off, for the plan decides."""
        from dataclasses import replace

        from step_models import Trainee
        from step_work import workload

        name, _, size = self.spec["work"].partition("@")
        work = workload(name, self.spec["tiny"])
        if size:
            rows, tokens = map(int, size.split("x"))
            work = replace(work, batch=(rows, min(tokens, 96) if self.spec["tiny"] else tokens))
        if self.spec["tiny"] and work.mode == "qlora":
            work = replace(work, mode="lora")  # quick: four bits are packed in a loop on a CPU
        unplanned = self.spec["budget"] == "none"
        work = replace(work, checkpoint=unplanned and self.spec["checkpoint"])
        return Trainee(work, "eager", self.device, Path("."), rank=self.spec["rank"])

    def run(self) -> dict[str, Any]:
        """Plan, run, and compare."""
        import fusewright

        trainee = self.build()
        spec, out = self.spec, self.out
        began = time.perf_counter()
        if spec["once"]:
            self.follow(trainee, began)
        if spec["check"]:
            self.alone(trainee)
        self.start_of_step()
        batch = trainee.work.batch
        out |= {"batch": list(batch), "resting": self.allocated()}
        budget = self.budget(trainee, batch)
        given = {} if budget is None else {"memory_budget": budget}
        started = time.perf_counter()
        trainee.model = fusewright.optimize(trainee.raw, lowering=spec["lowering"], **given)
        trainee.step()
        self.wait()
        out["first_step_s"] = round(time.perf_counter() - started, 1)
        out["first_peak"] = self.peak()
        plan = self.plan_of(trainee.model)
        if budget is not None:
            out |= plan
        if not spec["once"]:
            self.timed(trainee)
            out["at_rest"] = self.at_rest(trainee)
            out["measured_timeline"] = self.moments(trainee)
        else:
            out["measured_peak"] = out["first_peak"]
        if spec["check"]:  # no later token is seen, and no tile is lost
            out["check"]["in_the_row"] = self.near_loss(trainee)
        out["losses"] = [float(x) for x in trainee.losses]
        out["notes"] = [
            n for n in json.loads(fusewright.report(trainee.raw).to_json()).get("notes", [])
        ]
        return out

    def budget(self, trainee: Any, batch: tuple[int, int]) -> str | int | None:
        """Bytes for a name of the table's place; what is a number is GiB."""
        import fusewright

        asked = self.spec["budget"]
        if asked in ("none", "auto"):
            return None if asked == "none" else "auto"
        if asked not in ("least", "middle"):
            return int(float(asked) * GIB)
        table = fusewright.plan(trainee.raw, *batch, budget="90%").table
        return int(table[-1 if asked == "least" else len(table) // 2].budget)

    def plan_of(self, model: Any) -> dict[str, Any]:
        from fusewright.compiler import driver

        memory = driver._required(model).memory
        plan = None if memory is None else memory.plan
        if plan is None:
            return {"planned": False}
        return {
            "planned": True, "budget": plan.budget, "predicted_peak": plan.peak,
            "predicted_s": plan.seconds, "again_s": plan.again, "counts": plan.counts,
            "predicted_timeline": [[e.name, e.bytes] for e in plan.timeline],
        }  # fmt: skip

    def timed(self, trainee: Any) -> None:
        """The middle of five steps, after two, and their peak."""
        for _ in range(2):
            trainee.step()
        self.wait()
        self.start_of_step()
        times = []
        for _ in range(5):
            started = time.perf_counter()
            trainee.step()
            self.wait()
            times.append(time.perf_counter() - started)
        self.out |= {"measured_s": sorted(times)[2], "times_s": times}
        self.out["measured_peak"] = self.peak()
        if self.cuda:
            self.out["reserved"] = self.torch.cuda.max_memory_reserved()

    def at_rest(self, trainee: Any) -> dict[str, Any] | None:
        """What is allocated now, and the largest of it that is no parameter and no optimizer's state."""
        if not self.cuda:
            return None
        from memory import strangers

        from fusewright.runtime.packed import states

        model, optimizer = trainee.raw, trainee.optimizer
        named = [t for p in model.parameters() for t in (p, *states(p))]
        named += model.buffers()
        named += (
            t for s in optimizer.state.values() for t in s.values() if self.torch.is_tensor(t)
        )
        return {"memory_allocated": self.allocated()} | strangers(named)

    def moments(self, trainee: Any) -> list[list[Any]]:
        """The peak of each layer's forward and backward in one more step, as the plan has them."""
        found: list[list[Any]] = []
        middle: list[Any] = []  # what lies there half way down the backward
        model = (
            trainee.raw.get_base_model() if hasattr(trainee.raw, "get_base_model") else trainee.raw
        )
        layers = list(model.model.layers)
        forward = True

        def close(name: str) -> None:
            found.append([name, self.peak()])
            self.start_of_step()

        def after(at: int) -> Callable[..., None]:
            def hook(module: Any, given: Any, output: Any) -> None:
                if not forward:  # a checkpoint's second run
                    return
                hidden = output[0] if isinstance(output, tuple) else output
                close(f"forward {at}")
                above = f"backward {at + 1}" if at + 1 < len(layers) else "head and loss"
                if hidden.requires_grad:
                    hidden.register_hook(lambda grad: close(above))
                    if at == len(layers) // 2:
                        hidden.register_hook(lambda grad: middle.append(self.at_rest(trainee)))

            return hook

        handles = [m.register_forward_hook(after(i)) for i, m in enumerate(layers)]
        self.start_of_step()
        loss = trainee.model(input_ids=trainee.ids, labels=trainee.ids).loss
        forward = False
        loss.backward()
        close("backward 0")
        self.out["half_way_back"] = middle[0] if middle else None
        trainee.optimizer.step()
        close("optimizer step")
        trainee.optimizer.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
        return found

    def alone(self, trainee: Any) -> None:
        """The eager loss of the first tokens by themselves, and a hook that keeps them in the step."""

        def keep(module: Any, given: Any, output: Any) -> None:
            self.near = output[:, : self.tokens(trainee)].detach().clone()

        trainee.raw.get_base_model().model.norm.register_forward_hook(keep)
        with self.torch.no_grad():
            trainee.raw.get_base_model().model(trainee.ids[:, : self.tokens(trainee)])
        self.out["check"] = {"tokens": self.tokens(trainee), "alone": self.near_loss(trainee)}
        if self.cuda:
            self.torch.cuda.empty_cache()

    def follow(self, trainee: Any, began: float) -> None:
        """Note when each layer's forward and backward is issued; ``done`` has the last of each."""

        def note(name: str) -> None:
            self.done[name] = round(time.perf_counter() - began, 1)

        def after(at: int) -> Callable[..., None]:
            def hook(module: Any, given: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                note(f"forward {at}")
                self.done.pop(f"forward {at - 1}", None)
                if hidden.requires_grad:
                    hidden.register_hook(lambda grad: note(f"backward from {at}"))

            return hook

        for at, layer in enumerate(trainee.raw.get_base_model().model.layers):
            layer.register_forward_hook(after(at))

    def tokens(self, trainee: Any) -> int:
        return min(NEAR, trainee.ids.shape[1] // 2)

    def near_loss(self, trainee: Any) -> float:
        """Of what was kept: the first tokens' loss, in float32 from the head's logits."""
        labels = trainee.ids[0, 1 : self.tokens(trainee)]
        with self.torch.no_grad():
            logits = trainee.raw.get_base_model().lm_head(self.near[:, :-1])[0].float()
            return float(self.torch.nn.functional.cross_entropy(logits, labels))

    def wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def allocated(self) -> int | None:
        return self.torch.cuda.memory_allocated() if self.cuda else None

    def start_of_step(self) -> None:
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.cuda else None


def watch(row: Row) -> None:
    """Every ten seconds, for a row that may not be done in its time: how far it is."""
    started = time.perf_counter()
    while True:
        time.sleep(10)
        resident = Path("/proc/self/statm").read_text().split()[1]
        print(
            f"{time.perf_counter() - started:.0f} s: {(row.allocated() or 0) / GIB:.1f} GiB on the "
            f"device, {int(resident) * 4096 / GIB:.1f} in the host's memory, {row.done}",
            file=sys.stderr,
            flush=True,
        )


def main(spec: str) -> None:
    """Measure and answer; what else is printed goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    row = Row(json.loads(spec))
    if row.spec["once"]:
        threading.Thread(target=watch, args=(row,), daemon=True).start()
    answers.write(json.dumps(row.run()) + "\n")
    answers.flush()
    os._exit(0)  # compile workers are not waited for


if __name__ == "__main__":
    main(sys.argv[1])
