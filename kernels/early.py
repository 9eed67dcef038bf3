"""Compile kernels before they are launched, several at a time, while the host does something else.

Triton compiles where a kernel is launched first, one after the other: its passes, ptxas, and up to
Triton 3.6 a C compiler for the launcher of each signature. Other processes do the first two
(``fusewright.kernels.beside``) and threads the rest, or all of it where there are no processes. What is
compiled here lies in Triton's own cache of the kernel when the launch comes; a launch that finds nothing
there waits for what is under way, and then lets Triton compile as ever. So nothing depends on what is
foreseen, neither results nor errors.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from fusewright.kernels import beside
from fusewright.kernels.launch import HAS_TRITON

log = logging.getLogger("fusewright")
_MOST = 16  # threads: more are slowed by the part of a compilation that holds Python's lock
_under_way: list[Future[None]] = []
_started: set[tuple[Any, ...]] = set()


class Pointer:
    """What Triton asks of a tensor to specialise a kernel: its dtype and how it is aligned."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype = dtype
        self._address = address & 15

    def data_ptr(self) -> int:
        """An address that is aligned as the tensor's."""
        return self._address


class Kernel(NamedTuple):
    """A kernel to compile: what it is launched with, pointers for tensors, and compiler options."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        """What the compiled kernel follows from; Triton may tell apart less."""
        arguments = tuple(
            (a.dtype, a.data_ptr()) if isinstance(a, Pointer) else (type(a).__name__, a)
            for a in self.arguments
        )
        return (id(self.function), arguments, tuple(self.options.items()))


def prepare() -> None:
    """Start the processes that compile, so that they are there when the first kernel is foreseen."""
    if HAS_TRITON and torch.cuda.is_available():
        beside.server(_cores() - 1)


def start(kernels: Sequence[Kernel], device: torch.device) -> None:
    """Compile and load the kernels for ``device`` in the background, but for those started before."""
    keys = {(device, *kernel.key): kernel for kernel in kernels}
    distinct = [kernel for key, kernel in keys.items() if key not in _started]
    if not distinct:
        return
    _started.update(keys)
    done: Future[None] = Future()
    _under_way.append(done)

    def work() -> None:
        try:
            _compile(distinct, device)
        except Exception:  # of any kind: the launch will meet it again, and raise it
            log.debug("kernels were not compiled early", exc_info=True)
        finally:
            done.set_result(None)

    threading.Thread(target=work, name="fusewright-compile", daemon=True).start()


def under_way() -> bool:
    """Whether something is being compiled."""
    return bool(_under_way)


def wait() -> None:
    """Until everything that was started is there."""
    while _under_way:
        done = _under_way[-1]
        done.result()
        if done in _under_way:
            _under_way.remove(done)


def _compile(kernels: Sequence[Kernel], device: torch.device) -> None:
    """Compile these kernels side by side; returns when all are loaded."""

    def here() -> None:
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(device)  # each thread has its own current device

    here()
    server = beside.server(_cores() - 1)
    threads = len(kernels) if server else min(_cores(), len(kernels))  # they wait, or they compile
    with ThreadPoolExecutor(threads, "fusewright-kernel", here) as pool:
        made = []
        with _asynchronous(beside.Elsewhere(server, pool, _load) if server else pool):
            for kernel in kernels:
                # Under Triton's mode this specialises, here, and leaves compiling to the pool.
                try:
                    made.append(
                        kernel.function.warmup(*kernel.arguments, grid=(1, 1), **kernel.options)
                    )
                except Exception:  # of any kind: the launch meets it again
                    log.debug("%s was not compiled early", kernel.function, exc_info=True)
        list(pool.map(_load, made))


def _asynchronous(pool: Executor) -> Any:
    """Triton's mode that compiles in a pool; without one, the same one after the other."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        return nullcontext()
    return AsyncCompileMode(pool, ignore_errors=True)


def _load(made: Any) -> None:
    """Put a compiled kernel on the device, with its launcher."""
    try:
        kernel = made.result() if hasattr(made, "result") else made
        if torch.cuda.is_available():
            kernel.run  # noqa: B018  a property that loads
    except Exception:  # of any kind: the launch meets it again
        log.debug("a kernel was not loaded early", exc_info=True)


def _cores() -> int:
    """Threads that the machine has cores for, a container's share counted."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        count = min(count or 1, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no limit
        pass
    return min(_MOST, count or 1)
