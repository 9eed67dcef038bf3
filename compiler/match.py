"""Match: find what a pattern's anchors grow into, prove it, check that replacing it is legal.

A pattern proposes candidates, the most ambitious first; the first one that is proven and legal is
taken. What a pattern saw and could not take is recorded as a near miss with the step that refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from fusewright.compiler import ir, legality
from fusewright.compiler.prove import Candidate, Disproved, Proof, prove


class Refused(Exception):
    """An anchor did not grow into this family; the message says what stood in the way."""


class Pattern(Protocol):
    """One family of computations: where to look and what to claim.

    ``anchors`` yields the rare node of each possible site; ``candidates`` yields claims about one
    site, or raises Refused with the reason.

    A pattern may also have ``prepare(graph) -> list[Miss]``, called before its anchors are sought, to
    write opaque calls in terms it can read; ``regroup(graph)``, called once its sites are rewritten, to
    join its own ops; and ``settle(graph) -> list[Storage]``, called when all patterns are done, to fit them to
    their neighbours and to say how parameters are to be stored.
    """

    name: str

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]: ...

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]: ...


@dataclass(frozen=True)
class Match:
    """A proven and legal candidate, and the node before which its replacement goes.

    ``refines``: the site is an op of ours, put there by an earlier match that counts it.
    """

    pattern: str
    candidate: Candidate
    proof: Proof
    before: fx.Node
    location: str
    module: str
    milliseconds: float
    refines: bool = False


@dataclass(frozen=True)
class Miss:
    """A site that a pattern looked at and left alone, with the step that refused and why.

    ``anchor`` is the name of the node that was looked at, ``nodes`` the names of what the most
    ambitious candidate claimed, the anchor alone where nothing grew.
    ``refines``: as of a match; what refused is the step beyond an op of ours.
    """

    pattern: str
    step: str
    reason: str
    location: str
    module: str
    anchor: str = ""
    nodes: frozenset[str] = frozenset()
    refines: bool = False


def find(
    pattern: Pattern, graph: fx.Graph, deferrable: frozenset[fx.Node]
) -> Iterator[Match | Miss]:
    """Every site of one pattern; the caller rewrites each match before asking for the next."""
    for anchor in list(pattern.anchors(graph)):
        if not anchor._erased:  # by the rewrite of an earlier site, q's together with k's
            yield _site(pattern, anchor, graph, deferrable)


def _site(
    pattern: Pattern,
    anchor: fx.Node,
    graph: fx.Graph,
    deferrable: frozenset[fx.Node],
) -> Match | Miss:
    started = time.perf_counter()
    step, reason = "grow", "nothing grew from the anchor"
    claimed = frozenset({anchor.name})
    refines = getattr(anchor.target, "namespace", "") == "fusewright"
    try:
        for candidate in pattern.candidates(anchor):
            claimed = max(claimed, frozenset(n.name for n in candidate.nodes), key=len)
            try:
                proof = prove(candidate)
                before = legality.check(candidate, graph, deferrable)
            except Disproved as refusal:
                # Of several claims the one that came furthest says why.
                said = str(refusal)
                if step != "legality" and ("casting" in said or "casting" not in reason):
                    step, reason = "proof", said
                continue
            except legality.Illegal as refusal:
                step, reason = "legality", str(refusal)
                continue
            spent = (time.perf_counter() - started) * 1e3
            return Match(
                pattern.name,
                candidate,
                proof,
                before,
                ir.source_line(anchor),
                ir.module_path(anchor),
                spent,
                refines,
            )
    except Refused as refusal:
        step, reason = "grow", str(refusal)
    place = ir.source_line(anchor), ir.module_path(anchor)
    return Miss(pattern.name, step, reason, *place, anchor.name, claimed, refines)
