"""Memory plans over 4-bit weights: bytes, the dequantised scratch, budgets, and the same bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training
from saved import saved_bytes
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

from quantised import Form, build

import fusewright
from fusewright import targets
from fusewright.compiler import driver
from fusewright.compiler.planning.devices import DEVICES, on_cpu
from fusewright.compiler.planning.plan import Planner, text_inputs, without_weights
from fusewright.compiler.planning.timeline import DoesNotFit
from fusewright.kernels import qlora, room
from fusewright.patterns import DEFAULT
from fusewright.runtime import offload, packed

ROWS, LENGTH = 4, 48
BF16 = torch.bfloat16


def planner_of(model: Any, host: float = 0.0, rows: int = ROWS, length: int = LENGTH) -> Planner:
    bare = without_weights(model)
    device = dataclasses.replace(on_cpu(DEVICES["h100"]), host=host)
    return Planner(bare, text_inputs(bare), DEFAULT, device, (rows, length))


@pytest.fixture(scope="module")
def planner() -> Planner:
    return planner_of(build(Form()))


def all_bytes(model: Any) -> int:
    """Of all memory that the model holds, each once."""
    seen: dict[int, int] = {}
    for t in (*model.parameters(), *model.buffers()):
        for part in (t, *packed.states(t)):
            seen[part.data_ptr()] = part.untyped_storage().nbytes()
    return sum(seen.values())


def test_every_byte_of_the_weights_counts(planner: Planner) -> None:
    model = build(Form())
    assert planner.footing.parameters == all_bytes(model)
    weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    blocks = 256 * 128 // 64  # codes of both levels, the scales, their scales, and the offset
    assert sum(t.numel() * t.element_size() for t in packed.states(weight)) == (
        4 * 16 + blocks + 4 * 256 + 4 * (blocks // 256) + 4
    )
    assert all(
        t.is_meta
        for t in packed.states(
            without_weights(model).base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
        )
    )
    assert not weight.is_meta and not weight.quant_state.absmax.is_meta


def test_a_budget_is_kept_with_the_same_bits(planner: Planner) -> None:
    table = planner.plan("auto").table
    least, most = table[-1].budget, table[0].budget
    size = int(least + 0.5 * (most - least))
    batch = models.batch(rows=ROWS, length=LENGTH)
    plain = training.train_step(fusewright.optimize(build(Form()), lowering="fx"), batch)
    ours = fusewright.optimize(build(Form()), lowering="fx", memory_budget=size, strict=True)
    step = training.train_step(ours, batch)
    training.assert_same_step(step, plain, 0.0)
    memory = driver._required(ours).memory
    assert memory is not None and memory.plan is not None
    assert memory.plan.peak <= size and set(memory.plan.layers.values()) != {"keep"}
    layers = memory._planner.layers(ROWS, LENGTH)
    measured = saved_bytes(ours, {layer.path: () for layer in layers}, batch)
    blocks = dict(memory._planner.blocks)
    for layer in layers:
        at = [c.price for c in blocks[layer.path].choices].index(memory.plan.prices[layer.path])
        assert abs(measured[layer.path] - layer.front[at].saved) <= 64


def test_checkpointing_is_satisfied_and_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """QLoRA with checkpoints: less time than they take, values in the host's memory, the same bits."""
    monkeypatch.setattr(offload, "LEAST", 1)
    moved: list[torch.Tensor] = []
    made_as = offload._Parcel.__init__

    def noted(self: Any, lane: Any, buffer: torch.Tensor) -> None:
        moved.append(buffer)
        made_as(self, lane, buffer)

    monkeypatch.setattr(offload._Parcel, "__init__", noted)
    monkeypatch.setattr(
        driver, "_where", lambda model, device: dataclasses.replace(device, host=1e15)
    )
    batch = models.batch(rows=ROWS, length=LENGTH)
    plain = training.train_step(fusewright.optimize(build(Form(), layers=4), lowering="fx"), batch)
    model = build(Form(), layers=4)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    ours = fusewright.optimize(model, lowering="fx", memory_budget=1, strict=True)
    with pytest.raises(DoesNotFit) as refused:
        ours(**batch)
    driver._required(ours).memory.budget = refused.value.least
    step = training.train_step(ours, batch)
    training.assert_same_step(step, plain, 0.0)
    plan = driver._required(ours).memory.plan
    assert plan.offloaded and moved
    stay = {t.data_ptr() for p in model.parameters() for t in (p, *packed.states(p))}
    assert not any(t.data_ptr() in stay for t in moved)


