"""The step's memory over time, and the choices per layer that keep it under a budget."""

from __future__ import annotations

import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fusewright.compiler.planning.block import Measure
from fusewright.compiler.planning.budget import shown
from fusewright.compiler.planning.footing import Footing

FRAGMENTATION = 0.03  # of what comes and goes in a step, lost between blocks of the allocator
_BUCKETS = 4096
_DIVISIONS = 12


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
    """One layer.

    Attributes:
        path: where it is.
        front: what each of its choices costs, from the fastest to the smallest.
        seconds: of a step's run of it that runs nothing again.
        tables: bytes of what it reads and shares with the others, such as rotations.
    """

    path: str
    front: tuple[Measure, ...]
    seconds: float
    tables: float = 0.0


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
    fixed = footing.stays + max((layer.tables for layer in layers), default=0.0)
    picked = [layer.front[c] for layer, c in zip(layers, chosen, strict=True)]
    # The model holds the embeddings' output through its forward, and after that its first reader.
    first = picked[0] if picked else None
    found, saved = [], float(rows) - (first.stream if first else 0.0)
    away = [0.0, *(cost.away for cost in picked)]  # of the layer before
    for layer, cost, near in zip(layers, picked, away, strict=False):
        here = saved + near + cost.away + cost.saved
        found.append(Event(f"forward {layer.path}", fixed + here + cost.forward))
        saved += cost.saved
    saved += (first.held + first.stream if first else 0.0) - rows
    # The last norm's input and output live with the loss.
    head = 2 * rows + away[-1] + footing.head.peak(batch, sequence)
    found.append(Event("head and loss", fixed + saved + head))
    outside = footing.gradients.get("", 0)
    gradients = float(outside)
    for layer, cost, back in reversed(list(zip(layers, picked, _back(picked), strict=True))):
        gradients += footing.gradients.get(layer.path, 0)
        flowing = fixed + gradients + rows  # the gradient that came down
        here = saved + back
        found.append(Event(f"backward {layer.path}", flowing + here + cost.backward))
        saved -= cost.saved
    found.append(Event("optimizer step", footing.stays + gradients))
    return found


def _back(picked: Sequence[Measure]) -> list[float]:
    """For each layer's backward, bytes that have come back from the host's memory, or are on their way.

    A layer's backward fetches what it waits for and what the next one below that waits for any.
    """
    found, waiting = [0.0] * len(picked), 0.0
    for at in reversed(range(len(picked))):
        if picked[at].away:
            below = (cost.away for cost in reversed(picked[:at]) if cost.away)
            waiting = next(below, 0.0)
        found[at] = picked[at].away + waiting
    return found


def peak(
    layers: Sequence[Layer], chosen: Sequence[int], footing: Footing, batch: int, sequence: int
) -> float:
    """The most bytes allocated at any moment of the step; infinite if the host's memory does not do."""
    if away(layers, chosen) > footing.host:
        return math.inf
    return max(e.bytes for e in events(layers, chosen, footing, batch, sequence))


def away(layers: Sequence[Layer], chosen: Sequence[int]) -> float:
    """Bytes that wait in the host's memory between the forward and the backward."""
    return sum(layer.front[c].away for layer, c in zip(layers, chosen, strict=True))


def needed(peak_bytes: float, footing: Footing) -> int:
    """The budget that a peak needs, the allocator's losses included."""
    if math.isinf(peak_bytes):
        return sys.maxsize
    stays = footing.stays
    return int(peak_bytes + FRAGMENTATION * max(peak_bytes - stays, 0.0))


