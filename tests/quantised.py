"""Tiny models over bitsandbytes' weights, and the dense models that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import models
import torch
from bitsandbytes import functional as bnb_functional
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Form:
    """How the linears of a model are quantised; bits 16 is not at all, with the same values."""

    kind: str = "nf4"
    double: bool = True
    blocksize: int = 64
    compute: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    bits: int = 4

    def weight(self, weight: torch.Tensor) -> Any:
        """The 4-bit parameter."""
        made = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            quant_type=self.kind,
            compress_statistics=self.double,
            blocksize=self.blocksize,
        )
        return made.to("cpu")

    def linear(self, dense: nn.Linear) -> nn.Module:
        """The layer in place of a dense one."""
        shape = (dense.in_features, dense.out_features)
        if self.bits == 8:
            made: Any = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(
                dense.weight.data.clone(), requires_grad=False, has_fp16_weights=False
            )
            return made.to("cpu")
        packed = self.weight(dense.weight.data)
        if self.bits == 16:
            value = bnb_functional.dequantize_4bit(packed.data, packed.quant_state)
            made = nn.Linear(*shape, bias=False, dtype=self.dtype)
            made.weight.data = value.to(self.compute).to(self.dtype)
            return made.requires_grad_(False)
        made = bnb.nn.Linear4bit(
            *shape,
            bias=False,
            compute_dtype=self.compute,
            compress_statistics=self.double,
            quant_type=self.kind,
        )
        made.weight = packed
        return made.to("cpu")


def build(
    form: Form, dropout: float = 0.0, thin: torch.dtype = torch.float32, layers: int = 2
) -> Any:
    """A few layers under PEFT, adapters on all linears; of one seed whatever the form."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=models.VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).to(form.dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, form.linear(module))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = form.bits == 4, form.bits == 8
    settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.to(thin)
    models.perturb(trained)
    return adapted.train()
