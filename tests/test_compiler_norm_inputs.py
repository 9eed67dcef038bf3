"""Gradients of adapters that are made of a norm's input: the same step, and no norm runs again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import training
from torch import fx

import fusewright
from fusewright.compiler import ir, partition
from fusewright.kernels import room
from fusewright.runtime.op import register_all

register_all()
NORMS = ("rms_norm", "rms_norm_roomy", "add_rms_norm", "add_rms_norm_roomy")
Halves = list[Counter[str]]


def lora(name: str = "llama", **given: Any) -> Callable[[], Any]:
    return lambda: models.with_lora(models.build(name), **given).train()


def checkpointed() -> Any:
    model = lora()()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    return model


def stepped(
    build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, rewrite: bool = True
) -> tuple[training.Step, Halves]:
    """A training step, and the ops of every backward half that was made."""
    halves: Halves = []
    fold = partition.residual_backward.fold

    def folded(half: fx.GraphModule) -> int:
        found = fold(half)
        halves.append(Counter(ir.own_name(n) for n in ir.calls(half.graph)))
        return found

    monkeypatch.setenv("FUSEWRIGHT_PARTITION", "default")
    with monkeypatch.context() as patch:
        patch.setattr(partition.residual_backward, "fold", folded)
        if not rewrite:
            patch.setattr(partition.norm_inputs, "hand_over", lambda joint: 0)
        torch.manual_seed(0)
        model = fusewright.optimize(build(), lowering="fx", strict=True)
        return training.train_step(model, models.batch(), seed=3), halves


def same(a: training.Step, b: training.Step) -> None:
    assert torch.equal(a.loss, b.loss)
    assert a.grads.keys() == b.grads.keys()
    for key, grad in b.grads.items():
        assert torch.equal(a.grads[key], grad), key


@pytest.mark.parametrize("roomy", [False, True])
def test_no_norm_runs_again(roomy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if roomy:
        monkeypatch.setattr(room, "serves", lambda *given: True)
    step, halves = stepped(lora(), monkeypatch)
    assert halves
    for ops in halves:
        assert ops["lora_group_norm_backward"] == ops["lora_mlp_norm_backward"] == 1, ops
        assert not any(ops[n] for n in NORMS), ops
    wanted, before = stepped(lora(), monkeypatch, rewrite=False)
    assert all(any(ops[n] for n in NORMS) for ops in before)
    same(step, wanted)


@pytest.mark.parametrize("name", ["dropout", "checkpoint", "one_trained"])
def test_other_graphs_stay_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of inputs of their own read these, and a trained weight reads the norm's output."""

    def one_trained() -> Any:
        model = lora()()
        for key, parameter in model.named_parameters():
            if key.endswith("q_proj.base_layer.weight"):
                parameter.requires_grad_(True)
        return model

    builds = {"dropout": lora(dropout=0.3), "checkpoint": checkpointed, "one_trained": one_trained}
    step, halves = stepped(builds[name], monkeypatch)
    if name != "checkpoint":
        for ops in halves:
            assert not (name == "dropout" and ops["lora_group_norm_backward"])
    same(step, stepped(builds[name], monkeypatch, rewrite=False)[0])
