"""How Dynamo captures: its settings around each call of a compiled region, and which sizes vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

RECOMPILE_LIMIT = 64


class _Functions(list[Any]):
    """Functions to look up, in a list that is empty to whoever serialises it.

    Dynamo asks for membership only, and logs its settings as JSON, which functions are not.
    """

    def __init__(self, functions: set[Any]) -> None:
        super().__init__()
        self._functions = functions

    def __contains__(self, function: object) -> bool:
        return function in self._functions


def settings_of(kind: str) -> Callable[[], Callable[[], None]]:
    """A function that applies our Dynamo settings and returns the one that takes them back.

    Applied around each call of a compiled region only, since Dynamo reads them when it compiles. A
    region may have RECOMPILE_LIMIT variants; a logger's call does not break the graph; floats (eps,
    scales) stay literals. Rows of tensors are symbolic from the start (:func:`mark_rows`) and
    feature widths literal. Integers are literal in blocks; the head reads ones that change from step
    to step (a number of items), which Dynamo finds out. Fake tensors' results are not cached: with
    symbolic sizes an entry costs more than it saves. Garbage is left to Python to find.
    """
    import logging

    from torch._dynamo import config

    once = getattr(logging.Logger, "warning_once", None)
    loggers = {logging.Logger.warning, logging.Logger.info} | ({once} if once else set())
    ignored = "ignore_logging_functions"
    if not hasattr(config, ignored):
        ignored = "ignore_logger_methods"
    changes: dict[str, Any] = {
        "specialize_float": True,
        "fake_tensor_cache_enabled": False,
        "run_gc_after_compile": False,
        "recompile_limit": RECOMPILE_LIMIT,
        "accumulated_recompile_limit": 64 * RECOMPILE_LIMIT,
        ignored: _Functions(loggers | set(getattr(config, ignored))),
    }
    if kind != "head":
        changes["specialize_int"] = True
    return _for_logs_alone(config._make_closure_patcher(**changes))


def _for_logs_alone(apply: Callable[[], Callable[[], None]]) -> Callable[[], Callable[[], None]]:
    """The same settings, without what Dynamo does for its logs whether they are read or not.

    It times the guards that it makes and empties the processor's caches before, 40 to 70 ms for each
    graph; it tokenizes every file that the code is of, to name functions by their lines, 0.2 s; and of
    every module that it meets it writes down all parameters below it by name, which are inputs anyway.
    """
    from torch._dynamo import guards, output_graph, symbolic_convert

    spared = (
        (guards, "profile_guard_manager", lambda *_: 0.0),
        (symbolic_convert, "get_funcname", lambda *_: None),
        (output_graph.OutputGraph, "add_fqn_info_for_inlined_modules", lambda *_: None),
    )
    known = [(owner, name, instead) for owner, name, instead in spared if hasattr(owner, name)]

    def applied() -> Callable[[], None]:
        revert = apply()
        before = [getattr(owner, name) for owner, name, _ in known]
        for owner, name, instead in known:
            setattr(owner, name, instead)

        def reverted() -> None:
            for (owner, name, _), was in zip(known, before, strict=True):
                setattr(owner, name, was)
            revert()

        return reverted

    return applied


def mark_rows(values: Any) -> None:
    """Tell Dynamo which sizes of these tensors vary: all but the width of a floating one.

    A square floating tensor of rank four is an attention mask, and varies in its last two. Sizes of
    one are left alone by Dynamo.
    """
    for value in values:
        if type(value) is tuple:
            mark_rows(value)
        elif type(value) is torch.Tensor and "_dynamo_weak_dynamic_indices" not in value.__dict__:
            rank = value.dim()
            square = rank == 4 and value.shape[2] == value.shape[3]
            features = (value.is_floating_point() or value.is_complex()) and not square
            rows = rank - 1 if features else rank
            torch._dynamo.maybe_mark_dynamic(value, list(range(rows)))
