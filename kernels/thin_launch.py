"""Launches of the thin products' kernels: operands in order, outputs, scratch, grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusewright.kernels import device, thin_copies
from fusewright.kernels.launch import on_device_of
from fusewright.kernels.launcher import Launcher
from fusewright.kernels.normed import Norm
from fusewright.kernels.recording import recorder
from fusewright.kernels.thin_copies import Copy, Work
from fusewright.kernels.thin_kernels import left_products, right_products
from fusewright.kernels.thin_parts import split_parts, sum_shares
from fusewright.kernels.thin_plan import (
    MOST_RANK,
    SINGLE_RANK,
    Cut,
    Fact,
    Pass,
    Result,
    Term,
    Wide,
    both_ranks,
    left_cut,
    padded,
    passes,
    right_cut,
)  # fmt: skip

_right, _left, _sums = Launcher(right_products), Launcher(left_products), Launcher(sum_shares)
_split = Launcher(split_parts)
Maybe = torch.Tensor | None
_SUMMED = 512  # numbers that one program of the sums makes
_SPLIT = 1024  # numbers that one program splits in three parts
_PLAIN, _PARTS, _SINGLE = 0, 1, 2  # the kernels' MODE


def rank(term: Term) -> int:
    """r of a term."""
    if term.right is not None:
        return term.right.shape[0 if term.right_transposed else 1]
    return 0 if term.left is None else term.left.shape[1]


def is_split(dtype: torch.dtype, wide: Wide) -> bool:
    """Whether a P of this dtype goes into the wide buffer as [hi | lo | hi]."""
    return wide.step > 0 and dtype is torch.float32 and wide.buffer.dtype is not dtype


def supported(where: torch.device) -> bool:
    """Whether the device has what the kernels need: tensor cores for bfloat16, or a CPU's patience."""
    return where.type != "cuda" or torch.cuda.get_device_capability(where) >= (8, 0)


def _mode(wide: torch.dtype, thin: torch.dtype) -> int:
    if wide == thin and wide is not torch.float32:
        return _PLAIN
    parts = wide is torch.bfloat16 and thin is torch.float32
    return _PARTS if parts else _SINGLE


def _fact(term: Term, wide: Wide | None) -> Fact:
    thin = term.left if term.right is None else term.right
    assert thin is not None, "a term has an operand"
    placed = wide is not None and term.column is not None and term.right is not None
    return Fact(
        term.block, rank(term), thin.dtype, term.right is not None, term.right_transposed,
        term.left is not None, term.left_transposed, placed,
    )  # fmt: skip


def run(
    blocks: Sequence[torch.Tensor], terms: Sequence[Term], wide: Wide | None, copies: Sequence[Copy],
    norm: Norm | None = None,
) -> list[Result]:  # fmt: skip
    """The products of every term; see ``thin.thin``, which has checked the operands."""
    works = thin_copies.prepare(copies)
    most = both_ranks(device.limits(blocks[0].device))
    facts = tuple(_fact(term, wide) for term in terms)
    single = any(_mode(blocks[0].dtype, fact.dtype) == _SINGLE for fact in facts)
    made = passes(facts, most, SINGLE_RANK if single else MOST_RANK)
    rights: list[Maybe] = [None] * len(terms)
    lefts: list[Maybe] = [None] * len(terms)
    columns = [] if wide is None else list(wide.columns)
    clear = wide is not None and wide.zero[1] > wide.zero[0]
    with on_device_of(blocks[0]):
        for one in made:
            work = works.pop() if works else thin_copies.NONE
            launch = Products(blocks, [terms[i] for i in one.terms], one, wide, columns, clear,
                              norm)  # fmt: skip
            launch.run(work)
            columns = launch.columns_left
            clear = clear and not launch.zero
            for at, p, part in zip(one.terms, launch.rights, launch.lefts, strict=True):
                rights[at] = p if one.right else rights[at]
                lefts[at] = part if one.left else lefts[at]
        thin_copies.launch(works)
        _leftover(blocks, wide, columns, clear)
    return [Result(p, part) for p, part in zip(rights, lefts, strict=True)]


def _leftover(
    blocks: Sequence[torch.Tensor], wide: Wide | None, columns: Sequence[int | None], clear: bool
) -> None:
    """Copies of matrices that no launch has read, and the zeros if no launch wrote P."""
    if wide is None:
        return
    for m, column in zip(blocks, columns, strict=True):
        if column is not None:
            wide.buffer[:, column : column + m.shape[1]].copy_(m)
    if clear:
        wide.buffer[:, wide.zero[0] : wide.zero[1]].zero_()


def _four(values: Sequence[Any], fill: Any) -> tuple[Any, ...]:
    return (*values, *[fill] * (4 - len(values)))


