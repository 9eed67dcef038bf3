"""Adapters added to a result that is known as a tensor: against float64 beside PEFT's formula."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_not_worse_pooled

from fusewright.runtime.op import register_all

register_all()
OPS = torch.ops.fusewright
WIDTH, HEIGHT = 40, 24
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (the layer's result, x, adapters, the sum)
DTYPES = [
    (BF16, BF16, BF16, BF16),
    (BF16, BF16, FP32, BF16),
    (FP16, FP16, FP16, FP16),
    (FP16, FP16, FP32, FP16),
    (FP32, FP32, FP32, FP32),
    (BF16, FP32, FP32, FP32),  # a layer that casts its input down, beside a float32 stream
    (FP16, FP32, FP32, FP32),
    (FP32, BF16, FP32, FP32),
    (FP32, BF16, BF16, BF16),
]
ADAPTERS = {
    "one": ((3, -1),),
    "two": ((2, -1), (6, -1)),
    "dropped": ((3, 0), (5, 1)),
    "one dropped, one not": ((3, 0), (5, -1)),
    "wider than the layer": ((48, -1),),
}


@dataclasses.dataclass
class Case:
    """The operands; ``adapters`` is (rank, own input or -1) for each."""

    base: torch.Tensor
    x: torch.Tensor
    inputs: list[torch.Tensor]
    down: list[torch.Tensor]
    up: list[torch.Tensor]
    source: list[int]
    scales: list[float]
    out: torch.dtype

    @classmethod
    def draw(
        cls,
        seed: int,
        dtypes: tuple[torch.dtype, ...] = (FP32,) * 4,
        adapters: tuple[tuple[int, int], ...] = ADAPTERS["two"],
        device: str = "cpu",
        lead: tuple[int, ...] = (2, 7),
    ) -> Case:
        """Random operands, all of which want a gradient."""
        generator = torch.Generator().manual_seed(seed)
        base, x, thin, out = dtypes

        def normal(*extent: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
            t = torch.randn(extent, generator=generator) * scale
            return t.to(dtype).to(device).requires_grad_()

        own = sorted({s for _, s in adapters if s >= 0})
        return cls(
            normal(*lead, HEIGHT, dtype=base),
            normal(*lead, WIDTH, dtype=x),
            [normal(*lead, WIDTH, dtype=thin) for _ in own],
            [normal(r, WIDTH, dtype=thin, scale=0.2) for r, _ in adapters],
            [normal(HEIGHT, r, dtype=thin) for r, _ in adapters],
            [s for _, s in adapters],
            [0.5 + i for i in range(len(adapters))],
            out,
        )

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What wants a gradient; x gets one only from adapters that read x itself."""
        read = [self.x] if -1 in self.source else []
        every = [self.base, *read, *self.inputs, *self.down, *self.up]
        return [t for t in every if t.requires_grad]

    def op(self) -> torch.Tensor:
        """y by the registered op."""
        rest = (self.inputs, self.down, self.up, self.source, self.scales, self.out)
        y, _ = OPS.lora_added(self.base, self.x, *rest)
        return y

    def formula(self) -> torch.Tensor:
        """PEFT's."""
        y = self.base
        for a, b, source, scale in zip(self.down, self.up, self.source, self.scales, strict=True):
            read = self.x if source < 0 else self.inputs[source]
            y = y + F.linear(F.linear(read.to(a.dtype), a), b) * scale
        return y.to(self.out)

    def double(self) -> Case:
        """The same values in float64."""

        def wide(t: Any) -> Any:
            if isinstance(t, list):
                return [wide(u) for u in t]
            if not isinstance(t, torch.Tensor):
                return FP64 if isinstance(t, torch.dtype) else t
            return t.detach().double().requires_grad_(t.requires_grad)

        return Case(*(wide(v) for v in vars(self).values()))


def step(case: Case, how: str) -> tuple[torch.Tensor, ...]:
    """y, then the gradients for one fixed gradient of y."""
    y = getattr(case, how)()
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(99)).to(BF16)
    dy = dy.to(y.device, y.dtype)  # the same values in every dtype
    return (y.detach(), *torch.autograd.grad(y, case.leaves, dy))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: " ".join(str(t)[6:] for t in d))
