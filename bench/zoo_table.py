"""The sweep's table: docs/zoo.md and bench/results/zoo.json."""

from __future__ import annotations

from typing import Any


def write(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Not yet."""
