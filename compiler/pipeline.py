"""The way of one captured graph through the compiler: read this first.

    capture -> normalize -> match and rewrite -> lower -> (first run) verify

Whatever cannot be done leaves the graph as Dynamo captured it, with the reason on its record.
"""

from __future__ import annotations

import copy
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fusewright.compiler import autocast, dump, ir, lazy, lower, rewrite
from fusewright.compiler.match import Match, find
from fusewright.compiler.normalize import NotNormalizable, normalize, simplify
from fusewright.compiler.records import GraphBreak, GraphRecord, Verdict
from fusewright.compiler.session import Session
from fusewright.compiler.verify import verify

log = logging.getLogger("fusewright")


class CompileError(RuntimeError):
    """A region could not be compiled and ``strict=True`` asked to be told."""


def compile_graph(
    gm: fx.GraphModule, example_inputs: list[Any], session: Session, kind: str, region: str
) -> Callable[..., Any]:
    """Compile one captured graph of a region; never fails unless the session is strict."""
    record = GraphRecord(kind, region)
    session.records.append(record)
    _note_break(gm, record)
    try:
        return _compile(gm, example_inputs, session, record)
    except Exception as error:
        # Whatever goes wrong in compiling, training goes on with the graph as captured.
        record.failure = _describe(error)
        record.matches.clear()
        log.debug("region %s left as captured", region, exc_info=True)
        if session.options.strict:
            raise CompileError(f"{region}: {record.failure}") from error
        return _tracked(gm.forward, session, record)


def _compile(
    gm: fx.GraphModule, example_inputs: list[Any], session: Session, record: GraphRecord
) -> Callable[..., Any]:
    writer = dump.Writer(session.options.environment, record, len(session.records) - 1)
    with _timed(record, "normalize"):
        canonical = normalize(gm)
        device = autocast.active_device()
        if device is not None:
            autocast.make_explicit(canonical.graph, device)
            simplify(canonical.graph)
            canonical.recompile()
    writer.graph("00_capture", gm)
    writer.graph("01_normalize", canonical)
    record.symbolic = any(isinstance(v, torch.SymInt) for v in map(ir.value, canonical.graph.nodes))
    rewritten = copy.deepcopy(canonical)
    with _timed(record, "match"):
        deferred = match_and_rewrite(rewritten, session, record)
    writer.graph("02_rewrite", rewritten)
    record.canonical, record.rewritten = canonical, rewritten
    if not record.matches:
        return _tracked(gm.forward, session, record)
    how = lower.choose(session.options.lowering, rewritten.graph)
    with _timed(record, "lower"):
        run = lower.lower(rewritten, example_inputs, how, device)
        record.lowering = how
    run = run if deferred is None else lazy.attach(run, deferred)
    if session.options.verify == "first_step":
        run = _verified(run, canonical, rewritten, record, session, device)
    writer.done()
    return _tracked(run, session, record)


def match_and_rewrite(
    gm: fx.GraphModule, session: Session, record: GraphRecord
) -> lazy.Deferred | None:
    """Rewrite every proven and legal match in place; returns what is to be handed out lazily."""
    graph = gm.graph
    wanted = session.options.logits == "lazy" and record.kind == "head"
    deferrable = lazy.deferrable(graph) if wanted else frozenset()
    deferred = None
    for pattern in session.options.patterns:
        for found in find(pattern, graph, deferrable):
            if not isinstance(found, Match):
                record.misses.append(found)
                continue
            if deferrable & found.candidate.nodes:
                deferred = lazy.defer(graph, found.candidate, deferrable)
            rewrite.apply(found, graph)
            record.matches.append(found)
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()
    return deferred


def _verified(
    run: Callable[..., Any],
    canonical: fx.GraphModule,
    rewritten: fx.GraphModule,
    record: GraphRecord,
    session: Session,
    device: str | None,
) -> Callable[..., Any]:
    """Verify at the first run, on its real inputs; fall back to the captured graph if refused."""
    chosen: list[Callable[..., Any]] = []

    def first(*args: Any) -> Any:
        if not chosen:
            with _timed(record, "verify"), lower.autocast_off(device):
                record.verdict = verify(canonical, rewritten, args)
            if record.verdict.status == "reverted":
                chosen.append(lower.lower(canonical, list(args), "fx", device))
                record.failure = f"reverted: {record.verdict.reason}"
                if session.options.strict:
                    raise CompileError(f"{record.region}: {record.failure}")
            else:
                chosen.append(run)
        return chosen[0](*args)

    return first


def _describe(error: Exception) -> str:
    """The error's first line and where in the code it arose."""
    lines = str(error).strip().splitlines()
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    return f"{type(error).__name__} at {where}: {lines[0] if lines else ''}"


def _tracked(run: Callable[..., Any], session: Session, record: GraphRecord) -> Callable[..., Any]:
    def tracked(*args: Any) -> Any:
        session.ran(record)
        return run(*args)

    return tracked


def _note_break(gm: fx.GraphModule, record: GraphRecord) -> None:
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return
    text = str(reason.reason).strip().splitlines()
    frames = reason.user_stack or []
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    expected = record.kind == "head" and "disable" in str(reason.reason)
    if not expected:
        record.breaks.append(GraphBreak(text[0] if text else "unknown", where))


class _timed:
    """Adds the wall time of its body to the record."""

    def __init__(self, record: GraphRecord, stage: str) -> None:
        self.record, self.stage = record, stage

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        spent = time.perf_counter() - self.started
        self.record.seconds[self.stage] = self.record.seconds.get(self.stage, 0.0) + spent


__all__ = ["CompileError", "NotNormalizable", "Verdict", "compile_graph", "match_and_rewrite"]
