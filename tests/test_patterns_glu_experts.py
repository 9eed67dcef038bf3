"""Gated units inside of experts: rewritten in each way of running them, the router left as it is."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch

import fusewright

CASES = [
    ("qwen3_moe", "grouped_mm", "glu_packed"),
    ("qwen3_moe", "batched_mm", "glu_packed"),
    ("gpt_oss", "grouped_mm", "glu_clamped_packed"),
    ("gpt_oss", "batched_mm", "glu_clamped_packed"),
]
_ROUTING = (torch.ops.aten.topk.default, torch.ops.aten.softmax.int)


def _targets(record: Any, rewritten: bool) -> list[Any]:
    graph = (record.rewritten if rewritten else record.canonical).graph
    return [node.target for node in graph.nodes]


@pytest.mark.parametrize(("name", "way", "op"), CASES)
def test_the_experts_unit_is_rewritten_and_the_router_is_not(name: str, way: str, op: str) -> None:
    model = models.build(name, experts_implementation=way)
    plain = models.twin(model)
    fusewright.optimize(model, lowering="fx")
    batch = models.batch()
    losses = [m(**batch, use_cache=False).loss for m in (model, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for ours, eager in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, eager.grad, rtol=1e-3, atol=1e-5)
    report = fusewright.report(model)
    rows = [r for r in report.rows if r.pattern == "glu" and "experts" in r.where]
    assert [(r.status, r.count, r.kernel) for r in rows] == [("fired", models.LAYERS, op)]


def test_the_choice_of_experts_is_computed_as_before() -> None:
    from graphs import capture

    def experts(x, router, gate_up, down):
        scores = torch.softmax(x @ router, dim=-1)
        weight, chosen = scores.topk(2, dim=-1)
        both = torch.bmm(x.repeat_interleave(2, 0).unsqueeze(1), gate_up[chosen.flatten()])
        gate, up = both.squeeze(1).chunk(2, dim=-1)
        out = torch.bmm((torch.nn.functional.silu(gate) * up).unsqueeze(1), down[chosen.flatten()])
        return (out.squeeze(1) * weight.flatten().unsqueeze(1)).view(-1, 2, x.shape[-1]).sum(1)

    shapes = ((6, 8), (8, 4), (4, 8, 24), (4, 12, 8))
    record = capture(experts, [torch.randn(s, requires_grad=True) for s in shapes])
    for target in _ROUTING:
        assert _targets(record, True).count(target) == _targets(record, False).count(target) == 1
    assert torch.ops.fusewright.glu_packed.default in _targets(record, True)


def test_experts_in_a_loop_are_left_alone_and_the_report_says_so() -> None:
    model = models.build("qwen3_moe", experts_implementation="eager")
    plain = models.twin(model)
    fusewright.optimize(model, lowering="fx")
    batch = models.batch()
    losses = [m(**batch, use_cache=False).loss for m in (model, plain)]
    torch.testing.assert_close(*losses)
    report = fusewright.report(model)
    assert not [r for r in report.rows if r.pattern == "glu"] and report.counts["rms_norm"] == 9
    said = {path: why for path, why in report.eager_now.items() if path.endswith("experts")}
    assert len(said) == models.LAYERS
    for why in said.values():
        assert "the graph breaks in it at modeling_" in why
        assert "set_experts_implementation('grouped_mm')" in why
