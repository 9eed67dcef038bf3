"""Retell: move a region's parameters while it is compiled, and tell the capture where they are now.

A capture says of every parameter how it is strided, and so do the guards that Dynamo makes of it. It
would have to be repeated where the graph did anything else with a moved parameter than to multiply by
it. A linear layer's result does not depend on its weight's strides: nothing else in the graph changes,
and the capture is told the new ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fusewright.compiler import ir
from fusewright.compiler.storage import Wish

aten = torch.ops.aten
log = logging.getLogger("fusewright")
_Strides = dict[Any, dict[str, Any]]  # by source: what Dynamo's guards will ask of a tensor


def move(
    wishes: Sequence[Wish],
    graphs: Sequence[fx.GraphModule],
    inputs: Sequence[Any],
    provide: Callable[[], object],
) -> bool:
    """Have the parameters moved within Dynamo's compilation of these graphs.

    Args:
        wishes: how they are to be stored.
        graphs: Dynamo's graph, the canonical one and others with the same placeholders.
        inputs: the real values of the placeholders.
        provide: moves them, or some of them.

    Returns:
        Whether the capture holds for the moved ones; if not, it is to be repeated.
    """
    columns = [g.graph.find_nodes(op="placeholder") for g in graphs]
    named = {node.name for wish in wishes for node in wish.storage.nodes}
    places = [at for at, node in enumerate(columns[1]) if node.name in named]
    strides = _guarded()
    if strides is None or len(inputs) != len(columns[0]):
        return False
    sources = [_sources(columns[0][at], inputs[at]) for at in places]
    if not all(found and all(s in strides for s in found) for found in sources):
        return False
    if not all(_only_multiplied(columns[1][at]) for at in places):
        return False
    if not all(isinstance(inputs[at], nn.Parameter) for at in places):
        return False
    provide()
    try:
        for at, found in zip(places, sources, strict=True):
            _tell([_stand_in(column[at]) for column in columns], inputs[at])
            for source in found:
                strides[source]["stride"] = inputs[at].stride()
    except Exception:  # of any kind, since the tables are torch's own: captured once more
        log.debug("a capture cannot be told of moved parameters", exc_info=True)
        return False
    return True


def _stand_in(node: fx.Node) -> Any:
    return node.meta["example_value"] if "example_value" in node.meta else ir.value(node)


def _only_multiplied(node: fx.Node) -> bool:
    return all(
        ir.is_call(user, aten.linear.default)
        and user.args[1] is node
        and user.args.count(node) == 1
        and node not in user.kwargs.values()
        for user in node.users
    )


def _tell(stand_ins: Iterable[Any], real: torch.Tensor) -> None:
    """Have the fake tensors lie as the real one does; each stays the object that it is."""
    for fake in {id(f): f for f in stand_ins}.values():
        with torch.no_grad():
            made = fake.fake_mode.from_tensor(real.detach(), static_shapes=True)
            fake.data = made.detach()


def _translator() -> Any:
    """Dynamo's translation that is under way, or None."""
    from torch._dynamo import symbolic_convert

    return getattr(symbolic_convert.tls, "current_tx", None)


def _guarded() -> _Strides | None:
    """What the guards will be made of; None outside of a compilation, or where it has no such table."""
    found = getattr(getattr(_translator(), "output", None), "input_source_to_sizes_strides", None)
    return found if isinstance(found, dict) else None


def _sources(node: fx.Node, real: Any) -> list[Any]:
    """By which names Dynamo has found an input; a parameter may have several."""
    given = getattr(node.meta.get("grapharg"), "source", None)
    by_tensor = getattr(_translator().output, "tracked_fakes_id_to_source", {})
    return [] if given is None else list(dict.fromkeys([given, *by_tensor.get(id(real), ())]))
