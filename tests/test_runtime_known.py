"""Questions whose answer the host knows, and those that it must ask the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import training

import fusewright
from fusewright.compiler.planning import observed
from fusewright.compiler.records import Binding
from fusewright.compiler.session import Session
from fusewright.runtime.known import KnownValues
from fusewright.runtime.module import installed


def _positions() -> torch.Tensor:
    return (torch.arange(8) + 3).unsqueeze(0)


def _starts_anew(positions: torch.Tensor) -> torch.Tensor:
    steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    return ((steps != 1).cumsum(-1)[:, -1] == 0).all()


@pytest.mark.parametrize(
    "ask",
    [
        lambda: bool(_starts_anew(_positions())),
        lambda: _positions().max().item(),
        lambda: int((2 * _positions())[0, -1]),
        lambda: bool((_positions() < 12).logical_not().any()),
        lambda: [10, 20, 30][torch.arange(3)[1]],
        lambda: int(torch.cat([torch.arange(3), -torch.arange(4)], dim=0).min()),
    ],
)
def test_answered_as_the_device_would(ask: Callable[[], Any]) -> None:
    wanted = ask()
    with KnownValues("cpu") as known:
        assert ask() == wanted
    assert known.answered == 1


def _written() -> torch.Tensor:
    positions = _positions()
    positions[0, 0] = 0
    return positions


def _written_through_a_view() -> torch.Tensor:
    positions = torch.arange(8)
    positions.view(2, 4)[1].zero_()
    return positions


def _written_unseen() -> torch.Tensor:
    positions = torch.arange(8)
    positions.data[0] = 5
    return positions


def _address_given_away() -> torch.Tensor:
    positions = torch.arange(8)
    positions.data_ptr()
    return positions


def _into_another() -> torch.Tensor:
    out = torch.arange(8)
    torch.add(torch.arange(8), 1, out=out)
    return out


@pytest.mark.parametrize(
    "make",
    [_written, _written_through_a_view, _written_unseen, _address_given_away, _into_another,
     lambda: torch.arange(8.0), lambda: torch.arange(8) * 0.5, lambda: torch.zeros(8, dtype=int),
     lambda: torch.arange(8).float().long(), lambda: torch.arange(8) + torch.tensor(1)],
)  # fmt: skip
def test_asked_where_it_might_be_wrong(make: Callable[[], torch.Tensor]) -> None:
    wanted = make().sum().item()
    with KnownValues("cpu") as known:
        assert make().sum().item() == wanted
    assert known.answered == 0


def test_only_of_its_device() -> None:
    with KnownValues("cuda") as known:
        assert int(torch.arange(8)[2]) == 2
    assert known.answered == 0


def test_what_the_answer_was_made_of_may_change_later() -> None:
    with KnownValues("cpu") as known:
        positions = torch.arange(8)
        total = positions + 1
        positions.zero_()
        assert int(total.sum()) == 36
    assert known.answered == 1


def test_an_error_is_the_device_s_own() -> None:
    with KnownValues("cpu"), pytest.raises(RuntimeError, match="ambiguous|more than one"):
        bool(torch.arange(8) == 3)


def test_left_and_entered_again() -> None:
    with KnownValues("cpu") as known:
        assert known.leave()
        assert not known.leave()
        int(torch.arange(8)[2])
        assert known.answered == 0
        known.come_back()
        int(torch.arange(8)[2])
    assert known.answered == 1
    assert torch._C._len_torch_function_stack() == 0


def _session(model: torch.nn.Module) -> Session:
    bindings = (installed(m) for m in model.modules())
    session: Session = next(b for b in bindings if isinstance(b, Binding)).session
    return session


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_asks_nothing(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model's question after packed sequences, in a training step."""
    eager = models.build("llama")
    ours = fusewright.optimize(models.twin(eager), lowering="fx")
    _session(ours).asked_device = "cpu"
    if checkpointing:
        for model in (eager, ours):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    answered = []
    leave = KnownValues.leave

    def counted(self: KnownValues) -> bool:
        answered.append(self.answered)
        return leave(self)

    monkeypatch.setattr(KnownValues, "leave", counted)
    for seed in range(2):
        batch = {k: v for k, v in models.batch(seed).items() if k != "attention_mask"}
        steps = [training.train_step(m, batch) for m in (ours, eager)]
        training.assert_same_step(*steps, what="llama")
    assert max(answered) == 1
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_is_made_outside_of_it(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the mode every block would be captured anew."""
    model = models.build("llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ours = fusewright.optimize(model, lowering="fx", memory_budget="90%")
    _session(ours).asked_device = "cpu"
    modes = []
    observe = observed.observe

    def noted(*given: Any) -> observed.Observed:
        modes.append(torch._C._len_torch_function_stack())
        return observe(*given)

    monkeypatch.setattr(observed, "observe", noted)
    batch = {k: v for k, v in models.batch(0).items() if k != "attention_mask"}
    training.train_step(ours, batch)
    assert modes == [0]


@pytest.mark.gpu
def test_a_step_does_not_wait() -> None:
    """No synchronisation in a whole step on a GPU, which PyTorch itself would report."""
    model = fusewright.optimize(models.build("llama").cuda(), lowering="fx")
    batch = {k: v.cuda() for k, v in models.batch(0).items() if k != "attention_mask"}
    for _ in range(2):
        training.train_step(model, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
