"""Memory plans: predicted bytes against measured ones, the same bits, budgets, and what cannot fit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training
from saved import saved_bytes
from typer.testing import CliRunner

import fusewright
from fusewright import cli
from fusewright.compiler import driver, pipeline
from fusewright.compiler.planning import budget, observed, timeline
from fusewright.compiler.planning.block import Measure
from fusewright.compiler.planning.devices import DEVICES, UnknownDevice, describe, on_cpu
from fusewright.compiler.planning.footing import Footing, Head
from fusewright.compiler.planning.plan import Planner, text_inputs, without_weights
from fusewright.compiler.planning.timeline import DoesNotFit, Layer
from fusewright.compiler.stored import Stored
from fusewright.kernels import room
from fusewright.patterns import DEFAULT

ROWS, LENGTH = 4, 64


def adapted() -> Any:
    torch.manual_seed(0)
    return models.with_lora(models.build("llama"), dropout=0.2).train()


@pytest.fixture(scope="module")
def planner() -> Planner:
    bare = without_weights(adapted())
    device = on_cpu(DEVICES["h200"])
    return Planner(bare, text_inputs(bare), DEFAULT, device, (ROWS, LENGTH))


@pytest.fixture(scope="module")
def plan(planner: Planner) -> Any:
    return planner.plan("auto")


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("16GiB", 16 * 2**30),
        (" 1.5 gb", 1_500_000_000),
        ("90%", 90),
        (0.5, 50),
        (1.0, 100),
        (12345, 12345),
        (2e9, 2_000_000_000),
        ("auto", 95),
    ],
)
def test_a_budget_is_read(written: Any, wanted: int) -> None:
    assert budget.parse(written, 100) == wanted


@pytest.mark.parametrize("written", ["16 GiBs", "", "-1GiB", "120%", 0, -3, float("nan"), "0"])
def test_nonsense_is_no_budget(written: Any) -> None:
    with pytest.raises(ValueError, match="memory_budget"):
        budget.parse(written, 100)


def test_what_is_no_size_at_all() -> None:
    with pytest.raises(TypeError, match="memory_budget"):
        budget.parse(True, 100)


def test_devices_by_their_long_names() -> None:
    assert describe("NVIDIA H200") is DEVICES["h200"]
    assert describe("NVIDIA A100-SXM4-40GB") is DEVICES["a100-40gb"]
    assert describe("NVIDIA A100 80GB PCIe") is DEVICES["a100"]
    with pytest.raises(UnknownDevice, match=r"b9000.*h200"):
        describe("b9000")


def test_time_falls_as_the_budget_grows(plan: Any) -> None:
    assert len(plan.table) > 4
    for more, less in itertools.pairwise(plan.table):
        assert more.budget > less.budget and more.seconds <= less.seconds
        assert less.peak <= more.peak <= more.budget
    assert plan.table[0].again == 0 and plan.table[-1].again > 0
    assert set(plan.layers.values()) == {"keep"} and plan.peak <= plan.budget
    assert plan.peak == max(e.bytes for e in plan.timeline)
    assert json.loads(plan.to_json())["timeline"][-1]["name"] == "optimizer step"
    assert "optimizer step" in str(plan)


@pytest.mark.parametrize("at", [3, -1])
def test_a_budget_is_kept_and_the_bits_are_the_same(plan: Any, at: int) -> None:
    """What the blocks keep is what was predicted, whatever is run again for it."""
    batch = models.batch(rows=ROWS, length=LENGTH)
    plain = training.train_step(fusewright.optimize(adapted(), lowering="fx"), batch)
    size = plan.table[at].budget
    ours = fusewright.optimize(adapted(), lowering="fx", memory_budget=size, strict=True)
    step = training.train_step(ours, batch)
    assert torch.equal(step.loss, plain.loss)
    for name, grad in plain.grads.items():
        assert torch.equal(step.grads[name], grad), name
    memory = driver._required(ours).memory
    assert memory is not None and memory.plan is not None and memory.plan.peak <= size
    layers = memory._planner.layers(ROWS, LENGTH)
    whole = any(price == 0 for price in memory.plan.prices.values())
    assert whole == (at == -1)
    if not whole:  # a checkpoint's own hooks hide what it keeps
        fronts = {layer.path: layer.front for layer in layers}
        blocks = dict(memory._planner.blocks)
        measured = saved_bytes(ours, fronts, batch)
        for path, name in memory.plan.layers.items():
            place = [c.price for c in blocks[path].choices].index(memory.plan.prices[path])
            assert blocks[path].choices[place].name == name
            # Attention's two numbers of random state are not made on the CPU, masks are.
            assert abs(measured[path] - fronts[path][place].saved) <= 64


def checkpointed(model: Any) -> list[Any]:
    layers = driver._required(model).memory.plan.layers
    return [model.get_submodule(path) for path in layers]


def test_gradient_checkpointing_is_satisfied_by_the_plan() -> None:
    """No more memory than with every block under a checkpoint, less time, and the same bits.

    An amount of memory that the user names is that much, though.
    """
    batch = models.batch(rows=ROWS, length=LENGTH)
    plain = training.train_step(fusewright.optimize(adapted(), lowering="fx"), batch, seed=3)
    model = adapted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    ours = fusewright.optimize(model, lowering="fx", memory_budget="90%", strict=True)
    step = training.train_step(ours, batch, seed=3)
    assert torch.equal(step.loss, plain.loss)
    for name, grad in plain.grads.items():
        assert torch.equal(step.grads[name], grad), name
    session = driver._required(ours)
    plan = session.memory.plan
    layers = session.memory._planner.layers(ROWS, LENGTH)
    whole = [len(layer.front) - 1 for layer in layers]
    assert plan.peak <= plan.budget <= session.memory._planner.checkpointed(ROWS, LENGTH)
    assert plan.again <= timeline.recompute(layers, whole)
    assert any("under a checkpoint" in note for note in session.notes)
    theirs = {m: m.__dict__["_gradient_checkpointing_func"] for m in checkpointed(ours)}
    assert len(theirs) == models.LAYERS
    for layer in theirs:
        layer._gradient_checkpointing_func = None  # calling it would fail
    training.assert_same_step(training.train_step(ours, batch, seed=3), plain)
    for layer, function in theirs.items():
        layer._gradient_checkpointing_func = function
    fusewright.restore(ours)
    again = training.train_step(ours, batch, seed=3)  # the model's own checkpoints are back
    training.assert_same_step(again, plain)
    more = fusewright.optimize(model, lowering="fx", memory_budget="1GiB", strict=True)
    training.assert_same_step(training.train_step(more, batch, seed=3), plain)
    assert driver._required(more).memory.plan.again < plan.again


def test_a_step_that_cannot_fit_is_refused_before_it_runs(planner: Planner) -> None:
    ours = fusewright.optimize(adapted(), lowering="fx", memory_budget=1000)
    with pytest.raises(DoesNotFit, match="the least that does is") as refused:
        ours(**models.batch(rows=ROWS, length=LENGTH))
    least = refused.value.least
    with pytest.raises(DoesNotFit):
        planner.plan(least - 1)
    made = planner.plan(least)
    assert timeline.needed(made.peak, planner.footing) <= least
    assert made.longest >= LENGTH and set(made.layers.values()) != {"keep"}
    assert planner.plan(least, (ROWS, made.longest)).peak <= least
    with pytest.raises(DoesNotFit):
        planner.plan(least, (ROWS, made.longest + made.longest // 10 + 2))
    planner.sizes = ROWS, LENGTH


def _layers(count: int, seed: int) -> list[Layer]:
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for i in range(count):
        saved = sorted(torch.randint(10, 1000, (4,), generator=generator).tolist(), reverse=True)
        again = sorted(torch.rand(4, generator=generator).tolist())
        front = tuple(Measure(s, 0, 0, t) for s, t in zip(saved, again, strict=True))
        layers.append(Layer(f"layers.{i}", front, 1.0))
    return layers


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_of_layers_is_the_best_there_is(seed: int) -> None:
    layers = _layers(5, seed)
    nothing = Head(lambda b, s: 0.0, lambda b, s: 0.0, False)
    footing = Footing(parameters=50, gradients={}, optimizer=0, row=0, head=nothing)
    ways = list(itertools.product(range(4), repeat=5))
    least = timeline.needed(timeline.peak(layers, [3] * 5, footing, 1, 1), footing)
    most = timeline.needed(timeline.peak(layers, [0] * 5, footing, 1, 1), footing)
    for share in (0.1, 0.35, 0.6, 0.9):
        size = int(least + share * (most - least)) + 5
        fitting = [
            w
            for w in ways
            if timeline.needed(timeline.peak(layers, w, footing, 1, 1), footing) <= size
        ]
        best = min(timeline.recompute(layers, w) for w in fitting)
        chosen = timeline.choose(layers, footing, 1, 1, size)
        assert timeline.needed(timeline.peak(layers, chosen, footing, 1, 1), footing) <= size
        assert timeline.recompute(layers, chosen) <= best + 1e-9


def test_the_command_line(tmp_path: Path) -> None:
    config = models.build("llama").config
    (tmp_path / "config.json").write_text(config.to_json_string())
    question = ["plan", str(tmp_path), "--batch", "4", "--sequence", "64", "--lora", "4"]
    question += ["--device", "h200", "--dtype", "float32"]
    picture = tmp_path / "plan.png"
    told = CliRunner().invoke(cli.app, [*question, "--json", "--png", str(picture)])
    assert told.exit_code == 0, told.output
    answer = json.loads(told.stdout)
    assert answer["device"] == "h200" and len(answer["layers"]) == models.LAYERS
    assert picture.stat().st_size > 10_000
    nonsense = CliRunner().invoke(cli.app, [*question, "--budget", "much"])
    assert nonsense.exit_code == 2 and "not a size" in nonsense.stderr


def test_what_the_environment_asks_to_verify_is_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without its weights has no values that could be verified."""
    monkeypatch.setenv("FUSEWRIGHT_VERIFY", "first_step")
    bare = without_weights(adapted())
    seen = observed.observe(bare, DEFAULT, text_inputs(bare)(ROWS, LENGTH))
    assert seen.head is not None and not seen.missed


