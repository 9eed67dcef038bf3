"""Real text for the trainers' tests: this project's own documents, byte by byte."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import models
import torch
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 256  # a token is a byte; 0, which no text has, pads


@cache
def documents() -> tuple[str, ...]:
    """The paragraphs of docs/*.md of at least 60 characters, in the order of the files."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    return tuple(p for text in texts for p in text.split("\n\n") if len(p) >= 60)


def paragraphs(count: int, longest: int = 48) -> list[str]:
    """``count`` paragraphs cut to lengths between 20 and ``longest`` characters."""
    found = documents()
    step = len(found) // count
    return [found[i * step][: 20 + (7 * i) % (longest - 19)] for i in range(count)]


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """Rows of ``length`` bytes: ``input_ids``, ``labels`` and ``attention_mask``, (length,) int64.

    Rows end early by turns, so that their padding is masked and their label counts differ.
    """

    def __init__(self, rows: int, length: int = 32, offset: int = 0) -> None:
        data = "\n\n".join(documents()).encode()[offset * length :]
        self.ids = torch.tensor(list(data[: rows * length])).view(rows, length)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index].clone()
        end = len(ids) - 5 * (index % 4)
        ids[end:] = 0
        labels = ids.clone()
        labels[end:] = -100
        mask = torch.ones_like(ids)
        mask[end:] = 0
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def batch(seed: int = 0, rows: int = 2) -> dict[str, torch.Tensor]:
    """Some rows of :class:`Bytes`, stacked."""
    data = Bytes(rows, offset=4 * seed)
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def model(name: str = "llama", **overrides: Any) -> Any:
    """A tiny model over bytes."""
    return models.build(name, vocab_size=VOCAB, **overrides)


TURN = "{{ '<' + m['role'] + '>' }}"
CHAT = (
    "{% for m in messages %}" + TURN + "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>")


def tokenizer() -> Any:
    """A tokenizer of bytes and four special tokens, with a chat template that marks the answers."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate((*SPECIAL, *alphabet))}
    core = Tokenizer(BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT,
        model_max_length=256,
    )
