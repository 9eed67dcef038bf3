"""Logits that stay unmade where what is asked of them can be answered some rows at a time.

``optimize(model, logits="chunked")`` hands these out. Each row of the logits is made of one row of the
hidden states, so a view of the logits that leaves the classes alone is a view of those, and a function
of rows stays one. Both are recorded: slices, masks and reshapes of the tokens, casts, a temperature,
(log-)softmax, sums and products of such values. What leaves a few numbers a row (a gather, logsumexp,
the sum of an entropy, argmax, cross-entropy) is computed chunk by chunk: see runtime/rows.py. Anything
else computes the logits as a whole, by the recorded calls in their order, and says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_map_only
from typing_extensions import Self

from fusewright.runtime import row_calls
from fusewright.runtime.logits import LazyLogits
from fusewright.runtime.rows import LOGITS, Row, Rows, by_chunks


@dataclass(frozen=True)
class Call:
    """What gave a derived value: ``function(*args, **kwargs)``, or entry ``index`` of that."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    index: int | None = None

    def again(self) -> Any:
        """The real value, from the real values of what it was called on."""
        args, kwargs = tree_map_only(RowLogits, lambda t: t.materialize(), (self.args, self.kwargs))
        out = self.function(*args, **kwargs)
        return out if self.index is None else out[self.index]


class RowLogits(LazyLogits):
    """Logits, or a function of their rows, that are computed as a whole only where they must be.

    Args:
        rows: what the rows are made of.
        row: the function of one row of the logits that this is.
        dtype: the tensor's dtype.
        attached: whether it takes part in autograd.
        told: called with a line about each call that needed the logits as a whole.
        call: what gave it, if it was not the model.
    """

    @staticmethod
    def __new__(cls, rows: Rows, row: Row, dtype: torch.dtype, *_: Any, **__: Any) -> Self:
        return super().__new__(cls, rows.post, [rows.x], _sizes(rows), dtype)

    def __init__(
        self,
        rows: Rows,
        row: Row,
        dtype: torch.dtype,
        attached: bool,
        told: Callable[[str], None],
        call: Call | None = None,
    ) -> None:
        leaves = (rows.x, rows.weight, rows.bias)
        compute = functools.partial(_whole, rows.post, row)
        super().__init__(compute, leaves, _sizes(rows), dtype, attached)
        self._rows, self._row, self._told, self._call = rows, row, told, call

    def materialize(self) -> torch.Tensor:
        """The real tensor, by the calls that eager would have made."""
        if self._call is None:
            return super().materialize()
        wants_grad = self._attached and torch.is_grad_enabled()
        if self._known is None or (wants_grad and not self._known.requires_grad):
            with torch.set_grad_enabled(wants_grad):
                self._known = self._call.again()
        return self._known if wants_grad else self._known.detach()

    def _unchanged(self) -> bool:
        return self._rows.unchanged

    def _derive(self, dtype: torch.dtype, attached: bool) -> LazyLogits:
        if not attached:
            call = Call(torch.Tensor.detach, (self,))
            return RowLogits(self._rows, self._row, self.dtype, False, self._told, call)
        return self.row_function(torch.Tensor.to, (self, dtype))

    def row_function(self, function: Callable[..., Any], args: tuple[Any, ...]) -> RowLogits:
        """A function of each row that has as many entries as the row; also of ``args`` beside."""
        self._check()
        row = Row(function, tree_map_only(RowLogits, lambda t: t._row, args))
        like = torch.empty((1, self.shape[-1]), dtype=self._rows.dtype, device="meta")
        dtype = row.on(like).dtype
        attached = self._attached and torch.is_grad_enabled()
        call = Call(function, args)
        made = RowLogits(self._rows, row, dtype, attached, self._told, call)
        return made.connected()  # type: ignore[return-value]

    def row_view(self, function: Callable[..., Any], args: Any, kwargs: Any, moved: Any) -> Any:
        """A view of the tokens, or a tuple of them; ``moved`` are the arguments for the rows of x."""
        self._check()
        seen = function(self._rows.x, *moved, **kwargs)
        attached = self._attached and torch.is_grad_enabled()
        several = isinstance(seen, (tuple, list))
        made = []
        for i, x in enumerate(seen if several else [seen]):
            call = Call(function, (self, *args), kwargs, i if several else None)
            rows = replace(self._rows, x=x)
            viewed = RowLogits(rows, self._row, self.dtype, attached, self._told, call)
            made.append(viewed.connected())
        return tuple(made) if several else made[0]

    def row_answer(self, of: Callable[..., Any], aligned: Sequence[torch.Tensor] = ()) -> Any:
        """``of(values, *aligned)``, tensors of a few numbers a row, computed chunk by chunk."""
        self._check()
        row = self._row

        def answer(z: torch.Tensor, *beside: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return of(row.on(z), *beside)  # type: ignore[no-any-return]

        return by_chunks(self._rows, answer, self._attached, aligned)

    @classmethod
    def _answered(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, RowLogits)]
        if any(t.materialized for t in found):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            answer = row_calls.answered(found, func, args, kwargs)
        if isinstance(answer, row_calls.Refused):
            found[0]._told(f"the logits were computed as a whole: {answer.reason}")
            return NotImplemented
        return answer


def _whole(post: Any, row: Row, x: Any, weight: Any, bias: Any) -> torch.Tensor:
    return row.on(post(F.linear(x, weight, bias)))


def _sizes(rows: Rows) -> tuple[int, ...]:
    return (*rows.x.shape[:-1], rows.weight.shape[0])


def logits(rows: Rows, told: Callable[[str], None]) -> LazyLogits:
    """The logits of a model's rows, as they are now."""
    parts = (rows.x, rows.weight, rows.bias)
    made_of = tuple((t, t._version) for t in parts if t is not None)
    return RowLogits(replace(rows, made_of=made_of), LOGITS, rows.dtype, True, told).connected()
