"""LoRA groups: against float64 beside PEFT's formula, with and without room around the weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from numerics import assert_not_worse_pooled

from fusewright.kernels import lora, room
from fusewright.kernels.lora_group import Group, plan
from fusewright.runtime.op import register_all

register_all()
OPS = torch.ops.fusewright
WIDTH, HEIGHTS = 40, (16, 8, 24)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclasses.dataclass
class Case:
    """The operands of a group; ``adapters`` is (layer, rank, own input or -1) for each."""

    x: torch.Tensor
    inputs: list[torch.Tensor]
    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    down: list[torch.Tensor]
    up: list[torch.Tensor]
    member: list[int]
    source: list[int]
    scales: list[float]
    whole: bool = False
    roomy: bool = False
    grad_roomy: bool = False

    @classmethod
    def draw(
        cls,
        seed: int,
        base: torch.dtype = FP32,
        thin: torch.dtype = FP32,
        adapters: tuple[tuple[int, int, int], ...] = ((0, 3, -1), (2, 5, -1)),
        biased: tuple[int, ...] = (),
        device: str = "cpu",
        lead: tuple[int, ...] = (2, 7),
    ) -> Case:
        """Random operands; every adapter and bias wants a gradient, and so does x."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*extent: int, dtype: torch.dtype = base, scale: float = 1.0) -> torch.Tensor:
            t = torch.randn(extent, generator=generator) * scale
            return t.to(dtype).to(device)

        own = sorted({s for _, _, s in adapters if s >= 0})
        return cls(
            normal(*lead, WIDTH).requires_grad_(),
            [normal(*lead, WIDTH, dtype=thin).requires_grad_() for _ in own],
            [normal(h, WIDTH, scale=0.2) for h in HEIGHTS],
            [normal(h).requires_grad_() if j in biased else None for j, h in enumerate(HEIGHTS)],
            [normal(r, WIDTH, dtype=thin, scale=0.2).requires_grad_() for _, r, _ in adapters],
            [normal(HEIGHTS[j], r, dtype=thin).requires_grad_() for j, r, _ in adapters],
            [j for j, _, _ in adapters],
            [s for _, _, s in adapters],
            [0.5 + i for i in range(len(adapters))],
        )

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What wants a gradient."""
        lists = (self.inputs, self.weights, self.biases, self.down, self.up)
        every = (self.x, *(t for group in lists for t in group))
        return [t for t in every if t is not None and t.requires_grad]

    def group(self) -> Group:
        """As the kernels see it."""
        return Group(*list(vars(self).values())[:9])

    def op(self) -> list[torch.Tensor]:
        """y of every layer, by the registered op."""
        widths = [sum(HEIGHTS)] if self.whole else list(HEIGHTS)
        dtype = self.x.dtype
        ys, _ = OPS.lora_group(*self.group(), widths, dtype, self.roomy, self.grad_roomy)
        return list(ys[0].split(HEIGHTS, -1)) if self.whole else ys

    def formula(self) -> list[torch.Tensor]:
        """PEFT's: base, adapter in its own dtype, scaled, added."""
        ys = []
        for j, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = F.linear(self.x, w, b)
            for i, at in enumerate(self.member):
                if at == j:
                    own = self.x if self.source[i] < 0 else self.inputs[self.source[i]]
                    low = F.linear(own.to(self.down[i].dtype), self.down[i])
                    y = y + F.linear(low, self.up[i]) * self.scales[i]
            ys.append(y.to(self.x.dtype))
        return ys

    def double(self) -> Case:
        """The same values in float64."""

        def wide(t: Any) -> Any:
            if isinstance(t, list):
                return [wide(u) for u in t]
            if not isinstance(t, torch.Tensor):
                return t
            return t.detach().double().requires_grad_(t.requires_grad)

        return Case(*(wide(v) for v in vars(self).values()))

    def with_room(self) -> Case:
        """The weights where the augmented product needs them."""
        how = plan(self.group())
        space = room.needed(how.columns, how.thin)
        return dataclasses.replace(self, weights=room.allocate(self.weights, space))

    def with_roomy_neighbours(self) -> Case:
        """x, and the gradient of y, with room behind their rows; y handed out whole."""
        made = self.with_room()
        space = made.weights[0].stride(0) - WIDTH
        x = room.empty_roomy(self.x.shape, space, self.x.dtype, self.x.device)
        x.copy_(self.x.detach())
        return dataclasses.replace(
            made, x=x.requires_grad_(), whole=True, roomy=True, grad_roomy=True
        )


