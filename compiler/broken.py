"""Graph breaks by module: whose code it is in which Dynamo stopped, and what can be done about it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

from fusewright.compiler.records import GraphBreak, GraphRecord


def modules(model: nn.Module, records: list[GraphRecord]) -> dict[str, str]:
    """Path -> why, for the modules in whose forward the graph of a running region breaks.

    Dynamo goes on behind a break where it can; in a loop it gives the whole function up. Either way
    there is code of these modules that no pattern has seen.
    """
    found: dict[str, str] = {}
    for record in records:
        for path, stop in ((p, b) for p in sorted(record.modules) for b in record.breaks):
            for inner, module in _owners(model, path, stop):
                file = stop.location.rpartition("/")[2]
                text = f"the graph breaks in it at {file} ({stop.reason}); what is not captured runs as before"
                found.setdefault(inner, text + _advice(module))
    return found


def _owners(model: nn.Module, path: str, stop: GraphBreak) -> Iterator[tuple[str, nn.Module]]:
    """The modules in the region at ``path`` whose forward has the line of the break."""
    file, _, line = stop.location.rpartition(":")
    try:
        region = model.get_submodule(path)
    except AttributeError:
        return
    for name, module in region.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and code.co_filename == file and line.isdecimal():
            lines = [at for _, _, at in code.co_lines() if at]
            if lines and min(lines) <= int(line) <= max(lines):
                yield f"{path}.{name}".strip("."), module


def _advice(module: nn.Module) -> str:
    """transformers runs experts in a loop over tensors only if it was told to."""
    if getattr(getattr(module, "config", None), "_experts_implementation", None) != "eager":
        return ""
    return "; model.set_experts_implementation('grouped_mm') runs the experts without a loop"
