"""Adapted layers around a gated unit: the unit with the products that read or write its numbers.

    [gate | up] = x W^T + ...        h = act(gate) up        y = h V^T + ...

The layers are groups of ``lora``, the unit is that of ``glu``; derivations and rounding are theirs.
Two ops, beside which the unit's numbers are read by large products alone:

``lora_glu``            h, its thin product and y: S = s h A^T from the tiles of h that are written.
``lora_mlp_backward``   from the gradient of y to that of x, through both groups and the unit. It makes
                        dh, then in one pass d(gate), d(up), their products with B and S, and dA of
                        the layer behind the unit, whose h is never written; then dx.

Where the kernels of ``glu_thin`` do not serve (float32 adapters, several of them, interleaved pairs),
the same is done by the ops' own functions one after the other.
Traffic per element of h beside the large products: forward two numbers read and one written, backward
three read and two written; by the ops apart it is three and one, and six and three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fusewright.kernels import glu, glu_thin, lora, lora_gemm, lora_glu, room, roomy
from fusewright.kernels import lora_products as products
from fusewright.kernels.launch import launchable
from fusewright.kernels.lora_group import Group, Needs, Plan, Tensors, takes
from fusewright.kernels.normed import Norm
from fusewright.kernels.room import columns_of, empty_roomy
from fusewright.kernels.spec import Implementation, one_way
from fusewright.kernels.thin import Copy, Term, Wide

Biases = Sequence[torch.Tensor | None]


class Unit(NamedTuple):
    """The arguments of ``lora_glu``: a gated unit, as in ``glu``, and the group that reads it.

    Attributes:
        gate_up: (..., 2F).
        weights, biases, down, up, member, scales, widths, grad_roomy: of the layers, as in ``lora``.
        activation, gate_first, interleaved: of the unit.
        room: columns behind the rows of h, see ``room``.
    """

    gate_up: torch.Tensor
    weights: Tensors
    biases: Biases
    down: Tensors
    up: Tensors
    member: Sequence[int]
    scales: Sequence[float]
    widths: Sequence[int]
    grad_roomy: bool
    activation: str
    gate_first: bool
    interleaved: bool
    room: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of h."""
        return (*self.gate_up.shape[:-1], glu._half_width(self.gate_up))

    def group(self, h: torch.Tensor) -> Group:
        """The layers over h."""
        return Group.over(h, self)


Outputs = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]


def _unit_apart(unit: Unit, value: Implementation, layers: Implementation) -> Outputs:
    """The same by the two ops' own functions."""
    dtype = unit.gate_up.dtype
    form = (unit.activation, unit.gate_first, unit.interleaved)
    h = value(unit.gate_up, *form, dtype, unit.room, 0)
    ys, thin = layers(*unit.group(h), unit.widths, dtype, unit.room > 0, unit.grad_roomy)
    return ys, thin, h


def host_fwd(*args: Any) -> Outputs:
    """The pieces of y, S and h by the references."""
    return _unit_apart(Unit(*args), roomy._packed_reference_fwd, lora.host_fwd)


def device_fwd(*args: Any) -> Outputs:
    """The pieces of y, S and h, S made with h."""
    unit = Unit(*args)
    gate_up, dtype = unit.gate_up, unit.gate_up.dtype
    h = empty_roomy(unit.shape, unit.room, dtype, gate_up.device)
    group = unit.group(h)
    fits = len(group.down) == 1 and _fits(gate_up, unit.interleaved, [group]) and unit.room
    if not (fits and takes(group, dtype) and lora_gemm.has_columns(group)):
        return _unit_apart(unit, roomy._packed_fwd, lora.device_fwd)
    lora.check(group)

    def right(
        group: Group, rows: torch.Tensor, how: Plan, wide: torch.Tensor | None, copy: bool,
        copies: Sequence[Copy],
    ) -> torch.Tensor:  # fmt: skip
        assert wide is not None, "the weights have room"
        width = rows.shape[1]
        term = Term(0, group.down[0], True, group.scales[0], width)
        into = Wide(wide, [None], 0, (width + how.thin, wide.shape[1]), True)
        flat = gate_up.reshape(-1, 2 * width)
        low = glu_thin.forward(flat, rows, unit.activation, unit.gate_first, term, into, copies)
        if copy:
            wide[:, :width].copy_(rows)
        if how.ones:
            wide[:, width + how.thin].fill_(1.0)
        return low

    whole, thin = lora_gemm.forward(group, True, right)
    return columns_of(whole, unit.widths), thin, h


