"""Blocks whose part after attention runs in tiles: the same loss and gradients, and how much is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training
from saved import saved_bytes

import fusewright
from fusewright.compiler import driver, tiles
from fusewright.compiler.planning import liveness, timeline
from fusewright.compiler.planning.block import Measure
from fusewright.compiler.planning.devices import DEVICES, host_memory
from fusewright.compiler.planning.footing import Footing, Head
from fusewright.compiler.planning.plan import Planner, text_inputs, without_weights
from fusewright.compiler.planning.timeline import DoesNotFit, Layer
from fusewright.patterns import DEFAULT
from fusewright.runtime import offload
from fusewright.runtime.tiles import Tail

ROWS, LENGTH = 2, 63  # tiles of both rows of a batch, and a last tile that is shorter


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TOKENS", 16)


def adapted(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = models.build("llama").to(dtype)
    return models.with_lora(model, dtype, dropout=dropout).train()


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that optimises a model under a plan with tiles in all layers, by a choice's name."""
    made = Planner.plan

    def optimise(model: Any, name: str) -> Any:
        def plan(self: Planner, *args: Any, **kwargs: Any) -> Any:
            found = made(self, *args, **kwargs)
            for path, block in self.blocks:
                choice = [c for c in block.choices if c.tiled and c.name.startswith(name)][-1]
                found.prices[path] = choice.price
                found.tiled.append(path)
            return found

        monkeypatch.setattr(Planner, "plan", plan)
        return fusewright.optimize(model, lowering="fx", memory_budget="auto", strict=True)

    return optimise


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Per run of a tail whether it had a graph, and its rows."""
    found: list[tuple[bool, int]] = []
    made = Tail.tiles

    def noted(self: Tail, inputs: Any) -> Any:
        for part, given in made(self, inputs):
            found.append((torch._C._current_graph_task_id() != -1, part.stop - part.start))
            yield part, given

    monkeypatch.setattr(Tail, "tiles", noted)
    return found


@pytest.mark.parametrize("choice", ["keep", "whole block"])
def test_the_same_step(choice: str, forced: Any, runs: list[tuple[bool, int]]) -> None:
    """Each tile once in the forward and once in the backward, within a checkpoint too."""
    batch = models.batch(rows=ROWS, length=LENGTH)
    plain = training.train_step(fusewright.optimize(adapted(), lowering="fx"), batch)
    assert not runs
    ours = forced(adapted(), choice)
    for _ in range(2):
        runs.clear()
        training.assert_same_step(training.train_step(ours, batch), plain, 1e-6)
        a_pass = [16] * 7 + [14]
        assert [rows for back, rows in runs if not back] == a_pass * models.LAYERS
        assert [rows for back, rows in runs if back] == a_pass * models.LAYERS
    plan = driver._required(ours).memory._planner
    if choice == "keep":  # a checkpoint's own hooks hide what it keeps
        measured = saved_bytes(ours, {path: () for path, _ in plan.blocks}, batch)
        for path, block in plan.blocks:
            at = next(c for c in block.choices if c.tiled and c.name == choice)
            said = liveness.measure(block, at, plan.device, ROWS, LENGTH).saved
            assert abs(measured[path] - said) <= 64


def test_bf16_is_not_worse_than_eager(forced: Any, runs: list[tuple[bool, int]]) -> None:
    """LoRA's gradients are sums over tiles, which must not cost exactness."""
    ours, eager = forced(adapted(torch.bfloat16), "keep"), adapted(torch.bfloat16)
    triples = []
    for seed in range(4):
        batch = models.batch(seed, rows=ROWS, length=LENGTH)
        steps = [training.train_step(m, batch) for m in (ours, eager)]
        triples.append((*steps, training.oracle_step(eager, batch)))
    assert runs
    training.assert_model_not_worse(training.exactness(triples), "tiles")


