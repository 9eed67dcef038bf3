"""Bad input and hard cases: a clear error or an honest line in the report, never a difference."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import training
from torch import nn

import fusewright


@pytest.fixture
def eager() -> Any:
    return models.build("llama")


@pytest.fixture
def ours(eager: Any) -> Any:
    return fusewright.optimize(models.twin(eager), lowering="fx")


def _assert_same(ours: Any, eager: Any, batch: dict[str, Any]) -> None:
    training.assert_same_step(training.train_step(ours, batch), training.train_step(eager, batch))


@pytest.mark.parametrize("thing", ["llama", None, 3, nn.Linear, {"model": 1}])
def test_not_a_module(thing: Any) -> None:
    for call in (fusewright.optimize, fusewright.report, fusewright.restore):
        with pytest.raises(TypeError, match=r"nn\.Module"):
            call(thing)


def test_optimised_already(ours: Any) -> None:
    with pytest.raises(ValueError, match="already.*restore"):
        fusewright.optimize(ours)


def test_a_part_is_optimised_already(ours: Any) -> None:
    with pytest.raises(ValueError, match="already"):
        fusewright.optimize(nn.ModuleDict({"policy": ours, "reference": models.build("llama")}))


def test_not_optimised(eager: Any) -> None:
    for call in (fusewright.report, fusewright.restore):
        with pytest.raises(ValueError, match="not optimi[sz]ed"):
            call(eager)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.GELU())])
def test_no_repeated_blocks(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="repeated"):
        fusewright.optimize(model)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("patterns", ["rms_norm", "rope2"], "rope2.*rms_norm"),
        ("lowering", "fast", "lowering.*fx.*inductor"),
        ("verify", "always", "verify.*first_step"),
        ("logits", "maybe", "logits.*lazy.*eager"),
        ("memory_budget", "22 GiBs", "memory_budget.*not a size"),
    ],
)
def test_unknown_option(eager: Any, option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusewright.optimize(eager, **{option: value})
    fusewright.optimize(eager, lowering="fx")  # nothing was left behind


def test_unknown_keyword(eager: Any) -> None:
    with pytest.raises(TypeError, match="budget"):
        fusewright.optimize(eager, budget=3)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("FUSEWRIGHT_DEBUG", "9"), ("FUSEWRIGHT_DISABLE", "rope2"), ("FUSEWRIGHT_VERIFY", "no")],
)
def test_malformed_environment(
    eager: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable):
        fusewright.optimize(eager)


def test_disabled_patterns(eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWRIGHT_DISABLE", "rope,glu")
    ours = fusewright.optimize(models.twin(eager), lowering="fx")
    _assert_same(ours, eager, models.batch())
    counts = fusewright.report(ours).counts
    assert "rope" not in counts and "glu" not in counts and counts["rms_norm"] == 5


def test_chosen_patterns(eager: Any) -> None:
    ours = fusewright.optimize(models.twin(eager), patterns=["rms_norm"], lowering="fx")
    _assert_same(ours, eager, models.batch())
    assert fusewright.report(ours).counts == {"rms_norm": 5}


def test_dump(eager: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("FUSEWRIGHT_DUMP", str(tmp_path))
    _assert_same(fusewright.optimize(models.twin(eager), lowering="fx"), eager, models.batch())
    stages = {p.name for p in tmp_path.rglob("*.py")}
    assert {"00_capture.py", "01_normalize.py"} <= stages
    for path in tmp_path.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")


@pytest.mark.parametrize("label", [models.VOCAB, 10 * models.VOCAB, -1])
def test_labels_out_of_range(ours: Any, label: int) -> None:
    batch = models.batch()
    batch["labels"][1, 3] = label
    with pytest.raises((IndexError, ValueError), match=r"(?i)out of (bounds|range)"):
        training.train_step(ours, batch)
    batch = models.batch()  # and the model trains on
    training.train_step(ours, batch)


@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": 5}], ids=["mean", "sum"])
def test_no_label_at_all(ours: Any, eager: Any, extra: dict[str, Any]) -> None:
    batch = models.batch() | extra
    batch["labels"] = torch.full_like(batch["labels"], -100)
    a, b = training.train_step(ours, batch), training.train_step(eager, batch)
    assert torch.equal(a.loss.isnan(), b.loss.isnan())
    for name, wanted in b.grads.items():
        torch.testing.assert_close(a.grads[name], wanted, equal_nan=True)


def test_one_token(ours: Any, eager: Any) -> None:
    batch = {k: v[:1, -2:] for k, v in models.batch().items()}
    _assert_same(ours, eager, batch)


def test_cache_forced_on_in_training(ours: Any, eager: Any) -> None:
    _assert_same(ours, eager, models.batch() | {"use_cache": True})
    assert any("cache" in note for note in fusewright.report(ours).notes)
    assert ours(**models.batch(), use_cache=True).past_key_values is not None


def test_embeddings_and_positions_as_inputs(ours: Any, eager: Any) -> None:
    batch = models.batch()
    ids = batch.pop("input_ids")
    batch["position_ids"] = torch.arange(16).expand(2, 16) % 8
    for model in (ours, eager):
        embedded = model.get_input_embeddings()(ids).detach()
        model._step = training.train_step(model, batch | {"inputs_embeds": embedded})
    training.assert_same_step(ours._step, eager._step)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}], ids=["cache", "no cache"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_positions(
    ours: Any, eager: Any, settings: dict[str, Any], checkpointing: bool
) -> None:
    """Transformers tells packed sequences apart where it makes no KV cache, and so do we."""
    batch = {k: v for k, v in models.batch().items() if k != "attention_mask"} | settings
    batch["position_ids"] = torch.arange(16).expand(2, 16) % 8
    if checkpointing:
        for model in (ours, eager):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    _assert_same(ours, eager, batch)
    bypassed = any("packed" in note for note in fusewright.report(ours).notes)
    assert bypassed == (not settings and not checkpointing)


def test_no_labels(ours: Any, eager: Any) -> None:
    """A loss made outside of the model."""
    steps = []
    for model in (ours, eager):
        model.zero_grad()
        batch = models.batch()
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        steps.append(training.Step(loss, {n: p.grad for n, p in model.named_parameters()}))
    training.assert_same_step(*steps)
    assert fusewright.report(ours).counts["rms_norm"] == 5


class _Layer(nn.Module):
    """A gated layer with a branch on its data, which Dynamo cannot capture in one graph."""

    def __init__(self, width: int, branch: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, width), nn.Linear(width, width)
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.gate(x)) * self.up(x)
        if self.branch and y.sum() > 0:
            y = y + 1
        return x + nn.functional.silu(self.gate(y)) * self.up(y)


class _Stack(nn.Module):
    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(16, branch) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _stack_step(model: nn.Module, x: torch.Tensor) -> training.Step:
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return training.Step(
        loss.detach(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )


def test_a_plain_stack_of_modules() -> None:
    eager = _Stack(branch=False)
    ours = fusewright.optimize(models.twin(eager), lowering="fx")
    x = torch.randn(4, 16)
    training.assert_same_step(_stack_step(ours, x), _stack_step(eager, x))
    assert fusewright.report(ours).counts == {"glu": 6}


def test_a_region_that_cannot_be_captured_whole() -> None:
    eager = _Stack(branch=True)
    ours = fusewright.optimize(models.twin(eager), lowering="fx")
    for sign in (1, -1, 1):
        x = sign * torch.randn(4, 16)
        training.assert_same_step(_stack_step(ours, x), _stack_step(eager, x))
    report = fusewright.report(ours)
    assert report.graph_breaks or report.eager_now
    assert "test_bad_input.py" in report.to_json()  # the user's own line


def test_strict_raises_for_a_region_that_cannot_be_captured() -> None:
    ours = fusewright.optimize(_Stack(branch=True), lowering="fx", strict=True)
    with pytest.raises(RuntimeError, match="_Layer"):
        _stack_step(ours, torch.randn(4, 16))


def test_a_hook_registered_later_fires(ours: Any, eager: Any) -> None:
    training.train_step(ours, models.batch())
    fired = []
    ours.model.layers[0].mlp.register_forward_hook(lambda *_: fired.append(1))
    _assert_same(ours, eager, models.batch())
    assert fired or "hook" in fusewright.report(ours).to_json()
