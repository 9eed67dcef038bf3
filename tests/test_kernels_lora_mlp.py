"""A gated unit with the thin products around it: beside the ops apart, and against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from launches import TARGETS, assert_no_spills

from fusewright.kernels import device, glu_thin, lora, lora_glu, lora_mlp, room, roomy
from fusewright.kernels.lora_group import plan
from fusewright.kernels.lora_mlp import First, Unit
from fusewright.kernels.thin_plan import Term
from fusewright.runtime.op import register_all

register_all()
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INPUT, WIDTH, OUTPUT, RANK, ROWS = 40, 56, 32, 8, (2, 37)
TOKENS = ROWS[0] * ROWS[1]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# The interpreter rounds to bfloat16 by cutting off, so on the CPU float16 stands for it.
HALVES = [FP16, pytest.param(BF16, marks=pytest.mark.gpu)]
Case = tuple[Unit, lora_glu.Given, First]


def case(
    device: str, dtype: torch.dtype, gate_first: bool = True, space: bool = True, bias: bool = False,
    thin: torch.dtype | None = None, adapters: int = 1, interleaved: bool = False,
) -> Case:  # fmt: skip
    """Both groups and the unit, with numbers that are consistent: S and h come from the forward."""
    torch.manual_seed(0)
    thin = thin or dtype

    def normal(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, dtype=FP64) / shape[-1] ** 0.5).to(device, of)

    heights, member = [WIDTH, WIDTH], [1, 0]  # adapters in another order than their layers
    weights, biases = (
        [normal(h, INPUT) for h in heights],
        [normal(h) if bias else None for h in heights],
    )
    down, up = (
        [normal(RANK, INPUT, of=thin) for _ in member],
        [normal(WIDTH, RANK, of=thin) for _ in member],
    )
    second = [normal(OUTPUT, WIDTH)], [normal(OUTPUT) if bias else None]
    below = [normal(RANK, WIDTH, of=thin) for _ in range(adapters)]
    above = [normal(OUTPUT, RANK, of=thin) for _ in range(adapters)]
    x, gate_up, dy = normal(*ROWS, INPUT), 3 * normal(*ROWS, 2 * WIDTH), normal(*ROWS, OUTPUT)
    form = ("silu", gate_first, interleaved)
    unit = Unit(gate_up, *second, below, above, [0] * adapters, [2.0] * adapters, [OUTPUT], False,
                *form, 16 if space else 0)  # fmt: skip
    first = First(normal(TOKENS, 2 * RANK, of=thin), x, weights, biases, down, up, member, [2.0, 0.5],
                  True, bias, True, True)  # fmt: skip
    if space:
        how = plan(unit.group(gate_up[..., :WIDTH]))
        moved = room.allocate(unit.weights, room.needed(how.columns, how.thin))
        unit = unit._replace(weights=moved)
        how = plan(first.group)
        moved = room.allocate(first.weights, room.needed(how.columns, how.thin))
        first = first._replace(weights=moved)
    low = normal(TOKENS, RANK * adapters, of=thin)
    given = lora_glu.Given(
        [dy], low, gate_up, unit.weights, unit.biases, below, above, unit.member, unit.scales, *form,
        16 if space else 0, 32 if space else 0, False, bias, True, True,
    )  # fmt: skip
    return unit, given, first


def flat(results: Any) -> list[torch.Tensor]:
    out: list[torch.Tensor] = []
    for r in results:
        out += [r] if isinstance(r, torch.Tensor) else list(r)
    return out


def fused(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes which of the joint kernels' host functions ran."""
    ran: list[str] = []
    for name in ("forward", "backward"):
        function = getattr(module, name)

        def noted(*args: Any, of: Any = function, called: str = name) -> Any:
            ran.append(called)
            return of(*args)

        monkeypatch.setattr(module, name, noted)
    return ran


def exact_backward(given: lora_glu.Given, first: First) -> list[torch.Tensor]:
    """The backward in float64, from the same saved numbers."""
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in (*given, *first)]
    doubled = [
        [u.double() if u is not None and isinstance(u, torch.Tensor) else u for u in t]
        if isinstance(t, list) else t for t in wide
    ]  # fmt: skip
    return flat(lora_mlp.host_bwd(*doubled))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize(("space", "bias"), [(True, False), (True, True), (False, False)])
