"""Triton kernels of the cross-entropy; the mathematics is in ``cross_entropy``.

Forward: one program a row, one read. Each thread keeps a maximum and a sum for the 16 bytes that it
loads at a time, rescaled when the maximum rises, so that the loop has neither a barrier nor a second
exponential per element; the lanes meet once, at the end of the row. The program that is done last adds
the rows up in a fixed order. Backward: one program per row and block of columns.

The chunked head and loss uses one kernel for both on a buffer of its own: it reads the logits of a
row, then reads them again, from cache, and overwrites them with their gradient. Its rows are added up
by a launch of its own, behind the last chunk.

Where the rows do not begin at multiples of 16 bytes (a vocabulary of odd size), SHIFTED kernels count
columns from the last such multiple before the row, so that whole 16 bytes are still read and written:
what is read beside the row is thrown away, and nothing is written there.

What there is one of per row (log-sum-exp, loss, the label's gradient) is float64. A row whose label
is ignored is not read.
"""

from __future__ import annotations

from fusewright.kernels.arrival_kernels import arrive, start_anew
from fusewright.kernels.elementary import exp, tanh_and_slope
from fusewright.kernels.launch import tl, triton

_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _wide(number):
    """A scalar argument in float64; the interpreter passes Python's own numbers."""
    return tl.full((), number, tl.float64)


@triton.jit
def _transform(x, scale, softcap, inverse, SCALED: tl.constexpr, CAPPED: tl.constexpr,
               PRECISE: tl.constexpr):  # fmt: skip
    """z of the logits x in float32, and dz/dx without the scale."""
    slope = 1.0
    z = x
    if SCALED:
        z = z * scale
    if CAPPED:
        t, slope = tanh_and_slope(tl.div_rn(z, softcap) if PRECISE else z * inverse, PRECISE)
        z = t * softcap
    return z, slope


