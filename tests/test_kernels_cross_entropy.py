"""Cross-entropy: derivation, torch's semantics, adversarial rows, precision."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import mpmath
import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from backends import Backend
from numerics import assert_not_worse_pooled, error
from targets import TARGETS, Case, assert_compiles

from fusewright.kernels import cross_entropy as family
from fusewright.kernels.cross_entropy_launch import in_place_block, launch_in_place
from fusewright.runtime.op import register_all

register_all()
OP = torch.ops.fusewright.cross_entropy
IGNORE = -100
PLAIN = (0.0, 0.0, 1.0, 0.0)  # label smoothing, softcap, scale, z-loss
FORMS = [PLAIN, (0.1, 0.0, 1.0, 0.0), (0.0, 5.0, 0.7, 0.0), (0.1, 5.0, 0.7, 0.01)]


def eager(
    logits: torch.Tensor,
    labels: torch.Tensor,
    reduction: str,
    form: tuple[float, float, float, float] = PLAIN,
) -> torch.Tensor:
    """What a model's code does: float32, then F.cross_entropy."""
    smoothing, cap, scale, z_loss = form
    z = (logits if logits.dtype is torch.float64 else logits.float()) * scale
    if cap > 0:
        z = cap * torch.tanh(z / cap)
    loss = F.cross_entropy(z, labels, reduction=reduction, label_smoothing=smoothing)
    if z_loss > 0:
        counts = labels != IGNORE
        extra = z_loss * torch.logsumexp(z, -1).square() * counts
        if reduction == "none":
            return loss + extra
        loss = loss + extra.sum() / (counts.sum() if reduction == "mean" else 1)
    return loss


def some_labels(rows: int, vocab: int) -> torch.Tensor:
    labels = torch.randint(0, vocab, (rows,))
    labels[::3] = IGNORE
    return labels


def test_gradient_is_sympys() -> None:
    """Every symbol of the header's derivation, over three classes with the label first."""
    logits = sp.symbols("l0:3", real=True)
    scale, cap, e, k = sp.symbols("scale c e k", positive=True)
    z = [cap * sp.tanh(scale * a / cap) for a in logits]
    lse = sp.log(sum(sp.exp(v) for v in z))
    loss = (1 - e) * (lse - z[0]) + e * sum(lse - v for v in z) / 3 + k * lse**2
    point = [mpmath.mpf(v) for v in ("0.3", "-1.1", "0.7", "0.7", "2.5", "0.1", "0.2")]
    with mpmath.workdps(40):
        for j in range(3):
            p = sp.exp(z[j] - lse)
            label = 1 - e if j == 0 else 0
            derived = (p * (1 + 2 * k * lse) - e / 3 - label) * scale * (1 - (z[j] / cap) ** 2)
            both = sp.lambdify(
                (*logits, scale, cap, e, k), [sp.diff(loss, logits[j]), derived], "mpmath", cse=True
            )
            true, ours = both(*point)
            assert abs(true - ours) < 1e-30 and abs(true + ours) > 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", family.REDUCTIONS)
def test_value_and_gradcheck(reduction: str, form: tuple[float, ...]) -> None:
    labels = some_labels(7, 11)
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    ours = OP(logits, labels, IGNORE, reduction, *form)[0]
    torch.testing.assert_close(ours, eager(logits, labels, reduction, form))
    assert torch.autograd.gradcheck(lambda t: OP(t, labels, IGNORE, reduction, *form)[0], (logits,))


def test_a_wrong_sign_fails_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    right = family.row_grad
    monkeypatch.setattr(family, "row_grad", lambda *a: -right(*a))
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(
            lambda t: OP(t, torch.tensor([1, 2, 0]), IGNORE, "mean", *PLAIN)[0], (logits,)
        )


def three_ways(
    backend: Backend, logits: torch.Tensor, labels: torch.Tensor, form: tuple, reduction: str
) -> tuple:
    """(loss, dlogits) by our op, by eager, and by eager in float64."""
    op = backend.ops.cross_entropy
    logits, labels = logits.to(backend.device), labels.to(backend.device)
    results: list[tuple[torch.Tensor, ...]] = []
    dloss = None
    for t, f in (
        (logits, lambda t: op(t, labels, IGNORE, reduction, *form)[0]),
        (logits, lambda t: eager(t, labels, reduction, form)),
        (logits.double(), lambda t: eager(t, labels, reduction, form)),
    ):
        leaf = t.clone().requires_grad_()
        loss = f(leaf)
        dloss = torch.randn_like(loss) if dloss is None else dloss
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf, dloss.to(loss.dtype))))
    return tuple(results)