def test_not_worse_than_pefts_formula(
    dtypes: tuple[torch.dtype, ...], adapters: str, device: str
) -> None:
    draws = []
    for seed in range(12):
        case = Case.draw(seed, dtypes, ADAPTERS[adapters], device)
        oracle = step(case.double(), "formula")
        draws.append((step(case, "op"), step(case, "formula"), oracle))
    for at, result in enumerate(draws[0][0]):
        assert result.dtype is draws[0][1][at].dtype
        # As in test_kernels_lora: the luck of twelve draws, and of a library's order of sums.
        factor = 2.0 if result.dtype is FP32 else 1.1
        one = [((o[at],), (e[at],), (x[at],)) for o, e, x in draws]
        assert_not_worse_pooled(one, (f"result {at}",), factor)


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_gradcheck(adapters: str) -> None:
    case = Case.draw(0, adapters=ADAPTERS[adapters], lead=(3,)).double()
    assert torch.autograd.gradcheck(lambda *_: case.op(), tuple(case.leaves))


def test_large_adapters_are_split() -> None:
    """An adapter that outweighs the layer shows whether a half of a factor was left out."""
    case = Case.draw(1, (BF16, BF16, FP32, BF16))
    case = dataclasses.replace(case, base=(case.base * 1e-3).detach())
    with torch.no_grad():
        true, mine = case.double().formula(), case.op().double()
    # half a unit in the last place of bf16, uniformly spread
    assert float((mine - true).norm() / true.norm()) < 2.0**-8 / 3**0.5


def test_only_what_wants_a_gradient_gets_one() -> None:
    case = Case.draw(0, adapters=ADAPTERS["one dropped, one not"])
    for t in (case.base, case.x, case.inputs[0], case.down[0], case.up[1]):
        t.requires_grad_(False)
    wanted = case.leaves
    assert len(wanted) == 2
    case.op().sum().backward()
    assert all(t.grad is not None for t in wanted)
    assert case.base.grad is None and case.x.grad is None and case.down[0].grad is None


def test_the_gradient_of_the_base_is_nobody_elses() -> None:
    """Changing what came back for the base changes no gradient that was handed in."""
    case = Case.draw(0)
    dy = torch.ones(case.base.shape)
    (dbase,) = torch.autograd.grad(case.op(), [case.base], dy)
    dbase.zero_()
    assert bool((dy == 1).all())


def test_no_rows() -> None:
    case = Case.draw(0, lead=(0, 7))
    y, *grads = step(case, "op")
    assert y.shape == (0, 7, HEIGHT)
    assert all(g.shape == t.shape for g, t in zip(grads, case.leaves, strict=True))
    assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("turned", [False, True], ids=["expanded", "transposed"])
def test_gradients_of_any_strides(turned: bool) -> None:
    case = Case.draw(0)
    dy = torch.randn(2, 7, 1).expand(2, 7, HEIGHT)
    if turned:
        dy = torch.randn(HEIGHT, 7, 2).permute(2, 1, 0)
    ours = torch.autograd.grad(case.op(), case.leaves, dy)
    wanted = torch.autograd.grad(case.formula(), case.leaves, dy)
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": torch.ones(2, 7, 23)}, r"base: expected shape \(2, 7, 24\), got \(2, 7, 23\)"),
        ({"base": torch.ones(2, 6, 24)}, r"base: expected shape \(2, 7, 24\)"),
        ({"base": torch.ones(2, 7, 24, device="meta")}, "base: expected device cpu"),
        ({"down": [torch.ones(2, 39), torch.ones(6, 40)]}, r"down\[0\]: expected shape \(r, 40\)"),
        ({"up": [torch.ones(24, 3), torch.ones(24, 6)]}, r"up\[0\]: expected shape \(24, 2\)"),
        ({"up": [torch.ones(24, 2), torch.ones(20, 6)]}, r"up\[1\]: expected shape \(24, 6\)"),
        ({"scales": [1.0]}, "expected one entry per adapter"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Case.draw(0), **change).op()
