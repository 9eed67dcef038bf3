"""How far from float64 a type's loss and gradients are with us and in eager, over batches.

Rounding is chance, and a tiny random model may amplify it: in gemma4_text the mean error of one batch is
half to three times that of another, in eager too. So where a few batches are not clear, as many are
taken, and on as many draws of the weights, as tell a ratio of errors to some hundredths, and its interval
decides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import models
import torch
import training
import zoo_configs

SEEDS, MORE_SEEDS, RATIO, AMPLIFIED = 4, 16, 1.02, 1.1
DIGIT = 0.1  # relative error of a gradient with one digit right
# Of the batches that are taken where the first are not clear, the least and the most of them; and the
# two standard errors of the ratio's logarithm: as wanted, as needed.
LEAST, MOST = 32, 384
WANTED, NEEDED = 0.02, 0.05

Batch = dict[str, torch.Tensor]
Triple = tuple[training.Step, training.Step, training.Step]


class NotTrainable(Exception):
    """Eager itself does not train this type here; the message says why."""


class Noise(NamedTuple):
    """The geometric mean of a ratio over batches, and two standard errors around it."""

    middle: float
    low: float
    high: float
    batches: int

    @classmethod
    def of(cls, logs: list[float]) -> Noise:
        """Of the ratios' logarithms."""
        if not all(map(math.isfinite, logs)):
            return cls(math.nan, math.nan, math.nan, len(logs))
        middle = statistics.mean(logs)
        error = 2 * statistics.stdev(logs) / math.sqrt(len(logs))
        return cls(*(math.exp(middle + e) for e in (0.0, -error, error)), len(logs))

    @property
    def verdict(self) -> str:
        """ "same" where the ratio may be 1 and is known to 5%: that it may be is no merit of few batches."""
        known = self.high <= self.middle * math.exp(NEEDED)
        return "same" if self.low <= 1.0 and known else "differs"


def drawn(like: Batch, seed: int) -> Batch:
    """Another batch with what ``like`` has."""
    return {k: v for k, v in models.batch(seed).items() if k in like}


def bfloat16(eager: Any, ours: Any, batch: Batch, before: dict[str, Any]) -> dict[str, Any]:
    """Mean errors against float64 over batches; more of them where the first few are not clear.

    What was found of the same models ``before``, without checkpoints, holds if the first few are equal to
    the last bit.
    """
    found: list[Triple] = []
    for seeds in (range(SEEDS), range(SEEDS, MORE_SEEDS)):
        found += triples(ours, eager, batch, seeds)
        measured = exactness(found)
        if measured.ratio <= RATIO:
            break
    row: dict[str, Any] = {
        "status": "same" if measured.ratio <= RATIO else "differs", "ours": measured.ours,
        "eager": measured.eager, "ratio": measured.ratio, "batches": len(found),
    }  # fmt: skip
    if row["status"] == "differs" and all(before.get(k) == row[k] for k in ("ours", "eager")):
        return before
    logs = [_log_ratio(triple) for triple in found]
    if row["status"] == "differs" and all(map(math.isfinite, logs)):
        noise = looked_again(eager, ours, batch, statistics.stdev(logs))
        row |= {"first": measured.ratio, "ratio": noise.middle, "interval": noise[1:3]}
        row |= {"batches": noise.batches, "status": noise.verdict, "amplified": True}
    return row


def against_float64(ours: Any, eager: Any, batch: Batch) -> dict[str, Any]:
    """Errors against float64 over batches; the median ratio, since one may turn a choice over."""
    ratios: list[float] = []
    for seeds in (range(SEEDS), range(SEEDS, MORE_SEEDS)):
        try:
            ratios += [exactness([t]).ratio for t in triples(ours, eager, batch, seeds)]
        except (NotTrainable, *zoo_configs.FAILURES) as error:
            return {"float64": brief(error)}
        middle = statistics.median(ratios)
        if middle <= AMPLIFIED:
            break
    status = "same" if middle <= AMPLIFIED else "differs"
    return {"median_ratio": middle, "batches": len(ratios), "status": status, "amplified": True}


