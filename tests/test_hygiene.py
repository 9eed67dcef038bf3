"""The house's rules about the source: length of files and functions, style, imports, names."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = ("compiler", "patterns", "kernels", "runtime", "tests", "bench")
SOURCES = sorted(
    [p for folder in OWN for p in (ROOT / folder).rglob("*.py")]
    + list((ROOT / "src" / "fusewright").glob("*.py"))
)
LONGEST_FILE = 400
LONGEST_FUNCTION = 60


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _installed(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_a_file_is_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines, at most {LONGEST_FILE}"


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_a_function_is_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{node.name} at line {node.lineno}: {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_no_failure_is_hidden(path: Path) -> None:
    """No bare except; an ``except Exception`` explains itself on the line or the next one."""
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            if isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"):
                around = "".join(lines[node.lineno - 1 : node.lineno + 2])
                assert "#" in around, f"line {node.lineno}: say why everything is caught"


def test_the_four_folders_are_links() -> None:
    for folder in ("compiler", "patterns", "kernels", "runtime"):
        link = ROOT / "src" / "fusewright" / folder
        assert link.is_symlink() and link.resolve() == ROOT / folder
        assert not link.readlink().is_absolute()


def test_no_file_of_leftovers() -> None:
    for path in SOURCES:
        assert path.stem not in ("utils", "util", "helpers", "misc", "common"), _relative(path)


def test_ruff() -> None:
    _installed("ruff")
    _run(sys.executable, "-m", "ruff", "check", ".")
    _run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_imports_run_one_way() -> None:
    _installed("importlinter")
    program = (
        "import sys; sys.path.insert(0, 'src'); from importlinter.cli import lint_imports;"
        "sys.exit(lint_imports(no_cache=True))"
    )
    _run(sys.executable, "-c", program)


def test_no_absolute_path_of_a_machine() -> None:
    for path in SOURCES:
        for word in ("/" + "root/", "/" + "home/", "/" + "work/"):
            assert word not in path.read_text(), f"{_relative(path)}: {word}"
