"""What a session has learned of a graph, so that the same graph is not examined again.

Dynamo captures the first layer of a model apart from the others where nothing is trained in front of it:
its input wants no gradient. Both captures are one graph, and an examination of the first can speak for
the second if it was made with that gradient, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from fusewright.compiler import ir
from fusewright.compiler.records import Verdict

Wanted = frozenset[int]  # places of the inputs that want a gradient


@dataclass
class Known:
    """What is known of a graph, by whose gradients are wanted.

    Attributes:
        foreseen: for these its kernels were foreseen.
        verdicts: for these it was verified and accepted.
    """

    foreseen: set[Wanted] = field(default_factory=set)
    verdicts: dict[Wanted, Verdict] = field(default_factory=dict)


def fingerprint(
    canonical: fx.GraphModule, rewritten: fx.GraphModule, inputs: Sequence[Any]
) -> str | None:
    """What two captures have in common where they are one graph, rewritten alike.

    Code, and the inputs' shapes, strides, dtypes and devices; not which of them want a gradient. A
    parameter's strides are those that it has now, it may have been moved since it was captured. None
    where the code reads tensors or graphs of its own, which it does not show.
    """
    if any(gm.graph.find_nodes(op="get_attr") for gm in (canonical, rewritten)):
        return None
    nodes = canonical.graph.find_nodes(op="placeholder")
    told = [_described(n, v) for n, v in zip(nodes, inputs, strict=True)]
    return "\n".join([canonical.code, rewritten.code, *told])


def _described(node: fx.Node, given: Any) -> str:
    val = ir.value(node)
    kind = bool(node.meta.get("parameter"))
    if not isinstance(val, torch.Tensor):
        return f"{type(val).__name__} {val}"
    strides = given.stride() if kind else val.stride()
    return f"{kind} {tuple(val.shape)} {strides} {val.dtype} {val.device}"


def wanted(args: Sequence[Any]) -> Wanted:
    """The inputs that want a gradient."""
    return frozenset(
        i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad
    )


def variants(canonical: fx.GraphModule, args: Sequence[Any]) -> tuple[Wanted, ...]:
    """Whose gradients may be asked for: those that are now, and the stream's as well."""
    now = wanted(args)
    place = stream(canonical.graph) if now else None
    return (now,) if place is None or place in now else (now, now | {place})


def stream(graph: fx.Graph) -> int | None:
    """The place of the input that the next of a row of equal layers takes the first result in.

    It is an activation of that result's shape.
    """
    results = [n for n in tree_leaves(graph.output_node().args) if ir.is_floating(n)]
    for place, node in enumerate(graph.find_nodes(op="placeholder") if results else ()):
        alike = ir.is_floating(node) and not node.meta.get("parameter")
        alike = alike and ir.dtype(node) == ir.dtype(results[0])
        if alike and ir.shape(node) == ir.shape(results[0]):
            return place
    return None
