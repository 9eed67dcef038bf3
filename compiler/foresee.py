"""Foresee: compile what a rewritten graph will launch, while it is being lowered.

The graph is rehearsed (``fusewright.runtime.rehearsal``) with the sizes of the inputs at hand and, where
it is to be verified, with the sizes of their cut; both with the gradients that are wanted now, and with
those that an equal graph will want (``fusewright.compiler.known``). Once it has been cut, its halves are
rehearsed too: ops that were joined in them launch kernels of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fusewright.compiler import ir, known, lower, verify
from fusewright.compiler.exact import Quiet
from fusewright.compiler.known import Wanted
from fusewright.runtime.rehearsal import Rehearsal, start

log = logging.getLogger("fusewright")


def foresee(
    rewritten: fx.GraphModule,
    canonical: fx.GraphModule,
    inputs: Sequence[Any],
    verified: bool,
    autocast_device: str | None,
) -> int:
    """Start to compile the graph's kernels; returns how many there are.

    Nothing happens where the inputs are not on a GPU, and what cannot be rehearsed is left out.
    """
    devices = {v.device for v in inputs if isinstance(v, torch.Tensor) and v.device.type == "cuda"}
    if len(devices) != 1:
        return 0
    with lower.autocast_off(autocast_device):
        rehearsal = rehearse(rewritten, canonical, inputs, verified)
    start(rehearsal.kernels, devices.pop())
    return len({kernel.key for kernel in rehearsal.kernels})


def foresee_halves(
    forward: fx.GraphModule, backward: fx.GraphModule, inputs: Sequence[Any]
) -> None:
    """Start to compile what a graph's halves launch beside what the graph itself does."""
    tensors = [v for v in inputs if isinstance(v, torch.Tensor)]
    devices = {v.device for v in tensors if v.device.type == "cuda"}
    if len(devices) == 1 and not any(isinstance(v, FakeTensor) for v in tensors):
        start(rehearse_halves(forward, backward, inputs).kernels, devices.pop())


def rehearse_halves(
    forward: fx.GraphModule, backward: fx.GraphModule, inputs: Sequence[Any]
) -> Rehearsal:
    """What the halves of a graph with inputs like these launch."""
    rehearsal = Rehearsal()
    try:
        given = _stand_ins(inputs, frozenset(), rehearsal)
        for value in given:
            if isinstance(value, torch.Tensor):
                value.requires_grad_(False)  # the halves are their own derivatives
        rehearsal.run(lambda *values: _both(forward, backward, values), given)
    except Exception as error:  # of any kind, as above
        rehearsal.failures.append(f"{type(error).__name__}: {error}")
        log.debug("halves were not rehearsed", exc_info=True)
    return rehearsal


def _both(forward: fx.GraphModule, backward: fx.GraphModule, given: Sequence[Any]) -> None:
    """Run the forward, and the backward on what has the names of its arguments."""
    made = fx.Interpreter(forward).run(*given)
    nodes: Any = forward.graph.output_node().args[0]
    named = {n.name: v for n, v in zip(nodes, made, strict=True) if isinstance(n, fx.Node)}
    inputs = forward.graph.find_nodes(op="placeholder")
    named |= {n.name: v for n, v in zip(inputs, given, strict=True)}
    wanted = backward.graph.find_nodes(op="placeholder")
    values = [named[n.name] if n.name in named else _tangent(n) for n in wanted]
    fx.Interpreter(backward).run(*values)


def _tangent(node: fx.Node) -> Any:
    """A gradient that comes down, in the sizes that were traced as they are now."""
    value = ir.value(node)

    def now(numbers: Sequence[Any]) -> list[int]:
        return [n.node.hint if isinstance(n, torch.SymInt) else n for n in numbers]

    return torch.empty_strided(
        now(value.shape), now(value.stride()), dtype=value.dtype, device=value.device
    )


def rehearse(
    rewritten: fx.GraphModule,
    canonical: fx.GraphModule,
    inputs: Sequence[Any],
    verified: bool,
    rehearsal: Rehearsal | None = None,
) -> Rehearsal:
    """What the graph launches on inputs like these, and in their verification if it is ``verified``."""
    rehearsal = rehearsal or Rehearsal()
    graph = fx.Interpreter(rewritten)
    try:
        for wanted in known.variants(canonical, inputs):
            rehearsal.run(graph.run, _stand_ins(inputs, wanted, rehearsal))
            if verified:
                cut = verify.cut_inputs(canonical, inputs)
                rehearsal.run(Quiet(rewritten).run, _cut(cut, wanted, rehearsal))
    except Exception as error:
        # Fake tensors refuse in errors of any kind, and nothing depends on them.
        rehearsal.failures.append(f"{type(error).__name__}: {error}")
        log.debug("a graph was not rehearsed", exc_info=True)
    return rehearsal


def _stand_ins(inputs: Sequence[Any], wanted: Wanted, rehearsal: Rehearsal) -> list[Any]:
    """Fake tensors for tensors, of which the wanted ones want a gradient."""
    made = [_stand_in(v, rehearsal) for v in inputs]
    for place in wanted:
        made[place].requires_grad_()
    return made


def _stand_in(value: Any, rehearsal: Rehearsal) -> Any:
    """A fake tensor for a tensor; for a symbolic number what it is now, without a guard on it."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return rehearsal.stand_in(value) if isinstance(value, torch.Tensor) else value


def _cut(values: Sequence[Any], wanted: Wanted, rehearsal: Rehearsal) -> list[Any]:
    """As verification runs it: what wants a gradient is a copy, the rest is where it is."""
    return [
        rehearsal.copy(v) if i in wanted else _stand_in(v, rehearsal) for i, v in enumerate(values)
    ]
