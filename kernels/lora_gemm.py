"""The products of ``lora`` on a device: which there are, and what is put together for them.

Where the weights have room around them (``room``), each direction is one large product with the
adapters in it; otherwise the adapters are added to the base's result, one small product each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fusewright.kernels import lora_products as products
from fusewright.kernels import room
from fusewright.kernels.lora_group import Group, Needs, Results, Tensors, plan
from fusewright.kernels.normed import Norm
from fusewright.kernels.reduce import absent


def has_room(group: Group) -> bool:
    """Whether the weights lie where the augmented product needs them."""
    how = plan(group)
    return room.find(group.weights, how.columns, how.thin) is not None


def has_columns(group: Group) -> bool:
    """Whether the forward's augmented product is possible."""
    return room.find(group.weights, plan(group).columns, 0) is not None


def forward(
    group: Group, roomy: bool, right: Callable[..., torch.Tensor] = products.right
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (..., sum N_j) and the thin products (T, sum r_i), scaled, in the adapters' dtype.

    Args:
        right: makes the thin products, as ``lora_products.right`` does.
    """
    x, how = group.x, plan(group)
    rows = x.reshape(-1, x.shape[-1])
    found = room.find(group.weights, how.columns, 0)
    height = sum(w.shape[0] for w in group.weights)
    if found is None:
        thin = right(group, rows, how, None, False, ())
        return _added(group, rows, thin, height).view(*x.shape[:-1], height), thin
    wide = room.widened(rows, found.columns) if roomy else None
    copy = wide is None
    if wide is None:
        wide = rows.new_empty((rows.shape[0], found.width + found.columns))
    # B is written each time, since who changes it may not say so.
    found.prepare((how, tuple(group.member)))
    behind = found.buffer[: found.height, found.width :]
    copies = products.columns_behind(group, how, behind)
    thin = right(group, rows, how, wide, copy, copies)
    if how.ones:
        _write_biases(group, behind[:, how.thin])
    y = torch.mm(wide, found.buffer[: found.height].t())
    return y.view(*x.shape[:-1], height), thin


def thin(group: Group) -> torch.Tensor:
    """The thin products (T, sum r_i) of :func:`forward` alone."""
    rows = group.x.reshape(-1, group.x.shape[-1])
    return products.right(group, rows, plan(group), None, False, ())


def _write_biases(group: Group, column: torch.Tensor) -> None:
    pieces = column.split([w.shape[0] for w in group.weights])
    for piece, bias in zip(pieces, group.biases, strict=True):
        if bias is not None:
            piece.copy_(bias)


def _added(group: Group, rows: torch.Tensor, thin: torch.Tensor, height: int) -> torch.Tensor:
    """y without room: the base's products, and each layer's adapters added in place, at once.

    Every sum into 16 bits rounds the whole; there are no more of them than in eager's code.
    """
    y = rows.new_empty((rows.shape[0], height))
    pieces = y.split([w.shape[0] for w in group.weights], 1)
    for piece, w, b in zip(pieces, group.weights, group.biases, strict=True):
        if b is None:
            torch.mm(rows, w.t(), out=piece)
        else:  # cuBLAS adds a bias before it rounds, but not into rows of another stride
            piece.copy_(torch.addmm(b, rows, w.t()))
    lows = thin.split([b.shape[1] for b in group.up], 1) if group.up else ()
    split = plan(group).split
    for j, piece in enumerate(pieces):
        of = [i for i, layer in enumerate(group.member) if layer == j]
        if of:
            pairs = [products.paired(lows[i], group.up[i], rows.dtype) for i in of]
            if split:
                piece.copy_(products.with_products(piece, pairs, split))
            else:
                piece.addmm_(*products.joined(pairs))
    return y


class Toward(NamedTuple):
    """What the backward has made before it reads x: the gradient of x first of all."""

    x: torch.Tensor
    layers: list[torch.Tensor]
    products: list[torch.Tensor]
    up: list[torch.Tensor]
    biases: list[torch.Tensor]


def toward_input(
    dys: Tensors,
    thin: torch.Tensor,
    group: Group,
    grad_roomy: bool,
    needs: Needs,
    both: Callable[..., Any] = products.both,
) -> Toward:
    """dx, the gradients of the layers' results, P_i, dB_i and db_j.

    Args:
        both: makes P_i, dB_i and db_j, as ``lora_products.both`` does.
    """
    x, how = group.x, plan(group)
    rows = x.reshape(-1, x.shape[-1])
    blocks = [d.reshape(-1, d.shape[-1]) for d in dys]
    found = room.find(group.weights, 0, how.thin) if needs.x and not needs.weights else None
    wide = None
    if found is not None:
        wide = room.widened(blocks[0], found.rows) if grad_roomy and len(blocks) == 1 else None
    copy = found is not None and wide is None
    if found is not None and wide is None:
        wide = rows.new_empty((rows.shape[0], found.height + found.rows))
    g = _per_layer(blocks, group)
    copies = []
    if found is not None:
        found.prepare((how, tuple(group.member)))
        below = found.buffer[found.height :, : found.width]
        copies = products.rows_below(group, how, below)
    p, dup, dbiases = both(group, g, thin, how, wide, copy, needs, copies)
    dx = absent(x)
    if found is not None and wide is not None:
        dx = torch.mm(wide, found.buffer[:, : found.width]).view(x.shape)
    elif needs.x:
        dx = _summed(group, g, p).view(x.shape)
    return Toward(dx, g, p, dup, dbiases)


def backward(
    dys: Tensors,
    thin: torch.Tensor,
    group: Group,
    grad_roomy: bool,
    needs: Needs,
    fill: Callable[[torch.Tensor], None] | None = None,
    norm: Norm | None = None,
) -> Results:
    """The gradients; see the header of ``lora``.

    Args:
        fill: is handed dx and writes x, whose values are not read before; no weight is trained then.
        norm: its output is x, and the group has its input for x; no weight is trained then.
    """
    x = group.x
    dx, g, p, dup, dbiases = toward_input(dys, thin, group, grad_roomy, needs)
    if fill is not None:
        fill(dx)
    rows = x.reshape(-1, x.shape[-1])
    return Results(
        dx,
        _of_inputs(group, p, needs.inputs),
        [d.t() @ rows if needs.weights else absent(x) for d in g],
        dbiases,
        products.left(group, rows, p, needs.down, norm),
        dup,
    )


def _per_layer(blocks: Tensors, group: Group) -> list[torch.Tensor]:
    """The gradient of each layer's y, however y was cut into pieces."""
    heights = [w.shape[0] for w in group.weights]
    if [b.shape[1] for b in blocks] == heights:
        return list(blocks)
    whole = blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), 1)
    return list(whole.split(heights, 1))


def _summed(group: Group, g: Tensors, p: Tensors) -> torch.Tensor:
    """dx without room; all adapters are added at once, as in ``_added``."""
    dx = g[0] @ group.weights[0]
    for d, w in zip(g[1:], group.weights[1:], strict=True):
        dx.addmm_(d, w)
    shared = [i for i, source in enumerate(group.source) if source < 0]
    if shared:
        pairs = [products.paired(p[i], group.down[i].t(), dx.dtype) for i in shared]
        dx.addmm_(*products.joined(pairs))
    return dx


def _of_inputs(group: Group, p: Tensors, need: bool) -> list[torch.Tensor]:
    """The gradients of the adapters' own inputs."""
    out: list[torch.Tensor] = [absent(group.x) for _ in group.inputs]
    for i, (at, a) in enumerate(zip(group.source, group.down, strict=True)):
        if need and at >= 0:
            dtype = group.inputs[at].dtype
            part = torch.mm(p[i].to(group.dtype), a.to(group.dtype)).to(dtype)
            part = part.view(group.inputs[at].shape)
            out[at] = part if out[at].numel() == 0 else out[at] + part
    return out
