"""What the memory bench reads out of the allocator's list of blocks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))


def _named(address: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(
        is_cuda=True, numel=lambda: size, element_size=lambda: 1, data_ptr=lambda: address
    )


def _block(address: int, size: int, state: str = "active_allocated") -> dict[str, object]:
    return {"address": address, "size": size, "state": state}


def test_blocks_that_hold_no_named_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from memory import strangers

    segments = [
        {"blocks": [_block(1000, 600), _block(1600, 400), _block(2000, 100, "inactive")]},
        {"blocks": [_block(9000, 400), _block(9400, 50), _block(9450, 70, "active_pending_free")]},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    # Two weights with room in one block, one of them by two names.
    found = strangers([_named(1000, 250), _named(1300, 250), _named(1000, 250)])
    assert found == {
        "allocated": 1450,
        "named": 500,
        "around": 100,
        "pending": 70,
        "others": [[400, 2], [50, 1]],
    }
    assert strangers([], most=1)["others"] == [[400, 2]]
