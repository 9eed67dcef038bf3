"""Weights that a library packs: their bytes are a parameter, and a state of tensors beside it.

bitsandbytes keeps the scales of a 4-bit weight, their own scales and the codes in ``quant_state``, which
no parameter and no buffer names.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

STATE = "quant_state"


def states(p: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors of a packed weight's state; none of any other."""
    waiting = [getattr(p, STATE, None)]
    while waiting:
        state = waiting.pop()
        for value in vars(state).values() if state is not None else ():
            if isinstance(value, torch.Tensor):
                yield value
            elif type(value) is type(state):
                waiting.append(value)
