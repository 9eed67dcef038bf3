"""Find out what a graph's ops will launch, before anything is launched.

The graph runs forward and backward on fake tensors, which have shapes, strides and dtypes and no memory.
Where it calls one of our ops, the op's host function runs too, on the same fake tensors, with its
launches left out and written down. So nobody has to know what a host function chooses of what it is
given: tiles, specialisations and the number of launches are its own.

What is found this way is an offer to compile early. A launch that was not foreseen compiles its kernel
when it comes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.kernels import catalogue
from fusewright.kernels.early import Kernel, Pointer, start
from fusewright.kernels.recording import Request, recorder

__all__ = ["Rehearsal", "hosts", "start"]

log = logging.getLogger("fusewright")
Hosts = dict[str, Callable[..., Any]]
_APART = 2**48  # between the addresses of two storages that have none


@functools.cache
def hosts() -> Hosts:
    """The host functions by the names of the operators that run them on a GPU."""
    found: Hosts = {}
    for spec in catalogue():
        if spec.triton is not None:
            inner = spec.name + "_forward" if spec.forward_needs else spec.name
            found[f"fusewright::{inner}"] = spec.triton[0]
            if spec.backward:
                found[f"fusewright::{spec.backward.split('(', 1)[0]}"] = spec.triton[1]
    return found


class Rehearsal:
    """Runs functions on stand-ins for tensors and keeps what their ops would launch.

    Args:
        functions: host functions by operator; those of a GPU by default.
    """

    def __init__(self, functions: Hosts | None = None) -> None:
        self.kernels: list[Kernel] = []
        self.failures: list[str] = []
        self._hosts = hosts() if functions is None else functions
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._mode.cache_enabled = True  # the same operations come again and again
        self._bases: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []

    def stand_in(self, real: torch.Tensor) -> torch.Tensor:
        """A fake leaf that is taken to lie where ``real`` does."""
        fake = self._mode.from_tensor(real.detach(), static_shapes=True)
        place = real.data_ptr() - int(real.storage_offset()) * real.element_size()
        self._bases[fake.untyped_storage()._cdata] = place
        self._kept.append(fake)
        return fake.requires_grad_(real.requires_grad)

    def copy(self, real: torch.Tensor) -> torch.Tensor:
        """A fake leaf that wants a gradient, as ``real.clone()`` would be."""
        with self._mode, torch.no_grad():
            return self.stand_in(real).clone().requires_grad_()

    def address(self, t: torch.Tensor) -> int:
        """Where the tensor lies, for stand-ins where theirs does, for others anywhere of their own."""
        if not isinstance(t, FakeTensor):
            return t.data_ptr()
        storage: int = t.untyped_storage()._cdata
        base = self._bases.get(storage, storage * _APART)
        return base + int(t.storage_offset()) * t.element_size()

    def run(self, function: Callable[..., Any], inputs: Sequence[Any]) -> None:
        """Run ``function`` and the backward of everything that it returns."""
        with self._mode, _Watch(self), torch.enable_grad():
            results = torch.utils._pytree.tree_leaves(function(*inputs))
            wanted = [v for v in inputs if isinstance(v, torch.Tensor) and v.requires_grad]
            given = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
            if wanted and given:
                torch.autograd.grad(
                    given, wanted, [torch.empty_like(r) for r in given], allow_unused=True
                )

    def call(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Results of an operator's host function, whose launches are noted; else NotImplemented.

        Not the operator's own fake results: how far their memory reaches is part of a host function's
        choices, and no fake function says it.
        """
        out, host = NotImplemented, self._hosts.get(name)
        if host is None:
            return out
        with self._rehearsing() as steps:
            try:
                out = host(*args, **kwargs)
            except Exception as error:
                # It read a value, or asked for something that fake tensors lack: compiled when it runs.
                self.failures.append(f"{name}: {type(error).__name__}: {error}")
                log.debug("rehearsal of %s", name, exc_info=True)
        self.kernels += [self._kernel(step) for step in steps if isinstance(step, Request)]
        return out

    def _kernel(self, request: Request) -> Kernel:
        pointers = [
            None if t is None else Pointer(t.dtype, self.address(t)) for t in request.tensors
        ]
        return Kernel(request.kernel, (*pointers, *request.rest), request.options)

    @contextmanager
    def _rehearsing(self) -> Any:
        steps: list[Any] = []
        recorder.steps, recorder.rehearsing = steps, True
        recorder.address, recorder.reinterpret = self.address, _reinterpret
        try:
            yield steps
        finally:
            for name in ("steps", "rehearsing", "address", "reinterpret"):
                delattr(recorder, name)


def _reinterpret(
    t: torch.Tensor, shape: Sequence[int], strides: Sequence[int], offset: int
) -> torch.Tensor:
    return t.as_strided(shape, strides, t.storage_offset() + offset)


class _Watch(TorchDispatchMode):
    """Shows the rehearsal every operator below autograd."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rehearsal = rehearsal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.rehearsal.call(func._schema.name, args, kwargs)
        return func(*args, **kwargs) if out is NotImplemented else out
