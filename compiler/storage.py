"""How a region's parameters are to be stored: asked for by a pattern, done before the graph is lowered.

A kernel may want the frozen weights of several layers side by side in one buffer. The graph tells
which, the instances' parameters are then moved (the same ``Parameter`` objects on other memory), and
the region is captured once more, since Dynamo guards on the strides it saw.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Storage:
    """A wish: these parameters in memory that ``make`` lays out.

    Attributes:
        nodes: placeholders of the graph.
        make: tensors -> the same values, laid out as wished.
        holds: tensors -> whether they are so already.
        ours: tensor -> whether its memory was laid out here before.
        name: for the report.
        pays: tensors -> whether it is of use where they are.
        adds: tensors -> bytes that it takes beside theirs.
    """

    nodes: tuple[fx.Node, ...]
    make: Callable[[Tensors], list[torch.Tensor]]
    holds: Callable[[Tensors], bool]
    ours: Callable[[torch.Tensor], bool]
    name: str
    pays: Callable[[Tensors], bool] = lambda _: True
    adds: Callable[[Tensors], int] = lambda _: 0


@dataclass(frozen=True)
class Wish:
    """A storage by the parameters' paths in the region's module instead of by a graph's nodes."""

    paths: tuple[str, ...]
    storage: Storage


class NeedsStorage(Exception):
    """Raised while a region is compiled: its parameters must be moved, and the capture repeated.

    Attributes:
        moved: called when they are moved, before the capture is repeated.
    """

    def __init__(self, wishes: Sequence[Wish]) -> None:
        super().__init__("the region's parameters are to be stored in another way")
        self.wishes = tuple(wishes)
        self.moved: Callable[[], object] = lambda: None


def wishes(storages: Sequence[Storage], captured: fx.Graph, canonical: fx.Graph) -> list[Wish]:
    """The storages whose parameters can be named, by their paths.

    Args:
        storages: in terms of the canonical graph's placeholders.
        captured: Dynamo's graph, whose placeholders have sources.
        canonical: with the same placeholders in the same order.
    """
    pairs = zip(
        canonical.find_nodes(op="placeholder"), captured.find_nodes(op="placeholder"), strict=True
    )
    paths = {node: _path(original) for node, original in pairs}
    found = []
    for storage in storages:
        named = tuple(paths.get(n, "") for n in storage.nodes)
        if all(named):
            found.append(Wish(named, storage))
    return found


def _path(node: fx.Node) -> str:
    """The parameter's path below the region's module, "" if it is none."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return ""
    name = source.name
    text = str(name() if callable(name) else name)
    found = re.fullmatch(r"L\['self'\]((?:\._modules\['[^']+'\])*)\._parameters\['([^']+)'\]", text)
    if found is None:
        return ""
    return ".".join([*re.findall(r"\['([^']+)'\]", found[1]), found[2]])


def parameters(module: nn.Module, paths: Sequence[str]) -> list[nn.Parameter] | None:
    """The module's parameters of these paths, or None where it has not all of them."""
    found = []
    for path in paths:
        owner, _, name = path.rpartition(".")
        try:
            holder = module.get_submodule(owner)
        except AttributeError:
            return None
        parameter = holder._parameters.get(name)
        if parameter is None:
            return None
        found.append(parameter)
    return found


def refusal(parameter: nn.Parameter, storage: Storage) -> str:
    """Why the parameter must stay where it is, "" if it may be moved."""
    data = parameter.data
    if type(parameter) is not nn.Parameter or type(data) is not torch.Tensor:
        return f"it is a {type(parameter).__name__} of {type(data).__name__}"
    if parameter.requires_grad:
        return "it is trained"
    if hasattr(parameter, "ds_id"):
        return "it lies in memory of DeepSpeed's, which takes it back after each use"
    if data.device.type == "meta":
        return "it has no memory yet"
    if storage.ours(data):
        return ""
    if data.untyped_storage().nbytes() != data.numel() * data.element_size():
        return "it is a part of somebody else's memory (sharded or flattened parameters)"
    return ""


def sharder(module: nn.Module) -> str:
    """Who hands the module's parameters out in memory that it takes back; "" if nobody does.

    While a module that FSDP2 shards runs, its parameters look like any others. Moved, they would not be
    freed behind it, nor see what is gathered for the next step. A module around this one may shard it
    too, which only the list of all such modules tells.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    states = sys.modules.get("torch.distributed._composable_state")
    if fsdp is None or states is None:
        return ""
    for outer in list(states._module_state_mapping):
        if isinstance(outer, fsdp.FSDPModule) and any(m is module for m in outer.modules()):
            return "it lies in memory of FSDP's, which takes it back after each use"
    return ""


def provide(parts: Sequence[nn.Parameter], storage: Storage) -> str:
    """Move the parameters as wished; why not, or "" if it is so now."""
    if storage.holds([p.data for p in parts]):
        return ""
    for p in parts:
        reason = refusal(p, storage)
        if reason:
            return reason
    with torch.no_grad():
        try:
            made = storage.make([p.data for p in parts])
        except (ValueError, torch.OutOfMemoryError) as error:
            return str(error).splitlines()[0]
        for p, data in zip(parts, made, strict=True):
            p.data = data
    return ""


def densify(parameter: nn.Parameter) -> None:
    """Give the parameter memory of its own again."""
    with torch.no_grad():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
