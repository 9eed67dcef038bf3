"""Loss curves as a PNG and as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, free of the start's bias."""
    out, mean, mass = [], 0.0, 0.0
    for v in values:
        mean, mass = weight * mean + (1 - weight) * v, weight * mass + (1 - weight)
        out.append(mean / mass)
    return out


def png(path: Path, title: str, curves: dict[str, list[float]]) -> None:
    """Write the curves over steps; the later ones dashed, for they should lie on the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for i, (name, values) in enumerate(curves.items()):
        axes.plot(smooth(values), label=name, linestyle="--" if i else "-", linewidth=2.5 - i)
    axes.set(title=title, xlabel="step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def text(curves: dict[str, list[float]], width: int = 64, height: int = 12) -> str:
    """The curves in characters; where two meet, an ``*``."""
    marks = dict(zip(curves, "ox+#", strict=False))
    smoothed = {name: smooth(values) for name, values in curves.items() if values}
    high = max(max(v) for v in smoothed.values())
    low = min(min(v) for v in smoothed.values())
    grid = [[" "] * width for _ in range(height)]
    for name, values in smoothed.items():
        for column in range(width):
            value = values[min(column * len(values) // width, len(values) - 1)]
            row = round((high - value) / ((high - low) or 1.0) * (height - 1))
            grid[row][column] = marks[name] if grid[row][column] == " " else "*"
    lines = []
    for i, row in enumerate(grid):
        level = high - (high - low) * i / (height - 1)
        lines.append(f"{level:7.3f} |" + "".join(row).rstrip())
    steps = max(map(len, smoothed.values()))
    lines.append(" " * 8 + "+" + "-" * width)
    lines.append(" " * 9 + f"step 1{f'step {steps}':>{width - 6}}")
    legend = ", ".join(f"{marks[n]} {n}" for n in smoothed)
    lines.append(" " * 9 + legend + ", * both")
    return "\n".join(lines)
