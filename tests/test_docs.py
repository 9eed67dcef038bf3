"""Every code block of the documents runs as it stands, and every page is reached."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
import real_text
from typer.testing import CliRunner

import fusewright
from fusewright import cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PACKAGE = ("compiler", "patterns", "kernels", "runtime")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is to be, and its lines."""

    language: str
    title: str
    text: str


def _blocks(page: Path) -> list[Block]:
    fence = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
    return [Block(*found) for found in fence.findall(page.read_text(encoding="utf-8"))]


def _adapted() -> Any:
    return fusewright.optimize(models.with_lora(models.build("qwen3")), lowering="fx")


# What a page's code starts from, beside a batch and a data set: its model.
MODELS: dict[str, Callable[[], Any]] = {
    "trainers": real_text.model,
    "export": _adapted,
    "troubleshooting": real_text.model,
    "how-it-works": lambda: None,
}


@pytest.mark.parametrize("page", MODELS)
def test_the_code_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = _blocks(DOCS / f"{page}.md")
    assert {b.language for b in blocks} <= {"python", "console"}
    for block in blocks:
        for line in block.text.splitlines() if block.language == "console" else ():
            program, *arguments = shlex.split(line.removeprefix("$ "))
            assert program == "fusewright"
            assert CliRunner().invoke(cli.app, arguments).exit_code == 0, line
    script = tmp_path / "page.py"
    script.write_text("\n".join(b.text for b in blocks if b.language == "python"))
    given = {"batch": real_text.batch(), "dataset": real_text.Bytes(16), "model": MODELS[page]()}
    runpy.run_path(str(script), given)


def test_the_readmes_first_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a saved model where it reads one."""
    monkeypatch.chdir(tmp_path)
    real_text.model().save_pretrained("my-model")
    script = tmp_path / "readme.py"
    script.write_text("\n".join(b.text for b in _blocks(ROOT / "README.md")))
    told = runpy.run_path(str(script), {"dataset": real_text.Bytes(8)})
    assert fusewright.report(told["model"]).counts["lora"] == 7 * models.LAYERS


def test_every_page_with_code_is_run() -> None:
    pages = {p.stem for p in DOCS.glob("*.md") if any(b.language for b in _blocks(p))}
    assert pages == {*MODELS, "add-a-pattern"}


def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook's cells, in order, as a script."""
    pytest.importorskip("jinja2")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((DOCS / "tutorial.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert not any(c.get("outputs") for c in notebook["cells"])
    script = tmp_path / "tutorial.py"
    script.write_text("\n\n".join(cells))
    runpy.run_path(str(script))
    assert (tmp_path / "report.html").stat().st_size > 1000


def _applied(diff: str, text: str) -> str:
    """``text`` with each hunk of the diff (blank lines lie between) wherever its context stands."""
    for hunk in diff.strip("\n").split("\n\n"):
        lines = hunk.splitlines()
        before = "\n".join(line[1:] for line in lines if line[0] == " ")
        assert before in text, before
        text = text.replace(before, "\n".join(line[1:] for line in lines))
    return text


def test_a_pattern_added_from_its_page_alone(tmp_path: Path) -> None:
    """The page's files and lists in a copy of the repository; then its own tests and the linters."""
    for folder in (*PACKAGE, "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pyc*"))
    package = tmp_path / "src" / "fusewright"
    package.mkdir(parents=True)
    for path in (ROOT / "src" / "fusewright").glob("*.py"):
        shutil.copy(path, package)
    for folder in PACKAGE:
        (package / folder).symlink_to(tmp_path / folder)
    written = []
    for block in _blocks(DOCS / "add-a-pattern.md"):
        path = tmp_path / block.title
        if block.language == "diff":
            path.write_text(_applied(block.text, path.read_text()))
        else:
            path.write_text(block.text)
        written.append(path)
    (test,) = [path for path in written if path.parent.name == "tests"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:logging", test],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'src'}:{tmp_path / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr
    for command in (["check"], ["format", "--check"]):
        lint = [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml"]
        linted = subprocess.run([*lint, *written], capture_output=True, text=True, check=False)
        assert linted.returncode == 0, linted.stdout


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*DOCS.glob("*.md"), ROOT / "README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_sites_pages_are_all_there() -> None:
    """mkdocs.yml names every page once, and the API page names what can be imported."""
    text = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r"^ +- [^:]+: (\S+\.(?:md|ipynb))$", text, re.MULTILINE)
    pages = {p.name for p in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"))}
    assert sorted(named) == sorted(pages)
    for name in re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        try:
            __import__(name)
        except ModuleNotFoundError:
            assert hasattr(__import__(module, fromlist=[attribute]), attribute), name
