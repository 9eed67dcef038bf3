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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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


def specs(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the rows of a call are to do, in order."""
    common = {"tiny": given.tiny, "lowering": given.lowering, "limit": None, "once": False,
              "check": False, "rank": 16, "checkpoint": False, "kind": given.kind}  # fmt: skip
    common["once"] = given.once
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
    command = [sys.executable, str(ROOT / "bench" / "memory_row.py"), json.dumps(spec)]
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
            log.seek(0)
            row = {"error": log.read()[-1500:] + "\nthe time was up"}
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
        return f"{head}  {' / '.join(row['error'].strip().splitlines()[-2:])[:400]}"

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
    across = min(2, max(1, len(lines)))
    down = -(-max(1, len(lines)) // across)
    figure = Figure(figsize=(6 * across, 3 * down), layout="constrained")
    for axes, row in zip(figure.subplots(down, across, squeeze=False).flat, lines, strict=False):
        for name in ("predicted", "measured"):
            values = [(b or 0) / GIB for _, b in row[f"{name}_timeline"]]
            axes.step(range(len(values)), values, where="mid", label=name)
        if row.get("budget"):
            axes.axhline(row["budget"] / GIB, color="tab:red", linestyle="--", label="budget")
        axes.set(
            title=f"{row['asked']['work']}, {row['asked']['budget']}",
            xlabel="blocks forward, head, blocks backward, optimizer",
            ylabel="GiB",
            ylim=(0, None),
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("works", nargs="*", help="WORKLOAD or WORKLOAD@ROWSxTOKENS")
    parser.add_argument("--budgets", help="GiB, least, middle, auto, none; by commas")
    parser.add_argument("--limits", default="80:343000,24:79000", help="GB:TOKENS of longest")
    parser.add_argument("--lowering", default="inductor")
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--unsloth", action="store_true")
    parser.add_argument(
        "--once", action="store_true", help="peaks of the first step alone, no times"
    )
    parser.add_argument("--at-once", type=int, default=1, help="rows side by side: with --once")
    parser.add_argument("--carry", type=Path, default=ROOT / ".carry")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    given = parser.parse_args(typed)
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    out = None

    def one(spec: Any) -> dict[str, Any] | None:
        left = given.seconds - (time.monotonic() - started)
        if left < 20:
            return None
        return unsloth(given, left) if spec is None else measure(spec, left, given.carry)

    wanted: list[Any] = [*specs(given), *([None] if given.unsloth else [])]
    with ThreadPoolExecutor(given.at_once) as pool:
        for row in pool.map(one, wanted):
            if row is None:
                print("a row was left out, the time was up", flush=True)
                continue
            rows.append(row)
            out = write(rows, given)
            print(f"[{time.monotonic() - started:4.0f} s] {line(row)}", flush=True)
    if out is not None:
        plots(json.loads(out.read_text())["rows"], out)
    print(
        f"\n{'work':<14} {'asked':>8} {'budget':>8} {'GiB said':>8} {'GiB':>8} {'':>8} {'ms said':>8} {'ms':>8}"
    )
    print("\n".join(map(line, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
