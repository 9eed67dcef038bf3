"""Capture: install the regions' forwards, and be the backend that Dynamo hands their graphs to.

All blocks share one backend object, so identical layers share one graph. The modules between the
head and the blocks are kept out of Dynamo while the head is captured; what Dynamo sees of the head
is then the projection and the loss alone.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from fusewright.compiler import pipeline
from fusewright.compiler.dynamo import mark_rows
from fusewright.compiler.planning.execute import Way
from fusewright.compiler.records import Binding
from fusewright.compiler.regions import Regions
from fusewright.compiler.session import Session, wants_compiled
from fusewright.runtime import module as modules
from fusewright.runtime.tiles import repeating


class Backend:
    """Receives every graph that Dynamo captures for one kind of region."""

    def __init__(self, session: Session, kind: str, region: str) -> None:
        self.session, self.kind, self.region = session, kind, region

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return pipeline.compile_graph(gm, example_inputs, self.session, self.kind, self.region)


def install(model: nn.Module, regions: Regions, session: Session) -> None:
    """Install the regions' forwards on the instances of this one model."""
    made: dict[tuple[type, str], type[nn.Module]] = {}
    backends: dict[tuple[type, str], Backend] = {}

    def put(path: str, module: nn.Module, kind: str, build: Callable[..., Any]) -> None:
        session.paths[module] = path
        cls = type(module)
        key = (cls, kind)
        if key not in made:
            backends[key] = Backend(session, kind, cls.__name__)
            forward = build(cls, backends[key], session)
            made[key] = modules.subclass(cls, forward, Binding(session, kind, cls))
            if kind == "block":
                modules.own_checkpoint(made[key], _checkpointing(session))
        modules.install(module, made[key])

    for path, module in regions.blocks:
        put(path, module, "block", _region_forward)
    for path, module in regions.leaves:
        put(path, module, "leaf", _region_forward)
    for path, module in regions.spine:
        put(path, module, "spine", _spine_forward)
    if regions.head is not None:
        put(*regions.head, "head", _head_forward)


def remove(model: nn.Module) -> None:
    """Take every installed forward off the model's modules."""
    for module in model.modules():
        modules.uninstall(module)


def _own_code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function on a code object of its own: Dynamo caches and limits by code object.

    Where it is a decorator's, so is what it decorates: with a graph break inside, that becomes a
    frame of its own, whose limit every other model of the class would share.
    """
    if not isinstance(forward, types.FunctionType):
        return forward
    inner = getattr(forward, "__wrapped__", None)
    own = _own_code(inner) if inner is not None else None
    twin = types.FunctionType(
        forward.__code__.replace(),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        tuple(
            types.CellType(own) if own is not None and _holds(cell, inner) else cell
            for cell in forward.__closure__ or ()
        ),
    )
    twin.__kwdefaults__ = forward.__kwdefaults__
    twin.__dict__.update(forward.__dict__)
    if own is not None:
        twin.__dict__["__wrapped__"] = own
    return twin


def _holds(cell: types.CellType, content: object) -> bool:
    try:
        return cell.cell_contents is content
    except ValueError:  # an empty one
        return False


def compiled_forward(forward: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    """``forward`` compiled through ``backend``, apart from every other use of the same function."""
    return torch.compile(_own_code(forward), backend=backend)


def _region_forward(cls: type[nn.Module], backend: Backend, session: Session) -> Any:
    """The forward of a block or leaf; blocks that a memory plan treats apart are compiled apart."""
    inner = modules.inner_forward(cls)
    ways: dict[Way | None, Callable[..., Any]] = {None: compiled_forward(inner, backend)}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if backend.kind == "block":
            session.reached_blocks()
        if not wants_compiled(self, session) or session.hooked_since(self):
            return inner(self, *args, **kwargs)
        if session.memory is None or backend.kind != "block":
            return session.call(backend.kind, self, ways[None], args, kwargs)
        path = session.paths.get(self, "?")
        way = session.memory.way(self, path, (args, kwargs))
        if way not in ways:
            ways[way] = compiled_forward(inner, backend)

        def run(*args: Any) -> Any:
            return session.call(backend.kind, self, ways[way], args, kwargs)

        with session.memory.around(path, self, (args, kwargs)):
            if way is None or way.price != 0:
                return run(*args)
            if way.tiled:
                return checkpoint(run, *args, use_reentrant=False, context_fn=_around_repeat)
            return _checkpoint(session, path, _PLAIN_CHECKPOINT, run, args)

    return forward


_PLAIN = {"use_reentrant", "preserve_rng_state"}
_PLAIN_CHECKPOINT = functools.partial(checkpoint, use_reentrant=False)


def _checkpoint(session: Session, path: str, theirs: Any, run: Any, args: Any) -> Any:
    """``theirs(run, *args)``, where it is torch's checkpoint by the block itself if that can.

    Then nothing of the block but its arguments is kept, as theirs does, but without its hooks and
    without asking Dynamo a second time whether the module is what it was.
    """
    plain = getattr(theirs, "func", None) is checkpoint and not theirs.args
    options = theirs.keywords if plain else {}
    if options.get("use_reentrant") is False and options.keys() <= _PLAIN and session.repeats(path):
        with session.rerunning():
            return run(*args)
    return theirs(run, *args)


def _around_repeat() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a checkpoint's forward and of its second run."""
    return nullcontext(), repeating()


