"""The catalogue of patterns, in the order in which they are tried."""

from __future__ import annotations

from fusewright.compiler.match import Pattern
from fusewright.patterns.activation import Activation
from fusewright.patterns.add_rms_norm import AddRMSNorm
from fusewright.patterns.cross_entropy import CrossEntropy, LinearCrossEntropy
from fusewright.patterns.glu import GLU
from fusewright.patterns.layer_norm import LayerNorm
from fusewright.patterns.lora import LoRA
from fusewright.patterns.rms_norm import RMSNorm
from fusewright.patterns.rope import RoPE

DEFAULT: tuple[Pattern, ...] = (
    LinearCrossEntropy(),
    CrossEntropy(),
    LayerNorm(),
    RMSNorm(),
    AddRMSNorm(),
    RoPE(),
    LoRA(),
    GLU(),
    Activation(),
)
