"""The floor of a workload's step: its GEMMs at the rates measured now, its attention as measured.

Products of a token with N_L weights of the layers' projections and N_h of the head, forward and
dX: 4 (N_L + N_h) FLOP a token for LoRA; a checkpoint repeats the layers' forward; full fine-tuning
adds dW. Attention is timed as it runs, causal and grouped, forward and backward. Full fine-tuning
adds AdamW's bytes: gradient read, weight and two states read and written, 14 bytes a bf16 parameter.

Left out: everything element by element, the norms, the loss's softmax, LoRA's side products (1 % of
the FLOP), dequantisation. So the floor is not reachable; it bounds what can be gained.
"""

from __future__ import annotations

from typing import Any

import torch
from roofline import copy_bandwidth, milliseconds
from step_work import Work, linears


def _gemm(tokens: int, inputs: int, outputs: int, full: bool) -> dict[str, float]:
    """Milliseconds of y = x W^T, dx = dy W and, if wanted, dW = dy^T x, all bf16."""
    make: Any = {"device": "cuda", "dtype": torch.bfloat16}
    x, w = torch.randn(tokens, inputs, **make), torch.randn(outputs, inputs, **make) * 0.02
    dy = torch.randn(tokens, outputs, **make)
    out = {
        "forward": milliseconds(lambda: torch.nn.functional.linear(x, w), 11),
        "dx": milliseconds(lambda: dy @ w, 11),
    }
    if full:
        out["dw"] = milliseconds(lambda: dy.t() @ x, 11)
    return out


def _attention(work: Work) -> dict[str, float]:
    """Milliseconds of one layer's causal attention, forward alone and with its backward."""
    s, (rows, length) = work.shape, work.batch
    heads, keys = s["num_attention_heads"], s["num_key_value_heads"]
    wide = s.get("head_dim", s["hidden_size"] // heads)
    q, k, v = (
        torch.randn(rows, n, length, wide, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, keys, keys)
    )
    up = torch.randn_like(q)

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    def both() -> None:
        forward().backward(up)

    return {"forward": milliseconds(forward, 11), "both": milliseconds(both, 11)}


def measure(work: Work) -> dict[str, Any]:
    """The floor in milliseconds, its parts, and the rate of every product in TFLOP/s."""
    tokens, full = work.tokens, work.mode == "full"
    layers, vocabulary = work.shape["num_hidden_layers"], work.shape["vocab_size"]
    passes = {"forward": 2 if work.checkpoint else 1, "dx": 1, "dw": 1}
    gemm = flop = 0.0
    rates: dict[str, dict[str, int]] = {}
    head = (work.shape["hidden_size"], vocabulary, 1)
    for inputs, outputs, count in [*linears(work), head]:
        each = 2.0 * tokens * inputs * outputs
        at_head = (inputs, outputs, count) == head
        times = _gemm(tokens, inputs, outputs, full)
        rates[f"{tokens}x{inputs}x{outputs}"] = {k: round(each / t / 1e9) for k, t in times.items()}
        for way, time in times.items():
            runs = (1 if at_head else layers * passes[way]) * count
            gemm += runs * time
            flop += runs * each
    attention = _attention(work)
    attending = layers * (attention["both"] + (attention["forward"] if work.checkpoint else 0.0))
    bandwidth = copy_bandwidth()
    weights = sum(i * o * n for i, o, n in linears(work)) * layers + head[0] * head[1]
    adam = 14 * weights / bandwidth if full else 0.0
    return {
        "floor_ms": round(gemm + attending + adam, 2),
        "gemm_ms": round(gemm, 2),
        "gemm_tflop": round(flop / 1e12, 1),
        "attention_ms": round(attending, 2),
        "adamw_ms": round(adam, 2),
        "copy_tb_s": round(bandwidth / 1e9, 3),
        "tflop_s": rates,
        "left_out": "elementwise, norms, loss softmax, LoRA's side products, dequantisation",
    }
