"""A memory plan as text for a terminal, and as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fusewright.compiler.planning.budget import shown

if TYPE_CHECKING:
    from fusewright.compiler.planning.plan import MemoryPlan

_WIDTH = 50


def text(plan: MemoryPlan) -> str:
    """The plan as lines of text."""
    out = io.StringIO()
    write(plan, Console(file=out, width=100, highlight=False))
    return out.getvalue().rstrip()


def write(plan: MemoryPlan, console: Console) -> None:
    """Print the plan: choices, timeline, budgets."""
    console.print(
        f"{plan.batch} x {plan.sequence} tokens on {plan.device}: peak {shown(plan.peak)} of "
        f"{shown(plan.budget)}, {1e3 * plan.seconds:.1f} ms a step, of which "
        f"{1e3 * plan.again:.1f} ms run again; up to {plan.longest} tokens a row would fit"
    )
    choices = Table("layers", "choice", "bytes saved by one", title="Layers", title_justify="left")
    for name, count in plan.counts.items():
        choices.add_row(str(count), name, plan.formulas[name])
    console.print(choices)
    parts = ", ".join(f"{name} {shown(size)}" for name, size in plan.resting.items() if size)
    console.print(f"Between steps: {parts}", soft_wrap=True)
    console.print("Memory over the step")
    for event in plan.timeline:
        filled = round(_WIDTH * event.bytes / max(plan.budget, plan.peak))
        bar = "█" * filled + "·" * (_WIDTH - filled)
        console.print(f"{bar} {shown(event.bytes):>10} {event.name}", markup=False, soft_wrap=True)
    budgets = Table("budget", "peak", "ms", "run again", title="Budgets", title_justify="left")
    for row in plan.table:
        budgets.add_row(
            shown(row.budget), shown(row.peak), f"{1e3 * row.seconds:.1f}", f"{1e3 * row.again:.1f}"
        )
    console.print(budgets)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)


def picture(plan: MemoryPlan, path: Path) -> None:
    """Write the timeline and the curve of time over budget as one PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    gib = 2**30
    left.step(range(len(plan.timeline)), [e.bytes / gib for e in plan.timeline], where="mid")
    left.axhline(plan.budget / gib, color="tab:red", linestyle="--", label="budget")
    left.set(title="Memory over the step", xlabel="moment", ylabel="GiB", ylim=(0, None))
    left.legend()
    right.plot([r.budget / gib for r in plan.table], [1e3 * r.seconds for r in plan.table], "o-")
    right.set(title="Time over budget", xlabel="GiB", ylabel="ms a step")
    figure.savefig(path, dpi=120)
