"""The coverage report as text, by rich."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fusewright.compiler.explain import CoverageReport, Row

_WIDTH = 118


def render(report: CoverageReport) -> str:
    """The report as plain text of at most 118 columns."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=_WIDTH, color_system=None)
    summary = ", ".join(f"{name} {n}" for name, n in sorted(report.counts.items())) or "nothing yet"
    console.print(f"fusewright coverage {report.coverage:.0%} of sites: {summary}", highlight=False)
    fired = [r for r in report.rows if r.status == "fired"]
    missed = sorted((r for r in report.rows if r.status != "fired"), key=lambda r: -r.count)
    if fired:
        console.print(_fired_table(fired))
    if missed:
        console.print(_missed_table(missed))
    for title, lines in (
        ("graph breaks", [f"{b['location']}: {b['reason']}" for b in report.graph_breaks]),
        ("running un-rewritten now", [f"{p}: {why}" for p, why in report.eager_now.items()]),
        ("notes", report.notes),
    ):
        if lines:
            console.print(f"{title}:", highlight=False)
            for line in lines:
                console.print(f"  {line}", highlight=False, markup=False)
    return buffer.getvalue()


def _fired_table(rows: list[Row]) -> Table:
    table = Table(title="rewritten", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("pattern", "×", "where", "source", "parameters", "error / eager's"):
        table.add_column(name, overflow="fold", justify="right" if name == "×" else "left")
    for row in rows:
        parameters = ", ".join(f"{k}={_short(v)}" for k, v in row.parameters.items())
        if row.casting_mode:
            parameters += f", cast={row.casting_mode}"
        error = row.verification
        if row.error is not None and row.error_eager is not None:
            error = f"{row.error:.1e} / {row.error_eager:.1e}"
        table.add_row(
            row.pattern, str(row.count), _places(row), _tail(row.source), parameters, error
        )
    return table


def _missed_table(rows: list[Row]) -> Table:
    table = Table(title="not rewritten", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("pattern", "×", "where", "source", "reason"):
        table.add_column(name, overflow="fold", justify="right" if name == "×" else "left")
    for row in rows:
        table.add_row(row.pattern, str(row.count), _places(row), _tail(row.source), row.reason)
    return table


def _tail(source: str) -> str:
    return source.rpartition("/")[2]


def _places(row: Row) -> str:
    """The modules of a row; of many, the first two."""
    places = row.where.split(", ")
    return row.where if len(places) <= 3 else f"{', '.join(places[:2])} and {len(places) - 2} more"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
