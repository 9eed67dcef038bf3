"""The difference between two coverage reports: what newly fires or misses, and how shares move.

Sites are told apart by pattern and by the modules they stand in, not by source line: a new release
of a modelling file moves its lines and is still the same model.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusewright.compiler.explain import CoverageReport, Row

_SHARES = ("coverage", "coverage_flops", "coverage_bytes", "coverage_saved_bytes")


@dataclass
class Difference:
    """From a first report to a second one; values come in pairs [first, second].

    Attributes:
        counts: pattern -> instances rewritten, where they differ.
        now_fires, now_missed: sites of the second report with what the first said about them.
        gone: sites of the first report that the second one does not mention.
        reasons: sites missed in both for another reason.
        shares: the coverages, and totals of FLOPs and bytes, where they differ.
        families: family -> its share of the step, where it differs by a thousandth or more.
    """

    counts: dict[str, list[int]] = field(default_factory=dict)
    now_fires: list[dict[str, Any]] = field(default_factory=list)
    now_missed: list[dict[str, Any]] = field(default_factory=list)
    gone: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[dict[str, Any]] = field(default_factory=list)
    shares: dict[str, list[float]] = field(default_factory=dict)
    families: dict[str, list[float]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    def to_json(self, indent: int | None = 1) -> str:
        """The difference as a JSON object with the attributes' names as keys."""
        return json.dumps(asdict(self), indent=indent)

    def __str__(self) -> str:
        if not self:
            return "no difference"
        lines = [f"{name}: {a} -> {b} rewritten" for name, (a, b) in self.counts.items()]
        for title, sites in (
            ("now rewritten", self.now_fires),
            ("no longer rewritten, or new and missed", self.now_missed),
            ("not there any more", self.gone),
            ("missed for another reason", self.reasons),
        ):
            lines += [f"{title}:"] if sites else []
            lines += [f"  {_line(site)}" for site in sites]
        for name, (a, b) in self.shares.items():
            shown = (f"{a:.1%} -> {b:.1%}") if name in _SHARES else f"{a:.4g} -> {b:.4g}"
            lines.append(f"{name}: {shown}")
        lines += [f"share of {f}: {a:.1%} -> {b:.1%}" for f, (a, b) in self.families.items()]
        return "\n".join(lines)


def difference(first: CoverageReport, second: CoverageReport) -> Difference:
    """What changes from the first report to the second."""
    out = Difference()
    for name in sorted({*first.counts, *second.counts}):
        pair = [first.counts.get(name, 0), second.counts.get(name, 0)]
        if pair[0] != pair[1]:
            out.counts[name] = pair
    _sites(out, _by_place(first), _by_place(second))
    pairs = {name: [getattr(first, name), getattr(second, name)] for name in _SHARES}
    for name in sorted({*first.totals, *second.totals}):
        pairs[name] = [first.totals.get(name, 0), second.totals.get(name, 0)]
    out.shares = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    a, b = ({f["family"]: f["share"] for f in r.families} for r in (first, second))
    pairs = {name: [a.get(name, 0.0), b.get(name, 0.0)] for name in sorted({*a, *b})}
    out.families = {name: p for name, p in pairs.items() if abs(p[0] - p[1]) >= 1e-3}
    return out


def _by_place(report: CoverageReport) -> dict[tuple[str, str], Row]:
    return {
        (row.pattern, place): row
        for row in sorted(report.rows, key=lambda r: r.status)  # of a place, missed beats fired
        for place in row.where.split(", ")
    }


def _sites(
    out: Difference, first: dict[tuple[str, str], Row], second: dict[tuple[str, str], Row]
) -> None:
    for key, row in second.items():
        before = first.get(key)
        site = {"pattern": key[0], "where": key[1], "source": row.source, "reason": row.reason}
        site["before"] = "" if before is None else (before.reason or before.status)
        if row.status == "fired":
            if before is None or before.status != "fired":
                out.now_fires.append(site)
        elif before is None or before.status == "fired":
            out.now_missed.append(site)
        elif before.reason != row.reason:
            out.reasons.append(site)
    for key, row in first.items():
        if key not in second:
            site = {"pattern": key[0], "where": key[1], "source": row.source}
            out.gone.append(site | {"reason": row.reason, "before": row.status})


def _line(site: dict[str, Any]) -> str:
    before = f" (before: {site['before']})" if site["before"] else ""
    reason = f": {site['reason']}" if site["reason"] else ""
    return f"{site['pattern']} in {site['where']}, {_tail(site['source'])}{reason}{before}"


def _tail(source: str) -> str:
    return source.rpartition("/")[2]
