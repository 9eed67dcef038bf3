"""A tiny random model of any language model type of the installed transformers, by its type's name.

The config is the type's default one with every size replaced by a small one: a table names the
fields by what they count, lists with one entry a layer keep one layer of each kind, and few types
need more said. Weights are random; those that start as a constant are perturbed.
"""

from __future__ import annotations

import re
from typing import Any

import models
import torch
from huggingface_hub.errors import StrictDataclassError

VOCAB = 128
# What a type's own code raises where it does not build or train here: a result of the sweep.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
    RuntimeError, TypeError, ValueError, StrictDataclassError,
)  # fmt: skip

# Size -> the fields that have it, as whole names. Widths are 64, heads 4 (2 for keys) of 16.
_SIZES: dict[int, str] = {
    1: "n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace "
    "num_dense_layers num_nextn_predict_layers topk_group",
    2: "num_key_value_heads num_kv_heads num_query_groups swa_num_key_value_heads "
    "linear_num_key_heads index_n_heads n_mamba_heads num_global_key_value_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts num_mem_blocks "
    "index_topk_blocks",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads attention_heads swa_num_attention_heads num_sliding_attention_heads "
    "linear_num_heads linear_num_value_heads num_decoder_attention_heads "
    "num_encoder_attention_heads encoder_num_attention_heads time_step_rank mamba_dt_rank "
    "num_experts num_local_experts n_routed_experts moe_num_experts index_topk",
    8: "qk_rope_head_dim qk_nope_head_dim mamba_d_state ssm_state_size state_size sliding_window "
    "sliding_window_size window_size attention_chunk_size mamba_n_heads mamba_num_heads "
    "attention_window_size laurel_rank gated_norm_rank adapter_rank hidden_size_per_layer_input "
    "hc_lowrank rotary_dim",
    16: "swa_head_dim v_head_dim kv_channels attention_head_dim d_kv dim_head d_head "
    "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim qk_head_dim "
    "mamba_d_head mamba_head_dim mamba_headdim chunk_size mamba_chunk_size global_head_dim "
    "attention_head_size kv_lora_rank moe_latent_size",
    32: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim "
    "expert_intermediate_size q_lora_rank",
    64: "hidden_size d_model n_embd embed_dim dim model_dim word_embed_proj_dim embedding_size "
    "emb_dim embedding_dim encoder_hidden_size input_embedding_size output_embedding_size "
    "hidden_dim out_hidden_size cross_attention_hidden_size attention_hidden_size "
    "moe_hidden_size lru_width projection_dim d_inner proj_dim encoder_dim backbone_hidden_size "
    "entity_embedding_size projector_hidden_size aligner_dim v_hidden_size text_hidden_size "
    "hidden_size_global vision_feature_dim output_dim projector_dim embed_dims mm_hidden_size ple_embed_dim",
    128: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff n_inner "
    "ffn_hidden_size feed_forward_size dense_intermediate_size intermediate_size_mlp "
    "shared_intermediate_size mlp_dim pooling_intermediate_size projector_intermediate_size "
    "projection_intermediate_size mamba_d_ssm",
}
SIZE = {name: size for size, names in _SIZES.items() for name in names.split()}
_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "layers", "depth", "num_decoder_layers", "num_encoder_layers", "num_blocks",
    "depth_decoder_layers",
)  # fmt: skip
_POSITIONS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length",
    "context_length", "max_source_positions", "max_target_positions",
)  # fmt: skip
# Fields whose default is None and that their type then cannot do without.
_NEEDED = {
    "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "n_routed_experts": 4, "sliding_window": 8, "indexer_compress_ratio": 2, "indexer_budget": 8,
    "index_budget": 8, "compress_ratio": 2, "indexer_n_heads": 2, "indexer_kv_heads": 2,
    "indexer_head_dim": 16,
}  # fmt: skip
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_FOREIGN = (
    "transformers_version", "architectures", "model_type", "dtype", "torch_dtype", "id2label",
    "label2id", "problem_type", "return_dict", "output_hidden_states", "output_attentions",
    "is_encoder_decoder", "chunk_size_feed_forward", "num_labels",
)  # fmt: skip
_EVERY_EXPERT = {
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 4),
    **dict.fromkeys(("top_k_experts", "topk", "moe_top_k", "router_top_k"), 4),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    # A sparse attention's indexer chooses tokens (or blocks of them) as a router chooses experts.
    **dict.fromkeys(("index_topk", "index_topk_blocks", "indexer_budget", "index_budget"), 64),
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
_BOTH = {"full_attention": _MROPE, "sliding_attention": _MROPE}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4,
    "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4,
}  # fmt: skip
_TWO_KINDS = {"layer_types": ["full_attention", "sliding_attention"]}

