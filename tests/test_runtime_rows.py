"""Logits that are asked about row by row: the same answers and gradients, in a chunk's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
import training

import fusewright
from fusewright.runtime import rows
from fusewright.runtime.row_logits import logits
from fusewright.runtime.rows import Rows

B, T, V, H = 4, 40, 64, 8
IDS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
F64 = torch.float64


def _softcap(made: torch.Tensor) -> torch.Tensor:
    return torch.tanh(made / 5) * 5


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 4 * V * 37)
    monkeypatch.setattr(rows, "_LEAST", 1)


def _leaves(dtype: torch.dtype = F64) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    shapes = ((B, T, H), (V, H), (V,))
    made = (torch.randn(s, generator=drawn, dtype=F64).to(dtype) for s in shapes)
    return [t.requires_grad_() for t in made]


def _selected(z: torch.Tensor) -> torch.Tensor:
    """As preference trainers pick log-probabilities, in the form for float32 and float64."""
    z = z[:, :-1] / 0.7
    picked = torch.gather(z, dim=-1, index=IDS[:, 1:, None]).squeeze(-1)
    return picked - torch.stack([torch.logsumexp(row, dim=-1) for row in z])


def _entropy(z: torch.Tensor) -> torch.Tensor:
    """As they take the entropy."""
    found = []
    for chunk in z.reshape(-1, V).split(50, dim=0):
        logp = F.log_softmax(chunk, dim=-1)
        found.append(-(torch.exp(logp) * logp).sum(-1))
    return torch.cat(found).reshape(z.shape[:-1])


ASKED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "log-probabilities": lambda z: z.log_softmax(-1).gather(-1, IDS[..., None]).squeeze(-1),
    "of several": lambda z: torch.take_along_dim(
        z.log_softmax(2), IDS[..., None].repeat(1, 1, 3), 2
    ),
    "selected": _selected,
    "entropy": _entropy,
    "entropy by logsumexp": lambda z: z.logsumexp(-1) - (F.softmax(z, dim=-1) * z).sum(-1),
    "shifted loss": lambda z: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, V), IDS[:, 1:].reshape(-1)
    ),
    "loss of some": lambda z: F.cross_entropy(
        z.flatten(0, 1), IDS.where(IDS > 9, -100).flatten(), reduction="sum", label_smoothing=0.1
    ),
    "loss of none": lambda z: F.cross_entropy(z.flatten(0, 1), torch.full((B * T,), -100)),
    "likelihood": lambda z: F.nll_loss(z.reshape(-1, V).log_softmax(-1), IDS.flatten()),
    "z loss": lambda z: z.logsumexp(-1).square(),
    "masked": lambda z: z[IDS > 20].log_softmax(-1).max(-1).values,
    "last token": lambda z: z[:, -1].softmax(-1).topk(2).values,
    "by hand": lambda z: (1 - 2 * z).exp().sum(-1).log(),
    "largest": lambda z: z.argmax(-1).double() * z.amax(-1),
    "metric": lambda z: z[:2].mean() + z.sum(),
    "unbound": lambda z: torch.stack([r.narrow(0, 1, 2).logsumexp(-1) for r in z.unbind(1)[3:9]]),
    "wider": lambda z: z.float().double().log_softmax(-1).mean(-1, keepdim=True),
    "detached": lambda z: z.logsumexp(-1) * z.detach().softmax(-1).amax(-1),
}


@pytest.mark.parametrize("name", ASKED)
def test_it_is_answered_as_by_the_logits(name: str) -> None:
    told: list[str] = []
    ours, eager = _leaves(), _leaves()
    lazy = logits(Rows(*ours, _softcap, F64), told.append)
    got, wanted = ASKED[name](lazy), ASKED[name](_softcap(F.linear(*eager)))
    assert not lazy.materialized and not told
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)
    for out in (got, wanted):
        (out * torch.linspace(-1, 1, out.numel(), dtype=F64).reshape(out.shape)).sum().backward()
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)


WHOLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "kl_div": lambda z: F.kl_div(z.log_softmax(-1), torch.zeros(B, T, V, dtype=F64)),
    "gather": lambda z: z.gather(-1, IDS[..., :1, None].expand(B, 1, V).expand(B, T, V)),
    "gather ": lambda z: z.gather(1, IDS[:, :1, None].expand(B, 1, V) % T),
    "logsumexp": lambda z: z.logsumexp(1),
    "mul": lambda z: z * z[:1],
    "std": lambda z: z.std(),
    "max": lambda z: z.max(),
    "flatten": lambda z: z.flatten(),
    "__getitem__": lambda z: z[..., 3:7],
    "cross_entropy": lambda z: F.cross_entropy(z.transpose(1, 2), IDS),
    "mul ": lambda z: z.mul(z.detach()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_else_they_are_computed_and_it_says_why(name: str) -> None:
    told: list[str] = []
    ours, eager = _leaves(), _leaves()
    got = WHOLE[name](logits(Rows(*ours, _softcap, F64), told.append))
    wanted = WHOLE[name](_softcap(F.linear(*eager)))
    assert told and told[0].startswith("the logits were computed as a whole: ")
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    got.square().sum().backward(), wanted.square().sum().backward()
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_not_under_autocast() -> None:
    told: list[str] = []
    z = logits(Rows(*_leaves(torch.float32), _softcap, torch.float32), told.append)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z.logsumexp(-1)
    assert "autocast" in told[0] and z.materialized


def test_16_bits_are_not_worse_than_eager() -> None:
    """Summed over 5 seeds, against the same bf16 numbers in float64: each gradient and the answer."""
    ours_err, eager_err = torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64)
    for seed in range(5):
        drawn = torch.Generator().manual_seed(seed)
        shapes = ((B, T, H), (V, H), (V,))
        base = [torch.randn(s, generator=drawn).bfloat16() for s in shapes]
        results = []
        for kind in ("ours", "eager", "exact"):
            leaves = [(t.double() if kind == "exact" else t).clone().requires_grad_() for t in base]
            z: Any = (
                logits(Rows(*leaves, lambda made: made, torch.bfloat16), print)
                if kind == "ours"
                else F.linear(*leaves)
            )
            z = z if kind == "exact" else z.float()
            out = z.log_softmax(-1).gather(-1, IDS[..., None])
            out.sum().backward()
            results.append([out.detach().double(), *(t.grad.double() for t in leaves)])
        for err, got in ((ours_err, results[0]), (eager_err, results[1])):
            err += torch.stack([(a - b).norm() for a, b in zip(got, results[2], strict=True)])
    assert (ours_err <= 1.02 * eager_err).all(), ours_err / eager_err


def _preference(model: Any, *size: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Loss, entropy and logits of a loop that has its loss to itself."""
    batch = models.batch(0, *size)
    del batch["labels"]
    z = model(**batch).logits
    logp = z[:, :-1].float().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])
    with torch.no_grad():
        p = z.log_softmax(-1)
        entropy = -(p.exp() * p).sum(-1)
    return -F.logsigmoid(logp.mean((1, 2)).diff()).sum(), entropy, z


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_without_labels(name: str) -> None:
    eager = models.build(name)
    ours = fusewright.optimize(models.twin(eager), lowering="fx", logits="chunked")
    steps, entropies = [], []
    for model in (ours, eager):
        loss, entropy, z = _preference(model)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        steps.append(training.Step(loss.detach(), grads))
        entropies.append(entropy)
        model.zero_grad()
        if model is ours:
            assert not z.materialized and not fusewright.report(ours).notes
            z.std()
            (note,) = fusewright.report(ours).notes
            assert note == "the logits were computed as a whole: std reads all of them"
    training.assert_same_step(*steps)
    torch.testing.assert_close(*entropies, rtol=1e-5, atol=1e-5)
    batch = models.batch()
    training.assert_same_step(training.train_step(ours, batch), training.train_step(eager, batch))
    assert fusewright.report(ours).counts == models.expected_counts(name)


