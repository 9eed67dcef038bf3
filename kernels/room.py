"""Weights with room around them: the buffers of the augmented GEMM of ``lora``.

The frozen weights W_j (N_j, K) of linear layers that read one input lie below each other in one buffer

    [ W_0 | . ]
    [ W_1 | . ]      of shape (sum N_j + rows, K + columns)
    [  .  | . ]

and each layer's ``weight`` is a view of its part. What lies behind the rows and below them belongs to
nobody but the kernels, which write the adapters there. The room starts as zeros.

A tensor's strides do not tell whose the bytes behind its rows are, so buffers are remembered here by
the weights' addresses, as long as the memory lives. Each weight has a storage object of its own on
that memory: to whoever saves a model, weights that lie side by side share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import dlpack

from fusewright.kernels import recording
from fusewright.kernels.recording import recorder

_UNIT = 16  # columns and rows of room come in multiples, so that every row starts aligned


class Room(NamedTuple):
    """Columns behind each weight's rows, and rows below the last weight."""

    columns: int
    rows: int


class _Entry:
    """What is known of one buffer: its shape, and how the adapters in it are laid out now."""

    def __init__(self, buffer: torch.Tensor, height: int, width: int, room: Room) -> None:
        self.weak = StorageWeakRef(buffer.untyped_storage())
        self.address = recorder.address(buffer)
        self.height, self.width, self.room = height, width, room
        self.layout: Any = None

    def whole(self, like: torch.Tensor) -> torch.Tensor:
        """All of the buffer, (height + rows, width + columns), of the dtype of ``like``."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)
        step = self.width + self.room.columns
        with torch.no_grad():
            out = torch.empty(0, dtype=like.dtype, device=like.device)
            return out.set_(storage, 0, (self.height + self.room.rows, step), (step, 1))

    def part_of(self, weight: torch.Tensor) -> torch.Tensor:
        """The same of the buffer's first weight, which is a stand-in for a rehearsal."""
        step = self.width + self.room.columns
        return recorder.reinterpret(weight, (self.height + self.room.rows, step), (step, 1), 0)

    def takes(self, layout: Any) -> bool:
        """Whether the room is laid out so; empty room is, from now on."""
        if self.layout is None:
            self.layout = layout
        return bool(self.layout == layout)

    @property
    def geometry(self) -> tuple[int, int, Room]:
        """What a buffer's strides and places follow from."""
        return self.height, self.width, self.room


_KNOWN: dict[int, _Entry] = {}  # by the address of a weight


