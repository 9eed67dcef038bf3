"""Make ambient autocast explicit: casts become nodes, so that matching sees them.

Under autocast the captured graph shows ``linear(x, w)`` and nothing of the conversions around it;
they happen in the dispatcher. Each call whose recorded dtype differs from what it yields without
autocast gets its floating inputs cast to the recorded dtype, and the graph then runs with autocast
off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir

aten = torch.ops.aten


def active_device() -> str | None:
    """The device type under autocast now, or None."""
    for device in ("cuda", "cpu", "xpu"):
        if torch.is_autocast_enabled(device):
            return device
    return None


def make_explicit(graph: fx.Graph, device: str) -> None:
    """Insert the casts that autocast on ``device`` makes; the graph's values stay the same."""
    for node in list(ir.calls(graph)):
        if not ir.is_floating(node) or node.target in ir.CASTS:
            continue
        given = {ir.dtype(n) for n in node.all_input_nodes if ir.is_floating(n)}
        if not given or given == {ir.dtype(node)}:
            continue
        # A call on mixed inputs that does not promote them works under autocast alone; a fake
        # tensor does not say so.
        promotes = len(given) == 1 or torch.Tag.pointwise in getattr(node.target, "tags", ())
        if promotes and _dtype_without_autocast(node, device) == ir.dtype(node):
            continue
        _cast_inputs(graph, node, ir.dtype(node))


def _dtype_without_autocast(node: fx.Node, device: str) -> torch.dtype | None:
    """What the call yields with autocast off; None if it then refuses its inputs."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), ir.value)
    mode = ir.value(node).fake_mode
    try:
        with torch.autocast(device, enabled=False), mode, torch.no_grad():
            out = node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError:  # "expected ... to have the same dtype": a mixed call that autocast unites
        return None
    found: torch.dtype = out.dtype
    return found


def _cast_inputs(graph: fx.Graph, node: fx.Node, wanted: torch.dtype) -> None:
    casts: dict[fx.Node, fx.Node] = {}

    def cast(leaf: Any) -> Any:
        if not ir.is_floating(leaf) or ir.dtype(leaf) == wanted:
            return leaf
        if leaf not in casts:
            with graph.inserting_before(node):
                made = graph.call_function(aten.to.dtype, (leaf, wanted))
            with ir.value(leaf).fake_mode, torch.no_grad():
                made.meta["val"] = ir.value(leaf).to(wanted)
            ir.inherit_provenance(made, node)
            casts[leaf] = made
        return casts[leaf]

    node.args = fx.map_arg(node.args, cast)
    node.kwargs = fx.map_arg(node.kwargs, cast)
