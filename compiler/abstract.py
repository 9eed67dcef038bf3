"""Observe a model of any size without its weights: one forward pass on the meta device.

The model's parameters are meta tensors, so its blocks are captured, matched and proven as in
training, and then run on shapes alone. Only the modules above the blocks decide things by data
(which tokens are padding, whether positions are packed), and what they decide with is small and made
of integers: it stays real. :class:`Mixed` keeps it so: an operation on real tensors alone runs, and
one that meets a meta tensor gives a meta tensor.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from fusewright.compiler import capture, coverage, regions
from fusewright.compiler.config import Options
from fusewright.compiler.explain import CoverageReport
from fusewright.compiler.match import Pattern
from fusewright.compiler.partition import Asked
from fusewright.compiler.records import GraphRecord
from fusewright.compiler.session import Session
from fusewright.compiler.storage import Wish
from fusewright.runtime.op import register_all

log = logging.getLogger("fusewright")

_META, _CPU = torch.device("meta"), torch.device("cpu")
_LARGEST = 2**24  # elements of a real tensor; a larger one carries shapes only


class Mixed(TorchDispatchMode):
    """Real tensors where there are only real ones, meta tensors otherwise."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        abstract = any(t.is_meta for t in tensors)
        if abstract:
            args, kwargs = _to_meta((args, kwargs))
        device = _META if abstract else _CPU
        # A device that is asked for is the model's, and so says meta: that would lose the data.
        args, kwargs = tree_map_only(torch.device, lambda _: device, (args, kwargs))
        out = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, _bounded, out)


def _bounded(t: torch.Tensor) -> torch.Tensor:
    return t.to(_META) if t.numel() > _LARGEST and not t.is_meta else t


def _to_meta(values: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t if t.is_meta else t.to(_META), values)


class AbstractSession(Session):
    """A session whose blocks see meta tensors only."""

    def __init__(self, options: Options) -> None:
        # Whatever the environment says: there are no values that could be verified.
        super().__init__(dataclasses.replace(options, verify="off"))
        self._mixed: Mixed | None = None
        self.streams.used = False  # nothing is lowered, so that a gradient more costs nothing

    def splitting(self, gm: fx.GraphModule, record: GraphRecord) -> Asked | None:
        """Not split: nothing is trained here."""
        return None

    def require(self, wishes: list[Wish]) -> None:
        """Nothing: there is no memory that could be laid out."""

    def around_spine(self) -> AbstractContextManager[Any]:
        """Real and meta tensors side by side."""
        if self._mixed is not None:
            return nullcontext()
        return _Entered(self)

    def call(
        self, kind: str, module: nn.Module, compiled: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a region; one that stops for want of data passes its first tensor on."""
        if kind == "head":
            return super().call(kind, module, compiled, args, kwargs)
        with _disable_current_modes():
            args, kwargs = _to_meta((args, kwargs))
            outer = self._running
            try:
                return super().call(kind, module, compiled, args, kwargs)
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                self._running = outer
                path = self.paths.get(module, "?")
                self.uncaptured[path] = f"it did not run on meta tensors: {_brief(error)}"
                return next(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))


class _Entered:
    """Enters the session's mixed mode once, whatever nests inside."""

    def __init__(self, session: AbstractSession) -> None:
        self.session = session

    def __enter__(self) -> None:
        self.session._mixed = Mixed()
        self.session._mixed.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: object) -> None:
        mixed, self.session._mixed = self.session._mixed, None
        if mixed is not None:
            mixed.__exit__(*exc)  # type: ignore[no-untyped-call]


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def observe(
    model: nn.Module,
    catalogue: Sequence[Pattern],
    inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> CoverageReport:
    """The coverage report of a model on the meta device, from one forward pass of a training step.

    Args:
        model: a model whose parameters are meta tensors; its classes are put back afterwards.
        catalogue: the patterns.
        inputs: the forward's keyword arguments: integers on the CPU, but ``labels`` on meta.
        options: options of ``optimize`` other than its defaults.

    Raises:
        ValueError: the model has no repeated blocks, or an option is unknown.
    """
    given = {"patterns": None, "lowering": "fx", "verify": "off", "logits": "lazy"}
    session = AbstractSession(Options.build(catalogue, **{**given, **(options or {})}))
    found = regions.find(model)
    register_all()
    if found.head is None:
        session.note("no module takes labels: the loss is outside of the model and left alone")
    model.train()
    capture.install(model, found, session)
    try:
        model(**inputs)
    except Exception as error:
        # Any failure of the user's own code; what was captured until then is still an answer.
        log.debug("the pass ended early", exc_info=True)
        session.note(f"the pass ended early, later regions were not seen: {_brief(error)}")
    finally:
        capture.remove(model)
    return coverage.report(session, model)
