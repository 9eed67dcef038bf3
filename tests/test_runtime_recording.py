"""Recordings of host functions with lists of tensors: products, buffers, weights with room, tables.

Kernels run in Triton's interpreter, see ``repeated``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from repeated import interpreted_launches
from test_kernels_lora import HEIGHTS, Case, cotangents

from fusewright.kernels import lora, lora_products, qlora, room, thin
from fusewright.runtime.op import register_all
from fusewright.runtime.replay import Planned, planned

register_all()
BF16, F32 = torch.bfloat16, torch.float32
Layout = tuple[tuple[int, int, int], ...]
TWO: Layout = ((0, 3, -1), (2, 5, -1))
OWN: Layout = ((0, 3, 0), (1, 4, -1), (2, 5, 1))


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled in this process")
    monkeypatch.setattr(lora_products, "_multiply", lambda *given: thin.thin(*given))
    with interpreted_launches():
        yield


class _Counted:
    """A host function with plans, and how often it was run."""

    def __init__(self, host: Any, name: str) -> None:
        self.host, self.calls = host, 0
        schema = getattr(torch.ops.fusewright, name).default._schema
        self.planned: Planned = planned(self._run, schema, "cpu")

    def _run(self, *values: Any) -> Any:
        self.calls += 1
        return self.host(*values)


def _forward_args(case: Case) -> tuple[Any, ...]:
    widths = [sum(HEIGHTS)] if case.whole else list(HEIGHTS)
    group = [[t.detach() if isinstance(t, torch.Tensor) else t for t in v]
             if isinstance(v, list) else v for v in case.group()]  # fmt: skip
    group[0] = case.x.detach()
    return (*group, widths, case.x.dtype, case.roomy, case.grad_roomy)


def _backward_args(case: Case, thin: torch.Tensor, g: torch.Tensor) -> tuple[Any, ...]:
    given = _forward_args(case)
    dys = [g] if case.whole else list(g.split(HEIGHTS, -1))
    return (dys, thin, *given[:9], case.grad_roomy, True, True, False, True, True, True)


def _gradient(case: Case) -> torch.Tensor:
    """The gradient of y, with room behind its rows if the case says so."""
    whole = torch.cat(cotangents(case), -1)
    if not case.grad_roomy:
        return whole
    made = room.empty_roomy(whole.shape, 32, whole.dtype, whole.device)
    return made.copy_(whole)


def _flat(out: Any) -> list[torch.Tensor]:
    return [t for v in out for t in (v if isinstance(v, (list, tuple)) else [v])]


def _same(ours: Any, theirs: Any) -> None:
    for a, b in zip(_flat(ours), _flat(theirs), strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        assert torch.equal(a, b)


FORMS = {
    "room": lambda c: c.with_room(),
    "room everywhere": lambda c: c.with_roomy_neighbours(),
    "dense": lambda c: c,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adapters", [TWO, OWN], ids=["shared", "own inputs"])
@pytest.mark.parametrize("thin_dtype", [BF16, F32], ids=["bf16", "fp32"])
def test_a_plan_repeats_a_group(form: str, adapters: Layout, thin_dtype: torch.dtype) -> None:
    """Other layers with other numbers, at other addresses, run by the first ones' plan."""
    forward = _Counted(lora.device_fwd, "lora_group")
    backward = _Counted(lora.device_bwd, "lora_group_backward")
    alive = []
    for seed, calls in enumerate((1, 2, 2, 2)):
        case = FORMS[form](Case.draw(seed, BF16, thin_dtype, adapters, biased=(1,)))
        alive.append(case)
        for _ in range(2 if seed == 3 else 1):
            given = _forward_args(case)
            ours = forward.planned.call(*given)
            theirs = lora.device_fwd(*given)
            _same(ours, theirs)
            assert forward.calls == calls
            given = _backward_args(case, theirs[1], _gradient(case))
            ours = backward.planned.call(*given)
            _same(ours, lora.device_bwd(*given))
            assert backward.calls == calls


