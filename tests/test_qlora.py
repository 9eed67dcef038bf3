"""Training over bitsandbytes' weights: what fires, and losses and gradients against eager's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

from quantised import Form, build

import fusewright
from fusewright.kernels import room

BF16, FP32 = torch.bfloat16, torch.float32
FORMS = {
    "nf4 double": Form(),
    "nf4 double 128": Form(blocksize=128),
    "fp4": Form(kind="fp4", double=False),
    "fp4 double 128": Form(kind="fp4", blocksize=128),
}


@pytest.fixture(params=[False, True], ids=["plain", "room"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the augmented product is used."""
    monkeypatch.setattr(room, "serves", lambda *_: request.param)
    return bool(request.param)


def fired(model: Any) -> dict[str, int]:
    """kernel -> layers with adapters that it took."""
    found: Counter[str] = Counter()
    for row in fusewright.report(model).rows:
        if row.pattern == "lora" and row.status == "fired":
            assert row.verification != "reverted", row
            found[row.kernel] += row.count
    return dict(found)


@pytest.mark.parametrize("form", FORMS)
def test_same_step_in_float32(form: str, served: bool) -> None:
    dropout = 0.3 if "double" in form else 0.0
    ours, eager = (build(FORMS[form], dropout) for _ in range(2))
    fusewright.optimize(ours, lowering="fx")
    batch = models.batch()
    for seed in range(2):
        mine, theirs = (training.train_step(m, batch, seed=seed) for m in (ours, eager))
        training.assert_same_step(mine, theirs, 1e-5)
    assert fired(ours) == {"lora_group_4bit": 14}


@pytest.mark.parametrize("thin", [BF16, FP32], ids=str)
def test_bf16_is_not_worse_than_eager(thin: torch.dtype, served: bool) -> None:
    form = Form(compute=BF16, dtype=BF16)
    ours, eager = (build(form, thin=thin) for _ in range(2))
    dense = build(Form(compute=BF16, dtype=BF16, bits=16), thin=thin)
    fusewright.optimize(ours, lowering="fx")
    triples = []
    for seed in range(5):
        batch = models.batch(seed)
        steps = [training.train_step(m, batch) for m in (ours, eager)]
        triples.append((steps[0], steps[1], training.oracle_step(dense, batch)))
    training.assert_model_not_worse(training.exactness(triples), str(thin))
    assert fired(ours) == {"lora_group_4bit": 14}


def test_float32_stream_over_bf16_layers(served: bool) -> None:
    """The layer casts its input down and its result up; its adapters stay in float32."""
    form = Form(compute=BF16)
    ours, eager = (build(form) for _ in range(2))
    dense = build(Form(compute=BF16, bits=16))
    fusewright.optimize(ours, lowering="fx")
    triples = []
    for seed in range(5):
        batch = models.batch(seed)
        steps = [training.train_step(m, batch) for m in (ours, eager)]
        triples.append((steps[0], steps[1], training.oracle_step(dense, batch)))
    training.assert_model_not_worse(training.exactness(triples), "float32 stream")
    assert fired(ours) == {"lora_added": 14}


def test_checkpointing(served: bool) -> None:
    ours, eager = (build(Form(), 0.3) for _ in range(2))
    for model in (ours, eager):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    fusewright.optimize(ours, lowering="fx")
    batch = models.batch()
    mine, theirs = (training.train_step(m, batch) for m in (ours, eager))
    training.assert_same_step(mine, theirs, 1e-5)
    assert set(fired(ours)) == {"lora_group_4bit"}


def test_eight_bits_take_the_added_form() -> None:
    ours, eager = (build(Form(bits=8)) for _ in range(2))
    fusewright.optimize(ours, lowering="fx")
    batch = models.batch()
    for seed in range(2):
        mine, theirs = (training.train_step(m, batch, seed=seed) for m in (ours, eager))
        training.assert_same_step(mine, theirs, 1e-5)
    # Where x needs no gradient, in the first layer, the weight is dequantised in the open.
    assert "lora_added" in fired(ours) and set(fired(ours)) <= {"lora_added", "lora_group"}


def test_training_and_saving(tmp_path: Path) -> None:
    pair = [build(Form()) for _ in range(2)]
    fusewright.optimize(pair[0], lowering="fx")
    losses: list[list[float]] = [[], []]
    for model, found in zip(pair, losses, strict=True):
        wanted = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(wanted, lr=0.1)
        for seed in range(3):
            loss = model(**models.batch(seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
    for a, b in zip(*losses, strict=True):
        assert abs(a - b) <= 1e-5 * abs(b)
    from safetensors.torch import load_file

    for name, model in zip("ab", pair, strict=True):
        model.save_pretrained(tmp_path / name)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)


def test_no_dense_weight_is_kept_for_the_backward(served: bool) -> None:
    """Among what autograd saves there is nothing of a weight's size but what was given."""
    model = fusewright.optimize(build(Form()), lowering="fx")
    batch = models.batch()
    training.train_step(model, batch)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(**batch)
    sizes = {(128, 128), (64, 128), (256, 128), (128, 256), (512, 128), (256, 128)}
    frozen = {p.data_ptr() for p in model.parameters()}
    dense = [t for t in saved if tuple(t.shape) in sizes and t.data_ptr() not in frozen]
    assert saved and not dense
    assert not room._KNOWN or not any(
        e.height >= 64 for e in room._KNOWN.values() if not e.weak.expired()
    )


def test_frozen_weights_get_no_gradient_product() -> None:
    """No product of the backward has the shape of a weight."""
    model = fusewright.optimize(build(Form()), lowering="fx")
    batch = models.batch()
    training.train_step(model, batch)
    loss = model(**batch).loss
    with torch.profiler.profile(record_shapes=True) as seen:
        loss.backward()
    products = [e.input_shapes for e in seen.events() if e.name in ("aten::mm", "aten::addmm")]
    yielded = {(s[-2][0], s[-1][1]) for s in products}
    weights = {(128, 128), (64, 128), (256, 128), (128, 256), (512, 128)}
    assert yielded and not weights & yielded
