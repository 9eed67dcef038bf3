"""Compile kernels in other processes, where Python's lock is not the training's.

A third of what Triton does is Python. In threads that third stands between the host and every operation
that it calls: torch lets go of the lock around an operation, and gets it back when a compiling thread
has had its turn.

A server imports torch and the kernels once, beside what the caller does, and forks workers. None of them
sees a device. What they compile they leave in Triton's cache on disk. The caller's script is not imported
again, as it would be by ``multiprocessing``; a server with nothing to do for a while, or without its
caller, ends.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

log = logging.getLogger("fusewright")
_FOLDER = "TRITON_CACHE_DIR"
_PATIENCE = 60.0  # seconds
spent: list[tuple[str, float]] = []  # what a process compiled for this one, and its seconds


class Job(NamedTuple):
    """What to compile, in terms that another process understands, and Triton's cache folder."""

    module: str
    kernel: str
    source: tuple[Any, Any, Any]
    target: Any
    options: dict[str, Any]
    environment: Any
    folder: str


class Server:
    """The caller's side of a server: jobs go there, answers come back in any order."""

    def __init__(self, workers: int) -> None:
        self._ours, theirs = Pipe()
        self._answers: dict[int, Future[float]] = {}
        self._lock = threading.Lock()
        self._count = 0
        self.alive = True
        command = [sys.executable, "-c", _COMMAND, str(theirs.fileno()), str(workers)]
        # Without devices: a context of its own in each worker would take the training's memory.
        away = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **away},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        threading.Thread(target=self._read, name="fusewright-server", daemon=True).start()

    def submit(self, job: Job) -> Future[float]:
        """The seconds that the job took, some time."""
        answer: Future[float] = Future()
        with self._lock:
            if not self.alive:
                raise OSError("the server has ended")
            self._count += 1
            self._answers[self._count] = answer
            self._ours.send((self._count, job))
        return answer

    def _read(self) -> None:
        try:
            while True:
                number, seconds, error = self._ours.recv()
                answer = self._answers.pop(number)
                answer.set_exception(RuntimeError(error)) if error else answer.set_result(seconds)
        except (EOFError, OSError):
            with self._lock:
                self.alive = False
                left = list(self._answers.values())
                self._answers.clear()
                self._ours.close()
        for answer in left:
            answer.set_exception(RuntimeError("the server has ended"))
        self._process.wait()


_COMMAND = (
    "import sys; from fusewright.kernels import beside; beside.serve(*map(int, sys.argv[1:]))"
)
_server: Server | None = None


def server(workers: int) -> Server | None:
    """The process's server, started if there is none; None where there can be none."""
    global _server
    if workers < 1 or not hasattr(os, "fork"):
        return None
    if _server is None or not _server.alive:
        try:
            _server = Server(workers)
        except OSError:
            log.debug("no processes to compile in", exc_info=True)
            return None
    return _server


def serve(handle: int, workers: int) -> None:
    """What a server does; ``handle`` is its end of the pipe."""
    from triton.runtime.cache import triton_key

    from fusewright.kernels import catalogue

    catalogue()
    triton_key()  # a digest of all of Triton, which the workers inherit
    connection, lock = Connection(handle), threading.Lock()
    caller, open_jobs = os.getppid(), set[int]()

    def answer(number: int, done: Future[float]) -> None:
        error = done.exception()
        with lock:
            open_jobs.discard(number)
            connection.send((number, 0.0 if error else done.result(), error and repr(error)))

    fork = get_context("fork")
    with ProcessPoolExecutor(workers, fork, _enter, (os.getpid(), handle)) as pool:
        while connection.poll(_PATIENCE) or open_jobs:
            if os.getppid() != caller:
                break
            if connection.poll():
                try:
                    number, job = connection.recv()
                except EOFError:
                    break
                open_jobs.add(number)
                made = pool.submit(compile_here, job)
                made.add_done_callback(functools.partial(answer, number))
        pool.shutdown(wait=False, cancel_futures=True)


def _enter(server: int, handle: int) -> None:
    """What a worker does first: it must not outlive the server, nor keep its pipe open."""
    os.close(handle)

    def watch() -> None:
        while os.getppid() == server:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Elsewhere(Executor):
    """Runs Triton's compiling functions: in a process what one takes, and then what is left of it.

    Args:
        server: compiles.
        threads: for what follows on it, reading what it left among it.
        load: what to do with a kernel that has been read; must not raise.
    """

    def __init__(self, server: Server, threads: Executor, load: Callable[[Any], None]) -> None:
        self._server, self._threads, self._load = server, threads, load

    def submit(self, compiling: Callable[[], Any], /, *_: Any, **__: Any) -> Future[Any]:
        """The compiled kernel, some time."""
        job = described(compiling)
        under_way = None
        if job is not None:
            try:
                under_way = self._server.submit(job)
            except Exception:  # what is not to be pickled, or nobody there
                log.debug("no process takes %s", job, exc_info=True)

        def rest() -> Any:
            if job is not None and under_way is not None:
                try:
                    spent.append((job.kernel, under_way.result()))
                except Exception:  # of any kind: compiled in this thread then
                    log.debug("a process did not compile %s", job, exc_info=True)
            kernel = compiling()
            self._load(kernel)
            return kernel

        return self._threads.submit(rest)


def described(compiling: Callable[[], Any]) -> Job | None:
    """The job that Triton's function does; None where it is in the cache, or not understood."""
    try:
        from triton import knobs
        from triton.compiler import ASTSource

        known = inspect.getclosurevars(compiling).nonlocals
        source, target, environment = known["src"], known["target"], known["env_vars"]
        if type(source) is not ASTSource or _cached(source, known["options"], target, environment):
            return None
        function = source.fn.fn
        parts = source.signature, source.constants, source.attrs
        options = dict(known["options"].__dict__)
        place = function.__module__, function.__qualname__
        return Job(*place, parts, target, options, environment, knobs.cache.dir)
    except Exception:  # of any kind, since Triton's function is its own: a thread runs it
        log.debug("a kernel has no description for another process", exc_info=True)
        return None


def _cached(source: Any, options: Any, target: Any, environment: Any) -> bool:
    """Whether Triton's cache on disk has the kernel."""
    import hashlib

    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key, get_cache_manager

    key = get_cache_key(source, make_backend(target), options, env_vars=environment)
    folder = get_cache_manager(hashlib.sha256(key.encode("utf-8")).hexdigest())
    return bool(folder.get_group(f"{source.name[:150]}.json"))


def compile_here(job: Job) -> float:
    """Compile into the cache on disk; returns the seconds that it took. Runs in a worker."""
    import triton
    from triton.compiler import ASTSource

    started = time.perf_counter()
    function = getattr(importlib.import_module(job.module), job.kernel)
    os.environ[_FOLDER] = job.folder
    source = ASTSource(function, *job.source)
    triton.compile(source, target=job.target, options=job.options, _env_vars=job.environment)
    return time.perf_counter() - started
