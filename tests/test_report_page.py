"""The page of a report in a browser without a screen: whole by itself, nothing fetched, no errors."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import models
import pytest
import training

import fusewright

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


def _browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--virtual-time-budget=2000", f"--user-data-dir={page.parent / 'profile'}",
    ]  # fmt: skip
    return subprocess.run(
        [*command, *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    model = fusewright.optimize(models.build("llama"), lowering="fx")
    training.train_step(model, models.batch())
    report = fusewright.report(model)
    page = tmp_path / "report.html"
    report.to_html(page)
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text), "the page fetches something"

    shown = _browse(page, "--dump-dom")
    assert shown.returncode == 0, shown.stderr
    assert "CONSOLE" not in shown.stderr, shown.stderr
    dom = shown.stdout
    cells = re.findall(r'class="cell[ "]', dom)
    assert len(cells) >= len(model.model.layers), "the layer map misses layers"
    for row in report.rows:
        assert row.pattern in dom
    assert dom.count('class="lines"') >= 2, "a region before and after"

    picture = tmp_path / "page.png"
    _browse(page, f"--screenshot={picture}", "--window-size=1200,900")
    with picture.open("rb") as file:
        width, height = struct.unpack(">II", file.read(24)[16:])
    assert (width, height) == (1200, 900)
    assert picture.stat().st_size > 20_000, "the picture is empty"