def _fits(gate_up: torch.Tensor, interleaved: bool, groups: Sequence[Group]) -> bool:
    """Whether the kernels serve the unit and these groups' adapters, which all read their group's x."""
    thins = [t for g in groups for t in (*g.down, *g.up)]
    ranks = [a.shape[0] for g in groups for a in g.down]
    return (
        not interleaved
        and launchable(gate_up, gate_up.dtype)
        and glu_thin.takes(gate_up, ranks, [t.dtype for t in thins])
    )


def _fake_fwd(*args: Any) -> Outputs:
    unit = Unit(*args)
    h = room.fake_roomy(unit.gate_up, unit.shape, unit.room, unit.gate_up.dtype)
    ys, thin = lora._fake_fwd(*unit.group(h), unit.widths, h.dtype, False, unit.grad_roomy)
    return ys, thin, h


class First(NamedTuple):
    """The group that makes gate and up, as in the backward of ``lora``; every adapter reads x."""

    thin: torch.Tensor
    x: torch.Tensor
    weights: Tensors
    biases: Biases
    down: Tensors
    up: Tensors
    member: Sequence[int]
    scales: Sequence[float]
    need_x: bool
    need_biases: bool
    need_down: bool
    need_up: bool

    @property
    def needs(self) -> Needs:
        """What is wanted of its backward."""
        return Needs(self.need_x, False, False, self.need_biases, self.need_down, self.need_up)

    @property
    def group(self) -> Group:
        """The layers over x."""
        return Group.over(self.x, self)


class Results(NamedTuple):
    """The gradients, of the first group and of the second; of shape (0,) where nobody asked."""

    x: torch.Tensor
    first_biases: list[torch.Tensor]
    first_down: list[torch.Tensor]
    first_up: list[torch.Tensor]
    biases: list[torch.Tensor]
    down: list[torch.Tensor]
    up: list[torch.Tensor]


_SECOND = len(lora_glu.Given._fields)


def _read(args: Sequence[Any]) -> tuple[lora_glu.Given, First]:
    return lora_glu.Given(*args[:_SECOND]), First(*args[_SECOND:])


def _apart(
    args: Sequence[Any], second: Implementation, layers: Implementation, norm: Norm | None = None
) -> Results:
    """The same by the functions of the two ops."""
    given, first = _read(args)
    done = second(*given)
    more = {} if norm is None else {"norm": norm}
    found = layers(
        [done.gate_up], first.thin, *first.group, given.grad_room > 0, *first.needs, **more
    )  # fmt: skip
    return Results(
        found.x, found.biases, found.down, found.up, done.biases, done.down, done.up
    )  # fmt: skip


def host_bwd(*args: Any, norm: Norm | None = None) -> Results:
    """The gradients by the references."""
    return _apart(args, lora_glu.host, lora.host_bwd, norm)


def device_bwd(*args: Any, norm: Norm | None = None) -> Results:
    """The gradients, each of the unit's numbers read once beside the large products.

    Args:
        norm: its output is the first group's x, and its input is given.
    """
    given, first = _read(args)
    gate_up, group = given.gate_up, first.group
    width = glu._half_width(gate_up)
    second = given.group(gate_up[..., :width])  # of h's shape; there is no h
    if not joins(given, first, second):
        return _apart(args, lora_glu.device, lora.device_bwd, norm)
    toward = lora_gemm.toward_input(
        given.dys, given.thin, second, given.grad_roomy, given.needs
    )  # fmt: skip
    out = empty_roomy(gate_up.shape, given.grad_room, gate_up.dtype, gate_up.device)
    own: list[torch.Tensor] = []
    both = _together(given, group, toward, out, own)
    found = lora_gemm.toward_input([out], first.thin, group, True, first.needs, both)
    rows = group.x.reshape(-1, group.x.shape[-1])
    down = products.left(group, rows, found.products, first.need_down, norm)
    return Results(found.x, found.biases, down, found.up, toward.biases, own, toward.up)


