"""What blocks hand to their backward: as many bytes as predicted, fewer than before, and the same bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.utils.checkpoint
import training
from saved import saved_bytes
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

import fusewright
from fusewright.compiler import cut, driver, gated_backward, residual_backward
from fusewright.compiler.joint import Joint
from fusewright.compiler.recompute import is_cheap
from fusewright.kernels import room

BUILDS: dict[str, Callable[[], Any]] = {
    "full": lambda: models.build("llama").train(),
    "lora": lambda: models.with_lora(models.build("llama")).train(),
    "lora with dropout": lambda: models.with_lora(models.build("llama"), dropout=0.3).train(),
}


def optimized(
    build: Callable[[], Any], level: str, monkeypatch: pytest.MonkeyPatch, lowering: str = "fx"
) -> Any:
    monkeypatch.setenv("FUSEWRIGHT_PARTITION", level)
    torch.manual_seed(0)
    return fusewright.optimize(build(), lowering=lowering, strict=True)


def partitioned(model: nn.Module) -> dict[str, Any]:
    """Per block's path, what was chosen for the graph that it runs."""
    session = driver._required(model)
    return {p: r.handed(p) for r in session.records if r.kind == "block" for p in r.modules}


@pytest.mark.parametrize("name", BUILDS)
def test_fewer_bytes_as_predicted_and_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = optimized(BUILDS[name], "torch", monkeypatch)
    wanted = training.train_step(plain, models.batch())
    for level in ("keep", "default"):
        ours = optimized(BUILDS[name], level, monkeypatch)
        step = training.train_step(ours, models.batch())
        assert torch.equal(step.loss, wanted.loss)
        if name == "full":  # sums of two products round once (summed_products)
            training.assert_same_step(step, wanted, 1e-6)
        else:
            for key, grad in wanted.grads.items():
                assert torch.equal(step.grads[key], grad), key
        chosen = partitioned(ours)
        measured = saved_bytes(ours, chosen, models.batch())
        assert len(chosen) == models.LAYERS
        for path, told in chosen.items():
            assert measured[path] == told.saved, path
            if level == "keep":
                # A unit out of its own backward does not run again (gated_backward, gated_again).
                assert told.saved == told.kept
                free = {"full": ("glu",), "lora": ("glu_packed",)}
                assert told.recomputed == free.get(name, ())
            else:
                norms = {"rms_norm", "add_rms_norm"}  # adapters alone read none's output again
                assert norms & set(told.recomputed) == (set() if name == "lora" else norms)
                assert {"glu", "glu_packed"} & set(told.recomputed)
                rows, width = 32, models.HIDDEN  # float32; two norms, a gated unit of two widths
                most = {"lora": 0, "lora with dropout": 4 * width}
                least = 4 * rows * most.get(name, 2 * width)
                assert "rope" not in told.recomputed  # it is written over what v is a part of
                assert told.kept - told.saved >= least


def test_inductor_takes_the_same_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    joined: list[int] = []
    folded: list[int] = []
    join, fold = gated_backward.join, residual_backward.fold
    monkeypatch.setattr(gated_backward, "join", lambda half: joined.append(join(half)))
    monkeypatch.setattr(residual_backward, "fold", lambda half: folded.append(fold(half)))
    with config.patch(force_disable_caches=True):
        models_ = {
            how: optimized(BUILDS["lora"], "default", monkeypatch, how)
            for how in ("fx", "inductor")
        }
        steps = {k: training.train_step(m, models.batch()) for k, m in models_.items()}
    training.assert_same_step(steps["inductor"], steps["fx"])
    half = len(joined) // 2  # the same rewrites of the backward half on both ways
    assert 0 not in joined and any(folded) and joined[:half] == joined[half:]
    assert folded[:half] == folded[half:]
    told = {how: partitioned(m) for how, m in models_.items()}
    for path, inductor in told["inductor"].items():
        fx = told["fx"][path]  # the halves of plain FX write over values, so that less runs again
        assert (fx.level, fx.saved) == (inductor.level, inductor.saved)
        assert {*inductor.recomputed} - {*fx.recomputed} == {"rope"}
    batch, paths = models.batch(), list(partitioned(models_["fx"]))
    sizes = [saved_bytes(m, paths, batch) for m in models_.values()]
    assert sizes[0] == sizes[1]


