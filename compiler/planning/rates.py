"""Rates of a GPU that nobody has described: measured once on it, and kept in a file.

Each rate is the median of calls on random numbers, after others that are not counted: numbers decide how
much power a product draws. What is measured is rounded to two digits, so that the plan does not
hang on the third, and is read from the file from then on: every later plan on the machine is made
of the same rates. The file may be edited, and given to ``fusewright.plan(device=...)`` anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fusewright.compiler.planning.devices import HOST_SHARE, Device, UnknownDevice, host_memory
from fusewright.kernels import device as hardware

log = logging.getLogger("fusewright")
_RATES = ("products", "attention", "attention_backward", "bandwidth", "launch", "host")
_HOPPER = 9  # the major compute capability from which on the library's workspace is larger
_WORKSPACES = (2 * 4096 * 1024 + 8 * 16 * 1024, 4096 * 8 * 1024)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is multiplied, attended to and copied, and for how long.

    Attributes:
        width: of the square matrices, rows and columns.
        heads, tokens, head: of one sequence's attention.
        copied: bytes of each copy.
        seconds: that a rate is measured for, and half as long before.
    """

    width: int = 8192
    heads: int = 32
    tokens: int = 4096
    head: int = 128
    copied: int = 256 * 2**20
    seconds: float = 0.15

    def smaller(self) -> Sizes:
        """A quarter of the memory."""
        return dataclasses.replace(
            self, width=self.width // 2, heads=max(1, self.heads // 4), copied=self.copied // 4
        )


def of(index: int = 0) -> Device:
    """The GPU's rates from its file, or measured now and written there.

    Raises:
        UnknownDevice: nothing can be measured on it; the message says why.
    """
    properties = torch.cuda.get_device_properties(index)
    path = folder() / f"{re.sub(r'[^a-z0-9]+', '-', properties.name.lower()).strip('-')}.json"
    found = None
    with contextlib.suppress(OSError):  # not there yet, or not to be read
        found = read(path)
    if found is None:
        log.info("measuring the rates of %s, once", properties.name)
        rates = measure(torch.device("cuda", index))
        found = _with(Device(properties.name, int(properties.total_memory), 1, 1, 1, 1), rates)
        write(found, path)
    return dataclasses.replace(
        found,
        memory=int(properties.total_memory),
        host_memory=int(HOST_SHARE * host_memory()),
        limits=hardware.limits(torch.device("cuda", index)),
        workspace=_WORKSPACES[properties.major >= _HOPPER],
    )


