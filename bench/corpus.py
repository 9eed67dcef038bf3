"""Real text that every CPython carries: its language reference and its own source code, as bytes."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

VOCAB = 256


def prose() -> bytes:
    """The topics of ``help()``: the language reference in English, about 0.7 MB."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def code(limit: int = 4_000_000) -> bytes:
    """The standard library's top-level modules, at most ``limit`` bytes."""
    found = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= limit:
            break
    if not found:  # a frozen or zipped standard library: the prose will have to do
        found = prose()
    return found[:limit]


def sampler(
    text: bytes, rows: int, length: int, device: str
) -> Callable[[int], dict[str, torch.Tensor]]:
    """step -> a batch of ids and labels (rows, length) int64, the same one for the same step."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def batch(step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(0, len(data) - length, (rows,), generator=generator)
        ids = torch.stack([data[s : s + length] for s in starts.tolist()]).long().to(device)
        return {"input_ids": ids, "labels": ids}

    return batch
