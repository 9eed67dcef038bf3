"""See what a host function does with its tensors: allocations, operations, and what is strange.

Operations that may be repeated are listed by name: their results depend on their operands alone, and
no value of a tensor is read back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_BUFFERS = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
_VIEWS = frozenset(  # and what asks about dtypes
    {
        aten.promote_types.default,
        aten.alias.default,
        aten.as_strided.default,
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.squeeze.dim,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten.view.dtype,
        aten._unsafe_view.default,
    }
)
_OPERATIONS = frozenset(
    {
        aten._to_copy.default,
        aten.add.Tensor,
        aten.add_.Tensor,
        aten.addmm.default,
        aten.addmm_.default,
        aten.cat.default,
        aten.clone.default,
        aten.copy_.default,
        aten.fill_.Scalar,
        aten.mm.default,
        aten.mm.dtype,
        aten.mm.out,
        aten.mul.Tensor,
        aten.new_zeros.default,
        aten.sub.Tensor,
        aten.sum.dim_IntList,
        aten.zero_.default,
    }
)


_KNOWN = _BUFFERS | _VIEWS | _OPERATIONS


class Operation(NamedTuple):
    """An operation and its result."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class Buffer(NamedTuple):
    """An allocation."""

    tensor: torch.Tensor


class Watch(TorchDispatchMode):
    """Writes down what a host function does; ``strange`` is the first thing that is not understood."""

    def __init__(self, steps: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps = steps
        self.strange: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _KNOWN and func._can_decompose():
            # Below autograd the dispatcher shows what an operation is called, not what it consists of.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in _BUFFERS:
            self.steps.append(Buffer(out))
        elif func in _OPERATIONS:
            self.steps.append(Operation(func, args, kwargs, out))
        elif func not in _VIEWS:
            self.strange = self.strange or str(func)
        return out
