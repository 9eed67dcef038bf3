"""optimize, report and restore on one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fusewright.compiler import capture, coverage, explain, regions
from fusewright.compiler.config import Options
from fusewright.compiler.match import Pattern
from fusewright.compiler.records import Binding
from fusewright.compiler.session import Session
from fusewright.runtime import module as modules
from fusewright.runtime.op import register_all


def optimize(
    model: Any, catalogue: Sequence[Pattern], options: dict[str, Any], notes: Sequence[str] = ()
) -> None:
    """Install the regions' forwards on ``model``; see ``fusewright.optimize``.

    ``notes`` are lines for the report.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize needs an nn.Module, got {type(model).__name__}")
    if _session(model) is not None:
        raise ValueError(
            f"this {type(model).__name__} is optimised already; fusewright.restore(model) undoes it"
        )
    if options.get("memory_budget") is not None:
        raise ValueError("memory_budget: the memory planner is not part of this version; pass None")
    session = Session(Options.build(catalogue, **options))
    for line in notes:
        session.note(line)
    found = regions.find(model)
    register_all()
    if found.head is None:
        session.note("no module takes labels: the loss is outside of the model and left alone")
    capture.install(model, found, session)


def report(model: Any) -> explain.CoverageReport:
    """The coverage report of an optimised model."""
    return coverage.report(_required(model), model)


def restore(model: Any) -> None:
    """Take the installed forwards off the model."""
    session = _required(model)
    capture.remove(model)
    session.stored.release()


def _session(model: nn.Module) -> Session | None:
    for module in model.modules():
        binding = modules.installed(module)
        if isinstance(binding, Binding):
            session: Session = binding.session
            return session
    return None


def _required(model: Any) -> Session:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    session = _session(model)
    if session is None:
        raise ValueError(
            f"this {type(model).__name__} is not optimised; call fusewright.optimize(model) first"
        )
    return session
