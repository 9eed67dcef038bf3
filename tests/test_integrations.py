"""The Trainer's loggers get Fusewright's numbers; ``torch.compile`` finds the backend by name."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import real_text
import torch
import training

import fusewright
from fusewright.dynamo import Backend, backend

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {"coverage", "tokens_per_second", "mfu", "peak_memory_gib", "predicted_peak_gib"}


def _trainer(folder: Path, model: Any, report_to: list[str]) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=report_to,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    return Trainer(model, settings, train_dataset=real_text.Bytes(8))


def _tensorboard(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_numbers_reach_tensorboard_and_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    wandb = pytest.importorskip("wandb")
    from fusewright.integrations import GIB, TrainingLog

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    model = fusewright.optimize(real_text.model(), lowering="fx", memory_budget="1GiB")
    trainer = _trainer(tmp_path / "run", model, ["tensorboard", "wandb"])
    log = TrainingLog(peak_flops=1e12)
    assert log.add_to(trainer) is trainer
    trainer.train()
    summary = dict(wandb.run.summary)  # the last value of each series
    wandb.finish()
    assert list(tmp_path.rglob("*.wandb"))
    written = _tensorboard(tmp_path / "run")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for name in NUMBERS:
        key = f"fusewright/{name}"
        told = [line[key] for line in lines if key in line]
        (tag,) = [t for t in written if t.endswith(key)]
        assert written[tag] == pytest.approx(told), name
        assert all(value > 0 for value in told) and len(told) >= 3, name
    assert summary["train/loss"] == lines[-1]["loss"]
    for name in NUMBERS:
        assert summary[f"train/fusewright/{name}"] == lines[-1][f"fusewright/{name}"]
    report = fusewright.report(model)
    line = lines[-1]
    assert line["fusewright/coverage"] == report.coverage
    assert report.predicted_peak is not None and 0 < report.predicted_peak < GIB
    assert line["fusewright/predicted_peak_gib"] == report.predicted_peak / GIB
    assert f"predicted peak {int(report.predicted_peak)} " in " ".join(report.notes)
    flops = report.totals["flops"] / (2 * 32)
    assert line["fusewright/mfu"] == pytest.approx(
        line["fusewright/tokens_per_second"] * flops / 1e12
    )
    assert not model._forward_pre_hooks


def test_a_predicted_peak_that_is_given() -> None:
    from fusewright.integrations import GIB, TrainingLog

    log, logs = TrainingLog(predicted_peak=GIB / 2), {"loss": 1.0}
    log._start_again()
    log.on_log(None, SimpleNamespace(log_history=[]), None, logs)
    assert logs["fusewright/predicted_peak_gib"] == 0.5


def test_a_model_that_is_not_optimised(tmp_path: Path) -> None:
    from fusewright.integrations import TrainingLog

    trainer = _trainer(tmp_path, real_text.model(), [])
    TrainingLog().add_to(trainer)
    with pytest.raises(ValueError, match="not optimised"):
        trainer.train()


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fusewright.integrations", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fusewright\[hf\]'"):
        importlib.import_module("fusewright.integrations")


@pytest.mark.parametrize("lora", [False, True])
def test_a_backend_of_torch_compile(lora: bool) -> None:
    eager = real_text.model()
    eager = models.with_lora(eager) if lora else eager
    ours = models.twin(eager)
    compiler = Backend(lowering="fx")
    compiled = torch.compile(ours, backend=compiler)
    for seed in range(2):
        batch = real_text.batch(seed)
        got = training.train_step(compiled, batch)
        got = training.Step(
            got.loss, {n.removeprefix("_orig_mod."): g for n, g in got.grads.items()}
        )
        training.assert_same_step(got, training.train_step(eager, batch))
    wanted = models.expected_counts("llama") | ({"lora": 7 * models.LAYERS} if lora else {})
    del wanted["linear_cross_entropy"]  # the logits are an output of the graph
    wanted["add_rms_norm"] = 2 * models.LAYERS  # sums and norms meet across layers too
    report = compiler.report()
    assert {n: report.counts.get(n) for n in wanted} == wanted, str(report)
    assert not report.notes and report.totals["flops"] > 0
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).loss, eager(**batch).loss)


def test_the_backends_options() -> None:
    graph = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="max-autotune"):
        backend(graph, [], mode="max-autotune")
    with pytest.raises(TypeError, match="patern"):
        backend(graph, [], options={"patern": ["rope"]})
    with pytest.raises(ValueError, match="rope2"):
        Backend(patterns=["rope2"])


_BY_NAME = """
import torch, models, training
assert "fusewright" in torch._dynamo.list_backends()
eager = models.build("llama")
compiled = torch.compile(models.twin(eager), backend="fusewright", options={"lowering": "fx"})
got = training.train_step(compiled, models.batch())
got = training.Step(got.loss, {n.removeprefix("_orig_mod."): g for n, g in got.grads.items()})
training.assert_same_step(got, training.train_step(eager, models.batch()))
"""


def test_the_backend_is_found_by_name(tmp_path: Path) -> None:
    """Through the entry point that pyproject.toml declares, as an installed package's is."""
    lines = (ROOT / "pyproject.toml").read_text().split("[project.entry-points.", 1)[1]
    group, entry = lines.split("]\n", 1)[0], lines.split("\n", 2)[1]
    info = tmp_path / "declared-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    paths = (tmp_path, ROOT / "src", ROOT / "tests")
    done = subprocess.run(
        [sys.executable, "-c", _BY_NAME],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
