"""Models that no library knows: plain modules, code as a checkpoint would bring it, overridden forwards."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import assert_same_step, train_step

import fusewright

VOCAB, WIDTH, HEADS, LAYERS = 64, 32, 4, 3

_REMOTE = '''
"""A model in one file, as a checkpoint brings it; nothing is named as elsewhere."""
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput


class ZetaConfig(PreTrainedConfig):
    model_type = "zeta-seven"

    def __init__(self, width=32, depth=3, vocab_size=64, **kwargs):
        self.width, self.depth, self.vocab_size = width, depth, vocab_size
        super().__init__(**kwargs)


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, t):
        u = t.float()
        return (u / torch.sqrt(torch.mean(u * u, dim=-1, keepdim=True) + 1e-5)).type_as(t) * self.g


def spin(t, c, s):
    even, odd = t[..., 0::2], t[..., 1::2]
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)


class Cell(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.pre, self.mid = Scale(width), Scale(width)
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.c = nn.Linear(2 * width, width)

    def forward(self, h, c, s):
        n, t, d = h.shape
        q, k, v = self.qkv(self.pre(h)).view(n, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = spin(q, c, s), spin(k, c, s)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.o(mixed.transpose(1, 2).reshape(n, t, d))
        u = self.mid(h)
        gate = self.a(u)
        return h + self.c(gate * torch.sigmoid(gate) * self.b(u))


class ZetaForCausalLM(PreTrainedModel):
    config_class = ZetaConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.cells = nn.ModuleList(Cell(config.width) for _ in range(config.depth))
        self.last = Scale(config.width)
        self.post_init()

    def forward(self, input_ids, labels=None, **kwargs):
        t = input_ids.shape[1]
        angle = torch.outer(torch.arange(t), 0.5 ** torch.arange(self.config.width // 8))
        c, s = angle.cos()[None, None], angle.sin()[None, None]
        h = self.words(input_ids)
        for cell in self.cells:
            h = cell(h, c, s)
        logits = self.last(h) @ self.words.weight.T
        loss = None
        if labels is not None:
            flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
            loss = nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1))
        return CausalLMOutput(loss=loss, logits=logits)
'''


class Block(nn.Module):
    """A pre-norm layer with nothing from a library of models."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.first(x)).cumsum(1)
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Outputs(dict[str, torch.Tensor]):
    """The least that the training step of these tests asks of a model's output."""

    @property
    def loss(self) -> torch.Tensor:
        return self["loss"]


class Plain(nn.Module):
    """Embedding, blocks, norm, head and loss, written out."""

    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def features(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.norm(x)
        return out

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Outputs:
        logits = self.head(self.features(input_ids))
        return Outputs(loss=F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1)))


class Doubled(Block):
    """A subclass that overrides the forward: its own is what must be compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x) - x


class Overridden(Plain):
    block = Doubled


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (2, 12), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Any]:
    """The module of the model's own file, imported the way such files are."""
    path = tmp_path / "modeling_zeta.py"
    path.write_text(_REMOTE)
    spec = importlib.util.spec_from_file_location("transformers_modules.zeta", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def _compared(model: nn.Module) -> fusewright.CoverageReport:
    eager = model.train()
    ours = fusewright.optimize(copy.deepcopy(eager), lowering="fx")
    batch = _batch()
    for _ in range(2):
        assert_same_step(train_step(ours, batch), train_step(eager, batch))
    return fusewright.report(ours)


def test_a_plain_module() -> None:
    torch.manual_seed(0)
    counts = _compared(Plain()).counts
    assert counts["rms_norm"] == LAYERS + 1 and counts["linear_cross_entropy"] == 1, counts
    assert counts["glu"] == counts["layer_norm"] == LAYERS, counts


def test_a_subclass_that_overrides_the_forward() -> None:
    torch.manual_seed(0)
    report = _compared(Overridden())
    assert report.counts["rms_norm"] == LAYERS + 1 and report.counts["glu"] == LAYERS, report
    assert not report.eager_now


def test_a_model_from_a_checkpoints_own_file(remote: Any) -> None:
    torch.manual_seed(0)
    report = _compared(remote.ZetaForCausalLM(remote.ZetaConfig()))
    counts = report.counts
    assert counts["rms_norm"] == 2 * LAYERS + 1 and counts["glu"] == LAYERS, report
    assert counts["rope"] == 2 * LAYERS, report
    assert not report.graph_breaks, report


def test_its_adapters(remote: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = remote.ZetaForCausalLM(remote.ZetaConfig())
    settings = LoraConfig(r=4, target_modules=["qkv", "o", "a", "b", "c"], lora_dropout=0.1)
    adapted = get_peft_model(model, settings)
    report = _compared(adapted)
    assert report.counts["rms_norm"] == 2 * LAYERS + 1, report