def looked_again(eager: Any, ours: Any, batch: Batch, spread: float) -> Noise:
    """The ratio over batches that no judgement has seen, on several draws of the weights.

    Those that gave rise to the look are left out: they were chosen for being bad. How many there are
    follows from ``spread``, the standard deviation of the logarithm, and not from what they give.
    """
    wanted = math.ceil((2 * spread / WANTED) ** 2)
    seeds = range(MORE_SEEDS, MORE_SEEDS + min(max(wanted, LEAST), MOST))
    logs: list[float] = []
    for seed, _ in redraws((eager, ours), seeds):
        logs += map(_log_ratio, triples(ours, eager, batch, [seed]))
    return Noise.of(logs)


def redraws(
    alike: tuple[Any, ...], seeds: Iterable[int]
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """The seeds, with another draw of these equal models' weights during each, and these weights.

    A draw shuffles the entries of every matrix, so that it is distributed as the first one was. Batches
    that shared one would not be independent: it decides where the model amplifies.
    """
    start = {n: p.detach().clone() for n, p in alike[0].named_parameters()}
    try:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            weights = {n: _shuffled(p, generator) for n, p in start.items()}
            for model in alike:
                put(model, weights)
            yield seed, weights
    finally:
        for model in alike:
            put(model, start)


def put(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Write these values into the parameters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _shuffled(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if p.dim() < 2:
        return p
    return p.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p)


def _log_ratio(triple: Triple) -> float:
    ratio = exactness([triple]).ratio
    return math.log(ratio) if ratio > 0 else math.nan


def triples(ours: Any, eager: Any, batch: Batch, seeds: Iterable[int]) -> list[Triple]:
    """A step of ours, of eager and of float64 for each of the seeds."""
    found = []
    for seed in seeds:
        given = drawn(batch, seed)
        found.append((training.train_step(ours, given), *pair(eager, given)))
    return found


def pair(eager: Any, given: Batch) -> tuple[training.Step, training.Step]:
    """A step of eager and of float64."""
    theirs = training.train_step(eager, given)
    if not _is_finite(theirs):
        raise NotTrainable("eager's loss or gradients are not finite in bfloat16")
    _let_go(eager)
    try:
        exact = training.oracle_step(eager, given)
    except zoo_configs.FAILURES as error:
        raise NotTrainable(f"eager does not run in float64: {brief(error)}") from error
    if not _is_finite(exact):
        raise NotTrainable("eager's loss or gradients are not finite in float64")
    return theirs, exact


def _is_finite(step: training.Step) -> bool:
    return all(t.isfinite().all() for t in (step.loss, *step.grads.values()))


def _let_go(model: Any) -> None:
    """Cut what a forward pass has left on its modules off its graph: such tensors cannot be copied."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())


def exactness(found: Iterable[Triple]) -> training.Exactness:
    """The whole model's measure, from triples of ours, eager and float64."""
    return compared(
        (training.relative_errors(mine, exact), training.relative_errors(theirs, exact))
        for mine, theirs, exact in found
    )


def compared(
    errors: Iterable[tuple[dict[str, float], dict[str, float]]],
) -> training.Exactness:
    """Mean errors of two, less the gradients of which neither has a digit right.

    Those are zero in exact arithmetic or all but cancelled, and their rounding would drown the rest. It
    is asked of both: chosen by eager's error alone they would be those where eager was lucky, and of two
    that round alike the other would come out worse.
    """
    means: tuple[list[float], list[float]] = [], []
    for own, eager in errors:
        meant = [n for n in eager if n == "loss" or min(own[n], eager[n]) < DIGIT]
        for mean, of in zip(means, (own, eager), strict=True):
            mean.append(sum(of[n] for n in meant) / max(len(meant), 1))
    return training.Exactness(*(sum(e) / len(e) for e in means))


def brief(error: BaseException) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
