"""Thin products: every dtype, layout and placement against float64, small copies, launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import thin_cases
import torch
from backends import Backend
from launches import TARGETS, assert_no_spills, compile_launches
from numerics import error

from fusewright.kernels import device, thin_copies, thin_launch, thin_plan
from fusewright.kernels.thin import Copy, Result, Term, Wide, reference, thin

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP16, FP32), (FP32, BF16)]
GARBAGE = 7.0


def run(backend: Backend) -> Callable[..., list[Result]]:
    return reference if backend.name == "reference" else thin


def new(backend: Backend, *shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.randn(shape, device=backend.device).to(dtype)


def product(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return scale * (a.double() @ b.double())


def tolerance(backend: Backend, dtype: torch.dtype) -> float:
    """Half a unit of the result's dtype, a whole one where bfloat16 is cut off; nothing for a
    float32 operand beside bfloat16, whose three parts are exact. Then the sums in float32, where
    plain float32 products on the CPU come to five times 2^-24."""
    cut = 1 if backend.rounds_bfloat16 else 2
    unit = {BF16: 2.0**-8 * cut, FP16: 2.0**-11, FP32: 0.0}[dtype]
    return unit + 2.0**-21


def check(backend: Backend, actual: torch.Tensor | None, oracle: torch.Tensor, *with_: torch.dtype
          ) -> None:  # fmt: skip
    """The error's root mean square, relative to the oracle's, is what rounding explains."""
    assert actual is not None and actual.shape == oracle.shape
    assert actual.dtype == torch.promote_types(*with_)
    size = float(oracle.square().mean().sqrt())
    assert error(actual, oracle) <= tolerance(backend, actual.dtype) * size


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(70, 300, 20), (33, 128, 1), (64, 257, 64), (1, 40, 3)], ids=str)
def test_both_products_of_one_matrix(
    backend: Backend,
    shape: tuple[int, int, int],
    transposed: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    (rows, width, r), (wide, narrow) = shape, dtypes
    m = new(backend, rows, width, dtype=wide)
    v, u = new(backend, width, r, dtype=narrow), new(backend, rows, r, dtype=narrow)
    given = v.t().contiguous() if transposed else v
    term = Term(0, given, transposed, 0.5, left=u, left_transposed=transposed, left_scale=2.0)
    p, left = product(m, v, 0.5), product(m.t(), u, 2.0)
    for one in (term, term._replace(left=None), term._replace(right=None)):
        (found,) = run(backend)([m], [one])
        assert (found.right is None) == (one.right is None)
        assert (found.left is None) == (one.left is None)
        if one.right is not None:
            check(backend, found.right, p, wide, narrow)
        if one.left is not None:
            check(backend, found.left, left.t() if transposed else left, wide, narrow)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("ranks", [[16] * 3, [3, 20, 3, 3, 3, 3], [96, 96, 96], [200, 8]], ids=str)
def test_several_terms_of_one_matrix(
    backend: Backend, ranks: list[int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    wide, narrow = dtypes
    m = new(backend, 40, 150, dtype=wide)
    downs = [new(backend, r, 150, dtype=narrow) for r in ranks]
    us = [new(backend, 40, r, dtype=narrow) for r in ranks]
    terms = [
        Term(0, a, True, 1.0 + i, left=u) for i, (a, u) in enumerate(zip(downs, us, strict=True))
    ]
    for at, found in enumerate(run(backend)([m], terms)):
        check(backend, found.right, product(m, downs[at].t(), 1.0 + at), wide, narrow)
        check(backend, found.left, product(m.t(), us[at]), wide, narrow)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("both", [False, True])
def test_matrices_that_lie_anywhere(
    backend: Backend, both: bool, count: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    (wide, narrow), widths = dtypes, [130, 64, 257, 40, 300][:count]
    fused = new(backend, 50, 900, dtype=wide)  # columns of a wider tensor, and one by itself
    ms = [fused[:, 100 * i : 100 * i + w] for i, w in enumerate(widths)]
    ms[-1] = ms[-1].contiguous()
    vs = [new(backend, w, 8, dtype=narrow) for w in widths]
    us = [new(backend, 50, 24, dtype=narrow)[:, 8:16] for _ in widths]
    terms = [
        Term(i, v, False, 2.0 - i, left=u if both else None)
        for i, (v, u) in enumerate(zip(vs, us, strict=True))
    ]
    for at, found in enumerate(run(backend)(ms, terms)):
        check(backend, found.right, product(ms[at], vs[at], 2.0 - at), wide, narrow)
        if both:
            check(backend, found.left, product(ms[at].t(), us[at]), wide, narrow)


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rows", [5, 70])
def test_a_wider_buffer_receives_blocks_and_products(
    backend: Backend, rows: int, left: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    (wide, narrow), widths, r = dtypes, [40, 130], 5
    ms = [new(backend, rows, w, dtype=wide) for w in widths]
    vs = [new(backend, w, r, dtype=narrow) for w in widths]
    us = [new(backend, rows, r, dtype=narrow) for _ in widths]
    step = 10 if wide != narrow else 0
    end = 170 + (30 if step else 10)
    buffer = torch.full((rows, 220), GARBAGE, dtype=wide, device=backend.device)
    terms = [
        Term(i, v, False, 3.0, 170 + i * r, left=u if left else None)
        for i, (v, u) in enumerate(zip(vs, us, strict=True))
    ]
    found = run(backend)(ms, terms, Wide(buffer, [0, 40], step, (end, 210)))
    assert torch.equal(buffer[:, :170], torch.cat(ms, 1))
    assert not buffer[:, end:210].any() and (buffer[:, 210:] == GARBAGE).all()
    for at, result in enumerate(found):
        oracle = product(ms[at], vs[at], 3.0)
        check(backend, result.right, oracle, wide, narrow)
        where = 170 + at * r
        high = buffer[:, where : where + r]
        if step:
            low = buffer[:, where + step : where + step + r]
            size = float(oracle.square().mean().sqrt()) * (1 if backend.rounds_bfloat16 else 4)
            assert error(high.float() + low.float(), result.right) <= 2.0**-17 * size
            assert error(high, result.right) <= 2.0**-8 * size
            assert torch.equal(buffer[:, where + 2 * step : where + 2 * step + r], high)
        else:
            assert result.right is not None and result.right.data_ptr() == high.data_ptr()


@pytest.mark.parametrize("rows", [5, 70])
def test_dense_results_beside_the_wider_buffer(backend: Backend, rows: int) -> None:
    m = new(backend, rows, 64, dtype=BF16)
    downs = [new(backend, 3, 64, dtype=BF16) for _ in range(3)]
    buffer = torch.full((rows, 80), GARBAGE, device=backend.device, dtype=BF16)
    terms = [Term(0, a, True, 0.5, 64 + 3 * i) for i, a in enumerate(downs)]
    found = run(backend)([m], terms, Wide(buffer, [0], 0, (73, 80), True))
    for at, (a, result) in enumerate(zip(downs, found, strict=True)):
        check(backend, result.right, product(m, a.t(), 0.5), BF16, BF16)
        assert result.right is not None
        assert result.right.untyped_storage()._cdata != buffer.untyped_storage()._cdata
        assert torch.equal(result.right, buffer[:, 64 + 3 * at : 67 + 3 * at])
    assert torch.equal(buffer[:, :64], m) and not buffer[:, 73:].any()


def test_a_block_that_lies_in_the_buffer_stays(backend: Backend) -> None:
    buffer = torch.full((33, 96), GARBAGE, device=backend.device)
    buffer[:, :64] = torch.randn(33, 64)
    x, a = buffer[:, :64], new(backend, 4, 64)
    kept = x.clone()
    (found,) = run(backend)([x], [Term(0, a, True, 1.0, 64)], Wide(buffer, [None], 0, (68, 96)))
    check(backend, found.right, product(kept, a.t()), FP32, FP32)
    assert torch.equal(x, kept) and not buffer[:, 68:].any()


def test_blocks_without_a_term_are_copied(backend: Backend) -> None:
    ms = [new(backend, 9, w) for w in (16, 20, 7)]
    buffer = torch.full((9, 64), GARBAGE, device=backend.device)
    v = new(backend, 20, 2)
    run(backend)(ms, [Term(1, v, False, 1.0, 43)], Wide(buffer, [0, 16, 36], 0, (45, 64)))
    assert torch.equal(buffer[:, :43], torch.cat(ms, 1)) and not buffer[:, 45:].any()
    buffer.fill_(GARBAGE)
    run(backend)(ms, [], Wide(buffer, [0, 16, 36], 0, (43, 64)))
    assert torch.equal(buffer[:, :43], torch.cat(ms, 1)) and not buffer[:, 43:].any()


@pytest.mark.parametrize("rows", [0, 40])
def test_small_copies_ride_along(backend: Backend, rows: int) -> None:
    up, down = new(backend, 700, 20), new(backend, 20, 500)
    weight = torch.full((820, 700), GARBAGE, device=backend.device, dtype=BF16)
    copies = [
        Copy(up, weight[:700, 500:520], 20),
        Copy(down, weight[700:720, :500], 20 * weight.stride(0)),
        Copy(up[:30].t(), weight[780:800, 600:630]),
        Copy(weight[:5, :5].float().to(BF16).clone(), weight[810:815, :5]),
    ]
    m, v = new(backend, rows, 64, dtype=BF16), new(backend, 64, 4, dtype=BF16)
    (found,) = run(backend)([m], [Term(0, v)], None, copies)
    check(backend, found.right, product(m, v), BF16, BF16) if rows else None
    for source, hi, again, lo in (
        (up, weight[:700, 500:520], weight[:700, 520:540], weight[:700, 540:560]),
        (down, weight[700:720, :500], weight[720:740, :500], weight[740:760, :500]),
    ):
        assert torch.equal(hi, again)
        limit = 2.0**-16 if backend.rounds_bfloat16 else 2.0**-14
        assert ((hi.float() + lo.float() - source).abs() <= limit * source.abs()).all()
        unit = 2.0**-8 if backend.rounds_bfloat16 else 2.0**-7
        assert ((hi.float() - source).abs() <= unit * source.abs()).all()
    assert error(weight[780:800, 600:630], up[:30].t()) <= 2.0**-8
    assert (weight[:700, :500] == GARBAGE).all() and (weight[:700, 560:] == GARBAGE).all()
    assert (weight[810:815, :5] == GARBAGE).all() and (weight[815:] == GARBAGE).all()


def test_a_product_of_split_columns_is_nearly_float32(backend: Backend) -> None:
    m, v, a = new(backend, 48, 96, dtype=BF16), new(backend, 96, 4), new(backend, 40, 4)
    buffer = torch.zeros((48, 12), device=backend.device, dtype=BF16)
    weight = torch.zeros((40, 12), device=backend.device, dtype=BF16)
    terms = [Term(0, v, False, 1.0, 0)]
    run(backend)([m], terms, Wide(buffer, [None], 4), [Copy(a, weight[:, :4], 4)])
    y, oracle = buffer.double() @ weight.double().t(), product(m, v) @ a.double().t()
    assert error(y, oracle) <= 2.0**-14 * float(oracle.square().mean().sqrt())


def _both(m: torch.Tensor, r: int, narrow: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    v = torch.randn(m.shape[1], r, device=m.device).to(narrow)
    u = torch.randn(m.shape[0], r, device=m.device).to(narrow)
    found = thin([m], [Term(0, v, left=u), Term(0, v, scale=2.0, left=u)])
    return [t for result in found for t in result if t is not None]


def test_every_cut_gives_the_same(kernels: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    m = new(kernels, 150, 300)
    expected = _both(m, 3, FP32)
    v = new(kernels, 300, 3)
    alone = thin([m], [Term(0, v)])[0].right
    for each in (1, 2, 100):
        monkeypatch.setattr(thin_plan, "split", lambda *_, each=each: each)
        thin_plan.right_cut.cache_clear()
        thin_plan.left_cut.cache_clear()
        torch.testing.assert_close(_both(m, 3, FP32), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(thin([m], [Term(0, v)])[0].right, alone, rtol=1e-5, atol=1e-4)
    monkeypatch.undo()
    thin_plan.right_cut.cache_clear()
    thin_plan.left_cut.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [BF16, FP32])
def test_bitwise_reproducible(narrow: torch.dtype) -> None:
    m = torch.randn(4096, 14336, device="cuda", dtype=BF16)
    first = _both(m, 16, narrow)
    for _ in range(5):
        torch.empty(2**28, dtype=torch.uint8, device="cuda").random_()
        assert all(torch.equal(a, b) for a, b in zip(_both(m, 16, narrow), first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096, 48), (4096, 14336, 16), (2049, 1030, 20)], ids=str)
def test_large_shapes(shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    backend = Backend("cuda", None, "cuda")
    (rows, width, r), (wide, narrow) = shape, dtypes
    m = new(backend, rows, width, dtype=wide)
    v, u = new(backend, width, r, dtype=narrow), new(backend, rows, r, dtype=narrow)
    both = thin([m], [Term(0, v, left=u)])[0]
    right, left = thin([m], [Term(0, v)])[0].right, thin([m], [Term(0, left=u)])[0].left
    for p in (both.right, right):
        check(backend, p, product(m, v), wide, narrow)
    for found in (both.left, left):
        check(backend, found, product(m.t(), u), wide, narrow)


@pytest.mark.gpu
@pytest.mark.alone
def test_offsets_past_2_to_the_31() -> None:
    m = torch.randn(2**17 + 8, 16448, device="cuda", dtype=BF16)
    v, u = (torch.randn(n, 8, device="cuda", dtype=BF16) for n in (16448, m.shape[0]))
    both = thin([m], [Term(0, v, left=u)])[0]
    tail = thin([m[-8:]], [Term(0, v)])[0].right
    assert both.right is not None
    torch.testing.assert_close(both.right[-8:], tail)
    assert both.left is not None
    check(Backend("cuda", None, "cuda"), both.left[-64:], product(m[:, -64:].t(), u), BF16, BF16)


def test_float64_and_empty_go_to_the_reference() -> None:
    m, v = torch.randn(5, 7, dtype=FP64), torch.randn(7, 2, dtype=FP64)
    assert torch.equal(thin([m], [Term(0, v, scale=0.5)])[0].right, 0.5 * (m @ v))
    (found,) = thin([m[:0].float()], [Term(0, v.float(), left=torch.empty(0, 2))])
    assert found.right.shape == (0, 2) and torch.equal(found.left, torch.zeros(7, 2))


def test_passes_read_a_matrix_once_where_they_can() -> None:
    def fact(block: int, r: int, left: bool = True) -> thin_plan.Fact:
        return thin_plan.Fact(block, r, BF16, True, False, left, False, False)

    both = (True, True)
    assert thin_plan.passes((fact(0, 8), fact(1, 8), fact(2, 8)), 32) == (((0, 1, 2), *both),)
    assert thin_plan.passes((fact(0, 8),) * 2, 32) == (((0, 1), *both),)
    assert thin_plan.passes((fact(0, 64),) * 3, 32) == (
        ((0, 1, 2), True, False),
        ((0, 1, 2), False, True),
    )
    assert len(thin_plan.passes((fact(0, 8, False),) * 5, 32)) == 2


def test_many_ranks_take_more_multiprocessors() -> None:
    limits = device.Limits(132, 232448, 32)

    def programs(ranks: int) -> int:
        return thin_plan.right_cut(4096, (2048,), ranks, 2, 2, 0, False, limits).programs

    assert programs(64) == 64  # memory decides, and nothing has to be summed
    assert programs(128) > 66 and programs(256) > 66  # tensor cores do, of 32 programs otherwise


def test_bad_input_is_named(backend: Backend) -> None:
    m, v = new(backend, 4, 6), new(backend, 6, 2)
    with pytest.raises(ValueError, match=r"blocks: expected matrices of as many rows"):
        thin([m, m[:3]], [])
    with pytest.raises(ValueError, match=r"terms\[0\].right: expected 6 rows"):
        thin([m], [Term(0, v, True)])
    with pytest.raises(ValueError, match=r"terms\[0\].left: expected 4 rows"):
        thin([m], [Term(0, left=v)])
    with pytest.raises(ValueError, match=r"terms\[0\]: expected one rank, got 2 and 1"):
        thin([m], [Term(0, v, left=m[:, :1])])
    with pytest.raises(ValueError, match=r"wide: 7 columns, but column 8 is written"):
        thin([m], [Term(0, v, column=6)], Wide(new(backend, 4, 7), [0]))
    with pytest.raises(TypeError, match=r"wide: expected torch.float32, got torch.bfloat16"):
        thin([m], [], Wide(new(backend, 4, 7, dtype=BF16), [0]))
    with pytest.raises(ValueError, match=r"copies: expected two equal shapes"):
        thin([m], [], None, [Copy(m, v)])
    with pytest.raises(TypeError, match=r"copies: only float32 is split"):
        thin_copies.check([Copy(m.to(BF16), m.to(BF16), 3)], m.device)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    yield from thin_cases.launches()


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "sm_75"])
def test_compiles_without_spills(target: str) -> None:
    """Not for sm_75, which has no bfloat16 in its tensor cores: the reference serves it."""
    assert_no_spills(__name__, target)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "sm_75"])
def test_sums_in_float32_stay_short(target: str) -> None:
    """A tile's products are summed by themselves, which the compiler undoes if it may."""
    compiled = [c for c in compile_launches(__name__) if c.target == target]
    single = [c for c in compiled if "float32 torch.float32" in c.label]
    assert {"left_products", "right_products"} <= {c.kernel for c in single}
    assert not any(c.chained for c in single)


def test_the_small_copies_compile_for_old_devices() -> None:
    compiled = [c for c in compile_launches(__name__) if c.target == "sm_75"]
    copies = [c for c in compiled if c.kernel == "small_copies"]
    assert copies and not any(c.spills for c in copies)


def test_an_old_device_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not thin_launch.supported(torch.device("cuda"))
    assert thin_launch.supported(torch.device("cpu"))
