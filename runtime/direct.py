"""Launch a compiled kernel by the function that Triton's launcher ends in.

The launcher is Python: it asks whether the kernel wants scratch memory and puts a few constants beside
the arguments, two microseconds on a slow host, again for every launch. What it puts there is found
by calling a copy of it once, with marks for arguments and an ear in place of its last function. So
nothing is assumed of a version of Triton; a launcher that does anything else with its arguments, such
as scratch memory that is sized by the grid, keeps being called itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple


class Direct(NamedTuple):
    """How to call ``launch``: before, grid, stream, after, then the arguments.

    The arguments come one by one, or as one tuple where ``packed``.
    """

    launch: Callable[..., Any]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    packed: bool


def _same(these: tuple[Any, ...], those: tuple[Any, ...]) -> bool:
    return len(these) == len(those) and all(a is b for a, b in zip(these, those, strict=True))


def direct(run: Any, fixed: tuple[Any, ...], count: int) -> Direct:
    """The way past ``run(*grid, stream, *fixed, *arguments)`` with ``count`` arguments.

    Where there is none, the way that ``run`` itself is.
    """
    itself = Direct(run, (), fixed, False)
    if not callable(getattr(run, "launch", None)):
        return itself
    heard: list[tuple[Any, ...]] = []
    ear = copy.copy(run)
    ear.launch = lambda *given: heard.append(given)
    head, arguments = (tuple(object() for _ in range(n)) for n in (4, count))
    try:
        ear(*head, *fixed, *arguments)
    except (AttributeError, TypeError):  # it computes with what it is given
        return itself
    if len(heard) != 1:
        return itself
    (given,) = heard
    packed = isinstance(given[-1], tuple) and _same(given[-1], arguments)
    end = len(given) - (1 if packed else count)
    if not packed and not _same(given[end:], arguments):
        return itself
    for at in range(end - 3):
        if _same(given[at : at + 4], head):
            return Direct(run.launch, given[:at], given[at + 4 : end], packed)
    return itself
