"""``fusewright bench``: a step of a model, eager against optimised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
from typer.testing import CliRunner

from fusewright import cli

SMALL = ("--sequence", "16", "--batch", "2", "--steps", "2", "--lowering", "fx")


@pytest.fixture
def target(tmp_path: Path) -> str:
    """A folder with the config of a tiny model of four layers."""
    models.config("llama", 4).save_pretrained(tmp_path)
    return str(tmp_path)


def _bench(target: str, *more: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", target, *SMALL, *more])


def test_json(target: str) -> None:
    result = _bench(target, "--dtype", "float32", "--lora", "4", "--layers", "2", "--json")
    found = json.loads(result.stdout)
    assert found["batch"] == 2 and found["sequence"] == 16 and found["tokens"] == 32
    assert found["counts"]["lora"] == 7 * 2 and found["coverage"] > 0.5
    for name in ("eager", "optimised"):
        assert found[name]["milliseconds"] > 0 and found[name]["first_step_seconds"] > 0
        assert found[name]["tokens_per_second"] == pytest.approx(
            32e3 / found[name]["milliseconds"], rel=0.01
        )
    assert found["eager"]["loss"] == pytest.approx(found["optimised"]["loss"], rel=1e-5)
    ratio = found["eager"]["milliseconds"] / found["optimised"]["milliseconds"]
    assert found["speedup"] == pytest.approx(ratio, abs=1e-3)


def test_table(target: str) -> None:
    result = _bench(target, "--layers", "2")
    assert result.exit_code == 0, result.output
    for part in ("eager", "optimised", "tokens per second", "times as fast", "rms_norm"):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "9"), "--layers 9: the config has 4 layers"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--lowering", "fast"), "--lowering must be one of"),
    ],
)
def test_questions_without_an_answer(target: str, arguments: tuple[str, ...], message: str) -> None:
    result = _bench(target, *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not result.stdout
