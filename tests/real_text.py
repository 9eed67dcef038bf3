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


def model(name: str = "llama", **overrides: Any) -> Any:
    """A tiny model over bytes."""
    return models.build(name, vocab_size=VOCAB, **overrides)
