"""A whole model's training step: run it, hold it against eager, measure it against float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass gave.

    Attributes:
        loss: scalar, detached.
        grads: parameter name -> gradient, for each parameter that got one.
    """

    loss: torch.Tensor
    grads: dict[str, torch.Tensor]


def train_step(
    model: Any,
    batch: dict[str, torch.Tensor],
    *,
    seed: int = 0,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Step:
    """One pass from cleared gradients; ``seed`` fixes the dropout masks, ``around`` the forward."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with around():
        loss = model(**batch).loss
    loss.backward()
    grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Step(loss.detach(), grads)


class _InDouble(TorchFunctionMode):
    """Every request for a shorter floating dtype is one for float64.

    Norms, softmax, rotary tables and the loss are upcast to float32 in the models' own code; in a
    float64 model that would be a loss of precision, and the oracle none.
    """

    _SHORT = frozenset({torch.float32, torch.bfloat16, torch.float16})
    _METHODS = frozenset({torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._METHODS:
            return args[0].double()
        double = lambda d: torch.float64 if d in self._SHORT else d
        args, kwargs = tree_map_only(torch.dtype, double, (args, kwargs or {}))
        if func is torch._grouped_mm:  # the experts' product, which has no float64 kernel
            return _grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)


def _grouped_mm(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor, **_: Any) -> torch.Tensor:
    """Rows of x (T, K), in consecutive groups ending at offs (E,), times w (E, K, N) -> (T, N)."""
    bounds = [0, *offs.tolist()]
    return torch.cat([x[bounds[i] : bounds[i + 1]] @ w[i] for i in range(len(w))])


def oracle_step(model: Any, batch: dict[str, torch.Tensor], *, seed: int = 0) -> Step:
    """The same pass in float64 throughout, on a copy of an eager model's parameters.

    Dropout draws the same masks in every dtype on the CPU, so the seed makes them the model's.
    """
    exact = copy.deepcopy(model).double()
    if getattr(exact, "is_gradient_checkpointing", False):
        exact.gradient_checkpointing_disable()  # its recompute would run outside of _InDouble
    return train_step(exact, batch, seed=seed, around=_InDouble)


def _norm(x: torch.Tensor) -> float:
    return float(x.double().norm())


def relative_errors(actual: Step, reference: Step) -> dict[str, float]:
    """Per gradient, and for the loss, |actual - reference| / |reference|, in Frobenius norms.

    A gradient that is zero but for rounding (attention does not see a bias on its keys) has no
    relative error: the denominator is at least what a ten-thousandth of the root mean square over
    all the gradients' entries would give.
    """
    assert actual.grads.keys() == reference.grads.keys(), (
        f"gradients for {sorted(actual.grads.keys() ^ reference.grads.keys())} on one side only"
    )
    square = sum(_norm(g) ** 2 for g in reference.grads.values())
    typical = math.sqrt(square / max(sum(g.numel() for g in reference.grads.values()), 1))
    errors = {"loss": _norm(actual.loss - reference.loss.double()) / _norm(reference.loss)}
    for name, wanted in reference.grads.items():
        least = 1e-4 * typical * math.sqrt(wanted.numel())
        difference = _norm(actual.grads[name].double() - wanted.double())
        errors[name] = difference / max(_norm(wanted), least, 1e-300)
    return errors


def assert_same_step(actual: Step, eager: Step, tolerance: float = 1e-5, what: str = "") -> None:
    """Loss and every gradient within ``tolerance``, relative by norm."""
    errors = relative_errors(actual, eager)
    wrong = {n: e for n, e in errors.items() if not e <= tolerance}
    worst = sorted(wrong.items(), key=lambda item: -item[1])[:5]
    shown = ", ".join(f"{n} {e:.1e}" for n, e in worst)
    assert not wrong, f"{what}: {len(wrong)} of {len(errors)} beyond {tolerance:g}: {shown}"


@dataclass(frozen=True)
class Exactness:
    """Mean relative errors against float64 over gradients, the loss, and seeds."""

    ours: float
    eager: float

    @property
    def ratio(self) -> float:
        """Ours over eager's; 1 where both are exact."""
        return self.ours / self.eager if self.eager else (1.0 if self.ours == 0 else math.inf)

    def __str__(self) -> str:
        return f"ours {self.ours:.4e}, eager {self.eager:.4e}, ratio {self.ratio:.4f}"


def exactness(triples: Iterable[tuple[Step, Step, Step]]) -> Exactness:
    """The whole model's measure, from (ours, eager, oracle) of each seed."""
    ours, eager = [], []
    for mine, theirs, oracle in triples:
        ours += relative_errors(mine, oracle).values()
        eager += relative_errors(theirs, oracle).values()
    return Exactness(sum(ours) / len(ours), sum(eager) / len(eager))


def assert_model_not_worse(measured: Exactness, what: str = "", factor: float = 1.02) -> None:
    """The whole model is at most ``factor`` times as far from float64 as eager; prints both."""
    print(f"{what}: {measured}")
    assert measured.ratio <= factor, f"{what}: {measured}, allowed {factor}"


def apart(reference: list[float], found: list[float]) -> float:
    """The largest relative difference of two curves' losses."""
    return max(abs(a - b) / abs(a) for a, b in zip(reference, found, strict=True))