def test_weights_that_have_changed() -> None:
    leaves = _leaves()
    z = logits(Rows(*leaves, _softcap, F64), print)
    taken = z[:, 1:]
    loss = taken.logsumexp(-1).sum()
    with torch.no_grad():
        leaves[1].mul_(2)
    for late in (
        lambda: z.argmax(-1),
        lambda: z[:, -1],
        lambda: z.std(),
        lambda: taken.log_softmax(-1),
    ):
        with pytest.raises(RuntimeError, match='logits="eager"'):
            late()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _peak(step: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once, by the allocator's own record."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_no_tensor_of_all_tokens_and_classes_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 4 * 4096 * 32)
    peaks = {}
    for how in ("chunked", "eager"):
        model = models.build("llama", vocab_size=4096)
        model = fusewright.optimize(model, lowering="fx", logits=how)

        def step(model: Any = model) -> None:
            loss, entropy, z = _preference(model, 2, 256)
            del z, entropy
            loss.backward()
            model.zero_grad()

        step()
        peaks[how] = _peak(step)
    whole = 4 * 2 * 256 * 4096  # bytes of the logits
    print({how: f"{peak / whole:.1f} times the logits" for how, peak in peaks.items()})
    assert peaks["eager"] > 4 * whole
    assert peaks["chunked"] < peaks["eager"] - 3 * whole
