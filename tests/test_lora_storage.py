"""The life of a model whose frozen weights were moved next to room for their adapters.

On the CPU nothing is moved by itself; here it is, so that what users do to a model is tried on it.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training
from peft import PeftModel
from torch import nn

import fusewright
from fusewright.compiler import pipeline, retell
from fusewright.kernels import room


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The augmented product pays everywhere."""
    monkeypatch.setattr(room, "serves", lambda *_: True)


def adapted(**options: Any) -> Any:
    return models.with_lora(models.build("llama"), **options).train()


def moved(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if room.owned(p.data)]


def trained(**options: Any) -> Any:
    """An optimised model after one step, its weights moved."""
    ours = fusewright.optimize(adapted(**options), lowering="fx")
    training.train_step(ours, models.batch())
    assert len(moved(ours)) == 14  # seven linears of two layers
    return ours


def losses(model: Any, count: int = 3) -> list[float]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=0.1)
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        loss = model(**models.batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def assert_same_losses(ours: Any, eager: Any) -> None:
    for mine, theirs in zip(losses(ours), losses(eager), strict=True):
        assert abs(mine - theirs) <= 1e-5 * abs(theirs)


def test_weights_are_the_same_parameters_and_values() -> None:
    ours = adapted()
    before = dict(ours.named_parameters())
    values = {n: p.detach().clone() for n, p in before.items()}
    fusewright.optimize(ours, lowering="fx")
    training.train_step(ours, models.batch())
    for name, parameter in ours.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, values[name])
    for name, value in ours.state_dict().items():
        if name in values:
            assert torch.equal(value, values[name])


def test_layers_of_one_input_share_a_buffer() -> None:
    layer = trained().base_model.model.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    together = [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]
    weights = [[m.base_layer.weight.data for m in group] for group in together]
    assert all(room.find(group, 1, 1) is not None for group in weights)
    assert len({g[0].untyped_storage().data_ptr() for g in weights}) == 4


def test_dropout_and_checkpointing() -> None:
    ours, eager = (adapted(dropout=0.3) for _ in range(2))
    for model in (ours, eager):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fusewright.optimize(ours, lowering="fx")
    assert_same_losses(ours, eager)
    assert moved(ours)


def test_restore_is_bit_identical_and_gives_the_memory_back() -> None:
    ours, eager = trained(), adapted()
    ours.zero_grad()
    fusewright.restore(ours)
    assert not moved(ours)
    assert all(p.is_contiguous() for p in ours.parameters())
    assert losses(ours) == losses(eager)


def test_evaluation_and_generation() -> None:
    ours, eager = trained().eval(), adapted().eval()
    batch = models.batch()
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, eager(**batch).logits)
    ids = batch["input_ids"][:, :4]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), eager.generate(ids, **settings))


def test_merge_and_unload() -> None:
    ours, eager = trained(), adapted()
    whole, expected = ours.merge_and_unload(), eager.merge_and_unload()
    for (name, a), (_, b) in zip(
        whole.named_parameters(), expected.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)


def test_switching_and_disabling_adapters() -> None:
    pair = [trained(), adapted()]
    for model in pair:
        torch.manual_seed(3)
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        for name, p in model.named_parameters():
            if "second" in name:
                nn.init.normal_(p, std=0.1)
        model.set_adapter("second")
    assert_same_losses(*pair)
    for model in pair:
        model.set_adapter("default")
    assert_same_losses(*pair)
    with pair[0].disable_adapter(), pair[1].disable_adapter(), torch.no_grad():
        a, b = (float(m(**models.batch()).loss) for m in pair)
    assert abs(a - b) <= 1e-5 * abs(b)


def test_a_new_dtype_moves_the_weights_again() -> None:
    ours = trained()
    ours.to(torch.bfloat16)
    assert not moved(ours)
    training.train_step(ours, models.batch())
    assert len(moved(ours)) == 14
    assert all(p.dtype is torch.bfloat16 for p in moved(ours))


