"""A recording as a function: straight-line Python, written out and compiled once.

Closures that call each other cost a microsecond a step; here a step is a line, a tensor is a local
variable that is deleted behind its last use, and whatever is no number stands in the globals.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

_NAME = re.compile(r"\b[tpv]\d+\b")
_LITERALS = (int, bool, str, type(None))


def _read(text: str) -> list[str]:
    """The variables that must live for a line: who reads an address reads its tensor."""
    return [name for v in _NAME.findall(text) for name in (v, f"t{v[1:]}" if v[0] == "p" else v)]


class Program:
    """Lines of a function ``run(tensors, pointers)`` and the values that they name.

    Origin ``n`` is the variable ``t<n>`` and its address ``p<n>``; the first ones are the arguments.
    Of what a line makes it must be the first to tell (``made``), so that it lives as long as it is read.
    """

    def __init__(self) -> None:
        self._lines: list[tuple[str, tuple[str, ...]]] = []
        self._globals: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        self._numbers = itertools.count()

    def value(self, value: Any) -> str:
        """How a constant is written."""
        if type(value) in _LITERALS:
            return repr(value)
        if type(value) is tuple:
            return f"({''.join(f'{self.value(v)}, ' for v in value)})"
        if type(value) is list:
            return f"[{', '.join(map(self.value, value))}]"
        name = self._names.get(id(value))
        if name is None:
            name = self._names[id(value)] = f"k{len(self._names)}"
            self._globals[name] = value  # which keeps it, and so its id
        return name

    def view(self) -> str:
        """A new variable for a tensor that is no origin."""
        return f"v{next(self._numbers)}"

    def line(self, text: str, *made: str) -> None:
        """Add a line that makes these variables."""
        self._lines.append((text, made))

    def function(
        self, tensors: Iterable[int], pointers: Iterable[int], results: str
    ) -> Callable[..., Any]:
        """The function whose arguments are these origins and that returns ``results``."""
        last: dict[str, int] = {}
        for at, (text, _) in enumerate(self._lines):
            last.update(dict.fromkeys(_read(text), at))
        last.update(dict.fromkeys(_read(results), len(self._lines)))
        ends: dict[int, list[str]] = {}
        for name in itertools.chain.from_iterable(made for _, made in self._lines):
            ends.setdefault(last[name], []).append(name)
        body = ["def run(tensors, pointers):"]
        for names, given in (("t", tensors), ("p", pointers)):
            if listed := "".join(f"{names}{n}, " for n in given):
                body.append(f"    {listed}= {'tensors' if names == 't' else 'pointers'}")
        for at, (text, _) in enumerate(self._lines):
            gone = [n for n in ends.get(at, ()) if not n.startswith("p")]
            body.append(f"    {text}" + (f"; del {', '.join(gone)}" if gone else ""))
        body.append(f"    return {results}")
        exec(compile("\n".join(body), "<plan>", "exec"), self._globals)  # noqa: S102
        run: Callable[..., Any] = self._globals["run"]
        return run
