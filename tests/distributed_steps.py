"""What each of two processes runs: a wrapped model's steps, optimised and eager.

In a module of its own, which a spawned process can import.
"""

from __future__ import annotations

from typing import Any

import models
import real_text
import torch
import training
from torch import nn

import fusewright

STEPS = 2


def _model(lora: bool, checkpointed: bool) -> Any:
    model = real_text.model()
    if lora:
        model = models.with_lora(model)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    return model


def _wrapped(model: Any, how: str) -> Any:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_decoder().layers:
        fully_shard(layer)
    return fully_shard(model)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _batch(rank: int, step: int) -> dict[str, torch.Tensor]:
    data = real_text.Bytes(2, offset=10 * rank + 4 * step)
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def _trained(wrapped: Any, rank: int) -> list[training.Step]:
    """The steps' losses and gradients, with an SGD update after each."""
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    steps = []
    for step in range(STEPS):
        loss = wrapped(**_batch(rank, step)).loss
        loss.backward()
        grads = {
            n.removeprefix("module."): _full(p.grad)
            for n, p in wrapped.named_parameters()
            if p.grad is not None
        }
        steps.append(training.Step(loss.detach(), grads))
        optimizer.step()
        optimizer.zero_grad()
    return steps


def _compare(rank: int, how: str, when: str, lora: bool, checkpointed: bool) -> dict[str, Any]:
    eager = _trained(_wrapped(_model(lora, checkpointed), how), rank)
    model = _model(lora, checkpointed)
    if when == "before":
        fusewright.optimize(model, lowering="fx")
    wrapped = _wrapped(model, how)
    if when == "after":
        fusewright.optimize(wrapped, lowering="fx")
    ours = _trained(wrapped, rank)
    for a, b in zip(ours, eager, strict=True):
        training.assert_same_step(a, b, what=f"{how} {when}")
    report = fusewright.report(wrapped)
    return {"loss": ours[-1].loss, "counts": report.counts, "eager_now": report.eager_now}


CASES = [
    (how, when, lora, checkpointed)
    for how in ("ddp", "fsdp2")
    for when, lora, checkpointed in (
        ("before", False, False),
        ("after", True, False),
        ("before", True, True),
        ("after", False, True),
    )
]


def every_case(rank: int, how: str) -> dict[Any, dict[str, Any]]:
    """All cases of one wrapper in one pair of processes: starting it takes longer than a case."""
    return {case: _compare(rank, *case) for case in CASES if case[0] == how}