class Products:
    """One pass over one to four matrices: its operands in the kernels' order, its outputs."""

    def __init__(
        self, blocks: Sequence[torch.Tensor], terms: list[Term], one: Pass, wide: Wide | None,
        columns: Sequence[int | None], clear: bool, norm: Norm | None = None,
    ) -> None:  # fmt: skip
        self.terms, self.one, self.wide, self.norm = terms, one, wide, norm
        indices = list(dict.fromkeys(t.block for t in terms))
        self.ms = [blocks[i] for i in indices]
        self.slots = len(terms) // len(indices)
        self.rank = rank(terms[0])
        thin = terms[0].right if one.right else terms[0].left
        assert thin is not None, "the pass has what its terms want"
        self.dtype = torch.promote_types(self.ms[0].dtype, thin.dtype)
        self.mode = _mode(self.ms[0].dtype, thin.dtype)
        # Three parts of 16 bits are staged for a float32 operand.
        self.thin_item = 6 if self.mode == _PARTS else thin.element_size()
        self.copied = [columns[i] for i in indices] if wide is not None else []
        self.copies = any(c is not None for c in self.copied)
        self.columns_left = [None if i in indices else c for i, c in enumerate(columns)]
        self.placed = wide is not None and one.right and terms[0].column is not None
        self.zero = 1 << (wide.zero[1] - wide.zero[0] - 1).bit_length() \
            if clear and wide is not None and self.placed else 0  # fmt: skip
        self.split = self.placed and wide is not None and is_split(self.dtype, wide)
        split = self.mode == _PARTS
        vs = [_lined(t.right, t.right_transposed) for t in terms] if one.right else []
        us = [_lined(t.left, True) for t in terms] if one.left else []
        self.vs, self.v_apart = _parts_of(vs, self.ms[0].dtype) if split and vs else (vs, 0)
        self.us, self.u_apart = _parts_of(us, self.ms[0].dtype) if split and us else (us, 0)
        self.aligned = not any(recorder.address(t) % 16 for t in (*self.vs, *self.us))
        self.lefts = self._left_outputs()
        self.out, self.rights = self._right_outputs()

    def _left_outputs(self) -> list[Maybe]:
        if not self.one.left:
            return [None] * len(self.terms)
        out: list[Maybe] = []
        for at, term in enumerate(self.terms):
            width = self.ms[at if len(self.ms) > 1 else 0].shape[1]
            shape = (self.rank, width) if term.left_transposed else (width, self.rank)
            out.append(torch.empty(shape, dtype=self.dtype, device=self.ms[0].device))
        return out

    def _right_outputs(self) -> tuple[Maybe, list[Maybe]]:
        """(the dense buffer of all P or None where they lie in the wide one, P of every term)."""
        count, r = len(self.terms), self.rank
        if not self.one.right:
            return None, [None] * count
        wide = self.wide
        if self.placed and wide is not None and wide.buffer.dtype == self.dtype and not wide.dense:
            views = [wide.buffer[:, t.column : t.column + r] for t in self.terms]  # type: ignore[operator]
            return None, list(views)
        m = self.ms[0]
        out = torch.empty((m.shape[0], count * r), dtype=self.dtype, device=m.device)
        return out, [out[:, i * r : (i + 1) * r] for i in range(count)]

    def run(self, work: Work) -> None:
        """Launch the products with the small copies, then the sums if there are shares."""
        m, ranks = self.ms[0], padded(self.slots * self.rank)
        widths = tuple(t.shape[1] for t in self.ms)
        sizes = (m.shape[0], widths, ranks, m.element_size(), self.thin_item, self.mode)
        limits = device.limits(m.device)
        if self.one.left:
            cut = left_cut(*sizes, self.one.right, self.copies, limits)
            right = cut.slabs * m.shape[0] * ranks if self.one.right else 0
            scratch = m.new_empty(right + cut.parts * sum(widths) * ranks, dtype=torch.float32)
            shares = scratch[:right] if right else None
            self._launch_left(cut, work, shares, scratch[right:])
            self.launch_sums(cut, shares, scratch[right:])
            return
        cut = right_cut(*sizes, self.copies, limits)
        direct = cut.slabs == len(self.ms)
        shape = cut.slabs * m.shape[0] * ranks
        shares = None if direct else m.new_empty(shape, dtype=torch.float32)
        self._launch_right(cut, work, shares)
        if shares is not None:
            self.launch_sums(cut, shares, None)

    def _common(self) -> tuple[tuple[int, ...], ...]:
        """Widths, row strides, and columns of copies, four of each."""
        widths = _four([m.shape[1] for m in self.ms], 0)
        strides = _four([m.stride(0) for m in self.ms], 0)
        copies = _four([-1 if c is None else c for c in self.copied], -1)
        return widths, strides, copies

    def _buffer(self) -> tuple[Maybe, int, int, int, int]:
        """The wide buffer, its row stride, the step between groups, the columns to zero."""
        if self.wide is None:
            return None, 0, 0, 0, 0
        return self.wide.buffer, self.wide.buffer.stride(0), self.wide.step, *self.wide.zero

    def _shape_constants(self) -> tuple[int, int, int, int]:
        return len(self.ms), self.slots, self.rank, padded(self.slots * self.rank)

    def _even(self, columns: int) -> bool:
        return all(m.shape[1] % columns == 0 for m in self.ms)

    def _ends(self) -> tuple[Any, ...]:
        """Columns in the wide buffer and factors of the terms' P, four of each."""
        to = [t.column or 0 for t in self.terms]
        return (*_four(to, 0), *_four([t.scale for t in self.terms], 1.0))

    def _launch_right(self, cut: Cut, work: Work, shares: Maybe) -> None:
        widths, strides, copies = self._common()
        wide, wide_row, step, *zero = self._buffer()
        done = shares is None
        _right(
            (cut.programs + work.programs, 1),
            (*_four(self.ms, None), *_four(self.vs, None), shares, self.out if done else None,
             wide if self.copies or (done and self.placed) else None, work.table, work.first),
            (cut.programs, self.ms[0].shape[0], cut.slab, self.v_apart, *widths, *strides,
             *_four([v.stride(0) for v in self.vs], 0), *cut.firsts, *copies, *self._ends(),
             self.rank * len(self.terms), wide_row, step, *zero),
            (*self._shape_constants(), self.mode, self.terms[0].right_transposed, self.copies,
             done and self.placed, self.split, self._even(cut.columns), self.zero if done else 0,
             cut.rows, cut.columns, cut.stages, self.aligned, *work.constants),
            cut.warps,
        )  # fmt: skip

    def _launch_left(self, cut: Cut, work: Work, right: Maybe, left: torch.Tensor) -> None:
        widths, strides, copies = self._common()
        wide, wide_row, *_ = self._buffer()
        norm, limits = self.norm, device.limits(self.ms[0].device)
        of_norm = (None, None) if norm is None else (norm.rstd, norm.weight)
        how = (0.0, False, False)
        if norm is not None:
            how = (norm.offset, norm.cast == "input", device.ptx(limits))
        _left(
            (cut.programs + work.programs, 1),
            (*_four(self.ms, None), *_four(self.vs, None), *_four(self.us, None), right, left,
             wide if self.copies else None, *of_norm, work.table, work.first),
            (cut.programs, self.ms[0].shape[0], cut.part, cut.slabs, sum(widths), self.v_apart,
             self.u_apart, *widths, *strides,
             *_four([v.stride(0) for v in self.vs], 0), *_four([u.stride(0) for u in self.us], 0),
             *cut.firsts, *self._befores(), *copies, wide_row),
            (*self._shape_constants(), self.mode, self.terms[0].right_transposed, self.copies,
             self._even(cut.columns), cut.rows, cut.columns, cut.stages, self.aligned, *how,
             *work.constants),
            cut.warps,
        )  # fmt: skip

    def _befores(self) -> tuple[int, int, int]:
        """How many columns the matrices before the second to the fourth have."""
        sizes = [m.shape[1] for m in self.ms]
        a, b, c = (sum(sizes[:n]) for n in (1, 2, 3))
        return a, b, c

    def launch_sums(self, cut: Cut, right: Maybe, left: Maybe) -> None:
        widths, _, _ = self._common()
        wide, wide_row, step, *zero = self._buffer()
        rows, terms, count = self.ms[0].shape[0], len(self.terms), len(self.ms)
        block = max(1, _SUMMED // padded(self.slots * self.rank))
        right_programs = 0 if right is None else count * -(-rows // block)
        left_programs = 0 if left is None else count * -(-max(widths) // block)
        ahead = [max(1, min(16, 1 << (n - 1).bit_length())) for n in (cut.slabs, cut.parts)]
        _sums(
            (right_programs + left_programs, 1),
            (right, left, self.out, wide if self.placed else None,
             *_four(self.lefts if left is not None else [], None)),
            (right_programs, rows, sum(widths), cut.parts, *widths, *self._befores(), *cut.firsts,
             cut.slabs, *self._ends(), *_four([t.left_scale for t in self.terms], 1.0),
             self.rank * terms, wide_row, step, *zero),
            (*self._shape_constants(), self.split, self.terms[0].left_transposed, self.zero,
             block, *ahead),
            4,
        )  # fmt: skip


def _lined(t: Maybe, strided: bool) -> torch.Tensor:
    """A thin operand with contiguous rows, any distance apart if ``strided``."""
    assert t is not None, "the pass has what its terms want"
    good = t.stride(1) == 1 or t.shape[1] == 1 if strided else t.is_contiguous()
    return t if good else t.contiguous()


def _parts_of(ts: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[list[torch.Tensor], int]:
    """(operands of 16 bits, how far apart their three parts lie) of one to four in float32."""
    befores, firsts, total, programs = [], [], 0, 0
    for t in ts:
        befores.append(total)
        firsts.append(programs)
        total += -(-t.numel() // 16) * 16  # so that each begins at a multiple of 16 bytes
        programs += -(-t.numel() // _SPLIT)
    target = torch.empty((3, total), dtype=dtype, device=ts[0].device)
    _split(
        (programs, 1),
        (*_four(ts, None), target),
        (*_four([t.numel() for t in ts], 0), *_four([t.shape[1] for t in ts], 1),
         *_four([t.stride(0) for t in ts], 0), *_four(firsts, programs)[1:],
         *_four(befores, total)[1:], total),
        (len(ts), _SPLIT),
        4,
    )  # fmt: skip
    return [
        target[0, before : before + t.numel()].view(t.shape)
        for t, before in zip(ts, befores, strict=True)
    ], total
