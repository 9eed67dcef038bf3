"""Lower: turn a rewritten graph into the callable that the region runs.

``inductor`` hands the graph to AOTAutograd and Inductor, which fuse what no pattern took. ``aot`` stops
at AOTAutograd's graphs and runs those. ``fx`` runs generated Python on the eager dispatcher: the graph
itself, with autograd recording as usual, or where a partition is asked for AOTAutograd's two halves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir, partition, rope_over, summed_products
from fusewright.compiler.halves import Halves, at_once, plain_python
from fusewright.compiler.partition import Asked
from fusewright.compiler.tiles import Parts, tokens
from fusewright.runtime.tiles import Tail


def choose(requested: str, graph: fx.Graph) -> str:
    """The lowering for ``auto``: Inductor where the region runs on a GPU, plain FX elsewhere."""
    if requested != "auto":
        return requested
    devices = {
        ir.value(n).device.type for n in graph.nodes if isinstance(ir.value(n), torch.Tensor)
    }
    return "inductor" if devices & {"cuda", "xpu"} else "fx"


def lower(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    how: str,
    autocast_device: str | None,
    splitting: Asked | None = None,
) -> Callable[..., Any]:
    """The callable of a canonical graph.

    Args:
        gm: the graph; it is not run again as a module.
        example_inputs: Dynamo's example inputs.
        how: "fx", "aot" or "inductor".
        autocast_device: device type whose autocast was made explicit in the graph and must be off
            while it runs, or None.
        splitting: by our own partition, or torch's (autograd's for fx) if None.
    """
    with autocast_off(autocast_device):
        if how == "inductor":
            run = _inductor(gm, example_inputs, splitting)
        elif how == "aot":
            from torch._dynamo.backends.debugging import aot_eager

            run = aot_eager(gm, example_inputs)
        elif splitting is not None:
            run = _split_fx(gm, example_inputs, splitting)
        else:
            gm.recompile()
            run = gm.forward
    if autocast_device is None:
        return run

    def without_autocast(*args: Any) -> Any:
        with autocast_off(autocast_device):
            return run(*args)

    return without_autocast


def in_tiles(
    parts: Parts,
    example_inputs: list[Any],
    how: str,
    autocast_device: str | None,
    splitting: Asked | None,
) -> Callable[..., Any]:
    """The callable of a block whose tail runs in tiles; the arguments are those of ``lower``.

    The tail runs as plain FX: its calls are kernels of ours nearly all, and a tile's graph is short-lived.
    """
    first = lower(parts.first, example_inputs, how, autocast_device, splitting)
    rows = lower(parts.tail, [], "fx", autocast_device)
    tail = Tail(lambda *given: rows(*given)[0], parts.rows, tokens, parts.width)

    def run(*args: Any) -> Any:
        return (tail(*parts.given(args, first(*args))),)

    return run


def autocast_off(device: str | None) -> Any:
    """A context without autocast on ``device``; does nothing for None."""
    return nullcontext() if device is None else torch.autocast(device, enabled=False)


def _inductor(
    gm: fx.GraphModule, example_inputs: list[Any], splitting: Asked | None
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    random = _draws(gm)
    patches: dict[str, Any] = {"fallback_random": True} if random else {}
    if splitting is None:
        whole: Any = compile_fx(gm, example_inputs, config_patches=patches or None)
        return whole  # type: ignore[no-any-return]
    from fusewright.compiler.inductor_partition import Partitioner

    halves = Halves(gm.graph, False)
    patches["custom_partitioner_fn"] = Partitioner(
        replace(splitting, split=halves.split, over=False)
    )

    def inner(graph: fx.GraphModule, inputs: Any, **given: Any) -> Any:
        made = compile_fx_inner(graph, inputs, **given)
        halves.compiled(made, not given.get("is_backward", False))
        return made

    with at_once():
        run: Any = compile_fx(gm, example_inputs, inner_compile=inner, config_patches=patches)
    return halves.around(run, splitting, random)


def _split_fx(
    gm: fx.GraphModule, example_inputs: list[Any], splitting: Asked
) -> Callable[..., Any]:
    """AOTAutograd's forward and backward, each run as the Python that fx generates."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._guards import TracingContext

    halves, random = Halves(gm.graph, True), _draws(gm)
    graphs: dict[bool, fx.GraphModule] = {}

    def half(forward: bool, graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        context = TracingContext.try_get()
        if context is not None and context.fw_metadata is not None:
            # Nothing here writes over what was saved, so a second backward stays possible.
            context.fw_metadata.bw_donated_idxs = []
        if not forward:
            summed_products.accumulate(graph)
        rope_over.write(graph)
        boxed, graphs[forward] = plain_python(graph), graph
        halves.compiled(boxed, forward)
        return boxed

    ours = functools.partial(partition.partition, replace(splitting, split=halves.split))
    backend = aot_autograd(
        fw_compiler=functools.partial(half, True),
        bw_compiler=functools.partial(half, False),
        partition_fn=ours,
    )
    with at_once():
        run = backend(gm, example_inputs)
    if splitting.done is not None and len(graphs) == 2:
        splitting.done(graphs[True], graphs[False])
    return halves.around(run, splitting, random)


def _draws(gm: fx.GraphModule) -> bool:
    """Whether the graph draws random numbers: Inductor's own generator gives other masks."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return any(ir.is_random(node) for graph in graphs for node in ir.calls(graph))
