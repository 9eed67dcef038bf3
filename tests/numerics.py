"""The judge of the kernel tests: an error against float64 that must not exceed eager's."""

from __future__ import annotations

import torch


def error(actual: torch.Tensor, oracle64: torch.Tensor) -> float:
    """Root of the mean square error against the oracle; infinite where only one is NaN."""
    a, o = actual.detach().double(), oracle64.detach().double()
    if not torch.equal(a.isnan(), o.isnan()):
        return float("inf")
    difference = torch.where(a == o, 0.0, a - o)  # equal infinities differ by nothing
    return float(difference.nan_to_num(nan=0.0).square().mean().sqrt()) if a.numel() else 0.0


def assert_not_worse(
    actual: torch.Tensor,
    eager: torch.Tensor,
    oracle64: torch.Tensor,
    factor: float = 1.0,
    what: str = "output",
) -> None:
    """Our error against float64 is at most ``factor`` times eager's."""
    assert actual.shape == oracle64.shape, f"{what}: {actual.shape} is not {oracle64.shape}"
    ours, theirs = error(actual, oracle64), error(eager, oracle64)
    assert ours <= factor * theirs, f"{what}: our error {ours:.3e}, eager's {theirs:.3e}"


Results = tuple[torch.Tensor, ...]


def assert_not_worse_pooled(
    draws: list[tuple[Results, Results, Results]], names: tuple[str, ...], factor: float = 1.0
) -> None:
    """As ``assert_not_worse``, over several draws of (ours, eager's, oracle's) results.

    One float32 scalar is right or wrong by luck; the root mean square over draws is less so. Each
    error is taken relative to its oracle's size, and half a unit in the last place of float32, which
    is rounding to nearest, is never too much.
    """
    for at, name in enumerate(names):
        ours = theirs = 0.0
        for mine, eager, oracle in draws:
            assert mine[at].shape == oracle[at].shape, f"{name}: {mine[at].shape}"
            size = max(error(oracle[at], torch.zeros_like(oracle[at])), 1e-300)
            ours += (error(mine[at], oracle[at]) / size) ** 2
            theirs += (error(eager[at], oracle[at]) / size) ** 2
        ours, theirs = (ours / len(draws)) ** 0.5, (theirs / len(draws)) ** 0.5
        floor = 2.0**-24 if draws[0][0][at].dtype is torch.float32 else 0.0
        assert ours <= max(factor * theirs, floor), (
            f"{name}: our error {ours:.3e}, eager's {theirs:.3e}"
        )
