"""Reading 4-bit layers off custom functions' bodies, in the forms that bitsandbytes has had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import capture, check, perturbed, rows
from torch import fx

from fusewright.compiler.match import Refused
from fusewright.patterns import quantised
from fusewright.runtime.op import register_all

bnb = pytest.importorskip("bitsandbytes.functional")
register_all()
OPS = torch.ops.bitsandbytes
ROWS, COLUMNS = 64, 128


def dequantised(packed, state, dtype=torch.float32):
    """As bitsandbytes.functional.dequantize_4bit does it."""
    absmax = state[0]
    if len(state) > 1:
        absmax = OPS.dequantize_blockwise.default(state[0], state[1], state[2], 256, torch.float32)
        absmax += state[3]
    return OPS.dequantize_4bit.default(packed, absmax, 64, "nf4", (ROWS, COLUMNS), dtype)


class Dense(torch.autograd.Function):
    """The form of a training step on a GPU: dequantise, then multiply."""

    @staticmethod
    def forward(ctx, x, packed, *state):
        ctx.save_for_backward(packed, *state)
        return F.linear(x, dequantised(packed, state).to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        packed, *state = ctx.saved_tensors
        dx = torch.matmul(dy, dequantised(packed, state).to(dy.dtype))
        return (dx, None, *[None] * len(state))


class Turned(Dense):
    """The older form, which works on the transposed weight."""

    @staticmethod
    def forward(ctx, x, packed, *state):
        ctx.save_for_backward(packed, *state)
        return F.linear(x, dequantised(packed, state).to(x.dtype).t().t())

    @staticmethod
    def backward(ctx, dy):
        packed, *state = ctx.saved_tensors
        dx = torch.matmul(dy, dequantised(packed, state).to(dy.dtype).t().t())
        return (dx, None, *[None] * len(state))


class Asking(Dense):
    """Its forward asks for sizes, which some releases of Dynamo then hand out as well."""

    @staticmethod
    def forward(ctx, x, packed, *state):
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], ROWS)
        return Dense.forward(ctx, x, packed, *state)


class Scaled(Dense):
    """Not a linear layer."""

    @staticmethod
    def forward(ctx, x, packed, *state):
        ctx.save_for_backward(packed, *state)
        return F.linear(x, dequantised(packed, state).to(x.dtype)) * 2.0


class OtherBackward(Dense):
    """Its backward multiplies by another weight."""

    @staticmethod
    def backward(ctx, dy):
        packed, *state = ctx.saved_tensors
        dx = torch.matmul(dy, dequantised(packed, state).to(dy.dtype) * 0.5)
        return (dx, None, *[None] * len(state))


class RoundedTwice(Dense):
    """Its weight goes through float16 before bfloat16."""

    @staticmethod
    def forward(ctx, x, packed, *state):
        ctx.save_for_backward(packed, *state)
        return F.linear(x, dequantised(packed, state, torch.float16).to(x.dtype))


def inputs(double: bool, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """x, and the tensors of a weight."""
    weight = torch.randn(ROWS, COLUMNS)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    tensors = [packed, state.absmax]
    if double:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    return [torch.randn(2, 5, COLUMNS, dtype=dtype, requires_grad=True), *tensors]


def graph_of(function: Any, given: list[torch.Tensor]) -> fx.GraphModule:
    """The canonical graph of one call of the custom function."""

    def layer(*args: torch.Tensor) -> torch.Tensor:
        return function.apply(*args) * 1.0

    record = capture(layer, given)
    assert record.canonical is not None or record.failure == ""
    return record.canonical


def layer_node(graph: fx.Graph) -> fx.Node:
    (node,) = (n for n in graph.nodes if quantised.mentions_4bit(n))
    return node


@pytest.mark.parametrize("function", [Dense, Turned, Asking])
@pytest.mark.parametrize("double", [False, True])
def test_the_form_on_a_gpu_is_read(function: Any, double: bool) -> None:
    given = inputs(double)
    module = graph_of(function, given)
    layer = quantised.read(layer_node(module.graph))
    weight = layer.weight
    assert (weight.rows, weight.columns, weight.kind) == (ROWS, COLUMNS, "nf4")
    assert (weight.blocksize, weight.nested_blocksize) == (64, 256 if double else 0)
    assert layer.bias is None and (weight.offset is not None) == double
    assert not quantised.expand(module.graph)


@pytest.mark.parametrize("function", [Dense, Turned, Asking])
@pytest.mark.parametrize("double", [False, True])
def test_the_form_on_a_gpu_takes_adapters(function: Any, double: bool) -> None:
    down, up = perturbed(3, COLUMNS, around=0.0), perturbed(ROWS, 3, around=0.0)

    if double:

        def adapted(x, packed, absmax, outer, code, offset, a, b):
            base = function.apply(x, packed, absmax, outer, code, offset)
            return base + F.linear(F.linear(x, a), b) * 2.0
    else:

        def adapted(x, packed, absmax, a, b):
            return function.apply(x, packed, absmax) + F.linear(F.linear(x, a), b) * 2.0

    _, *tensors = inputs(double)
    check(adapted, [rows(2, 5, COLUMNS), *tensors, down, up], {"lora_group_4bit": 1})


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (Scaled, "calls mul"),
        (OtherBackward, "calls mul"),
        (RoundedTwice, "rounded to another dtype"),
    ],
)
def test_what_is_none_is_left_alone(function: Any, reason: str) -> None:
    module = graph_of(function, inputs(False))
    before = [n.target for n in module.graph.nodes]
    with pytest.raises(Refused, match=reason):
        quantised.read(layer_node(module.graph))
    (miss,) = quantised.expand(module.graph)
    assert reason in miss.reason
    assert [n.target for n in module.graph.nodes] == before


def test_blocks_that_cross_rows_are_refused_on_the_cpu() -> None:
    packed, state = bnb.quantize_4bit(torch.randn(64, 96), blocksize=64, quant_type="nf4")
    x = torch.randn(3, 96)

    def layer(x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        return OPS.gemm_4bit.default(x, packed, (64, 96), absmax, 64, "nf4") * 1.0

    module = capture(layer, [x, packed, state.absmax]).canonical
    (miss,) = quantised.expand(module.graph)
    assert "blocks cross rows" in miss.reason
