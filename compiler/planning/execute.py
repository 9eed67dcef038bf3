"""Carry out a memory plan: made when the first batch's size is known, asked for every block's cut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fusewright.compiler.partition import Asked
from fusewright.compiler.planning.budget import is_size
from fusewright.compiler.planning.devices import Device
from fusewright.compiler.planning.price import at_hints
from fusewright.compiler.records import GraphRecord
from fusewright.compiler.tiles import Parts, split
from fusewright.runtime.offload import Offload

if TYPE_CHECKING:
    from fusewright.compiler.planning.plan import MemoryPlan, Planner


class Way(NamedTuple):
    """How a block runs: the price of its cut, 0 for a checkpoint around it, and whether in tiles."""

    price: float
    tiled: bool


class Memory:
    """The budget of one optimised model and the plan that keeps it.

    Args:
        budget: as the user wrote it.
        device: what the step runs on.
        planner: a planner for (batch, sequence); ValueError where the model cannot be planned.
        note: keeps a line for the report.
    """

    def __init__(
        self,
        budget: str | float,
        device: Device,
        planner: Callable[[tuple[int, int]], Planner],
        note: Callable[[str], None],
    ) -> None:
        self.budget, self.device, self.note = budget, device, note
        self.plan: MemoryPlan | None = None
        self._make = planner
        self._planner: Planner | None = None
        self._failed = self._frugal = False
        self._offload = Offload({})

    def way(self, module: nn.Module, path: str, given: Any) -> Way | None:
        """How the block is to run; None where nothing is planned.

        Raises:
            DoesNotFit: the step cannot be kept under the budget, said before it runs.
        """
        sizes = _sizes(tree_leaves(given))
        if sizes is not None and not self._failed:
            asked = bool(getattr(module, "gradient_checkpointing", False))
            self._plan_for(sizes, asked and not is_size(self.budget))
        return None if self.plan is None else self._way(path)

    def _way(self, path: str) -> Way | None:
        assert self.plan is not None
        price = self.plan.prices.get(path)
        return None if price is None else Way(price, path in self.plan.tiled)

    def shares(self, path: str) -> bool:
        """Whether another block runs in the same way as the one at ``path``."""
        way = None if self.plan is None else self._way(path)
        return way is None or sum(self._way(p) == way for p in self.plan.prices) > 1  # type: ignore[union-attr]

    def tiled(self, gm: fx.GraphModule, path: str, record: GraphRecord) -> Parts | None:
        """The parts of the block that runs at ``path``, if its tail is to run in tiles."""
        tiled = self.plan is not None and path in self.plan.tiled and record.kind == "block"
        return split(gm) if tiled else None

    def _plan_for(self, sizes: tuple[int, int], frugal: bool) -> None:
        """Plan once, and again when a larger batch comes or checkpointing is switched."""
        known = self.plan is not None and frugal == self._frugal
        if known and math.prod(sizes) <= self.plan.batch * self.plan.sequence:  # type: ignore[union-attr]
            return
        self._frugal = frugal
        from fusewright.compiler.planning.observed import NotPlannable

        try:
            if self._planner is None:
                with torch.random.fork_rng():  # dropout's masks must not depend on being planned
                    self._planner = self._make(sizes)
            self.plan = self._planner.plan(self.budget, sizes, frugal)
        except NotPlannable as error:
            self._failed = True
            self.note(f"memory_budget: {error}; the blocks keep what they would without a budget")
            return
        order = {path: place for place, path in enumerate(self.plan.prices)}
        self._offload = Offload({path: order[path] for path in self.plan.offloaded})
        made = ", ".join(f"{count} x {name}" for name, count in self.plan.counts.items())
        self.note(
            f"memory_budget: for {sizes[0]} x {sizes[1]} tokens: {made}; predicted peak "
            f"{int(self.plan.peak)} of {self.plan.budget} bytes"
            + (", no more than with every block under a checkpoint" if frugal else "")
        )

    def around(self, path: str, module: nn.Module, given: Any) -> AbstractContextManager[None]:
        """The context of the forward of the block at ``path``: what it saves may go to the host."""
        return self._offload.of(path, module, given)

    def asked(self, graph: fx.Graph, path: str, record: GraphRecord) -> Asked | None:
        """How the block that runs at ``path`` is to be split; None where nothing is planned."""
        price = None if self.plan is None else self.plan.prices.get(path)
        if price is None or record.kind != "block" or not torch.is_grad_enabled():
            return None

        def tell(chosen: Any) -> None:
            record.partitioned = chosen

        if price == 0 or math.isinf(price):  # within a checkpoint cheap calls run again, as ever
            return Asked.of(graph, "keep" if price else "default", tell)
        level = f"a second is worth {price:.6g} bytes on {self.device.name}"
        return dataclasses.replace(Asked.of(graph, level, tell), cut=at_hints(price, self.device))


def _sizes(values: Iterable[Any]) -> tuple[int, int] | None:
    """(batch, sequence) of the first tensor that looks like hidden states."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point():
            return int(value.shape[0]), int(value.shape[1])
    return None