def cotangents(case: Case) -> list[torch.Tensor]:
    """One fixed gradient per layer."""
    generator = torch.Generator().manual_seed(99)
    lead, dtype, device = case.x.shape[:-1], case.x.dtype, case.x.device
    whole = torch.randn((*lead, sum(HEIGHTS)), generator=generator)
    whole = whole.to(BF16).to(dtype).to(device)  # the same values in every dtype
    return list(whole.split(HEIGHTS, -1))


def step(case: Case, how: str) -> tuple[torch.Tensor, ...]:
    """Results, then gradients."""
    ys = getattr(case, how)()
    ups = [c.to(y.dtype) for c, y in zip(cotangents(case), ys, strict=True)]
    return (*ys, *torch.autograd.grad(ys, case.leaves, ups))


FORMS = {"plain": lambda c: c, "room": Case.with_room, "roomy": Case.with_roomy_neighbours}
ADAPTERS = {
    "two of three layers": ((0, 3, -1), (2, 5, -1)),
    "all layers": ((0, 4, -1), (1, 4, -1), (2, 4, -1)),
    "two on one layer": ((1, 2, -1), (1, 6, -1)),
    "dropped inputs": ((0, 3, 0), (2, 5, 1)),
    "one dropped, one not": ((0, 3, 0), (0, 5, -1)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize(("base", "thin"), DTYPES, ids=str)
def test_not_worse_than_pefts_formula(
    base: torch.dtype, thin: torch.dtype, adapters: str, form: str, device: str
) -> None:
    draws = []
    for seed in range(12):
        case = Case.draw(seed, base, thin, ADAPTERS[adapters], (0, 2), device)
        oracle = step(case.double(), "formula")
        draws.append((step(FORMS[form](case), "op"), step(case, "formula"), oracle))
    for at, result in enumerate(draws[0][0]):
        # 16 bits: a tenth is the luck of twelve draws. float32: both errors are a last bit or two of
        # sums that a library takes in an order of its own.
        factor = 2.0 if result.dtype is FP32 else 1.1
        one = [((o[at],), (e[at],), (x[at],)) for o, e, x in draws]
        assert_not_worse_pooled(one, (f"result {at}",), factor)


def device_step(case: Case) -> tuple[torch.Tensor, ...]:
    """As ``step`` with the products of a device, of weights without room, wherever the tensors are."""
    with torch.no_grad():
        dtype = case.x.dtype
        ys, thin = lora.device_fwd(*case.group(), list(HEIGHTS), dtype, False, False)
        needs = (True, True, False, True, True, True)
        got = lora.device_bwd(cotangents(case), thin, *case.group(), False, *needs)
    biases = [d for d, b in zip(got.biases, case.biases, strict=True) if b is not None]
    return (*ys, got.x, *got.inputs, *biases, *got.down, *got.up)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize(("base", "thin"), DTYPES, ids=str)
def test_a_device_without_room(
    base: torch.dtype, thin: torch.dtype, adapters: str, device: str
) -> None:
    """Adapters added to the base's products; allowed is what the other forms are allowed."""
    draws = []
    for seed in range(12):
        case = Case.draw(seed, base, thin, ADAPTERS[adapters], (0, 2), device)
        draws.append((device_step(case), step(case, "formula"), step(case.double(), "formula")))
    for at, result in enumerate(draws[0][0]):
        factor = 2.0 if result.dtype is FP32 else 1.1
        one = [((o[at],), (e[at],), (x[at],)) for o, e, x in draws]
        assert_not_worse_pooled(one, (f"result {at}",), factor)


@pytest.mark.parametrize("form", FORMS)
def test_dx_of_several_layers_is_rounded_once(form: str) -> None:
    """In 16 bits dx sums three layers and three adapters, and errs less than eager's chain of sums."""
    draws = []
    for seed in range(6):
        case = Case.draw(seed, BF16, BF16, ADAPTERS["all layers"], lead=(64,))
        results = (step(FORMS[form](case), "op"), step(case, "formula"))
        draws.append((*results, step(case.double(), "formula")))
    one = [((o[3],), (e[3],), (x[3],)) for o, e, x in draws]
    assert_not_worse_pooled(one, ("dx",), 0.9)


@pytest.mark.parametrize("form", FORMS)
def test_float32_adapters_keep_float32(form: str) -> None:
    """Beside bf16 weights an adapter's own gradients have float32's error, not bf16's."""
    case = Case.draw(0, BF16, FP32)
    oracle = step(case.double(), "formula")
    ours = step(FORMS[form](case), "op")
    for mine, true in zip(ours[-4:], oracle[-4:], strict=True):
        assert mine.dtype is FP32
        assert float((mine.double() - true).norm() / true.norm()) < 2e-5


def test_large_adapters_are_split() -> None:
    """An adapter that outweighs its base shows whether a half of a factor was left out."""
    case = Case.draw(1, BF16, FP32)
    case = dataclasses.replace(case, weights=[w * 1e-3 for w in case.weights]).with_room()
    exact = case.double().formula()
    for mine, true in zip(case.op(), exact, strict=True):
        # half a unit in the last place of bf16, uniformly spread
        with torch.no_grad():
            assert float((mine.double() - true).norm() / true.norm()) < 2.0**-8 / 3**0.5


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_gradcheck(adapters: str) -> None:
    case = Case.draw(0, adapters=ADAPTERS[adapters], biased=(1,), lead=(3,)).double()
    leaves = case.leaves

    def run(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(case.op())

    assert torch.autograd.gradcheck(run, tuple(leaves))


def test_backward_is_the_derivative() -> None:
    """The header's rules, from the formula of one element by sympy; a wrong sign would fail."""
    x, g = sympy.symbols("x0:2"), sympy.symbols("g0:2")
    w, a, b = (sympy.symbols(f"{n}0:4") for n in "wab")
    s = sympy.Symbol("s")
    X, G = sympy.Matrix([x]), sympy.Matrix([g])
    W, A, B = (sympy.Matrix(2, 2, m) for m in (w, a, b))
    y = X * W.T + s * X * A.T * B.T
    loss = sum(G[i] * y[i] for i in range(2))
    P, S = s * G * B, s * X * A.T
    rules = {x: G * W + P * A, a: P.T * X, b: G.T * S, w: G.T * X}
    for symbols, rule in rules.items():
        derived = [sympy.diff(loss, v) for v in symbols]
        assert all(sympy.expand(d - r) == 0 for d, r in zip(derived, rule, strict=True))
    assert sympy.expand(sympy.diff(loss, a[0]) + (P.T * X)[0]) != 0


def test_only_what_wants_a_gradient_gets_one() -> None:
    case = Case.draw(0, biased=(0, 1)).with_room()
    case.down[0].requires_grad_(False)
    case.biases[1].requires_grad_(False)  # type: ignore[union-attr]
    case.x = case.x.detach()
    ys = case.op()
    torch.autograd.backward(ys, cotangents(case))
    assert case.down[0].grad is None and case.biases[1].grad is None  # type: ignore[union-attr]
    assert all(t.grad is not None for t in case.leaves)
    assert all(w.grad is None for w in case.weights)


def test_trained_base() -> None:
    case = Case.draw(0)
    case.weights = [w.requires_grad_() for w in case.weights]
    for mine, theirs in zip(step(case, "op"), step(case, "formula"), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_twice_through_one_graph() -> None:
    case = Case.draw(0, BF16, BF16).with_roomy_neighbours()
    ys = case.op()
    first = torch.autograd.grad(ys, case.leaves, cotangents(case), retain_graph=True)
    second = torch.autograd.grad(ys, case.leaves, cotangents(case))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_adapters_in_turn_on_one_base() -> None:
    """The room is shared: what one forward wrote is not what another's backward reads."""
    one = Case.draw(0, adapters=((0, 3, -1), (2, 5, -1))).with_room()
    other = dataclasses.replace(Case.draw(1, adapters=((1, 4, -1),)), weights=one.weights)
    ys, zs = one.op(), other.op()
    for case, results in ((one, ys), (other, zs)):
        expected = step(case, "formula")
        for mine, theirs in zip(results, expected, strict=False):
            torch.testing.assert_close(mine, theirs)
        got = torch.autograd.grad(results, case.leaves, cotangents(case))
        for mine, theirs in zip(got, expected[3:], strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [torch.ones(16, 39), torch.ones(8, 40), torch.ones(24, 40)]}, r"weights\[0\]"),
        ({"down": [torch.ones(3, 39), torch.ones(5, 40)]}, r"down\[0\]: expected shape \(r, 40\)"),
        ({"up": [torch.ones(16, 4), torch.ones(24, 5)]}, r"up\[0\]: expected shape \(16, 3\)"),
        ({"biases": [torch.ones(15), None, None]}, r"biases\[0\]: expected \(16,\)"),
        ({"biases": [None]}, "biases: expected one entry per weight, got 1 for 3"),
        ({"scales": [1.0]}, "expected one entry per adapter"),
        ({"inputs": [torch.ones(2, 40)]}, r"inputs\[0\]: expected \(2, 7, 40\) like x"),
        ({"down": [torch.ones(3, 40, device="meta"), torch.ones(5, 40)]}, "down: expected device"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Case.draw(0), **change).op()


# --- room


def test_room_is_found_by_the_memory_not_by_its_strides() -> None:
    weights = [torch.randn(16, 8), torch.randn(4, 8)]
    space = room.needed(5, 17)
    assert space == room.Room(16, 32)
    views = room.allocate(weights, space)
    assert all(torch.equal(v, w) for v, w in zip(views, weights, strict=True))
    assert room.find(views, 16, 32) is not None and room.find(views, 17, 0) is None
    assert room.find(views[:1], 1, 1) is None and room.find(views[::-1], 1, 1) is None
    mine = torch.zeros(52, 24)
    assert room.find([mine[:16, :8], mine[16:20, :8]], 1, 1) is None
    copies = [v.clone() for v in views]
    assert room.find(copies, 1, 1) is None and not room.owned(copies[0])


def test_room_of_freed_weights_is_forgotten() -> None:
    views = room.allocate([torch.randn(16, 8), torch.randn(2, 8)], room.needed(1, 1))
    addresses = [v.data_ptr() for v in views]
    entry = room._KNOWN[addresses[0]]
    del views[0]
    assert not entry.weak.expired()  # the other weight keeps the memory
    del views
    assert entry.weak.expired()
    kept = room.allocate([torch.randn(16, 8)], room.needed(1, 1))
    assert room.owned(kept[0])
    assert all(not e.weak.expired() for e in room._KNOWN.values())


def test_room_that_is_not_there_is_not_written() -> None:
    """Rows said to have room that do not have it (saved and brought back, say) are copied."""
    case = Case.draw(0, BF16, BF16).with_roomy_neighbours()
    dense = dataclasses.replace(case, x=case.x.detach().clone().requires_grad_())
    assert all(torch.equal(a, b) for a, b in zip(case.op(), dense.op(), strict=True))


def test_weights_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="one width, dtype and device"):
        room.allocate([torch.ones(2, 3), torch.ones(2, 4)], room.needed(1, 1))


def test_room_pays_for_16_bits_on_a_device() -> None:
    """In float32 the library's product of x alone errs less than a longer one."""
    device = torch.device("cuda")
    assert room.serves(device, BF16) and room.serves(device, FP16)
    assert not room.serves(device, FP32) and not room.serves(torch.device("cpu"), BF16)


def test_a_small_adapter_is_not_rounded_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of Adam makes B of one size; PEFT adds what it gives to a y that is rounded already."""
    monkeypatch.setitem(globals(), "WIDTH", 256)
    monkeypatch.setitem(globals(), "HEIGHTS", (256, 64, 64))
    adapters = tuple((j, 16, -1) for j in range(3))
    case = Case.draw(1, BF16, FP32, adapters, lead=(2, 32))
    for up, down in zip(case.up, case.down, strict=True):
        up.data = up.data.sign() * 2e-4
        down.data *= 0.1
    true = case.double()
    base = torch.cat([F.linear(true.x, w) for w in true.weights], -1)
    part = torch.cat(true.formula(), -1) - base
    group = [
        [t.detach() if isinstance(t, torch.Tensor) else t for t in v] if isinstance(v, list) else v
        for v in case.with_room().group()
    ]
    group[0] = case.x.detach()
    (y,), _ = lora.device_fwd(*group, [sum(HEIGHTS)], BF16, False, False)
    peft = torch.cat(case.formula(), -1)
    kept = [float(((t.double() - base) * part).sum() / part.square().sum()) for t in (y, peft)]
    assert 0.8 < kept[0] < 1.2 and kept[1] < 0.2
