"""What bench_step.py measured: a table, a plot, and the kernels of a step.

    python bench/step_report.py RESULT.json [--profile]

makes them again from the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from roofline import table
from step_profile import CLASSES
from step_work import base

_COLUMNS = [
    "work", "peer", "ms", "min", "max", "tok/s", "x eager", "x floor", "peak GiB", "step MiB", "first s",
    "issue ms", "launches", "idle", "gemm", "attn", "point", "loss", "copy", "loss 1", "loss 13",
]  # fmt: skip
_ERRORS = ["work", "peer", "loss", "mean", "max", "A", "B", "graphs", "breaks"]


def _number(value: Any, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f}%"


def line(row: dict[str, Any], eager: dict[str, Any] | None, floor: float | None) -> dict[str, Any]:
    """One timed peer as a line of the table; shares are of kernel time, idle of the step."""
    profile = row.get("profile", {})
    share = profile.get("share", {})
    losses = row.get("losses", [])
    return {
        "work": row["work"],
        "peer": row["peer"],
        "ms": _number(row["ms"], 1),
        "min": _number(row["ms_min"], 1),
        "max": _number(row["ms_max"], 1),
        "tok/s": _number(row["tokens_s"], 0),
        "x eager": _number(speed(row, eager), 2),
        "x floor": _number(row["ms"] / floor if floor else None, 2),
        "peak GiB": _number(row.get("peak_gib"), 2),
        "step MiB": _number(row.get("step_peak_mib"), 0),
        "first s": _number(row.get("first_step_s"), 1),
        "issue ms": _number(row.get("issue_ms"), 0),
        "launches": profile.get("launches"),
        "idle": _percent(row.get("idle")),
        "gemm": _percent(share.get("gemm")),
        "attn": _percent(share.get("attention")),
        "point": _percent(share.get("pointwise")),
        "loss": _percent(share.get("loss")),
        "copy": _percent(share.get("copy")),
        "loss 1": _number(row["loss_first"], 5),
        "loss 13": _number(losses[12], 4) if len(losses) > 12 else None,
    }


def speed(row: dict[str, Any], eager: dict[str, Any] | None) -> float | None:
    """How many times eager's speed, both against what their groups share."""
    if eager is None:
        return None
    return (eager["ms"] / eager["anchor_ms"]) / (row["ms"] / row["anchor_ms"])


def text(result: dict[str, Any]) -> str:
    """The tables, the floors, and the notes."""
    rows = result["rows"]
    timed = [r for r in rows if "ms" in r]
    eager = {r["work"]: r for r in timed if r["peer"] == "eager"}
    floors = {n: f["floor_ms"] for n, f in result["floors"].items() if "floor_ms" in f}
    lines = [line(r, eager.get(r["work"]), floors.get(r["work"])) for r in timed]
    used = [c for c in _COLUMNS if any(x.get(c) is not None for x in lines)]
    parts = [f"{result['machine'].get('device')}, {result['machine'].get('versions')}"]
    if lines:
        parts.append(table(lines, used))
    exact = [_exactness(r) for r in rows if "error_max" in r]
    if exact:
        parts.append("LoRA gradients against a float32 model's, relative, mean over parameters:")
        parts.append(table(exact, _ERRORS))
    for name, floor in result["floors"].items():
        if "floor_ms" in floor:
            parts.append(
                f"{name} floor {floor['floor_ms']:.1f} ms: GEMM {floor['gemm_ms']:.1f} at the rates "
                f"measured now, attention {floor['attention_ms']:.1f}, AdamW {floor['adamw_ms']:.1f}; "
                f"copy {floor['copy_tb_s']:.2f} TB/s; left out: {floor['left_out']}"
            )
    for row in rows:
        if "ms" not in row and "error_max" not in row:
            parts.append(f"{row['work']} {row['peer']}: {str(row.get('error', 'no figure'))[:300]}")
        for key in ("warning", "profile_note", "memory_note"):
            if key in row:
                parts.append(f"{row['work']} {row['peer']}: {row[key]}")
    parts += result["notes"]
    for row in rows:
        if "coverage" in row:
            parts.append(f"{row['work']} {row['peer']} rewrote {row['coverage']['counts']}")
    parts.append(f"{result['command']}  ({result['seconds']:.0f} s)")
    return "\n".join(parts)


