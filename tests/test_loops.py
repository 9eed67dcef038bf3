"""Loops that are written by hand: Lightning Fabric, and PEFT models as users keep changing them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import real_text
import torch
import training

import fusewright

FRESH = """
import sys, torch
from peft import PeftModel
import models, real_text, training
model = PeftModel.from_pretrained(real_text.model(), sys.argv[1], is_trainable=True).train()
torch.save(training.train_step(model, real_text.batch()), sys.argv[2])
assert "fusewright" not in sys.modules
"""


@pytest.mark.parametrize(
    "precision", [pytest.param("32-true", marks=pytest.mark.slow), "bf16-mixed"]
)
def test_fabric(precision: str) -> None:
    fabric_module = pytest.importorskip("lightning_fabric")
    curves = []
    for optimised in (True, False):
        fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision=precision)
        model = real_text.model()
        if optimised:
            fusewright.optimize(model, lowering="fx")
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        losses = []
        for step in range(4):
            loss = wrapped(**real_text.batch(step)).loss
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
        if optimised:
            assert fusewright.report(wrapped).counts["rms_norm"] == 2 * models.LAYERS + 1
    tolerance = 1e-5 if precision == "32-true" else torch.finfo(torch.bfloat16).eps
    assert curves[0] == pytest.approx(curves[1], rel=tolerance)


def _config(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0} | settings
    )


def _adapted(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    torch.manual_seed(1)  # LoRA's A
    adapted = get_peft_model(model, config)
    models.perturb(p for p in adapted.parameters() if p.requires_grad)
    return adapted.train()


KINDS: dict[str, Callable[[], Any]] = {
    "lora": _config,
    "rslora": lambda: _config(use_rslora=True, r=8),
    "pissa": lambda: _config(init_lora_weights="pissa"),
    "some layers, some trained whole": lambda: _config(
        target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["lm_head"]
    ),
    "ranks by layer": lambda: _config(
        rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, target_modules=["q_proj", "v_proj"]
    ),
}


@pytest.mark.parametrize(
    ("kind", "when"),
    [("lora", "before"), ("rslora", "after")]
    + [
        pytest.param(kind, when, marks=pytest.mark.slow)
        for kind in KINDS
        for when in ("before", "after")
        if (kind, when) not in (("lora", "before"), ("rslora", "after"))
    ],
)
def test_adapters_of_a_kind(kind: str, when: str) -> None:
    ours, eager = real_text.model(), _adapted(real_text.model(), KINDS[kind]())
    if when == "before":
        fusewright.optimize(ours, lowering="fx")
    ours = _adapted(ours, KINDS[kind]())
    if when == "after":
        fusewright.optimize(ours, lowering="fx")
    for seed in range(2):
        batch = real_text.batch(seed)
        training.assert_same_step(
            training.train_step(ours, batch), training.train_step(eager, batch), what=kind
        )
    layers = sum(hasattr(m, "lora_A") for m in eager.modules())
    assert fusewright.report(ours).counts["lora"] == layers


def _same(ours: Any, eager: Any, what: str, seed: int = 0) -> None:
    batch = real_text.batch(seed)
    training.assert_same_step(
        training.train_step(ours, batch), training.train_step(eager, batch), what=what
    )


def test_adapters_are_added_switched_disabled_and_merged() -> None:
    eager = _adapted(real_text.model(), _config())
    ours = fusewright.optimize(_adapted(real_text.model(), _config()), lowering="fx")
    _same(ours, eager, "one adapter")
    for model in (ours, eager):
        torch.manual_seed(2)
        model.add_adapter("other", _config(r=2, target_modules=["q_proj", "up_proj"]))
        models.perturb(p for n, p in model.named_parameters() if ".other." in n)
        model.set_adapter("other")
    _same(ours, eager, "another one")
    for model in (ours, eager):
        model.set_adapter("default")
    _same(ours, eager, "back again", seed=1)
    for model in (ours, eager):
        model.base_model.set_adapter(["default", "other"])
    _same(ours, eager, "both at once")
    for model in (ours, eager):
        model.set_adapter("default")
        model.merge_adapter()
        model.unmerge_adapter()
    training.assert_same_step(
        training.train_step(ours, real_text.batch()),
        training.train_step(eager, real_text.batch()),
        tolerance=1e-4,  # merging and unmerging rounds the weights, in both alike
    )
    outputs = []
    for model in (ours, eager):
        with model.disable_adapter(), torch.no_grad():
            outputs.append(model(**real_text.batch()).loss)
    torch.testing.assert_close(*outputs)
    whole = [m.merge_and_unload().train() for m in (ours, eager)]
    for model in whole:
        for p in model.parameters():
            p.requires_grad_(True)
    _same(*whole, "merged")


def test_saved_adapters_load_in_a_process_without_fusewright(tmp_path: Path) -> None:
    ours = fusewright.optimize(_adapted(real_text.model(), _config(use_rslora=True)), lowering="fx")
    optimizer = torch.optim.SGD((p for p in ours.parameters() if p.requires_grad), lr=0.1)
    ours(**real_text.batch(3)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ours.save_pretrained(tmp_path / "adapter")
    tests = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "adapter"), str(tmp_path / "step.pt")],
        cwd=tests,
        env={**os.environ, "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fresh = torch.load(tmp_path / "step.pt", weights_only=False)
    training.assert_same_step(training.train_step(ours, real_text.batch()), fresh)