# What a type needs beyond the tables. "text" entries go to the text config where there is one.
SPECIAL: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma4_assistant": {"text": {"hidden_size_per_layer_input": 0}},
    "glm46v": {"text": {"rope_parameters": _MROPE}},
    "glmga": {"text": {"rope_parameters": _MROPE}},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA
    | {"n_mamba_heads": 8, "num_query_groups": 4, "kv_channels": 16, "hybrid_layer_ids": [1, 3]},
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "attention_head_size": 16,
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4,
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "cohere_compass_text": _TWO_KINDS | {"rope_parameters": _BOTH},
    "cohere_compass": {"text": _TWO_KINDS | {"rope_parameters": _BOTH}},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": [128] * 4,
    },
    "glm5_next": {"text": {"num_key_value_heads": 4, "index_topk": 32}},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "deepseek_ocr2": {
        "text": {
            "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2,
            "n_shared_experts": 1, "n_routed_experts": 4, "num_key_value_heads": 4,
        }
    },
    "step3p7": {
        "text": _TWO_KINDS
        | {"sliding_window": 8, "rope_parameters": dict.fromkeys(_BOTH, _PLAIN_ROPE)}
    },
    "ernie4_5_vl_moe": {"text": {"rope_parameters": _MROPE | {"rope_theta": 500000.0}}},
}  # fmt: skip


def names() -> dict[str, str]:
    """Type -> class name: the causal language models, then the vision-language ones as ``x@vlm``.

    A vision-language type whose class the causal mapping has too is listed once.
    """
    import transformers.models.auto.modeling_auto as auto

    found = dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for name, cls in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        if found.get(name) != cls:
            found[name + "@vlm" if name in found else name] = cls
    return {k: v if isinstance(v, str) else v[0] for k, v in found.items()}


def build(name: str, dtype: torch.dtype = torch.float32, every_expert: bool = False) -> Any:
    """A tiny model of type ``name`` in training mode; raises whatever transformers raises.

    Args:
        name: a key of :func:`names`.
        dtype: of the parameters.
        every_expert: choose all experts, and all tokens where an indexer chooses among them, so that
            rounding turns no choice over.
    """
    try:
        return _build(name, dtype, every_expert, {})
    except FAILURES as first:  # mostly a complaint about a field left at None
        try:
            return _build(name, dtype, every_expert, _NEEDED)
        except FAILURES:
            raise first from None


def _build(name: str, dtype: torch.dtype, every_expert: bool, needed: dict[str, int]) -> Any:
    import transformers

    cls = getattr(transformers, names()[name])
    torch.manual_seed(0)
    model = cls(_for_class(config(name, every_expert, needed), cls)).to(dtype)
    model.config.use_cache = False
    models.perturb(model.parameters())
    return model.train()


def _for_class(settings: Any, cls: Any) -> Any:
    """The config that the class takes, which may be a part of the type's."""
    wanted = getattr(cls, "config_class", None)
    if not isinstance(wanted, type) or isinstance(settings, wanted):
        return settings
    return next((v for v in vars(settings).values() if isinstance(v, wanted)), settings)