def _exactness(row: dict[str, Any]) -> dict[str, Any]:
    out = {"work": row["work"], "peer": row["peer"], "loss": _number(row["loss"], 6)}
    out |= {k: _number(row[f"error{e}"], 5) for k, e in
            (("mean", "_mean"), ("max", "_max"), ("A", "_A"), ("B", "_B"))}  # fmt: skip
    return out | {"graphs": row.get("graphs"), "breaks": row.get("graph_breaks")}


def plot(path: Path, result: dict[str, Any]) -> None:
    """Milliseconds of every peer, a panel a workload, with the range and the floor."""
    timed = [r for r in result["rows"] if "ms" in r]
    names = list(dict.fromkeys(r["work"] for r in timed))
    if not names:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tall = 0.34 * len(timed) + 0.9 * len(names)
    heights = [sum(r["work"] == n for r in timed) + 1 for n in names]
    figure, panels = pyplot.subplots(
        len(names), 1, figsize=(8, tall), layout="constrained", squeeze=False, height_ratios=heights
    )
    for panel, name in zip(panels[:, 0], names, strict=True):
        rows = sorted((r for r in timed if r["work"] == name), key=lambda r: -r["ms"])
        colours = ["#2563eb" if base(r["peer"]) == "ours" else "#9ca3af" for r in rows]
        middle = [r["ms"] for r in rows]
        around = [[r["ms"] - r["ms_min"] for r in rows], [r["ms_max"] - r["ms"] for r in rows]]
        panel.barh([r["peer"] for r in rows], middle, xerr=around, color=colours, ecolor="#4b5563")
        for at, value in enumerate(middle):
            panel.text(value * 0.01, at, f"{value:.1f}", va="center", color="white", fontsize=8)
        floor = result["floors"].get(name, {}).get("floor_ms")
        if floor:
            panel.axvline(floor, color="#dc2626", linewidth=1.5)
        panel.set(title=name + (f", floor {floor:.1f} ms in red" if floor else ""), xlim=(0, None))
    panels[-1, 0].set_xlabel(f"ms a step on one {result['machine'].get('device')}")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def two(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one workload's profiled peers: ours that is fastest, and the fastest of the others."""
    rows = sorted((r for r in rows if "profile" in r and "ms" in r), key=lambda r: r["ms"])
    ours = [r for r in rows if base(r["peer"]) == "ours"][:1]
    others = [r for r in rows if base(r["peer"]) != "ours"][:1]
    return ours + others


def kernels(result: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The top kernels of ours and of the best peer, workload by workload: for a file, and text."""
    kept, parts = [], []
    for name in dict.fromkeys(r["work"] for r in result["rows"]):
        for row in two([r for r in result["rows"] if r["work"] == name]):
            profile = row["profile"]
            kept.append({"work": name, "peer": row["peer"], "ms": row["ms"], "profile": profile})
            classes = ", ".join(f"{k} {profile['class_ms'][k]:.1f}" for k in CLASSES)
            parts.append(
                f"{name} {row['peer']}: {row['ms']:.1f} ms a step, {profile['busy_ms']:.1f} busy, "
                f"{profile['launches']} launches; ms by class: {classes}"
            )
            parts += [
                f"{ms:9.3f} ms {count:5d} x {each:8.1f} us  {kind:<10} {kernel[:110]}"
                for kernel, kind, ms, count, each in profile["top"]
            ]
    return kept, "\n".join(parts)


def present(result: dict[str, Any], out: Path, profile: bool) -> None:
    """Write the plot, the text, and if asked the kernels beside the file; print the table last."""
    plot(out.with_suffix(".png"), result)
    if profile:
        kept, shown = kernels(result)
        out.with_suffix(".profile.json").write_text(json.dumps(kept, indent=1) + "\n")
        out.with_suffix(".profile.txt").write_text(shown + "\n")
        print(shown + "\n")
    shown = text(result)
    out.with_suffix(".txt").write_text(shown + "\n")
    print(shown, flush=True)


def main() -> None:
    """Present a file again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    present(json.loads(given.result.read_text()), given.result, given.profile)


if __name__ == "__main__":
    main()