def test_sums_over_tiles_are_in_float32() -> None:
    """A weight's gradient is rounded once, however many tiles it is summed over."""
    torch.manual_seed(0)
    x = torch.randn(1, 512, 32).bfloat16().requires_grad_()
    w = torch.randn(8, 32).bfloat16().requires_grad_()
    dy = torch.randn(1, 512, 8).bfloat16()
    exact = dy.double()[0].T @ x.detach().double()[0]
    errors = []
    for tokens in (512, 8):
        tail = Tail(torch.nn.functional.linear, (0,), lambda rows, step=tokens: step, 8)
        dx, dw = torch.autograd.grad(tail(x, w), (x, w), dy)
        errors.append(float((dw.double() - exact).norm() / exact.norm()))
        assert torch.equal(dx, (dy @ w).detach())
    assert errors[1] < 1.5 * errors[0]


def test_random_draws_are_not_tiled() -> None:
    """Other masks would be drawn tile by tile: the plan has no such choice, and says nothing else."""
    bare = without_weights(adapted(dropout=0.2))
    planner = Planner(bare, text_inputs(bare), DEFAULT, DEVICES["h100"], (ROWS, LENGTH))
    planner.layers(ROWS, LENGTH)
    assert not any(c.tiled for _, block in planner.blocks for c in block.choices)


@pytest.mark.parametrize(
    ("rows", "step"), [(343_000, 7000), (8192, 8192), (20_000, 6672), (79_000, 7904), (5, 5)]
)
def test_rows_of_a_tile(rows: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal ones where they are whole tiles of a product; the last one may be shorter."""
    monkeypatch.setattr(tiles, "TOKENS", 8192)
    assert tiles.tokens(rows) == step


def test_a_plan_takes_tiles_where_nothing_else_fits(
    monkeypatch: pytest.MonkeyPatch, runs: list[tuple[bool, int]]
) -> None:
    """QLoRA at its least budget: tiles, values in the host's memory, and the same step."""
    pytest.importorskip("bitsandbytes")
    from quantised import Form, build

    monkeypatch.setattr(offload, "LEAST", 1)
    monkeypatch.setattr(
        driver, "_where", lambda model, device: dataclasses.replace(device, host=1e15)
    )
    batch = models.batch(rows=ROWS, length=48)
    plain = training.train_step(fusewright.optimize(build(Form()), lowering="fx"), batch)
    ours = fusewright.optimize(build(Form()), lowering="fx", memory_budget=1, strict=True)
    with pytest.raises(DoesNotFit) as refused:
        ours(**batch)
    memory = driver._required(ours).memory
    memory.budget = refused.value.least
    runs.clear()
    training.assert_same_step(training.train_step(ours, batch), plain, 1e-6)
    plan = memory.plan
    assert plan.tiled and plan.offloaded and runs
    assert {name for name in plan.counts if "tiled" in name} and plan.peak <= refused.value.least
    for block in {id(b): b for _, b in memory._planner.blocks}.values():
        block.choices = [c for c in block.choices if not c.tiled]
    with pytest.raises(DoesNotFit):
        memory._planner.plan(refused.value.least)


def test_the_host_s_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is offloaded fits there, or is run again; an earlier layer changes first."""
    fast, slow = Measure(0, 0, 0, 0.0, away=100), Measure(0, 0, 0, 1.0, away=10)
    layers = [Layer(f"layers.{i}", (fast, slow), 1.0) for i in range(4)]
    spared = timeline._spared(layers, [0] * 4, 250, lambda cost: True)
    assert spared == [1, 1, 0, 0] and timeline.away(layers, spared) <= 250
    assert timeline._spared(layers, [0] * 4, 30, lambda cost: True) is None
    kept = Measure(10**6, 0, 0, 0.0)
    layers = [dataclasses.replace(layer, front=(kept, *layer.front)) for layer in layers]
    nothing = Head(lambda b, s: 0.0, lambda b, s: 0.0, False)
    footing = Footing(50, {}, 0, 0, nothing, host=250)
    chosen = timeline.choose(layers, footing, 1, 1, 100_000)
    assert timeline.recompute(layers, chosen) == 2
    with pytest.raises(DoesNotFit):
        timeline.choose(layers, dataclasses.replace(footing, host=30), 1, 1, 100_000)


def test_the_host_s_memory_is_read(tmp_path: Path) -> None:
    """A container's limit counts where it is one."""
    limit, none = tmp_path / "limit", tmp_path / "none"
    limit.write_text("1000\n")
    none.write_text("max\n")
    assert host_memory([str(limit), str(none), str(tmp_path / "missing")]) == 1000
    assert host_memory([str(none)]) > 10**8