def smallest(layers: Sequence[Layer], footing: Footing, batch: int, sequence: int) -> list[int]:
    """The choices of the least peak, found kind by kind of layer: layers of a kind choose alike.

    A smaller backward may be worth more than what the last layers save. The kind of most layers comes
    first, while all of the host's memory is left.
    """
    lean = [len(layer.front) - 1 for layer in layers]
    best = peak(layers, lean, footing, batch, sequence)
    kinds = [kind for kind, _ in Counter(layer.front for layer in layers).most_common()]
    searching = True
    while searching:
        searching = False
        for kind in kinds:
            for c in range(len(kind)):
                other = [
                    c if layer.front == kind else at for layer, at in zip(layers, lean, strict=True)
                ]
                size = peak(layers, other, footing, batch, sequence)
                if size < best:
                    lean, best, searching = other, size, True
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
    for fast in ([0] * len(layers), kept(layers)):
        least = needed(peak(layers, fast, footing, batch, sequence), footing)
        if least <= budget and recompute(layers, fast) <= recompute(layers, [0] * len(layers)):
            return fast
    lean = smallest(layers, footing, batch, sequence)
    least = needed(peak(layers, lean, footing, batch, sequence), footing)
    if least > budget:
        raise DoesNotFit(budget, least)
    best = lean

    def better(chosen: list[int] | None) -> bool:
        nonlocal best
        if chosen is None:
            return False
        if needed(peak(layers, chosen, footing, batch, sequence), footing) > budget:
            return False
        if recompute(layers, chosen) <= recompute(layers, best):
            best = chosen
        return True

    low = sum(min(c.saved for c in layer.front if not c.away) for layer in layers)
    high = sum(max(c.saved for c in layer.front) for layer in layers)
    for _ in range(12):
        room = (low + high) / 2
        if better(_knapsack(layers, room, lambda cost: not cost.away)):
            low = room
        else:
            high = room
    if any(cost.away for layer in layers for cost in layer.front):
        for room, beside in _divisions(layers, footing, batch * sequence, budget):
            allowed = functools.partial(_fits_beside, beside)
            better(_spared(layers, _knapsack(layers, room, allowed), footing.host, allowed))
    return best


def _spared(
    layers: Sequence[Layer],
    chosen: list[int] | None,
    host: float,
    allowed: Callable[[Measure], bool],
) -> list[int] | None:
    """The choices with less in the host's memory, where it is too much, for the least time a byte.

    What layers save on the device does not grow; the earlier of equal layers change first.
    """
    if chosen is None:
        return None
    chosen = list(chosen)
    total = away(layers, chosen)
    while total > host:
        best: tuple[float, int, int] | None = None
        for at, layer in enumerate(layers):
            now = layer.front[chosen[at]]
            for c, cost in enumerate(layer.front):
                less = now.away - cost.away
                if less > 0 and cost.saved <= now.saved and allowed(cost):
                    way = (cost.seconds - now.seconds) / less, at, c
                    best = way if best is None or way < best else best
        if best is None:
            return None
        _, at, c = best
        total -= layers[at].front[chosen[at]].away - layers[at].front[c].away
        chosen[at] = c
    return chosen


def _fits_beside(room: float, cost: Measure) -> bool:
    return cost.most - cost.saved <= room


def _divisions(
    layers: Sequence[Layer], footing: Footing, tokens: int, budget: int
) -> Iterator[tuple[float, float]]:
    """Ways to divide what a budget leaves: for what all layers save, and for the one that runs.

    What is moved to the host takes nothing of the first, but twice its size of the second.
    """
    stays = footing.stays
    most = (budget + FRAGMENTATION * stays) / (1 + FRAGMENTATION)
    left = most - stays - footing.trained - tokens * footing.row
    high = min(left, sum(max(c.saved for c in layer.front) for layer in layers))
    for part in range(_DIVISIONS + 1):
        room = max(high, 0.0) * part / _DIVISIONS
        yield room, left - room


def kept(layers: Sequence[Layer]) -> list[int]:
    """The fastest choices that need nothing of the host's memory."""
    return [next((i for i, c in enumerate(layer.front) if not c.away), 0) for layer in layers]


def recompute(layers: Sequence[Layer], chosen: Sequence[int]) -> float:
    """Seconds of what is run again."""
    return sum(layer.front[c].seconds for layer, c in zip(layers, chosen, strict=True))


def _knapsack(
    layers: Sequence[Layer], room: float, allowed: Callable[[Measure], bool]
) -> list[int] | None:
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
            if weight >= size or not allowed(cost):
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
