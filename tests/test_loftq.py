"""LoftQ: adapters that begin as what 4 bits lose of each weight, over the weight that is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training
from torch.overrides import TorchFunctionMode

import fusewright

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
pytest.importorskip("scipy")  # PEFT's own demand


class _WithoutAGpu(TorchFunctionMode):
    """PEFT initialises LoftQ on "cuda" and nowhere else; here that is this machine's own device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        here = "cuda" if torch.cuda.is_available() else "cpu"

        def moved(value: Any) -> Any:
            named = isinstance(value, (str, torch.device))
            return torch.device(here) if named and str(value) == "cuda" else value

        kwargs = {name: moved(value) for name, value in (kwargs or {}).items()}
        return func(*map(moved, args), **kwargs)


def _initialised() -> Any:
    settings = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights="loftq",
        loftq_config=peft.LoftQConfig(loftq_bits=4, loftq_iter=2),
    )
    with _WithoutAGpu():
        return peft.get_peft_model(models.build("llama"), settings).train()


def test_it_trains_as_before_and_is_saved(tmp_path: Path) -> None:
    eager = _initialised()
    layer = eager.base_model.model.model.layers[0].mlp.up_proj
    assert not torch.equal(layer.weight, models.build("llama").model.layers[0].mlp.up_proj.weight)
    assert layer.lora_B["default"].weight.any()  # plain LoRA's starts at zero
    ours = fusewright.optimize(models.twin(eager), lowering="fx")
    for model in (ours, eager):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for seed in range(2):
            model(**models.batch(seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    wanted = training.train_step(eager, models.batch())
    training.assert_same_step(training.train_step(ours, models.batch()), wanted)
    assert fusewright.report(ours).counts["lora"] == 7 * models.LAYERS

    ours.peft_config["default"].init_lora_weights = True  # as PEFT asks for: it is done
    ours.save_pretrained(tmp_path / "adapter")
    ours.unload().save_pretrained(tmp_path / "base")  # not the weights that the model came with
    base = type(models.build("llama")).from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).train()
    training.assert_same_step(training.train_step(loaded, models.batch()), wanted)