@pytest.mark.parametrize("thin_dtype", [BF16, F32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("adapters", [TWO, OWN], ids=["shared", "own inputs"])
def test_the_thin_products_alone(adapters: Layout, thin_dtype: torch.dtype) -> None:
    """What a group's forward gives beside y, by its kernels and by a plan."""
    alone = _Counted(lora.device_thin, "lora_thin")
    for seed in range(3):
        case = Case.draw(seed, BF16, thin_dtype, adapters).with_room()
        given = _forward_args(case)
        expected = lora.device_fwd(*given)[1]
        found = alone.planned.call(*given[:2], *given[4:6], *given[7:9])
        torch.testing.assert_close(found, expected)
        assert found.dtype is expected.dtype
    assert alone.calls == 2


class _Packed(torch.nn.Parameter):
    """A weight that carries more than its bytes, as bitsandbytes' do."""


def _quantised(seed: int, nested_code: torch.Tensor) -> tuple[Any, ...]:
    """A group of two layers over 4-bit weights with nested statistics, as the forward's arguments."""
    torch.manual_seed(seed)
    heights, width, rank = (64, 32), 128, 8
    blocks = [h * width // 64 for h in heights]
    rest = (
        [torch.rand(n).mul(255).to(torch.uint8) for n in blocks],
        [torch.tensor(0.1) for _ in heights],
        [torch.rand(-(-n // 256)) for n in blocks],
        [nested_code] * 2,
        list(heights), ["nf4"] * 2, [64] * 2, [256] * 2,
    )  # fmt: skip
    sizes = [(h * width // 2, 1) for h in heights]
    drawn = [torch.randint(0, 256, size, dtype=torch.uint8) for size in sizes]
    packed = [_Packed(bytes_, requires_grad=False) for bytes_ in drawn]
    down = [torch.randn(rank, width, dtype=BF16) for _ in heights]
    up = [torch.randn(h, rank, dtype=BF16) for h in heights]
    layout = ([0, 1], [-1, -1], [2.0] * 2, [sum(heights)], BF16, False, False)
    x = torch.randn(2, 7, width, dtype=BF16)
    return (x, [], packed, [None] * 2, down, up, *layout, *rest)


def test_a_plan_repeats_a_group_over_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dequantised into scratch memory that is another one each time."""
    monkeypatch.setattr(room, "serves", lambda *_: True)
    forward = _Counted(qlora.triton_fwd, "lora_group_4bit")
    backward = _Counted(qlora.triton_bwd, "lora_group_4bit_backward")
    nested_code, alive = torch.linspace(0, 1, 256), []
    for seed, calls in enumerate((1, 2, 2, 2)):
        given = _quantised(seed, nested_code)
        alive += [given, torch.empty(1 << 16)]
        ours, theirs = forward.planned.call(*given), qlora.triton_fwd(*given)
        _same(ours, theirs)
        dy = torch.randn(2, 7, 96, dtype=BF16)
        back = ([dy], theirs[1], *given[:9], False, *given[13:], True, True, False, True, True)
        _same(backward.planned.call(*back), qlora.triton_bwd(*back))
        assert forward.calls == backward.calls == calls


def test_a_plan_is_made_below_autograd() -> None:
    """Where a compiled region runs, modes see composite operations whole."""
    forward = _Counted(lora.device_fwd, "lora_group")
    with torch._C._AutoDispatchBelowAutograd():
        for seed in range(4):
            case = Case.draw(seed, BF16, BF16, TWO).with_room()
            given = _forward_args(case)
            _same(forward.planned.call(*given), lora.device_fwd(*given))
    assert forward.calls == 2


def test_weights_elsewhere_take_the_host_function() -> None:
    """Weights with the strides of a buffer, but in memory of somebody else, are not written behind."""
    forward = _Counted(lora.device_fwd, "lora_group")
    cases = [Case.draw(seed, BF16, BF16, TWO).with_room() for seed in range(3)]
    for case in cases:
        forward.planned.call(*_forward_args(case))
    assert forward.calls == 2
    step = cases[0].weights[0].stride(0)
    foreign = torch.full((sum(HEIGHTS) + 16, step), 7.0, dtype=BF16)
    tops = [0, HEIGHTS[0], HEIGHTS[0] + HEIGHTS[1]]
    views = [foreign[top : top + h, :40] for top, h in zip(tops, HEIGHTS, strict=True)]
    other = dataclasses.replace(cases[2], weights=views)
    given = _forward_args(other)
    forward.planned.call(*given)
    assert forward.calls == 3
    assert bool((foreign == 7.0).all()), "memory behind foreign weights was written"


def test_a_buffer_that_is_gone_takes_the_host_function() -> None:
    forward = _Counted(lora.device_fwd, "lora_group")
    for seed in range(3):
        case = Case.draw(seed, BF16, BF16, TWO).with_room()
        given = _forward_args(case)
        forward.planned.call(*given)
    before = forward.calls
    entry = room._KNOWN.pop(case.weights[0].data_ptr())
    forward.planned.call(*given)
    assert forward.calls == before + 1
    room._KNOWN[case.weights[0].data_ptr()] = entry
    forward.planned.call(*given)
    assert forward.calls == before + 1


def test_adapters_in_another_order_empty_the_room_first() -> None:
    """Two groups that lay their adapters into one buffer in turn, by plans or not."""
    forward = _Counted(lora.device_fwd, "lora_group")
    case = Case.draw(0, BF16, BF16, TWO).with_room()
    other = dataclasses.replace(
        Case.draw(1, BF16, BF16, ((1, 3, -1), (2, 2, -1))), weights=case.weights
    )
    for _ in range(3):
        for one in (case, case, case, other, other, other):
            given = _forward_args(one)
            _same(forward.planned.call(*given), lora.device_fwd(*given))
            dense = dataclasses.replace(one, weights=[w.clone() for w in one.weights])
            reference = lora.reference_fwd(*_forward_args(dense))
            for a, b in zip(forward.planned.call(*given)[0], reference[0], strict=True):
                torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=6e-2)


def test_what_cannot_be_repeated_is_run() -> None:
    """A value read back, and a random number, keep the host function."""
    schema = torch.ops.fusewright.activation.default._schema

    def reads(x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x + x.max().item()

    def draws(x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x + torch.rand_like(x)

    for host in (reads, draws):
        plan = planned(host, schema, "cpu")
        results = []
        for i in range(4):
            x = torch.full((2, 2), float(i))
            results.append(plan.call(x, "silu", F32) - x)
        assert len({float(r[0, 0]) for r in results}) == 4, host.__name__
