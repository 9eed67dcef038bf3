"""Regions: which modules of a model are captured, found by structure and never by name.

Blocks are the repeated layers. Around them lie the modules on the way from the loss to the blocks
(kept opaque while the head is captured), their other children (the final norm, say), and the head:
the innermost module that takes ``labels`` and makes a loss of them.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

from torch import nn

_PLAIN = (
    nn.Embedding,
    nn.Linear,
    nn.Dropout,
    nn.Identity,
    nn.modules.conv._ConvNd,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class NothingToOptimize(ValueError):
    """The model has no repeated blocks."""


@dataclass(frozen=True)
class Regions:
    """Modules by role, as (path in the model, module).

    Attributes:
        blocks: the repeated layers.
        leaves: further children of the modules above the blocks.
        spine: the modules strictly between the head and the blocks, outermost first.
        head: the module that computes the loss, if any takes labels.
    """

    blocks: tuple[tuple[str, nn.Module], ...]
    leaves: tuple[tuple[str, nn.Module], ...]
    spine: tuple[tuple[str, nn.Module], ...]
    head: tuple[str, nn.Module] | None


def find(model: nn.Module) -> Regions:
    """The regions of ``model``; NothingToOptimize if it has no repeated blocks."""
    modules = dict(model.named_modules())
    blocks = _blocks(modules)
    if not blocks:
        raise NothingToOptimize(
            f"{type(model).__name__} has no repeated blocks: no gradient-checkpointing layers and no "
            "ModuleList of two or more layers of one type"
        )
    above = _ancestors(blocks, modules)
    takers = [p for p in sorted(above, key=len, reverse=True) if _takes_labels(modules[p])]
    takers = [p for p in takers if _speaks_of_a_loss(modules[p])] or takers
    head = (takers[0], modules[takers[0]]) if takers else None
    spine = [
        (path, modules[path])
        for path in sorted(above, key=len)
        if head is None or (path != head[0] and _inside(path, head[0]))
    ]
    leaves = [leaf for path, module in spine for leaf in _children(path, module, above, blocks)]
    return Regions(tuple(blocks.items()), tuple(leaves), tuple(spine), head)


def _blocks(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    layer = getattr(
        sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", ()
    )
    found: dict[str, nn.Module] = {}
    if layer:
        for path, module in modules.items():
            if isinstance(module, layer) and not _within_any(path, found):
                found[path] = module
    for path, module in modules.items():
        children = list(module.named_children()) if isinstance(module, nn.ModuleList) else []
        repeated = {type(c) for _, c in children if any(True for _ in c.children())}
        holds_block = any(_inside(b, path) for b in found)
        if len(children) > len(repeated) > 0 and not holds_block and not _within_any(path, found):
            found.update(
                (f"{path}.{name}" if path else name, child)
                for name, child in children
                if type(child) in repeated
            )
    return found


def _inside(path: str, ancestor: str) -> bool:
    return ancestor == "" or path.startswith(ancestor + ".")


def _within_any(path: str, blocks: dict[str, nn.Module]) -> bool:
    return any(path == b or _inside(path, b) for b in blocks)


def _ancestors(blocks: dict[str, nn.Module], modules: dict[str, nn.Module]) -> set[str]:
    """Paths of the modules above the blocks that have a forward of their own."""
    above = set()
    for path in blocks:
        while path:
            path = path.rpartition(".")[0]
            if not isinstance(modules[path], _CONTAINERS):
                above.add(path)
    return above


def _takes_labels(module: nn.Module) -> bool:
    return "labels" in inspect.signature(type(module).forward).parameters


def _speaks_of_a_loss(module: nn.Module) -> bool:
    """Whether the forward's own code has a name with "loss" in it; a base may just take labels."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return any("loss" in name for name in (*code.co_names, *code.co_varnames)) if code else True


def _is_plain(module: nn.Module) -> bool:
    """An embedding, say; not one that holds a norm of its own."""
    return isinstance(module, _PLAIN) and not any(True for _ in module.children())


def _children(
    path: str, module: nn.Module, above: set[str], blocks: dict[str, nn.Module]
) -> list[tuple[str, nn.Module]]:
    """Children that are neither blocks, nor above them, nor plain layers; of lists, the entries."""
    out = []
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        holds_block = any(b == full or _inside(b, full) for b in blocks)
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and full not in blocks:
            out += _children(full, child, above, blocks)
        elif full not in above and not holds_block and not _is_plain(child):
            out.append((full, child))
    return out