def _checkpointing(session: Session) -> Callable[..., Any]:
    """A block's checkpoint: a memory plan itself, at no more memory and less time, or its own."""

    def around(module: nn.Module, theirs: Callable[..., Any], run: Any, *args: Any) -> Any:
        session.reached_blocks()  # a plan made here must not be captured within the spine's mode
        path = session.paths.get(module, "?")
        failed = any(record.failure for record in session.current.get(path, []))
        memory = session.memory
        if not wants_compiled(module, session) or failed or session.hooked_since(module):
            return theirs(run, *args)
        if memory is not None and memory.way(module, path, args) is not None:
            return run(*args)
        return _checkpoint(session, path, theirs, run, args)

    return around


def _spine_forward(cls: type[nn.Module], backend: Backend, session: Session) -> Any:
    inner = modules.inner_forward(cls)
    has_cache = "use_cache" in inspect.signature(inner).parameters
    named = _by_name(inner)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if has_cache and self.training and torch.is_grad_enabled():
            args, kwargs = named(args, kwargs)
            if _cache_forced(kwargs):
                session.note(
                    "a KV cache was forced on in training (use_cache=True or past_key_values): "
                    "every layer would need a graph of its own, so the blocks ran as before"
                )
                with session.bypassed():
                    return inner(self, *args, **kwargs)
            _drop_cache(self, session, kwargs)
            cached = session.dropped_cache and not getattr(self, "gradient_checkpointing", False)
            if cached and _starts_anew(**kwargs):
                session.note(
                    "positions start anew within a row while the model makes itself a KV cache, "
                    "with which transformers does not tell the packed sequences apart: the blocks "
                    "ran as before; pass use_cache=False to train on each sequence by itself"
                )
                with session.bypassed():
                    return inner(self, *args, **kwargs | {"use_cache": True})
        with session.around_spine():
            out = inner(self, *args, **kwargs)
        if self.training and not isinstance(out, torch.Tensor):
            mark_rows(out.values() if isinstance(out, dict) else out)
        return out

    return torch._dynamo.disable(forward)


def _by_name(forward: Callable[..., Any]) -> Callable[[Any, Any], tuple[Any, dict[str, Any]]]:
    """A function that turns positional arguments of ``forward`` into keywords, where it has names."""
    names = [
        p.name
        for p in list(inspect.signature(forward).parameters.values())[1:]
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]

    def named(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if len(args) > len(names):
            return args, kwargs
        return (), dict(zip(names, args, strict=False)) | kwargs

    return named


def _cache_forced(kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("use_cache")) or kwargs.get("past_key_values") is not None


def _drop_cache(module: nn.Module, session: Session, kwargs: dict[str, Any]) -> None:
    """Have no KV cache made in training, and remember whether one would have been."""
    if kwargs.get("use_cache") is None:
        config = getattr(module, "config", None)
        session.dropped_cache = bool(getattr(config, "use_cache", False))
    kwargs["use_cache"] = False


def _starts_anew(position_ids: Any = None, attention_mask: Any = None, **_: Any) -> bool:
    """Whether positions (batch, length) that come without a mask have more than one beginning.

    Without a cache they mean packed sequences to transformers, with one they do not.
    """
    if not isinstance(position_ids, torch.Tensor) or attention_mask is not None:
        return False
    return position_ids.dim() == 2 and bool((torch.diff(position_ids, dim=-1) != 1).any())


def _defers(session: Session) -> bool:
    """Whether logits without a loss are deferred: not over several processes, whose wrappers hook the
    outputs of a forward and take a weight away after it."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return session.options.logits == "chunked" and alone


def _head_forward(cls: type[nn.Module], backend: Backend, session: Session) -> Any:
    inner = modules.inner_forward(cls)
    compiled = compiled_forward(inner, backend)
    has_cache = "use_cache" in inspect.signature(inner).parameters
    named = _by_name(inner)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        training = wants_compiled(self, session)
        if training:
            args, kwargs = named(args, kwargs)
        if training and has_cache and not _cache_forced(kwargs):
            _drop_cache(self, session, kwargs)
        if training and (kwargs.get("labels") is not None or _defers(session)):
            return session.call("head", self, compiled, args, kwargs)
        return inner(self, *args, **kwargs)

    return forward
