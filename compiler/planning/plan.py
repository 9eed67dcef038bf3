"""A memory plan: what every layer keeps and runs again, and what the step's peak and time come to."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fusewright.compiler import regions, tiles
from fusewright.compiler.match import Pattern
from fusewright.compiler.planning import block as blocks
from fusewright.compiler.planning import budget as budgets
from fusewright.compiler.planning import footing, liveness, observed, tiling, timeline
from fusewright.compiler.planning.bare import without_weights
from fusewright.compiler.planning.devices import GIB, Device, workspaces
from fusewright.compiler.planning.timeline import DoesNotFit, Event, Layer

_SHARES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.0)  # of the way from the least to the most memory
_LONGEST = 2**24


@dataclass(frozen=True)
class Row:
    """One line of the table of budgets: bytes, predicted peak, seconds a step, seconds run again."""

    budget: int
    peak: float
    seconds: float
    again: float


@dataclass
class MemoryPlan:
    """The fastest step that fits, as predicted.

    Attributes:
        device, batch, sequence: what it was made for.
        budget: bytes it must stay under.
        peak: bytes allocated at the worst moment.
        seconds: of the step, kernels alone.
        again: seconds of it that recompute what was not saved.
        layers: path -> name of its choice.
        prices: path -> the price that its cut was made with (bytes of memory a second is worth).
        offloaded: paths of the layers whose saved values are in the host's memory in between.
        tiled: paths of the layers whose tail, the part after attention, runs in tiles of rows.
        timeline: the step's moments.
        resting: bytes that are there between steps, by what they are of; a part of every moment.
        notes: what the figures do not hold.
        later: attribute -> what works it out when it is first asked for; a step needs none of them.
    """

    device: str
    batch: int
    sequence: int
    budget: int
    peak: float
    seconds: float
    again: float
    layers: dict[str, str]
    prices: dict[str, float]
    offloaded: list[str]
    tiled: list[str]
    timeline: list[Event]
    resting: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    later: dict[str, Callable[[], Any]] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def formulas(self) -> dict[str, str]:
        """Kind of choice -> bytes that a layer saves, over batch and sequence."""
        found: dict[str, str] = self.later["formulas"]()
        return found

    @functools.cached_property
    def table(self) -> list[Row]:
        """Budgets and what they give, from the most useful to the least that fits."""
        found: list[Row] = self.later["table"]()
        return found

    @functools.cached_property
    def longest(self) -> int:
        """Tokens a row that would still fit the budget, at its smallest choices."""
        return int(self.later["longest"]())

    @property
    def counts(self) -> dict[str, int]:
        """How many layers make each choice."""
        return dict(Counter(self.layers.values()))

    def to_json(self) -> str:
        """All of it; sizes in bytes, times in seconds."""
        worked_out = {name: getattr(self, name) for name in ("formulas", "longest")}
        values = {k: v for k, v in vars(self).items() if k not in ("timeline", "table", "later")}
        values |= worked_out
        values["prices"] = {k: (None if v == float("inf") else v) for k, v in self.prices.items()}
        values["timeline"] = [vars(e) for e in self.timeline]
        values["table"] = [vars(r) for r in self.table]
        return json.dumps(values, indent=1)

    def __getstate__(self) -> dict[str, Any]:
        """Everything worked out, and nothing of the planner."""
        for name in self.later:
            getattr(self, name)
        return vars(self) | {"later": {}}

    def __str__(self) -> str:
        from fusewright.compiler.planning.chart import text

        return text(self)


class Planner:
    """A model's blocks, observed once, and the plans that follow from them.

    Args:
        model: on the meta device, in training mode.
        inputs: (batch, sequence) -> the keyword arguments of its forward.
        catalogue: the patterns.
        device: what the step will run on.
        sizes: (batch, sequence) of the step.
        optimizer: a name of ``footing.OPTIMIZERS``.
        lowering: as for ``fusewright.optimize``.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Callable[[int, int], Mapping[str, Any]],
        catalogue: Sequence[Pattern],
        device: Device,
        sizes: tuple[int, int],
        optimizer: str = "adamw",
        lowering: str = "auto",
    ) -> None:
        batch, sequence = sizes
        on_gpu = device.limits is not None
        over = lowering == "fx" or (lowering == "auto" and not on_gpu)
        # A size of one would be a constant, and equal ones the same symbol.
        traced = (batch + (batch in (1, sequence)), sequence)
        traced = (traced[0] + (traced[0] == sequence), sequence)
        self.device, self.sizes = device, sizes
        seen = observed.observe(model, catalogue, inputs(*traced), over)
        built = []
        self._tilings: list[Callable[[], None]] = []
        for joint, parts, paths in seen.joints:
            made = blocks.build(joint, traced, device, sizes)
            built.append((made, paths))
            if parts is not None:
                self._tilings.append(functools.partial(_tile, made, parts, traced, device, over))
        order = [path for path, _ in regions.find(model).blocks]
        owner = {path: b for b, paths in built for path in paths}
        self.blocks = [(path, owner[path]) for path in order if path in owner]
        self.missed, self.wishes = seen.missed, seen.wishes
        weight = getattr(model, "get_output_embeddings", lambda: None)()
        trained = weight is not None and any(p.requires_grad for p in weight.parameters())
        head = footing.head_of(seen.head, trained, traced)
        width = weight.in_features if isinstance(weight, nn.Linear) else 0
        element = weight.weight.element_size() if isinstance(weight, nn.Linear) else 2
        found = footing.of(model, order, head, width * element, optimizer)
        self.footing = dataclasses.replace(
            found,
            host=device.host_memory,
            room=footing.room_of(model, order, seen.wishes) if on_gpu else 0,
            workspace=workspaces(device),
        )

    def layers(self, batch: int, sequence: int) -> list[Layer]:
        """The layers with the costs of their choices at one size."""
        if tiles.worth(batch * sequence):
            with torch.enable_grad():  # a plan may be asked anywhere
                for build in self._tilings:
                    build()
            self._tilings.clear()
        found: dict[int, tuple[Any, ...]] = {}
        for _, b in self.blocks:
            if id(b) not in found:
                front = tuple(
                    liveness.measure(b, c, self.device, batch, sequence)
                    for c in b.usable(batch, sequence)
                )
                spent = liveness.forward_seconds(b, self.device, batch, sequence)
                spent += liveness.backward_seconds(b, self.device, batch, sequence)
                tables = sum(b.numbers(batch, sequence)[n].memory for n in b.tables)
                found[id(b)] = front, spent, tables
        return [Layer(path, *found[id(b)]) for path, b in self.blocks]

    def seconds(self, layers: Sequence[Layer], batch: int, sequence: int) -> float:
        """Of a step that runs nothing again."""
        head = self.footing.head.flops(batch, sequence) / self.device.products
        step = footing.optimizer_seconds(self.footing, self.device)
        return sum(layer.seconds for layer in layers) + head + step

    def plan(
        self, budget: str | float, sizes: tuple[int, int] | None = None, frugal: bool = False
    ) -> MemoryPlan:
        """The fastest step under a budget, of another (batch, sequence) if given.

        With ``frugal`` its peak is also at most that of a checkpoint around every block.

        Raises:
            DoesNotFit: none does; its ``least`` is the smallest budget that works.
            ValueError: the budget is no size.
        """
        size = budgets.parse(budget, self.device.memory)
        self.sizes = batch, sequence = sizes or self.sizes
        layers = self.layers(batch, sequence)
        if frugal:
            size = min(size, self.checkpointed(batch, sequence))
        chosen = timeline.choose(layers, self.footing, batch, sequence, size)
        moments = timeline.events(layers, chosen, self.footing, batch, sequence)
        again = timeline.recompute(layers, chosen)
        picked = [
            b.usable(batch, sequence)[c] for (_, b), c in zip(self.blocks, chosen, strict=True)
        ]
        named = {path: c.label for (path, _), c in zip(self.blocks, picked, strict=True)}
        return MemoryPlan(
            device=self.device.name,
            batch=batch,
            sequence=sequence,
            budget=size,
            peak=max(e.bytes for e in moments),
            seconds=self.seconds(layers, batch, sequence) + again,
            again=again,
            layers=named,
            prices={p: c.price for (p, _), c in zip(self.blocks, picked, strict=True)},
            offloaded=[p for (p, _), c in zip(self.blocks, picked, strict=True) if c.away],
            tiled=[p for (p, _), c in zip(self.blocks, picked, strict=True) if c.tiled],
            timeline=moments,
            resting=self.footing.parts,
            notes=self._notes(),
            later={
                "formulas": functools.partial(
                    _formulas, [(b, c) for _, b in self.blocks for c in b.choices]
                ),
                "table": functools.partial(self.table, layers, self.sizes),
                "longest": functools.partial(self.longest, size, batch),
            },
        )

    def checkpointed(self, batch: int, sequence: int) -> int:
        """The budget that a step with a checkpoint around every block needs."""
        layers = []
        for path, b in self.blocks:
            cost = liveness.measure(b, blocks.whole(b.joint), self.device, batch, sequence)
            tables = sum(b.numbers(batch, sequence)[n].memory for n in b.tables)
            layers.append(Layer(path, (cost,), 0.0, tables))
        top = timeline.peak(layers, [0] * len(layers), self.footing, batch, sequence)
        return timeline.needed(top, self.footing)

    def table(self, layers: Sequence[Layer], sizes: tuple[int, int]) -> list[Row]:
        """What budgets between the least and the most useful give at one (batch, sequence)."""
        lean = timeline.smallest(layers, self.footing, *sizes)
        least = timeline.needed(timeline.peak(layers, lean, self.footing, *sizes), self.footing)
        fast = timeline.kept(layers)
        most = timeline.needed(timeline.peak(layers, fast, self.footing, *sizes), self.footing)
        rows = []
        plain = self.seconds(layers, *sizes)
        for share in _SHARES:
            size = int(least + share * max(most - least, 0)) + 1
            chosen = timeline.choose(layers, self.footing, *sizes, size)
            again = timeline.recompute(layers, chosen)
            top = timeline.peak(layers, chosen, self.footing, *sizes)
            rows.append(Row(size, top, plain + again, again))
        return rows

    def longest(self, budget: int, batch: int) -> int:
        """The most tokens a row of so many, in steps of 1 %, that fit; 0 if none do."""

        def fits(sequence: int) -> bool:
            layers = self.layers(batch, sequence)
            lean = timeline.smallest(layers, self.footing, batch, sequence)
            top = timeline.peak(layers, lean, self.footing, batch, sequence)
            return timeline.needed(top, self.footing) <= budget

        low, high = 0, 2
        while high <= _LONGEST and fits(high):
            low, high = high, 2 * high
        while high - low > max(1, low // 100):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _notes(self) -> list[str]:
        notes = []
        if self.missed:
            some = ", ".join(self.missed[:3])
            notes.append(f"{len(self.missed)} blocks were not captured and are not counted: {some}")
        if self.footing.head.logits:
            notes.append("the head was not rewritten: its logits are held whole")
        return notes


def _formulas(ways: Sequence[tuple[blocks.Block, blocks.Choice]]) -> dict[str, str]:
    return {choice.label: str(block.formula(choice)) for block, choice in ways}


def _tile(
    block: blocks.Block, parts: tiles.Parts, traced: tuple[int, int], device: Device, over: bool
) -> None:
    """Add a block's choices with tiles, worked out for a row of enough tokens."""
    sizes = 1, 16 * tiles.TOKENS
    built = tiling.build(parts, traced, device, sizes, over)
    if built is not None:
        blocks.tile(block, built, device, sizes)


def text_inputs(model: nn.Module) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """Token ids and labels for a language model."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = int(getattr(embedding, "num_embeddings", 0) or 2)

    def inputs(batch: int, sequence: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, (batch, sequence))
        return {"input_ids": ids, "labels": ids.to("meta")}

    return inputs


__all__ = ["GIB", "DoesNotFit", "MemoryPlan", "Planner", "Row", "text_inputs", "without_weights"]
