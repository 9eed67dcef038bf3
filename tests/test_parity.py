"""The optimised model against eager and against float64, on 15 architectures, in every way to train.

In float32, loss and every gradient lie within 1e-5 of eager's. In bfloat16 they are no farther from
float64 than eager's: the mean of the relative errors over gradients, loss and five seeds is at most
1.02 times eager's, and both numbers are printed (``-rP`` shows them).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
import training

import fusewright

SEEDS = range(5)
_autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)


@dataclass
class Pair:
    """Two equal models, one of them optimised, and how to build them from another seed."""

    build: Callable[[int], Any]
    eager: Any
    ours: Any

    @classmethod
    def make(cls, build: Callable[[int], Any], lowering: str = "fx") -> Pair:
        eager = build(0)
        return cls(build, eager, fusewright.optimize(models.twin(eager), lowering=lowering))

    def reseed(self, seed: int) -> None:
        """Both models get the parameters of another seed, in place."""
        fresh = self.build(seed).state_dict()
        self.eager.load_state_dict(fresh)
        self.ours.load_state_dict(fresh)

    def assert_same(self, batch: dict[str, torch.Tensor], what: str, seed: int = 0) -> None:
        """Within 1e-5 of eager."""
        ours = training.train_step(self.ours, batch, seed=seed)
        eager = training.train_step(self.eager, batch, seed=seed)
        training.assert_same_step(ours, eager, what=what)

    def exactness(
        self, around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> training.Exactness:
        """Ours and eager's error against float64 over all seeds."""
        return training.exactness(self._steps(around))

    def _steps(self, around: Callable[[], AbstractContextManager[Any]]) -> Iterator[Any]:
        for seed in SEEDS:
            self.reseed(seed)
            # At 2 x 16 tokens one clamp or one softmax that turns over moves the ratio by 20 %.
            batch = models.batch(seed, rows=8, length=32)
            yield (
                training.train_step(self.ours, batch, seed=seed, around=around),
                training.train_step(self.eager, batch, seed=seed, around=around),
                training.oracle_step(self.eager, batch, seed=seed),
            )

    def graphs(self) -> Counter[tuple[str, str]]:
        """Captured graphs by region."""
        found = fusewright.report(self.ours).regions
        return Counter((r["kind"], r["region"]) for r in found)


_LONG = ("falcon_h1",)  # its scan is a loop over the tokens: half a minute a test


def _groups(names: tuple[str, ...]) -> list[Any]:
    """One worker takes all tests of an architecture, so that its models are built once."""
    return [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in names]


