"""Foresee: compile what a rewritten graph will launch, while it is being lowered.

The graph is rehearsed (``fusewright.runtime.rehearsal``) with the sizes of the inputs at hand and, where
it is to be verified, with the sizes of their cut.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fusewright.compiler import lower, verify
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
        rehearsal.run(graph.run, [_stand_in(v, rehearsal) for v in inputs])
        if verified:
            cut = verify.cut_inputs(canonical, inputs)
            rehearsal.run(verify.Quiet(rewritten).run, [_cut(*pair, rehearsal) for pair in cut])
    except Exception as error:
        # Fake tensors refuse in errors of any kind, and nothing depends on them.
        rehearsal.failures.append(f"{type(error).__name__}: {error}")
        log.debug("a graph was not rehearsed", exc_info=True)
    return rehearsal


def _stand_in(value: Any, rehearsal: Rehearsal) -> Any:
    """A fake tensor for a tensor; for a symbolic number what it is now, without a guard on it."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return rehearsal.stand_in(value) if isinstance(value, torch.Tensor) else value


def _cut(value: Any, wants: bool, rehearsal: Rehearsal) -> Any:
    """As verification runs it: what wants a gradient is a copy, the rest is where it is."""
    wants = wants and isinstance(value, torch.Tensor)
    return rehearsal.copy(value) if wants else _stand_in(value, rehearsal)
