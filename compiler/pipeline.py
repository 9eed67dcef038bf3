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
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fusewright.compiler import asking, autocast, dump, ir, known, lazy, lower, rewrite, storage
from fusewright.compiler.foresee import foresee, foresee_halves
from fusewright.compiler.known import Known
from fusewright.compiler.match import Match, find
from fusewright.compiler.normalize import NotNormalizable, drop_dead, normalize, simplify
from fusewright.compiler.records import GraphBreak, GraphRecord, Verdict
from fusewright.compiler.session import Session
from fusewright.compiler.storage import NeedsStorage
from fusewright.compiler.verify import verify

log = logging.getLogger("fusewright")


class CompileError(RuntimeError):
    """A region could not be compiled and ``strict=True`` asked to be told."""


def compile_graph(
    gm: fx.GraphModule, example_inputs: list[Any], session: Session, kind: str, region: str
) -> Callable[..., Any]:
    """Compile one captured graph of a region; never fails unless the session is strict."""
    record = GraphRecord(kind, region)
    if session.repeated is not None:  # what the first capture took and started
        record.seconds, record.foreseen = session.repeated.seconds, session.repeated.foreseen
        session.repeated = None
    session.records.append(record)
    _note_break(gm, record)
    if record.breaks and session.options.strict:
        first = record.breaks[0]
        raise CompileError(f"{region}: the graph breaks at {first.location}: {first.reason}")
    try:
        with unseen_by_checkpoints():
            return _compile(gm, example_inputs, session, record)
    except NeedsStorage:
        session.records.remove(record)
        session.repeated = record
        raise
    except Exception as error:
        # Whatever goes wrong in compiling, training goes on with the graph as captured.
        record.failure = _describe(error)
        record.matches.clear()
        log.debug("region %s left as captured", region, exc_info=True)
        if session.options.strict:
            raise CompileError(f"{region}: {record.failure}") from error
        return _tracked(gm.forward, session, record)


def unseen_by_checkpoints() -> AbstractContextManager[Any]:
    """What autograd saves inside is ours: an activation checkpoint around the region counts it."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def _compile(
    gm: fx.GraphModule, example_inputs: list[Any], session: Session, record: GraphRecord
) -> Callable[..., Any]:
    writer = dump.Writer(session.options.environment, record, len(session.records) - 1)
    bodies = checkpointed_bodies(gm)
    if bodies:
        return _compile_checkpointed(gm, bodies, example_inputs, session, record, writer)
    with _timed(record, "normalize"):
        canonical = normalize(gm)
        device = autocast.active_device() or canonical.meta["autocast"]
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
        wishes = storage.wishes(settle(rewritten, session), gm.graph, rewritten.graph)

    place, real = (
        session.streams.place(canonical.graph, example_inputs),
        [*session.streams.true(example_inputs)],
    )

    def foreseen() -> Known:
        with unseen_by_checkpoints():  # also where it is called later, outside of the compilation
            return _foreseen(canonical, rewritten, real, session, record, device)

    try:
        session.require(wishes)
    except NeedsStorage as needed:
        if not session.move_now(needed.wishes, (gm, canonical, rewritten), example_inputs):
            if record.matches:
                needed.moved = foreseen  # the capture that follows is the same graph
            raise
    writer.graph("02_rewrite", rewritten)
    record.canonical, record.rewritten = canonical, rewritten
    told = session.note if session.options.logits == "chunked" else None
    if not record.matches and deferred is not None:
        # Nothing but the logits is taken out: what is left runs as captured.
        run = lower.lower(rewritten, example_inputs, "fx", device)
        return _tracked(lazy.attach(run, deferred, told), session, record)
    if not record.matches:
        return _tracked(gm.forward, session, record)
    before = foreseen()
    with _timed(record, "lower"):
        run = _lower_for_both(rewritten, example_inputs, session, record, device, place)
    run = run if deferred is None else lazy.attach(run, deferred, told)
    if session.options.verify == "first_step":
        plain = readable(canonical, session)
        graphs = canonical, plain, rewritten
        run = _verified(run, graphs, record, session, device, before, place)
    writer.done()
    return _tracked(run, session, record)


def _foreseen(
    canonical: fx.GraphModule,
    rewritten: fx.GraphModule,
    example_inputs: list[Any],
    session: Session,
    record: GraphRecord,
    device: str | None,
) -> Known:
    """What is known of the graph, whose kernels are being compiled once this returns."""
    fingerprint = known.fingerprint(canonical, rewritten, example_inputs)
    before = session.known.setdefault(fingerprint, Known()) if fingerprint else Known()
    if known.wanted(example_inputs) not in before.foreseen:
        verified = session.options.verify == "first_step"
        with _timed(record, "foresee"):
            record.foreseen = foresee(rewritten, canonical, example_inputs, verified, device)
        before.foreseen.update(known.variants(canonical, example_inputs))
    return before


def checkpointed_bodies(gm: fx.GraphModule) -> list[str]:
    """Names of the sub-graphs that the user's code runs under an activation checkpoint."""
    return [
        str(ir.argument(node, 0).target)
        for node in ir.calls(gm.graph)
        if getattr(node.target, "__name__", "") == "tag_activation_checkpoint"
    ]


