"""Count what a reader would count: the norms, rotations, gated units and losses that eager executes.

Nothing here knows the compiler. One eager forward pass is watched from outside: torch's functions as
the model's Python calls them, the modules that run, and the calls of functions that are named after
rotary embeddings. A site is one of these, once per module and place in the code, however often it
runs.

    norm    a call of a library norm, or an inverse root (``rsqrt``, a power of -0.5, a row's length)
            of a value of width one
    rope    a tensor that a function named like ``apply_rotary_pos_emb`` returns; in a model where
            none runs, each attention module that is given cos and sin counts as one
    glu     a module that owns an activation or is named like a gated unit, calls an activation and
            multiplies the result with another tensor of its shape
    loss    a call of a library loss
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

FAMILIES = ("norm", "rope", "glu", "loss")

_LIBRARY_NORMS = {"layer_norm", "rms_norm", "normalize"}
_LENGTHS = {"norm", "vector_norm", "linalg_norm", "linalg_vector_norm"}
_ROOTS = {"rsqrt", "rsqrt_"}
_POWERS = {"pow", "__pow__", "pow_", "float_power"}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"}
_ACTIVATIONS = {
    "silu", "gelu", "relu", "sigmoid", "tanh", "silu_", "relu_", "sigmoid_", "elu", "selu",
    "relu6", "leaky_relu", "hardswish", "mish", "softplus", "quick_gelu",
}  # fmt: skip
_LOSSES = {"cross_entropy", "nll_loss", "log_softmax"}
_KEEP_THE_VALUE = {"to", "float", "type_as", "view", "reshape", "dropout", "contiguous", "type"}
_ROTATES = re.compile(
    r"(apply|rotate)\w*(rotary|rope)|rotary\w*(apply|embeddings?$)|^apply_\w*rope"
)
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


@dataclass
class Census:
    """family -> module's path -> sites in it."""

    sites: dict[str, dict[str, int]] = field(
        default_factory=lambda: {f: defaultdict(int) for f in FAMILIES}
    )
    linears: list[str] = field(default_factory=list)

    def total(self, family: str) -> int:
        """Sites of the family in the whole model."""
        return sum(self.sites[family].values())


class _Watch(TorchFunctionMode):
    """Notes the torch functions of one forward pass with the module that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = [""]
        self.seen: dict[str, set[tuple[str, Any]]] = {f: set() for f in FAMILIES}
        self.rotated: dict[tuple[str, Any], int] = {}
        self.given_tables: set[str] = set()
        self.activated: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        family = self._family(name, args, kwargs or {}, out)
        if family is not None:
            self.seen[family].add((self.stack[-1], _place()))
        tensors = [a for a in args[:2] if isinstance(a, torch.Tensor)]
        follows = name in _KEEP_THE_VALUE and bool(tensors) and id(tensors[0]) in self.activated
        if (name in _ACTIVATIONS or follows) and isinstance(out, torch.Tensor):
            self.activated[id(out)] = out  # kept alive, so that no other tensor gets its id
        return out

    def _family(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> str | None:
        if name in _LIBRARY_NORMS:
            return "norm"
        if name in _LOSSES:
            return "loss"
        if not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return None
        row = out.dim() >= 2 and out.shape[-1] == 1
        power = args[1] if len(args) > 1 else kwargs.get("p", kwargs.get("ord"))
        inverse = name in _POWERS and isinstance(power, float) and power == -0.5
        length = name in _LENGTHS and power in (None, 2, "fro")
        if name in _ROOTS or inverse or length:
            return "norm" if row else None
        if name in _PRODUCTS:
            a, b = args[0], args[1]
            alike = all(isinstance(t, torch.Tensor) and t.shape == out.shape for t in (a, b))
            gated = alike and a is not b and (id(a) in self.activated) != (id(b) in self.activated)
            return "glu" if gated and out.dim() >= 2 and out.shape[-1] > 1 else None
        return None


def _place() -> tuple[tuple[str, int], ...]:
    """The lines being executed in the models' code, up to the module's forward."""
    frame: FrameType | None = sys._getframe(2)
    lines = []
    while frame is not None:
        code = frame.f_code
        if "/torch/" not in code.co_filename and code.co_filename != __file__:
            lines.append((code.co_filename, frame.f_lineno))
            if code.co_name == "forward":
                break
        frame = frame.f_back
    return tuple(lines)


def take(model: nn.Module, forward: Callable[[], Any]) -> Census:
    """The census of one call of ``forward``, which runs the model once."""
    watch = _Watch()
    with _followed(model, watch) as linears, _profiled(watch), watch:
        forward()
    census = Census(linears=linears)
    for family in ("norm", "glu", "loss"):
        for path, _ in watch.seen[family]:
            census.sites[family][path] += 1
    _keep_gated_units(model, census)
    for (path, _), count in watch.rotated.items():
        census.sites["rope"][path] += count
    if not watch.rotated:
        census.sites["rope"].update(dict.fromkeys(watch.given_tables, 1))
    return census


def _keep_gated_units(model: nn.Module, census: Census) -> None:
    """Gated units are modules that own an activation or are named so; each is one site.

    A norm with a gate is a norm.
    """
    modules = dict(model.named_modules())
    kept = {}
    for path in census.sites["glu"]:
        names = {*vars(modules[path]), *(n for n, _ in modules[path].named_children())}
        owns = any(re.match(r"act|.*_act(_fn)?$|hidden_act", n) for n in names)
        named = re.search(
            r"mlp|expert|feed_?forward|ffn|glu", type(modules[path]).__name__, re.IGNORECASE
        )
        if (owns or named) and path not in census.sites["norm"]:
            kept[path] = 1
    census.sites["glu"] = defaultdict(int, kept)


def _maps_rows(module: nn.Module, args: Any, out: Any) -> bool:
    """Whether a linear layer took rows to rows, as its adapter will: a grouped product does not."""
    if not isinstance(module, nn.Linear) or not args or not isinstance(out, torch.Tensor):
        return False
    given, (height, width) = args[0].shape, module.weight.shape
    return given[-1] == width and out.shape == (*given[:-1], height)


@contextmanager
def _followed(model: nn.Module, watch: _Watch) -> Iterator[list[str]]:
    """Keeps the stack of running modules, and the linears that ran."""
    linears: dict[str, None] = {}
    handles = []

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            watch.stack.append(path)
            tables = kwargs.get("position_embeddings")
            if _ATTENTION.search(type(module).__name__) and tables is not None:
                watch.given_tables.add(path)

        return hook

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        path = watch.stack.pop()
        if type(module).__name__ == "Conv1D" or _maps_rows(module, args, out):
            linears.setdefault(path)

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    found: list[str] = []
    try:
        yield found
    finally:
        found += linears
        for handle in handles:
            handle.remove()


@contextmanager
def _profiled(watch: _Watch) -> Iterator[None]:
    """Sees functions return that are named after rotary embeddings, the outermost of each call."""
    depth = 0

    def profile(frame: FrameType, event: str, value: Any) -> None:
        nonlocal depth
        if event not in ("call", "return") or not _ROTATES.search(frame.f_code.co_name):
            return
        depth += 1 if event == "call" else -1
        if event == "return" and depth == 0:
            tensors = value if isinstance(value, (tuple, list)) else (value,)
            count = sum(isinstance(t, torch.Tensor) for t in tensors)
            caller = frame.f_back
            place = (caller.f_code.co_filename, caller.f_lineno) if caller else ("", 0)
            watch.rotated[watch.stack[-1], place] = count

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
