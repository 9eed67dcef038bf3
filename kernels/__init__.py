"""Triton kernels with hand-derived backwards, and their PyTorch references.

Each module is one family: it declares its ops as :class:`~fusewright.kernels.spec.OpSpec` values and
registers nothing. :func:`catalogue` collects them; ``fusewright.runtime.op`` registers them.
"""

from __future__ import annotations

from fusewright.kernels.spec import OpSpec


def catalogue() -> tuple[OpSpec, ...]:
    """Every op of the package, in the order of registration."""
    from fusewright.kernels import (
        activations,
        add_rms_norm,
        cross_entropy,
        gated_rms_norm,
        glu,
        glu_again,
        layer_norm,
        linear_cross_entropy,
        lora,
        lora_added,
        lora_glu,
        lora_mlp,
        lora_norm,
        nf4,
        qk_norm_rope,
        qlora,
        rms_norm,
        roomy,
        rope,
        rope_over,
    )

    families = (
        rms_norm,
        add_rms_norm,
        layer_norm,
        rope,
        rope_over,
        qk_norm_rope,
        activations,
        glu,
        glu_again,
        lora,
        lora_added,
        lora_glu,
        lora_mlp,
        lora_norm,
        cross_entropy,
        gated_rms_norm,
        linear_cross_entropy,
        nf4,
        qlora,
        roomy,
    )
    return tuple(spec for family in families for spec in family.OPS)
