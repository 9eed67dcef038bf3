"""The kernels' benchmarks from end to end, at tiny shapes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def dry(script: str, out: Path) -> dict:
    """What the script wrote of a dry run."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), str(out), "--dry"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(out.read_text())


def test_both_and_their_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = dry("bench_kernels_norms.py", tmp_path / "norms.json")
    assert all(e["ok"] for e in norms["errors"])
    names = {r["name"].split()[0] for r in norms["roofline"]}
    assert names == {"rms", "add", "layer", "rope", "gated", "qk_norm_rope"}
    assert all(isinstance(r[n], float) for r in norms["peers"] for n in ("ours", "eager"))

    losses = dry("bench_kernels_glu_loss.py", tmp_path / "losses.json")
    given = [
        r for r in losses["rows"] if "eager error" in r
    ]  # precision is the kernels' tests' matter
    assert given and all(0 <= r[n] < 0.01 for r in given for n in ("error", "eager error"))
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import kernels_report

    rows = kernels_report.shares(norms, losses)
    kernels = {r["kernel"].split()[0] for r in rows}
    assert names | {"glu", "glu_packed", "cross_entropy", "nf4_dequantize"} <= kernels
    assert kernels_report.wanted("gated after dx+dw") == kernels_report.WANTED["dx+dw"]
    assert all(r["kernel"] in kernels_report.markdown("card", "card", rows) for r in rows)


def test_a_sweep_of_tiles(tmp_path: Path) -> None:
    """Tiles other than the rule's give the rule's results; the last one timed is the rule's."""
    swept = dry("sweep_gated_qk.py", tmp_path / "sweep.json")["sweep"]
    names = {r["name"].replace("qk_norm_rope", "heads").split()[0] for r in swept}
    directions = {r["name"].split()[2 if r["name"].startswith("gated") else 1] for r in swept}
    assert names == {"gated", "heads"} and directions == {"forward", "dx", "dx+dw"}
    assert len(swept) == 5 * 3 * 4  # kernels and shapes, directions, two tiles and the rule twice
    assert swept[-1]["tile"].startswith("-") and not swept[1]["tile"].startswith("-")