def _together(
    given: lora_glu.Given,
    group: Group,
    toward: lora_gemm.Toward,
    out: torch.Tensor,
    own: list[torch.Tensor],
) -> Callable[..., Any]:
    """What stands for ``lora_products.both`` of the first group; dA of the second goes to ``own``."""
    gate_up = given.gate_up
    flat = gate_up.reshape(-1, gate_up.shape[-1])
    dh = toward.x.reshape(-1, flat.shape[-1] // 2)

    def both(
        _: Group, g: Tensors, low: torch.Tensor, how: Plan, wide: torch.Tensor | None, copy: bool,
        needs: Needs, copies: Sequence[Copy],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
        height = flat.shape[1]
        made_here = out.reshape(-1, height)
        terms = [
            Term(
                0, b, False, s, None if wide is None else height + at, low[:, at : at + b.shape[1]]
            )
            for b, s, at in zip(group.up, group.scales, how.starts, strict=True)
        ]
        terms = [t._replace(block=j) for t, j in zip(terms, group.member, strict=True)]
        order = sorted(range(2), key=lambda i: group.member[i])
        into = None
        if wide is not None:
            into = Wide(wide, [None, None], 0, (height + how.thin, wide.shape[1]), True)
        made = glu_thin.backward(
            dh, flat, made_here, given.activation, given.gate_first, toward.products[0],
            [terms[i] for i in order], into, copies,
        )  # fmt: skip
        if copy and wide is not None:
            wide[:, :height].copy_(made_here)
        own.append(made.own)
        at = [order.index(i) for i in range(2)]
        dbiases = products.biases(group, g, needs)
        return [made.right[i] for i in at], [made.left[i] for i in at], dbiases

    return both


def joins(given: lora_glu.Given, first: First, second: Group) -> bool:
    """Whether one pass serves: each of gate and up has one adapter, of one rank, and so has h."""
    group, dtype = first.group, given.gate_up.dtype
    width = glu._half_width(given.gate_up)
    heights = [w.shape[0] for w in group.weights]
    shaped = heights == [width, width] and sorted(group.member) == [0, 1]
    ranks = {a.shape[0] for a in group.down}
    wanted = first.need_x and first.need_down and first.need_up and given.need_down
    return (
        shaped
        and wanted
        and len(ranks) == 1
        and len(second.down) == 1
        and _fits(given.gate_up, given.interleaved, [group, second])
        and takes(group, dtype)
        and takes(second, given.dys[0].dtype)
    )


def _fake_bwd(*args: Any) -> Results:
    return _apart(args, lora_glu._fake, lora._fake_bwd)


def _flops_fwd(args: Sequence[Any], out: Any) -> Any:
    pieces, thin, h = out
    return (2 * sum(y.numel() for y in pieces) + 4 * thin.numel()) * h.shape[-1]


def _flops_bwd(args: Sequence[Any], out: Any) -> Any:
    first = First(*args[_SECOND:])
    group = 2 * args[2].numel() + 8 * first.thin.numel()
    return lora_glu._flops(args, out) + group * first.x.shape[-1]


_LAYERS = (
    "Tensor[] {0}weights, Tensor?[] {0}biases, Tensor[] {0}down, Tensor[] {0}up, int[] {0}member, "
    "float[] {0}scales"
)
_FORM = "str activation, bool gate_first, bool interleaved, int room"


OPS = (
    one_way(
        f"lora_glu(Tensor gate_up, {_LAYERS.format('')}, int[] widths, bool grad_roomy, {_FORM}) "
        "-> (Tensor[] ys, Tensor thin, Tensor h)",
        host_fwd,
        device_fwd,
        _fake_fwd,
        _flops_fwd,
    ),
    one_way(
        f"lora_mlp_backward(Tensor[] dys, Tensor thin, Tensor gate_up, {_LAYERS.format('')}, "
        f"{_FORM}, int grad_room, bool grad_roomy, bool need_biases, bool need_down, bool need_up, "
        f"Tensor first_thin, Tensor first_x, {_LAYERS.format('first_')}, bool first_need_x, "
        "bool first_need_biases, bool first_need_down, bool first_need_up) -> (Tensor dx, "
        "Tensor[] first_dbiases, Tensor[] first_ddown, Tensor[] first_dup, Tensor[] dbiases, "
        "Tensor[] ddown, Tensor[] dup)",
        host_bwd,
        device_bwd,
        _fake_bwd,
        _flops_bwd,
    ),
)
