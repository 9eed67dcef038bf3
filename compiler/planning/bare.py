"""A model without its weights: what a plan is made from.

The state of weights that a library packs (``runtime/packed.py``) goes with them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fusewright.runtime.packed import STATE


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device; its weights are not copied on the way."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = _parameter(p, memo)
    for b in model.buffers():
        memo[id(b)] = b.detach().to("meta")
    return copy.deepcopy(model, memo).train()


def _parameter(p: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    state = getattr(p, STATE, None)
    if state is None:
        return nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    made: nn.Parameter = torch.Tensor._make_subclass(type(p), p.detach().to("meta"), False)
    made.__dict__.update(p.__dict__)
    # A name of the layer for the state's sake; the copy of the layer has the state by the memo.
    made.__dict__.update({STATE: _state(state, memo), "module": None})
    return made


def _state(state: Any, memo: dict[int, Any]) -> Any:
    """The state with its tensors on the meta device, once however many layers have it."""
    if id(state) not in memo:
        bare = memo[id(state)] = copy.copy(state)
        for name, value in vars(state).items():
            if isinstance(value, torch.Tensor):
                setattr(bare, name, memo.setdefault(id(value), value.detach().to("meta")))
            elif type(value) is type(state):
                setattr(bare, name, _state(value, memo))
    return memo[id(state)]
