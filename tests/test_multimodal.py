"""Vision-language and audio stacks: what matches is rewritten in every tower, the rest runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import training

import fusewright

IMAGE_TOKEN, VOCAB = 120, models.VOCAB
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _image_and_text() -> tuple[Any, dict[str, torch.Tensor]]:
    """A vision tower, a projector and a language model; four image tokens stand for the patches."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Model

    config = LlavaConfig(
        text_config=LlamaConfig(**_TEXT),
        vision_config=CLIPVisionConfig(**_VISION),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    batch = models.batch()
    batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] != IMAGE_TOKEN, 3)
    batch["input_ids"][:, 1:5] = IMAGE_TOKEN
    batch["labels"][:, 1:5] = -100
    batch["pixel_values"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    return Model(config), batch


def _audio_and_text() -> tuple[Any, dict[str, torch.Tensor]]:
    """An encoder of spectrograms and a decoder with cross-attention."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        dropout=0.0,
    )
    batch = models.batch()
    sound = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(4))
    return WhisperForConditionalGeneration(config), {
        "input_features": sound,
        "labels": batch["labels"],
    }


STACKS: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    # two norms and the tower's own two LayerNorms a layer; the tower's first and last norm
    "image": (_image_and_text, {"rms_norm": 5, "rope": 4, "glu": 2, "layer_norm": 4}),
    # two LayerNorms in each layer of the encoder and three in each of the decoder
    "audio": (_audio_and_text, {"layer_norm": 10}),
}


def _step(model: Any, batch: dict[str, torch.Tensor]) -> training.Step:
    """A step without the gradients that are zero in exact arithmetic: of biases on keys."""
    step = training.train_step(model, batch)
    return training.Step(
        step.loss, {n: g for n, g in step.grads.items() if not n.endswith("k_proj.bias")}
    )


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_trains_as_in_eager(stack: str) -> None:
    build, least = STACKS[stack]
    torch.manual_seed(0)
    eager, batch = build()
    models.perturb(eager.parameters())
    eager.train()
    ours = fusewright.optimize(models.twin(eager), lowering="fx")
    for _ in range(2):
        training.assert_same_step(_step(ours, batch), _step(eager, batch))
    report = fusewright.report(ours)
    report.require(**least)
    assert not report.eager_now
    ours.eval(), eager.eval()
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, eager(**batch).logits)
