"""``fusewright doctor``: what is here and what would work."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from fusewright import __main__, cli, doctor


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
    [(None, "peft is not installed"), ("0.20.1", "peft 0.20.1 is older than 0.21")],
)
def test_what_stands_in_the_way(
    have: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda n: have if n == "peft" else known(n))
    assert doctor.findings()["works"]["LoRA"] == why


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
