"""The op over 4-bit weights against float64 of the same weights, beside dense eager."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_not_worse_pooled

from fusewright.kernels import room
from fusewright.kernels.codes import code
from fusewright.runtime.op import register_all

bnb = pytest.importorskip("bitsandbytes.functional")
register_all()
BF16, FP32 = torch.bfloat16, torch.float32
WIDTH, HEIGHTS, RANK, SCALE = 128, (64, 32), 8, 2.0
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes(kind: str) -> None:
    assert torch.equal(code(kind, torch.device("cpu")), bnb.get_4bit_type(kind, device="cpu"))


def draw(seed: int, base: torch.dtype, thin: torch.dtype, device: str, layers: int = 2):
    """(op's results, eager's, the oracle's): y and gradients of x, A, B of two layers."""
    torch.manual_seed(seed)
    made = [
        bnb.quantize_4bit((torch.randn(h, WIDTH) * 0.2).to(device, base), quant_type="nf4",
                          blocksize=64, compress_statistics=True) for h in HEIGHTS
    ]  # fmt: skip
    dense = [bnb.dequantize_4bit(p, s) for p, s in made]
    packed, states = [p for p, _ in made], [s for _, s in made]
    x = torch.randn(2, 7, WIDTH).to(device, base)
    down = [(torch.randn(RANK, WIDTH) * 0.2).to(device, thin) for _ in HEIGHTS]
    up = [torch.randn(h, RANK).to(device, thin) for h in HEIGHTS]
    dys = [torch.randn(2, 7, h).to(device, BF16).to(base) for h in HEIGHTS]
    rest = ([s.absmax for s in states], [s.offset for s in states],
            [s.state2.absmax for s in states], [s.state2.code for s in states], list(HEIGHTS),
            ["nf4"] * layers, [64] * layers, [256] * layers)  # fmt: skip

    def op(x, a, b):
        layout = (
            [0, 1][:layers],
            [-1] * layers,
            [SCALE] * layers,
            list(HEIGHTS),
            base,
            False,
            False,
        )
        given = (x, [], packed, [None] * layers, a, b, *layout, *rest)
        return torch.ops.fusewright.lora_group_4bit(*given)[0]

    def eager(x, a, b):
        ys = []
        for w, p, q in zip(dense, a, b, strict=True):
            y = F.linear(x, w.to(x.dtype)) + F.linear(F.linear(x.to(p.dtype), p), q) * SCALE
            ys.append(y.to(x.dtype))
        return ys

    def step(run, widen):
        lift = (lambda t: t.double()) if widen else (lambda t: t)
        leaves = [lift(t).detach().requires_grad_() for t in (x, *down, *up)]
        ys = run(leaves[0], leaves[1 : 1 + layers], leaves[1 + layers :])
        return (*ys, *torch.autograd.grad(ys, leaves, [lift(d) for d in dys]))

    return step(op, False), step(eager, False), step(eager, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize(("base", "thin"), [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=str)
def test_not_worse_than_eager(
    base: torch.dtype,
    thin: torch.dtype,
    augmented: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "serves", lambda *_: augmented)
    draws = [draw(seed, base, thin, device) for seed in range(12)]
    names = ("y0", "y1", "dx", "dA0", "dA1", "dB0", "dB1")
    assert_not_worse_pooled(draws, names, 1.1 if base is FP32 else 1.02)
    assert not any(e.width == WIDTH and e.height == sum(HEIGHTS) for e in room._KNOWN.values())


@pytest.mark.parametrize("thin", [BF16, FP32], ids=str)
@pytest.mark.parametrize("rank", [16, 5])
@pytest.mark.parametrize("layers", [1, 2])
def test_scratch_memory_may_hold_anything(
    layers: int, rank: int, thin: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the adapters fill is not cleared before, and what they do not fill is."""
    monkeypatch.setattr(room, "serves", lambda *_: True)
    monkeypatch.setattr(sys.modules[__name__], "RANK", rank)
    monkeypatch.setattr(sys.modules[__name__], "HEIGHTS", HEIGHTS[:layers])
    clean, _, exact = draw(3, BF16, thin, "cpu", layers)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        dirty, _, _ = draw(3, BF16, thin, "cpu", layers)
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(torch.isfinite(exact[0]).all())
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
