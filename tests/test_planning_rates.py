"""Rates of a device that nobody has described: measured, kept, read, and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusewright.compiler.planning import devices, rates
from fusewright.compiler.planning.devices import DEVICES, UnknownDevice, describe
from fusewright.compiler.planning.rates import Sizes

SMALL = Sizes(width=64, heads=2, tokens=64, head=16, copied=4096, seconds=0.005)


def test_every_rate_is_measured() -> None:
    found = rates.measure(torch.device("cpu"), SMALL)
    assert set(found) == set(rates._RATES)
    assert found.pop("host") == 0.0, "a CPU's model has nothing to move to the host"
    assert all(value > 0.0 for value in found.values())
    assert all(float(f"{value:.1e}") == value for value in found.values())


def test_random_numbers_are_the_callers_own() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    rates.measure(torch.device("cpu"), SMALL)
    assert torch.equal(torch.rand(4), wanted)


def test_a_slower_call_has_a_lower_rate() -> None:
    twice = dataclasses.replace(SMALL, width=512, seconds=0.05)
    where = torch.device("cpu")

    def slowly(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    def quickly(*shape: int) -> torch.Tensor:
        return torch.randn(*shape)

    assert rates._products(slowly, where, twice) < rates._products(quickly, where, twice)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "card.json"
    rates.write(DEVICES["h100"], path)
    again = describe(str(path))
    kept = ("name", "memory", *rates._RATES)
    assert all(getattr(again, n) == getattr(DEVICES["h100"], n) for n in kept)
    assert [p.name for p in path.parent.iterdir()] == ["card.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bandwidth": 0}, "bandwidth"),
        ({"bandwidth": "fast"}, "fast"),
        ({"memory": -1}, "memory"),
        ({"speed": 3.0}, "speed"),
        ({"name": None}, "name"),
    ],
)
def test_a_file_that_is_no_description(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "card.json"
    rates.write(DEVICES["h100"], path)
    given = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
    with pytest.raises(UnknownDevice, match=rf"card\.json.*{message}"):
        describe(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UnknownDevice, match="No such file"):
        describe(str(tmp_path / "none.json"))
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(UnknownDevice, match="no description"):
        describe(str(tmp_path / "list.json"))


@pytest.fixture
def unknown_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A GPU of another name at hand; returns how often it was measured."""

    class Properties:
        name, total_memory, major = "Brand X-9 (24 GB)", 24 * devices.GIB, 8

    measured: list[int] = []

    def measure(where: torch.device, sizes: Sizes | None = None) -> dict[str, float]:
        measured.append(1)
        found = {n: getattr(DEVICES["a100"], n) for n in rates._RATES}
        return found | {"products": 1e14 + len(measured)}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)
    monkeypatch.setattr(devices.hardware, "limits", lambda *_: devices._HOPPER)
    monkeypatch.setattr(rates, "measure", measure)
    return measured


def test_an_unknown_card_is_measured_once(unknown_card: list[int], tmp_path: Path) -> None:
    first, second = devices.at_hand(), devices.at_hand()
    assert first == second and len(unknown_card) == 1
    assert first.name == "Brand X-9 (24 GB)" and first.memory == 24 * devices.GIB
    assert first.workspace == DEVICES["a100"].workspace
    (kept,) = (tmp_path / "fusewright" / "devices").iterdir()
    assert kept.name == "brand-x-9-24-gb.json"
    assert describe(str(kept)).products == first.products


def test_a_folder_that_is_not_writable_is_no_error(
    unknown_card: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert devices.at_hand().memory == 24 * devices.GIB
    assert "measured again" in capfd.readouterr().err and len(unknown_card) == 1


@pytest.mark.gpu
@pytest.mark.alone
def test_measured_rates_are_near_the_built_in_ones() -> None:
    """On a card that has both: the built-in ones are what a step sustains, so a little less."""
    try:
        known = describe(torch.cuda.get_device_name())
    except UnknownDevice:
        pytest.skip("this card has no built-in rates")
    found = rates.measure(torch.device("cuda", 0))
    for name in ("products", "attention", "attention_backward", "bandwidth", "host"):
        ratio = found[name] / getattr(known, name)
        assert 0.7 < ratio < 1.6, f"{name}: {found[name]:.2e}, built in {getattr(known, name):.2e}"
    assert found["launch"] < 3e-5
