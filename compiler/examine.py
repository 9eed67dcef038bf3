"""What the compiler makes of one function or module: for a spelling in question, and for its test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fusewright.compiler import coverage
from fusewright.compiler.capture import Backend, compiled_forward
from fusewright.compiler.config import Options
from fusewright.compiler.dynamo import mark_rows
from fusewright.compiler.explain import CoverageReport
from fusewright.compiler.match import Pattern
from fusewright.compiler.session import Session
from fusewright.runtime.op import register_all


def examine(
    computation: Callable[..., Any], inputs: Sequence[Any], catalogue: Sequence[Pattern]
) -> CoverageReport:
    """Capture the computation as a block's forward, run it once, and report on it.

    Args:
        computation: a function of the inputs, or a module.
        inputs: tensors and constants; real ones, since the computation runs.
        catalogue: the patterns.
    """
    register_all()
    given = {"patterns": None, "lowering": "fx", "verify": "off", "logits": "eager"}
    session = Session(Options.build(catalogue, **given))
    name = getattr(computation, "__name__", type(computation).__name__)
    backend = Backend(session, "block", name)
    module = computation if isinstance(computation, nn.Module) else None
    run = compiled_forward(type(module).forward if module is not None else computation, backend)
    handed = [_activation(i) for i in inputs]
    mark_rows(handed)
    session.entering(name)
    revert = session.settings["block"]()
    try:
        run(*(handed if module is None else (module, *handed)))
    finally:
        revert()
        session.leaving()
    return coverage.report(session, module)


def _activation(value: Any) -> Any:
    """A tensor as a block is given it: nobody's leaf, so that it may be changed in place."""
    if type(value) is torch.Tensor and value.requires_grad:
        return value.clone()
    return value
