"""Helpers of the row kernels' tests: symbolic rows, and one comparison with eager and float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sympy as sp
import torch
from backends import Backend
from numerics import assert_not_worse

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Where both sides round once, a value at a tie falls either way with the order of summation; and a
# float32 result carries nothing but that order.
SLACK = {torch.bfloat16: 1.002, torch.float16: 1.002, torch.float32: 1.6}
CUT_OFF = 3.0  # the interpreter cuts to bfloat16 where hardware rounds


def symbolic_row(name: str, width: int) -> Any:
    """A row of real symbols on which elementwise formulas run unchanged."""
    return np.array(sp.symbols(f"{name}:{width}", real=True), dtype=object)


def symbolic_mean(row: Any) -> Any:
    """The mean of a symbolic row."""
    return sum(row) / sp.Integer(len(row))


def is_gradient(claim: Any, y: Any, dy: Any, x: Any, rules: dict[Any, Any]) -> bool:
    """Whether ``claim`` is the vector-Jacobian product of ``y`` by ``dy``; ``rules`` name symbols."""
    for at, value in zip(x, claim, strict=True):
        true = sum(d * sp.diff(f, at) for d, f in zip(dy, y, strict=True))
        if sp.simplify((true - value.subs(rules)).expand()) != 0:
            return False
    return True


def compare(
    backend: Backend,
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
) -> None:
    """Outputs and every gradient of ``ours`` are not worse than those of ``eager``.

    Both return one tensor or a tuple; the judge is autograd of ``eager`` in float64.
    """
    dtype = inputs[0].dtype
    results: list[tuple[torch.Tensor, ...]] = []
    upstream: list[torch.Tensor] = []
    for f, wide in ((ours, False), (eager, False), (eager, True)):
        leaves = [on(backend, t.double() if wide else t) for t in inputs]
        out = f(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        upstream = upstream or [torch.randn(o.shape).to(o.device, o.dtype) for o in out]
        seeds = [u.double() if wide else u for u in upstream]
        results.append((*out, *torch.autograd.grad(out, leaves, seeds)))
    factor = SLACK[dtype]
    if dtype is torch.bfloat16 and not backend.rounds_bfloat16:
        factor = CUT_OFF
    for at, row in enumerate(zip(*results, strict=True)):
        assert row[0].dtype == row[1].dtype, f"result {at}: {row[0].dtype} is not {row[1].dtype}"
        assert_not_worse(*row, factor, f"result {at}")


def on(backend: Backend, t: torch.Tensor) -> torch.Tensor:
    """A leaf with the values and strides of ``t`` on the backend's device."""
    moved = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=backend.device)
    return moved.copy_(t).detach().requires_grad_()
