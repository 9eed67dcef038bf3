"""Adapters that are no LoRA beside a linear layer: they train as before, and are not taken for it."""

from __future__ import annotations

from typing import Any

import models
import peft
import pytest
import training

import fusewright

ALL = "all-linear"
Q_ONLY = ["q_proj"]
# name -> (model, settings, layers that are plain LoRA)
VARIANTS: dict[str, tuple[str, Any, int]] = {
    "embedding": ("llama", peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), 2),
    "conv1d": ("gpt2", peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True), 0),
    "rank beyond the layer": ("llama", peft.LoraConfig(r=96, target_modules=["k_proj"]), 0),
    "dora": ("llama", peft.LoraConfig(r=4, use_dora=True, target_modules=ALL), 0),
    "biased": ("llama", peft.LoraConfig(r=4, lora_bias=True, target_modules=ALL), 0),
    "vera": ("llama", peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]), 0),
    "loha": ("llama", peft.LoHaConfig(r=4, target_modules=["q_proj", "up_proj"]), 0),
    "ia3": ("llama", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), 0),
    "prompt": ("llama", peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), 0),
    "replicated layers": (
        "llama",
        peft.LoraConfig(r=4, layer_replication=[[0, 2], [1, 2]], target_modules=Q_ONLY),
        3,
    ),
    "trained modules": (
        "llama",
        peft.LoraConfig(r=4, modules_to_save=["lm_head", "v_proj"], target_modules=Q_ONLY),
        2,
    ),
    "trained tokens": (
        "llama",
        peft.LoraConfig(r=4, trainable_token_indices=[1, 2], target_modules=Q_ONLY),
        2,
    ),
}
NO_BASE = "no linear layer's output is added to the adapter's"
# name -> (why the report says that they stay as they are, of how many layers)
REASONS = {
    "conv1d": (NO_BASE, 2),
    "rank beyond the layer": ("the waist of 96 is not narrower than the layer, 32 x 64", 2),
    "dora": (NO_BASE, 18),  # once for its result, once for the norm of the weight
    "biased": ("the adapter's maps have a bias of their own", 14),
    "vera": ("the adapter scales what lies between its two maps", 4),
    "loha": ("a function of its own puts the weight together; it is not two maps in a row", 4),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_trains_as_before(name: str) -> None:
    architecture, settings, layers = VARIANTS[name]
    eager = peft.get_peft_model(models.build(architecture), settings).train()
    models.perturb([p for p in eager.parameters() if p.requires_grad])
    ours = fusewright.optimize(models.twin(eager), lowering="fx")
    batch = models.batch()
    training.assert_same_step(training.train_step(ours, batch), training.train_step(eager, batch))
    assert fusewright.report(ours).counts.get("lora", 0) == layers
    missed = [r for r in fusewright.report(ours).rows if r.pattern == "lora" and r.reason]
    reason, count = REASONS.get(name, ("", 0))
    assert all(reason and reason in r.reason for r in missed)
    assert sum(r.count for r in missed) == count