def config(name: str, every_expert: bool, needed: dict[str, int]) -> Any:
    """The tiny config of type ``name``."""
    from transformers import CONFIG_MAPPING

    kind = name.partition("@")[0]
    cls = CONFIG_MAPPING[kind]
    default = cls()
    given = _shrunk(default, needed, _has_sections(name))
    if not getattr(default, "is_encoder_decoder", False) and hasattr(default, "is_decoder"):
        given["is_decoder"] = True
    special = dict(SPECIAL.get(kind, {}))
    text = special.pop("text", {})
    given.update(special)
    (given["text_config"] if isinstance(given.get("text_config"), dict) else given).update(text)
    if every_expert:
        _choose_all(given)
    return cls(**(given | {"use_cache": False}))


def _choose_all(given: dict[str, Any]) -> None:
    for key, value in given.items():
        if isinstance(value, dict):
            _choose_all(value)
        elif key in _EVERY_EXPERT and isinstance(value, int):
            given[key] = _EVERY_EXPERT[key]


def _has_sections(name: str) -> bool:
    """Whether the type's code reads multi-section rotary parameters that its defaults leave out."""
    import inspect

    import transformers

    try:
        module = inspect.getmodule(getattr(transformers, names()[name]))
        return "mrope_section" in inspect.getsource(module)  # type: ignore[arg-type]
    except (ImportError, OSError, TypeError):
        return False


def _parts(settings: Any) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    named = getattr(type(settings), "sub_configs", {}) or {}
    found = {k: getattr(settings, k, None) for k in named} | vars(settings)
    return {k: v for k, v in found.items() if isinstance(v, PreTrainedConfig)}


def _shrunk(settings: Any, needed: dict[str, int], sections: bool) -> dict[str, Any]:
    """Arguments for the config's class that make a tiny model."""
    values = settings.to_dict()
    parts = _parts(settings)
    depth_key = next((k for k in _DEPTHS if isinstance(values.get(k), int)), "")
    depth = values.get(depth_key, 0)
    layers = _kept_layers(values, depth, parts)
    head = 32 if _narrow_rotary(values) else 16
    out: dict[str, Any] = {}
    for key, value in values.items():
        if key in _FOREIGN or key in parts or key.startswith("_"):
            continue
        if key == "per_layer_config":
            out[key] = _per_layer(value, layers, head)
        elif isinstance(value, (list, tuple)) and depth > 2 and len(value) == depth:
            out[key] = _clipped(key, [value[i] for i in layers])
        elif key in _DEPTHS and isinstance(value, int):
            out[key] = len(layers) if key == depth_key or "coder_layers" in key else min(value, 2)
        elif value is None and key in needed:
            out[key] = needed[key]
        else:
            out[key] = _small(key, value, head, values)
    _rotary(out, head, values, sections)
    for key, part in parts.items():
        out[key] = _shrunk(part, needed, sections) | {"model_type": part.model_type}
    return out


def _kept_layers(values: dict[str, Any], depth: int, parts: dict[str, Any]) -> list[int]:
    """Indices of layers of which each has another kind, at most six, at least two in all."""
    lists = [
        v for k, v in values.items()
        if isinstance(v, (list, tuple)) and depth > 2 and len(v) == depth and k not in parts
        and not all(isinstance(x, float) for x in v)
    ]  # fmt: skip
    if not lists:
        return [0, 1]
    kinds: dict[str, int] = {}
    for i in range(depth):
        kinds.setdefault(str([v[i] for v in lists]), i)
    kept = sorted(kinds.values())[:6]
    kept += [i for i in range(depth) if i not in kept][: max(0, 2 - len(kept))]
    return sorted(kept)


def _clipped(key: str, chosen: list[Any]) -> list[Any]:
    """One entry a layer: counts and widths no larger than the field's size."""
    limit = SIZE.get(key) or next((s for n, s in SIZE.items() if key.startswith(n)), None)
    counts = all(isinstance(v, int) and not isinstance(v, bool) for v in chosen)
    return [limit] * len(chosen) if limit and counts and max(chosen) > limit else chosen


def _per_layer(value: Any, layers: list[int], head: int) -> Any:
    if not value:
        return value
    given = {int(k): v for k, v in value.items()}
    sizes = SIZE | {"head_dim": 2 * head}
    return {
        new: _each({k: sizes.get(k, v) if isinstance(v, int) else v for k, v in own.items()}, own)
        for new, old in enumerate(layers)
        if (own := given.get(old)) is not None
    }


