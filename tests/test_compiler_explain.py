"""The coverage report as a product: shares, JSON and back, the page, the difference, test cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training
from torch import nn

import fusewright
from fusewright.compiler.explain import CoverageReport

ROOT = Path(__file__).resolve().parent.parent
_KEYS = ("flops", "bytes", "bytes_after", "saved_bytes", "saved_bytes_after")


def _report(name: str = "llama", **options: Any) -> CoverageReport:
    model = fusewright.optimize(models.build(name), lowering="fx", **options)
    training.train_step(model, models.batch())
    return fusewright.report(model)


@pytest.fixture(scope="module")
def report() -> CoverageReport:
    return _report()


def test_families_add_up_to_the_totals(report: CoverageReport) -> None:
    for key in _KEYS:
        assert sum(f[key] for f in report.families) == report.totals[key] > 0
        assert sum(r[key] * r["instances"] for r in _per_instance(report)) == report.totals[key]
    assert sum(f["share"] for f in report.families) == pytest.approx(1, abs=1e-4)
    assert {f["family"]: f["sites"] for f in report.families if f["sites"]} == report.counts


def _per_instance(report: CoverageReport) -> list[dict[str, Any]]:
    return [r for r in report.regions if r["instances"]]


def test_shares_are_those_of_the_rewritten_sites(report: CoverageReport) -> None:
    for share, key in (
        ("coverage_flops", "flops"),
        ("coverage_bytes", "bytes"),
        ("coverage_saved_bytes", "saved_bytes"),
    ):
        fired = sum(f[key] for f in report.families if f["sites"])
        assert getattr(report, share) == pytest.approx(fired / report.totals[key])
        assert 0 < getattr(report, share) < 1
    assert report.totals["bytes_after"] < report.totals["bytes"]
    assert report.totals["saved_bytes_after"] < report.totals["saved_bytes"]
    assert sum(r.share for r in report.rows) < 1


def test_a_model_that_is_left_alone_is_covered_by_nothing() -> None:
    plain = _report(patterns=[])
    assert plain.coverage_flops == plain.coverage_bytes == plain.coverage_saved_bytes == 0
    assert plain.totals["bytes"] == plain.totals["bytes_after"] > 0
    assert plain.totals["flops"] == _report().totals["flops"]


def test_parameters_and_layers(report: CoverageReport) -> None:
    model = models.build("llama")
    assert report.parameters["total"] == sum(p.numel() for p in model.parameters())
    assert report.parameters["bytes"] == 4 * report.parameters["total"]
    assert {f"model.layers.{i}" for i in range(models.LAYERS)} <= report.layers.keys()
    assert 0 < report.layers["model.layers.0"] < 1


def test_a_frozen_weight_costs_no_gradient() -> None:
    def flops(trained: bool) -> int:
        model = models.build("llama")
        for name, p in model.named_parameters():
            p.requires_grad_(trained or "mlp" not in name)
        training.train_step(fusewright.optimize(model, lowering="fx"), models.batch())
        return fusewright.report(model).totals["flops"]

    tokens, weights = 2 * 16, models.LAYERS * 3 * models.HIDDEN * 2 * models.HIDDEN
    assert flops(True) - flops(False) == 2 * tokens * weights


def test_json_and_back(report: CoverageReport) -> None:
    again = CoverageReport.from_json(report.to_json())
    assert json.loads(again.to_json()) == json.loads(report.to_json()) == report.to_dict()
    assert again.require(**models.expected_counts("llama")) is again
    for text in ("{}", "[]", '{"model_type": "x"}', "no"):
        with pytest.raises(ValueError):
            CoverageReport.from_json(text)


class _Page(HTMLParser):
    """Checks that tags are closed, and collects what they refer to."""

    _VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self._VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        self.references += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(report: CoverageReport, tmp_path: Path) -> None:
    text = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text
    page = _Page()
    page.feed(text)
    assert not page.open and not page.references and not page.scripts
    assert "url(" not in text
    for shown in ("rms_norm", "fusewright.rms_norm.default", "aten.rsqrt", "as captured", "glu"):
        assert shown in text
    assert f"{report.coverage_bytes:.1%}" in text
    short = CoverageReport.from_json(report.to_json()).to_html()
    assert "Where a step goes" in short and "aten.rsqrt" not in short


def test_the_page_escapes_what_a_model_says(report: CoverageReport) -> None:
    hostile = CoverageReport.from_json(report.to_json())
    hostile.notes.append("<script>alert(1)</script>")
    assert "<script>" not in hostile.to_html()


def test_the_difference(report: CoverageReport) -> None:
    assert not report.diff(report) and str(report.diff(report)) == "no difference"
    fewer = _report(patterns=["rms_norm", "add_rms_norm", "glu"])
    gained = fewer.diff(report)
    assert gained.counts == {"linear_cross_entropy": [0, 1], "rope": [0, 4]}
    assert {s["pattern"] for s in gained.now_fires} == {"linear_cross_entropy", "rope"}
    assert not gained.now_missed and not gained.gone
    assert gained.shares["coverage_bytes"][1] > gained.shares["coverage_bytes"][0]
    lost = report.diff(fewer)
    assert {s["pattern"] for s in lost.gone} == {"linear_cross_entropy", "rope"}
    assert "rope: 4 -> 0 rewritten" in str(lost)
    assert json.loads(lost.to_json())["counts"]["rope"] == [4, 0]


class _Nearly(nn.Module):
    """A norm over the mean of absolute squares, off by a factor inside of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return x + self.inner(self.weight * (x * torch.rsqrt(mean + 1e-3 * mean.sqrt() + 1e-6)))


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Nearly() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_near_miss_becomes_a_test_case(tmp_path: Path) -> None:
    model = fusewright.optimize(_Stack(), lowering="fx")
    model(torch.randn(4, 16)).sum().backward()
    report = fusewright.report(model)
    missed = [r for r in report.rows if r.status == "missed"]
    assert missed and all(r.reason and "test_compiler_explain.py:" in r.source for r in missed)
    assert all(r.count == 3 and r.share > 0 for r in missed)
    paths = report.emit_repro(tmp_path / "cases")
    assert len(paths) == len(missed)
    for path in paths:
        text = path.read_text()
        assert missed[0].reason in text and "torch.ops.aten.rsqrt" in text
        assert "aten.linear" not in text  # only what the site is made of
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "cases")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"{len(paths)} passed, {len(paths)} xfailed" in done.stdout
    with pytest.raises(ValueError, match="JSON"):
        CoverageReport.from_json(report.to_json()).emit_repro(tmp_path)


def test_examine_one_function() -> None:
    def gate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(a) * b

    a, b = (torch.randn(4, 16, requires_grad=True) for _ in range(2))
    report = fusewright.examine(gate, a, b)
    assert report.counts == {"glu": 1} and report.coverage_bytes == 1
    assert fusewright.examine(_Nearly(), a).counts == {}