def test_a_deep_copy_is_of_the_whole_model() -> None:
    """The outer wrapper, which hands on what it lacks to the model inside, optimised as before."""
    ours = fusewright.optimize(adapted(), lowering="fx")
    twin = copy.deepcopy(ours)
    assert type(twin) is PeftModel
    a, b = (training.train_step(m, models.batch()) for m in (ours, twin))
    assert torch.equal(a.loss, b.loss) and a.grads.keys() == b.grads.keys()
    assert fusewright.report(twin).counts == fusewright.report(ours).counts


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickled(m)], ids=["deepcopy", "pickle"])
def test_a_copy_has_weights_of_its_own(twin: Callable[[Any], Any]) -> None:
    ours = trained()
    copied = twin(ours)
    addresses = {p.data_ptr() for p in ours.parameters()}
    assert not addresses & {p.data_ptr() for p in copied.parameters()}
    assert_same_losses(copied.train(), adapted())
    assert_same_losses(ours, adapted())


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_saved_adapters_load_without_us(tmp_path: Path) -> None:
    ours = trained()
    losses(ours)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.build("llama"), tmp_path).eval()
    with torch.no_grad():
        a, b = (m(**models.batch()).loss for m in (ours.eval(), loaded))
    torch.testing.assert_close(a, b)


def test_the_whole_model_is_saved(tmp_path: Path) -> None:
    ours = trained()
    base = ours.unload()
    base.save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, base.state_dict()[name]), name


def test_weights_in_somebody_elses_memory_stay() -> None:
    ours, eager = adapted(), adapted()
    flat = torch.zeros(100_000)
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    flat[: layer.weight.numel()] = layer.weight.data.flatten()
    layer.weight.data = flat[: layer.weight.numel()].view_as(layer.weight)
    fusewright.optimize(ours, lowering="fx")
    assert_same_losses(ours, eager)
    notes = fusewright.report(ours).notes
    assert any("q_proj" in n and "somebody else's memory" in n for n in notes), notes
    assert layer.weight.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert len(moved(ours)) == 11  # all but the three that would lie together


def test_weights_that_are_gathered_for_each_use_stay() -> None:
    ours = adapted()
    layer = ours.base_model.model.model.layers[1].mlp.down_proj.base_layer
    layer.weight.ds_id = 7  # as ZeRO's third stage marks them
    fusewright.optimize(ours, lowering="fx")
    assert_same_losses(ours, adapted())
    notes = fusewright.report(ours).notes
    assert any("down_proj" in n and "memory of DeepSpeed's" in n for n in notes), notes
    assert layer.weight not in set(moved(ours)) and len(moved(ours)) == 13


def test_trained_weights_stay() -> None:
    ours, eager = adapted(), adapted()
    for model in (ours, eager):
        for name, p in model.named_parameters():
            if "down_proj.base_layer" in name:
                p.requires_grad_(True)
    fusewright.optimize(ours, lowering="fx")
    assert_same_losses(ours, eager)
    assert len(moved(ours)) == 12


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the regions that Dynamo captures, from now on."""
    kinds: list[str] = []
    compile_graph = pipeline.compile_graph

    def counted(gm: Any, inputs: Any, session: Any, kind: str, region: str) -> Any:
        kinds.append(kind)
        return compile_graph(gm, inputs, session, kind, region)

    monkeypatch.setattr(pipeline, "compile_graph", counted)
    return kinds


def test_a_capture_that_moves_weights_holds_for_them(captures: list[str]) -> None:
    ours = adapted()
    ours.enable_input_require_grads()
    eager = copy.deepcopy(ours)
    fusewright.optimize(ours, lowering="fx", strict=True)
    assert_same_losses(ours, eager)
    assert len(moved(ours)) == 14 and captures.count("block") == 1


def test_a_capture_that_cannot_be_told_is_repeated(
    captures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError

    for name, instead in (("_guarded", lambda: None), ("_tell", fails)):
        captures.clear()
        with monkeypatch.context() as patched:
            patched.setattr(retell, name, instead)
            ours = adapted()
            ours.enable_input_require_grads()
            eager = copy.deepcopy(ours)
            fusewright.optimize(ours, lowering="fx", strict=True)
            assert_same_losses(ours, eager)
        assert len(moved(ours)) == 14 and captures.count("block") == 2, name
