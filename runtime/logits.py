"""Logits that cost nothing until somebody reads them.

With a fused loss the logits are never made. ``outputs.logits`` is then a :class:`LazyLogits`: it
knows its shape, dtype and device, and becomes the real tensor at the first operation on it. Read
while gradients are on, it is computed from the live hidden states, so a custom loss on it trains
the model as it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from typing_extensions import Self

_METADATA = frozenset(
    {
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.Tensor.element_size,
        torch.Tensor.ndimension,
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
        *(
            getattr(torch.Tensor, name).__get__
            for name in (
                "shape",
                "dtype",
                "device",
                "ndim",
                "layout",
                "is_cuda",
                "is_cpu",
                "is_meta",
                "is_sparse",
                "is_quantized",
                "is_nested",
                "is_mps",
                "is_xpu",
                "names",
                "itemsize",
                "is_leaf",
                "grad",
            )
            if hasattr(torch.Tensor, name)
        ),
    }
)
_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_CASTS = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.double: torch.float64,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}


def _computed(
    compute: Callable[..., torch.Tensor], casts: Sequence[torch.dtype], leaves: Sequence[Any]
) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        made = compute(*leaves)
        for dtype in casts:
            made = made.to(dtype)
    return made


def _real(lazy: LazyLogits) -> torch.Tensor:
    return lazy.materialize()


class _Connected(torch.autograd.Function):
    """A lazy tensor as autograd's: whoever takes it past ``__torch_function__``, as another
    ``autograd.Function`` does, sends its gradient here."""

    @staticmethod
    def forward(ctx: Any, lazy: list[LazyLogits], *leaves: Any) -> torch.Tensor:
        tensors = [t if isinstance(t, torch.Tensor) else None for t in leaves]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(t, torch.Tensor) else t for t in leaves]
        ctx.compute, ctx.casts = lazy[0]._compute, lazy[0]._casts  # not the tensor: that is a cycle
        return lazy[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogits: torch.Tensor) -> Any:
        wanted = ctx.needs_input_grad[1:]
        leaves = [
            other if t is None else t.detach().requires_grad_(w)
            for t, other, w in zip(ctx.saved_tensors, ctx.others, wanted, strict=True)
        ]
        with torch.enable_grad():
            made = _computed(ctx.compute, ctx.casts, leaves)
        sources = [t for t, w in zip(leaves, wanted, strict=True) if w]
        grads = iter(torch.autograd.grad(made, sources, dlogits, allow_unused=True))
        return None, *(next(grads) if w else None for w in wanted)


class LazyLogits(torch.Tensor):
    """A tensor that is computed when it is first used.

    Args:
        compute: leaves -> the tensor.
        leaves: what it is computed from; kept as long as this object lives.
        sizes: the tensor's shape.
        dtype: the tensor's dtype.
        attached: whether the computed tensor takes part in autograd.
        casts: dtypes that what ``compute`` gives is cast to, one after the other.
    """

    @staticmethod
    def __new__(
        cls,
        compute: Callable[..., torch.Tensor],
        leaves: Sequence[Any],
        sizes: Sequence[int],
        dtype: torch.dtype,
        attached: bool = True,
        casts: tuple[torch.dtype, ...] = (),
    ) -> Self:
        device = next(t.device for t in leaves if isinstance(t, torch.Tensor))
        lazy: Self = torch.Tensor._make_wrapper_subclass(
            cls, tuple(sizes), dtype=dtype, device=device
        )
        return lazy

    def __init__(
        self,
        compute: Callable[..., torch.Tensor],
        leaves: Sequence[Any],
        sizes: Sequence[int],
        dtype: torch.dtype,
        attached: bool = True,
        casts: tuple[torch.dtype, ...] = (),
    ) -> None:
        self._compute = compute
        self._leaves = tuple(leaves)
        self._versions = [t._version for t in leaves if isinstance(t, torch.Tensor)]
        self._attached = attached
        self._casts = casts
        self._sizes = tuple(sizes)
        self._known: torch.Tensor | None = None

    def materialize(self) -> torch.Tensor:
        """The real tensor; computed once per gradient mode.

        Raises:
            RuntimeError: the weights were updated since the forward pass.
        """
        wants_grad = self._attached and torch.is_grad_enabled()
        if self._known is not None and (self._known.requires_grad or not wants_grad):
            return self._known if wants_grad else self._known.detach()
        self._check()
        leaves = self._leaves
        if not self._attached:
            leaves = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in leaves)
        self._known = _computed(self._compute, self._casts, leaves)
        return self._known

    def _unchanged(self) -> bool:
        now = [t._version for t in self._leaves if isinstance(t, torch.Tensor)]
        return now == self._versions

    def _check(self) -> None:
        if not self._unchanged():
            raise RuntimeError(
                "these logits were not computed in the forward pass, and the weights they are made "
                'of have changed since; read them before the optimizer step, or pass logits="eager" '
                "to fusewright.optimize"
            )

    def connected(self) -> LazyLogits:
        """This tensor with a history in autograd, if it is attached and gradients are recorded."""
        needed = any(isinstance(t, torch.Tensor) and t.requires_grad for t in self._leaves)
        if not (self._attached and needed and torch.is_grad_enabled()):
            return self
        lazy: LazyLogits = _Connected.apply([self], *self._leaves)  # type: ignore[no-untyped-call]
        return lazy

    def _derive(self, dtype: torch.dtype, attached: bool) -> LazyLogits:
        casts = self._casts if dtype == self.dtype else (*self._casts, dtype)
        made = LazyLogits(self._compute, self._leaves, self._sizes, dtype, attached, casts)
        return made.connected()

    @property
    def materialized(self) -> bool:
        """Whether the tensor has been computed."""
        return self.__dict__.get("_known") is not None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        lazy = args[0] if args and isinstance(args[0], LazyLogits) else None
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if lazy is not None and not lazy.materialized:
            if func == _REQUIRES_GRAD:
                return lazy._attached and any(
                    isinstance(t, torch.Tensor) and t.requires_grad for t in lazy._leaves
                )
            if func in _CASTS and not kwargs:
                return lazy._derive(_CASTS[func], lazy._attached)
            if func is torch.Tensor.detach:
                return lazy._derive(lazy.dtype, False)
            plain = func is torch.Tensor.to and len(args) == 2 and not kwargs
            if plain and isinstance(args[1], torch.dtype) and args[1].is_floating_point:
                return lazy._derive(args[1], lazy._attached)
        answer = cls._answered(func, args, kwargs)
        if answer is not NotImplemented:
            return answer
        args, kwargs = tree_map_only(LazyLogits, _real, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def _answered(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call gives without the tensor, or NotImplemented."""
        return NotImplemented

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Reached by callers that bypass __torch_function__ (C++ code, autograd's own calls).
        args, kwargs = tree_map_only(LazyLogits, _real, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.materialize().detach().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if not self.materialized:
            return f"LazyLogits(shape={tuple(self._sizes)}, dtype={self.dtype}, not computed)"
        return repr(self._known)
