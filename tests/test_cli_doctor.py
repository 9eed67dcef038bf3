"""``fusewright doctor``: what is here and what would work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from typer.testing import CliRunner

import fusewright
from fusewright import __main__, cli, doctor, versions


def test_json_alone_on_stdout() -> None:
    found = json.loads(CliRunner().invoke(cli.app, ["doctor", "--json"]).stdout)
    assert found.keys() == {"python", "platform", "packages", "devices", "compilers", "works"}
    assert found["packages"]["torch"] == torch.__version__
    assert found["works"]["optimize on the CPU"] == ""
    assert len(found["devices"]) == 1 + torch.cuda.device_count()


def test_text() -> None:
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0
    for part in ("torch", "transformers", "c++", "yes optimize on the CPU"):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("have", "why"),
    [
        (None, "peft is not installed: pip install -U 'fusewright[hf]'"),
        ("0.20.1", "peft 0.20.1 is older than 0.21: pip install -U 'fusewright[hf]'"),
    ],
)
def test_what_stands_in_the_way(
    have: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda n: have if n == "peft" else known(n))
    assert doctor.findings()["works"]["LoRA"] == why


def test_an_old_version_is_named_at_optimize(monkeypatch: pytest.MonkeyPatch) -> None:
    known = versions.installed
    monkeypatch.setattr(
        versions, "installed", lambda n: "5.2.1" if n == "transformers" else known(n)
    )
    line = r"transformers 5\.2\.1 is older than 5\.17: pip install -U 'fusewright\[hf\]'"
    model = models.build("llama")
    with pytest.warns(versions.UnsupportedVersion, match=line) as seen:
        fusewright.optimize(model, lowering="fx")
    assert seen[0].filename == __file__
    assert any("5.2.1" in note for note in fusewright.report(model).notes)
    with pytest.raises(RuntimeError, match=line):
        fusewright.optimize(models.build("llama"), strict=True)


def test_supported_versions_are_no_cause_for_a_warning() -> None:
    assert versions.unsupported() == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_the_command(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusewright"],  # --show-completion asks what shell it runs under
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(cli.__file__).parents[1]),
            "_FUSEWRIGHT_COMPLETE": f"source_{shell}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "FUSEWRIGHT_COMPLETE=complete_" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("fusewright do", "doctor"), ("fusewright report --dtype fl", "float16")],
)
def test_what_is_completed(typed: str, offered: str) -> None:
    environment = {
        "_FUSEWRIGHT_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    result = CliRunner().invoke(cli.app, [], prog_name="fusewright", env=environment)
    assert offered in result.stdout.split()


def test_a_card_that_is_too_old() -> None:
    card = {"name": "Old", "kind": "cuda", "capability": [7, 0]}
    packages = {"triton": "3.6.0"}
    every = {"c": "cc", "c++": "c++", "python headers": "Python.h"}
    assert "7.5" in doctor._gpu(packages, [card], every)
    card["capability"] = [9, 0]
    assert doctor._gpu(packages, [card], every) == ""
    assert "Python.h" in doctor._gpu(packages, [card], every | {"python headers": None})
    assert "no GPU" in doctor._gpu(packages, [], every)


def test_the_command_without_its_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "fusewright.cli", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 2
    assert "pip install typer" in capsys.readouterr().err
