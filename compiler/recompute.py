"""Which calls of a joint graph may run again in the backward, and what that moves.

Only what is cheap beside its result: views, casts, copies, pointwise work, small reductions, and those
of our ops that declare it (``OpSpec.cheap``). Products, attention, random draws, collectives, writes
and whatever is unknown never run twice. A second run is the same kernel on the same inputs, so its
result has the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.runtime.op import cheap_ops

aten = torch.ops.aten

# Copies, constants and reductions: one pass over their data, without torch's pointwise tag.
_PASSES = frozenset(
    {
        "_to_copy",
        "clone",
        "convert_element_type",
        "cat",
        "stack",
        "repeat",
        "contiguous",
        "constant_pad_nd",
        "slice_scatter",
        "select_scatter",
        "flip",
        "roll",
        "tril",
        "triu",
        "full",
        "full_like",
        "zeros",
        "zeros_like",
        "ones",
        "ones_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "scalar_tensor",
        "arange",
        "iota",
        "sum",
        "mean",
        "amax",
        "amin",
        "var",
        "var_mean",
    }
)
_UNTAGGED_VIEWS = frozenset({aten._unsafe_view.default, aten.lift_fresh.default})


def is_view(node: fx.Node) -> bool:
    """Whether the call yields other names for its first argument's memory, one or several."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = ir.argument(node, 0)
        return isinstance(source, fx.Node) and is_view(source)
    return node.target in _UNTAGGED_VIEWS or bool(getattr(node.target, "is_view", False))


def base(node: fx.Node) -> fx.Node:
    """Whose memory the node's value lies in; what is written over another value lies in that one's."""
    while is_view(node) or ir.own_name(node) == "rope_over":
        node = ir.argument(node, 0)
    return node


def repeatable(node: fx.Node) -> bool:
    """Whether another run of the call gives the same value and does nothing else."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem or is_symbol(node):
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not (target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags)


def is_symbol(node: fx.Node) -> bool:
    """Whether the node yields a number that is known to the host."""
    numbers = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
    return isinstance(ir.value(node), numbers)


def is_cheap(node: fx.Node) -> bool:
    """Whether the call may run a second time in the backward."""
    if not repeatable(node):
        return False
    if node.target is operator.getitem or is_view(node) or is_symbol(node):
        return True
    target: Any = node.target
    name = target._schema.name.partition("::")[2]
    if target.namespace == "fusewright":
        return name in cheap_ops()
    if target.namespace not in ("aten", "prims"):
        return False
    return torch.Tag.pointwise in target.tags or name in _PASSES


def moved(node: fx.Node) -> int:
    """Bytes that one run of the call reads and writes at its traced sizes; views move none."""
    if node.target is operator.getitem or is_view(node):
        return 0
    read = {n for n in node.all_input_nodes if ir.is_tensor(n)}
    return sum(_extent(ir.value(n)) for n in read) + sum(map(_extent, tensors(ir.value(node))))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a value that may be a tuple of tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def _extent(t: torch.Tensor) -> int:
    """Bytes that a kernel touches: an expanded tensor's memory is read once."""
    return min(int(ir.traced(t.numel())) * t.element_size(), storage_bytes(t))


def storage_bytes(t: torch.Tensor) -> int:
    """Bytes of the memory that a saved tensor keeps alive, room behind its rows included."""
    return int(ir.traced(t.untyped_storage().nbytes()))
