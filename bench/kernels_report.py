"""Put the kernels' benchmarks into results/kernels-<device>.json, a table and a roofline plot.

    python bench/kernels_report.py NORMS.json GLU_LOSS.json [--name h200]

The inputs are what bench_kernels_norms.py and bench_kernels_glu_loss.py wrote on one machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    "PYTHONPATH=src python bench/bench_kernels_norms.py NORMS.json",
    "PYTHONPATH=src python bench/bench_kernels_glu_loss.py GLU_LOSS.json",
    "python bench/kernels_report.py NORMS.json GLU_LOSS.json",
]
# What each kernel is asked to reach of the copy bandwidth.
WANTED = {"forward": 0.90, "backward": 0.88, "dx": 0.88, "dx+dw": 0.80}
SPECIAL = {"nf4_dequantize": 0.85, "cross_entropy": 0.85}


def wanted(kernel: str) -> float:
    """What a row kernel is asked to reach; the direction stands in its name."""
    words = kernel.split()
    return next((WANTED[w] for w in words if w in WANTED), WANTED["backward"])


def shares(norms: dict[str, Any], losses: dict[str, Any]) -> list[dict[str, Any]]:
    """(kernel, shape, share of copy bandwidth, wanted) of every measurement."""
    out = []
    for row in norms["roofline"]:
        shape = f"{row['rows']} x {row.get('width', '')}"
        entry = {"kernel": row["name"], "shape": shape, "share": row["of_copy"]}
        out.append(entry | {"wanted": wanted(row["name"]), "us": row["us"]})
    for row in losses["rows"]:
        if row.get("copy") is None:
            continue
        name = row["op"].split(" ")[0]
        if name == "cross_entropy" and row["pass"] != "both":
            continue
        asked = SPECIAL.get(name, WANTED.get(row["pass"], 0.90))
        kernel = f"{row['op']} {row['pass']}"
        entry = {"kernel": kernel, "shape": row["shape"], "share": row["copy"], "wanted": asked}
        out.append(entry | {"us": row["ms"] * 1e3})
    return out


def markdown(device: str, name: str, rows: list[dict[str, Any]]) -> str:
    """One line a kernel: the least, the median and the most of its shapes, and what was asked.

    ``name`` is the device's in the files of results.
    """
    lines = [
        f"# Kernels on one {device}",
        "",
        "Bytes that must be moved over the bandwidth of a device copy in the same run; bf16, medians.",
        "",
        "Made by:",
        "",
        *(f"    {c}" for c in COMMANDS),
        "",
        f"![share of copy bandwidth](../bench/results/kernels-{name}.png)",
        "",
        "| kernel | asked | least | at | median | most | shapes at or above |",
        "|---|---|---|---|---|---|---|",
    ]
    for kernel in dict.fromkeys(r["kernel"] for r in rows):
        own = sorted((r for r in rows if r["kernel"] == kernel), key=lambda r: r["share"])
        enough = sum(r["share"] >= r["wanted"] for r in own)
        lines.append(
            f"| {kernel} | {own[0]['wanted']:.2f} | {own[0]['share']:.2f} | {own[0]['shape']} | "
            f"{own[len(own) // 2]['share']:.2f} | {own[-1]['share']:.2f} | {enough} of {len(own)} |"
        )
    return "\n".join(lines) + "\n"


def plot(path: Path, device: str, rows: list[dict[str, Any]]) -> None:
    """One row of points a kernel, against what was asked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kernels = list(dict.fromkeys(r["kernel"] for r in rows))[::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.26 * len(kernels) + 1.2), layout="constrained")
    for at, kernel in enumerate(kernels):
        own = [r for r in rows if r["kernel"] == kernel]
        axes.plot([r["share"] for r in own], [at] * len(own), "o", color="#2563eb", alpha=0.5)
        axes.plot([own[0]["wanted"]] * 2, [at - 0.4, at + 0.4], color="#dc2626", linewidth=2)
    axes.axvline(1.0, color="grey", linewidth=1)
    axes.set_yticks(range(len(kernels)), kernels, fontsize=7)
    axes.set(xlim=(0, 1.2), xlabel=f"share of the copy bandwidth of one {device}; red: asked")
    figure.savefig(path, dpi=140)


def main() -> None:
    """Read, join, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("norms", type=Path)
    parser.add_argument("losses", type=Path)
    parser.add_argument("--name", default="h200")
    args = parser.parse_args()
    norms, losses = (json.loads(p.read_text()) for p in (args.norms, args.losses))
    rows = shares(norms, losses)
    out = ROOT / "bench" / "results" / f"kernels-{args.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = {"commands": COMMANDS, "shares": rows, "norms": norms, "glu_loss": losses}
    out.write_text(json.dumps(whole, indent=1) + "\n")
    plot(out.with_suffix(".png"), norms["device"], rows)
    (ROOT / "docs" / "kernels.md").write_text(markdown(norms["device"], args.name, rows))
    print(markdown(norms["device"], args.name, rows))


if __name__ == "__main__":
    main()
