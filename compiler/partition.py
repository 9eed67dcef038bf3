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
from fusewright.compiler.joint import Joint
from fusewright.compiler.recompute import is_symbol, moved

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


def split(
    joint: fx.GraphModule, level: str, outputs: int, static: Sequence[int] | None
) -> Partitioned | None:
    """Mark what is saved and what runs again on the joint graph's nodes.

    None, and no marks, where the user's own checkpoint has marked it already.
    """
    if any(n.meta.get("recompute") is not None for n in joint.graph.nodes):
        return None
    read = Joint.read(joint.graph, outputs, static)
    kept = cuts.minimum(read, cuts.keep)
    chosen = kept if level == "keep" else cuts.minimum(read)
    for node in chosen.saved:
        if node.op == "call_function" and not is_symbol(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    for node in chosen.recomputed:
        if not is_symbol(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return Partitioned(
        level,
        chosen.bytes(read),
        kept.bytes(read),
        chosen.moved(),
        tuple(_name(n) for n in chosen.recomputed if moved(n) and n in read.required),
    )


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(node.target) if schema is None else schema.name.partition("::")[2]


def partition(
    joint: fx.GraphModule,
    inputs: Any,
    *,
    level: str,
    tell: Callable[[Partitioned], None],
    num_fwd_outputs: int,
    static_lifetime_input_indices: list[int] | None = None,
    **given: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A ``partition_fn`` of AOTAutograd.

    Args:
        joint, inputs, num_fwd_outputs, static_lifetime_input_indices, given: AOTAutograd's.
        level: one of ``LEVELS``.
        tell: is handed what was chosen.
    """
    from functorch.compile import min_cut_rematerialization_partition
    from torch._functorch.compile_utils import fx_graph_cse

    joint.graph.eliminate_dead_code()
    joint.graph = fx_graph_cse(joint.graph)  # torch's own first step: the cut must see its outcome
    joint.recompile()
    chosen = split(joint, level, num_fwd_outputs, static_lifetime_input_indices)
    if chosen is not None:
        tell(chosen)
    given["num_fwd_outputs"] = num_fwd_outputs
    if static_lifetime_input_indices is not None:
        given["static_lifetime_input_indices"] = static_lifetime_input_indices
    return min_cut_rematerialization_partition(joint, inputs, **given)


def for_inductor(level: str, tell: Callable[[Partitioned], None]) -> Any:
    """What Inductor's ``custom_partitioner_fn`` takes; its compiled graphs stay cacheable."""
    from torch._inductor.custom_graph_pass import CustomPartitionerFn

    class Partitioner(CustomPartitionerFn):
        def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **given: Any) -> Any:
            return partition(gm, joint_inputs, level=level, tell=tell, **given)

        def uuid(self) -> str:
            return f"fusewright-{level}-{_sources()}"

    return Partitioner()


@functools.cache
def _sources() -> str:
    """A digest of the code that decides a cut."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(torch.__version__.encode())
    for name in ("partition", "cut", "joint", "recompute"):
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()
