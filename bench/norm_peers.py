"""The row kernels' peers: eager, torch.compile and Liger-Kernel, where it can be imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fused_cases import GatedCase, QkCase
from norm_cases import NormCase, RopeCase
from place import ON_GPU
from roofline import fresh_milliseconds, peak_mebibytes
from row_case import EPS, RowCase

Function = Callable[..., Any]
NAMES = ("ours", "eager", "compile", "liger")


def compared(tiny: bool) -> list[RowCase]:
    """The main shape of each op, both directions; torch.compile's part of the time is large."""
    tokens, width = (64, 256) if tiny else (16384, 4096)
    heads = (4, 2, 64) if tiny else (32, 8, 128)
    norms = [NormCase(k, d, tokens, width) for k in ("rms", "add", "layer") for d in DIRECTIONS]
    gated = [
        GatedCase(order, d, tokens, width, group)
        for order, group in (("after", heads[2]), ("before", width))
        for d in DIRECTIONS
    ]
    ropes = [
        RopeCase(d, tokens, *heads, packed=p) for p in (False, True) for d in ("forward", "dx")
    ]
    return [*norms, *gated, *ropes, *(QkCase(d, tokens, *heads) for d in DIRECTIONS)]


DIRECTIONS = ("forward", "dx+dw")


def function(case: RowCase, name: str) -> Function | None:
    """The implementation of that name, or None."""
    if name == "ours":
        return case.op
    if name == "eager":
        return case.eager
    if name == "compile":
        return torch.compile(case.eager, dynamic=False) if ON_GPU else None
    return _liger(case)


def _liger(case: RowCase) -> Function | None:
    if not ON_GPU or isinstance(case, (GatedCase, QkCase)):
        return None
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        return None
    if isinstance(case, RopeCase):
        return lambda q, k, cos, sin: LigerRopeFunction.apply(q, k, cos[:, 0], sin[:, 0])
    assert isinstance(case, NormCase)
    if case.kind == "rms":
        return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
    if case.kind == "layer":
        return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS)
    return lambda x, e, w: LigerFusedAddRMSNormFunction.apply(x, e, w, EPS, 0.0, "llama", False)


def warm(case: RowCase) -> None:
    """Have torch.compile's result in its cache on disk."""
    made = function(case, "compile")
    if made is not None:
        case.peer(made)()
        torch.cuda.synchronize()


def measure(case: RowCase) -> dict[str, Any]:
    """Microseconds and MiB above the inputs, of every implementation."""
    torch._dynamo.reset()
    row: dict[str, Any] = {"name": case.name, "rows": case.rows, "width": case.width}
    for name in NAMES:
        made = function(case, name)
        if made is None:
            continue
        try:
            row[name] = fresh_milliseconds(lambda f=made: case.peer(f), case.bytes, 5) * 1e3
            row[f"{name} MiB"] = peak_mebibytes(case.peer(made))
        except (RuntimeError, TypeError, ValueError, AttributeError) as failure:
            # a peer that cannot run is a word in the table, not the end
            if name == "ours":
                raise
            row[name] = type(failure).__name__
    return row
