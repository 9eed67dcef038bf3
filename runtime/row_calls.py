"""Which calls on row logits are answered without them, each with its condition.

Views of the tokens, functions of each row, and numbers of each row; all else is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from fusewright.runtime.row_logits import RowLogits

    Handler = Callable[..., Any]

_MOST = 8  # a row is answered by at most one in so many of its entries


@dataclass(frozen=True)
class Refused:
    """Why the logits are needed as a whole."""

    reason: str


def answered(found: list[RowLogits], func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """What ``func(*args, **kwargs)`` gives, or :class:`Refused`.

    Args:
        found: the row logits among the arguments.
        func: a function or method of torch, as ``__torch_function__`` gets it.
        args, kwargs: its arguments.
    """
    first = found[0]
    name = getattr(func, "__name__", str(func))
    handler = _HANDLERS.get(func)
    if handler is None:
        return Refused(f"{name} reads all of them")
    if torch.is_autocast_enabled(first.device.type):
        return Refused(f"{name} under autocast may cast them")
    if args[:1] != (first,) and args[0] is not first:
        return Refused(f"{name} has them as an argument")
    if any(t._rows is not first._rows or t._attached != first._attached for t in found):
        return Refused(f"{name} joins values of different rows")
    try:
        answer = handler(first, *args[1:], **kwargs)
    except TypeError:
        answer = None  # a form of the call that no handler has parameters for
    return Refused(f"this form of {name} is not one of rows") if answer is None else answer


def _both(*names: str) -> list[Any]:
    """The functions and methods of torch that have these names."""
    homes = (torch, torch.Tensor, F)
    return [getattr(home, name) for name in names for home in homes if hasattr(home, name)]


def _tokens(t: RowLogits, dim: Any) -> bool:
    """Whether ``dim`` is a dimension of the tokens."""
    rank = t.dim()
    return type(dim) is int and -rank <= dim < rank and dim % rank != rank - 1


def _classes(t: RowLogits, dim: Any) -> bool:
    """Whether ``dim``, or the one in it, is the dimension of the classes."""
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return type(dim) is int and dim in (-1, t.dim() - 1)


def _index(t: RowLogits, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(p, list) for p in parts):
        return None
    taken = 0
    for part in parts:
        mask = isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)
        taken += part.dim() if mask else 0 if part is None or part is Ellipsis else 1
    last = parts[-1] if parts else Ellipsis
    reached = taken >= t.dim() or any(p is Ellipsis for p in parts[:-1])
    whole = isinstance(last, slice) and last == slice(None)
    if reached and not whole:
        return None
    return t.row_view(torch.Tensor.__getitem__, (index,), {}, (index,))


def _sized(function: Any) -> Handler:
    def handler(t: RowLogits, *shape: Any) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if sizes[-1] != t.shape[-1]:
            return None
        width = t._rows.x.shape[-1]
        return t.row_view(function, (sizes,), {}, ((*sizes[:-1], width),))

    return handler


def _flatten(t: RowLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not (_tokens(t, start_dim) and _tokens(t, end_dim)):
        return None
    return t.row_view(torch.flatten, (start_dim, end_dim), {}, (start_dim, end_dim))


def _along(function: Any, default: int | None = 0, first: bool = False) -> Handler:
    """A view along one dimension, which is the first argument or, with a default, the last."""

    def with_first(t: RowLogits, dim: Any, *rest: Any) -> Any:
        args = (dim, *rest)
        return t.row_view(function, args, {}, args) if _tokens(t, dim) else None

    def with_last(t: RowLogits, how: Any, dim: Any = default) -> Any:
        return t.row_view(function, (how, dim), {}, (how, dim)) if _tokens(t, dim) else None

    return with_first if first else with_last


def _unbind(t: RowLogits, dim: int = 0) -> Any:
    return t.row_view(torch.unbind, (dim,), {}, (dim,)) if _tokens(t, dim) else None


def _unsqueeze(t: RowLogits, dim: int) -> Any:
    if dim in (-1, t.dim()):
        return None
    return t.row_view(torch.unsqueeze, (dim,), {}, (dim,))


def _same(t: RowLogits) -> Any:
    return t


def _softmax(function: Any) -> Handler:
    def handler(t: RowLogits, dim: Any, dtype: Any = None, _stacklevel: int = 3) -> Any:
        return t.row_function(function, (t, -1, dtype)) if _classes(t, dim) else None

    return handler


def _log_softmax(t: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.log_softmax(t, dim, dtype=dtype)


def _probabilities(t: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.softmax(t, dim, dtype=dtype)


def _by_entry(function: Any) -> Handler:
    """A function of each entry, and of the same entry of another value or a number."""

    def handler(t: RowLogits, *others: Any) -> Any:
        plain = (isinstance(o, (type(t), Real)) for o in others)
        return t.row_function(function, (t, *others)) if all(plain) else None

    return handler


def _number(function: Any) -> Handler:
    """One number a row."""

    def handler(t: RowLogits, dim: Any, keepdim: bool = False) -> Any:
        if not _classes(t, dim):
            return None
        return t.row_answer(lambda rows: (function(rows, -1, keepdim),))[0]

    return handler


def _all_of_them(function: Any) -> Handler:
    """Of each row, or of everything: then in float32, and rounded once, as torch does."""
    by_row = _number(function)

    def total(rows: torch.Tensor) -> tuple[torch.Tensor]:
        return (rows.sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32)),)

    def handler(t: RowLogits, dim: Any = None, keepdim: bool = False) -> Any:
        if dim is not None:
            return by_row(t, dim, keepdim)
        found = t.row_answer(total)[0].sum()
        return (found if function is torch.sum else found / t.numel()).to(t.dtype)

    return handler


def _largest(t: RowLogits, dim: Any, keepdim: bool = False) -> Any:
    if not _classes(t, dim):
        return None
    return torch.return_types.max(t.row_answer(lambda rows: torch.max(rows, -1, keepdim)))


def _topk(t: RowLogits, k: int, dim: Any = -1) -> Any:
    if not _classes(t, dim) or k * _MOST > t.shape[-1]:
        return None
    return torch.return_types.topk(t.row_answer(lambda rows: torch.topk(rows, k)))


def _gather(t: RowLogits, dim: Any, index: torch.Tensor) -> Any:
    few = index.dim() == t.dim() and index.shape[-1] * _MOST <= t.shape[-1]
    if not (_classes(t, dim) and few and index.shape[:-1] == t.shape[:-1]):
        return None
    return t.row_answer(lambda rows, taken: (rows.gather(-1, taken),), [index])[0]


def _along_index(t: RowLogits, indices: torch.Tensor, dim: Any) -> Any:
    return _gather(t, dim, indices)


def _loss(function: Any) -> Handler:
    """A loss of rows and one label each: the losses of the rows, then their sum or mean."""

    def handler(
        t: RowLogits,
        target: torch.Tensor,
        weight: Any = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        **more: Any,
    ) -> Any:
        plain = weight is None and size_average is None and reduce is None and t.dim() == 2
        if not plain or target.is_floating_point() or target.shape != t.shape[:1]:
            return None
        if t.dtype.itemsize < 4 and reduction != "none":
            return None  # each row's loss would be rounded before the sum
        (losses,) = t.row_answer(
            lambda rows, labels: (
                function(rows, labels, ignore_index=ignore_index, reduction="none", **more),
            ),
            [target],
        )
        if reduction == "none":
            return losses
        total = losses.sum()
        return total if reduction == "sum" else total / (target != ignore_index).sum()

    return handler


_UNARY = ("exp", "log", "neg", "square", "sqrt", "tanh", "sigmoid", "abs", "clamp")
_BINARY = ("add", "sub", "mul", "div", "true_divide", "pow")
_OPERATORS = ("add", "sub", "mul", "truediv", "pow")
_SIGNED = [*(f"__{n}__" for n in _OPERATORS), *(f"__r{n}__" for n in _OPERATORS), "__neg__"]

_HANDLERS: dict[Any, Handler] = {
    torch.Tensor.__getitem__: _index,
    torch.Tensor.view: _sized(torch.reshape),
    **dict.fromkeys(_both("reshape"), _sized(torch.reshape)),
    **dict.fromkeys(_both("flatten"), _flatten),
    **dict.fromkeys(_both("unbind"), _unbind),
    **dict.fromkeys(_both("split"), _along(torch.split)),
    **dict.fromkeys(_both("chunk"), _along(torch.chunk)),
    **dict.fromkeys(_both("narrow"), _along(torch.narrow, first=True)),
    **dict.fromkeys(_both("select"), _along(torch.select, first=True)),
    **dict.fromkeys(_both("index_select"), _along(torch.index_select, first=True)),
    **dict.fromkeys(_both("squeeze"), _along(torch.squeeze, first=True)),
    **dict.fromkeys(_both("unsqueeze"), _unsqueeze),
    torch.Tensor.contiguous: _same,
    **dict.fromkeys(_both("log_softmax"), _softmax(_log_softmax)),
    **dict.fromkeys(_both("softmax"), _softmax(_probabilities)),
    **{f: _by_entry(f) for f in _both(*_UNARY, *_BINARY, *_SIGNED)},
    **dict.fromkeys(_both("logsumexp"), _number(torch.logsumexp)),
    **dict.fromkeys(_both("sum"), _all_of_them(torch.sum)),
    **dict.fromkeys(_both("mean"), _all_of_them(torch.mean)),
    **dict.fromkeys(_both("amax"), _number(torch.amax)),
    **dict.fromkeys(_both("argmax"), _number(torch.argmax)),
    **dict.fromkeys(_both("max"), _largest),
    **dict.fromkeys(_both("topk"), _topk),
    **dict.fromkeys(_both("gather"), _gather),
    **dict.fromkeys(_both("take_along_dim"), _along_index),
    F.cross_entropy: _loss(F.cross_entropy),
    F.nll_loss: _loss(F.nll_loss),
}
