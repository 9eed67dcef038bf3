"""A block's forward without its results: the same values, and less to compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusewright.compiler import ir
from fusewright.compiler.rerun import fits_inductor, without_results
from fusewright.runtime.op import register_all

register_all()
F32 = torch.float32


def _block(x: torch.Tensor, norm: torch.Tensor, w: torch.Tensor, a: Any, b: Any) -> Any:
    """y (the result), the norm's output and statistics, and the thin products of two groups."""
    ops = torch.ops.fusewright
    h, rstd = ops.rms_norm(x, norm, 1e-6, 0.0, "output", F32)
    layout = ([0], [-1], [2.0], [w.shape[0]], F32, False, False)
    first, one = ops.lora_group(h, [], [w], [None], [a], [b], *layout)
    last, two = ops.lora_group(first[0], [], [w], [None], [a], [b], *layout)
    return x + last[0], h, rstd, one, two


def _traced() -> tuple[fx.GraphModule, list[torch.Tensor]]:
    given = [torch.randn(*size) for size in ((2, 3, 8), (8,), (8, 8), (4, 8), (8, 4))]
    return make_fx(_block, tracing_mode="fake")(*given), given


def _targets(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in ir.calls(graph)]


def test_what_only_results_need_is_left_out() -> None:
    forward, given = _traced()
    again = without_results(forward, 1)
    assert again is not None
    targets = _targets(again.graph)
    assert targets.count("fusewright.lora_group.default") == 1  # the second reads the first's y
    assert targets.count("fusewright.lora_thin.default") == 1
    assert "aten.add.Tensor" not in targets
    assert len(again.graph.find_nodes(op="placeholder")) == len(given)
    _, *saved = forward(*given)
    for mine, theirs in zip(again(*given), saved, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert "aten.add.Tensor" in _targets(forward.graph), "the forward itself was changed"


def test_nothing_to_leave_out() -> None:
    forward = make_fx(lambda x: (x.sin(), x.cos()))(torch.randn(3))
    assert without_results(forward, 0) is None


def test_beside_inductor_only_operators_that_it_does_not_fuse() -> None:
    forward, _ = _traced()
    again = without_results(forward, 1)
    assert again is not None and fits_inductor(again.graph)
    assert not fits_inductor(forward.graph)  # it adds
