"""The thin products of a group of adapters: S = s x A^T, P = s dy B, dA = P^T x, dB = dy^T S."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusewright.kernels import device, room, thin
from fusewright.kernels.lora_group import Group, Needs, Plan, Tensors
from fusewright.kernels.normed import Norm
from fusewright.kernels.recording import recorder
from fusewright.kernels.reduce import absent
from fusewright.kernels.thin import Copy, Result, Term, Wide


def scaled(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """scale a b, rounded once to the operands' dtype."""
    if scale == 1.0 or a.dtype in (torch.float32, torch.float64):
        return torch.matmul(a, b) * scale
    return (torch.matmul(a.float(), b.float()) * scale).to(a.dtype)


def paired(
    low: torch.Tensor, right: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(left, right^T) whose product in ``dtype`` is low right^T, with float32's precision if split.

    Args:
        low: (T, r).
        right: (N, r).
    """
    if low.dtype == right.dtype == dtype:
        return low, right.t()
    (a, b), (c, d) = _halves(low.float(), dtype), _halves(right.float(), dtype)
    return torch.cat((a, b, a), 1), torch.cat((c, c, d), 1).t()


def joined(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Several (left, right) as one pair whose product is the sum of theirs."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([p[0] for p in pairs], 1), torch.cat([p[1] for p in pairs], 0)


def with_products(
    base: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], split: bool
) -> torch.Tensor:
    """base + the sum of the pairs' products, rounded once to the dtype of ``base``.

    With factors that are ``split`` the sum is kept in float32 until then: the library may add shares
    of a 16-bit product in 16 bits, and eager's float32 adapters know nothing of that.
    """
    left, right = joined(pairs)
    if not split:
        return torch.addmm(base, left, right)
    if left.is_cuda:
        wide: torch.Tensor = torch.ops.aten.mm.dtype(left, right, torch.float32)
    else:
        wide = torch.mm(left.float(), right.float())
    return wide.add_(base).to(base.dtype)


def _halves(t: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    high = t.to(dtype)
    return high, (t - high.to(t.dtype)).to(dtype)


def _multiply(
    blocks: Tensors, terms: Sequence[Term], wide: Wide | None, copies: Sequence[Copy],
    norm: Norm | None = None,
) -> list[Result]:  # fmt: skip
    """Thin products by kernels on a GPU; by the library elsewhere and where all is float32.

    There the kernels' sums have an error of the last bit more than the library's, and nothing to gain.
    """
    single = all(
        t.dtype is torch.float32
        for t in (*blocks, *[u for term in terms for u in (term.right, term.left) if u is not None])
    )
    run = thin.thin if blocks[0].is_cuda and not single else thin.reference
    return run(blocks, terms, wide, copies) if norm is None else run(blocks, terms, norm=norm)


def columns_behind(group: Group, how: Plan, target: torch.Tensor) -> list[Copy]:
    """The copies that put every B into the columns behind W.

    Args:
        target: (sum N_j, columns), a part of the weights' buffer.
    """
    tops = [0]
    for w in group.weights:
        tops.append(tops[-1] + w.shape[0])
    return [
        Copy(_in(b, group), target[tops[j] : tops[j + 1], at : at + b.shape[1]], how.step)
        for b, j, at in zip(group.up, group.member, how.starts, strict=True)
    ]


def rows_below(group: Group, how: Plan, target: torch.Tensor) -> list[Copy]:
    """The copies that put A into the rows below W, of adapters that read x itself.

    Args:
        target: (rows, K), a part of the weights' buffer.
    """
    step = how.step * target.stride(0)
    return [
        Copy(_in(a, group), target[at : at + a.shape[0]], step)
        for a, at, source in zip(group.down, how.starts, group.source, strict=True)
        if source < 0
    ]


def _in(t: torch.Tensor, group: Group) -> torch.Tensor:
    return t.to(group.dtype)


def right(
    group: Group,
    rows: torch.Tensor,
    how: Plan,
    wide: torch.Tensor | None,
    copy: bool,
    copies: Sequence[Copy],
) -> torch.Tensor:
    """S (T, sum r_i); with ``wide`` (T, K + columns) also in its columns, and x if ``copy``."""
    width = rows.shape[1]
    own = [i for i, source in enumerate(group.source) if source >= 0]
    terms = [
        Term(0, _in(a, group), True, s, None if wide is None else width + at)
        for a, s, at in zip(group.down, group.scales, how.starts, strict=True)
    ]
    into = None
    if wide is not None:
        zero = (width + how.thin, wide.shape[1])
        into = Wide(wide, [0 if copy else None], how.step, zero, True)
    found: dict[int, torch.Tensor] = {}
    shared = [i for i in range(len(terms)) if i not in own]
    for i, result in zip(shared, _multiply([rows], [terms[i] for i in shared], into, copies),
                         strict=True):  # fmt: skip
        assert result.right is not None
        found[i] = result.right
    for i in own:
        read = _in(group.input_of(i), group).reshape(-1, width)
        (result,) = _multiply([read], [terms[i]._replace(column=None)], None, ())
        assert result.right is not None
        found[i] = result.right
        if wide is not None:
            _place(result.right, wide[:, width + how.starts[i] :], how.step)
    if wide is not None and how.ones:
        wide[:, width + how.thin].fill_(1.0)
    return _together([found[i] for i in range(len(terms))], rows)


def _together(parts: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """S as one dense tensor of its own: parts in a wide buffer would keep all of it alive."""
    if not parts:
        return absent(rows)
    first, at = parts[0], recorder.address(parts[0])
    for p in parts:
        if recorder.address(p) != at or p.stride() != first.stride():
            return torch.cat(parts, 1)
        at += p.shape[1] * p.element_size()
    shape = (first.shape[0], sum(p.shape[1] for p in parts))
    whole = room.part(first, first.storage_offset(), shape, first.stride())
    dense = whole.numel() * whole.element_size() == whole.untyped_storage().nbytes()
    return whole if dense else whole.clone()


def _place(p: torch.Tensor, target: torch.Tensor, step: int) -> None:
    """P into columns of a wide buffer, in three groups if it is split."""
    r = p.shape[1]
    if not step:
        target[:, :r].copy_(p)
        return
    high, low = _halves(p, target.dtype)
    for group, part in enumerate((high, low, high)):
        target[:, group * step : group * step + r].copy_(part)


def both(
    group: Group,
    g: Tensors,
    low: torch.Tensor,
    how: Plan,
    wide: torch.Tensor | None,
    copy: bool,
    needs: Needs,
    copies: Sequence[Copy],
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """P_i, dB_i and db_j; with ``wide`` (T, sum N_j + rows) P also in its columns, and g if ``copy``."""
    x, height = group.x, sum(d.shape[1] for d in g)
    wanted = needs.x or needs.down or needs.inputs
    terms = []
    for i, (b, j, s, at) in enumerate(
        zip(group.up, group.member, group.scales, how.starts, strict=True)
    ):
        placed = wide is not None and group.source[i] < 0
        terms.append(
            Term(
                j,
                _in(b, group) if wanted else None,
                False,
                s,
                height + at if placed else None,
                low[:, at : at + b.shape[1]] if needs.up else None,
            )
        )
    into = None
    if wide is not None:
        starts = [0]
        for d in g:
            starts.append(starts[-1] + d.shape[1])
        columns = [s if copy else None for s in starts[:-1]]
        into = Wide(wide, columns, how.step, (height + how.thin, wide.shape[1]))
        for i, source in enumerate(group.source):
            if source >= 0:
                zero = wide.new_zeros(()).expand(wide.shape[0], how.ranks[i])
                _place(zero.float() if how.step else zero, wide[:, height + how.starts[i] :],
                       how.step)  # fmt: skip
    results = _multiply(g, terms, into, copies)
    nothing = absent(x)
    p = [nothing if r.right is None else r.right for r in results]
    dup = [
        nothing if r.left is None else r.left.to(b.dtype)
        for r, b in zip(results, group.up, strict=True)
    ]
    return p, dup, biases(group, g, needs)


def biases(group: Group, g: Tensors, needs: Needs) -> list[torch.Tensor]:
    """db_j."""
    return [
        d.sum(0, dtype=torch.float32).to(b.dtype)
        if needs.biases and b is not None
        else absent(group.x)
        for d, b in zip(g, group.biases, strict=True)
    ]


def left(
    group: Group, rows: torch.Tensor, p: Tensors, need: bool, norm: Norm | None = None
) -> list[torch.Tensor]:
    """dA_i; with a ``norm``, whose output is x, ``rows`` are its input and every adapter reads x."""
    if not need:
        return [absent(group.x) for _ in group.down]
    width = rows.shape[1]
    if norm is not None and rows.is_cuda and not device.ptx(device.limits(rows.device)):
        rows, norm = norm.of(rows), None  # there the kernel that makes its tiles spills
    blocks = [rows, *(_in(t, group).reshape(-1, width) for t in group.inputs)]
    found: dict[int, torch.Tensor] = {}
    for at, block in enumerate(blocks):
        of = [i for i, source in enumerate(group.source) if source + 1 == at]
        terms = [Term(0, left=p[i], left_transposed=True) for i in of]
        made = _multiply([block], terms, None, (), norm) if terms else ()
        for i, result in zip(of, made, strict=True):
            assert result.left is not None
            found[i] = result.left.to(group.down[i].dtype)
    return [found[i] for i in range(len(p))]
