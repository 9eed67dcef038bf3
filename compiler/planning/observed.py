"""A model's blocks and head with their cost formulas, from one pass on the meta device."""

from __future__ import annotations

import copy
import dataclasses
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fusewright.compiler import capture, ir, known, lower, regions, tiles
from fusewright.compiler.abstract import AbstractSession
from fusewright.compiler.config import Options
from fusewright.compiler.joint import Joint
from fusewright.compiler.match import Pattern
from fusewright.compiler.partition import Asked
from fusewright.compiler.storage import Wish
from fusewright.compiler.tiles import Parts
from fusewright.runtime import module as modules
from fusewright.runtime.op import register_all

aten = torch.ops.aten
log = logging.getLogger("fusewright")


class NotPlannable(ValueError):
    """The model's blocks could not be captured, so nothing is known of their memory."""


@dataclass
class Observed:
    """What a pass has shown.

    Attributes:
        joints: per kind of block, its joint graph, its parts where it can run in tiles, and the
            modules that run it.
        head: the rewritten graph of the head, if there is one.
        missed: paths of blocks that could not be captured.
        wishes: how parameters of the blocks of a class are to be stored.
    """

    joints: list[tuple[Joint, Parts | None, list[str]]] = field(default_factory=list)
    head: fx.GraphModule | None = None
    missed: list[str] = field(default_factory=list)
    wishes: dict[type, list[Wish]] = field(default_factory=dict)


class PlanSession(AbstractSession):
    """Captures equal blocks once, whichever of their inputs want a gradient, and notes which do.

    The first block's stream often wants none. Its joint graph is made of the same capture. What is
    neither block nor head is run as it is: nothing of it is counted.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.wanting: dict[str, bool] = {}  # path of a block -> whether its stream wants a gradient
        self.wishes: dict[type, list[Wish]] = {}

    def call(
        self, kind: str, module: nn.Module, compiled: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a region; a block as if its stream wanted a gradient."""
        if kind == "leaf":
            compiled = modules.inner_forward(modules.original_class(module))
            return super().call(kind, module, compiled, args, kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        stream = next((t for t in given if t.dim() == 3 and t.is_floating_point()), None)
        if kind != "block" or stream is None:
            return super().call(kind, module, compiled, args, kwargs)
        self.wanting[self.paths.get(module, "?")] = stream.requires_grad
        asking = stream.detach().requires_grad_()
        args, kwargs = tree_map_only(
            torch.Tensor, lambda t: asking if t is stream else t, (args, kwargs)
        )
        out = super().call(kind, module, compiled, args, kwargs)
        if any(t.requires_grad for t in (*given, *module.parameters())):
            return out
        return tree_map_only(torch.Tensor, torch.Tensor.detach, out)

    def require(self, wishes: list[Wish]) -> None:
        """Note them: there is no memory here that could be laid out."""
        if self._module is not None:
            self.wishes.setdefault(modules.original_class(self._module), []).extend(wishes)

    def blocks(self) -> Iterator[tuple[fx.GraphModule, list[str]]]:
        """The rewritten graphs of captured blocks, as their streams want gradients, and who runs each.

        Attention stands in them as one fused call.
        """
        for record in self.records:
            if record.kind != "block" or record.rewritten is None or not record.matches:
                continue  # what was not rewritten runs as captured, however it is planned
            for wants in (False, True):
                paths = sorted(p for p in record.modules if self.wanting.get(p, True) is wants)
                if paths:
                    gm = copy.deepcopy(record.rewritten)
                    if not wants:
                        _leave_stream_alone(gm.graph)
                    fuse_attention(gm)
                    yield gm, paths


def _leave_stream_alone(graph: fx.Graph) -> None:
    """Have the stream want no gradient."""
    inputs = graph.find_nodes(op="placeholder")
    asking = [n for n in inputs if n.meta.get("requires_grad") and not n.meta.get("parameter")]
    place = known.stream(graph)
    if len(asking) > 1 and place is not None:
        asking = [inputs[place]]
    if len(asking) == 1:
        asking[0].meta["requires_grad"] = False


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


class _Seen(Exception):
    """Ends the lowering of a graph once its joint graph is made: the halves are not wanted."""

    def __init__(self, joint: Joint) -> None:
        super().__init__("the joint graph has been seen")
        self.joint = joint


def joint_of(gm: fx.GraphModule, over: bool) -> Joint | None:
    """The joint graph of a block or a part of one, of which what is trained or made inside wants
    gradients; None where nothing does.

    ``over``: whether its halves may write over their values (``partition.Asked``).
    """

    def look(joint: Joint) -> None:
        raise _Seen(joint)

    asked = Asked.of(gm.graph, "keep", lambda chosen: None)
    asked = dataclasses.replace(asked, look=look, over=over)
    inputs = [_like(n) for n in gm.graph.find_nodes(op="placeholder")]
    try:
        with torch.enable_grad():
            lower.lower(gm, inputs, "fx", None, asked)
    except _Seen as seen:
        return seen.joint
    return None


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


def observe(
    model: nn.Module,
    catalogue: Sequence[Pattern],
    inputs: Mapping[str, Any],
    over: bool = True,
) -> Observed:
    """One forward pass on meta tensors.

    Args:
        model: its parameters are meta tensors; its classes are put back afterwards.
        catalogue: the patterns.
        inputs: the forward's keyword arguments: integers on the CPU, but ``labels`` on meta.
        over: whether the blocks will run as plain FX, whose halves write over their values.

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
    seen.wishes = session.wishes
    for gm, paths in session.blocks():
        parts = tiles.split(gm)
        joint = joint_of(gm, over)
        if joint is not None:
            seen.joints.append((joint, parts, paths))
    captured = {p for *_, paths in seen.joints for p in paths}
    seen.missed = [path for path, _ in found.blocks if path not in captured]
    heads = [r.rewritten for r in session.records if r.kind == "head" and r.rewritten is not None]
    seen.head = heads[-1] if heads else None
    if not seen.joints:
        why = (
            failure or "; ".join(dict.fromkeys(session.uncaptured.values())) or "no graph was made"
        )
        raise NotPlannable(f"{type(model).__name__}: its blocks could not be captured: {why}")
    return seen