@triton.jit
def _begin(row_ptr, WIDE: tl.constexpr, SHIFTED: tl.constexpr):
    """The last multiple of 16 bytes at or before a row, and by how many elements it is before."""
    shift = 0
    if SHIFTED:
        shift = ((row_ptr.to(tl.int64) & 15) // (16 // WIDE)).to(tl.int32)
        row_ptr = tl.multiple_of(row_ptr - shift, 16)
    return row_ptr, shift


@triton.jit
def _groups(first, shift, vocab, BLOCK: tl.constexpr, WIDE: tl.constexpr, SHIFTED: tl.constexpr):
    """BLOCK positions behind ``_begin`` in groups of 16 bytes.

    Gives the positions, their columns, which of those exist, and which to ask memory for: the whole
    group if some of it exists, which one access can bring.
    """
    groups = first + tl.arange(0, BLOCK // WIDE)[:, None] * WIDE
    at = groups + tl.arange(0, WIDE)[None, :]
    columns = at - shift
    inside = columns < vocab
    asked = inside
    if SHIFTED:
        inside = inside & (columns >= 0)
        asked = tl.broadcast_to(groups < vocab + shift, (BLOCK // WIDE, WIDE))
    return at, columns, inside, asked


@triton.jit
def _store(row_ptr, at, value, inside, first, shift, vocab, BLOCK: tl.constexpr,
           WIDE: tl.constexpr, SHIFTED: tl.constexpr):  # fmt: skip
    """Write what is inside the row: whole groups, and one by one those that a row's end cuts."""
    if SHIFTED:
        groups = first - shift + tl.arange(0, BLOCK // WIDE)[:, None] * WIDE
        whole = (groups >= 0) & (groups + WIDE <= vocab)
        whole = tl.broadcast_to(whole, (BLOCK // WIDE, WIDE))
        tl.store(row_ptr + at, value, mask=whole)
        if (first == 0) | (first + BLOCK > vocab + shift):
            tl.store(row_ptr + at, value, mask=inside & ~whole)
    else:
        tl.store(row_ptr + at, value, mask=inside)


@triton.jit
def _row_statistics(
    row_ptr, vocab, anchor, scale, softcap, inverse,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, KEEP: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """max z, sum exp(z - max) and, with SMOOTH, sum (z - anchor); the sums in float64."""
    LANES: tl.constexpr = BLOCK // WIDE
    top = tl.full((LANES,), _LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    spread = tl.zeros((LANES,), tl.float32)
    begin_ptr, shift = _begin(row_ptr, WIDE, SHIFTED)
    for first in range(0, vocab + shift, BLOCK):
        at, _columns, inside, asked = _groups(first, shift, vocab, BLOCK, WIDE, SHIFTED)
        x = tl.load(
            begin_ptr + at, mask=asked, other=0.0 if SCALED or CAPPED else -float("inf"),
            eviction_policy="evict_last" if KEEP else "evict_first",
        ).to(tl.float32)  # fmt: skip
        z, _ = _transform(x, scale, softcap, inverse, SCALED, CAPPED, PRECISE)
        if SCALED or CAPPED or SHIFTED:
            z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, axis=1))
        terms = exp(z - higher[:, None], False)
        total = total * exp(top - higher, False) + tl.sum(terms, axis=1)
        top = higher
        if SMOOTH:
            spread += tl.sum(tl.where(inside, z - anchor, 0.0), axis=1)
    highest = tl.max(top, axis=0)
    sum64 = tl.sum(total.to(tl.float64) * exp(top - highest, False).to(tl.float64), axis=0)
    return highest, sum64, tl.sum(spread.to(tl.float64), axis=0)


@triton.jit
def _row_loss(
    row_ptr, label, vocab, smoothing, z_loss, scale, softcap, inverse,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr,
    PRECISE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, KEEP: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    """The loss of a row, its log-sum-exp, and z of its label; NaN for a label out of range."""
    known = (label >= 0) & (label < vocab)
    at = tl.where(known, label, 0)
    x = tl.load(row_ptr + at).to(tl.float32)
    z_label, _ = _transform(x, scale, softcap, inverse, SCALED, CAPPED, PRECISE)
    anchor = tl.where(tl.abs(z_label) < 1e38, z_label, 0.0)
    top, total, spread = _row_statistics(
        row_ptr, vocab, anchor, scale, softcap, inverse,
        SCALED, CAPPED, SMOOTH, PRECISE, BLOCK, WIDE, KEEP, SHIFTED,
    )  # fmt: skip
    log_total = tl.log(total)
    lse = top.to(tl.float64) + log_total
    gap = (top - z_label).to(tl.float64)
    loss = log_total + gap
    if SMOOTH:
        mean_gap = (top - anchor).to(tl.float64) - spread / vocab
        loss = log_total + (1.0 - _wide(smoothing)) * gap + smoothing * mean_gap
    if Z_LOSS:
        loss += z_loss * lse * lse
    return tl.where(known, loss, float("nan")), lse, z_label


@triton.jit
def _expm1(t):
    """e^t - 1 in float64 for t <= 0."""
    series = t * (1.0 + t * (0.5 + t * (1.0 / 6.0)))
    return tl.where(t > -1e-4, series, tl.exp(t) - 1.0)


@triton.jit
def _label_gradient(z_label, lse, weight, smoothing, z_loss, vocab, SMOOTH: tl.constexpr,
                    Z_LOSS: tl.constexpr):  # fmt: skip
    """dz of the label, in float64 and rounded once."""
    log_p = z_label.to(tl.float64) - lse
    d = _expm1(log_p)
    if SMOOTH:
        taken = _wide(smoothing)
        d += taken - taken / vocab
    if Z_LOSS:
        d += tl.exp(log_p) * (2.0 * z_loss * lse)
    return (d * weight).to(tl.float32)


@triton.jit
def _row_scalars(lse, weight, smoothing, z_loss, vocab, SMOOTH: tl.constexpr,
                 Z_LOSS: tl.constexpr):  # fmt: skip
    """lse rounded, the factor of exp(z - that), and what label smoothing takes off every entry."""
    high = lse.to(tl.float32)
    low = high.to(tl.float64) - lse  # at most half a unit in the last place of lse
    shared = weight * (1.0 + low * (1.0 + low * (0.5 + low * (1.0 / 6.0 + low * (1.0 / 24.0)))))
    if Z_LOSS:
        shared *= 1.0 + 2.0 * z_loss * lse
    spread = 0.0
    if SMOOTH:
        spread = (weight * smoothing / vocab).to(tl.float32)
    return high, shared.to(tl.float32), spread


@triton.jit
def _gradient(
    x, columns, label, at_label, high, shared, spread, scale, softcap, inverse,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """d(logits) of one row's columns, in float32."""
    z, slope = _transform(x, scale, softcap, inverse, SCALED, CAPPED, PRECISE)
    t = z - high
    p = exp(t, PRECISE)
    if PRECISE:  # what the rounding of z - high lost comes back to first order
        of_high = z - t
        lost = (z - (t + of_high)) + (of_high - high)
        p += p * tl.where(p > 0, lost, 0.0)
    d = p * shared
    if SMOOTH:
        d -= spread
    d = tl.where(columns == label.to(tl.int32), at_label, d)
    if CAPPED:
        d *= slope
    if SCALED:
        d *= scale
    return d


@triton.jit
def _known(label, vocab, ignore_index):
    """Assert that a label is in range, or ignored; gives whether it counts."""
    counts = label != ignore_index
    tl.device_assert(
        ~counts | ((label >= 0) & (label < vocab)),
        "labels: expected ignore_index or 0 <= label < the number of classes",
    )
    return counts


@triton.jit
def _give(loss, valid, factor, loss_ptr, factor_ptr, REDUCE: tl.constexpr, MEAN: tl.constexpr):
    """Store the loss and the factor that rows' gradients lack; NaN and 0 where no row counts."""
    if MEAN:
        valid = valid.to(tl.float64)
        loss = tl.where(valid > 0, loss / valid, float("nan"))
        factor = tl.where(valid > 0, factor / valid, 0.0)
    if REDUCE:
        tl.store(loss_ptr, loss)
    tl.store(factor_ptr, factor)


@triton.jit
def cross_entropy_forward(
    logits_ptr, labels_ptr, losses_ptr, lse_ptr, counter_ptr, loss_ptr, factor_ptr,
    row_step, label_step, vocab, ignore_index, smoothing, z_loss, scale, softcap, inverse,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr,
    PRECISE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, SHIFTED: tl.constexpr,
    REDUCE: tl.constexpr, MEAN: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """The loss and the log-sum-exp of a row, 0 where its label is ignored; then the sum, ADDED at a time."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * label_step)
    counts = _known(label, vocab, ignore_index)
    if counts:
        loss, lse, _ = _row_loss(
            logits_ptr + row * row_step, label, vocab, smoothing, z_loss, scale, softcap, inverse,
            SCALED, CAPPED, SMOOTH, Z_LOSS, PRECISE, BLOCK, WIDE, False, SHIFTED,
        )  # fmt: skip
        tl.store(losses_ptr + row, loss)
        tl.store(lse_ptr + row, lse)
    else:
        tl.store(losses_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
    last, valid = arrive(counter_ptr, counts.to(tl.int32))
    if last:
        total = tl.zeros((ADDED,), tl.float64)
        if REDUCE:
            rows = tl.num_programs(0)
            for first in range(0, rows, ADDED):
                at = first + tl.arange(0, ADDED)
                total += tl.load(losses_ptr + at, mask=at < rows, other=0.0, cache_modifier=".cg")
        loss = tl.sum(total, axis=0)
        _give(loss, valid, _wide(1.0), loss_ptr, factor_ptr, REDUCE, MEAN)
        start_anew(counter_ptr)


@triton.jit
def cross_entropy_reduce(
    losses_ptr, labels_ptr, denominator_ptr, loss_ptr, factor_ptr,
    rows, label_step, vocab, ignore_index, unit,
    MEAN: tl.constexpr, DIVIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up rows that other launches have written, in one program and a fixed order.

    The loss and the factor are over the denominator, the factor over ``unit`` too.
    """
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, rows, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = at < rows
        label = tl.load(labels_ptr + at * label_step, mask=inside, other=ignore_index)
        count += _known(label, vocab, ignore_index).to(tl.int32)
        total += tl.load(losses_ptr + at, mask=inside, other=0.0)
    loss = tl.sum(total, axis=0)
    factor = 1.0 / _wide(unit)
    if DIVIDED:
        denominator = tl.load(denominator_ptr).to(tl.float64)
        loss = loss / denominator
        factor = factor / denominator
    _give(loss, tl.sum(count, axis=0), factor, loss_ptr, factor_ptr, True, MEAN)


@triton.jit
def cross_entropy_backward(
    dloss_ptr, logits_ptr, labels_ptr, lse_ptr, factor_ptr, dlogits_ptr,
    dloss_step, row_step, label_step, vocab, column_blocks, ignore_index,
    smoothing, z_loss, scale, softcap, inverse,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr,
    PRECISE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """d(logits) of one row's BLOCK columns; dlogits is dense.

    SHIFTED needs the rows of both to lie alike between multiples of 16 bytes.
    """
    pid = tl.program_id(0)
    row = (pid // column_blocks).to(tl.int64)
    first = (pid % column_blocks) * BLOCK
    row_ptr = logits_ptr + row * row_step
    begin_ptr, shift = _begin(row_ptr, WIDE, SHIFTED)
    out_ptr, _out_shift = _begin(dlogits_ptr + row * vocab, WIDE, SHIFTED)
    at, columns, inside, asked = _groups(first, shift, vocab, BLOCK, WIDE, SHIFTED)
    label = tl.load(labels_ptr + row * label_step)
    if label == ignore_index:
        zero = tl.zeros((BLOCK // WIDE, WIDE), tl.float32)
        _store(out_ptr, at, zero, inside, first, shift, vocab, BLOCK, WIDE, SHIFTED)
    else:
        x = tl.load(
            begin_ptr + at, mask=asked, other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)  # fmt: skip
        weight = tl.load(dloss_ptr + row * dloss_step).to(tl.float64) * tl.load(factor_ptr)
        lse = tl.load(lse_ptr + row)
        at_label = 0.0
        here = label + shift
        if (here >= first) & (here < first + BLOCK) & (label >= 0) & (label < vocab):
            z_label, _ = _transform(
                tl.load(row_ptr + label).to(tl.float32), scale, softcap, inverse,
                SCALED, CAPPED, PRECISE,
            )  # fmt: skip
            at_label = _label_gradient(
                z_label, lse, weight, smoothing, z_loss, vocab, SMOOTH, Z_LOSS
            )
        high, shared, spread = _row_scalars(lse, weight, smoothing, z_loss, vocab, SMOOTH, Z_LOSS)
        d = _gradient(
            x, columns, label, at_label, high, shared, spread, scale, softcap, inverse,
            SCALED, CAPPED, SMOOTH, PRECISE,
        )  # fmt: skip
        _store(out_ptr, at, d, inside, first, shift, vocab, BLOCK, WIDE, SHIFTED)


@triton.jit
def loss_and_gradient_in_place(
    logits_ptr, labels_ptr, losses_ptr, row_step, label_step, vocab, ignore_index,
    smoothing, z_loss, scale, softcap, inverse, unit,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr,
    PRECISE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    """The loss of one row; its logits are overwritten with ``unit`` times their gradient."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * label_step)
    row_ptr = logits_ptr + row * row_step
    begin_ptr, shift = _begin(row_ptr, WIDE, SHIFTED)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            zero = tl.zeros((BLOCK // WIDE, WIDE), tl.float32)
            for first in range(0, vocab + shift, BLOCK):
                at, _columns, inside, _asked = _groups(first, shift, vocab, BLOCK, WIDE, SHIFTED)
                _store(begin_ptr, at, zero, inside, first, shift, vocab, BLOCK, WIDE, SHIFTED)
    else:
        loss, lse, z_label = _row_loss(
            row_ptr, label, vocab, smoothing, z_loss, scale, softcap, inverse,
            SCALED, CAPPED, SMOOTH, Z_LOSS, PRECISE, BLOCK, WIDE, GRADIENT, SHIFTED,
        )  # fmt: skip
        tl.store(losses_ptr + row, loss)
        if GRADIENT:
            weight = _wide(unit)
            at_label = _label_gradient(
                z_label, lse, weight, smoothing, z_loss, vocab, SMOOTH, Z_LOSS
            )
            high, shared, spread = _row_scalars(
                lse, weight, smoothing, z_loss, vocab, SMOOTH, Z_LOSS
            )
            for first in range(0, vocab + shift, BLOCK):
                at, columns, inside, asked = _groups(first, shift, vocab, BLOCK, WIDE, SHIFTED)
                x = tl.load(
                    begin_ptr + at, mask=asked, other=0.0, eviction_policy="evict_first"
                ).to(tl.float32)  # fmt: skip
                d = _gradient(
                    x, columns, label, at_label, high, shared, spread, scale, softcap, inverse,
                    SCALED, CAPPED, SMOOTH, PRECISE,
                )  # fmt: skip
                _store(begin_ptr, at, d, inside, first, shift, vocab, BLOCK, WIDE, SHIFTED)


@triton.jit
def scale_to(saved_ptr, dloss_ptr, factor_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    """out = round(saved dloss factor), the product in float32 by a weight rounded from float64."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    inside = at < elements
    weight = (tl.load(dloss_ptr).to(tl.float64) * tl.load(factor_ptr)).to(tl.float32)
    value = tl.load(saved_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first")
    tl.store(out_ptr + at, value * weight, mask=inside)
