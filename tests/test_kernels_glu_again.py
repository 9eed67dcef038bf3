"""A unit's value and gradients in one pass: the same bits as the two passes apart."""

from __future__ import annotations

import pytest
import torch
from backends import Backend

from fusewright.runtime.op import register_all

register_all()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _operands(dtype: torch.dtype, device: str, width: int, strided: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(2, 5, 2 * width, dtype=dtype, device=device) for _ in range(3)]
    return [t[..., :width] if strided else t[..., :width].contiguous() for t in made]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_pair(backend: Backend, dtype: torch.dtype, strided: bool, activation: str) -> None:
    dy, gate, up = _operands(dtype, backend.device, 33, strided)
    dgate, dup, y = backend.ops.glu_again_backward(dy, gate, up, activation)
    assert torch.equal(y, backend.ops.glu(gate, up, activation, dtype))
    grads = backend.ops.glu_backward(dy, gate, up, activation, True, True)
    assert torch.equal(dgate, grads[0]) and torch.equal(dup, grads[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [(True, False), (False, False), (True, True)])
def test_packed(backend: Backend, dtype: torch.dtype, layout: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(7, 66, dtype=dtype, device=backend.device)
    dy = torch.randn(7, 33, dtype=dtype, device=backend.device)
    grad, y = backend.ops.glu_packed_again_backward(dy, gate_up, "silu", *layout)
    assert torch.equal(y, backend.ops.glu_packed(gate_up, "silu", *layout, dtype))
    assert torch.equal(grad, backend.ops.glu_packed_backward(dy, gate_up, "silu", *layout, True))


def test_shapes_without_values() -> None:
    dy, gate = (torch.empty(4, 6, device="meta") for _ in range(2))
    ops = torch.ops.fusewright
    for t in ops.glu_again_backward(dy, gate, gate, "silu"):
        assert t.shape == (4, 6)
    grad, y = ops.glu_packed_again_backward(dy[:, :3], gate, "silu", True, False)
    assert (grad.shape, y.shape) == ((4, 6), (4, 3))


def test_unequal_gate_and_up_are_refused(backend: Backend) -> None:
    dy, gate, up = _operands(torch.float32, backend.device, 8, False)
    with pytest.raises(ValueError, match="up: expected"):
        backend.ops.glu_again_backward(dy, gate, up[..., :4], "silu")
