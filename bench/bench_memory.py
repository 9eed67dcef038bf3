"""Memory plans on one GPU: predicted against measured peaks, times and timelines; budgets; lengths.

    python bench/bench_memory.py plans W1 W3 W1@1x32768 --budgets least,middle,auto --seconds 500
    python bench/bench_memory.py budgets --budgets 16.7,20,24,28,36 --seconds 520
    python bench/bench_memory.py longest --limits 80:345000 --seconds 540

A row is a process of its own: a workload of step_work.py, at its own or another ROWSxTOKENS, under
one budget: GiB, or "least", "middle", "auto", or "none" for no plan. ``budgets`` is W2n (8B, LoRA)
under rising budgets, --unsloth beside it; ``longest`` is QLoRA r = 32 of 8B under limits of the
process, GB:TOKENS each. results/memory-<device>.json has the rows of all calls, written after every
row, and two plots beside it. --tiny is a dry run on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "plans": ["W1", "W2n", "W3", "W4", "W1@1x8192", "W1@1x32768", "W2n@1x8192", "W2n@1x32768"],
    "budgets": ["W2n"],
    "longest": ["W4"],
}
BUDGETS = {"plans": "middle", "budgets": "16.7,20,24,28,36", "longest": "auto"}
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
        batch = trainee.work.batch
        out |= {"batch": list(batch), "resting": self.allocated()}
        budget = self.budget(trainee, batch)
        given = {} if budget is None else {"memory_budget": budget}
        started = time.perf_counter()
        trainee.model = fusewright.optimize(trainee.raw, lowering=spec["lowering"], **given)
        trainee.step()
        self.wait()
        out["first_step_s"] = round(time.perf_counter() - started, 1)
        plan = self.plan_of(trainee.model)
        if budget is not None:
            out |= plan
        if not spec["once"]:
            self.timed(trainee)
            out["measured_timeline"] = self.moments(trainee)
        else:
            out["measured_peak"] = self.peak()
        if spec["check"]:
            self.check(trainee)
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
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
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

    def moments(self, trainee: Any) -> list[list[Any]]:
        """The peak of each layer's forward and backward in one more step, as the plan has them."""
        found: list[list[Any]] = []
        model = (
            trainee.raw.get_base_model() if hasattr(trainee.raw, "get_base_model") else trainee.raw
        )
        layers = list(model.model.layers)
        forward = True

        def close(name: str) -> None:
            found.append([name, self.peak()])
            if self.cuda:
                self.torch.cuda.reset_peak_memory_stats()

        def after(at: int) -> Callable[..., None]:
            def hook(module: Any, given: Any, output: Any) -> None:
                if not forward:  # a checkpoint's second run
                    return
                hidden = output[0] if isinstance(output, tuple) else output
                close(f"forward {at}")
                above = f"backward {at + 1}" if at + 1 < len(layers) else "head and loss"
                if hidden.requires_grad:
                    hidden.register_hook(lambda grad: close(above))

            return hook

        handles = [m.register_forward_hook(after(i)) for i, m in enumerate(layers)]
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
        loss = trainee.model(input_ids=trainee.ids, labels=trainee.ids).loss
        forward = False
        loss.backward()
        close("backward 0")
        trainee.optimizer.step()
        close("optimizer step")
        trainee.optimizer.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
        return found

    def check(self, trainee: Any) -> None:
        """The loss of a long row's first tokens is that of those tokens alone: no later one is seen.

        With gradients on, since the plan is a training step's: without, all logits would be there.
        """
        torch = self.torch
        near = min(NEAR, trainee.ids.shape[1] // 2)
        labels = torch.full_like(trainee.ids, -100)
        labels[:, :near] = trainee.ids[:, :near]
        whole = float(trainee.model(input_ids=trainee.ids, labels=labels).loss)
        part = trainee.ids[:, :near]
        alone = float(trainee.model(input_ids=part, labels=part).loss)
        self.out["check"] = {"tokens": near, "in_the_row": whole, "alone": alone}

    def wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def allocated(self) -> int | None:
        return self.torch.cuda.memory_allocated() if self.cuda else None

    def peak(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.cuda else None


def specs(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the rows of a call are to do, in order."""
    common = {"tiny": given.tiny, "lowering": given.lowering, "limit": None, "once": False,
              "check": False, "rank": 16, "checkpoint": False, "kind": given.kind}  # fmt: skip
    budgets = (given.budgets or BUDGETS[given.kind]).split(",")
    if given.kind == "longest":
        for limit, tokens in (pair.split(":") for pair in given.limits.split(",")):
            own = {"work": f"W4@1x{tokens}", "limit": float(limit), "once": True, "check": True}
            yield common | own | {"rank": 32, "budget": f"{float(limit) * 1e9 * 0.97 / GIB:.3f}"}
        return
    for work in given.works or KINDS[given.kind]:
        for budget in budgets:
            yield common | {"work": work, "budget": budget}
        if given.kind == "budgets":  # the left end's comparison: a checkpoint around every block
            yield common | {"work": work, "budget": "none", "checkpoint": True}


def measure(spec: dict[str, Any], left: float, carry: Path) -> dict[str, Any]:
    """One row in a process of its own."""
    environment = dict(os.environ)
    paths = [str(ROOT / "src"), str(ROOT / "bench"), environment.get("PYTHONPATH", "")]
    if (carry / "bnb").is_dir():
        paths.insert(2, str(carry / "bnb"))
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    command = [sys.executable, str(Path(__file__).resolve()), "--row", json.dumps(spec)]
    started = time.perf_counter()
    row: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as log:
        try:
            ended = subprocess.run(
                command,
                check=False,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                timeout=left,
            )
            row = json.loads(ended.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            row = {"error": "the time was up"}
        except (IndexError, json.JSONDecodeError):
            log.seek(0)
            row = {"error": log.read()[-1500:]}
    shown = {
        k: spec[k] for k in ("kind", "work", "budget", "limit", "rank", "lowering", "checkpoint")
    }
    return {"asked": shown} | row | {"took_s": round(time.perf_counter() - started, 1)}


def unsloth(given: argparse.Namespace, left: float) -> dict[str, Any]:
    """Unsloth's time and peak on W2, by the step benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        command = [sys.executable, str(ROOT / "bench" / "bench_step.py"), "W2", "--peers", "unsloth",
                   "--no-floor", "--no-kernels", "--seconds", str(int(left - 10)),
                   "--carry", str(given.carry), str(out)]  # fmt: skip
        subprocess.run(command, timeout=left, check=False)
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
    asked = {"kind": "budgets", "work": "W2", "budget": "unsloth"}
    return {"asked": asked} | (rows[0] if rows else {"error": "no row"})


def key(row: dict[str, Any]) -> str:
    return json.dumps(row["asked"], sort_keys=True)


def write(rows: list[dict[str, Any]], given: argparse.Namespace) -> Path:
    """The file with these rows in the place of their like from before."""
    names = [str(r["device"]).lower() for r in rows if "device" in r]
    word = re.search(r"[a-z]*\d+", names[0]) if names else None
    device = word.group() if word else (names[0] if names else "unknown")
    out = given.out or ROOT / "bench" / "results" / f"memory-{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(out.read_text())["rows"] if out.exists() else []
    fresh = {key(r) for r in rows}
    kept = [r for r in before if key(r) not in fresh]
    out.write_text(json.dumps({"rows": kept + rows}, indent=1) + "\n")
    return out


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    asked = row["asked"]
    head = f"{asked['work']:<14} {asked['budget']:>8}"
    if "error" in row:
        return f"{head}  {row['error'].strip().splitlines()[-1][:110]}"

    def pair(name: str, unit: float, digits: int) -> str:
        predicted, measured = row.get(f"predicted_{name}"), row.get(f"measured_{name}")
        texts = ["-" if v is None else f"{v * unit:.{digits}f}" for v in (predicted, measured)]
        off = f"{100 * (predicted / measured - 1):+.1f} %" if predicted and measured else ""
        return f"{texts[0]:>8} {texts[1]:>8} {off:>8}"

    over = " OVER" if (row.get("measured_peak") or 0) > row.get("budget", float("inf")) else ""
    size = f"{row['budget'] / GIB:8.2f}" if row.get("budget") else "       -"
    checked = (
        f"  check {row['check']['in_the_row']:.5f} {row['check']['alone']:.5f}"
        if row.get("check")
        else ""
    )
    return f"{head} {size} {pair('peak', 1 / GIB, 2)}{over} {pair('s', 1e3, 1)}{checked}"


def plots(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Timelines, predicted and measured, and time over budget."""
    from matplotlib.figure import Figure

    lines = [r for r in rows if r.get("predicted_timeline") and r.get("measured_timeline")][:6]
    figure = Figure(figsize=(6 * max(1, len(lines)), 4), layout="constrained")
    for axes, row in zip(
        figure.subplots(1, max(1, len(lines)), squeeze=False)[0], lines, strict=False
    ):
        for name in ("predicted", "measured"):
            values = [(b or 0) / GIB for _, b in row[f"{name}_timeline"]]
            axes.step(range(len(values)), values, where="mid", label=name)
        if row.get("budget"):
            axes.axhline(row["budget"] / GIB, color="tab:red", linestyle="--", label="budget")
        axes.set(
            title=f"{row['asked']['work']}, {row['asked']['budget']}", ylabel="GiB", ylim=(0, None)
        )
        axes.legend()
    figure.savefig(out.with_name(out.stem + "-timeline.png"), dpi=120)
    curve = [
        r for r in rows if r["asked"]["kind"] == "budgets" and r.get("budget") and "measured_s" in r
    ]
    curve.sort(key=lambda r: r["budget"])
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("predicted", "measured"):
        axes.plot(
            [r["budget"] / GIB for r in curve],
            [1e3 * r[f"{name}_s"] for r in curve],
            "o-",
            label=name,
        )
    axes.set(title="Time over budget", xlabel="GiB", ylabel="ms a step")
    axes.legend()
    figure.savefig(out.with_name(out.stem + "-budgets.png"), dpi=120)


def main(typed: Sequence[str]) -> int:
    """Measure, write, print."""
    if typed[:1] == ["--row"]:
        answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        answers.write(json.dumps(Row(json.loads(typed[1])).run()) + "\n")
        answers.flush()
        os._exit(0)  # compile workers are not waited for
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("works", nargs="*", help="WORKLOAD or WORKLOAD@ROWSxTOKENS")
    parser.add_argument("--budgets", help="GiB, least, middle, auto, none; by commas")
    parser.add_argument("--limits", default="80:343000,24:79000", help="GB:TOKENS of longest")
    parser.add_argument("--lowering", default="inductor")
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--unsloth", action="store_true")
    parser.add_argument("--carry", type=Path, default=ROOT / ".carry")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    given = parser.parse_args(typed)
    started, rows = time.monotonic(), []
    out = None
    wanted: list[Any] = [*specs(given), *([None] if given.unsloth else [])]
    for spec in wanted:
        left = given.seconds - (time.monotonic() - started)
        if left < 20:
            print(f"{len(wanted) - len(rows)} rows left out, the time was up", flush=True)
            break
        rows.append(unsloth(given, left) if spec is None else measure(spec, left, given.carry))
        out = write(rows, given)
        print(f"[{time.monotonic() - started:4.0f} s] {line(rows[-1])}", flush=True)
    if out is not None:
        plots(json.loads(out.read_text())["rows"], out)
    print(
        f"\n{'work':<14} {'asked':>8} {'budget':>8} {'GiB said':>8} {'GiB':>8} {'':>8} {'ms said':>8} {'ms':>8}"
    )
    print("\n".join(map(line, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
