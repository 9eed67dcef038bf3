"""Blocks run as autograd functions of their own, with their forward kept or run again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import batch, build, with_lora
from torch import nn
from training import assert_same_step, train_step

import fusewright
from fusewright.compiler import driver
from fusewright.compiler.session import Session
from fusewright.runtime import region
from fusewright.runtime.region import Layout, Values, joined


class _Counted:
    """How many blocks were their own checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        original = Session.rerunning

        def rerunning(session: Session) -> Any:
            self.times += 1
            return original(session)

        monkeypatch.setattr(Session, "rerunning", rerunning)


@pytest.fixture(scope="module")
def llamas() -> tuple[nn.Module, nn.Module]:
    eager = with_lora(build("llama"))
    ours = fusewright.optimize(copy.deepcopy(eager), lowering="fx", verify="off")
    return eager, ours


def _kept_by(model: nn.Module, given: Any) -> list[int]:
    """The addresses of what autograd hands to the hooks on what it keeps."""
    kept = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**given)
    return [t.data_ptr() for t in kept]


def _records(model: nn.Module) -> list[Any]:
    return [r for r in driver._required(model).records if r.kind == "block"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_runs_its_own_forward_again(
    llamas: Any, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same step as eager's; from the second on without torch's checkpoint, if that keeps nothing else."""
    counted = _Counted(monkeypatch)
    for model in llamas:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    eager, ours = llamas
    try:
        for seed, length in enumerate((16, 16, 12)):
            given = batch(seed, length=length)
            assert_same_step(train_step(ours, given), train_step(eager, given))
            assert counted.times == (0 if reentrant else 2 * seed)
    finally:
        for model in llamas:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()


def test_what_lives_with_the_module_is_not_handed_to_hooks(llamas: Any) -> None:
    _, ours = llamas
    given = batch(0)
    train_step(ours, given)
    assert any(r.repeatable for r in _records(ours))
    kept = _kept_by(ours, given)
    weights = {p.data_ptr() for p in ours.base_model.model.model.layers.parameters()}
    assert kept and weights.isdisjoint(kept)


def test_a_weight_that_changes_before_the_backward_is_refused(llamas: Any) -> None:
    _, ours = llamas
    train_step(ours, batch(0))
    loss = ours(**batch(0)).loss
    weight = ours.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"].weight
    with torch.no_grad():
        weight.add_(0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_graphs_that_are_kept_and_graphs_of_gradients(llamas: Any) -> None:
    _, ours = llamas
    given = batch(1)
    train_step(ours, given)
    wanted = [p for p in ours.parameters() if p.requires_grad]
    loss = ours(**given).loss
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)
    made = torch.autograd.grad(ours(**given).loss, wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        sum(g.sum() for g in made).backward()


def test_halves_that_inductor_has_compiled() -> None:
    """Their second forward is plain Python, and gives what the backward was compiled for."""
    eager = with_lora(build("llama"))
    ours = fusewright.optimize(copy.deepcopy(eager), lowering="inductor", verify="off")
    for model in (eager, ours):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for seed in range(3):
        given = batch(seed)
        assert_same_step(train_step(ours, given), train_step(eager, given))
    assert all(r.repeatable and r.lowering == "inductor" for r in _records(ours))


def test_dropout_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second run must draw the same numbers."""
    counted = _Counted(monkeypatch)
    eager = with_lora(build("llama"), dropout=0.2)
    ours = fusewright.optimize(copy.deepcopy(eager), lowering="fx", verify="off")
    for model in (eager, ours):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for seed in range(2):
        given = batch(seed)
        assert_same_step(train_step(ours, given, seed=seed), train_step(eager, given, seed=seed))
    assert counted.times == 0 and not any(r.repeatable for r in _records(ours))


def _halves() -> tuple[Any, Any, Layout]:
    """y, z = x w n, (x w).detach() of x, w and a number n; w lives with the module."""

    def forward(args: list[Any]) -> Any:
        x, w, n = args
        args.clear()
        product = x * w
        return (product * n).view(x.shape), product + 0, product

    def backward(args: list[Any]) -> Any:
        n, product, w, up = args
        args.clear()
        return up * w * n, (up * product * n / w).sum(0), None

    given = Values((2,), (0,), (1,), (1, 2, 0))
    read = Values((2,), (5,), (1,), (0, 1, 2, 3))
    form = type("Form", (), {"memory_format": torch.contiguous_format, "size": 0, "stride": 0})
    fits = (region.fitting(form),)
    return forward, backward, Layout(2, (1,), ((0, frozenset({0})),), (0, 1), given, read, (0,), fits, True)  # fmt: skip


@pytest.mark.parametrize("way", [0, 1], ids=["kept", "run again"])
def test_halves_as_one_function(way: int) -> None:
    forward, backward, layout = _halves()
    run = joined(forward, backward, layout)[way]
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    y, z = run((x, w, 3))
    assert y.requires_grad and not z.requires_grad and not y._is_view()
    assert y._dynamo_weak_dynamic_indices == {0}
    up = torch.randn(4, 3).t()
    grads = torch.autograd.grad(y, (x, w), up, retain_graph=True)
    expected = torch.autograd.grad(x * w * 3, (x, w), up)
    torch.testing.assert_close(grads, expected)
    with torch.no_grad():
        x.add_(0)
    if way:
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            torch.autograd.grad(y, (x, w), up)
    torch.use_deterministic_algorithms(True)
    try:
        y, _ = run((x, w, 3))
        with pytest.raises(RuntimeError, match="deterministic"):
            y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", [0, 1], ids=["kept", "run again"])
def test_hooks_on_what_is_kept_run_in_the_backward_s_own_state(way: int) -> None:
    """A checkpoint's recompute is such a hook: compiled code is guarded on torch functions being on."""
    forward, backward, layout = _halves()
    run = joined(forward, backward, layout)[way]
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    states = []

    def unpack(t: torch.Tensor) -> torch.Tensor:
        states.append(torch._C._is_torch_function_enabled())
        return t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y, _ = run((x, w, 3))
    y.sum().backward()
    assert states and all(states)


def test_what_is_written_over_runs_once() -> None:
    forward, backward, layout = _halves()
    once, again = joined(forward, backward, layout._replace(donated=True))
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    for run, refused in ((once, True), (again, False)):
        y, _ = run((x, w, 3))
        if refused:
            with pytest.raises(RuntimeError, match="donated"):
                y.sum().backward(retain_graph=True)
        else:
            y.sum().backward(retain_graph=True)
        y.sum().backward()
