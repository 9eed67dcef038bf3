"""Lower: turn a rewritten graph into the callable that the region runs.

``fx`` runs the graph's generated Python on the eager dispatcher; autograd records as usual.
``inductor`` hands it to AOTAutograd and Inductor, which fuse what no pattern took. ``aot`` stops at
AOTAutograd's graphs and runs those.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir

aten = torch.ops.aten


def choose(requested: str, graph: fx.Graph) -> str:
    """The lowering for ``auto``: Inductor where the region runs on a GPU, plain FX elsewhere."""
    if requested != "auto":
        return requested
    devices = {
        ir.value(n).device.type for n in graph.nodes if isinstance(ir.value(n), torch.Tensor)
    }
    return "inductor" if devices & {"cuda", "xpu"} else "fx"


def lower(
    gm: fx.GraphModule, example_inputs: list[Any], how: str, autocast_device: str | None
) -> Callable[..., Any]:
    """The callable of a canonical graph.

    Args:
        gm: the graph; it is not run again as a module.
        example_inputs: Dynamo's example inputs.
        how: "fx", "aot" or "inductor".
        autocast_device: device type whose autocast was made explicit in the graph and must be off
            while it runs, or None.
    """
    with autocast_off(autocast_device):
        if how == "inductor":
            run = _inductor(gm, example_inputs)
        elif how == "aot":
            from torch._dynamo.backends.debugging import aot_eager

            run = aot_eager(gm, example_inputs)
        else:
            gm.recompile()
            run = gm.forward
    if autocast_device is None:
        return run

    def without_autocast(*args: Any) -> Any:
        with autocast_off(autocast_device):
            return run(*args)

    return without_autocast


def autocast_off(device: str | None) -> Any:
    """A context without autocast on ``device``; does nothing for None."""
    return nullcontext() if device is None else torch.autocast(device, enabled=False)


def _inductor(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    patches = {"fallback_random": True} if _draws(gm) else None
    run: Any = compile_fx(gm, example_inputs, config_patches=patches)
    compiled: Callable[..., Any] = run
    return compiled


def _draws(gm: fx.GraphModule) -> bool:
    """Whether the graph draws random numbers: Inductor's own generator gives other masks."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return any(ir.is_random(node) for graph in graphs for node in ir.calls(graph))
