"""Tiny random models of many architectures, their adapters and their batches.

Every model is built from a config alone: nothing is downloaded. Parameters that start as a constant
(norm weights at one, biases and LoRA's B at zero) are perturbed, or a wrong gradient of theirs
would go unseen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

VOCAB = 128
HIDDEN = 64
LAYERS = 2
_PAD = 0

# The names that most configs share; an architecture's own entry adds to them or replaces them.
_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": _PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,  # with 64 columns, activations of order one
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_head": 4,
    "n_positions": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_BLOOM = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}

# One line on why each is here: what it computes that the others do not.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # the plain case: RMSNorm, half-rotation RoPE, SwiGLU
    "llama": {},
    # norms on the heads of q and k
    "qwen3": {},
    # 1 + w norms in fp32, GELU gate, both softcaps, norms after attention and MLP, tied embeddings
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8},
    # two rotary bases, six norms a layer
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # fused qkv and fused gate_up
    "phi3": {},
    # partial and interleaved RoPE, fused gate_up, four norms a layer
    "glm4": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    # a LayerNorm with no bias, interleaved RoPE, scaled logits, parallel residual
    "cohere": {"logit_scale": 0.25},
    # LayerNorm, quarter RoPE, a plain MLP, parallel residual
    "gpt_neox": {"hidden_act": "gelu"},
    # learned positions, Conv1D projections
    "gpt2": _GPT2,
    # complex-number RoPE, L2 norms on q and k, sigmoid top-1 experts in one batched product
    "llama4_text": {
        "intermediate_size_mlp": 2 * HIDDEN,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 64,
        "no_rope_layers": [1, 0],
        "pad_token_id": None,
    },
    # latent attention, interleaved RoPE on a part of the head, grouped experts and a shared one
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    # attention sinks, clamped gate with interleaved gate and up, YaRN
    "gpt_oss": {
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # softmax experts
    "qwen3_moe": {
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    # attention beside a state-space mixer, a gated norm, multipliers everywhere
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
        "mamba_rms_norm": True,
        "key_multiplier": 0.5,
        "lm_head_multiplier": 0.5,
    },
    # ALiBi, a LayerNorm on the embeddings
    "bloom": _BLOOM,
}
NAMES = tuple(ARCHITECTURES)

# Instances per layer, and beside the layers, of what must be rewritten. RoPE counts each rotated
# tensor, so q and k of one layer are two.
FIRED = {
    "llama": {"rms_norm": (2, 1), "add_rms_norm": (1, 0), "rope": (2, 0), "glu": (1, 0)},
    "qwen3": {"rms_norm": (4, 1), "add_rms_norm": (1, 0), "rope": (2, 0), "glu": (1, 0)},
    "gemma2": {"rms_norm": (4, 1), "add_rms_norm": (1, 0), "rope": (2, 0), "glu": (1, 0)},
    "gemma3_text": {"rms_norm": (6, 1), "add_rms_norm": (1, 0), "rope": (2, 0), "glu": (1, 0)},
    "phi3": {"rms_norm": (2, 1), "add_rms_norm": (1, 0), "rope": (2, 0), "glu": (1, 0)},
    "glm4": {"rms_norm": (4, 1), "add_rms_norm": (1, 0), "rope": (2, 0), "glu": (1, 0)},
}

# Rounding may turn a top-k choice over, and then a comparison of rounding errors says nothing:
# here every expert is chosen, and all the rest is computed as before.
_EVERY_EXPERT = {
    "llama4_text": {"num_experts_per_tok": 4},
    "deepseek_v3": {"num_experts_per_tok": 4, "n_group": 1, "topk_group": 1},
    "gpt_oss": {"num_experts_per_tok": 4},
    "qwen3_moe": {"num_experts_per_tok": 4},
}

# PEFT's "all-linear" wraps routers and stacked expert parameters too, and Mamba projections refuse
# adapters; there the adapters sit on attention alone.
_ATTENTION_ONLY = {
    "llama4_text": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "falcon_h1": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def expected_counts(name: str, layers: int = LAYERS) -> dict[str, int]:
    """How often each pattern must be rewritten in ``build(name, layers)``."""
    counts = {p: each * layers + more for p, (each, more) in FIRED[name].items()}
    return counts | {"linear_cross_entropy": 1}


def config(name: str, layers: int = LAYERS, every_expert: bool = False, **overrides: Any) -> Any:
    """A tiny config of model type ``name``; ``overrides`` go to the config class."""
    from transformers import AutoConfig

    own = ARCHITECTURES[name]
    alone = own is _GPT2 or own is _BLOOM
    given = dict(own) if alone else {**_SHARED, **own}
    given["n_layer" if alone else "num_hidden_layers"] = layers
    for key in ("layer_types", "no_rope_layers"):
        if key in given:
            given[key] = [given[key][i % 2] for i in range(layers)]
    if every_expert:
        given |= _EVERY_EXPERT.get(name, {})
    return AutoConfig.for_model(name, **(given | overrides))


def build(
    name: str,
    layers: int = LAYERS,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    every_expert: bool = False,
    **overrides: Any,
) -> Any:
    """A tiny causal language model in training mode, its parameters drawn from ``seed``."""
    from transformers import AutoModelForCausalLM

    settings = config(name, layers, every_expert, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    perturb(model.parameters(), seed)
    return model.train()


def perturb(parameters: Iterable[nn.Parameter], seed: int = 0) -> None:
    """Add noise to each parameter whose entries are all equal."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in parameters:
            if p.is_floating_point() and p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                p += 0.1 * torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def with_lora(
    model: Any, dtype: torch.dtype = torch.float32, dropout: float = 0.0, *, rank: int = 4
) -> Any:
    """The model under PEFT LoRA with adapters in ``dtype``, B perturbed from its zeros."""
    from peft import LoraConfig, get_peft_model

    targets = _ATTENTION_ONLY.get(model.config.model_type, "all-linear")
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets, bias="none"
    )
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.data = p.data.to(dtype)
    perturb(trained)
    return adapted.train()


def batch(seed: int = 0, rows: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    """Token ids and labels (rows, length) int64; a prompt's labels are ignored (-100)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, : length // 4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def twin(model: Any) -> Any:
    """An equal model that shares nothing with the first."""
    return copy.deepcopy(model)
