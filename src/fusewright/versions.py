"""The packages that Fusewright works with: the oldest supported versions, and how to get them."""

from __future__ import annotations

import sys
import warnings
from importlib import metadata

# Package -> the oldest version that is supported; None where any will do.
OLDEST: dict[str, tuple[int, ...] | None] = {
    "torch": (2, 11),
    "triton": (3, 6),
    "transformers": (5, 17),
    "peft": (0, 21),
    "bitsandbytes": (0, 50),
    "accelerate": (1, 15),
    "trl": (1, 14),
    "networkx": (3, 2),
    "sympy": (1, 13),
    "rich": (13, 7),
    "jinja2": (3, 1),
}
_EXTRAS = {
    "transformers": "hf",
    "peft": "hf",
    "accelerate": "hf",
    "bitsandbytes": "qlora",
    "trl": "trl",
    "jinja2": "report",
}
# What a model can be made of, and so what matters to ``optimize`` once it is imported.
_OF_MODELS = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl")


class UnsupportedVersion(UserWarning):
    """A package is older than what Fusewright is tested with."""


def installed(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    out = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        out.append(int(part))
    return tuple(out)


def install_line(name: str) -> str:
    """The command that installs a package in a version that is supported."""
    least = OLDEST[name]
    if name in _EXTRAS:
        return f"pip install -U 'fusewright[{_EXTRAS[name]}]'"
    wanted = f"{name}>={'.'.join(map(str, least))}" if least else name
    return f"pip install -U '{wanted}'"


def obstacle(name: str, have: str | None) -> str:
    """What is wrong with version ``have`` of a package and what to do about it; "" if nothing is."""
    least = OLDEST[name]
    if have is None:
        return f"{name} is not installed: {install_line(name)}"
    if least is not None and numbers(have) < least:
        return f"{name} {have} is older than {'.'.join(map(str, least))}: {install_line(name)}"
    return ""


def unsupported() -> list[str]:
    """A line for each package that is imported, is older than supported, and models are made of."""
    found = []
    for name in _OF_MODELS:
        have = installed(name) if name in sys.modules else None
        if have is not None and (line := obstacle(name, have)):
            found.append(line)
    return found


def warn_of_unsupported(strict: bool = False) -> list[str]:
    """Warn of what :func:`unsupported` names, and return it.

    Raises:
        RuntimeError: there is something to warn of and ``strict`` is set.
    """
    found = unsupported()
    if found and strict:
        raise RuntimeError("; ".join(found))
    for line in found:
        warnings.warn(f"fusewright: {line}", UnsupportedVersion, stacklevel=3)
    return found
