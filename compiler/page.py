"""The coverage report as one HTML page that needs nothing else: no script, no font, no network.

What is shown is worked out here; ``page.html.j2`` lays it out.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.tables import number, size, tail

if TYPE_CHECKING:
    from fusewright.compiler.explain import CoverageReport
    from fusewright.compiler.records import GraphRecord

# Families in the order of their share of the step; what no family took is grey.
_HUES = ("#2a78d6", "#1baf7a", "#eda100", "#008300", "#4a3aa7", "#e34948", "#e87ba4", "#eb6834")
_GREYS = ("#8a8984", "#b3b1a9", "#d0cec6")
_BARS = (
    ("step, estimated time", "share", "share"),
    ("FLOPs", "flops", "flops"),
    ("bytes moved, as captured", "bytes", "bytes"),
    ("bytes moved, rewritten", "bytes_after", "bytes"),
    ("kept for backward, as captured", "saved_bytes", "saved_bytes"),
    ("kept for backward, rewritten", "saved_bytes_after", "saved_bytes"),
)


def render(report: CoverageReport) -> str:
    """The page's text.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "jinja2 is not installed: pip install 'fusewright[report]'"
        ) from None
    text = (resources.files("fusewright.compiler") / "page.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"size": size, "number": number, "tail": tail, "share": _percent}
    colours = _colours(report)
    return str(
        page.from_string(text).render(
            report=report,
            title=report.target.get("target") or report.target.get("model") or "coverage",
            colours=colours,
            bars=_bars(report, colours),
            tiles=_tiles(report),
            layers=_layers(report),
            fired=[r for r in report.rows if r.status == "fired"],
            missed=sorted((r for r in report.rows if r.status != "fired"), key=lambda r: -r.share),
            graphs=[] if report._session is None else _graphs(report._session.records),
        )
    )


def _percent(part: float) -> str:
    return f"{part:.1%}" if part < 0.9995 or part == 1 else "99.9%"


def _colours(report: CoverageReport) -> dict[str, str]:
    hues, greys = iter(_HUES), iter(_GREYS)
    names = {f["family"]: f["sites"] for f in report.families}
    names |= {r.pattern: r.count for r in report.rows if r.pattern not in names}
    return {
        name: next(hues, _HUES[-1]) if sites else next(greys, _GREYS[-1])
        for name, sites in names.items()
    }


def _bars(report: CoverageReport, colours: dict[str, str]) -> list[dict[str, Any]]:
    """Stacked bars; the rewritten one is drawn to the scale of the captured one."""
    bars = []
    for label, key, scale in _BARS:
        whole = sum(f[scale] for f in report.families)
        if not whole:
            continue
        parts = [
            {"family": f["family"], "colour": colours[f["family"]], "part": f[key] / whole}
            | {"value": _percent(f[key]) if key == "share" else _amount(key, f[key])}
            for f in report.families
            if f[key] / whole > 5e-4
        ]
        total = sum(f[key] for f in report.families)
        shown = "" if key == "share" else _amount(key, total)
        bars.append({"label": label, "parts": parts, "total": shown})
    return bars


def _amount(key: str, value: float) -> str:
    return f"{number(value)}FLOP" if key == "flops" else size(value)


def _tiles(report: CoverageReport) -> list[tuple[str, str, str]]:
    """(value, what it is, what it is made of) of the headline figures."""
    total = report.totals
    tiles = [
        (_percent(report.coverage), "of sites rewritten", f"{sum(report.counts.values())} sites")
    ]
    if total.get("bytes"):
        moved = f"{size(total['bytes'])} → {size(total['bytes_after'])} a step"
        kept = f"{size(total['saved_bytes'])} → {size(total['saved_bytes_after'])}"
        tiles += [
            (_percent(report.coverage_flops), "of FLOPs in them", f"{number(total['flops'])}FLOP"),
            (_percent(report.coverage_bytes), "of bytes moved", moved),
            (_percent(report.coverage_saved_bytes), "of bytes kept for backward", kept),
        ]
    if report.parameters:
        trained = f"{number(report.parameters['trainable'])} trainable"
        tiles.append((number(report.parameters["total"]), "parameters", trained))
    return tiles


def _layers(report: CoverageReport) -> list[dict[str, Any]]:
    """One square a region's module: its place among its siblings and how much of it is covered."""
    out = []
    for path, part in report.layers.items():
        last = path.rpartition(".")[2] or "head"
        why = report.eager_now.get(path, "")
        note = f": {why}" if why else f", {_percent(part)} of its bytes in rewritten sites"
        out.append({"label": last, "part": part, "note": f"{path or 'head'}{note}", "eager": why})
    for path, why in report.eager_now.items():
        if path not in report.layers:
            label = path.rpartition(".")[2]
            out.append({"label": label, "part": 0.0, "note": f"{path}: {why}", "eager": why})
    return out


def _graphs(records: list[GraphRecord]) -> list[dict[str, Any]]:
    """Each live region's graph before and after, as lines with the family that each belongs to."""
    out = []
    for record in records:
        if not record.modules or record.canonical is None or not (record.matches or record.misses):
            continue
        before: dict[str, str] = {}
        after: dict[str, str] = {}
        for match, made in zip(record.matches, record.made, strict=True):
            before |= {n.name: match.pattern for n in match.candidate.nodes}
            after |= dict.fromkeys(made, match.pattern)
        missed = {m.anchor: f"{m.pattern}: {m.step}: {m.reason}" for m in record.misses}
        rewritten = record.rewritten if record.matches and not record.failure else None
        out.append(
            {
                "title": f"{record.region} ({record.kind}) × {len(record.modules)}",
                "before": _lines(record.canonical, before, missed),
                "after": [] if rewritten is None else _lines(rewritten, after, missed),
            }
        )
    return out


def _lines(
    gm: fx.GraphModule, families: dict[str, str], missed: dict[str, str]
) -> list[dict[str, str]]:
    """The graph's code, a line a call."""
    where = {n.name: tail(ir.source_line(n)) for n in gm.graph.nodes}
    lines = []
    for line in str(gm.graph.python_code("self").src).splitlines():
        if not line.startswith("    ") or not line.strip():
            continue
        text = re.sub(r";  (\w+ = )+None", "", line.strip()).replace("torch.ops.", "")
        text = text.replace("9223372036854775807", "end")
        name = text.partition(" = ")[0]
        lines.append(
            {
                "text": text,
                "family": families.get(name, ""),
                "where": where.get(name, ""),
                "missed": "" if name in families else missed.get(name, ""),
            }
        )
    return lines
