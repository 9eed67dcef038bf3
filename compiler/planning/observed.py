"""A model's blocks and head with their cost formulas, from one pass on the meta device."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fusewright.compiler import capture, ir, lower, regions, tiles
from fusewright.compiler.abstract import AbstractSession
from fusewright.compiler.config import Options
from fusewright.compiler.joint import Joint
from fusewright.compiler.match import Pattern
from fusewright.compiler.partition import Asked
from fusewright.compiler.records import GraphRecord
from fusewright.compiler.tiles import Parts
from fusewright.runtime.op import register_all

aten = torch.ops.aten
log = logging.getLogger("fusewright")


class NotPlannable(ValueError):
    """The model's blocks could not be captured, so nothing is known of their memory."""


@dataclass
class Observed:
    """What a pass has shown.

    Attributes:
        joints: per graph of a block, its joint graph, its parts where it can run in tiles, and the
            modules that run it.
        head: the rewritten graph of the head, if there is one.
        missed: paths of blocks that could not be captured.
    """

    joints: list[tuple[Joint, Parts | None, list[str]]] = field(default_factory=list)
    head: fx.GraphModule | None = None
    missed: list[str] = field(default_factory=list)


class PlanSession(AbstractSession):
    """Keeps the joint graph of every block that is captured."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.joints: list[tuple[GraphRecord, Joint, Parts | None]] = []

    def splitting(self, gm: fx.GraphModule, record: GraphRecord) -> Asked | None:
        """Split, so that the joint graph is made; attention stands as one fused call."""
        if record.kind != "block":
            return None
        fuse_attention(gm)

        parts = tiles.split(gm)

        def look(joint: Joint) -> None:
            self.joints.append((record, joint, parts))

        asked = Asked.of(gm.graph, "keep", lambda chosen: None)
        return Asked(asked.level, asked.tell, asked.parameters, asked.inputs, look)


def fuse_attention(gm: fx.GraphModule) -> None:
    """Write the library's attention as the fused kernel that a GPU runs, whatever is at hand.

    Masks are left out: their memory is the inputs', and their share of the work is small.
    """
    for node in list(gm.graph.nodes):
        if not ir.is_call(node, aten.scaled_dot_product_attention.default):
            continue
        names = ("query", "key", "value", "mask", "dropout", "causal", "scale")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        dropout = given.get("dropout", given.get("dropout_p", 0.0))
        causal = given.get("causal", given.get("is_causal", False))
        if len(ir.shape(given["query"])) != 4:
            continue
        causal = bool(causal) or given.get("mask", given.get("attn_mask")) is not None
        with gm.graph.inserting_before(node):
            fused = gm.graph.call_function(
                aten._scaled_dot_product_flash_attention.default,
                (given["query"], given["key"], given["value"], dropout, causal),
                {"scale": given.get("scale")},
            )
            out = gm.graph.call_function(operator.getitem, (fused, 0))
        out.meta["val"] = ir.value(node)
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
    gm.recompile()


def joint_of(gm: fx.GraphModule) -> Joint:
    """The joint graph of a part of a block, of which what is trained or made inside wants gradients."""
    found: list[Joint] = []
    asked = Asked.of(gm.graph, "keep", lambda chosen: None)
    inputs = [_like(n) for n in gm.graph.find_nodes(op="placeholder")]
    lower.lower(
        gm, inputs, "fx", None,
        Asked(asked.level, asked.tell, asked.parameters, asked.inputs, found.append),
    )  # fmt: skip
    return found[0]


def _like(node: fx.Node) -> Any:
    """A value like the input's, which wants a gradient if there is one."""
    value = ir.value(node)
    if not isinstance(value, torch.Tensor):
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        made = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
    return made.requires_grad_(bool(node.meta.get("requires_grad")))


def observe(model: nn.Module, catalogue: Sequence[Pattern], inputs: Mapping[str, Any]) -> Observed:
    """One forward pass on meta tensors.

    Args:
        model: its parameters are meta tensors; its classes are put back afterwards.
        catalogue: the patterns.
        inputs: the forward's keyword arguments: integers on the CPU, but ``labels`` on meta.

    Raises:
        NotPlannable: no block could be captured; the message says why.
    """
    given = {"patterns": None, "lowering": "fx", "verify": "off", "logits": "lazy"}
    session = PlanSession(Options.build(catalogue, **given))
    found = regions.find(model)
    register_all()
    model.train()
    capture.install(model, found, session)
    failure = ""
    try:
        model(**inputs)
    except Exception as error:
        # Any failure of the user's own code; the blocks that were seen until then can be planned.
        log.debug("the pass ended early", exc_info=True)
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    finally:
        capture.remove(model)
    seen = Observed()
    for record, joint, parts in session.joints:
        if record.modules:
            seen.joints.append((joint, parts, sorted(record.modules)))
    known = {p for *_, paths in seen.joints for p in paths}
    seen.missed = [path for path, _ in found.blocks if path not in known]
    heads = [r.rewritten for r in session.records if r.kind == "head" and r.rewritten is not None]
    seen.head = heads[-1] if heads else None
    if not seen.joints:
        why = (
            failure or "; ".join(dict.fromkeys(session.uncaptured.values())) or "no graph was made"
        )
        raise NotPlannable(f"{type(model).__name__}: its blocks could not be captured: {why}")
    return seen
