"""What is asked of rows of logits, computed some rows at a time, forward and backward.

    l = W x + b        z = post(l)        y = f(z), a few numbers a row

Shapes: x (..., H), W (V, H), b (V,) or absent, z (..., V); y has the leading shape of x. A chunk's logits
are made, read and forgotten, so that what is alive at once is [chunk, V]. Saved: x, W and b, which are
alive anyway. The backward makes each chunk's logits again and hands f's gradient on:

    dl = (df/dz post'(l))^T dy, by autograd within the chunk, rounded to the dtype of l as in eager
    dx = dl W      dW = sum over chunks of dl^T x      db = column sums of dl

with the sums over chunks in float32, rounded once: see kernels/head_gradients.py. The price is one more
product of the head for each thing asked, and another in its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from fusewright.kernels.head_gradients import new_gradients

CHUNK_BYTES = 128 * 2**20  # of one chunk's logits in float32
_LEAST = 64


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that logits are made of.

    Attributes:
        x: (..., H).
        weight: (V, H).
        bias: (V,) or None.
        post: what is done to the projection's result, row by row.
        dtype: of the logits.
        made_of: what the model made the logits of, with the versions that it had.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    post: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype
    made_of: tuple[tuple[torch.Tensor, int], ...] = ()

    @property
    def unchanged(self) -> bool:
        """Whether the logits can still be computed."""
        return all(t._version == version for t, version in self.made_of)


class Row:
    """A function of one row of the logits; without a function, the row itself."""

    def __init__(
        self, function: Callable[..., Any] | None = None, args: Any = (), kwargs: Any = None
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs or {}

    def on(self, z: torch.Tensor, known: dict[Row, torch.Tensor] | None = None) -> torch.Tensor:
        """Its values for logits z (n, V), each part computed once."""
        known = {} if known is None else known
        if self.function is None:
            return z
        if self not in known:
            args, kwargs = tree_map_only(
                Row, lambda row: row.on(z, known), (self.args, self.kwargs)
            )
            known[self] = self.function(*args, **kwargs)
        return known[self]


LOGITS = Row()


def chunks(rows: int, classes: int) -> Iterator[slice]:
    """Equal pieces of the rows, the float32 logits of each at most CHUNK_BYTES."""
    step = max(_LEAST, CHUNK_BYTES // (4 * max(classes, 1)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


Answer = Callable[..., tuple[torch.Tensor, ...]]


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Rows,
        answer: Answer,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *aligned: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, weight, bias, *aligned)
        ctx.answer, ctx.post = answer, rows.post
        ctx.set_materialize_grads(False)
        results: list[torch.Tensor] = []
        # Without rows the one empty chunk tells the shapes.
        for chunk in list(chunks(len(x), len(weight))) or [slice(0, 0)]:
            with torch.autocast(x.device.type, enabled=False):
                z = rows.post(F.linear(x[chunk], weight, bias))
                found = answer(z, *(t[chunk] for t in aligned))
            results = results or [t.new_empty((len(x), *t.shape[1:])) for t in found]
            for whole, part in zip(results, found, strict=True):
                whole[chunk] = part
            del z, found
        ctx.mark_non_differentiable(*(t for t in results if not t.is_floating_point()))
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> Any:
        x, weight, bias, *aligned = ctx.saved_tensors
        needs = ctx.needs_input_grad
        nothing = (None,) * len(aligned)
        if all(d is None for d in upstream):
            return None, None, None, None, None, *nothing
        grads = new_gradients(x, weight, *needs[2:5])
        for chunk in chunks(len(x), len(weight)):
            beside = [t[chunk] for t in aligned]
            given = [None if d is None else d[chunk] for d in upstream]
            with torch.autocast(x.device.type, enabled=False):
                made = F.linear(x[chunk], weight, bias)
                grads.add(_dl(made, ctx.post, ctx.answer, beside, given), x, weight, chunk)
        to = zip(grads, (x, weight, bias), strict=True)
        return None, None, *(None if g is None else g.to(t.dtype) for g, t in to), *nothing


def _dl(
    made: torch.Tensor,
    post: Callable[[torch.Tensor], torch.Tensor],
    answer: Answer,
    beside: Sequence[torch.Tensor],
    upstream: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    made = made.requires_grad_()
    with torch.enable_grad():
        found = answer(post(made), *beside)
    pairs = [(y, d) for y, d in zip(found, upstream, strict=True) if d is not None]
    (dl,) = torch.autograd.grad([y for y, _ in pairs], made, [d for _, d in pairs])
    return dl


def by_chunks(
    rows: Rows, answer: Answer, attached: bool, aligned: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, ...]:
    """``answer(z, *aligned)`` for all rows, computed chunk by chunk.

    Args:
        rows: what the logits are made of.
        answer: logits (n, V) and the same rows of ``aligned`` -> tensors (n, ...).
        attached: whether the results take part in autograd.
        aligned: tensors with the leading shape of ``rows.x``, without gradients.
    """
    lead = rows.x.shape[:-1]
    inputs = [t.reshape(lead.numel(), *t.shape[len(lead) :]) for t in (rows.x, *aligned)]
    with torch.set_grad_enabled(attached and torch.is_grad_enabled()):
        found = _ByChunks.apply(  # type: ignore[no-untyped-call]
            rows, answer, inputs[0], rows.weight, rows.bias, *inputs[1:]
        )
    return tuple(t.reshape(*lead, *t.shape[1:]) for t in found)