def test_room_behind_rows_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the augmented product, what is recomputed has room as the first run's result had."""
    monkeypatch.setattr(room, "serves", lambda *given: True)
    steps = {}
    for level in ("torch", "default"):
        ours = optimized(BUILDS["lora"], level, monkeypatch)
        training.train_step(ours, models.batch())
        steps[level] = training.train_step(ours, models.batch())
    told = partitioned(ours).values()
    assert all("glu_packed_roomy" in t.recomputed for t in told)
    assert torch.equal(steps["torch"].loss, steps["default"].loss)
    for key, grad in steps["torch"].grads.items():
        assert torch.equal(steps["default"].grads[key], grad), key


def test_under_a_checkpoint_nothing_runs_a_third_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Any:
        model = BUILDS["lora with dropout"]()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
        return model

    steps = {}
    for level in ("torch", "default"):
        ours = optimized(build, level, monkeypatch)
        steps[level] = training.train_step(ours, models.batch(), seed=3)
    assert all(told.level == "keep" for told in partitioned(ours).values())
    assert torch.equal(steps["torch"].loss, steps["default"].loss)
    for key, grad in steps["torch"].grads.items():
        assert torch.equal(steps["default"].grads[key], grad), key


def test_backward_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = optimized(BUILDS["lora"], "default", monkeypatch)
    loss = ours(**models.batch()).loss
    wanted = [p for p in ours.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, wanted), strict=True):
        assert torch.equal(a, b)


def joint_of(computation: Callable[..., Any], *inputs: torch.Tensor) -> Joint:
    """The joint graph of a function of tensors that all want gradients."""
    from functorch.compile import aot_function, default_partition, nop

    read: list[Joint] = []

    def partition_fn(gm: Any, joint_inputs: Any, *, num_fwd_outputs: int, **given: Any) -> Any:
        read.append(Joint.read(gm.graph, num_fwd_outputs, ()))
        return default_partition(gm, joint_inputs, num_fwd_outputs=num_fwd_outputs)

    aot_function(computation, nop, nop, partition_fn=partition_fn)(*inputs)
    return read[0]


def names(nodes: Any) -> set[str]:
    return {n.target._schema.name.partition("::")[2] for n in nodes if hasattr(n.target, "_schema")}


def test_random_draws_products_and_reads_of_views() -> None:
    def computation(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        wide = x @ w
        left, right = wide.chunk(2, -1)
        dropped = torch.nn.functional.dropout(torch.sin(left), 0.5, True)
        return (torch.exp(right) * dropped * left).sum()

    x = torch.randn(64, 16, requires_grad=True)
    joint = joint_of(computation, x, torch.randn(16, 64, requires_grad=True))
    found = cut.minimum(joint)
    again, saved = names(found.recomputed), names(found.saved)
    assert (
        "mm" in saved and "mm" not in again
    )  # the whole product, since both of its views are read
    assert "exp" in again and "sin" not in again  # what was dropped is saved, and made of sines
    assert not {n for n in found.recomputed if not is_cheap(n) and n in joint.required}
    assert not {"native_dropout", "bernoulli", "rand", "rand_like", "bernoulli_"} & again
    assert found.bytes(joint) < cut.minimum(joint, cut.keep).bytes(joint)


def test_what_costs_more_than_it_saves_is_kept() -> None:
    def computation(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)  # one number saved for 4096 that were read again
        return (torch.sin(mean) * w).sum()

    inputs = torch.randn(8, 4096, requires_grad=True), torch.randn(8, 1, requires_grad=True)
    joint = joint_of(computation, *inputs)
    assert "mean" not in names(cut.minimum(joint).recomputed)


def test_marks_of_the_users_own_checkpoint_are_left_alone() -> None:
    from functorch.compile import nop
    from torch._dynamo.backends.common import aot_autograd

    from fusewright.compiler.partition import Asked, partition

    told: list[Any] = []
    recompute = functools.partial(
        torch.utils.checkpoint.create_selective_checkpoint_contexts,
        lambda ctx, op, *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE,
    )

    def computation(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(
            lambda t: torch.sin(torch.exp(t)), x, use_reentrant=False, context_fn=recompute
        ).sum()

    ours = functools.partial(partition, Asked("default", told.append))
    x = torch.randn(8, requires_grad=True)
    backend = aot_autograd(fw_compiler=nop, bw_compiler=nop, partition_fn=ours)
    torch.compile(computation, backend=backend)(x).backward()
    torch.testing.assert_close(x.grad, torch.cos(x.exp()) * x.exp())
    assert not told
