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
from fusewright.kernels import room

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


def _trained(wrapped: Any, rank: int) -> list[training.Step]:
    """The steps' losses and gradients, with an SGD update after each."""
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    steps = []
    for step in range(STEPS):
        loss = wrapped(**real_text.batch(3 * rank + step)).loss
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


# how it is wrapped, when it is optimised, with adapters, with checkpointing
CASES = [
    ("ddp", "before", False, False),
    ("ddp", "after", True, True),
    ("fsdp2", "before", True, False),
    ("fsdp2", "after", False, True),
    ("fsdp2", "before", True, True),
]


def _accelerated(optimised: bool) -> list[torch.Tensor]:
    """Losses of a loop by accelerate, with accumulation and clipping; then the trained weights."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    model = real_text.model()
    if optimised:
        fusewright.optimize(model, lowering="fx")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(real_text.Bytes(16), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    told = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                told.append(accelerator.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
        told.append(loss.detach())
    return [*told, *accelerator.unwrap_model(model).state_dict().values()]


def _reloaded(rank: int) -> list[str]:
    """Steps under FSDP2 of the root alone, other frozen weights after the first; the report's notes.

    Weights are moved next to their adapters wherever that is allowed.
    """
    from torch.distributed.fsdp import fully_shard

    serves, room.serves = room.serves, lambda *_: True
    try:
        ours = fully_shard(fusewright.optimize(_model(True, False), lowering="fx"))
        eager = fully_shard(_model(True, False))
        for _ in range(2):
            for a, b in zip(_trained(ours, rank), _trained(eager, rank), strict=True):
                training.assert_same_step(a, b, what="fsdp2 with other weights")
            for p in (*ours.parameters(), *eager.parameters()):
                with torch.no_grad():
                    p.mul_(1.0 if p.requires_grad else 0.5)
        assert not any(room.owned(p.data) for p in ours.parameters())
        return list(fusewright.report(ours).notes)
    finally:
        room.serves = serves


def every_case(rank: int) -> dict[Any, dict[str, Any]]:
    """All cases in one pair of processes, since starting it takes longer than a case."""
    told = {case: _compare(rank, *case) for case in CASES}
    told["notes"] = {"notes": _reloaded(rank)}
    ours, eager = _accelerated(True), _accelerated(False)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    return told
