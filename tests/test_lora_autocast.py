"""LoRA under autocast: what fires, and the errors beside eager's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
import training

import fusewright
from fusewright.kernels import room

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (base, adapters, autocast)
DTYPES = [(FP32, FP32, BF16), (BF16, FP32, BF16), (BF16, BF16, BF16), (FP32, FP32, FP16)]


def fired(model: Any) -> dict[str, int]:
    """kernel -> layers with adapters that it took."""
    rows = [r for r in fusewright.report(model).rows if r.pattern == "lora"]
    assert all(r.status == "fired" and r.verification == "accepted" for r in rows), rows
    return {r.kernel: r.count for r in rows}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("base", "thin", "kind"), DTYPES, ids=str)
def test_not_worse_than_eager(
    base: torch.dtype,
    thin: torch.dtype,
    kind: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "serves", lambda *_: True)
    eager = models.with_lora(models.build("llama", dtype=base), thin).to(device)
    ours = fusewright.optimize(models.twin(eager), lowering="fx")

    def autocast() -> torch.autocast:
        return torch.autocast(device, kind)

    def steps() -> Iterator[Any]:
        for seed in range(5):
            batch = {k: v.to(device) for k, v in models.batch(seed, rows=4, length=32).items()}
            pair = [training.train_step(m, batch, around=autocast) for m in (ours, eager)]
            yield (*pair, training.oracle_step(eager, batch))

    training.assert_model_not_worse(training.exactness(steps()), f"{base}, {thin} under {kind}")
    assert fired(ours) == {"lora_group": 14}
    # A weight that autocast rounds is another tensor in each pass: there is nothing to move.
    moved = [p for p in ours.parameters() if room.owned(p.data)]
    assert len(moved) == (14 if base is kind else 0)


def test_float32_weights_get_no_copy_kept_for_the_backward() -> None:
    """Beside the parameters, which live on anyway, no more is saved than eager saves."""
    eager = models.with_lora(models.build("llama"), FP32)
    ours = fusewright.optimize(models.twin(eager), lowering="fx")
    sizes = []
    for model in (ours, eager):
        saved: dict[int, int] = {}

        def pack(t: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autocast("cpu", BF16):
            model(**models.batch()).loss.backward()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                loss = model(**models.batch()).loss
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes.append(sum(size for at, size in saved.items() if at not in own))
        del loss
    assert sizes[0] <= sizes[1], sizes
