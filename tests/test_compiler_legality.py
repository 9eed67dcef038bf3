"""Legality: whose storage a node views, what mutates it, who wants a gradient, where."""

from __future__ import annotations

import operator
from typing import Any

import torch
from graphs import capture, check_untouched, perturbed, rows
from torch import fx

from fusewright.compiler import ir, legality

aten = torch.ops.aten


def _graph(computation: Any, *inputs: Any) -> fx.Graph:
    graph: fx.Graph = capture(computation, inputs).canonical.graph
    return graph


def _calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return [n for n in ir.calls(graph) if n.target is target]


def test_views_and_pieces_share_their_roots_storage() -> None:
    def views(x: torch.Tensor) -> Any:
        whole = x * 2
        low, high = whole.chunk(2, dim=-1)
        return low.transpose(0, 1).cos(), high.sin(), whole[0].exp()

    graph = _graph(views, rows(2, 5, 8))
    (whole,) = _calls(graph, aten.mul.Tensor)
    reading = [n for t in (aten.cos, aten.sin, aten.exp) for n in _calls(graph, t.default)]
    assert [legality.storage_root(ir.argument(n, 0)) for n in reading] == [whole] * 3
    assert len(_calls(graph, operator.getitem)) == 2


def test_a_product_has_storage_of_its_own() -> None:
    graph = _graph(lambda x: (x * 2).cos(), rows(2, 8))
    (product,) = _calls(graph, aten.mul.Tensor)
    assert legality.storage_root(product) is product


def test_a_write_through_a_view_is_a_write_of_the_whole() -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        whole = x * 2
        whole[0].t().mul_(3)
        return whole.cos()

    graph = _graph(write, rows(2, 5, 8))
    (whole,) = _calls(graph, aten.mul.Tensor)
    assert [root for _, root in legality.mutations(graph)] == [whole]


def test_gradients_are_followed_through_the_graph() -> None:
    def mixed(x: torch.Tensor, table: torch.Tensor) -> Any:
        with torch.no_grad():
            frozen = x.exp()
        return x.sin(), x.detach().cos(), frozen.tan(), table.type_as(x).tanh()

    graph = _graph(mixed, rows(2, 8), torch.randn(2, 8, dtype=torch.bfloat16))
    wanting = legality.needs_gradient(graph)
    for target, wants in (("sin", True), ("cos", False), ("tan", False), ("tanh", False)):
        (node,) = _calls(graph, getattr(aten, target).default)
        assert (node in wanting) is wants, target


def test_a_gradient_written_in_place_is_seen() -> None:
    def written(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        total = table * 2
        total.add_(x)
        return total.cos()

    graph = _graph(written, rows(2, 8), torch.randn(2, 8))
    (node,) = _calls(graph, aten.mul.Tensor)
    assert node in legality.needs_gradient(graph)


def test_a_value_used_outside_ends_the_region() -> None:
    def early(x: torch.Tensor, w: torch.Tensor) -> Any:
        row = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w.tanh() * row, row.cos()

    # The norm without its weight is taken, and the weight stays outside of it.
    record = capture(early, (rows(2, 8), perturbed(8)))
    (match,) = record.matches
    assert match.candidate.params["weight"] is False


def test_a_region_does_not_span_no_grad() -> None:
    def spans(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * (x * root)

    check_untouched(spans, [rows(2, 8), perturbed(8)], "rms_norm", "gradients are switched off")
