"""``outputs.logits`` beside a fused loss: free until read, then exactly what eager's would be."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import training
from torch import nn

import fusewright

F = nn.functional
Use = Callable[[torch.Tensor], Any]


@pytest.fixture(scope="module", params=["lazy", "chunked"])
def both(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(optimised, eager), with a softcap on the logits."""
    eager = models.build("gemma2")
    return fusewright.optimize(models.twin(eager), lowering="fx", logits=request.param), eager


def _reloaded(x: torch.Tensor) -> torch.Tensor:
    torch.save(x, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


USES: dict[str, Use] = {
    "slice": lambda x: x[:, :-1],
    "slice_last": lambda x: x[:, -1, :],
    "ellipsis": lambda x: x[..., 3:7],
    "mask": lambda x: x[torch.ones(x.shape[:-1], dtype=torch.bool)],
    "argmax": lambda x: x.argmax(-1),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "to_dtype": lambda x: x.to(torch.bfloat16),
    "to_device": lambda x: x.to("cpu"),
    "to_both": lambda x: x.to("cpu", torch.float64),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "tolist": lambda x: torch.tensor(x.detach().tolist()),
    "gather": lambda x: x.gather(-1, torch.zeros(*x.shape[:-1], 1, dtype=torch.long)),
    "torch_gather": lambda x: torch.gather(x, 2, torch.ones(2, 16, 1, dtype=torch.long)),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "softmax_method": lambda x: x.softmax(-1),
    "view": lambda x: x.view(-1, x.size(-1)),
    "arithmetic": lambda x: 2 * x / 3 - 1,
    "compare": lambda x: x > 0,
    "cat": lambda x: torch.cat([x, x]),
    "stack_list": lambda x: torch.stack(list(x)),
    "unpack": lambda x: x.unbind(0)[1],
    "item": lambda x: torch.tensor(x[0, 0, 0].item()),
    "len": lambda x: torch.tensor(len(x)),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "torch_save": lambda x: _reloaded(x.detach()),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "max": lambda x: x.max(-1).values,
    "topk": lambda x: x.topk(3).indices,
    "cross_entropy": lambda x: F.cross_entropy(x.flatten(0, 1), torch.arange(32)),
    "einsum": lambda x: torch.einsum("btv,btv->bt", x, x),
    "matmul": lambda x: x @ torch.ones(x.shape[-1], 2),
    "out": lambda x: torch.add(x.detach(), 1, out=torch.empty(x.shape)),
    "numel": lambda x: torch.tensor([x.numel(), x.dim(), x.element_size(), x.stride(-1)]),
    "in_place_on_copy": lambda x: x.detach().clone().mul_(2),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_reads_as_eagers(both: tuple[Any, Any], use: Use) -> None:
    ours, eager = both
    got = use(ours(**models.batch()).logits)
    wanted = use(eager(**models.batch()).logits)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    # The hidden states differ in float32's last bit, which may turn over a bf16 rounding.
    eps = torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
    torch.testing.assert_close(got.detach(), wanted.detach(), rtol=max(eps, 1e-5), atol=1e-5)


def test_costs_nothing_until_read(both: tuple[Any, Any]) -> None:
    ours, _ = both
    out = ours(**models.batch())
    logits = out.logits
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 16, models.VOCAB) and logits.dtype == torch.float32
    assert logits.device.type == "cpu" and logits.requires_grad
    assert isinstance(repr(logits), str)
    out.loss.backward()
    assert not logits.materialized
    logits.std()
    assert logits.materialized
    ours.zero_grad()


def test_reading_does_not_change_the_gradients(both: tuple[Any, Any]) -> None:
    ours, eager = both
    wanted = training.train_step(eager, models.batch())
    ours.zero_grad()
    out = ours(**models.batch())
    out.logits.argmax(-1)
    out.loss.backward()
    got = {n: p.grad.clone() for n, p in ours.named_parameters()}
    training.assert_same_step(training.Step(out.loss.detach(), got), wanted)
    ours.zero_grad()


class _Square(torch.autograd.Function):
    """A loss that brings its own derivative, as a fused one does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x.detach().contiguous())
        return x.detach().square().mean()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * (dy / x.numel())


def _distil(out: Any) -> torch.Tensor:
    teacher = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(1))
    return F.kl_div(out.logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True)


def _preference(out: Any) -> torch.Tensor:
    logp = out.logits[:, :-1].float().log_softmax(-1)
    picked = logp.gather(-1, models.batch()["input_ids"][:, 1:, None]).squeeze(-1).sum(-1)
    return -F.logsigmoid(picked[0] - picked[1])


LOSSES: dict[str, Callable[[Any], torch.Tensor]] = {
    "distil": _distil,
    "preference": _preference,
    "beside the loss": lambda out: out.loss + 0.3 * _distil(out),
    "z loss": lambda out: out.loss + 1e-2 * out.logits.logsumexp(-1).square().mean(),
    "own derivative": lambda out: _Square.apply(out.logits),
    "own derivative of float": lambda out: out.loss + _Square.apply(out.logits.float()),
    "by key": lambda out: out["logits"].square().mean(),
    "by position": lambda out: out[1].square().mean(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_a_custom_loss_trains_the_model(both: tuple[Any, Any], loss: Any) -> None:
    steps = []
    for model in both:
        model.zero_grad()
        value = loss(model(**models.batch()))
        value.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        steps.append(training.Step(value.detach(), grads))
        model.zero_grad()
    training.assert_same_step(*steps)


def test_what_they_are_made_of_goes_with_them(both: tuple[Any, Any]) -> None:
    ours, _ = both
    out = ours(**models.batch())
    held = [weakref.ref(t) for t in out.logits._leaves if type(t) is torch.Tensor]
    assert held and all(ref() is not None for ref in held)
    del out
    assert all(ref() is None for ref in held)  # at once, not when cycles are collected


def test_read_after_the_backward(both: tuple[Any, Any]) -> None:
    ours, eager = both
    out = ours(**models.batch())
    out.loss.backward()
    torch.testing.assert_close(
        out.logits.detach(), eager(**models.batch()).logits.detach(), rtol=1e-5, atol=1e-5
    )
    ours.zero_grad()


def test_read_after_the_optimizer_step_is_refused() -> None:
    ours = fusewright.optimize(models.build("llama"), lowering="fx")
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    out = ours(**models.batch())
    out.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match='logits="eager"'):
        out.logits.argmax(-1)


def test_eager_logits() -> None:
    eager = models.build("llama")
    ours = fusewright.optimize(models.twin(eager), lowering="fx", logits="eager")
    out = ours(**models.batch())
    assert type(out.logits) is torch.Tensor
    torch.testing.assert_close(out.logits, eager(**models.batch()).logits, rtol=1e-5, atol=1e-5)
    training.assert_same_step(
        training.train_step(ours, models.batch()), training.train_step(eager, models.batch())
    )


def test_under_autocast() -> None:
    eager = models.build("llama")
    ours = fusewright.optimize(models.twin(eager), lowering="fx")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = ours(**models.batch()).logits, eager(**models.batch()).logits
    assert a.dtype == b.dtype  # read outside of autocast, made inside
    torch.testing.assert_close(a.detach(), b.detach(), rtol=0.05, atol=0.05)
