"""The catalogue of patterns, in the order in which they are tried."""

from __future__ import annotations

from fusewright.compiler.match import Pattern
from fusewright.patterns.activation import Activation
from fusewright.patterns.add_rms_norm import AddRMSNorm
from fusewright.patterns.attention import Attention
from fusewright.patterns.cross_entropy import CrossEntropy, LinearCrossEntropy
from fusewright.patterns.gated_rms_norm import GatedRMSNorm
from fusewright.patterns.glu import GLU
from fusewright.patterns.layer_norm import LayerNorm
from fusewright.patterns.log_probabilities import LogProbabilities
from fusewright.patterns.lora import LoRA
from fusewright.patterns.qk_norm_rope import QKNormRoPE
from fusewright.patterns.rms_norm import RMSNorm
from fusewright.patterns.rope import RoPE
from fusewright.patterns.rope_complex import ComplexRoPE

DEFAULT: tuple[Pattern, ...] = (
    LinearCrossEntropy(),
    CrossEntropy(),
    LogProbabilities(),
    LayerNorm(),
    RMSNorm(),
    RoPE(),
    ComplexRoPE(),
    LoRA(),
    GLU(),
    GatedRMSNorm(),
    AddRMSNorm(),  # a projection and its adapter are a sum too: the adapter goes first
    QKNormRoPE(),
    Attention(),
    Activation(),
)
