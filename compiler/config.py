"""Options of ``optimize`` and the environment variables, in one table; the only reader of either.

| variable | meaning |
|---|---|
| FUSEWRIGHT_DEBUG | 0 silent; 1 a summary line per region; 2 what fired and what was missed; 3 the graph after each stage; 4 generated kernels |
| FUSEWRIGHT_DUMP | a directory: every stage's graph as Python with provenance, and report.json |
| FUSEWRIGHT_DISABLE | comma-separated names of patterns to leave out |
| FUSEWRIGHT_VERIFY | overrides optimize(verify=...): first_step or off |
| FUSEWRIGHT_PARTITION | what a block's backward is handed: default runs cheap calls again, keep saves everything, torch leaves it to torch |
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VARIABLES = (
    "FUSEWRIGHT_DEBUG",
    "FUSEWRIGHT_DUMP",
    "FUSEWRIGHT_DISABLE",
    "FUSEWRIGHT_VERIFY",
    "FUSEWRIGHT_PARTITION",
)

_CHOICES = {
    "lowering": ("auto", "fx", "inductor"),
    "verify": ("first_step", "off"),
    "logits": ("lazy", "chunked", "eager"),
}


@dataclass(frozen=True)
class Environment:
    """The FUSEWRIGHT_* variables, parsed."""

    debug: int = 0
    dump: Path | None = None
    disable: frozenset[str] = frozenset()
    verify: str | None = None
    partition: str = "default"

    @classmethod
    def read(cls) -> Environment:
        """Parse os.environ; raises ValueError naming the variable when a value is malformed."""
        debug, dump, disable, verify, partition = (
            os.environ.get(name, "").strip() for name in VARIABLES
        )
        if debug and debug not in "01234":
            raise ValueError(f"FUSEWRIGHT_DEBUG must be 0, 1, 2, 3 or 4, got {debug!r}")
        if verify:
            _check("FUSEWRIGHT_VERIFY", verify, _CHOICES["verify"])
        if partition:
            _check("FUSEWRIGHT_PARTITION", partition, ("default", "keep", "torch"))
        return cls(
            debug=int(debug or 0),
            dump=Path(dump) if dump else None,
            disable=frozenset(p.strip() for p in disable.split(",") if p.strip()),
            verify=verify or None,
            partition=partition or "default",
        )


@dataclass(frozen=True)
class Options:
    """What ``optimize`` was asked for; see its docstring."""

    patterns: tuple[Any, ...]
    lowering: str = "auto"
    verify: str = "first_step"
    logits: str = "lazy"
    strict: bool = False
    memory_budget: str | int | float | None = None
    environment: Environment = field(default_factory=Environment)

    @classmethod
    def build(
        cls, catalogue: Sequence[Any], patterns: Sequence[str] | None = None, **given: Any
    ) -> Options:
        """Validate the caller's options; ValueError names the option, the value and the choices."""
        environment = Environment.read()
        for name, choices in _CHOICES.items():
            _check(name, given[name], choices)
        known = [p.name for p in catalogue]
        chosen = known if patterns is None else list(patterns)
        for source, names in (("patterns", chosen), ("FUSEWRIGHT_DISABLE", environment.disable)):
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise ValueError(
                    f"{source}: unknown pattern {unknown[0]!r}; the patterns are {', '.join(known)}"
                )
        if environment.verify:
            given["verify"] = environment.verify
        active = tuple(
            p for p in catalogue if p.name in chosen and p.name not in environment.disable
        )
        return cls(patterns=active, environment=environment, **given)


def _check(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
