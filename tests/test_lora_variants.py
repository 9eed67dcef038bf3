"""Adapters that are no LoRA beside a linear layer: they train as before, and are not taken for it."""

from __future__ import annotations

from typing import Any

import models
import peft
import pytest
import training

import fusewright

ALL = "all-linear"
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