def _compile_checkpointed(
    gm: fx.GraphModule,
    bodies: list[str],
    example_inputs: list[Any],
    session: Session,
    record: GraphRecord,
    writer: dump.Writer,
) -> Callable[..., Any]:
    """Rewrite inside the checkpoints and leave the rest as captured.

    The checkpoint's node does not keep the random state by itself: run as plain FX it gives other
    dropout masks in the recompute. AOTAutograd handles it, so such a graph is always lowered by it.
    """
    session.streams.part()
    writer.graph("00_capture", gm)
    for name in dict.fromkeys(bodies):
        with _timed(record, "normalize"):
            captured: Any = gm.get_submodule(name)
            body = normalize(captured)
            if body.meta["autocast"] is not None:
                raise NotNormalizable("autocast is switched inside of a checkpoint")
        with _timed(record, "match"):
            match_and_rewrite(body, session, record)
        writer.graph(f"02_rewrite_{name}", body)
        gm.set_submodule(name, body)
    gm.recompile()
    how = lower.choose(session.options.lowering, gm.graph)
    with _timed(record, "lower"):
        run = lower.lower(gm, example_inputs, "inductor" if how == "inductor" else "aot", None)
    record.lowering = how if how == "inductor" else "aot"
    record.verdict.reason = "a checkpoint inside the region is not verified at run time"
    writer.done()
    return _tracked(run, session, record)


def _lower_for_both(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    session: Session,
    record: GraphRecord,
    device: str | None,
    place: int | None,
) -> Callable[..., Any]:
    """The lowered graph; for a stream at ``place`` that wants a gradient, and for one that wants none."""
    if place is None:
        return _lower(gm, example_inputs, session, record, device)
    inputs = asking.unasked(gm.graph, example_inputs, place)
    without = _lower(copy.deepcopy(gm), inputs, session, record, device)
    repeatable, record.repeatable = record.repeatable, False
    record.without, record.partitioned = record.partitioned, None
    run = _lower(gm, example_inputs, session, record, device)
    record.repeatable = record.repeatable and repeatable
    return lambda *args: (run if args[place].requires_grad else without)(*args)


def _lower(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    session: Session,
    record: GraphRecord,
    device: str | None,
) -> Callable[..., Any]:
    """The asked-for lowering; plain FX where it refuses the graph."""
    record.lowering = lower.choose(session.options.lowering, gm.graph)
    splitting = session.splitting(gm, record)
    if record.lowering == "fx" and any(map(ir.draws_in_vain, ir.calls(gm.graph))):
        splitting = None  # AOTAutograd would drop the draw, and later ones would be others
    if record.lowering == "fx" and splitting is None:
        return lower.lower(gm, example_inputs, "fx", device)
    if splitting is not None:
        splitting = replace(splitting, done=lambda f, b: foresee_halves(f, b, example_inputs))
    kept = copy.deepcopy(gm)
    parts = session.tiled(gm, record)
    try:
        if parts is not None:
            return lower.in_tiles(parts, example_inputs, record.lowering, device, splitting)
        return lower.lower(gm, example_inputs, record.lowering, device, splitting)
    except Exception as error:
        # A lowering's failures are of every kind, and plain FX runs whatever was captured.
        if session.options.strict:
            raise
        who = "Inductor" if record.lowering == "inductor" else "AOTAutograd"
        session.note(f"{record.region}: {who} refused it, it runs as plain FX: {_describe(error)}")
        log.debug("%s refused region %s", who, record.region, exc_info=True)
        record.lowering, record.partitioned = "fx", None
        return lower.lower(kept, example_inputs, "fx", device)


