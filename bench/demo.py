"""Train a byte-level language model twice at once, eager and optimised, and show both.

First every parameter on the standard library's source code, then LoRA adapters on its manual. The
two models see the same batches in turn, step by step, so that they share whatever the machine does.

    python bench/demo.py [--seconds 70] [--lowering auto|fx|inductor] [--out artifacts/demo]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import corpus
import plots
import torch
from memory import step_peak
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import fusewright

warnings.filterwarnings("ignore", category=FutureWarning)  # peft calls what transformers renamed
console = Console(width=max(Console().width, 100))
Batch = Callable[[int], dict[str, torch.Tensor]]


@dataclass
class Run:
    """One of the two models of a stage, and what was measured on it."""

    name: str
    model: Any
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """One optimizer step, timed to the end of its work."""
        started = time.perf_counter()
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - started)


def base_model(device: str) -> Any:
    """A Llama-style model: 5 M parameters on a CPU, 124 M on a GPU, weights from seed 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = device == "cuda"
    width = 768 if wide else 256
    config = LlamaConfig(
        vocab_size=corpus.VOCAB,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=16 if wide else 6,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64 // (3 if wide else 2),
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    return model.to(device, torch.bfloat16 if wide else torch.float32).train()


def adapted(model: Any) -> Any:
    """The model under LoRA on every linear layer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings).train()


def pair(model: Any, lowering: str, rate: float) -> tuple[Run, Run]:
    """The model as it is, and an equal one optimised."""
    runs = []
    for name, one in (("eager", model), ("fusewright", copy.deepcopy(model))):
        if name == "fusewright":
            fusewright.optimize(one, lowering=lowering)
        trained = [p for p in one.parameters() if p.requires_grad]
        runs.append(Run(name, one, torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)))
    return runs[0], runs[1]


def train(title: str, runs: tuple[Run, Run], batch: Batch, seconds: float, most: int) -> float:
    """Steps in turn until the time is up; returns the seconds until the first optimised step."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    runs[0].step(batch(0))
    started = time.perf_counter()
    with console.status("compiling at the first step"):
        runs[1].step(batch(0))
    ready = time.perf_counter() - started
    for run in runs:
        run.step(batch(1))
    pace = sum(run.seconds[-1] for run in runs)
    steps = max(20, min(most, int(seconds / pace)))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title.split(",")[0], total=steps, completed=2, shown="")
        for step in range(2, steps):
            for run in runs if step % 2 else reversed(runs):
                run.step(batch(step))
            shown = "  ".join(f"{run.name} {run.losses[-1]:.3f}" for run in runs)
            progress.update(task, completed=step + 1, shown=shown)
    for run in runs:
        run.peak = step_peak(run.model, batch(steps))
    return ready


def summary(title: str, runs: tuple[Run, Run], tokens: int, ready: float) -> Table:
    """Speed, memory and loss of both, and what they differ by."""
    table = Table(title=title, title_justify="left")
    for name in ("", "eager", "fusewright", "fusewright / eager"):
        table.add_column(name, justify="right" if name else "left")
    speed = [tokens / statistics.median(r.seconds[2:]) for r in runs]
    table.add_row("tokens/s", *(f"{s:,.0f}" for s in speed), f"{speed[1] / speed[0]:.2f} x")
    peaks = [r.peak / 2**20 for r in runs]
    table.add_row(
        "peak memory of a step, MiB", *(f"{p:,.1f}" for p in peaks), f"{peaks[1] / peaks[0]:.2f} x"
    )
    last = [plots.smooth(r.losses)[-1] for r in runs]
    table.add_row("loss at the end", *(f"{v:.4f}" for v in last), f"{last[1] - last[0]:+.5f}")
    apart = max(abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True))
    table.add_row("largest difference of a loss", "", "", f"{apart:.1e}")
    table.add_row("seconds to compile", "", f"{ready:.1f}", "")
    return table


def show(
    name: str, title: str, runs: tuple[Run, Run], tokens: int, ready: float, out: Path
) -> None:
    """Print the stage's tables and curves and leave them in files."""
    curves = {run.name: run.losses for run in runs}
    console.print(summary(title, runs, tokens, ready))
    console.print(plots.text(curves), highlight=False)
    plots.png(out / f"loss-{name}.png", title, curves)
    report = fusewright.report(runs[1].model)
    (out / f"report-{name}.json").write_text(report.to_json())
    measured = {
        run.name: {"losses": run.losses, "seconds": run.seconds, "step_peak_bytes": run.peak}
        for run in runs
    }
    (out / f"run-{name}.json").write_text(json.dumps(measured | {"seconds_to_compile": ready}))
    print(report)


def sample(model: Any, device: str) -> str:
    """What the trained model writes after a few bytes; runs the original code, with its cache."""
    prompt = torch.tensor([list(b"The statement")], device=device)
    model.eval()
    torch.manual_seed(0)
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=160,
        do_sample=True,
        top_k=8,
        eos_token_id=None,
        pad_token_id=0,
    )
    model.train()
    return bytes(ids[0].tolist()).decode(errors="replace")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60, help="of training a stage")
    parser.add_argument("--steps", type=int, default=600, help="of a stage at most")
    parser.add_argument("--lowering", choices=("auto", "fx", "inductor"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("artifacts/demo"))
    return parser.parse_args()


def main() -> None:
    given = arguments()
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given.out.mkdir(parents=True, exist_ok=True)
    rows, length = (8, 1024) if device == "cuda" else (4, 256)
    model = base_model(device)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"A byte-level model of {size:.1f} M parameters on {device} "
        f"({torch.get_num_threads()} threads), {rows} x {length} bytes a step, "
        f"lowering {given.lowering}"
    )
    stages = (
        ("full", "Every parameter, on the standard library's source", corpus.code(), 1e-3),
        ("lora", "LoRA, on the language reference", corpus.prose(), 2e-3),
    )
    for name, title, text, rate in stages:
        if name == "lora":
            model = adapted(model)
        runs = pair(model, given.lowering, rate)
        batch = corpus.sampler(text, rows, length, device)
        ready = train(title, runs, batch, given.seconds, given.steps)
        show(name, title, runs, rows * length, ready, given.out)
    trained = runs[1].model
    trained.save_pretrained(given.out / "adapter")
    console.print(f"[bold]It writes:[/] {sample(trained, device)!r}")
    console.print(f"[bold]Files:[/] {', '.join(sorted(p.name for p in given.out.iterdir()))}")
    spent = time.perf_counter() - started
    console.print(f"in {given.out.resolve()}; {spent:.0f} s in all")


if __name__ == "__main__":
    main()
