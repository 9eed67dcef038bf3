"""Which modules' parameters were moved, and whether they still lie where they were put.

``.to()``, a deep copy or a loader gives a parameter new memory; what was moved is moved again then,
before the region runs. What may not be moved stays, and the reason is noted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from fusewright.compiler.storage import Wish, densify, parameters, provide, sharder


class _Place(NamedTuple):
    parameter: nn.Parameter
    address: int


class Stored:
    """The moved parameters of one optimised model.

    Args:
        note: takes a line for the report.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._wishes: dict[type, dict[tuple[str, ...], Wish]] = {}
        self._places: weakref.WeakKeyDictionary[nn.Module, list[_Place]]
        self._places = weakref.WeakKeyDictionary()
        self._refused: weakref.WeakKeyDictionary[nn.Module, set[tuple[str, ...]]]
        self._refused = weakref.WeakKeyDictionary()

    def check(self, module: nn.Module, path: str) -> None:
        """Move the module's parameters as its class asks for, if they are not so."""
        places = self._places.get(module)
        if places is None:
            if type(module) in self._wishes:
                self._provide(module, path)
        elif any(p.parameter.data_ptr() != p.address for p in places):
            self._provide(module, path)

    def ask(self, module: nn.Module, path: str, wishes: Sequence[Wish]) -> None:
        """From now on the parameters of all modules of this class are to lie so."""
        known = self._wishes.setdefault(type(module), {})
        known.update((w.paths, w) for w in wishes)
        self._provide(module, path)

    def expect(self, module: nn.Module, wishes: Sequence[Wish]) -> None:
        """Have them asked for when a module of this class next runs, where they are of use."""
        for wish in wishes:
            parts = parameters(module, wish.paths)
            if parts and wish.storage.pays(parts):
                self._wishes.setdefault(type(module), {}).setdefault(wish.paths, wish)

    def missing(self, module: nn.Module, wishes: Sequence[Wish]) -> list[Wish]:
        """The wishes that could be met and are not."""
        refused = self._refused.get(module, set())
        out = []
        for wish in wishes:
            parts = parameters(module, wish.paths)
            if parts is None or wish.paths in refused:
                continue
            if not wish.storage.holds([p.data for p in parts]):
                out.append(wish)
        return out

    def release(self) -> None:
        """Give every moved parameter memory of its own again."""
        for places in self._places.values():
            for place in places:
                densify(place.parameter)
        self._places.clear()

    def _provide(self, module: nn.Module, path: str) -> None:
        places = []
        shared = sharder(module)
        for paths, wish in self._wishes[type(module)].items():
            parts = parameters(module, paths)
            if parts is None:
                continue
            reason = shared or provide(parts, wish.storage)
            if reason:
                self._refused.setdefault(module, set()).add(paths)
                first = f"{path}.{paths[0]}"
                self._note(f"{wish.storage.name}: {first} stays as it is stored: {reason}")
            else:
                places += [_Place(p, p.data_ptr()) for p in parts]
        self._places[module] = places
