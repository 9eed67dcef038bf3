"""The catalogue of patterns, in the order in which they are tried."""

from __future__ import annotations

from fusewright.compiler.match import Pattern
from fusewright.patterns.rms_norm import RMSNorm

DEFAULT: tuple[Pattern, ...] = (RMSNorm(),)
