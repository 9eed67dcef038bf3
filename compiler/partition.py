"""Partition: split a joint graph into a forward and a backward along our own cut.

Which values are saved is decided by ``cut``; torch's partitioner carries it out, since it knows how a
joint graph is taken apart (random state, effects, writes, symbols). It is told by the marks that its
selective checkpointing reads: every value of the cut must be saved, every call behind it runs again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fusewright.compiler import cut as cuts
from fusewright.compiler import (
    gated_again,
    gated_backward,
    gated_layers,
    norm_inputs,
    pieces,
    residual_backward,
    rope_over,
)
from fusewright.compiler.joint import Joint
from fusewright.compiler.recompute import is_symbol, moved
from fusewright.compiler.rerun import without_results

LEVELS = ("keep", "default")


@dataclass
class Partitioned:
    """What became of one joint graph.

    Attributes:
        level: "keep" saves whatever the backward reads; "default" runs cheap calls again.
        saved: bytes that the saved values keep alive from forward to backward.
        kept: the same at level "keep".
        moved: bytes that the second runs read and write.
        recomputed: names of the ops that run again, in order; views are not told.
    """

    level: str
    saved: int
    kept: int
    moved: int
    recomputed: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """How a region's joint graph is to be split.

    Attributes:
        level: one of ``LEVELS``, or the name of a planned choice.
        tell: is handed what was chosen.
        parameters: places of the inputs that are parameters, and how many inputs there are.
        look: is handed the joint graph as it was read, before anything is marked; may end it by raising.
        cut: makes the cut of a planned choice, which ``level`` then names.
        split: is handed the two halves, how many results the forward has, and the forward without
            them, if that is less to compute.
        repeats: called once if the forward can be run again by itself; gives a function that tells,
            for each call, whether it shall be.
        done: called with the halves once they are compiled, where they run as plain FX.
        over: whether the halves may write over values of their own (``rope_over``): Inductor has its
            own way to reuse memory.
    """

    level: str
    tell: Callable[[Partitioned], None]
    parameters: tuple[int, ...] = ()
    inputs: int = 0
    look: Callable[[Joint], None] | None = None
    cut: Callable[[Joint], cuts.Cut] | None = None
    split: Callable[[fx.GraphModule, fx.GraphModule, int, fx.GraphModule | None], None] | None = (
        None
    )
    repeats: Callable[[], Callable[[], bool]] | None = None
    done: Callable[[fx.GraphModule, fx.GraphModule], None] | None = None
    over: bool = True

    @classmethod
    def of(cls, graph: fx.Graph, level: str, tell: Callable[[Partitioned], None]) -> Asked:
        """For the region's canonical graph."""
        inputs = graph.find_nodes(op="placeholder")
        at = tuple(i for i, n in enumerate(inputs) if n.meta.get("parameter"))
        return cls(level, tell, at, len(inputs))

    def static(self, joint: fx.Graph, known: Sequence[int] | None) -> set[int]:
        """Places of the joint graph's inputs that live on anyway; AOTAutograd knows the frozen."""
        primals = [n for n in joint.find_nodes(op="placeholder") if "tangents" not in n.target]
        ours = self.parameters if len(primals) == self.inputs else ()
        return {*(known or ()), *ours}


def split(read: Joint, asked: Asked) -> Partitioned:
    """Mark what is saved and what runs again on the joint graph's nodes."""
    kept = cuts.minimum(read, cuts.keep)
    if asked.cut is not None:
        chosen = asked.cut(read)
    else:
        chosen = kept if asked.level == "keep" else cuts.minimum(read)
    for node in chosen.saved:
        if node.op == "call_function" and not is_symbol(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    for node in chosen.recomputed:
        if not is_symbol(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return Partitioned(
        asked.level,
        chosen.bytes(read),
        kept.bytes(read),
        chosen.moved(),
        tuple(_name(n) for n in chosen.recomputed if moved(n) and n in read.required),
    )


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(node.target) if schema is None else schema.name.partition("::")[2]


def partition(
    asked: Asked,
    joint: fx.GraphModule,
    inputs: Any,
    *,
    num_fwd_outputs: int,
    static_lifetime_input_indices: list[int] | None = None,
    **given: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A ``partition_fn`` of AOTAutograd, once it is known what is asked."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._functorch.compile_utils import fx_graph_cse

    joint.graph.eliminate_dead_code()
    joint.graph = fx_graph_cse(joint.graph)  # torch's own first step: the cut must see its outcome
    joint.recompile()
    marked = any(n.meta.get("recompute") is not None for n in joint.graph.nodes)
    if not marked:
        norm_inputs.hand_over(joint)
        if asked.over:
            rope_over.place(joint.graph)
            joint.recompile()
    static = asked.static(joint.graph, static_lifetime_input_indices)
    read = Joint.read(joint.graph, num_fwd_outputs, static)
    if asked.look is not None:
        asked.look(read)
    if not marked:
        asked.tell(split(read, asked))  # else the user's own checkpoint has marked it
    given["num_fwd_outputs"] = num_fwd_outputs
    if static_lifetime_input_indices is not None:
        given["static_lifetime_input_indices"] = static_lifetime_input_indices
    halves: tuple[fx.GraphModule, fx.GraphModule]
    halves = min_cut_rematerialization_partition(joint, inputs, **given)
    again = None if asked.split is None else without_results(halves[0], num_fwd_outputs)
    gated_backward.join(halves[1])
    gated_again.join(halves[1])
    gated_layers.forward(halves[0])
    gated_layers.backward(halves[1])
    pieces.spread(halves[1])
    residual_backward.fold(halves[1])
    if asked.split is not None:
        asked.split(*halves, num_fwd_outputs, again)
    return halves


@functools.cache
def digest() -> str:
    """A digest of the code that decides a cut."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(torch.__version__.encode())
    for name in (
        "partition",
        "cut",
        "joint",
        "recompute",
        "gated_again",
        "gated_backward",
        "gated_layers",
        "norm_inputs",
        "residual_backward",
    ):
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()
