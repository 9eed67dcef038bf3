"""Rewrites of the backward half: what is gone, what stays, and that the step is the same."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import training
from torch import fx

import fusewright
from fusewright.compiler import gated_backward, ir, partition, residual_backward
from fusewright.kernels import room
from fusewright.runtime.op import register_all

register_all()


def stepped(
    build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, rewrite: bool = True
) -> tuple[Any, list[Counter[str]]]:
    """A training step, and the ops of every backward half that was made."""
    halves: list[Counter[str]] = []

    def folded(half: fx.GraphModule) -> int:
        found = fold(half) if rewrite else 0
        halves.append(Counter(ir.own_name(n) or str(n.target) for n in ir.calls(half.graph)))
        return found

    fold, join = residual_backward.fold, gated_backward.join
    monkeypatch.setenv("FUSEWRIGHT_PARTITION", "default")
    with monkeypatch.context() as patch:
        patch.setattr(partition.gated_backward, "join", join if rewrite else lambda half: 0)
        patch.setattr(partition.residual_backward, "fold", folded)
        torch.manual_seed(0)
        model = fusewright.optimize(build(), lowering="fx", strict=True)
        return training.train_step(model, models.batch(), seed=3), halves


def lora(**given: Any) -> Callable[[], Any]:
    return lambda: models.with_lora(models.build("llama"), **given).train()


def checkpointed() -> Any:
    model = lora()()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("roomy", [False, True])
def test_no_gated_unit_runs_again_and_no_sum_is_left(
    roomy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if roomy:
        monkeypatch.setattr(room, "serves", lambda *given: True)
    step, halves = stepped(lora(), monkeypatch)
    assert halves
    for ops in halves:
        assert ops["lora_mlp_norm_backward"] == 1
        assert not [op for op in ops if op.startswith("glu_packed")], ops
        assert not ops["aten.add.Tensor"], ops
    norms = ("add_rms_norm_backward", "add_rms_norm_roomy_backward")
    assert any(
        sum(ops[n] for n in norms) == 2 for ops in halves
    )  # of a block whose input is trained
    wanted, before = stepped(lora(), monkeypatch, rewrite=False)
    assert all(any(op.startswith("glu_packed") for op in ops) for ops in before)
    assert any(ops["aten.add.Tensor"] for ops in before)
    assert torch.equal(step.loss, wanted.loss)
    for key, grad in wanted.grads.items():
        assert torch.equal(step.grads[key], grad), key  # in float32 the sums round as before


@pytest.mark.parametrize("name", ["dropout", "checkpoint"])
def test_graphs_of_other_kinds_are_left_or_stay_right(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = lora(dropout=0.3) if name == "dropout" else checkpointed
    step, halves = stepped(build, monkeypatch)
    assert halves
    # Under a checkpoint nothing runs a third time, and a unit out of its own backward does not.
    assert all(ops["lora_mlp_norm_backward"] == (name == "checkpoint") for ops in halves)
    wanted, _ = stepped(build, monkeypatch, rewrite=False)
    assert torch.equal(step.loss, wanted.loss)
    for key, grad in wanted.grads.items():
        assert torch.equal(step.grads[key], grad), key


def norm_graph(read_early: bool, scaled: bool) -> fx.GraphModule:
    """other + the gradient of a norm's input, with a gradient of the weight."""
    graph = fx.Graph()
    values = {n: torch.randn(3, 8) for n in ("dy", "x", "other")}
    values |= {"weight": torch.randn(8), "rstd": torch.rand(3)}
    given = {}
    for name, value in values.items():
        given[name] = graph.placeholder(name)
        given[name].meta["val"] = value
    call = graph.call_function
    args = (given["dy"], given["x"], given["weight"], given["rstd"], 0.0, "output", True, True)
    norm = call(torch.ops.fusewright.rms_norm_backward.default, args)
    norm.meta["val"] = (values["x"], values["weight"])
    dx, dweight = (call(operator.getitem, (norm, at)) for at in range(2))
    dx.meta["val"], dweight.meta["val"] = values["x"], values["weight"]
    last = call(torch.ops.aten.neg.default, (dweight,)) if read_early else dweight
    more = {"alpha": 2.0} if scaled else {}
    total = call(torch.ops.aten.add.Tensor, (given["other"], dx), more)
    total.meta["val"] = values["x"]
    graph.output((total, last))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_a_sum_with_the_weights_gradient_beside_it() -> None:
    half = norm_graph(False, False)
    inputs = [n.meta["val"] for n in half.graph.find_nodes(op="placeholder")]
    wanted = half(*inputs)
    assert residual_backward.fold(half) == 1
    for got, expected in zip(half(*inputs), wanted, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("given", [(True, False), (False, True)])
def test_what_is_read_early_or_scaled_is_left(given: tuple[bool, bool]) -> None:
    assert residual_backward.fold(norm_graph(*given)) == 0
