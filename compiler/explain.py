"""The coverage report: what was rewritten, what was not and why, and what share of a step it is.

``compiler/coverage.py`` makes it from what the stages recorded; the forms it takes are in
``tables.py`` (terminal), ``page.py`` (HTML), ``difference.py`` (against another report) and
``repro.py`` (a test case for each miss).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusewright.compiler.difference import Difference
    from fusewright.compiler.session import Session


class CoverageError(AssertionError):
    """The coverage is short of what ``CoverageReport.require`` was asked for."""


@dataclass(frozen=True)
class Row:
    """One kind of site in one region, collapsed over the instances that run it.

    ``status`` is "fired" or "missed". Errors are means over the region's tensors against float64,
    measured on a slice of the first step's inputs; ``*_eager`` is eager's own. ``share`` is the
    part of the step's estimated time before rewriting, 0 to 1; FLOPs and bytes are those of all
    the row's instances in one training step, as captured and (``*_after``) as rewritten.
    ``refines``: the site is an op of ours that another row counts, and this row goes beyond it.
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
    share: float = 0.0
    flops: int = 0
    bytes: int = 0
    bytes_after: int = 0
    saved_bytes: int = 0
    saved_bytes_after: int = 0
    refines: bool = False


@dataclass
class CoverageReport:
    """What ``fusewright.report(model)`` returns.

    The costs are those of one training step, forward and backward, of the captured regions at the
    sizes they were captured with (compiler/cost.py says how they are counted); they are all zero
    where nothing could be counted, and ``notes`` then says why.

    Attributes:
        counts: pattern -> instances rewritten in the whole model.
        delegated: family -> calls that the code already makes to a library's own kernel, and that are
            left to it: attention, whatever its mask or window.
        rows: one row per kind of site, fired first.
        graph_breaks: where Dynamo stopped, with the user's source line.
        eager_now: path of each region's module that runs un-rewritten now -> why.
        regions: per captured graph: kind, class, instances, lowering, seconds, verdict, costs.
        notes: anything else worth knowing.
        coverage: fired / (fired + missed) over instances of sites, each site counted once.
        coverage_flops, coverage_bytes, coverage_saved_bytes: shares, 0 to 1, of the captured
            regions' FLOPs, bytes moved and bytes kept for the backward that lie in rewritten sites.
        families: per family, and for what no family took: sites, share of the step's estimated
            time, FLOPs, bytes moved and saved bytes, as captured and (``*_after``) as rewritten.
        totals: the same keys for all captured regions together.
        parameters: "total", "trainable" and "bytes" of the model.
        layers: path of each region's module -> share of its bytes that lies in rewritten sites.
        predicted_peak: bytes of the step's worst moment, where ``memory_budget`` had it planned.
        target: what the report is about: the model's class, and batch, sequence and the like.
    """

    counts: dict[str, int] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    graph_breaks: list[dict[str, str]] = field(default_factory=list)
    eager_now: dict[str, str] = field(default_factory=dict)
    regions: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    coverage: float = 0.0
    coverage_flops: float = 0.0
    coverage_bytes: float = 0.0
    coverage_saved_bytes: float = 0.0
    families: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)
    predicted_peak: float | None = None
    target: dict[str, Any] = field(default_factory=dict)
    delegated: dict[str, int] = field(default_factory=dict)
    _session: Session | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name, as JSON can hold them."""
        found: dict[str, Any] = json.loads(self.to_json(None))
        return found

    def to_json(self, indent: int | None = 1) -> str:
        """The report as a JSON object with the attributes' names as keys."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name[0] != "_"}
        values["rows"] = [vars(row) for row in self.rows]
        return json.dumps(values, indent=indent, default=str)

    @classmethod
    def from_json(cls, text: str) -> CoverageReport:
        """A report read back from ``to_json``; it has no graphs, so no HTML code and no repros.

        Raises:
            ValueError: the text is not such a report.
        """
        values = json.loads(text)
        known = {f.name for f in fields(cls) if f.name[0] != "_"}
        if not isinstance(values, Mapping) or not {"rows", "counts", "regions"} <= values.keys():
            raise ValueError("not a coverage report: it has no rows, counts and regions")
        columns = {f.name for f in fields(Row)}
        rows = [Row(**{k: v for k, v in row.items() if k in columns}) for row in values["rows"]]
        return cls(**{k: v for k, v in values.items() if k in known} | {"rows": rows})

    def to_html(self, path: str | PathLike[str] | None = None) -> str:
        """The report as one self-contained page; also written to ``path`` where that is given.

        Raises:
            ModuleNotFoundError: jinja2 is not installed (``pip install 'fusewright[report]'``).
        """
        from fusewright.compiler.page import render

        text = render(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def diff(self, other: CoverageReport) -> Difference:
        """What changes from this report to ``other``: sites, reasons and shares."""
        from fusewright.compiler.difference import difference

        return difference(self, other)

    def emit_repro(self, folder: str | PathLike[str]) -> list[Path]:
        """Write a self-contained pytest file for each kind of missed site; returns their paths.

        Raises:
            ValueError: the report was read from JSON and has no graphs.
        """
        from fusewright.compiler.repro import emit

        if self._session is None:
            raise ValueError("a report read from JSON has no graphs to write test cases from")
        return emit(self._session, Path(folder))

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
