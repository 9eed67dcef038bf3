"""What a step needs beside its blocks: parameters, gradients, optimizer, and the head's moment."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fusewright.compiler import ir
from fusewright.compiler.planning import work
from fusewright.compiler.planning.devices import Device
from fusewright.compiler.storage import Wish, parameters
from fusewright.runtime import packed
from fusewright.runtime.op import flop_formulas, workspaces

# Bytes of optimizer state per byte of a trained parameter, or fixed bytes per element.
OPTIMIZERS: dict[str, Callable[[nn.Parameter], int]] = {
    "adamw": lambda p: 2 * p.numel() * p.element_size(),
    "adamw-8bit": lambda p: 2 * p.numel(),
    "sgd": lambda p: 0,
    "sgd-momentum": lambda p: p.numel() * p.element_size(),
}


@dataclass(frozen=True)
class Head:
    """The projection and the loss.

    Attributes:
        peak: (batch, sequence) -> bytes at its worst moment beside what blocks have saved.
        flops: (batch, sequence) -> FLOPs of its products.
        logits: whether the logits are held whole.
    """

    peak: Callable[[int, int], float]
    flops: Callable[[int, int], float]
    logits: bool


@dataclass(frozen=True)
class Footing:
    """Bytes that do not depend on the batch, and the head.

    Attributes:
        parameters: of every parameter and buffer, and of packed weights' scales; shared memory once.
        gradients: of the trained parameters, by the path of the block that they belong to; "" for
            those outside of blocks.
        optimizer: of its state.
        row: of one token's hidden state.
        host: of the host's memory, what saved values may take.
        room: around frozen weights, for the adapters that are multiplied with them.
        workspace: of the matrix products' library.
    """

    parameters: int
    gradients: dict[str, int]
    optimizer: int
    row: int
    head: Head
    host: float = math.inf
    room: int = 0
    workspace: int = 0

    @property
    def stays(self) -> int:
        """Bytes that are there between steps."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """What stays, by name."""
        return {
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "room for adapters": self.room,
            "workspace": self.workspace,
        }

    @property
    def trained(self) -> int:
        """Bytes of all gradients."""
        return sum(self.gradients.values())


def of(model: nn.Module, blocks: Iterable[str], head: Head, row: int, optimizer: str) -> Footing:
    """Read a model's parameters.

    Raises:
        ValueError: the optimizer is unknown.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {optimizer!r}")
    seen: set[int] = set()
    total = states = 0
    gradients: dict[str, int] = {}
    paths = tuple(blocks)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in seen:
            continue
        for part in (tensor, *packed.states(tensor)):
            total += 0 if id(part) in seen else part.numel() * part.element_size()
            seen.add(id(part))
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            owner = next((p for p in paths if name.startswith(p + ".")), "")
            size = tensor.numel() * tensor.element_size()
            gradients[owner] = gradients.get(owner, 0) + size
            states += OPTIMIZERS[optimizer](tensor)
    return Footing(total, gradients, states, row, head)


def room_of(model: nn.Module, blocks: Iterable[str], wishes: Mapping[type, Sequence[Wish]]) -> int:
    """Bytes that the blocks' parameters take more where they are stored as wished.

    Args:
        wishes: by the class of a block; those of 16-bit weights on a GPU alone are of use.
    """
    total = 0
    for module in map(model.get_submodule, blocks):
        asked = {w.paths: w.storage for w in wishes.get(type(module), ())}
        for paths, storage in asked.items():
            parts = parameters(module, paths) or []
            frozen = [p for p in parts if type(p) is nn.Parameter and not p.requires_grad]
            if parts and len(frozen) == len(parts) and storage.pays(parts):
                total += storage.adds(parts)
    return total


def head_of(gm: fx.GraphModule | None, trained: bool, sizes: tuple[int, int]) -> Head:
    """The costs of a head's rewritten graph traced at ``sizes``; of nothing where there is none."""
    if gm is None:
        return Head(lambda b, s: 0.0, lambda b, s: 0.0, False)
    evaluate = _Evaluator(gm, sizes)
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    fused = next((n for n in calls if _name(n) in workspaces()), None)
    if fused is None:
        # Everything that the forward makes is kept, and the largest value's gradient comes on top.
        @functools.lru_cache(maxsize=64)
        def whole(batch: int, sequence: int) -> float:
            made = [evaluate(work.of(n).memory, batch, sequence) for n in calls]
            return sum(made) + max(made, default=0.0)

        def products(batch: int, sequence: int) -> float:
            each = [evaluate(work.of(n).flops, batch, sequence) for n in calls]
            return sum(each) * (3 if trained else 2)

        return Head(whole, products, True)
    spec = workspaces()[_name(fused)]
    names = frozenset({"weight"} if trained else ())

    @functools.lru_cache(maxsize=64)  # asked for every way of a step that is weighed
    def peak(batch: int, sequence: int) -> float:
        assert spec.workspace is not None
        args = fx.map_arg(fused.args, lambda n: evaluate.tensor(ir.value(n), batch, sequence))
        return float(spec.workspace(args, names))

    def flops(batch: int, sequence: int) -> float:
        args = fx.map_arg(fused.args, lambda n: evaluate.tensor(ir.value(n), batch, sequence))
        return float(flop_formulas()[spec.name](args, None)) * (1.5 if trained else 1.0)

    return Head(peak, flops, False)


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name.partition("::")[2])


class _Evaluator:
    """Numbers of a graph's symbolic sizes at another batch and sequence."""

    def __init__(self, gm: fx.GraphModule, sizes: tuple[int, int]) -> None:
        self.batch, self.sequence = sizes
        self.symbols: dict[Any, int] = {}  # symbol -> its hint
        for size in work.sizes(gm.graph):
            for symbol in size.node.expr.free_symbols:
                self.symbols[symbol] = ir.traced_symbol(size, symbol)

    def __call__(self, expression: Any, batch: int, sequence: int) -> float:
        known = {
            s: batch if hint == self.batch else sequence if hint == self.sequence else hint
            for s, hint in self.symbols.items()
        }
        return float(expression.subs(known))

    def tensor(self, value: Any, batch: int, sequence: int) -> Any:
        """The value with its sizes as numbers, without memory."""
        if not isinstance(value, torch.Tensor):
            return value
        shape = [int(self(work.expression(s), batch, sequence)) for s in value.shape]
        return torch.empty(shape, dtype=value.dtype, device="meta")


def optimizer_seconds(footing: Footing, device: Device) -> float:
    """Of one step of the optimizer: parameter, gradient and state read, parameter and state written."""
    return (3 * footing.trained + 2 * footing.optimizer) / (0.9 * device.bandwidth)
