"""One capture serves the first layer, whose stream wants no gradient, and all others."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from typing import Any

import models
import pytest
import torch
import training
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusewright
from fusewright.compiler import driver
from fusewright.compiler.asking import Streams


class Ops(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def adapted() -> Any:
    return models.with_lora(models.build("llama")).train()


def blocks(model: Any) -> list[Any]:
    """The records of the captured blocks that are run."""
    return [r for r in driver._required(model).records if r.kind == "block" and r.modules]


def backward_ops(model: Any) -> Counter[str]:
    """What the second step's backward calls."""
    training.train_step(model, models.batch())
    model.zero_grad()
    loss = model(**models.batch()).loss
    with Ops() as ops:
        loss.backward()
    return ops.counts


def test_the_first_layers_backward_does_no_more_than_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = fusewright.optimize(adapted(), lowering="fx", strict=True)
    together = backward_ops(shared)
    assert [len(r.modules) for r in blocks(shared)] == [2]
    monkeypatch.setattr(Streams, "enter", lambda self, run, module, args, kwargs, _: (args, kwargs))
    single = fusewright.optimize(adapted(), lowering="fx", strict=True)
    apart = backward_ops(single)
    assert [len(r.modules) for r in blocks(single)] == [1, 1]
    for products in ("aten.mm.default", "aten.addmm.default"):
        assert together[products] == apart[products]
    assert_alike(*(training.train_step(model, models.batch()) for model in (shared, single)))


def test_no_hidden_states_stay_behind() -> None:
    """Captures leave cycles that hold what they were made with, whoever collects garbage or not."""
    model = fusewright.optimize(adapted(), lowering="fx", strict=True)
    batch = models.batch(rows=3, length=37)
    size = 3 * 37 * models.HIDDEN
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            training.train_step(model, batch)
        left = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() == size]
    finally:
        gc.enable()
    assert not left


def assert_alike(ours: training.Step, eager: training.Step) -> None:
    torch.testing.assert_close(ours.loss, eager.loss)
    assert ours.grads.keys() == eager.grads.keys()
    for name, grad in ours.grads.items():
        torch.testing.assert_close(grad, eager.grads[name])


@pytest.mark.parametrize("lowering", ["fx", "inductor"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_losses_and_gradients_are_eagers(lowering: str, reentrant: bool | None) -> None:
    ours = adapted()
    if reentrant is not None:
        options = {"use_reentrant": reentrant}
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        ours.train()
    if reentrant:
        ours.enable_input_require_grads()
    eager = copy.deepcopy(ours)
    fusewright.optimize(ours, lowering=lowering, strict=True)
    for seed in range(2):
        batch = models.batch(seed=seed)
        assert_alike(*(training.train_step(model, batch) for model in (ours, eager)))


def test_what_is_trained_in_front_later_gets_its_gradient() -> None:
    ours, eager = adapted(), adapted()
    fusewright.optimize(ours, lowering="fx", strict=True)
    for _ in range(2):
        assert_alike(*(training.train_step(model, models.batch()) for model in (ours, eager)))
        for model in (ours, eager):
            model.get_input_embeddings().weight.requires_grad_()
    assert [len(r.modules) for r in blocks(ours)] == [2]  # no capture more
    assert any("embed" in n for n in training.train_step(ours, models.batch()).grads)


class Counting(nn.Module):
    """A layer that writes to its input, and returns what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(16))
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x.add_(1)
        normed = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return x + self.inner(normed), x


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Counting() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x, before = layer(x)
            x = x + 0.1 * before
        return x


def test_a_stream_that_is_written_to_and_handed_on() -> None:
    eager = Stack().train()
    ours = fusewright.optimize(copy.deepcopy(eager), lowering="fx")
    for _ in range(2):
        given = torch.randn(2, 5, 16)
        found = []
        for model in (ours, eager):
            model.zero_grad()
            x = given.clone()
            out = model(x)
            out.sin().sum().backward()
            found.append([out, x, *(p.grad for p in model.parameters())])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs)
