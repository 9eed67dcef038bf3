"""What a block saves for its backward, in the host's memory until the backward comes near.

Packing copies the saved values to pinned host memory on a stream of its own, so that the copy runs
beside the next block's forward; when a block's backward begins, what the block before it saved is on
its way back. At any time the values of two blocks are on the device. Nothing is computed from a copy
but what would be computed from the original: results are the same bits.

Values are moved by their memory, not by their shape: two views of one buffer are one copy, and strides
and room behind rows come back as they were. Parameters, what all blocks share and small values stay.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fusewright.runtime.packed import states

LEAST = 2**20  # bytes: less is not worth a copy
_SPREAD = 8  # a view is moved with its buffer if that is at most so many times larger


class _Lane:
    """Copies beside the computation: a stream of its own on a GPU, in order elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Copy once the current stream has come to here; an event for when it is done."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, done: Any) -> None:
        """Let what the current stream does next come after the copy; the host does not wait."""
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)


def pieces(size: int, least: int = LEAST) -> list[int]:
    """Powers of two that come to ``size``, the largest first; what is under ``least`` is the last.

    The allocator of pinned memory rounds every request up to a power of two: of one piece of 2.6 GiB
    it would take 4.
    """
    found = []
    while size > least:
        found.append(1 << (size.bit_length() - 1))
        size -= found[-1]
    return [*found, size] if size else found


class _Parcel:
    """One buffer, flat, in the host's memory, and on the device while it is on its way."""

    def __init__(self, lane: _Lane, buffer: torch.Tensor) -> None:
        self.lane = lane
        self.device = buffer.device
        pinned = buffer.device.type == "cuda"
        self.sizes = pieces(buffer.numel())
        self.host = [
            torch.empty(size, dtype=buffer.dtype, pin_memory=pinned) for size in self.sizes
        ]
        for there, here in zip(self.host, buffer.split(self.sizes), strict=True):
            self.done = lane.copy(there, here)
        self.source: torch.Tensor | None = buffer  # its memory must not serve another while copied
        self.here: torch.Tensor | None = None
        self.arrived: Any = None

    def release(self) -> None:
        """Give the original's memory back, for what runs after the copy."""
        if self.source is not None:
            self.lane.wait(self.done)
            self.source = None

    def fetch(self) -> None:
        """Begin to bring it back, if it has gone."""
        if self.here is None and self.source is None:
            dtype = self.host[0].dtype
            self.here = torch.empty(sum(self.sizes), dtype=dtype, device=self.device)
            for here, there in zip(self.here.split(self.sizes), self.host, strict=True):
                self.arrived = self.lane.copy(here, there)

    def take(self) -> torch.Tensor:
        """The buffer, for whatever the current stream does next."""
        self.fetch()
        if self.here is None:
            assert self.source is not None
            return self.source
        self.lane.wait(self.arrived)
        return self.here


class _View:
    """A saved tensor as a view of a parcel."""

    def __init__(self, group: _Group, parcel: _Parcel, t: torch.Tensor) -> None:
        self.group, self.parcel = group, parcel
        self.like = t.dtype, t.size(), t.stride(), t.storage_offset()

    def real(self) -> torch.Tensor:
        dtype, size, stride, offset = self.like
        buffer = self.parcel.take()
        before = self.group.before()
        if before is not None:
            before.fetch()
        empty = torch.empty(0, dtype=dtype, device=buffer.device)
        return empty.set_(buffer.untyped_storage(), offset, size, stride)


class _Group:
    """What one block saved in one forward, alive as long as its backward may need it.

    ``before()`` is that of the block before it, or None.
    """

    def __init__(self, place: int, before: Callable[[], _Group | None]) -> None:
        self.place, self.before = place, before
        self.parcels: dict[int, _Parcel] = {}  # by the address of the memory

    def fetch(self) -> None:
        for parcel in self.parcels.values():
            parcel.fetch()

    def release(self) -> None:
        for parcel in self.parcels.values():
            parcel.release()


class Offload:
    """Moves what some blocks of one model save.

    Args:
        places: path of a block that is moved -> its place in the order of the forward.
    """

    def __init__(self, places: dict[str, int]) -> None:
        self.places = places
        self._lanes: dict[torch.device, _Lane] = {}
        self._last: Callable[[], _Group | None] = _nothing
        self._lock = threading.Lock()

    @contextmanager
    def of(self, path: str, module: nn.Module, given: Any) -> Iterator[None]:
        """The context of one block's forward.

        Args:
            path: of the block.
            module: the block; its parameters stay.
            given: its arguments; those after the first tensor are what blocks share, and stay.
        """
        last = self._last()
        if path not in self.places:
            yield
            if last is not None:
                last.release()
            return
        place = self.places[path]
        follows = last is not None and last.place < place
        group = _Group(place, self._last if follows else _nothing)
        stays = _addresses(_resting(module)) | _addresses(_shared(given))

        def pack(t: torch.Tensor) -> Any:
            if type(t) is not torch.Tensor:
                return t
            storage = t.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            little = t.numel() * t.element_size() < LEAST
            if little or address in stays or size > _SPREAD * t.numel() * t.element_size():
                return t
            parcel = group.parcels.get(address)
            if parcel is None:
                flat = torch.empty(0, dtype=torch.uint8, device=t.device)
                parcel = _Parcel(self._lane(t.device), flat.set_(storage, 0, (size,), (1,)))
                group.parcels[address] = parcel
            return _View(group, parcel, t)

        def unpack(packed: Any) -> torch.Tensor:
            if not isinstance(packed, _View):
                return packed  # type: ignore[no-any-return]
            with self._lock:
                return packed.real()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        if last is not None:
            last.release()
        self._last = weakref.ref(group)

    def _lane(self, device: torch.device) -> _Lane:
        if device not in self._lanes:
            self._lanes[device] = _Lane(device)
        return self._lanes[device]


def _nothing() -> None:
    """The group before the first."""


def _addresses(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def _resting(module: nn.Module) -> Iterator[torch.Tensor]:
    """What is on the device between steps: parameters, what packed ones have beside them, buffers."""
    for p in module.parameters():
        yield p
        yield from states(p)
    yield from module.buffers()


def _shared(given: Any) -> list[torch.Tensor]:
    """All tensors of the arguments but the first: masks, rotations, positions."""
    return [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)][1:]
