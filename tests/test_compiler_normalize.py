"""Normalize and autocast: what is dropped, what must stay, and casts that become nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, check, compile_one, perturbed, rows
from torch import fx, nn

from fusewright.compiler import autocast, ir

aten = torch.ops.aten


def _graph(computation: Any, *inputs: Any) -> fx.Graph:
    graph: fx.Graph = capture(computation, inputs).canonical.graph
    return graph


def _targets(graph: fx.Graph) -> list[Any]:
    return [n.target for n in ir.calls(graph)]


def test_what_changes_nothing_is_dropped() -> None:
    def idle(x: torch.Tensor) -> torch.Tensor:
        return x.to(x.dtype).float()[:, :][..., :].cos()

    assert _targets(_graph(idle, rows(2, 8))) == [aten.cos.default]


def test_spellings_collapse() -> None:
    one = _targets(_graph(lambda x: x.pow(2).mean(-1), rows(2, 8)))
    other = _targets(_graph(lambda x: torch.mean(torch.pow(x, 2), dim=-1), rows(2, 8)))
    assert one == other


def test_equal_casts_become_one() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16).cos() + x.to(torch.bfloat16).sin()

    assert sum(map(ir.is_cast, ir.calls(_graph(twice, rows(2, 8))))) == 1


def test_a_rounding_is_kept_and_a_widening_and_back_is_not() -> None:
    def rounding(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16).float().cos()

    def widening(x: torch.Tensor) -> torch.Tensor:
        return x.float().to(torch.bfloat16).cos()

    assert sum(map(ir.is_cast, ir.calls(_graph(rounding, rows(2, 8))))) == 2
    assert _targets(_graph(widening, rows(2, 8).bfloat16())) == [aten.cos.default]


def test_casts_are_not_merged_across_a_mutation() -> None:
    def mutated(x: torch.Tensor) -> torch.Tensor:
        y = x * 1.0
        before = y.to(torch.bfloat16)
        y.mul_(3)
        return before.float() + y.to(torch.bfloat16).float()

    inputs = [rows(2, 8)]
    assert sum(map(ir.is_cast, ir.calls(_graph(mutated, *inputs)))) == 4
    check(mutated, inputs, {})


def test_a_written_cast_is_not_shared() -> None:
    def written(x: torch.Tensor) -> torch.Tensor:
        a, b = x.to(torch.bfloat16), x.to(torch.bfloat16)
        a.mul_(3)
        return a.float() + b.float()

    check(written, [rows(2, 8)], {})


def _layer(x: torch.Tensor, w: torch.Tensor) -> Any:
    y = F.linear(x, w)
    row = y * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return y, F.softmax(y, -1), row, F.linear(row, w)


def _switched_off(x: torch.Tensor, w: torch.Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        y = F.linear(x.float(), w)
    return y, F.linear(y, w)


def _switched_on(x: torch.Tensor, w: torch.Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.linear(x, w)
        row = y.float() * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        z = F.linear(row, w)
    return y.float().mean(), z, F.linear(row, w)


def _arguments(graph: fx.Graph, inputs: list[torch.Tensor]) -> list[Any]:
    """The inputs, told apart by their rank, and the sizes that the graph takes besides."""
    recorded = [ir.value(n) for n in graph.find_nodes(op="placeholder")]
    by_rank = {i.dim(): i for i in inputs}
    return [by_rank[v.dim()] if isinstance(v, torch.Tensor) else v.node.hint for v in recorded]


@pytest.mark.parametrize("ambient", [False, True], ids=["plain", "ambient"])
@pytest.mark.parametrize("computation", [_layer, _switched_off, _switched_on])
def test_autocast_made_explicit_equals_autocast(computation: Any, ambient: bool) -> None:
    inputs = [rows(2, 5, 16), perturbed(16, 16, around=0.0)]
    compiled = compile_one(computation)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
        ours, eager = compiled.run(*inputs), computation(*inputs)
    (record,) = compiled.session.records
    with torch.autocast("cpu", enabled=False):
        explicit = record.canonical(*_arguments(record.canonical.graph, inputs))
    for mine, plain, theirs in zip(ours, explicit, eager, strict=True):
        assert mine.dtype is plain.dtype is theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(plain, theirs, rtol=1e-5, atol=1e-6)


def test_no_autocast_is_active_by_itself() -> None:
    assert autocast.active_device() is None


class _Scattered(torch.autograd.Function):
    """Its backward ends in an in-place call whose result nobody reads."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, index)
        return 2 * x.gather(-1, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, index = ctx.saved_tensors
        out = torch.zeros_like(x)
        out.scatter_add_(-1, index, 2 * grad)
        return out, None


def test_the_body_of_an_autograd_function_keeps_its_in_place_calls() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        out: torch.Tensor = _Scattered.apply(normed, normed.argsort(-1)[..., :2])
        return out

    check(function, [rows(2, 8), perturbed(8)], {"rms_norm": 1})


def test_a_tensor_made_of_numbers_keeps_its_value() -> None:
    def scaled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        normal = torch.distributions.Normal(0, 1)
        factor = normal.icdf(torch.tensor(0.95, dtype=torch.float32))
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w * factor

    check(scaled, [rows(2, 8), perturbed(8)], {"rms_norm": 1})


def test_a_parameter_written_through_its_data() -> None:
    def clipped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        w.data.clamp_(0.9, 1.1)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w

    compiled = check(clipped, [rows(2, 8), perturbed(8)], {"rms_norm": 1})
    x, w = rows(2, 8), perturbed(8)
    compiled.run(x, w)
    assert torch.equal(w, w.clamp(0.9, 1.1))


def test_a_weight_written_through_its_data_after_its_use_is_not_taken() -> None:
    def clipped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        w.data.clamp_(0.9, 1.1)
        return y

    compiled = compile_one(clipped)
    x, w = rows(2, 8), perturbed(8)
    expected = clipped(x, nn.Parameter(w.detach().clone()))
    torch.testing.assert_close(compiled.run(x, w), expected)
    (match,) = compiled.session.records[0].matches
    assert match.candidate.params["weight"] is False


def _normed(row: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return row * torch.rsqrt(row.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def test_a_mapped_function_becomes_plain_calls() -> None:
    def mapped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: row.cumsum(0).sin(), in_dims=1, out_dims=1)(x) * _normed(x, w)

    def twice(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        inner = torch.vmap(lambda row: row.cumsum(0) * w)
        return _normed(torch.vmap(inner)(x), w)

    for mapping in (mapped, twice):
        compiled = check(mapping, [rows(3, 2, 8), perturbed(8)], {"rms_norm": 1})
        (record,) = compiled.session.records
        assert record.canonical is not None
        assert not any("batch_dim" in str(n.target) for n in record.canonical.graph.nodes)


def test_a_scan_over_the_tokens_is_written_out() -> None:
    from torch._higher_order_ops.associative_scan import associative_scan

    def step(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def scanned(x: torch.Tensor, decay: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        _, state = associative_scan(step, (decay.sigmoid(), x), dim=1, combine_mode="generic")
        return state * F.silu(_normed(x, w))

    def eager(x: torch.Tensor, decay: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for at in range(x.shape[1]):
            state = decay[:, at].sigmoid() * state + x[:, at]
            states.append(state)
        return torch.stack(states, 1) * F.silu(_normed(x, w))

    compiled = compile_one(scanned)
    inputs = [rows(2, 7, 8), rows(2, 7, 8), perturbed(8)]
    results = []
    for run in (compiled.run, eager):
        out = run(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results)
    # The scan's length is another expression of the tokens' number, and the gate is found all the same.
    assert compiled.ops == {"rms_norm": 1, "glu": 1}


def test_what_a_mapped_function_may_not_do() -> None:
    def drawing(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: row + torch.rand_like(row), randomness="different")(x)

    def detached(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: row * row.detach())(x)

    for mapping, reason in ((drawing, "random"), (detached, "detach")):
        compiled = compile_one(mapping, strict=False)
        x = rows(3, 2, 8)
        torch.manual_seed(0)
        ours = compiled.run(x)
        torch.manual_seed(0)
        expected = mapping(x)
        torch.testing.assert_close(ours, expected)
        both = (torch.autograd.grad(y.sum(), x)[0] for y in (ours, expected))
        torch.testing.assert_close(*both)
        (record,) = compiled.session.records
        assert reason in record.failure


def test_other_names_of_an_operator() -> None:
    def named(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        inverse = torch.rsqrt(torch.multiply(x, x).mean(-1, keepdim=True) + 1e-6)
        return torch.multiply(torch.multiply(x, inverse), w)

    def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.multiply(torch.true_divide(gate, 1 + torch.exp(torch.negative(gate))), up)

    check(named, [rows(2, 8), perturbed(8)], {"rms_norm": 1})
    check(gated, [rows(2, 8), rows(2, 8)], {"glu": 1})


def test_a_random_draw_that_nobody_reads_still_moves_the_generator() -> None:
    def drawing(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        torch.rand_like(x)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w + torch.rand_like(x)

    check(drawing, [rows(2, 8), perturbed(8)], {"rms_norm": 1})


@torch.library.custom_op("fusewright_tests::columns_first", mutates_args=())
def columns_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


columns_first.register_fake(torch.empty_like)
columns_first.register_autograd(lambda ctx, dy: dy * 1)


def test_strides_that_are_not_those_of_the_fake_tensor() -> None:
    def flat(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return columns_first(_normed(x, w)).reshape(x.shape[0], -1) * 2

    check(flat, [rows(3, 4, 8), perturbed(8)], {"rms_norm": 1})


def test_equal_views_become_one_but_not_of_a_value_that_is_written() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x[:, None].cos() + x[:, None].sin()

    def written(x: torch.Tensor) -> torch.Tensor:
        y = x * 1.0
        a = y[:, None].cos()
        y.add_(1.0)
        return a + y[:, None].sin()

    views = aten.unsqueeze.default
    assert _targets(_graph(twice, rows(2, 8))).count(views) == 1
    assert _targets(_graph(written, rows(2, 8))).count(views) == 2