def judge(backend: Backend, draws: list, dtype: torch.dtype) -> None:
    """Not worse than eager; the interpreter's bfloat16 gradients within its truncation."""
    if dtype is torch.bfloat16 and not backend.rounds_bfloat16:
        assert_not_worse_pooled([tuple(r[:1] for r in d) for d in draws], ("loss",), 1.02)
        for ours, _, oracle in draws:
            size = error(oracle[1], torch.zeros_like(oracle[1]))
            assert error(ours[1], oracle[1]) <= 2**-7 * size
    else:  # the interpreter is slow, so its draws are few and decide by luck more often
        factor = 1.25 if dtype is torch.float32 and backend.name == "interpreted" else 1.02
        assert_not_worse_pooled(draws, ("loss", "dlogits"), factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", family.REDUCTIONS)
def test_error_is_not_above_eagers(
    backend: Backend, reduction: str, form: tuple[float, ...], dtype: torch.dtype
) -> None:
    draws = []
    slow = backend.name == "interpreted"
    for seed in range(3 if slow else 8):
        torch.manual_seed(seed)
        rows = 8 + seed if slow else 37 + 5 * seed
        logits = (torch.randn(rows, 1013) * 3).to(dtype)
        draws.append(three_ways(backend, logits, some_labels(rows, 1013), form, reduction))
    judge(backend, draws, dtype)


def adversarial(case: str, rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, vocab, (rows,))
    logits = torch.randn(rows, vocab) * 2
    if case == "certain":  # the label's probability goes to 1
        logits[torch.arange(rows), labels] = torch.linspace(8.0, 60.0, rows)
    elif case == "huge":
        logits *= 1e4
    elif case == "offset":
        logits += 1000.0
    elif case == "zero":
        logits.zero_()
    elif case == "masked":
        logits[:, ::2] = -float("inf")
        labels = (labels // 2 * 2 + 1).clamp(max=vocab - 2)
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["certain", "huge", "offset", "zero", "masked", "one row"])
def test_adversarial_rows(backend: Backend, case: str, dtype: torch.dtype) -> None:
    draws = []
    slow = backend.name == "interpreted"
    for seed in range(3 if slow else 8):
        torch.manual_seed(seed)
        logits, labels = adversarial(case, 1 if case == "one row" else 8 if slow else 16, 257)
        draws.append(three_ways(backend, logits.to(dtype), labels, PLAIN, "mean"))
    judge(backend, draws, dtype)


def test_all_ignored_is_nan_with_gradient_zero(backend: Backend) -> None:
    logits = torch.randn(4, 5, device=backend.device, requires_grad=True)
    labels = torch.full((4,), IGNORE, device=backend.device)
    for reduction in family.REDUCTIONS:
        ours = backend.ops.cross_entropy(logits, labels, IGNORE, reduction, *PLAIN)[0]
        expected = eager(logits, labels, reduction)
        torch.testing.assert_close(ours, expected, equal_nan=True)
        (d,) = torch.autograd.grad(ours.sum(), logits)
        assert not bool(d.any())


def test_strided_rows_int32_labels_and_another_ignore_index(backend: Backend) -> None:
    wide = torch.randn(9, 40, dtype=torch.float16, device=backend.device)
    labels = torch.randint(1, 17, (18,), dtype=torch.int32, device=backend.device)[::2]
    labels[3] = 0
    for view in (wide[:, 5:22], wide[:, :34:2]):
        view = view.detach().requires_grad_()
        loss = backend.ops.cross_entropy(view, labels, 0, "mean", *PLAIN)[0]
        expected = F.cross_entropy(view.float(), labels.long(), ignore_index=0)
        torch.testing.assert_close(loss, expected)
        (d,) = torch.autograd.grad(loss, view, retain_graph=True)
        assert torch.equal(d, torch.autograd.grad(loss, view)[0])
        assert d.is_contiguous() and not bool(d[3].any())
        torch.testing.assert_close(d, torch.autograd.grad(expected, view)[0])


@pytest.mark.parametrize("vocab", [1, 2, 31, 33, 1000, 8193, 20_001])
def test_every_width(kernels: Backend, vocab: int) -> None:
    logits = torch.randn(3, vocab, device=kernels.device, requires_grad=True)
    labels = torch.tensor([0, vocab - 1, vocab // 2], device=kernels.device)
    each = torch.tensor([1.0, -2.0, 0.5], device=kernels.device)
    loss = kernels.ops.cross_entropy(logits, labels, IGNORE, "none", 0.1, 0.0, 1.0, 0.0)[0]
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    (ours,), (theirs,) = (torch.autograd.grad(t, logits, each) for t in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("vocab", [1, 7, 9, 513, 2055, 4097])
def test_rows_between_multiples_of_16_bytes(kernels: Backend, vocab: int, start: int) -> None:
    """What lies beside a row is neither taken in nor written to."""
    storage = torch.full((5 * vocab + start,), float("nan"), device=kernels.device)
    storage = storage.to(torch.float16)
    view = storage[start:].view(5, vocab)[1:4]
    view.copy_(torch.randn(3, vocab))
    leaf = view.detach().requires_grad_()
    labels = torch.tensor([vocab - 1, IGNORE, 0], device=kernels.device)
    loss = kernels.ops.cross_entropy(leaf, labels, IGNORE, "sum", *PLAIN)[0]
    wide = leaf.detach().float().requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (ours,), (theirs,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, wide)
    torch.testing.assert_close(ours.float(), theirs, atol=1e-3, rtol=1e-3)
    losses = torch.empty(3, dtype=torch.float64, device=kernels.device)
    form = family.LossForm(IGNORE, *PLAIN)
    launch_in_place(view, labels, losses, form, 1.0, True)
    torch.testing.assert_close(losses.sum().float(), expected)
    torch.testing.assert_close(view.float(), theirs, atol=1e-3, rtol=1e-3)
    around = torch.cat((storage[: start + vocab], storage[start + 4 * vocab :]))
    assert bool(around.isnan().all())


def test_no_rows(backend: Backend) -> None:
    logits = torch.randn(0, 5, device=backend.device, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long, device=backend.device)
    for reduction in family.REDUCTIONS:
        loss = backend.ops.cross_entropy(logits, labels, IGNORE, reduction, *PLAIN)[0]
        torch.testing.assert_close(loss, eager(logits, labels, reduction), equal_nan=True)
        assert torch.autograd.grad(loss.sum(), logits)[0].shape == (0, 5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (1, 5), (7, 2**16), (7, 2**15), (3, 2**17)])
def test_blocks_are_all_rows_once(rows: int, vocab: int, device: str) -> None:
    blocks = family.row_blocks(torch.empty(rows, vocab, device=device))
    assert [at for block in blocks for at in range(rows)[block]] == [*range(rows)]
    assert len(blocks) == 1 or device == "cpu"


def test_bad_input_is_named() -> None:
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])

    def call(a: torch.Tensor, b: torch.Tensor, reduction: str = "mean") -> None:
        OP(a, b, IGNORE, reduction, *PLAIN)

    with pytest.raises(IndexError, match=r"labels: expected -100 or 0 <= label < 5, got 5"):
        call(logits, torch.tensor([0, 5, 2]))
    with pytest.raises(IndexError, match="got -1"):
        call(logits, torch.tensor([0, -1, 2]))
    with pytest.raises(ValueError, match=r"labels: expected shape \(3,\), got \(2,\)"):
        call(logits, labels[:2])
    with pytest.raises(TypeError, match="labels: expected int64 or int32, got torch.float32"):
        call(logits, labels.float())
    with pytest.raises(ValueError, match="reduction: expected one of .*got 'max'"):
        call(logits, labels, "max")
    with pytest.raises(ValueError, match=r"logits: expected shape \(T, V\)"):
        call(logits[0], labels)


def compiled_cases() -> list[Case]:
    """Every kernel as launched for long rows, plain and with everything on."""
    module = "fusewright.kernels.cross_entropy_kernels:"
    numbers = {n: "fp32" for n in ("smoothing", "z_loss", "scale", "softcap", "inverse")}
    ints = {"row_step": "i32:16", "label_step": "i32", "vocab": "i32:16", "ignore_index": "i32"}
    labels, wide = {"labels_ptr": "*i64:16"}, "*fp64:16"
    asserting = (("debug", True), ("sanitize_overflow", False))
    cases = []
    for (kind, on), shifted in product(
        (("bf16", False), ("fp16", True), ("fp32", True)), (False, True)
    ):
        pointer = f"*{kind}:16"
        flags = {n: on for n in ("SCALED", "CAPPED", "SMOOTH", "Z_LOSS")}
        lanes = 4 if kind == "fp32" else 8
        flags |= {"PRECISE": kind == "fp32", "WIDE": lanes, "SHIFTED": shifted}
        row = flags | {"BLOCK": 8192}
        shared = labels | ints | numbers | {"logits_ptr": pointer}
        types = shared | {"losses_ptr": wide, "lse_ptr": wide, "counter_ptr": "*i64:16"}
        types |= {"loss_ptr": "*fp32:16", "factor_ptr": wide}
        forward = row | {"BLOCK": 4096 if on else 8192}
        forward |= {"REDUCE": True, "MEAN": True, "ADDED": 2048}
        cases.append(Case(module + "cross_entropy_forward", types, forward, 8, asserting))
        types = shared | {"losses_ptr": wide, "unit": "fp32"}
        name = module + "loss_and_gradient_in_place"
        for vocab, capped in ((32000, on), (128256, on), (128256, False)):
            block, warps = in_place_block(vocab, lanes, capped, 32)
            large = {"GRADIENT": True, "BLOCK": block, "CAPPED": capped}
            cases.append(Case(name, types, row | large, warps))
        types = shared | {"lse_ptr": wide, "factor_ptr": wide, "dlogits_ptr": pointer}
        types |= {"dloss_ptr": "*fp32:16", "dloss_step": "i32", "column_blocks": "i32"}
        name = module + "cross_entropy_backward"
        cases.append(Case(name, types, flags | {"BLOCK": 2048}, 4 if lanes == 4 else 2))
    types = labels | ints | {"losses_ptr": wide, "denominator_ptr": "*i64:16", "rows": "i32"}
    types |= {"loss_ptr": "*fp32:16", "factor_ptr": wide, "unit": "fp32"}
    del types["row_step"]
    flags = {"MEAN": True, "DIVIDED": True, "BLOCK": 2048}
    cases.append(Case(module + "cross_entropy_reduce", types, flags, 8, asserting))
    types = {"saved_ptr": "*fp32:16", "dloss_ptr": "*fp32:16", "factor_ptr": wide}
    types |= {"out_ptr": "*bf16:16", "elements": "i64:16"}
    cases.append(Case(module + "scale_to", types, {"BLOCK": 2048}, 4))
    return cases


def test_kernels_compile_without_spills() -> None:
    cases = compiled_cases()
    assert_compiles([c for c in cases if c.warps <= 16])
    nvidia = tuple(t for t in TARGETS if t.startswith("sm_"))
    assert_compiles([c for c in cases if c.warps > 16], nvidia)


OUT_OF_RANGE = """
import sys, torch
from fusewright.runtime.op import register_all
register_all()
logits, labels = torch.randn(3, 5, device="cuda"), torch.tensor([0, 5, 2], device="cuda")
if sys.argv[1] == "plain":
    torch.ops.fusewright.cross_entropy(logits, labels, -100, "mean", 0.0, 0.0, 1.0, 0.0)
else:
    torch.ops.fusewright.linear_cross_entropy(
        logits, logits.new_ones(5, 5), None, labels, None, -100, "mean", 0.0, 0.0, 1.0, 0.0
    )
print("issued", flush=True)
torch.cuda.synchronize()
print("went through")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["plain", "linear"])
def test_a_label_out_of_range_stops_the_device(op: str) -> None:
    """Without a synchronisation of ours: the call returns, the next synchronisation fails."""
    source = str(Path(__file__).resolve().parent.parent / "src")
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_RANGE, op],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": source},
    )
    assert "issued" in done.stdout and "went through" not in done.stdout
    assert "0 <= label < 5" in done.stderr or "device-side assert" in done.stderr


@pytest.mark.gpu
@pytest.mark.alone
def test_offsets_beyond_two_to_the_31() -> None:
    rows, vocab = 17_000, 131_072
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    labels = torch.randint(vocab, (rows,), device="cuda")
    labels[:-8] = IGNORE
    form = (IGNORE, "mean", *PLAIN)
    loss, *saved = OP(logits, labels, *form)
    last = logits[-8:].float().requires_grad_()
    expected = F.cross_entropy(last, labels[-8:])
    torch.testing.assert_close(loss, expected)
    one = torch.ones((), device="cuda")
    d = torch.ops.fusewright.cross_entropy_backward(one, logits, labels, *saved, *form, True)
    (theirs,) = torch.autograd.grad(expected, last)
    torch.testing.assert_close(d[-8:], theirs.bfloat16())
    assert not bool(d[:-8].any())


@pytest.mark.gpu
def test_bitwise_reproducible() -> None:
    logits = torch.randn(3000, 32_000, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(32_000, (3000,), device="cuda")
    losses = {OP(logits, labels, IGNORE, "mean", *PLAIN)[0].item() for _ in range(5)}
    assert len(losses) == 1
