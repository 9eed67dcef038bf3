"""Frozen bases under LoRA in training: no product for their gradients, no copy of them kept."""

from __future__ import annotations

import models
import pytest
import torch

import fusewright
from fusewright.kernels import room

WEIGHTS = {(64, 64), (32, 64), (128, 64), (64, 128)}
BATCH = models.batch(rows=2, length=20)  # 40 rows: no activation has a weight's shape


@pytest.mark.parametrize("served", [False, True], ids=["plain", "room"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_of_a_frozen_weights_size(
    dtype: torch.dtype, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "serves", lambda *_: served)
    model = models.with_lora(models.build("llama", dtype=dtype), dtype)
    fusewright.optimize(model, lowering="fx")
    model(**BATCH).loss.backward()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(**BATCH).loss
    frozen = {p.data_ptr() for p in model.parameters()}
    assert saved
    assert not [t for t in saved if tuple(t.shape) in WEIGHTS and t.data_ptr() not in frozen]
    with torch.profiler.profile(record_shapes=True) as seen:
        loss.backward()
    products = [e.input_shapes for e in seen.events() if e.name in ("aten::mm", "aten::addmm")]
    made = {(s[-2][0], s[-1][1]) if len(s[0]) == 2 else () for s in map(_matrices, products)}
    assert made and not WEIGHTS & made
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def _matrices(shapes: list[list[int]]) -> list[list[int]]:
    """The two factors among a product's operands."""
    return [s for s in shapes if len(s) == 2][-2:]
