"""The state of one optimised model: its options, its captured graphs, and who runs what now.

The classes that ``optimize`` installs point here; nothing is global.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fusewright.compiler import retell
from fusewright.compiler.asking import Streams
from fusewright.compiler.config import Options
from fusewright.compiler.dynamo import mark_rows, settings_of
from fusewright.compiler.known import Known
from fusewright.compiler.partition import Asked
from fusewright.compiler.planning.execute import Memory
from fusewright.compiler.records import GraphRecord
from fusewright.compiler.storage import NeedsStorage, Wish
from fusewright.compiler.stored import Stored
from fusewright.compiler.tiles import Parts
from fusewright.runtime.known import KnownValues
from fusewright.runtime.module import uninstall

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Session:
    """Options, records and run-time bookkeeping of one optimised model."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.records: list[GraphRecord] = []
        self.known: dict[str, Known] = {}
        self.repeated: GraphRecord | None = None  # of the capture that the next one repeats
        self.paths: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self.current: dict[str, list[GraphRecord]] = {}
        self.uncaptured: dict[str, str] = {}
        self.notes: list[str] = []
        self.bypass = False
        self._hooks: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], int]]
        self._hooks = weakref.WeakKeyDictionary()
        self.settings = {kind: settings_of(kind) for kind in ("block", "leaf", "head")}
        self.stored = Stored(self.note)
        self.memory: Memory | None = None
        self._repeating = False
        self._repeats: dict[str, bool] = {}
        self._running = ""
        self._module: nn.Module | None = None
        self._known: KnownValues | None = None
        self.dropped_cache = False  # the model would have made itself one in this pass
        self.asked_device = "cuda"  # waiting for answers of the CPU's own is no wait
        self._ran: list[GraphRecord] = []
        self.streams = Streams()
        self._captured = False  # since the last forward pass began

    def note(self, text: str) -> None:
        """Keep a line for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def ran(self, record: GraphRecord) -> None:
        """Called by a region's callable each time it runs."""
        if record not in self._ran:
            self._ran.append(record)

    def call(
        self, kind: str, module: nn.Module, compiled: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a compiled region for ``module`` under our Dynamo settings and note which graphs ran."""
        outer = self._running, self._ran
        ran: list[GraphRecord] = []
        path = self.paths.get(module, "?")
        self._running, self._ran = path, ran
        outside, self._module = self._module, module
        streamed = self.streams.now
        if kind == "block":
            several = functools.partial(self._several, module, path)
            args, kwargs = self.streams.enter(compiled, module, args, kwargs, several)
        else:
            self.streams.now = None
        knew = self._known is not None and self._known.leave()  # compiled code is guarded on modes
        mark_rows(args)
        mark_rows(kwargs.values())
        self.stored.check(module, self._running)
        revert = self.settings[kind]()
        # A capture makes millions of objects and little garbage: looking for it is a tenth of the time.
        # The head's first call has the whole model's inside.
        fresh = path not in self.current
        self._captured |= fresh
        paused = fresh and kind != "head" and gc.isenabled()
        if paused:
            gc.disable()
        try:
            out = self._run(compiled, module, args, kwargs)
            # Not where it ends early, as the recompute of a checkpoint does.
            self._settle(path, module, ran)
            return out
        finally:
            if paused:
                gc.enable()
            revert()
            self._running, self._ran = outer
            self._module, self.streams.now = outside, streamed
            if knew and self._known is not None:
                self._known.come_back()

    def _several(self, module: nn.Module, path: str) -> bool:
        """Whether other blocks run the code that is compiled for this one."""
        alike = sum(type(m) is type(module) for m in self.paths) > 1
        return alike and (self.memory is None or self.memory.shares(path))

    def _settle(self, path: str, module: nn.Module, ran: list[GraphRecord]) -> None:
        """Note that these graphs, several where the region breaks, are what ``module`` runs now."""
        for record in self.current.pop(path, []):
            if record not in ran:
                record.modules.discard(path)
        if not ran:
            self.uncaptured.setdefault(
                path, "Dynamo ran it uncompiled (recompile limit, a skipped frame or no graph)"
            )
            return
        for record in ran:
            record.runs(path, self.streams.asked)
        self.current[path] = ran
        self.uncaptured.pop(path, None)
        if all(r.kind == "leaf" and not r.matches for r in ran):
            # Nothing to gain here: the original forward saves Dynamo's guards.
            uninstall(module)

    def _run(self, compiled: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The compiled call, once more where compiling it asked for another storage first."""
        try:
            return compiled(module, *args, **kwargs)
        except RuntimeError as error:  # Dynamo's BackendCompilerFailed
            wanted = getattr(error, "inner_exception", None)
            if not isinstance(wanted, NeedsStorage):
                raise
        self.stored.ask(module, self._running, wanted.wishes)
        wanted.moved()
        return compiled(module, *args, **kwargs)

    def require(self, wishes: list[Wish]) -> None:
        """Raise NeedsStorage if the running module's parameters are still to be moved."""
        if self._module is not None:
            missing = self.stored.missing(self._module, wishes)
            if missing:
                raise NeedsStorage(missing)

    def move_now(
        self, wishes: Sequence[Wish], graphs: Sequence[fx.GraphModule], inputs: Sequence[Any]
    ) -> bool:
        """Move the running module's parameters within its compilation; False where that cannot be."""
        module, path = self._module, self._running
        return module is not None and retell.move(
            wishes, graphs, inputs, lambda: self.stored.ask(module, path, wishes)
        )

    def splitting(self, gm: fx.GraphModule, record: GraphRecord) -> Asked | None:
        """How a region's forward and backward are split where that is our choice: in blocks.

        Under a gradient checkpoint everything is kept: its recompute is followed by the backward at
        once, and what were dropped in between would be computed a third time.
        """
        level = self.options.environment.partition
        planned = self.memory and self.memory.asked(gm.graph, self._running, record)
        if planned:
            return replace(planned, repeats=self._repeatable(record))
        if record.kind != "block" or level == "torch" or not torch.is_grad_enabled():
            return None
        if getattr(self._module, "gradient_checkpointing", False):
            level = self._level_of_the_forward() or "keep"
        asked = Asked.of(gm.graph, level, lambda chosen: setattr(record, "partitioned", chosen))
        return replace(asked, repeats=self._repeatable(record))

    def _repeatable(self, record: GraphRecord) -> Callable[[], Callable[[], bool]]:
        def told() -> Callable[[], bool]:
            record.repeatable = True
            return lambda: self._repeating

        return told

    def repeats(self, path: str) -> bool:
        """Whether the block at ``path`` can run its forward again by itself, judged by its last run.

        Within a backward it is as it was before, since a checkpoint around it counts what it saves.
        """
        if torch._C._current_graph_task_id() == -1:
            ran = self.current.get(path, [])
            self._repeats[path] = bool(ran) and all(r.repeatable and not r.failure for r in ran)
        return self._repeats.get(path, False)

    @contextmanager
    def rerunning(self) -> Any:
        """Inside, regions that can keep their arguments alone and run their forward again."""
        before, self._repeating = self._repeating, True
        try:
            yield
        finally:
            self._repeating = before

    def tiled(self, gm: fx.GraphModule, record: GraphRecord) -> Parts | None:
        """The region's parts, if the memory plan has its tail run in tiles."""
        if self.memory is None:
            return None
        return self.memory.tiled(gm, self._running, record)

    def _level_of_the_forward(self) -> str | None:
        """Within a recompute, how the block that it repeats was split; None anywhere else.

        A recompute may meet another state (keys that the first run left behind) and be compiled anew,
        and must save what the forward pass has saved.
        """
        if torch._C._current_graph_task_id() == -1:
            return None
        before = [r.partitioned for r in self.current.get(self._running, ()) if r.partitioned]
        return before[-1].level if before else None

    def of_the_forward(self) -> GraphRecord | None:
        """Within a recompute, the forward pass's graph that the one running now repeats; else None.

        What was decided of it holds: rewritten and as captured do not save the same.
        """
        before, at = self.current.get(self._running, []), len(self._ran) - 1
        if torch._C._current_graph_task_id() == -1 or not 0 <= at < len(before):
            return None
        return before[at]

    def entering(self, path: str) -> None:
        """What runs next is the region at ``path``."""
        self._running, self._ran = path, []

    def leaving(self) -> None:
        """It has run: the graphs that did are its own."""
        for record in self._ran:
            record.modules.add(self._running)

    def around_spine(self) -> AbstractContextManager[Any]:
        """The context in which the modules above the blocks run, up to the first block.

        What they do before the blocks may ask for values that the host knows: see runtime/known.py.
        """
        if self._captured:
            self._captured = False
            gc.collect()  # captures leave cycles that hold the hidden states they were made with
        asks = self._known is None and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if asks and (self.asked_device != "cuda" or torch.cuda.is_initialized()):
            return self._knowing()
        return nullcontext()

    @contextmanager
    def _knowing(self) -> Iterator[None]:
        self._known = known = KnownValues(self.asked_device)
        try:
            with known:
                yield
        finally:
            self._known = None

    def reached_blocks(self) -> None:
        """The first block begins: what runs from here on asks nothing."""
        if self._known is not None:
            self._known.leave()
            self._known = None

    def hooked_since(self, module: nn.Module) -> bool:
        """Whether hooks inside ``module`` changed since its first call; compiled code misses them."""
        known = self._hooks.get(module)
        if known is None:
            tables = [
                getattr(m, name) for m in module.modules() if m is not module for name in _HOOKS
            ]
            self._hooks[module] = tables, sum(map(len, tables))
            return False
        tables, count = known
        if sum(map(len, tables)) == count:
            return False
        path = self.paths.get(module, "?")
        self.uncaptured[path] = "a hook inside it was added or removed after it was compiled"
        self.current.pop(path, None)
        return True

    @contextmanager
    def bypassed(self) -> Any:
        """Blocks run their original code inside."""
        before, self.bypass = self.bypass, True
        try:
            yield
        finally:
            self.bypass = before


def wants_compiled(module: nn.Module, session: Session) -> bool:
    """Whether this call is a training step's: training mode and gradients, or their recompute.

    A reentrant checkpoint runs its first pass without gradients; it must take the same kernels as
    the recompute does.
    """
    if not module.training or session.bypass or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or bool(getattr(module, "gradient_checkpointing", False))
