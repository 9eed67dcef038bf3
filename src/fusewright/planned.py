"""``fusewright.plan``: a model or its name, a batch and a budget to a memory plan."""

from __future__ import annotations

from typing import Any

from torch import nn

from fusewright.compiler.planning.budget import parse
from fusewright.compiler.planning.devices import at_hand, describe
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
    device = describe(options["device"]) if options["device"] else at_hand()
    parse(budget, device.memory)  # nonsense is refused before anything is built
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

    question = targets.Question(
        batch, sequence, options["dtype"], options["lora"], base=options["base"]
    )
    built = targets.build(target, question)
    return built.model, int(built.inputs["input_ids"].shape[1])


def _longest(model: nn.Module) -> int:
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(_LONGEST, int(longest or _LONGEST))
