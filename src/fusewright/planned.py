"""``fusewright.plan``: a model or its name, a batch and a budget to a memory plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusewright.compiler.planning.devices import Device, UnknownDevice, describe
from fusewright.compiler.planning.plan import (
    MemoryPlan,
    Planner,
    text_inputs,
    without_weights,
)
from fusewright.patterns import DEFAULT

_LONGEST = 4096


def plan(model: Any, batch: int, sequence: int, budget: str | float, **options: Any) -> MemoryPlan:
    """See ``fusewright.plan``."""
    if batch < 1 or sequence < 0:
        raise ValueError(f"batch and sequence must be positive, got {batch} and {sequence}")
    if not isinstance(model, (nn.Module, str)):
        raise TypeError(f"plan needs an nn.Module or a name, got {type(model).__name__}")
    device = _device(options["device"])
    if isinstance(model, str):
        bare, length = _named(model, batch, sequence, options)
    else:
        bare, length = without_weights(model), sequence or _longest(model)
    planner = Planner(
        bare, text_inputs(bare), DEFAULT, device, (batch, length), options["optimizer"]
    )
    return planner.plan(budget)


def _named(
    target: str, batch: int, sequence: int, options: dict[str, Any]
) -> tuple[nn.Module, int]:
    from fusewright import targets

    question = targets.Question(batch, sequence, options["dtype"], options["lora"])
    built = targets.build(target, question)
    return built.model, int(built.inputs["input_ids"].shape[1])


def _longest(model: nn.Module) -> int:
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(_LONGEST, int(longest or _LONGEST))


def _device(name: str) -> Device:
    """The description of a device by name, or of the one at hand, with its own memory."""
    if name:
        return describe(name)
    if not torch.cuda.is_available():
        return describe("h100")
    properties = torch.cuda.get_device_properties(0)
    known = describe(properties.name)
    rates = {k: v for k, v in vars(known).items() if k not in ("name", "memory")}
    return Device(properties.name, int(properties.total_memory), **rates)


__all__ = ["UnknownDevice", "plan"]
