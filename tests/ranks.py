"""Two processes that train together over gloo, and what each of them tells."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def _rank(rank: int, function: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, *arguments)`` of each rank, in processes of their own that share a group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (function, folder, arguments), nprocs=WORLD)
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(WORLD)]
