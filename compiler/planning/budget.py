"""A memory budget as users write it: "22GiB", bytes, a share of the device, or "auto"."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SHARE = 0.95  # of the device's memory, for "auto": the rest is the CUDA context's and libraries'


def parse(budget: str | float, memory: int) -> int:
    """Bytes.

    Args:
        budget: "22GiB", "16 GB", "90%", "auto"; an int is bytes; a float up to 1 is a share of
            ``memory``, above it bytes.
        memory: the device's, in bytes.

    Raises:
        ValueError: it is none of these, or not positive; the message shows the forms.
        TypeError: it is no string and no number.
    """
    if isinstance(budget, bool) or not isinstance(budget, (str, int, float)):
        raise TypeError(f"memory_budget: expected text or a number, got {type(budget).__name__}")
    if isinstance(budget, str):
        return _text(budget, memory)
    if not 0 < budget < float("inf"):
        raise ValueError(f"memory_budget must be positive, got {budget!r}")
    if isinstance(budget, float) and budget <= 1.0:
        return int(budget * memory)
    return int(budget)


def is_size(budget: str | float) -> bool:
    """Whether it names an amount of memory, and not what the device has or a share of that."""
    if isinstance(budget, str):
        return budget.strip().lower() != "auto" and "%" not in budget
    return not (isinstance(budget, float) and budget <= 1.0)


def _text(budget: str, memory: int) -> int:
    text = budget.strip().lower()
    if text == "auto":
        return int(_SHARE * memory)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*|%)", text)
    if found is None or (found[2] != "%" and found[2] not in _UNITS):
        raise ValueError(
            f"memory_budget: {budget!r} is not a size; write '22GiB', '16 GB', '90%', 'auto', a "
            "number of bytes, or a share such as 0.9"
        )
    amount = float(found[1])
    size = amount / 100 * memory if found[2] == "%" else amount * _UNITS[found[2]]
    if size < 1 or (found[2] == "%" and amount > 100):
        raise ValueError(f"memory_budget: {budget!r} is {int(size)} bytes of {memory}")
    return int(size)


def shown(size: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{int(size)} B"