def test_no_less_exact_than_the_ops_apart(
    device: str, dtype: torch.dtype, gate_first: bool, space: bool, bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if device == "cpu" and dtype is BF16:
        pytest.skip("float16 stands for it")
    ran = fused(glu_thin, monkeypatch)
    unit, given, first = case(device, dtype, gate_first, space, bias)
    apart = flat(lora_mlp._apart((*given, *first), lora_glu.device, lora.device_bwd))
    joint = flat(lora_mlp.device_bwd(*given, *first))
    assert ran == ["backward"]
    for at, (a, b, exact) in enumerate(
        zip(apart, joint, exact_backward(given, first), strict=True)
    ):
        assert a.dtype == b.dtype and a.shape == b.shape == exact.shape
        if exact.numel():
            errors = [float((t.double() - exact).norm() / exact.norm()) for t in (b, a)]
            assert errors[0] <= 1.02 * errors[1], (at, errors)
    ran.clear()
    want = lora_mlp._unit_apart(unit, roomy._packed_fwd, lora.device_fwd)
    got = lora_mlp.device_fwd(*unit)
    assert ran == (["forward"] if space else [])
    assert torch.equal(got[2], want[2])  # h, bit for bit
    for a, b in zip(flat(got[:2]), flat(want[:2]), strict=True):
        assert a.shape == b.shape and a.stride() == b.stride()
        step = torch.finfo(dtype).eps  # S is another order of sums, and rounded
        torch.testing.assert_close(a, b, rtol=2 * step, atol=float(step * b.abs().max()))


@pytest.mark.parametrize(
    "other", [{"thin": FP32}, {"adapters": 2}, {"interleaved": True}, {"dtype": FP32}]
)
def test_what_the_kernels_do_not_serve_is_done_apart(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = fused(glu_thin, monkeypatch)
    unit, given, first = case("cpu", **({"dtype": FP16} | other))
    pairs = [
        (lora_mlp.device_bwd(*given, *first),
         lora_mlp._apart((*given, *first), lora_glu.device, lora.device_bwd)),
        (lora_mlp.device_fwd(*unit), lora_mlp._unit_apart(unit, roomy._packed_fwd, lora.device_fwd)),
    ]  # fmt: skip
    assert not ran
    for got, want in pairs:
        for a, b in zip(flat(got), flat(want), strict=True):
            assert torch.equal(a, b)


def test_against_autograd_in_float64() -> None:
    _, given, first = case("cpu", FP64, space=False)
    x, leaves = first.x.clone().requires_grad_(), [
        t.clone().requires_grad_() for t in (*first.down, *first.up, *given.down, *given.up)
    ]  # fmt: skip
    down, up, (below, above) = leaves[:2], leaves[2:4], leaves[4:]
    rows = x.reshape(TOKENS, INPUT)
    lows = [s * rows @ a.T for s, a in zip(first.scales, down, strict=True)]
    parts = [rows @ w.T for w in first.weights]
    for at, low, b in zip(first.member, lows, up, strict=True):
        parts[at] = parts[at] + low @ b.T
    h = torch.nn.functional.silu(parts[0]) * parts[1]
    low = 2.0 * h @ below.T
    y = h @ given.weights[0].T + low @ above.T
    dy = given.dys[0].reshape(TOKENS, OUTPUT)
    wanted = torch.autograd.grad(y, (x, *leaves), dy)
    gate_up = torch.cat(parts, 1).detach().view(*ROWS, 2 * WIDTH)
    given = given._replace(gate_up=gate_up, thin=low.detach())
    first = first._replace(thin=torch.cat(lows, 1).detach())
    for run in (lora_mlp.host_bwd, lora_mlp.device_bwd):
        found = run(*given, *first)
        got = (found.x, *found.first_down, *found.first_up, *found.down, *found.up)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_sums_every_time(device: str) -> None:
    _, given, first = case(device, FP16)
    one, two = (flat(lora_mlp.device_bwd(*given, *first)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_fakes_tell_shapes_and_strides() -> None:
    unit, given, first = case("cpu", FP16, bias=True)
    for args, real, fake in (
        (unit, lora_mlp.device_fwd, lora_mlp._fake_fwd),
        ((*given, *first), lora_mlp.device_bwd, lora_mlp._fake_bwd),
    ):
        for a, b in zip(flat(real(*args)), flat(fake(*args)), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=BF16)

    for rank in (16, 32):
        for width in (8192, 14336):
            gate_up, h, a = empty(4096, 2 * width), empty(4096, width), empty(rank, width)
            term = Term(0, a, True)
            yield (
                f"forward {rank} {width}",
                lambda g=gate_up, h=h, t=term: glu_thin.forward(g, h, "silu", True, t, None, ()),
            )
            thin = empty(4096, rank)
            terms = [Term(i, empty(width, rank), left=thin) for i in range(2)]
            yield (
                f"backward {rank} {width}",
                lambda g=gate_up, h=h, t=terms, p=thin: glu_thin.backward(
                    h, g, torch.empty_like(g), "silu", True, p, t, None, ()
                ),
            )


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "sm_75"])
def test_compiles_without_spills(target: str) -> None:
    """Not for sm_75, where the ops apart serve."""
    assert_no_spills(__name__, target)


def test_the_shares_of_a_backward_are_as_large_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    empty = torch.Tensor.new_empty

    def noted(self: torch.Tensor, size: Any, **given: Any) -> torch.Tensor:
        if given.get("dtype") is FP32 and isinstance(size, int):
            made.append(4 * size)
        return empty(self, size, **given)

    _, given, first = case("cpu", FP16)
    asked = fused(glu_thin, monkeypatch)
    monkeypatch.setattr(torch.Tensor, "new_empty", noted)
    lora_mlp.device_bwd(*given, *first)
    limits = device.limits(given.gate_up.device)
    assert asked == ["backward"]
    assert glu_thin.scratch(TOKENS, WIDTH, RANK, RANK, limits) in made