class _Buffers(TorchDispatchMode):
    """Sizes in bytes of the uninitialised buffers that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default:
            self.sizes.append(out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("adapters", [True, False])
def test_what_a_run_takes_is_what_is_said(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch of the weights and the copy with room, in both directions, by the op itself."""
    monkeypatch.setattr(room, "serves", lambda *_: True)
    torch.manual_seed(0)
    form, heights, width = Form(compute=BF16), [64, 32], 128
    made = [form.weight(torch.randn(h, width)) for h in heights]
    states = [p.quant_state for p in made]
    x = torch.randn(2, 7, width, dtype=BF16)
    down = [torch.randn(8, width, dtype=BF16) for _ in heights] if adapters else []
    up = [torch.randn(h, 8, dtype=BF16) for h in heights] if adapters else []
    layout = ([0, 1], [-1, -1], [2.0, 2.0]) if adapters else ([], [], [])
    group = (x, [], [p.data for p in made], [None, None], down, up, *layout)
    rest = ([s.absmax for s in states], [s.offset for s in states],
            [s.state2.absmax for s in states], [s.state2.code for s in states], heights,
            ["nf4"] * 2, [64] * 2, [256] * 2)  # fmt: skip
    args = (*group, heights, BF16, False, False, *rest)
    with _Buffers() as seen:
        ys, thin = qlora.reference_fwd(*args)
    said = qlora._forward_passing(args, (ys, thin))
    assert sum(s for s in seen.sizes if s > 16) == said.memory
    packed_bytes = sum(p.numel() for p in made)
    assert said.moved == said.memory + packed_bytes
    args = ([torch.ones_like(y) for y in ys], thin, *group, False, *rest, True, *[adapters] * 4)
    with _Buffers() as seen:
        found = qlora.reference_bwd(*args)
    said = qlora._backward_passing(args, found)
    assert sum(s for s in seen.sizes if s > 16) == said.memory
    assert qlora._backward_passing((*args[:-5], False, *args[-4:]), found) == (0, 0)


def test_by_name_as_by_the_model(tmp_path: Path) -> None:
    """A config with "nf4" has the bytes and the formulas of a model that bitsandbytes has packed."""
    model = build(Form(compute=BF16, dtype=BF16), thin=torch.float32)
    config = model.config
    config.dtype = None
    (tmp_path / "config.json").write_text(config.to_json_string())
    question = targets.Question(ROWS, LENGTH, "bfloat16", 4, base="nf4")
    built = targets.build(str(tmp_path), question).model
    theirs = dict(model.named_parameters())
    for name, p in built.named_parameters():
        assert p.shape == theirs[name].shape and p.dtype is theirs[name].dtype, name
        mine, other = (
            sorted((tuple(t.shape), str(t.dtype)) for t in packed.states(q))
            for q in (p, theirs[name])
        )
        assert mine == other, name
    plans = [
        fusewright.plan(str(tmp_path), ROWS, LENGTH, device="h100", lora=4, base="nf4"),
        fusewright.plan(model, ROWS, LENGTH, device="h100"),
    ]
    assert plans[0].formulas == plans[1].formulas
    assert plans[0].peak == pytest.approx(plans[1].peak, rel=1e-3)  # a table that two layers share
    with pytest.raises(targets.BadTarget, match="base"):
        targets.build(str(tmp_path), dataclasses.replace(question, lora=0))