def test_equal_blocks_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block's stream wants no gradient; its joint graph is still its own."""
    captured: list[str] = []
    compiling = pipeline.compile_graph

    def counted(gm: Any, inputs: Any, session: Any, kind: str, region: str) -> Any:
        captured.append(kind)
        return compiling(gm, inputs, session, kind, region)

    monkeypatch.setattr(pipeline, "compile_graph", counted)
    bare = without_weights(adapted())
    seen = observed.observe(bare, DEFAULT, text_inputs(bare)(ROWS, LENGTH))
    assert captured.count("block") == 1 and "leaf" not in captured
    gradients = {
        tuple(paths): sum(g is not None for g in joint.graph.output_node().args[0][1:])
        for joint, _, paths in seen.joints
    }
    first, *others = sorted(gradients, key=len)
    assert len(first) == 1 and [len(o) for o in others] == [models.LAYERS - 1]
    assert gradients[first] + 1 == gradients[others[0]]


def test_weights_lie_as_the_plan_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No capture is thrown away to find out how they are to lie."""
    monkeypatch.setattr(room, "serves", lambda *_: True)
    asked: list[str] = []
    asking = Stored.ask

    def noted(self: Any, module: Any, path: str, wishes: Any) -> None:
        asked.append(path)
        asking(self, module, path, wishes)

    monkeypatch.setattr(Stored, "ask", noted)
    batch = models.batch(rows=ROWS, length=LENGTH)
    plain = training.train_step(fusewright.optimize(adapted(), lowering="fx"), batch, seed=3)
    assert len(asked) == 1
    ours = fusewright.optimize(adapted(), lowering="fx", memory_budget="1GiB", strict=True)
    training.assert_same_step(training.train_step(ours, batch, seed=3), plain)
    assert len(asked) == 1 and any(room.owned(p.data) for p in ours.parameters())
