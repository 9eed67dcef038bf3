"""The coverage report: what was rewritten, what was not and why."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from fusewright.compiler.match import Match, Miss
from fusewright.compiler.records import GraphRecord
from fusewright.compiler.session import Session


class CoverageError(AssertionError):
    """The coverage is short of what ``CoverageReport.require`` was asked for."""


@dataclass(frozen=True)
class Row:
    """One kind of site in one region, collapsed over the instances that run it.

    ``status`` is "fired" or "missed". Errors are means over the region's tensors against float64,
    measured on a slice of the first step's inputs; ``*_eager`` is eager's own. ``refines``: the site
    is an op of ours that another row counts, and this row goes beyond it.
    """

    pattern: str
    kernel: str
    count: int
    where: str
    source: str
    parameters: dict[str, Any]
    casting_mode: str
    status: str
    reason: str = ""
    verification: str = ""
    error: float | None = None
    error_eager: float | None = None
    proof_error: float | None = None
    refines: bool = False


@dataclass
class CoverageReport:
    """What ``fusewright.report(model)`` returns.

    Attributes:
        counts: pattern -> instances rewritten in the whole model.
        rows: one row per kind of site, fired first.
        graph_breaks: where Dynamo stopped, with the user's source line.
        eager_now: path of each region's module that runs un-rewritten now -> why.
        regions: per captured graph: kind, class, instances, lowering, seconds, verdict.
        notes: anything else worth knowing.
        coverage: fired / (fired + missed) over instances of sites, each site counted once.
    """

    counts: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    graph_breaks: list[dict[str, str]] = field(default_factory=list)
    eager_now: dict[str, str] = field(default_factory=dict)
    regions: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    coverage: float = 0.0

    def to_json(self, indent: int | None = 1) -> str:
        """The report as a JSON object with the attributes' names as keys."""
        return json.dumps(asdict(self), indent=indent, default=str)

    def require(self, coverage: float | None = None, **minimums: int) -> CoverageReport:
        """Raise CoverageError unless each pattern has at least so many instances; else return self.

        Args:
            coverage: the least share of sites rewritten, 0 to 1.
            minimums: pattern=instances, e.g. ``rms_norm=33``.
        """
        short = [
            f"{name}: {self.counts.get(name, 0)} of {least} rewritten" + self._why(name)
            for name, least in minimums.items()
            if self.counts.get(name, 0) < least
        ]
        if coverage is not None and self.coverage < coverage:
            short.append(f"coverage: {self.coverage:.3f} of {coverage:.3f}")
        if short:
            raise CoverageError("; ".join(short))
        return self

    def _why(self, pattern: str) -> str:
        reasons = [r.reason for r in self.rows if r.pattern == pattern and r.status == "missed"]
        reasons += self.notes + list(self.eager_now.values())
        return f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""

    def __str__(self) -> str:
        from fusewright.compiler.tables import render

        return render(self)

    def __rich__(self) -> str:
        return str(self)


def report(session: Session) -> CoverageReport:
    """The report of one optimised model as things stand now."""
    out = CoverageReport(notes=list(session.notes), eager_now=dict(session.uncaptured))
    fired: list[Row] = []
    missed: list[Row] = []
    for record in session.records:
        instances = len(record.modules)
        out.regions.append(_region(record, instances))
        out.graph_breaks += [asdict(b) for b in record.breaks]
        if not instances:
            continue
        if record.failure:
            for path in sorted(record.modules):
                out.eager_now.setdefault(path, record.failure)
        fired += [_fired(m, record, instances) for m in record.matches]
        missed += [_missed(m, instances) for m in record.misses]
    fired, missed = _collapse(fired), _collapse(missed)
    out.rows = fired + missed
    counts: Counter[str] = Counter()
    for row in fired:
        if row.status == "fired":
            counts[row.pattern] += row.count
    out.counts = dict(counts)
    sites = [r for r in out.rows if not r.refines]
    total = sum(r.count for r in sites)
    out.coverage = sum(r.count for r in sites if r.status == "fired") / total if total else 0.0
    if not session.records:
        out.notes.append("nothing has been captured yet: regions are compiled at the first step")
    return out


def _region(record: GraphRecord, instances: int) -> dict[str, Any]:
    return {
        "kind": record.kind,
        "region": record.region,
        "instances": instances,
        "fired": len(record.matches),
        "missed": len(record.misses),
        "lowering": record.lowering or "as captured",
        "symbolic": record.symbolic,
        "failure": record.failure,
        "verification": asdict(record.verdict),
        "seconds": {k: round(v, 3) for k, v in record.seconds.items()},
    }


def _fired(match: Match, record: GraphRecord, instances: int) -> Row:
    candidate, verdict = match.candidate, record.verdict
    reverted = bool(record.failure)
    return Row(
        pattern=match.pattern,
        kernel=candidate.kernel,
        count=candidate.share * instances,
        where=match.module or record.region,
        source=match.location,
        parameters=dict(candidate.params),
        casting_mode=candidate.cast,
        status="missed" if reverted else "fired",
        reason=record.failure,
        verification=verdict.status,
        error=verdict.forward,
        error_eager=verdict.forward_eager,
        proof_error=max(match.proof.forward, match.proof.backward),
        refines=match.refines,
    )


def _missed(miss: Miss, instances: int) -> Row:
    return Row(
        pattern=miss.pattern,
        kernel="",
        count=instances,
        where=miss.module,
        source=miss.location,
        parameters={},
        casting_mode="",
        status="missed",
        reason=f"{miss.step}: {miss.reason}",
        refines=miss.refines,
    )


def _collapse(rows: list[Row]) -> list[Row]:
    """Rows that differ in their count, module and errors only become one; the worst error stays."""
    merged: dict[str, Row] = {}
    for row in rows:
        key = json.dumps(
            [row.pattern, row.source, row.parameters, row.casting_mode, row.status, row.reason],
            default=str,
        )
        known = merged.get(key)
        if known is None:
            merged[key] = row
        else:
            places = list(dict.fromkeys([*known.where.split(", "), row.where]))
            worst = max(known, row, key=lambda r: r.error or 0.0)
            values = asdict(worst) | {"count": known.count + row.count, "where": ", ".join(places)}
            merged[key] = Row(**values)
    return list(merged.values())
