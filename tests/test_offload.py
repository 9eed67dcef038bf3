"""What blocks save may wait in the host's memory: the same bits, strides and views, and nothing left."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import models
import pytest
import torch
import training
from torch import nn

import fusewright
from fusewright.compiler import driver
from fusewright.compiler.planning import timeline
from fusewright.compiler.planning.devices import DEVICES
from fusewright.compiler.planning.plan import Planner, text_inputs, without_weights
from fusewright.patterns import DEFAULT
from fusewright.runtime import offload
from fusewright.runtime.offload import Offload

ROWS, LENGTH, LAYERS = 4, 64, 8


@pytest.fixture(autouse=True)
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)


class _Heads(nn.Module):
    """Saves views of one buffer, with strides, and something that all blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        a, b, c = self.up(x).chunk(3, -1)
        return x + self.down((a * b.sigmoid()).transpose(0, 1).transpose(0, 1) * c * shared)


def _step(blocks: list[_Heads], moved: Offload, twice: bool = False) -> list[torch.Tensor]:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    shared = torch.full((5, 16), 0.5)
    out = x
    for i, block in enumerate(blocks):
        with moved.of(str(i), block, ((out, shared), {})):
            out = block(out, shared)
    loss = out.square().sum()
    leaves = [x, *(p for block in blocks for p in block.parameters())]
    if twice:
        torch.autograd.grad(loss, leaves, retain_graph=True)
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("places", [(0, 1, 2, 3), (0, 2), (3,)], ids=str)
def test_the_same_bits(places: tuple[int, ...], twice: bool) -> None:
    blocks = [_Heads() for _ in range(4)]
    plain = _step(blocks, Offload({}))
    moved = Offload({str(i): i for i in places})
    for _ in range(2):
        for mine, theirs in zip(_step(blocks, moved, twice), plain, strict=True):
            assert torch.equal(mine, theirs)
    gc.collect()
    assert moved._last() is None, "what a step has moved outlives it"


def test_what_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy a buffer; parameters and shared values stay; what was copied is given back."""
    made: list[Any] = []
    made_as = offload._Parcel.__init__

    def noted(self: Any, lane: Any, buffer: torch.Tensor) -> None:
        made.append(self)
        made_as(self, lane, buffer)

    monkeypatch.setattr(offload._Parcel, "__init__", noted)
    blocks, moved = [_Heads() for _ in range(3)], Offload({"0": 0, "1": 1, "2": 2})
    shared, x = torch.full((5, 16), 0.5), torch.randn(5, 16)
    stay = {p.data_ptr() for b in blocks for p in b.parameters()} | {shared.data_ptr()}
    for i, block in enumerate(blocks):
        with moved.of(str(i), block, ((x, shared), {})):
            x = block(x, shared)
        assert len({id(p.source) for p in made if p.source is not None}) <= 8
    assert all(p.source is None or p.source.data_ptr() not in stay for p in made)
    sizes = [sum(t.numel() for t in p.host) for p in made]
    assert sizes.count(5 * 48 * 4) == 3  # the one buffer of a, b and c, once a block
    first = [p for p in made[: len(made) // 3]]
    assert all(p.source is None for p in first)
    x.sum().backward()
    assert all(p.here is not None for p in first)


@pytest.mark.parametrize("size", [1, 2**20, 2**20 + 1, 3 * 2**20 + 5, 2_809_856_000])
def test_pinned_memory_is_asked_for_in_powers_of_two(size: int) -> None:
    """What the allocator rounds up is under a piece's least size."""
    found = offload.pieces(size, 2**20)
    assert sum(found) == size and len(found) <= 14
    assert sum(1 << (n - 1).bit_length() for n in found) - size < 2**20


def test_memory_of_other_types_is_left_alone() -> None:
    class Own(torch.Tensor):
        pass

    block, moved = nn.Identity(), Offload({"0": 0})
    x = torch.randn(3).as_subclass(Own).requires_grad_()
    with moved.of("0", block, ((x,), {})):
        y = x.exp()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad.as_subclass(torch.Tensor), y.detach().as_subclass(torch.Tensor))


def adapted() -> Any:
    torch.manual_seed(0)
    return models.with_lora(models.build("llama", LAYERS), dropout=0.2).train()


def test_a_plan_goes_below_what_a_checkpoint_needs() -> None:
    """Behind a fast host nothing is waited for; what is moved is not counted as saved."""
    bare = without_weights(adapted())
    budgets: dict[float, int] = {}
    moved: dict[float, int] = {}
    spent: dict[float, float] = {}
    device = dataclasses.replace(DEVICES["h200"], launch=1e-9)
    for host in (0.0, 1e15):
        planner = Planner(
            bare, text_inputs(bare), DEFAULT, dataclasses.replace(device, host=host), (64, 512)
        )
        plan = planner.plan("auto")
        budgets[host] = plan.table[-1].budget
        small = planner.plan(budgets[host])
        assert timeline.needed(small.peak, planner.footing) <= budgets[host]
        moved[host] = len(small.offloaded)
        # Nothing is waited for where the host is fast: all is kept there sooner than run again.
        roomy = planner.plan(int(1.4 * budgets[0.0]))
        spent[host] = roomy.again
    assert budgets[1e15] < budgets[0.0]
    assert moved[0.0] == 0 < moved[1e15]
    assert spent[1e15] < spent[0.0]


def test_a_model_trains_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        driver, "_where", lambda model, device: dataclasses.replace(device, host=1e15)
    )
    batch = models.batch(rows=ROWS, length=LENGTH)
    plain = training.train_step(fusewright.optimize(adapted(), lowering="fx"), batch, seed=3)
    model = adapted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    ours = fusewright.optimize(model, lowering="fx", memory_budget=1, strict=True)
    with pytest.raises(timeline.DoesNotFit) as refused:
        ours(**batch)
    driver._required(ours).memory.budget = refused.value.least
    moved: list[int] = []
    made_as = offload._Parcel.__init__

    def noted(self: Any, lane: Any, buffer: torch.Tensor) -> None:
        moved.append(buffer.numel())
        made_as(self, lane, buffer)

    monkeypatch.setattr(offload._Parcel, "__init__", noted)
    for _ in range(2):
        step = training.train_step(ours, batch, seed=3)
        assert torch.equal(step.loss, plain.loss)
        for name, grad in plain.grads.items():
            assert torch.equal(step.grads[name], grad), name
    plan = driver._required(ours).memory.plan
    assert plan.offloaded and moved
