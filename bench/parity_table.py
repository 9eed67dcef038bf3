"""Measure loss and gradients of 15 tiny architectures: results/parity-<device>.json, docs/parity.md.

For each, in float32 the largest relative difference of a gradient from eager's, and in bfloat16 the
mean relative error of loss and gradients against float64, ours and eager's, over five seeds.

    python bench/parity_table.py [--models llama gemma2] [--lowering fx|inductor]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import models
import torch
import training
from rich.progress import track

import fusewright

SEEDS = range(5)


def _placed(batch: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {k: v.to(device) for k, v in batch.items()}


def _pair(build: Any, device: str, lowering: str) -> tuple[Any, Any]:
    eager = build(0).to(device)
    return eager, fusewright.optimize(models.twin(eager), lowering=lowering)


def float32(name: str, device: str, lowering: str) -> dict[str, Any]:
    """Differences from eager in float32, what was rewritten, and what was missed."""
    eager, ours = _pair(lambda seed: models.build(name, seed=seed), device, lowering)
    batch = _placed(models.batch(), device)
    mine, theirs = training.train_step(ours, batch), training.train_step(eager, batch)
    errors = training.relative_errors(mine, theirs)
    report = fusewright.report(ours)
    missed = [r for r in report.rows if r.status == "missed"]
    return {
        "loss_difference": errors["loss"],
        "largest_gradient_difference": max(errors.values()),
        "counts": report.counts,
        "missed": [{"pattern": r.pattern, "count": r.count, "reason": r.reason} for r in missed],
        "eager_now": report.eager_now,
    }


def bfloat16(name: str, device: str, lowering: str) -> dict[str, float]:
    """Errors against float64 in bfloat16: ours, eager's and their ratio."""

    def build(seed: int) -> Any:
        return models.build(name, seed=seed, dtype=torch.bfloat16, every_expert=True)

    eager, ours = _pair(build, device, lowering)
    triples = []
    for seed in SEEDS:
        for model in (eager, ours):
            model.load_state_dict(build(seed).state_dict())
        batch = _placed(models.batch(seed), device)
        triples.append(
            (
                training.train_step(ours, batch),
                training.train_step(eager, batch),
                training.oracle_step(eager, batch),
            )
        )
    measured = training.exactness(triples)
    return {"ours": measured.ours, "eager": measured.eager, "ratio": measured.ratio}


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/parity.md."""
    where = results["environment"]
    measured = (
        f"Measured by `make bench` on {where['device']} with torch {where['torch']}, transformers "
        f"{where['transformers']}, lowering {where['lowering']}; {len(SEEDS)} seeds, two layers, 2 x "
        "16 tokens, every parameter trained."
    )
    meaning = (
        "fp32: the largest relative difference of the loss or a gradient from eager's. bf16: the mean "
        "relative error of loss and gradients against float64."
    )
    lines = ["# Parity with eager", "", measured, "", meaning, ""]
    lines += [
        "| architecture | fp32 against eager | bf16, ours | bf16, eager | ratio | rewritten | missed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results["models"].items():
        full, half = row["float32"], row["bfloat16"]
        fired = ", ".join(f"{p} {n}" for p, n in full["counts"].items()) or "nothing"
        missed = ", ".join(f"{m['pattern']} {m['count']}" for m in full["missed"]) or "none"
        lines.append(
            f"| {name} | {full['largest_gradient_difference']:.1e} | {half['ours']:.3e} | "
            f"{half['eager']:.3e} | {half['ratio']:.3f} | {fired} | {missed} |"
        )
    reasons = {
        (name, m["pattern"], m["reason"])
        for name, row in results["models"].items()
        for m in row["float32"]["missed"]
    }
    if reasons:
        lines += ["", "## Why something was missed", ""]
        lines += [f"- {name}, {pattern}: {reason}" for name, pattern, reason in sorted(reasons)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="*", default=list(models.NAMES))
    parser.add_argument("--lowering", choices=("auto", "fx", "inductor"), default="fx")
    given = parser.parse_args()
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {
        name: {
            "float32": float32(name, device, given.lowering),
            "bfloat16": bfloat16(name, device, given.lowering),
        }
        for name in track(given.models, "architectures")
    }
    named = torch.cuda.get_device_name() if device == "cuda" else f"a CPU ({platform.machine()})"
    environment = {
        "device": named,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lowering": given.lowering,
    }
    results = {"environment": environment, "models": rows}
    path = ROOT / "bench" / "results" / f"parity-{device}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    if device == "cpu" and len(rows) == len(models.NAMES):
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "parity.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
