"""The joint backward of a gated unit and the adapted layers behind it, beside the ops apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusewright.kernels import lora, lora_glu, room, roomy
from fusewright.kernels.lora_group import plan
from fusewright.runtime.op import register_all

register_all()
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WIDTH, HEIGHT, RANK, ROWS = 48, 32, 8, (2, 9)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Given = lora_glu.Given


def given(
    device: str, dtype: torch.dtype, thin: torch.dtype, layout: Any, space: bool, bias: bool
) -> Given:
    torch.manual_seed(0)

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, dtype=FP64) / shape[-1] ** 0.5).to(device, of)

    down, up = normal(RANK, WIDTH, of=thin), normal(HEIGHT, RANK, of=thin)
    made = Given(
        [normal(*ROWS, HEIGHT)], normal(ROWS[0] * ROWS[1], RANK, of=thin), 3 * normal(*ROWS, 2 * WIDTH),
        [normal(HEIGHT, WIDTH)], [normal(HEIGHT) if bias else None], [down], [up], [0], [2.0],
        "silu", *layout, 16 if space else 0, 32 if space else 0, False, bias, True, True,
    )  # fmt: skip
    if not space:
        return made
    h = normal(*ROWS, WIDTH)
    how = plan(made.group(h))
    return made._replace(weights=room.allocate(made.weights, room.needed(how.columns, how.thin)))


def flat(results: lora_glu.Results) -> list[torch.Tensor]:
    return [results.gate_up, *results.biases, *results.down, *results.up]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("space", [False, True])
@pytest.mark.parametrize("layout", [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)])
def test_same_bits_as_the_ops_apart(device: str, space: bool, layout: Any, dtypes: Any) -> None:
    """On a GPU too: h of the joint pass is the forward's, bit by bit, or dA would differ."""
    args = given(device, *dtypes, layout, space, bias=not layout[1])
    apart = lora_glu._apart(args, roomy._packed_fwd, lora.device_bwd, roomy._packed_bwd)
    joint = lora_glu.device(*args)
    for a, b in zip(flat(apart), flat(joint), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert joint.gate_up.stride() == apart.gate_up.stride()
    assert joint.down[0].abs().max() > 0


@pytest.mark.parametrize("space", [False, True])
def test_against_float64(space: bool) -> None:
    args = given("cpu", FP32, FP32, (True, False), space, bias=False)
    gate_up, down, up, weight, dy = (
        t.double() for t in (args.gate_up, args.down[0], args.up[0], args.weights[0], args.dys[0])
    )
    for leaf in (gate_up, down, up):
        leaf.requires_grad_()
    h = torch.nn.functional.silu(gate_up[..., :WIDTH]) * gate_up[..., WIDTH:]
    low = 2.0 * (h @ down.T)
    y = h @ weight.T + low @ up.T
    wanted = torch.autograd.grad(y, (gate_up, down, up), dy)
    args = args._replace(thin=low.detach().reshape(-1, RANK).float())
    joint = lora_glu.device(*args)
    for exact, got in zip(wanted, (joint.gate_up, *joint.down, *joint.up), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=2e-6)


def test_what_nobody_wants_is_empty_and_float64_is_the_reference() -> None:
    args = given("cpu", FP64, FP64, (True, False), False, bias=False)._replace(need_up=False)
    joint, apart = lora_glu.device(*args), lora_glu.host(*args)
    assert joint.up[0].shape == joint.biases[0].shape == (0,)
    for a, b in zip(flat(apart), flat(joint), strict=True):
        assert torch.equal(a, b)


def test_fake_says_the_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = given("cpu", BF16, FP32, (True, False), True, bias=True)
    real = lora_glu.device(*args)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.ops.fusewright.lora_glu_backward(*args)
    told = [fake[0], *fake[1], *fake[2], *fake[3]]
    for a, b in zip(told, flat(real), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
