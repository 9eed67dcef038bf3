"""transformers' Trainer: the same logs, metrics, predictions and weights as without Fusewright."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import real_text
import torch

import fusewright

BF16 = torch.finfo(torch.bfloat16).eps
STEPS, ACCUMULATION = 6, 2


def _metrics(predicted: Any) -> dict[str, float]:
    """From the logits themselves: accuracy, and perplexity in float64."""
    logits, labels = predicted.predictions[:, :-1].astype(np.float64), predicted.label_ids[:, 1:]
    kept = labels != -100
    logits = logits - logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.where(kept, labels, 0)[..., None], -1)[..., 0]
    return {
        "accuracy": float((logits.argmax(-1) == labels)[kept].mean()),
        "perplexity": float(np.exp(-picked[kept].mean())),
    }


def _trainer(model: Any, folder: Path, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "optim": "sgd",
        "learning_rate": 0.1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **(given | settings)),
        train_dataset=real_text.Bytes(32),
        eval_dataset=real_text.Bytes(6, offset=40),
        compute_metrics=_metrics,
    )


def _logs(trainer: Any) -> dict[str, list[float]]:
    """The logged series of what does not depend on the clock."""
    names = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_perplexity")
    history = trainer.state.log_history
    return {n: found for n in names if (found := [h[n] for h in history if n in h])}


def _assert_same_logs(ours: Any, eager: Any, tolerance: float) -> None:
    got, wanted = _logs(ours), _logs(eager)
    assert got.keys() == wanted.keys() and len(wanted["loss"]) == STEPS
    for name, series in wanted.items():
        np.testing.assert_allclose(got[name], series, rtol=tolerance, err_msg=name)
    assert all(math.isfinite(v) for v in wanted["loss"])


def _assert_same_weights(ours: Any, eager: Any, tolerance: float) -> None:
    for (name, a), b in zip(ours.state_dict().items(), eager.state_dict().values(), strict=True):
        assert float((a - b).norm() / b.norm()) <= tolerance, name


def _both(folder: Path, lora: bool = False, **settings: Any) -> tuple[Any, Any]:
    """(ours, eager's) trainers over equal models, both trained."""
    trainers = []
    for name in ("ours", "eager"):
        model = real_text.model()
        if lora:
            model = models.with_lora(model)
        if name == "ours":
            fusewright.optimize(model, lowering="fx")
        trainer = _trainer(model, folder / name, **settings)
        trainer.train()
        trainers.append(trainer)
    return trainers[0], trainers[1]


def test_accumulation_evaluation_and_predictions(tmp_path: Path) -> None:
    ours, eager = _both(tmp_path, eval_strategy="steps", eval_steps=2)
    assert eager.model_accepts_loss_kwargs and ours.model_accepts_loss_kwargs
    _assert_same_logs(ours, eager, 1e-5)
    _assert_same_weights(ours.model, eager.model, 1e-5)
    assert len(_logs(eager)["eval_accuracy"]) == STEPS // 2
    a, b = (t.predict(real_text.Bytes(4, offset=60)) for t in (ours, eager))
    np.testing.assert_allclose(a.predictions, b.predictions, rtol=1e-4, atol=1e-4)
    assert a.metrics["test_accuracy"] == b.metrics["test_accuracy"]
    assert fusewright.report(ours.model).counts == models.expected_counts("llama")


def test_bf16(tmp_path: Path) -> None:
    """Under autocast, within one rounding of bf16; exactness against float64 is test_parity's."""
    ours, eager = _both(tmp_path, bf16=True)
    _assert_same_logs(ours, eager, BF16)
    wanted = models.expected_counts("llama")
    del wanted["add_rms_norm"]  # autocast adds a bf16 branch to a float32 residual
    assert fusewright.report(ours.model).counts == wanted


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_checkpointing_with_adapters(tmp_path: Path, reentrant: bool) -> None:
    ours, eager = _both(
        tmp_path,
        lora=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    _assert_same_logs(ours, eager, 1e-5)
    _assert_same_weights(ours.model, eager.model, 1e-5)
    assert fusewright.report(ours.model).counts["lora"] == 7 * models.LAYERS


@pytest.mark.parametrize("optimised_first", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_that_is_resumed(tmp_path: Path, optimised_first: bool) -> None:
    """Interrupted after half the steps and resumed in a new model, by the other kind of run too."""
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    whole = _trainer(real_text.model(), tmp_path / "whole", **settings)
    whole.train()
    saving = settings | {"save_strategy": "steps", "save_steps": STEPS // 2}
    for name, optimised in (("first", optimised_first), ("second", True)):
        model = real_text.model(seed=0 if name == "first" else 9)
        if optimised:
            fusewright.optimize(model, lowering="fx")
        trainer = _trainer(model, tmp_path / "run", **saving)
        if name == "first":
            trainer.train()
            continue
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{STEPS // 2}"))
    assert trainer.state.global_step == STEPS
    _assert_same_logs(trainer, whole, 1e-4)
    _assert_same_weights(trainer.model, whole.model, 1e-4)
    assert fusewright.report(trainer.model).counts == models.expected_counts("llama")


def test_a_loss_function_of_the_users_own(tmp_path: Path) -> None:
    """``compute_loss_func`` gets the outputs and reads their logits."""

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        flat = outputs.logits[:, :-1].flatten(0, 1).float()
        summed = torch.nn.functional.cross_entropy(
            flat, labels[:, 1:].flatten(), reduction="sum", label_smoothing=0.1
        )
        return summed / num_items_in_batch

    trainers = []
    for optimised in (True, False):
        model = real_text.model()
        if optimised:
            fusewright.optimize(model, lowering="fx")
        trainer = _trainer(model, tmp_path / str(optimised))
        trainer.compute_loss_func = loss
        trainer.train()
        trainers.append(trainer)
    _assert_same_logs(trainers[0], trainers[1], 1e-5)