def folder() -> Path:
    """Where rates are kept: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fusewright" / "devices"


def write(device: Device, path: Path) -> None:
    """Keep the device's name, memory and rates; where the folder cannot be written they are measured
    again by the next process."""
    kept = {n: getattr(device, n) for n in ("name", "memory", *_RATES)}
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)  # whole or not at all, whoever else writes it now
    except OSError as error:
        log.warning(
            "%s is not written, and the rates are measured again next time: %s", path, error
        )


def read(path: Path) -> Device:
    """A description as :func:`write` leaves it: FLOP/s, bytes, bytes/s and seconds.

    Raises:
        FileNotFoundError: no such file.
        UnknownDevice: it is no description; the message names what is wrong.
    """
    text = path.read_text(encoding="utf-8")
    try:
        given = json.loads(text)
        name, memory = str(given.pop("name")), int(given.pop("memory"))
        rates = {key: float(given.pop(key)) for key in _RATES if key in given}
    except (ValueError, TypeError, AttributeError) as error:
        raise UnknownDevice(f"device: {path} is no description of a device: {error}") from error
    except KeyError as error:
        raise UnknownDevice(f"device: {path} has no {error}") from error
    missing = [k for k in ("products", "attention", "attention_backward", "bandwidth")
               if not rates.get(k, 0.0) > 0.0]  # fmt: skip
    if missing or memory <= 0:
        what = missing[0] if missing else "memory"
        raise UnknownDevice(f"device: {path} needs {what}, a number above zero")
    if given:
        known = ", ".join(("name", "memory", *_RATES))
        raise UnknownDevice(f"device: {path} has {next(iter(given))!r}; known are {known}")
    return _with(Device(name, memory, 1, 1, 1, 1), rates)


def _with(device: Device, rates: Mapping[str, Any]) -> Device:
    return dataclasses.replace(device, **rates)


def measure(where: torch.device, sizes: Sizes | None = None) -> dict[str, float]:
    """The rates of a device, as attributes of ``Device``; takes some two seconds on a GPU.

    Raises:
        UnknownDevice: not even small matrices fit beside what is there.
    """
    asked = sizes or Sizes()
    for _ in range(4):
        try:
            with torch.random.fork_rng([where] if where.type == "cuda" else []):
                torch.manual_seed(0)
                return {k: _rounded(v) for k, v in _measured(where, asked).items()}
        except torch.OutOfMemoryError:
            asked = asked.smaller()
        finally:
            if where.type == "cuda":
                torch.cuda.empty_cache()
    raise UnknownDevice(f"device: {where} has no memory left to measure its rates in")


def _measured(where: torch.device, sizes: Sizes) -> dict[str, float]:
    dtype = torch.bfloat16
    if where.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = torch.float16

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=where, dtype=dtype)

    forward, backward = _attention(new, where, sizes)
    copies, host = _copies(where, sizes)
    tiny = torch.zeros(8, device=where)
    return {
        "products": _products(new, where, sizes),
        "attention": forward,
        "attention_backward": backward,
        "bandwidth": copies,
        "launch": _seconds(lambda: tiny.add_(1.0), where, sizes, 100),
        "host": host,
    }


def _products(new: Callable[..., torch.Tensor], where: torch.device, sizes: Sizes) -> float:
    a, b = new(sizes.width, sizes.width), new(sizes.width, sizes.width)
    out = torch.empty_like(a)
    return 2.0 * sizes.width**3 / _seconds(lambda: torch.mm(a, b, out=out), where, sizes)


def _attention(
    new: Callable[..., torch.Tensor], where: torch.device, sizes: Sizes
) -> tuple[float, float]:
    """FLOP/s of causal attention's forward, and of its backward."""
    shape = 1, sizes.heads, sizes.tokens, sizes.head
    flops = 2.0 * sizes.tokens**2 * sizes.head * sizes.heads  # both products, half of them masked
    q, k, v = (new(*shape).requires_grad_() for _ in range(3))
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    with torch.no_grad():
        forward = _seconds(lambda: attend(q, k, v), where, sizes)
    out, gradient = attend(q, k, v), new(*shape)
    again = functools.partial(torch.autograd.grad, out, (q, k, v), gradient, retain_graph=True)
    return flops / forward, 2.5 * flops / _seconds(again, where, sizes)


def _copies(where: torch.device, sizes: Sizes) -> tuple[float, float]:
    """Bytes/s read and written on the device; and to pinned memory or back, whichever is slower.

    The second is 0 where there is no such memory to be had.
    """
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=where).random_()
    target = torch.empty_like(source)
    on_device = 2.0 * sizes.copied / _seconds(lambda: target.copy_(source), where, sizes)
    if where.type != "cuda":
        return on_device, 0.0
    try:
        pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    except RuntimeError:  # of the driver: locked memory is limited
        return on_device, 0.0
    away = _seconds(lambda: pinned.copy_(source, non_blocking=True), where, sizes)
    back = _seconds(lambda: source.copy_(pinned, non_blocking=True), where, sizes)
    return on_device, sizes.copied / max(away, back)


def _seconds(
    call: Callable[[], object], where: torch.device, sizes: Sizes, at_once: int = 4
) -> float:
    """The median of a call's seconds, of so many calls at once; the first third is not counted."""

    def run() -> float:
        started = time.perf_counter()
        for _ in range(at_once):
            call()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return (time.perf_counter() - started) / at_once

    run()
    taken, began = [run()], time.perf_counter()
    while time.perf_counter() - began < 1.5 * sizes.seconds:
        taken.append(run())
    counted = sorted(taken[len(taken) // 3 :])
    return counted[len(counted) // 2]


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")
