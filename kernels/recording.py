"""What a host function tells to whoever records it, so that it can be repeated without being run.

A recording sees launches and operations by itself (``fusewright.runtime.recording``). What it
cannot see is said here: what else than shapes, strides, dtypes and constants the function looked at,
and which tensors it made out of addresses or found for the current stream. Outside of a recording
nothing here does anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One launch: the compiled kernel (None under the interpreter) and what it was given."""

    compiled: Any
    grid: tuple[int, int]
    tensors: tuple[torch.Tensor | None, ...]
    numbers: tuple[float, ...]
    constants: tuple[Any, ...]


class Request(NamedTuple):
    """A launch that a rehearsal left out: the kernel, what it is given and compiler options."""

    kernel: Any
    tensors: tuple[torch.Tensor | None, ...]
    rest: tuple[Any, ...]
    options: dict[str, Any]


class Condition(NamedTuple):
    """``check`` of these tensors was true, and must be true wherever the recording is repeated."""

    tensors: tuple[torch.Tensor, ...]
    check: Callable[..., bool]


class Table(NamedTuple):
    """``table`` is what ``make`` gives for the addresses of ``tensors``; it keeps what it made."""

    table: torch.Tensor
    tensors: tuple[torch.Tensor, ...]
    make: Callable[[tuple[int, ...]], torch.Tensor]


class Fetched(NamedTuple):
    """``tensor`` is what ``fetch`` gives at every call, with its address; the caller's state decides."""

    tensor: torch.Tensor
    fetch: Callable[[], tuple[torch.Tensor, int]]


class Alias(NamedTuple):
    """``tensor``, on a storage of its own, begins where ``other`` does and goes on in its memory."""

    tensor: torch.Tensor
    other: torch.Tensor


# (tensor, shape, strides, elements behind its beginning): a tensor on the same storage, which autograd
# takes for no view; bounds are not checked
reinterpret: Callable[..., torch.Tensor] = vars(torch._C._dynamo.guards)["_reinterpret_tensor"]


class _Recorder(threading.local):
    """Where this thread's steps are written down, if anywhere.

    In a rehearsal nothing is launched and tensors are stand-ins without memory; what host functions
    ask of a tensor's memory they ask here.
    """

    steps: list[Any] | None = None
    rehearsing = False
    address: Callable[[torch.Tensor], int] = staticmethod(torch.Tensor.data_ptr)
    reinterpret: Callable[..., torch.Tensor] = staticmethod(reinterpret)


recorder = _Recorder()


def condition(tensors: Sequence[torch.Tensor], check: Callable[..., bool]) -> None:
    """Note that the function relied on ``check(*tensors)``, of its arguments or views of them."""
    if recorder.steps is not None:
        recorder.steps.append(Condition(tuple(tensors), check))


def alias(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Note that a tensor is other memory's, see ``Alias``."""
    if recorder.steps is not None:
        recorder.steps.append(Alias(tensor, other))


def table(
    made: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    make: Callable[[tuple[int, ...]], torch.Tensor],
) -> None:
    """Note that ``made`` depends on the addresses of these tensors alone."""
    if recorder.steps is not None:
        recorder.steps.append(Table(made, tuple(tensors), make))


def fetched(tensor: torch.Tensor, fetch: Callable[[], tuple[torch.Tensor, int]]) -> None:
    """Note that ``tensor`` is to be asked for at every repetition."""
    if recorder.steps is not None:
        recorder.steps.append(Fetched(tensor, fetch))
