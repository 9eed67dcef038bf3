"""Run a part of a block that treats every row alone, tile by tile, forward and backward.

The forward computes a tile of rows at a time without a graph and keeps what the part reads; the backward
runs each tile once more, with a graph of that tile alone, and its gradients at once. So of what is wide
inside only one tile is ever there:

    y_t = f(x_t, w)        dx_t = f'_x(x_t, w)^T dy_t        dw = sum over t of f'_w(x_t, w)^T dy_t

Rows do not depend on each other, so y and dx are those of the whole; dw is summed over tiles in float32
(float64) and rounded once to w's dtype.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_now = threading.local()


@contextmanager
def repeating() -> Iterator[None]:
    """Inside, a part's result is of nobody's interest: only what its backward reads is wanted."""
    before = getattr(_now, "repeats", False)
    _now.repeats = True
    try:
        yield
    finally:
        _now.repeats = before


@dataclass(frozen=True)
class Tail:
    """A part that is run in tiles.

    Attributes:
        run: its inputs -> its result (batch, rows, width), over any number of rows.
        rows: places of the inputs that have rows (batch, sequence, width); the others are read whole.
        tokens: (rows in all) -> rows of a tile.
        width: of the result.
    """

    run: Callable[..., torch.Tensor]
    rows: tuple[int, ...]
    tokens: Callable[[int], int]
    width: int

    def __call__(self, *inputs: Any) -> torch.Tensor:
        out: torch.Tensor = _Tiled.apply(self, *inputs)  # type: ignore[no-untyped-call]
        return out

    def tiles(self, inputs: Sequence[Any]) -> Iterator[tuple[slice, list[Any]]]:
        """Per tile its rows among all rows, and the inputs with the rows of the tile alone."""
        flat = {i: _flat(inputs[i]) for i in self.rows}
        count = next(iter(flat.values())).shape[1]
        step = max(1, self.tokens(count))
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            yield part, [flat[i][:, part] if i in flat else t for i, t in enumerate(inputs)]


def _flat(t: torch.Tensor) -> torch.Tensor:
    """(1, batch x sequence, width), a view where the memory allows it."""
    return t.reshape(1, t.shape[0] * t.shape[1], t.shape[2])


class _Tiled(torch.autograd.Function):
    """See the module's header."""

    @staticmethod
    def forward(ctx: Any, tail: Tail, *inputs: Any) -> torch.Tensor:
        ctx.tail = tail
        ctx.places = [i for i, t in enumerate(inputs) if isinstance(t, torch.Tensor)]
        ctx.others = [None if isinstance(t, torch.Tensor) else t for t in inputs]
        ctx.save_for_backward(*[inputs[i] for i in ctx.places])
        x: torch.Tensor = inputs[tail.rows[0]]
        shape = (*x.shape[:2], tail.width)
        if getattr(_now, "repeats", False):
            return x.new_empty(()).expand(shape)
        y: torch.Tensor | None = None
        for part, given in tail.tiles(inputs):
            made = tail.run(*given)
            if y is None:
                y = made.new_empty((1, shape[0] * shape[1], tail.width))
            y[:, part] = made
        return x.new_empty(shape) if y is None else y.view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        tail, inputs = ctx.tail, list(ctx.others)
        for at, t in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[at] = t
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        grads = _Gradients(inputs, tail.rows, wanted)
        flat = _flat(dy)
        for part, given in tail.tiles(inputs):
            leaves = {i: given[i].detach().requires_grad_() for i in wanted}
            given = [leaves.get(i, t) for i, t in enumerate(given)]
            with torch.enable_grad():
                made = tail.run(*given)
            found = torch.autograd.grad(
                made, list(leaves.values()), flat[:, part], allow_unused=True
            )
            grads.add(part, dict(zip(leaves, found, strict=True)))
        return None, *grads.results(len(inputs))


class _Gradients:
    """The gradients of the inputs, put together tile by tile."""

    def __init__(self, inputs: Sequence[Any], rows: Sequence[int], wanted: Sequence[int]) -> None:
        self.inputs, self.rows = inputs, rows
        self.made: dict[int, torch.Tensor | None] = dict.fromkeys(wanted)

    def add(self, part: slice, found: dict[int, torch.Tensor | None]) -> None:
        """Take in those of one tile."""
        for i, grad in found.items():
            if grad is None:
                continue
            into = self.made[i]
            if i in self.rows:
                x = self.inputs[i]
                if into is None:
                    into = self.made[i] = grad.new_empty((1, x.shape[0] * x.shape[1], x.shape[2]))
                into[:, part] = grad
            elif into is None:
                wide = torch.promote_types(grad.dtype, torch.float32)
                self.made[i] = grad.to(wide)
            else:
                into += grad

    def results(self, count: int) -> list[torch.Tensor | None]:
        """Per input its gradient, in its shape and dtype."""
        out: list[torch.Tensor | None] = [None] * count
        for i, made in self.made.items():
            if made is not None:
                x = self.inputs[i]
                out[i] = made.to(x.dtype).reshape(x.shape)
        return out