class Roomy(NamedTuple):
    """A buffer as it is found from its weights.

    Attributes:
        buffer: (sum N_j + rows, K + columns).
        height: sum N_j.
        width: K.
        first: its first weight.
    """

    buffer: torch.Tensor
    height: int
    width: int
    entry: _Entry
    first: torch.Tensor

    @property
    def columns(self) -> int:
        """Columns of room."""
        return self.entry.room.columns

    @property
    def rows(self) -> int:
        """Rows of room."""
        return self.entry.room.rows

    def prepare(self, layout: Any) -> None:
        """Empty the room if it holds adapters that were laid out in another way."""
        if recorder.rehearsing:
            return
        if not self.entry.takes(layout):
            self.buffer[:, self.width :].zero_()
            self.buffer[self.height :].zero_()
            self.entry.layout = layout
        recording.condition((self.first,), lambda w: _KNOWN[w.data_ptr()].takes(layout))


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the augmented product pays there: the reference has no use for it.

    Nor has float32: its products are long beside the pass that adds an adapter to a result, and a
    library that cuts the sum of K terms in parts may take K and the adapters' columns in one. Shapes
    alone (the meta device) are taken for a GPU's.
    """
    return device.type in ("cuda", "meta") and dtype is not torch.float32


def needed(columns: int, rows: int) -> Room:
    """The room that these many columns and rows ask for."""
    return Room(-(-columns // _UNIT) * _UNIT, -(-rows // _UNIT) * _UNIT)


def added(weights: Sequence[torch.Tensor], room: Room) -> int:
    """Bytes that a buffer of these weights has beside them."""
    height, width = sum(w.shape[0] for w in weights), weights[0].shape[1]
    around = (height + room.rows) * (width + room.columns) - height * width
    return around * weights[0].element_size()


def allocate(weights: Sequence[torch.Tensor], room: Room) -> list[torch.Tensor]:
    """Copies of the weights in one new buffer, as views of it.

    Args:
        weights: (N_j, K) each, of one dtype and device.
        room: see :func:`needed`.

    Raises:
        ValueError: the weights do not fit below each other.
    """
    first = weights[0]
    if any(
        w.dim() != 2
        or w.shape[1] != first.shape[1]
        or w.dtype != first.dtype
        or w.device != first.device
        for w in weights
    ):
        raise ValueError("weights: expected matrices of one width, dtype and device")
    height, width = sum(w.shape[0] for w in weights), first.shape[1]
    buffer = torch.zeros(
        (height + room.rows, width + room.columns), dtype=first.dtype, device=first.device
    )
    _forget()
    entry = _Entry(buffer, height, width, room)
    views, start = [], 0
    for w in weights:
        view = buffer[start : start + w.shape[0], :width]
        view.copy_(w)
        start += w.shape[0]
        views.append(dlpack.from_dlpack(view))
        _KNOWN[view.data_ptr()] = entry
    return views


@contextmanager
def scratch(
    heights: Sequence[int], width: int, room: Room, like: torch.Tensor, written: bool = False
) -> Iterator[list[torch.Tensor]]:
    """Uninitialised weights (N_j, K) in one new buffer that ``find`` knows inside of the block.

    Args:
        heights: N_j.
        width: K.
        room: see :func:`needed`; it is zeros.
        like: of the dtype and the device.
        written: it is not, since all of it will be written before it is read.
    """
    height = sum(heights)
    buffer = like.new_empty((height + room.rows, width + room.columns))
    if not written:
        buffer[:height, width:].zero_()
        buffer[height:].zero_()
    entry = _Entry(buffer, height, width, room)
    views = [piece[:, :width] for piece in buffer[:height].split(list(heights))]
    addresses = [recorder.address(v) for v in views]
    _KNOWN.update(dict.fromkeys(addresses, entry))
    try:
        yield views
    finally:
        for address in addresses:
            del _KNOWN[address]


def _forget() -> None:
    for key in [k for k, entry in _KNOWN.items() if entry.weak.expired()]:
        del _KNOWN[key]


def find(weights: Sequence[torch.Tensor], columns: int, rows: int) -> Roomy | None:
    """The buffer that these weights fill, if it has this much room; None otherwise.

    Args:
        weights: (N_j, K) each, in the order in which they must lie.
        columns, rows: what is to be written behind and below.
    """
    entry = _filled(weights, columns, rows)
    if entry is None:
        recording.condition(weights, lambda *given: _filled(given, columns, rows) is None)
        return None
    geometry = entry.geometry

    def same(*given: torch.Tensor) -> bool:
        found = _filled(given, columns, rows)
        return found is not None and found.geometry == geometry

    recording.condition(weights, same)
    if recorder.rehearsing:
        buffer = entry.part_of(weights[0])
    else:
        with torch._C._DisableTorchDispatch():
            buffer = entry.whole(weights[0])
    recording.alias(buffer, weights[0])
    return Roomy(buffer, entry.height, entry.width, entry, weights[0])


def _filled(weights: Sequence[torch.Tensor], columns: int, rows: int) -> _Entry | None:
    """What is known of the buffer that these weights fill; see ``find``."""
    first = weights[0]
    address_of = recorder.address
    address = address_of(first)
    entry = _KNOWN.get(address)
    if entry is None or columns > entry.room.columns or rows > entry.room.rows:
        return None
    step, start = entry.width + entry.room.columns, 0
    row = step * first.element_size()
    for w in weights:
        there = address_of(w) == address + start * row
        if not there or w.shape[1] != entry.width or w.stride() != (step, 1):
            return None
        start += w.shape[0]
    if start != entry.height or address != entry.address or entry.weak.expired():
        return None
    return entry


def owned(weight: torch.Tensor) -> bool:
    """Whether ``weight`` is a view of a buffer made here."""
    entry = _KNOWN.get(weight.data_ptr())
    return entry is not None and not entry.weak.expired()


def empty_roomy(
    shape: Sequence[int], room: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A new tensor of ``shape`` whose last dimension has ``room`` more elements behind it."""
    if not room:
        return torch.empty(shape, dtype=dtype, device=device)
    *lead, width = shape
    whole = torch.empty((*lead, width + room), dtype=dtype, device=device)
    return part(whole, 0, shape, whole.stride())


def part(
    of: torch.Tensor, offset: Any, shape: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    """A tensor on the storage of ``of``, at ``offset`` there, that autograd takes for no view."""
    return recorder.reinterpret(of, tuple(shape), tuple(strides), offset - of.storage_offset())


def columns_of(whole: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
    """A dense tensor's last dimension cut into pieces of these widths, which share its storage."""
    if len(widths) == 1:
        return [whole]
    pieces, start = [], 0
    for width in widths:
        shape = (*whole.shape[:-1], width)
        pieces.append(part(whole, whole.storage_offset() + start, shape, whole.stride()))
        start += width
    return pieces


def fake_roomy(
    like: torch.Tensor, shape: Sequence[int], room: int, dtype: torch.dtype
) -> torch.Tensor:
    """The shape and strides of :func:`empty_roomy`, for fake tensors."""
    strides, step = [1], shape[-1] + room
    for size in reversed(shape[1:-1]):
        strides.append(step)
        step = step * size
    if len(shape) > 1:
        strides.append(step)
    return like.new_empty_strided(tuple(shape), tuple(reversed(strides)), dtype=dtype)


def widened(rows: torch.Tensor, room: int) -> torch.Tensor | None:
    """``rows`` (T, K) with the room behind its rows, (T, K + room); None if there is none.

    Only for tensors whose maker left that room; see ``empty_roomy``.
    """
    count, width = rows.shape
    step = rows.stride(0)
    if rows.stride(1) != 1 or step < width + room or count == 0:
        return None
    extent = (count - 1) * step + width + room
    if not _reaches(rows, extent):
        return None
    recording.condition((rows,), lambda t: _reaches(t, extent))
    return recorder.reinterpret(rows, (count, width + room), (step, 1), 0)


def _reaches(t: torch.Tensor, extent: int) -> bool:
    """Whether so many elements from the tensor's first on are of its storage."""
    size: int = t.untyped_storage().nbytes()
    return (t.storage_offset() + extent) * t.element_size() <= size
