"""Small strided copies that ride along with another launch, described by a table on the device.

A row of the table (int64): first program, source address, elements from the first target to this one,
elements, elements of the inner dimension, source strides (outer, inner), target strides (outer, inner),
step. Addresses of parameters stay as they are from step to step, so the table is made once; where the
targets lie is an argument of the launch, since a scratch buffer lies elsewhere each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fusewright.kernels import recording
from fusewright.kernels.launch import HAS_TRITON, on_device_of, tl
from fusewright.kernels.launcher import Launcher
from fusewright.kernels.thin_parts import small_copies

BLOCK, AT_ONCE = 8192, 2048  # elements that one program copies, and how many at a time
_COLUMNS = 10
_MOST = 4096  # tables kept
_NEVER = 2**62
_small_copies = Launcher(small_copies)
_tables: dict[tuple[Any, ...], torch.Tensor] = {}


class Copy(NamedTuple):
    """Write ``source`` into ``target``; both (n, m) with any strides, so a transpose is a view.

    With a ``step`` (in elements of the target's storage) a float32 source is written as two
    halves of the target's dtype, hi = round(source) and lo = round(source - hi): hi to the target,
    hi once more ``step`` behind it, and lo ``2 step`` behind it. That is the partner of a product
    which ``thin`` wrote as [hi | lo | hi].
    """

    source: torch.Tensor
    target: torch.Tensor
    step: int = 0


class Work(NamedTuple):
    """A table, the first target and the constants that a kernel needs; no programs, no work."""

    table: torch.Tensor | None
    first: torch.Tensor | None
    programs: int
    constants: tuple[Any, ...]


NONE = Work(None, None, 0, (0, 0, 0, BLOCK, AT_ONCE))


def check(copies: Sequence[Copy], device: torch.device) -> None:
    """Refuse copies between shapes, devices or dtypes that do not fit."""
    for source, target, step in copies:
        if source.shape != target.shape or source.dim() != 2:
            raise ValueError(
                f"copies: expected two equal shapes (n, m), got {tuple(source.shape)} "
                f"and {tuple(target.shape)}"
            )
        if source.device != device or target.device != device:
            raise ValueError(f"copies: expected tensors on {device}")
        if step and source.dtype is not torch.float32:
            raise TypeError(f"copies: only float32 is split, got {source.dtype}")


def reference(copies: Sequence[Copy]) -> None:
    """The copies in plain PyTorch."""
    for source, target, step in copies:
        target.copy_(source)
        if step:
            where, strides = target.storage_offset(), target.stride()
            target.as_strided(target.shape, strides, where + step).copy_(target)
            rest = source - target.to(source.dtype)
            target.as_strided(target.shape, strides, where + 2 * step).copy_(rest)


def _layout(copy: Copy, before: int, first: torch.Tensor) -> tuple[int, ...]:
    """A row of the table but for the source's address; ``before`` programs belong to other rows.

    The inner dimension is the one along which the target is dense.
    """
    source, target, step = copy
    apart = int(target.storage_offset()) - int(first.storage_offset())
    outer, inner = (0, 1) if target.stride(1) <= target.stride(0) else (1, 0)
    return (
        before, apart, target.numel(), target.shape[inner], source.stride(outer),
        source.stride(inner), target.stride(outer), target.stride(inner), step,
    )  # fmt: skip


def _triton_type(dtype: torch.dtype) -> Any:
    return {
        torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32
    }[dtype]  # fmt: skip


def prepare(copies: Sequence[Copy]) -> list[Work]:
    """The work of the copies, one for each pair of dtypes and each storage of targets."""
    pairs: dict[tuple[Any, ...], list[Copy]] = {}
    for copy in copies:
        if copy.target.numel():
            of = copy.target.untyped_storage()._cdata
            pairs.setdefault((copy.source.dtype, copy.target.dtype, of), []).append(copy)
    works = []
    for (*dtypes, _), group in pairs.items():
        first = min((c.target for c in group), key=torch.Tensor.storage_offset)
        layouts, programs = [], 0
        for copy in group:
            layouts.append(_layout(copy, programs, first))
            programs += -(-copy.target.numel() // BLOCK)
        tasks = 1 << (len(layouts) - 1).bit_length()
        table = _table(group, tuple(layouts), tasks)
        constants = (tasks, *map(_triton_type, dtypes), BLOCK, AT_ONCE)
        works.append(Work(table, first, programs, constants))
    return works


def _table(group: Sequence[Copy], layouts: tuple[tuple[int, ...], ...], tasks: int) -> torch.Tensor:
    """The table of copies that are laid out alike, for the sources' addresses."""
    device = group[0].target.device
    sources = [copy.source for copy in group]

    def make(addresses: tuple[int, ...]) -> torch.Tensor:
        key = (device, tasks, layouts, addresses)
        table = _tables.get(key)
        if table is None:
            if len(_tables) >= _MOST:
                del _tables[next(iter(_tables))]
            pairs = zip(layouts, addresses, strict=True)
            rows = [(row[0], address, *row[1:]) for row, address in pairs]
            filler = (_NEVER,) + (0,) * (_COLUMNS - 1)
            values = [*rows, *[filler] * (tasks - len(rows))]
            with torch._C._DisableTorchDispatch():
                table = _tables[key] = torch.tensor(values, dtype=torch.int64).to(device)
        return table

    if recording.recorder.rehearsing:
        return torch.empty((tasks, _COLUMNS), dtype=torch.int64, device=device)
    table = make(tuple([t.data_ptr() for t in sources]))
    recording.table(table, sources, make)
    return table


def launch(works: Sequence[Work]) -> None:
    """The copies in launches of their own."""
    for table, first, programs, constants in works:
        assert table is not None, "prepared work has a table"
        with on_device_of(table):
            _small_copies((programs, 1), (table, first), (), constants, 8)


def run(copies: Sequence[Copy]) -> None:
    """The copies by a kernel where there is one for their dtypes, else in plain PyTorch."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    if HAS_TRITON and all(c.source.dtype in kinds and c.target.dtype in kinds for c in copies):
        launch(prepare(copies))
    else:
        reference(copies)
