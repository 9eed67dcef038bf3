"""The workloads of the training-step benchmark: shapes, batches, and what a card must hold.

W1  Llama-3.2-1B's shape, LoRA r = 16 on the seven projections, 4 x 2048 tokens, no recompute
W2  Llama-3.1-8B's shape, the same LoRA, 2 x 2048 tokens, gradient checkpointing; W2n without
W3  W1's model, every parameter trained
W4  W2 over NF4 double-quantised weights (QLoRA)
N   OLMo-1B's shape, LoRA as W1: an architecture that neither Liger nor Unsloth has patched
C   two layers of W1's shape, A and B random, 2 x 1024: gradients against a float32 model's
L, F  60 M parameters for a CPU, in float32: LoRA and full fine-tuning

Weights are random (seeded N(0, 0.02), norms 1), ids are random, labels = ids, attention is SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

_LLAMA_1B = {
    "rms_norm_eps": 1e-5,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
_LLAMA_8B = {
    "rms_norm_eps": 1e-5,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
_OLMO_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 8192,
    "vocab_size": 50304,
    "tie_word_embeddings": True,
}
_LLAMA_60M = {
    "rms_norm_eps": 1e-5,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1792,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
_TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 512,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Work:
    """One workload.

    Attributes:
        family: the model type of transformers.
        shape: the config's sizes.
        mode: "lora", "qlora" or "full".
        batch: (rows, tokens a row).
        checkpoint: gradient checkpointing of every layer.
        resting: GiB that a process holds between steps, its CUDA context included; an estimate.
        peak: GiB that it holds at most, with logits and without them (a fused loss); estimates.
        weight: its share of the time, relative to W1's.
        dtype: of the weights.
    """

    name: str
    family: str
    shape: dict[str, Any]
    mode: str
    batch: tuple[int, int]
    checkpoint: bool
    resting: float
    peak: tuple[float, float]
    weight: float = 1.0
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch[0] * self.batch[1]


_ALL = (
    Work("W1", "llama", _LLAMA_1B, "lora", (4, 2048), False, 4, (30, 17)),
    Work("W2", "llama", _LLAMA_8B, "lora", (2, 2048), True, 18, (26, 21), 1.6),
    Work("W2n", "llama", _LLAMA_8B, "lora", (2, 2048), False, 18, (46, 37), 1.4),
    Work("W3", "llama", _LLAMA_1B, "full", (4, 2048), False, 9, (36, 21)),
    Work("W4", "llama", _LLAMA_8B, "qlora", (2, 2048), True, 8, (24, 20), 1.7),
    Work("N", "olmo", _OLMO_1B, "lora", (4, 2048), False, 4, (26, 17)),
    Work(
        "C", "llama", _LLAMA_1B | {"num_hidden_layers": 2}, "lora", (2, 1024), False, 2, (8, 6), 0.7
    ),
    Work("L", "llama", _LLAMA_60M, "lora", (2, 64), False, 1, (2, 2), 1.0, "float32"),
    Work("F", "llama", _LLAMA_60M, "full", (2, 64), False, 2, (3, 3), 1.0, "float32"),
)
WORK = {work.name: work for work in _ALL}


def workload(name: str, tiny: bool = False) -> Work:
    """The workload of that name; ``tiny`` shrinks it so that a CPU runs the whole benchmark."""
    if name not in WORK:
        raise ValueError(f"unknown workload {name!r}; there are {', '.join(WORK)}")
    work = WORK[name]
    if not tiny:
        return work
    shape = work.shape | _TINY
    if "head_dim" in shape:
        shape["head_dim"] = 32
    return replace(work, shape=shape, batch=(2, 32))


def linears(work: Work) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many of them a layer has) of one layer's projections."""
    s = work.shape
    hidden, wide = s["hidden_size"], s["intermediate_size"]
    head = s.get("head_dim", hidden // s["num_attention_heads"])
    queries, keys = s["num_attention_heads"] * head, s["num_key_value_heads"] * head
    return [
        (hidden, queries, 1),
        (hidden, keys, 2),
        (queries, hidden, 1),
        (hidden, wide, 2),
        (wide, hidden, 1),
    ]


def base(peer: str) -> str:
    """The peer without its options and without +amp: ours:lowering=fx -> ours."""
    return "+".join(p for p in peer.split(":")[0].split("+") if p != "amp")


def options(peer: str) -> dict[str, str]:
    """ours:lowering=fx:verify=off -> {"lowering": "fx", "verify": "off"}."""
    return dict(part.split("=", 1) for part in peer.split(":")[1:])
