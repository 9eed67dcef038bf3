"""The cut that a planned choice asks for, on whatever joint graph its block has when it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from fusewright.compiler import cut as cuts
from fusewright.compiler import ir
from fusewright.compiler.gated_backward import costs_nothing
from fusewright.compiler.joint import Joint
from fusewright.compiler.planning import work
from fusewright.compiler.planning.devices import Device
from fusewright.compiler.recompute import repeatable


def cost(
    price: float, works: Callable[[fx.Node], work.Work], seconds: Callable[[fx.Node], float]
) -> cuts.Price:
    """What a second run costs in bytes, where ``price`` bytes are worth a second.

    Products may run again. Attention may not: its output and log-sum-exp are small beside its work.
    """

    def of(node: fx.Node) -> float | None:
        if costs_nothing(node):
            return 0.0
        again = repeatable(node) and works(node).kind == "products"
        return price * seconds(node) if again else None

    return of


def at_hints(price: float, device: Device) -> Callable[[Joint], cuts.Cut]:
    """The cut at the sizes that a graph was traced with."""

    def cut(joint: Joint) -> cuts.Cut:
        if math.isinf(price):
            return cuts.minimum(joint, cuts.keep)
        hints = _hints(joint)

        def seconds(node: fx.Node) -> float:
            found = work.of(node)
            amounts = work.Amounts(*(float(e.subs(hints)) for e in found.formulas))
            return found.seconds(device, amounts)

        return cuts.minimum(joint, cost(price, work.of, seconds))

    return cut


def _hints(joint: Joint) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for size in work.sizes(joint.graph):
        for symbol in size.node.expr.free_symbols:
            found[symbol] = ir.traced_symbol(size, symbol)
    return found
