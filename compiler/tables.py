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
    write(report, console)
    return buffer.getvalue()


def write(report: CoverageReport, console: Console) -> None:
    """Print the report on a console."""
    summary = ", ".join(f"{name} {n}" for name, n in sorted(report.counts.items())) or "nothing yet"
    console.print(f"fusewright coverage {report.coverage:.0%} of sites: {summary}", highlight=False)
    for line in _summary(report):
        console.print(line, highlight=False, markup=False)
    fired = [r for r in report.rows if r.status == "fired"]
    missed = sorted((r for r in report.rows if r.status != "fired"), key=_rank)
    if report.families:
        console.print(_families_table(report))
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


def _rank(row: Row) -> tuple[float, int]:
    return -row.share, -row.count


def _summary(report: CoverageReport) -> list[str]:
    lines = []
    about = dict(report.target)
    count = report.parameters
    if count:
        sizes = f"{number(count['total'])} parameters, {number(count['trainable'])} trainable"
        about["parameters"] = f"{sizes}, {size(count['bytes'])}"
    if about:
        lines.append(", ".join(str(v) if k == "model" else f"{k} {v}" for k, v in about.items()))
    if report.delegated:
        left = ", ".join(f"{name} {n}" for name, n in report.delegated.items())
        lines.append(f"calls of a library's own kernel, left to it: {left}")
    total = report.totals
    if total.get("bytes"):
        lines.append(
            f"in rewritten sites: {report.coverage_flops:.0%} of FLOPs, "
            f"{report.coverage_bytes:.0%} of bytes moved, "
            f"{report.coverage_saved_bytes:.0%} of bytes kept for the backward"
        )
        lines.append(
            f"one step: {number(total['flops'])}FLOP, moves {size(total['bytes'])} -> "
            f"{size(total['bytes_after'])}, keeps {size(total['saved_bytes'])} -> "
            f"{size(total['saved_bytes_after'])}"
        )
    return lines


def _table(title: str, *names: str, right: tuple[str, ...] = ("×", "step")) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold", justify="right" if name in right else "left")
    return table


def _families_table(report: CoverageReport) -> Table:
    columns = ("×", "step", "FLOP", "moved", "after", "kept", "after ")
    table = _table("where a step goes", "family", *columns, right=columns)
    for f in report.families:
        moved = (size(f["bytes"]), size(f["bytes_after"]))
        kept = (size(f["saved_bytes"]), size(f["saved_bytes_after"]))
        sites = str(f["sites"] or "")
        table.add_row(f["family"], sites, f"{f['share']:.1%}", number(f["flops"]), *moved, *kept)
    return table


def _fired_table(rows: list[Row]) -> Table:
    names = ("pattern", "×", "step", "where", "source", "parameters", "error / eager's")
    table = _table("rewritten", *names)
    for row in rows:
        parameters = ", ".join(f"{k}={_short(v)}" for k, v in row.parameters.items())
        if row.casting_mode:
            parameters += f", cast={row.casting_mode}"
        error = row.verification
        if row.error is not None and row.error_eager is not None:
            error = f"{row.error:.1e} / {row.error_eager:.1e}"
        table.add_row(
            row.pattern,
            str(row.count),
            f"{row.share:.1%}",
            _places(row),
            tail(row.source),
            parameters,
            error,
        )
    return table


def _missed_table(rows: list[Row]) -> Table:
    table = _table("not rewritten", "pattern", "×", "step", "where", "source", "reason")
    for row in rows:
        share = f"{row.share:.1%}"
        table.add_row(
            row.pattern, str(row.count), share, _places(row), tail(row.source), row.reason
        )
    return table


def tail(source: str) -> str:
    """The file's own name and the line."""
    return source.rpartition("/")[2]


def size(n: float) -> str:
    """Bytes for a reader, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def number(n: float) -> str:
    """A count for a reader, in powers of 1000."""
    for unit in ("", "K", "M", "G", "T"):
        if n < 1000:
            return f"{n:.0f}{unit}" if n >= 100 or not unit else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f}P"


def _places(row: Row) -> str:
    """The modules of a row; of many, the first two."""
    places = row.where.split(", ")
    return row.where if len(places) <= 3 else f"{', '.join(places[:2])} and {len(places) - 2} more"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
