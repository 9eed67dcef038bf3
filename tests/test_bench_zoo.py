"""The zoo's measure of exactness: it favours neither side, and does not pass what it cannot tell."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(autouse=True)
def _bench_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def _exact() -> Any:
    return importlib.import_module("zoo_exact")


def _errors(seed: int, middle: float, tensors: int = 8) -> dict[str, float]:
    """Errors of which the most is in common, as a gradient's from above is."""
    generator = torch.Generator().manual_seed(seed)
    common, *own = torch.randn(tensors + 1, generator=generator).tolist()
    grads = {f"g{n}": middle * math.exp(0.4 * common + 0.2 * o) for n, o in enumerate(own)}
    return {"loss": 1e-4, **grads}


def test_of_two_that_round_alike_neither_is_worse() -> None:
    """Where half of the gradients have no digit right: chosen by one side's luck it would be a quarter."""
    zoo_exact = _exact()
    pairs = [(_errors(2 * s, 0.1), _errors(2 * s + 1, 0.1)) for s in range(400)]
    logs = [math.log(zoo_exact.compared([pair]).ratio) for pair in pairs]
    swapped = [math.log(zoo_exact.compared([pair[::-1]]).ratio) for pair in pairs]
    assert logs == pytest.approx([-s for s in swapped])
    assert abs(sum(logs) / len(logs)) < 0.06


def test_a_fault_is_seen_through_its_noise() -> None:
    zoo_exact = _exact()
    pairs = [(_errors(2 * s, 0.024), _errors(2 * s + 1, 0.02)) for s in range(384)]
    logs = [math.log(zoo_exact.compared([pair]).ratio) for pair in pairs]
    assert zoo_exact.Noise.of(logs).verdict == "differs"
    lost = zoo_exact.compared([({"loss": 1e-4, "g": 0.9}, {"loss": 1e-4, "g": 0.01})])
    assert lost.ratio > 50  # a digit that only eager has right


def test_few_or_wild_batches_pass_nothing() -> None:
    zoo_exact = _exact()
    noise = [0.5 * (-1) ** n for n in range(384)]
    assert zoo_exact.Noise.of(noise[:16]).verdict == "differs"
    assert zoo_exact.Noise.of([0.6 * n for n in noise]).verdict == "same"
    assert zoo_exact.Noise.of([math.nan, *noise]).verdict == "differs"


def test_draws_of_weights_are_equal_and_taken_back() -> None:
    zoo_exact = _exact()
    one, other = nn.Linear(4, 6), nn.Linear(4, 6)
    other.load_state_dict(one.state_dict())
    before, drawn = one.weight.detach().clone(), []
    for _, weights in zoo_exact.redraws((one, other), range(2)):
        assert torch.equal(one.weight, other.weight) and torch.equal(one.weight, weights["weight"])
        drawn.append(one.weight.detach().clone())
    assert torch.equal(one.weight, before) and torch.equal(other.weight, before)
    assert not torch.equal(drawn[0], drawn[1])
    for weight in drawn:
        assert torch.equal(weight.flatten().sort().values, before.flatten().sort().values)