def match_and_rewrite(
    gm: fx.GraphModule, session: Session, record: GraphRecord
) -> lazy.Deferred | None:
    """Rewrite every proven and legal match in place; returns what is to be handed out lazily."""
    graph = gm.graph
    wanted = session.options.logits != "eager" and record.kind == "head"
    deferrable = lazy.deferrable(graph) if wanted else frozenset()
    deferred = None
    if session.options.logits == "chunked":
        deferred = lazy.defer_projection(graph, deferrable)
        deferrable = frozenset() if deferred else deferrable
    for pattern in session.options.patterns:
        if hasattr(pattern, "prepare"):
            record.misses += pattern.prepare(graph)
        for found in find(pattern, graph, deferrable):
            if not isinstance(found, Match):
                record.misses.append(found)
                continue
            if deferrable & found.candidate.nodes:
                deferred = lazy.defer(graph, found.candidate, deferrable)
            before = {n.name for n in graph.nodes}
            rewrite.apply(found, graph)
            record.matches.append(found)
            record.made.append(frozenset(n.name for n in graph.nodes) - before)
        if hasattr(pattern, "regroup"):
            before = {n.name for n in graph.nodes}
            pattern.regroup(graph)
            joined = frozenset(n.name for n in graph.nodes) - before
            if joined and record.made:  # what joins a pattern's ops counts with the last of them
                record.made[-1] |= joined
    drop_dead(graph)
    graph.lint()
    gm.recompile()
    return deferred


def readable(gm: fx.GraphModule, session: Session) -> fx.GraphModule:
    """The graph with its opaque calls written out as the patterns read them: it runs in float64."""
    plain = copy.deepcopy(gm)
    for pattern in session.options.patterns:
        if hasattr(pattern, "prepare"):
            pattern.prepare(plain.graph)
    plain.recompile()
    return plain


def settle(gm: fx.GraphModule, session: Session) -> list[storage.Storage]:
    """Fit the patterns' ops to their neighbours; returns how parameters are to be stored."""
    wanted = [
        wish
        for pattern in session.options.patterns
        if hasattr(pattern, "settle")
        for wish in pattern.settle(gm.graph)
    ]
    drop_dead(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return wanted


def _verified(
    run: Callable[..., Any],
    graphs: tuple[fx.GraphModule, fx.GraphModule, fx.GraphModule],
    record: GraphRecord,
    session: Session,
    device: str | None,
    before: Known,
    place: int | None,
) -> Callable[..., Any]:
    """Verify at the first run, on its real inputs; fall back to the captured graph if refused.

    ``graphs`` are the canonical one, the same as it runs in float64, and the rewritten one. What was found
    of an equal graph ``before`` is not found again. A graph for streams with a gradient and without, which
    have their ``place``, has two first runs.
    """
    canonical, plain, rewritten = graphs
    chosen: dict[bool, Callable[..., Any]] = {}

    def decide(args: Any) -> Callable[..., Any]:
        now, repeated = known.wanted(args), session.of_the_forward()
        if repeated is not None:
            verdict = replace(repeated.verdict)
        elif now not in before.verdicts:
            with _timed(record, "verify"), lower.autocast_off(device), unseen_by_checkpoints():
                found = verify(canonical, rewritten, args, plain)
            before.verdicts |= {w: v for w, v in found.items() if v.status == "accepted"}
            verdict = found[now]
        else:
            verdict = before.verdicts[now]
        if not record.failure:  # what is refused of either is said of both
            record.verdict = verdict
        if verdict.status != "reverted":
            return run
        record.failure = f"reverted: {verdict.reason}"
        if session.options.strict:
            raise CompileError(f"{record.region}: {record.failure}")
        return lower.lower(canonical, list(args), "fx", device)

    def first(*args: Any) -> Any:
        wants = place is None or args[place].requires_grad
        if wants not in chosen:
            chosen[wants] = decide(args)
        return chosen[wants](*args)

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
        return run(*session.streams.true(args))

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
