"""A gated unit between adapted layers in a block's backward, as the ops that the halves get have it.

``gated_backward`` and ``gated_layers`` join its calls after the cut. The joined op has more alive at once
than the calls one by one, and takes scratch of its own:

- P of the layers behind the unit lies in the copy of their gradient that was made with room;
- in one pass (``kernels/glu_thin.py``) h is never made, and the thin products' float32 shares are;
- otherwise h is made beside the gradient of gate and up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from fusewright.compiler import gated_backward, gated_layers, ir
from fusewright.compiler.gated_backward import costs_nothing
from fusewright.compiler.joint import Joint
from fusewright.compiler.planning.work import Amounts
from fusewright.kernels import glu_thin, lora_glu, lora_mlp
from fusewright.kernels.device import Limits


@dataclass(frozen=True)
class Unit:
    """The calls of one unit in a joint graph.

    Attributes:
        value: makes h.
        layers: the backward of the layers that read h.
        unit: the unit's own backward.
        first: the backward of the layers that made gate and up, where that is joined too.
        ranks: of an adapter before and of that behind the unit where one pass serves, else None.
        keeps: whether P lies in the copy of the gradient.
    """

    value: fx.Node
    layers: fx.Node
    unit: fx.Node
    first: fx.Node | None
    ranks: tuple[int, int] | None
    keeps: bool

    @property
    def reads(self) -> list[fx.Node]:
        """What must be there before the joined op runs."""
        calls = (self.layers, self.unit, self.first)
        return [i for n in calls if n is not None for i in n.all_input_nodes]

    def passing(
        self, numbers: Mapping[fx.Node, Amounts], limits: Limits | None
    ) -> dict[fx.Node, float]:
        """Bytes that the op takes beside its values, at each of the calls that it stands for."""
        copied = numbers[self.layers].passing if self.keeps else 0.0
        if self.ranks is None or limits is None or self.first is None:
            return {self.unit: copied + numbers[self.value].memory}
        (found,) = [n for n in self.layers.users if n.args[1] == gated_backward.DX]
        dh, taken = ir.value(found), numbers[found].memory
        width = int(dh.shape[-1])
        rows = int(taken // (width * dh.element_size()))
        shares = glu_thin.scratch(rows, width, *self.ranks, limits) if rows else 0
        return {self.unit: copied + shares, self.first: copied}


def forward(units: Collection[Unit]) -> dict[fx.Node, list[fx.Node]]:
    """What the layers behind a unit read in the forward, where ``lora_glu`` makes h for them."""
    return {
        n: [*n.all_input_nodes, *u.value.all_input_nodes]
        for u in units
        for n in u.value.users
        if n is not u.layers
    }


def backward(units: Collection[Unit], again: Collection[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """What the first and the last of a joined op's calls read, where h is to run ``again``."""
    return {n: u.reads for u in units if u.value in again for n in (u.layers, u.first or u.unit)}


def units(joint: Joint) -> tuple[Unit, ...]:
    """The units of a joint graph whose calls would be joined."""
    return tuple(_unit(n) for n in joint.forward if costs_nothing(n) and gated_backward.around(n))


def _unit(value: fx.Node) -> Unit:
    found = gated_backward.around(value)
    assert found is not None
    layers, unit = found
    first = gated_layers.reader(unit)
    down = [ir.value(n) for n in ir.named_arguments(layers)["down"]]
    keeps = bool(down) and all(a.dtype is ir.dtype(value) for a in down)
    ranks = None if first is None else _ranks(value, layers, unit, first)
    return Unit(value, layers, unit, first, ranks, keeps)


def _ranks(
    value: fx.Node, layers: fx.Node, unit: fx.Node, first: fx.Node
) -> tuple[int, int] | None:
    """The ranks where one pass serves; None where it does not."""
    behind, form, own, before = (
        fx.map_arg(ir.named_arguments(n), ir.value) for n in (layers, value, unit, first)
    )
    known = {"room": 0, "grad_room": 0} | own | form | behind
    given = lora_glu.Given(*[known[name] for name in lora_glu.Given._fields])
    made = lora_mlp.First(*[before[name] for name in lora_mlp.First._fields])
    if not lora_mlp.joins(given, made, given.group(ir.value(value))):
        return None
    return int(made.down[0].shape[0]), int(given.down[0].shape[0])
