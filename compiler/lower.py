"""Lower: turn a rewritten graph into the callable that the region runs.

``fx`` runs the graph's generated Python on the eager dispatcher; autograd records as usual.
``inductor`` hands it to AOTAutograd and Inductor, which fuse what no pattern took.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir

aten = torch.ops.aten

_RANDOM = frozenset({"dropout", "bernoulli", "bernoulli_", "rand", "randn", "native_dropout"})


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
        how: "fx" or "inductor".
        autocast_device: device type whose autocast was made explicit in the graph and must be off
            while it runs, or None.
    """
    with autocast_off(autocast_device):
        if how == "inductor":
            run = _inductor(gm, example_inputs)
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

    patches = {"fallback_random": True} if _draws(gm.graph) else None
    run: Any = compile_fx(gm, example_inputs, config_patches=patches)
    compiled: Callable[..., Any] = run
    return compiled


def _draws(graph: fx.Graph) -> bool:
    """Whether the graph draws random numbers: Inductor's own generator gives other masks."""
    for node in ir.calls(graph):
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if name in _RANDOM:
            return True
        if name == "scaled_dot_product_attention" and len(node.args) > 4 and node.args[4]:
            return True
    return False
