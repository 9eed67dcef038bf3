"""Foresee: compile what a rewritten graph will launch, while it is being lowered.

The graph is rehearsed (``fusewright.runtime.rehearsal``) with the sizes of the inputs at hand and, where
it is to be verified, with the sizes of their cut; both with the gradients that are wanted now, and with
those that an equal graph will want (``fusewright.compiler.known``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fusewright.compiler import known, lower, verify
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
