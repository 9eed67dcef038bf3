"""What the stages record about each captured graph; the coverage report is made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fusewright.compiler.match import Match, Miss


@dataclass
class Verdict:
    """Errors against float64 on a slice of the first step's inputs, mean over tensors.

    ``status`` is "accepted", "reverted" or "not verified"; ``reason`` says why where it is not
    "accepted".
    """

    status: str = "not verified"
    reason: str = ""
    forward: float | None = None
    forward_eager: float | None = None
    backward: float | None = None
    backward_eager: float | None = None


@dataclass
class GraphBreak:
    """Where Dynamo could not go on, in the user's own code."""

    reason: str
    location: str


@dataclass
class GraphRecord:
    """One captured graph of a region.

    Attributes:
        kind: "block", "leaf" or "head".
        region: the class name of the modules that run it.
        matches, misses: what the patterns found.
        made: per match, the names of the nodes that its replacement put into the graph.
        modules: paths of the instances that ran this graph last.
        failure: why the graph runs as captured, "" if it is rewritten or had nothing to rewrite.
        lowering: "fx" or "inductor".
        symbolic: whether sizes are symbolic.
        seconds: wall time per stage.
        canonical, rewritten: the graphs.
        foreseen: how many kernels began to compile before it was lowered.
        partitioned: what its backward is handed (compiler/partition.py), where that is our choice.
        without: the same for a stream that wants no gradient, where the graph is lowered for both.
        unasked: of ``modules`` those with such a stream (compiler/asking.py).
        repeatable: whether it can run its forward again by itself (runtime/region.py).
        shares: what the sites and the rest cost, once somebody asked (compiler/shares.py).
    """

    kind: str
    region: str
    matches: list[Match] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    made: list[frozenset[str]] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)
    verdict: Verdict = field(default_factory=Verdict)
    breaks: list[GraphBreak] = field(default_factory=list)
    failure: str = ""
    lowering: str = ""
    symbolic: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    canonical: Any = None
    rewritten: Any = None
    foreseen: int = 0
    partitioned: Any = None
    without: Any = None
    unasked: set[str] = field(default_factory=set)
    repeatable: bool = False
    shares: Any = None

    def runs(self, path: str, unasked: bool) -> None:
        """Note that the module at ``path`` runs this graph."""
        self.modules.add(path)
        (self.unasked.add if unasked else self.unasked.discard)(path)

    def handed(self, path: str) -> Any:
        """What the backward of the module at ``path`` is handed (``partitioned``)."""
        return self.without if path in self.unasked and self.without else self.partitioned


@dataclass
class Binding:
    """What an installed class knows: its session, its kind of region and the paths of its modules."""

    session: Any
    kind: str
    original: type
    run: Callable[..., Any] | None = None