@pytest.fixture(scope="module", params=_groups(models.NAMES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def full(name: str) -> Pair:
    """Every parameter trained, float32."""
    return Pair.make(lambda seed: models.build(name, seed=seed))


@pytest.fixture(scope="module")
def lora(name: str) -> Pair:
    """LoRA with dropout, float32."""
    return Pair.make(lambda seed: models.with_lora(models.build(name, seed=seed), dropout=0.05))


def _checkpointed(model: Any, reentrant: bool) -> Any:
    settings = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    model.enable_input_require_grads()
    return model


def test_float32(name: str, full: Pair) -> None:
    full.assert_same(models.batch(), name)
    full.assert_same(models.batch(1), f"{name}, second step")


def test_every_miss_has_its_reason(name: str, full: Pair) -> None:
    full.assert_same(models.batch(), name)
    report = fusewright.report(full.ours)
    fired = Counter[str]()
    for row in report.rows:
        assert row.status in ("fired", "missed")
        assert row.status == "fired" or row.reason, f"{name}: {row} was missed without a reason"
        fired[row.pattern] += row.count if row.status == "fired" else 0
    assert +fired == Counter(report.counts)
    assert all(reason for reason in report.eager_now.values())
    if name in models.FIRED:
        assert not report.eager_now and not report.graph_breaks
        assert report.counts == models.expected_counts(name), str(report)


def test_another_length_compiles_at_most_once_more(name: str, full: Pair) -> None:
    full.assert_same(models.batch(), name)
    before = full.graphs()
    full.assert_same(models.batch(2, rows=3, length=24), f"{name}, another length")
    after = full.graphs()
    assert all(after[region] <= 2 * before[region] for region in after), (before, after)
    full.assert_same(models.batch(3, rows=4, length=40), f"{name}, a third length")
    assert full.graphs() == after


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_gradient_checkpointing(name: str, full: Pair, reentrant: bool) -> None:
    try:
        for model in (full.ours, full.eager):
            _checkpointed(model, reentrant)
        full.assert_same(models.batch(4), name)
    finally:
        for model in (full.ours, full.eager):
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()


def test_lora_dropout(name: str, lora: Pair) -> None:
    lora.assert_same(models.batch(), name, seed=3)


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_lora_dropout_with_checkpointing(name: str, lora: Pair, reentrant: bool) -> None:
    try:
        for model in (lora.ours, lora.eager):
            _checkpointed(model, reentrant)
        lora.assert_same(models.batch(5), name, seed=4)
    finally:
        for model in (lora.ours, lora.eager):
            model.gradient_checkpointing_disable()


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("which", _groups(("llama", "gemma3_text")))
def test_checkpointing_from_the_first_step(which: str, reentrant: bool) -> None:
    """What compiling does on the way must not be taken for what the checkpointed forward saved."""

    def build(seed: int) -> Any:
        adapted = models.with_lora(models.build(which, seed=seed), dropout=0.05)
        return _checkpointed(adapted, reentrant)

    pair = Pair.make(build)
    pair.assert_same(models.batch(), which)
    pair.assert_same(models.batch(1), f"{which}, second step")
    assert fusewright.report(pair.ours).counts.items() >= models.expected_counts(which).items()


def test_bfloat16(name: str) -> None:
    pair = Pair.make(
        lambda seed: models.build(name, seed=seed, dtype=torch.bfloat16, every_expert=True)
    )
    training.assert_model_not_worse(pair.exactness(), f"{name} bf16")
    if name in models.FIRED:
        assert fusewright.report(pair.ours).counts == models.expected_counts(name)


def test_autocast(name: str) -> None:
    pair = Pair.make(lambda seed: models.build(name, seed=seed, every_expert=True))
    training.assert_model_not_worse(pair.exactness(_autocast), f"{name} autocast")


def _adapters(name: str) -> list[Any]:
    """Two of the four combinations for everyone, all four for the six that must fire."""
    every = [(torch.float32, 0.05), (torch.bfloat16, 0.0), (torch.float32, 0.0)]
    every.append((torch.bfloat16, 0.05))
    marks = [pytest.mark.xdist_group(name)]
    rare = [] if name in ("llama", "gemma2") else [pytest.mark.slow]
    few = 1 if name in _LONG else 2
    return [
        pytest.param(name, dtype, dropout, marks=marks + (rare if i >= few else []))
        for i, (dtype, dropout) in enumerate(every)
    ]


@pytest.mark.parametrize(
    ("which", "dtype", "dropout"), [case for n in models.NAMES for case in _adapters(n)]
)
def test_lora_bfloat16(which: str, dtype: torch.dtype, dropout: float) -> None:
    def build(seed: int) -> Any:
        base = models.build(which, seed=seed, dtype=torch.bfloat16, every_expert=True)
        return models.with_lora(base, dtype, dropout)

    pair = Pair.make(build)
    training.assert_model_not_worse(pair.exactness(), f"{which} LoRA {dtype} dropout {dropout}")
    counts = fusewright.report(pair.ours).counts
    if which in models.FIRED:
        assert counts.items() >= models.expected_counts(which).items()
        if dropout == 0.0:
            adapted = [p for n, p in pair.ours.named_parameters() if "lora_A" in n]
            assert counts["lora"] == len(adapted)


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(n, marks=[pytest.mark.xdist_group(n), *[pytest.mark.slow] * (n in _LONG)])
        for n in ("llama", "gemma2", "falcon_h1", "bloom")
    ],
)
def test_padded_rows(which: str) -> None:
    batch = models.batch(6)
    batch["attention_mask"][1, -5:] = 0
    batch["labels"][1, -5:] = -100
    pair = Pair.make(lambda seed: models.build(which, seed=seed))
    pair.assert_same(batch, which)
    pair.assert_same(models.batch(), f"{which}, unpadded")


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["int", "tensor"])
@pytest.mark.parametrize("which", _groups(("llama", "gemma2")))
def test_sum_over_items_in_batch(which: str, items: Any) -> None:
    pair = Pair.make(lambda seed: models.build(which, seed=seed))
    pair.assert_same(models.batch() | {"num_items_in_batch": items}, which)
    assert fusewright.report(pair.ours).counts["linear_cross_entropy"] == 1


def test_inductor_float32() -> None:
    pair = Pair.make(lambda seed: models.build("llama", seed=seed), lowering="inductor")
    pair.assert_same(models.batch(), "llama")
    pair.assert_same(models.batch(2, rows=3, length=24), "llama, another length")
    assert fusewright.report(pair.ours).counts == models.expected_counts("llama")


def test_inductor_bfloat16() -> None:
    def build(seed: int) -> Any:
        return models.with_lora(models.build("gemma2", seed=seed, dtype=torch.bfloat16))

    pair = Pair.make(build, lowering="inductor")
    training.assert_model_not_worse(pair.exactness(), "gemma2 bf16 LoRA through Inductor")
    assert fusewright.report(pair.ours).counts.items() >= models.expected_counts("gemma2").items()
