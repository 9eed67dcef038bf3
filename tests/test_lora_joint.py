"""The joint graph of adapted layers, forward and backward in one: no gradient of a frozen weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_simple

from fusewright.kernels import room
from fusewright.runtime.op import register_all

register_all()
OPS = torch.ops.fusewright
T, K, N, R = 40, 128, 96, 8
BF16 = torch.bfloat16


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "room"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the augmented product, and without."""
    monkeypatch.setattr(room, "serves", lambda *_: request.param)


def joint(forward: Callable[..., Any], *frozen: torch.Tensor) -> fx.Graph:
    """The joint graph over trained x, A, B and whatever the base is."""
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=BF16, requires_grad=True) for s in ((T, K), (R, K), (N, R))]
    found: Any = aot_export_joint_simple(forward, (*leaves, *frozen), trace_joint=True)
    return getattr(found, "graph", found)


def made(graph: fx.Graph) -> list[tuple[int, ...]]:
    """The shapes of all that the graph computes; an op's list of results is read through getitem."""
    values = [n.meta.get("val") for n in graph.nodes if n.op == "call_function"]
    return [tuple(v.shape) for v in values if isinstance(v, torch.Tensor)]


def backward_inputs(graph: fx.Graph) -> set[tuple[int, ...]]:
    """The shapes of what the one backward call reads that no input of the graph is."""
    (call,) = [n for n in graph.nodes if "backward" in str(n.target)]
    read = [n for n in call.all_input_nodes if n.op != "placeholder"]
    return {tuple(n.meta["val"].shape) for n in read}


LAYOUT = ([0], [-1], [2.0], [N], BF16, False, False)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_dense_weight(frozen: bool) -> None:
    def forward(x: Any, a: Any, b: Any, w: Any) -> tuple[torch.Tensor]:
        return (OPS.lora_group(x, [], [w], [None], [a], [b], *LAYOUT)[0][0],)

    graph = joint(forward, torch.randn(N, K, dtype=BF16, requires_grad=not frozen))
    assert ((N, K) in made(graph)) == (not frozen)
    assert backward_inputs(graph) == {(T, R)}, "the thin product alone is kept"


def test_a_weight_of_four_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    packed, s = bnb.quantize_4bit(
        torch.randn(N, K, dtype=BF16), quant_type="nf4", blocksize=64, compress_statistics=True
    )
    tensors = (packed, s.absmax, s.offset, s.state2.absmax, s.state2.code)

    def forward(x: Any, a: Any, b: Any, w: Any, *rest: Any) -> tuple[torch.Tensor]:
        base = (*([t] for t in rest), [N], ["nf4"], [64], [256])
        return (OPS.lora_group_4bit(x, [], [w], [None], [a], [b], *LAYOUT, *base)[0][0],)

    graph = joint(forward, *tensors)
    assert (N, K) not in made(graph)
    assert backward_inputs(graph) == {(T, R)}, "the thin product alone is kept"
