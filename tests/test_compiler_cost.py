"""Costs of a graph: FLOPs by formula, bytes by kernel, and saved bytes as autograd really keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, perturbed, rows
from torch import nn

from fusewright.compiler import shares
from fusewright.compiler.cost import Cost, GraphCost, measure

T, K, N = 6, 16, 24


def _cost(computation: Any, inputs: list[Any]) -> GraphCost:
    return measure(capture(computation, inputs).canonical)


def _really_saved(computation: Any, inputs: list[Any]) -> int:
    """Bytes of the storages that eager's autograd keeps, parameters and constants aside."""
    aside = {
        i.untyped_storage().data_ptr()
        for i in inputs
        if isinstance(i, torch.Tensor) and (isinstance(i, nn.Parameter) or not i.requires_grad)
    }
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in aside:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = computation(*inputs)
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert out.requires_grad
    return total


def _weight(trained: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.randn(N, K), requires_grad=trained)


@pytest.mark.parametrize(("trained", "products"), [(True, 3), (False, 2)])
def test_a_linear_costs_a_product_for_each_gradient(trained: bool, products: int) -> None:
    found = _cost(F.linear, [rows(T, K), _weight(trained)]).total
    assert found.flops == products * 2 * T * K * N
    each = 4 * (T * K + K * N + T * N)
    assert found.bytes == products * each
    assert found.saved == (4 * T * K if trained else 0)


def test_no_gradient_is_worked_out_for_what_needs_none() -> None:
    x = torch.randn(T, K)
    found = _cost(F.linear, [x, _weight()]).total
    assert found.flops == 2 * 2 * T * K * N
    assert found.saved == 0  # the input came from outside and needs no gradient


def test_pointwise_bytes_and_free_views() -> None:
    found = _cost(lambda x: x.view(K, T).t().exp(), [rows(T, K)]).total
    size = 4 * T * K
    assert found == Cost(0, 2 * size + 3 * size, size)  # exp; its gradient reads dy and y


def test_rows_that_are_not_gathered_are_not_read() -> None:
    ids = torch.zeros(3, dtype=torch.long)
    found = _cost(lambda w: F.embedding(ids, w).exp(), [perturbed(1000, 8)])
    taken, whole = 4 * 3 * 8, 4 * 1000 * 8
    (forward,) = [c for n, c in found.nodes.items() if "embedding" in n]
    assert forward.bytes >= whole  # the dense gradient is written whole
    assert forward.bytes < 2 * whole + 10 * taken  # the table itself is not read


def test_attention_is_one_fused_kernel() -> None:
    q, k, v = rows(2, 4, T, 8), rows(2, 2, T, 8), rows(2, 2, T, 8)
    found = _cost(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        [q, k, v],
    ).total
    product = 2 * 2 * 4 * T * T * 8
    assert found.flops == (2 + 5) * product  # scores and values; five in the backward
    inputs, out, statistics = 4 * (q.numel() + k.numel() + v.numel()), 4 * q.numel(), 4 * 2 * 4 * T
    assert found.saved == inputs + out + statistics


def _norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _glu(x: torch.Tensor, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return F.silu(F.linear(x, g)) * F.linear(x, u)


def _softmax(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(torch.softmax(F.layer_norm(x, (K,)), -1), w).relu().sum()


@pytest.mark.parametrize(
    ("computation", "inputs"),
    [
        (_norm, [rows(T, K), perturbed(K)]),
        (_glu, [rows(T, K), _weight(), _weight()]),
        (_softmax, [rows(T, K), _weight()]),
    ],
    ids=["norm", "glu", "softmax"],
)
def test_saved_bytes_are_what_autograd_keeps(computation: Any, inputs: list[Any]) -> None:
    assert _cost(computation, inputs).total.saved == _really_saved(computation, inputs)


def test_a_rewrite_moves_and_keeps_less() -> None:
    record = capture(_norm, [rows(64, K), perturbed(K)])
    record.modules.add("layer")
    parts = shares.of_record(record)
    (site,) = parts.matches
    assert site.before.bytes > 3 * site.after.bytes > 0
    assert site.after.saved == 4 * (64 * K + 64)  # the input and a statistic per row
    assert site.before.saved > site.after.saved
    assert parts.total.before == measure(record.canonical).total
    assert parts.total.after == measure(record.rewritten).total


def test_backward_kernels_are_charged_to_the_call_that_recorded_them() -> None:
    found = _cost(lambda x: x.exp().sin(), [rows(T, K)])
    size = 4 * T * K
    by_name = {n.partition("_")[0]: c.bytes for n, c in found.nodes.items() if c.bytes}
    # forward 2; the gradient of exp is dy * y (3), that of sin dy * cos(x) (2 + 3)
    assert by_name == {"exp": 5 * size, "sin": 7 * size}


def test_a_graph_that_needs_data_says_so() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, device="meta")
    graph.output(graph.call_function(torch.ops.aten.nonzero.default, (x,)))
    found = measure(torch.fx.GraphModule(nn.Module(), graph))
    assert found.unavailable and found.total == Cost()
