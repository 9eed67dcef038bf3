"""Make the coverage report from what the stages recorded about each captured graph."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from fusewright.compiler import broken, shares
from fusewright.compiler.explain import CoverageReport, Row
from fusewright.compiler.match import Match, Miss
from fusewright.compiler.records import GraphRecord
from fusewright.compiler.session import Session
from fusewright.compiler.shares import Share


def report(session: Session, model: nn.Module | None = None) -> CoverageReport:
    """The report of one optimised model as things stand now.

    Args:
        session: the model's session.
        model: the model, for its parameters; without it they are not counted.
    """
    out = CoverageReport(notes=list(session.notes), eager_now=dict(session.uncaptured))
    if model is not None:
        out.parameters = _parameters(model)
        out.target = {"model": type(model).__name__}
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
        parts = shares.of_record(record)
        if parts.unavailable:
            out.notes.append(f"{record.region}: its cost is not counted: {parts.unavailable}")
        for match, part in zip(record.matches, parts.matches, strict=True):
            fired.append(_fired(match, record, instances, part.times(instances)))
        for miss, part in zip(record.misses, parts.misses, strict=True):
            missed.append(_missed(miss, instances, part.times(instances)))
    live = [r for r in session.records if r.modules]
    for path, reason in broken.modules(model, live).items() if model is not None else ():
        out.eager_now.setdefault(path, reason)
    out.rows = _weighed(_collapse(fired) + _collapse(missed), live)
    counts: Counter[str] = Counter()
    for row in out.rows:
        if row.status == "fired":
            counts[row.pattern] += row.count
    out.counts = dict(counts)
    calls = sum(shares.library_calls(r) * len(r.modules) for r in live)
    out.delegated = {shares.ATTENTION: calls} if calls else {}
    sites = [r for r in out.rows if not r.refines]
    total = sum(r.count for r in sites)
    out.coverage = sum(r.count for r in sites if r.status == "fired") / total if total else 0.0
    _cover(out, live)
    out._session = session
    if session.memory is not None and session.memory.plan is not None:
        out.predicted_peak = session.memory.plan.peak
    if not session.records:
        out.notes.append("nothing has been captured yet: regions are compiled at the first step")
    return out


def _parameters(model: nn.Module) -> dict[str, int]:
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _region(record: GraphRecord, instances: int) -> dict[str, Any]:
    cost = shares.of_record(record).total.as_dict() if instances else Share().as_dict()
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
        **cost,
    }


def _fired(match: Match, record: GraphRecord, instances: int, share: Share) -> Row:
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
        share=share.weight,
        **share.as_dict(),
    )


def _missed(miss: Miss, instances: int, share: Share) -> Row:
    costs: dict[str, Any] = dict(share.as_dict())
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
        share=share.weight,
        **costs,
    )


_SUMMED = ("count", "share", "flops", "bytes", "bytes_after", "saved_bytes", "saved_bytes_after")


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
            sums = {name: getattr(known, name) + getattr(row, name) for name in _SUMMED}
            merged[key] = replace(worst, where=", ".join(places), **sums)
    return list(merged.values())


def _weighed(rows: list[Row], records: list[GraphRecord]) -> list[Row]:
    """The rows with their weights as shares of the step."""
    whole = sum(shares.of_record(r).total.weight * len(r.modules) for r in records)
    return [replace(row, share=row.share / whole if whole else 0.0) for row in rows]


def _cover(out: CoverageReport, records: list[GraphRecord]) -> None:
    """Fill in families, totals, layers and the shares that lie in rewritten sites."""
    families: defaultdict[str, Share] = defaultdict(Share)
    total, taken = Share(), Share()
    for record in records:
        parts, instances = shares.of_record(record), len(record.modules)
        live = bool(record.matches) and not record.failure
        covered = sum(parts.matches, Share()) if live else Share()
        for match, share in zip(record.matches, parts.matches, strict=True):
            name = match.pattern if live else shares.OTHER
            families[name] += share.times(instances)
        for kind, share in parts.rest.items():
            families[kind] += share.times(instances)
        total += parts.total.times(instances)
        taken += covered.times(instances)
        part = _part(covered.before.bytes, parts.total.before.bytes)
        out.layers |= {path: round(part, 4) for path in record.modules}
    out.layers = dict(sorted(out.layers.items(), key=lambda item: _by_number(item[0])))
    out.totals = total.as_dict()
    out.coverage_flops = _part(taken.before.flops, total.before.flops)
    out.coverage_bytes = _part(taken.before.bytes, total.before.bytes)
    out.coverage_saved_bytes = _part(taken.before.saved, total.before.saved)
    ordered = sorted(families.items(), key=lambda item: -item[1].weight)
    out.families = [
        {
            "family": name,
            "sites": out.counts.get(name, 0),
            "share": round(_part(share.weight, total.weight), 6),
            **share.as_dict(),
        }
        for name, share in ordered
    ]


def _part(some: float, whole: float) -> float:
    return some / whole if whole else 0.0


def _by_number(path: str) -> list[Any]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split(".")]
