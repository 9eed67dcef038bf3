"""What the blocks of a model keep for their backward, measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fusewright.runtime import packed


def saved_bytes(
    model: nn.Module, paths: Iterable[str], batch: dict[str, torch.Tensor]
) -> dict[str, int]:
    """Per block's path, bytes of the storages that its forward alone keeps alive for a backward."""
    found: dict[str, int] = {}
    resting = [t for p in model.parameters() for t in (p, *packed.states(p))]
    counted = {t.untyped_storage()._cdata for t in resting}
    alive: list[torch.Tensor] = []  # an id stays taken while its storage lives

    def around(path: str, module: nn.Module) -> None:
        shared: set[int] = set()

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in counted | shared:
                counted.add(storage._cdata)
                alive.append(t)
                found[path] = found.get(path, 0) + storage.nbytes()
            return t

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            tables = [t for v in kwargs.values() for t in (v if isinstance(v, tuple) else (v,))]
            # Tables and masks are everybody's; so is an input that wants no gradient.
            for t in (*args, *tables):
                if isinstance(t, torch.Tensor) and not t.requires_grad:
                    shared.add(t.untyped_storage()._cdata)
            hooks.__enter__()

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda *_: hooks.__exit__(None, None, None)))

    handles: list[Any] = []
    for path in paths:
        around(path, model.get_submodule(path))
    model(**batch)
    for handle in handles:
        handle.remove()
    return found
