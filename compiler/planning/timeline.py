"""The step's memory over time, and the choices per layer that keep it under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusewright.compiler.planning.block import Measure
from fusewright.compiler.planning.budget import shown
from fusewright.compiler.planning.footing import Footing

FRAGMENTATION = 0.03  # of what comes and goes in a step, lost between blocks of the allocator
_BUCKETS = 4096


class DoesNotFit(ValueError):
    """No choice keeps the peak under the budget; ``least`` is the smallest budget that works."""

    def __init__(self, budget: int, least: int) -> None:
        self.budget, self.least = budget, least
        super().__init__(
            f"memory_budget: {shown(budget)} do not hold this step; the least that does is "
            f"{shown(least)} ({least} bytes)"
        )


@dataclass(frozen=True)
class Layer:
    """One layer: where it is, and what each of its choices costs, from the fastest to the smallest."""

    path: str
    front: tuple[Measure, ...]
    seconds: float


@dataclass(frozen=True)
class Event:
    """A moment of the step and the bytes that are allocated then."""

    name: str
    bytes: float


def events(
    layers: Sequence[Layer], chosen: Sequence[int], footing: Footing, batch: int, sequence: int
) -> list[Event]:
    """The step's moments in order: each layer's forward, the head, each layer's backward, the step."""
    rows = batch * sequence * footing.row
    fixed = footing.parameters + footing.optimizer
    picked = [layer.front[c] for layer, c in zip(layers, chosen, strict=True)]
    found, saved = [], float(rows)  # the embeddings' output
    for layer, cost in zip(layers, picked, strict=True):
        found.append(Event(f"forward {layer.path}", fixed + saved + cost.saved + cost.forward))
        saved += cost.saved
    # The last norm's input and output live with the loss.
    head = 2 * rows + footing.head.peak(batch, sequence)
    found.append(Event("head and loss", fixed + saved + head))
    outside = footing.gradients.get("", 0)
    gradients = float(outside)
    for layer, cost in reversed(list(zip(layers, picked, strict=True))):
        gradients += footing.gradients.get(layer.path, 0)
        flowing = fixed + gradients + rows  # the gradient that came down
        found.append(Event(f"backward {layer.path}", flowing + saved + cost.backward))
        saved -= cost.saved
    found.append(Event("optimizer step", fixed + gradients))
    return found


def peak(
    layers: Sequence[Layer], chosen: Sequence[int], footing: Footing, batch: int, sequence: int
) -> float:
    """The most bytes allocated at any moment of the step."""
    return max(e.bytes for e in events(layers, chosen, footing, batch, sequence))


def needed(peak_bytes: float, footing: Footing) -> int:
    """The budget that a peak needs, the allocator's losses included."""
    stays = footing.parameters + footing.optimizer
    return int(peak_bytes + FRAGMENTATION * max(peak_bytes - stays, 0.0))


def smallest(layers: Sequence[Layer], footing: Footing, batch: int, sequence: int) -> list[int]:
    """The choices of the least peak: each layer saves its least, or where that is better does less again."""
    lean = [len(layer.front) - 1 for layer in layers]
    best = peak(layers, lean, footing, batch, sequence)
    for depth in range(1, max(len(layer.front) for layer in layers)):
        # A smaller backward may be worth more than what the last layers save.
        other = [max(0, len(layer.front) - 1 - depth) for layer in layers]
        size = peak(layers, other, footing, batch, sequence)
        if size < best:
            lean, best = other, size
    return _lower(layers, lean, footing, batch, sequence)


def _lower(
    layers: Sequence[Layer], lean: list[int], footing: Footing, batch: int, sequence: int
) -> list[int]:
    """From the last layer down, choices whose backward is smaller, for as long as the peak falls.

    The last layers' backwards come when everything else is still saved.
    """
    best = peak(layers, lean, footing, batch, sequence)
    for at in reversed(range(len(layers))):
        ways = []
        for c in range(len(layers[at].front)):
            other = [*lean[:at], c, *lean[at + 1 :]]
            ways.append((peak(layers, other, footing, batch, sequence), -c, other))
        size, _, other = min(ways)
        if size >= best:
            break
        lean, best = other, size
    return lean


def choose(
    layers: Sequence[Layer], footing: Footing, batch: int, sequence: int, budget: int
) -> list[int]:
    """Per layer the place of its choice: the least time whose peak stays under the budget.

    A knapsack over the layers: bytes saved are the weights, seconds of recompute the cost. What is
    alive beside the saved values at the worst moment depends on the choices, so the room for them is
    narrowed until the simulated step fits.

    Raises:
        DoesNotFit: no choice does.
    """
    fast = [0] * len(layers)
    if needed(peak(layers, fast, footing, batch, sequence), footing) <= budget:
        return fast
    lean = smallest(layers, footing, batch, sequence)
    least = needed(peak(layers, lean, footing, batch, sequence), footing)
    if least > budget:
        raise DoesNotFit(budget, least)
    low = sum(layer.front[c].saved for layer, c in zip(layers, lean, strict=True))
    high = sum(layer.front[0].saved for layer in layers)
    best = lean
    for _ in range(12):
        room = (low + high) / 2
        chosen = _knapsack(layers, room)
        fits = chosen is not None and (
            needed(peak(layers, chosen, footing, batch, sequence), footing) <= budget
        )
        if fits and chosen is not None:
            low = room
            if recompute(layers, chosen) <= recompute(layers, best):
                best = chosen
        else:
            high = room
    return best


def recompute(layers: Sequence[Layer], chosen: Sequence[int]) -> float:
    """Seconds of what is run again."""
    return sum(layer.front[c].seconds for layer, c in zip(layers, chosen, strict=True))


def _knapsack(layers: Sequence[Layer], room: float) -> list[int] | None:
    """The least recompute whose saved bytes come to at most ``room``; sizes are rounded up."""
    unit = max(room / _BUCKETS, 1.0)
    size = int(room // unit) + 1
    best = np.full(size, np.inf)
    best[0] = 0.0
    picks = []
    for layer in layers:
        after = np.full(size, np.inf)
        pick = np.zeros(size, dtype=np.int16)
        for c, cost in enumerate(layer.front):
            weight = int(np.ceil(cost.saved / unit))
            if weight >= size:
                continue
            moved = np.full(size, np.inf)
            moved[weight:] = best[: size - weight] + cost.seconds
            better = moved < after
            after[better], pick[better] = moved[better], c
        picks.append(pick)
        best = after
    if not np.isfinite(best).any():
        return None
    at = int(np.argmin(best))
    chosen: list[int] = []
    for layer, pick in zip(reversed(layers), reversed(picks), strict=True):
        c = int(pick[at])
        chosen.append(c)
        at -= int(np.ceil(layer.front[c].saved / unit))
    chosen.reverse()
    return _early_first(layers, chosen)


def _early_first(layers: Sequence[Layer], chosen: list[int]) -> list[int]:
    """Among equal layers the earlier ones run more again: their backwards come when less is alive."""
    groups: dict[tuple[Measure, ...], list[int]] = {}
    for i, layer in enumerate(layers):
        groups.setdefault(layer.front, []).append(i)
    ordered = list(chosen)
    for places in groups.values():
        for i, c in zip(places, sorted((chosen[i] for i in places), reverse=True), strict=True):
            ordered[i] = c
    return ordered
