"""The backward half of layers that are trained: units that run again, sums of products."""

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
from fusewright.compiler import gated_again, ir, lower, partition, summed_products
from fusewright.runtime.op import register_all

register_all()
aten = torch.ops.aten


def stepped(
    name: str, monkeypatch: pytest.MonkeyPatch, join: bool = True, accumulate: bool = True
) -> tuple[Any, list[Counter[str]]]:
    """A training step, and the ops of every backward half that was made."""
    halves: list[Counter[str]] = []

    def noted(half: fx.GraphModule) -> int:
        found = original(half) if accumulate else 0
        halves.append(Counter(ir.own_name(n) or str(n.target) for n in ir.calls(half.graph)))
        return found

    original = summed_products.accumulate
    monkeypatch.setenv("FUSEWRIGHT_PARTITION", "default")
    with monkeypatch.context() as patch:
        patch.setattr(lower.summed_products, "accumulate", noted)
        if not join:
            patch.setattr(partition.gated_again, "join", lambda half: 0)
        torch.manual_seed(0)
        model = fusewright.optimize(models.build(name).train(), lowering="fx", strict=True)
        return training.train_step(model, models.batch(), seed=3), halves


@pytest.mark.parametrize(("name", "unit"), [("llama", "glu"), ("phi3", "glu_packed")])
def test_a_unit_gets_its_value_from_its_own_backward(
    name: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, halves = stepped(name, monkeypatch)
    blocks = [ops for ops in halves if ops[f"{unit}_again_backward"]]
    assert blocks
    assert not any(ops[unit] or ops[f"{unit}_backward"] for ops in halves)
    wanted, before = stepped(name, monkeypatch, join=False)
    assert any(ops[unit] and ops[f"{unit}_backward"] for ops in before)
    assert torch.equal(step.loss, wanted.loss)
    for key, grad in wanted.grads.items():
        assert torch.equal(step.grads[key], grad), key


def test_gradients_of_what_several_layers_read_are_summed_by_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, halves = stepped("llama", monkeypatch)
    blocks = [ops for ops in halves if ops["glu_again_backward"]]
    assert blocks
    for ops in blocks:  # q, k, v; gate, up
        assert ops["aten.addmm_.default"] == 3
        assert not ops["aten.add.Tensor"]
    wanted, before = stepped("llama", monkeypatch, accumulate=False)
    assert all(not ops["aten.addmm_.default"] for ops in before)
    training.assert_same_step(step, wanted, 1e-6, "llama")


def _sum(change: Callable[[fx.Graph, fx.Node], Any] | None = None, **more: Any) -> fx.GraphModule:
    """reshape(a b) + reshape(c d) + reshape(e f); ``change`` gets the first product's view."""
    graph = fx.Graph()
    torch.manual_seed(0)

    def noted(node: fx.Node, value: torch.Tensor) -> fx.Node:
        node.meta["val"] = value
        return node

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        value = op(*fx.map_arg(args, ir.value), **kwargs)
        return noted(graph.call_function(op, args, kwargs), value)

    views = []
    for pair in ("ab", "cd", "ef"):
        sides = [noted(graph.placeholder(n), torch.randn(6, 6, dtype=torch.bfloat16)) for n in pair]
        views.append(call(aten.reshape.default, call(aten.mm.default, *sides), [2, 3, 6]))
    first = call(aten.add.Tensor, views[0], views[1], **more)
    outs = [call(aten.add.Tensor, first, views[2])]
    if change is not None:
        outs.append(change(graph, views[0]))
    graph.output(tuple(outs))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_a_sum_of_three_rounds_once_at_the_end() -> None:
    half = _sum()
    inputs = [n.meta["val"] for n in half.graph.find_nodes(op="placeholder")]
    (apart,) = half(*inputs)
    assert summed_products.accumulate(half) == 2
    assert len(half.graph.find_nodes(op="call_function", target=aten.mm.default)) == 1
    (summed,) = half(*inputs)
    a, b, c, d, e, f = (t.double() for t in inputs)
    exact = (a @ b + c @ d + e @ f).view(2, 3, 6)
    assert (summed - exact).abs().mean() <= (apart - exact).abs().mean()


def _read(graph: fx.Graph, view: fx.Node) -> fx.Node:
    return graph.call_function(aten.neg.default, (view,))


def test_a_product_that_somebody_else_reads_keeps_its_value() -> None:
    half = _sum(_read)
    inputs = [n.meta["val"] for n in half.graph.find_nodes(op="placeholder")]
    wanted = half(*inputs)
    assert summed_products.accumulate(half) == 0
    for got, expected in zip(half(*inputs), wanted, strict=True):
        assert torch.equal(got, expected)


def test_a_scaled_sum_is_left() -> None:
    assert summed_products.accumulate(_sum(alpha=2.0)) == 0


@pytest.mark.parametrize("waits", [False, True])
def test_a_gradient_that_waits_for_the_value_is_left(waits: bool) -> None:
    graph = fx.Graph()
    values = {n: torch.randn(3, 8) for n in ("dy", "gate", "up")}
    given = {}
    for name, value in values.items():
        given[name] = graph.placeholder(name)
        given[name].meta["val"] = value
    ops = torch.ops.fusewright
    h = graph.call_function(ops.glu.default, (given["gate"], given["up"], "silu", torch.float32))
    h.meta["val"] = values["gate"]
    dy = given["dy"]
    if waits:
        dy = graph.call_function(aten.add.Tensor, (dy, h))
        dy.meta["val"] = values["dy"]
    unit = graph.call_function(
        ops.glu_backward.default, (dy, given["gate"], given["up"], "silu", True, True)
    )
    unit.meta["val"] = (values["gate"], values["up"])
    read = graph.call_function(aten.neg.default, (h,))
    dgate = graph.call_function(operator.getitem, (unit, 0))
    dgate.meta["val"] = values["gate"]
    graph.output((read, dgate))
    half = fx.GraphModule(torch.nn.Module(), graph)
    wanted = half(*values.values())
    assert gated_again.join(half) == (not waits)
    for got, expected in zip(half(*values.values()), wanted, strict=True):
        assert torch.equal(got, expected)