def _each(small: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """One layer's own sizes, with as many key heads as query heads where it had so."""
    heads, keys = "num_attention_heads", "num_key_value_heads"
    return small | {keys: small[heads]} if keys in own and own.get(heads) == own[keys] else small


def _small(key: str, value: Any, head: int, values: dict[str, Any]) -> Any:
    latent = isinstance(values.get("qk_rope_head_dim"), int) and "kv_lora_rank" in values
    if isinstance(value, bool) or value is None:
        return value
    if re.search(r"token_ids?$|token_index$|_index$", key):
        return _token(key, value)
    if re.search("drop", key) and isinstance(value, float):
        return 0.0
    if not isinstance(value, int):
        listed = isinstance(value, (list, tuple)) and value and key in SIZE
        whole = listed and all(isinstance(v, int) for v in value)
        return [min(SIZE[key], v) for v in value] if whole else value
    if latent and key == "head_dim" and value == values["qk_rope_head_dim"]:
        return 8
    if latent and key == "num_key_value_heads" and value == values.get("num_attention_heads"):
        return 4
    if key in ("n_group", "num_expert_group"):
        return min(value, 2)
    limits = {"head_dim": head, "image_size": 28, "patch_size": 14 if value > 8 else value}
    if "vocab_size" in key:
        return min(value, VOCAB)
    if key in _POSITIONS:
        return min(value, 2048)
    if key in limits:
        return limits[key] if key == "head_dim" else min(value, limits[key])
    if key in SIZE and value > 0:
        return SIZE[key] if key == "hidden_size" else min(SIZE[key], value)
    return value


def _token(key: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [min(v, 2 + i) for i, v in enumerate(value)]
    if isinstance(value, int) and key in _SPECIAL:
        return _SPECIAL[key]
    return 120 if isinstance(value, int) and value >= 100 else value


def _factors(value: Any) -> list[float]:
    if not isinstance(value, dict):
        return []
    own = value.get("partial_rotary_factor")
    below = [f for v in value.values() for f in _factors(v)]
    return below + ([own] if isinstance(own, (int, float)) else [])


def _narrow_rotary(values: dict[str, Any]) -> bool:
    """Whether a head of 16 would leave too few rotated features for the type's sections."""
    shares = _factors(values) or [1.0]
    return min(shares) < 0.5 or "mrope_section" in str(values.get("rope_parameters"))


def _rotary(out: dict[str, Any], head: int, values: dict[str, Any], sections: bool) -> None:
    """Rotary parameters that belong to the small head."""
    head = 8 if "qk_rope_head_dim" in values else head
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(out.get(key), dict):
            out[key] = _rotary_parameters(out[key], head)
    given = out.get("rope_parameters")
    plain = isinstance(given, dict) and "rope_type" in given and "mrope_section" not in given
    if plain and sections and "vocab_size" in values:
        half = int((out.get("head_dim") or 16) * min(_factors(values) or [1.0])) // 2
        given["mrope_section"] = _divided([1, 1, 1], half)  # type: ignore[index]


def _rotary_parameters(given: dict[str, Any], head: int) -> dict[str, Any]:
    out = {k: _rotary_parameters(v, head) if isinstance(v, dict) else v for k, v in given.items()}
    half = max(1, int(head * (out.get("partial_rotary_factor") or 1.0)) // 2)
    if out.get("mrope_section"):
        out["mrope_section"] = _divided(out["mrope_section"], half)
    for key in ("short_factor", "long_factor"):
        if isinstance(out.get(key), (list, tuple)):
            out[key] = [1.0 + 0.1 * i for i in range(half)]
    return out


def _divided(weights: list[int], total: int) -> list[int]:
    """``total`` in whole parts, in proportion to ``weights``, none below one."""
    parts = [max(1, w * total // sum(weights)) for w in weights]
    parts[0] += total - sum(parts)
    return parts
