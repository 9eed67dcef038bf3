"""Rotations written over their inputs: where, where not, and that a step keeps its bits."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import training
from torch import fx

import fusewright
from fusewright.compiler import driver, ir, rope_over
from fusewright.compiler.partition import Asked, Partitioned, partition
from fusewright.runtime.op import register_all

register_all()
Build = Callable[[], Any]


def stepped(build: Build, monkeypatch: pytest.MonkeyPatch, over: bool) -> tuple[Any, Any, Any]:
    """A training step, the ops of every half that was made, and the model."""
    halves: list[Counter[str]] = []
    write, place = rope_over.write, rope_over.place

    def noted(half: fx.GraphModule) -> int:
        done = write(half)
        halves.append(Counter(map(ir.own_name, ir.calls(half.graph))))
        return done

    with monkeypatch.context() as patch:
        patch.setattr(rope_over, "write", noted)
        patch.setattr(rope_over, "place", place if over else lambda graph: 0)
        torch.manual_seed(0)
        model = fusewright.optimize(build(), lowering="fx", strict=True)
        step = training.train_step(model, models.batch(rows=3, length=20), seed=3)
        again = training.train_step(model, models.batch(rows=2, length=24), seed=3)
    return (step, again), halves, model


def lora(dtype: torch.dtype = torch.float32, **given: Any) -> Build:
    return lambda: models.with_lora(models.build("llama"), **given).to(dtype).train()


def checkpointed() -> Any:
    model = lora()()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    return model


BUILDS: dict[str, Build] = {
    "lora": lora(),
    "lora in bfloat16": lora(torch.bfloat16),
    "lora with dropout": lora(dropout=0.3),
    "one projection": lambda: models.build("phi3").train(),
    "half of the head turns": lambda: models.with_lora(models.build("glm4")).train(),
    "checkpointed": checkpointed,
}


@pytest.mark.parametrize("name", BUILDS)
def test_a_step_has_the_same_bits_and_rotates_once_each_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, halves, model = stepped(BUILDS[name], monkeypatch, True)
    assert sum(ops["rope_over_"] for ops in halves) >= 1
    assert not any(ops["rope_over"] or ops["rope"] for ops in halves), "it runs again, or in a copy"
    assert all(not (ops["rope_over_"] and ops["rope_backward"]) for ops in halves)
    wanted, before, plain = stepped(BUILDS[name], monkeypatch, False)
    assert not any(ops["rope_over_"] for ops in before)
    for step, expected in zip(steps, wanted, strict=True):
        assert torch.equal(step.loss, expected.loss)
        assert step.grads.keys() == expected.grads.keys()
        for key, grad in expected.grads.items():
            assert torch.equal(step.grads[key], grad), key
    ours, theirs = (
        {p: r.partitioned for r in driver._required(m).records for p in r.modules}
        for m in (model, plain)
    )
    for path, told in theirs.items():
        assert told is None or ours[path].saved <= told.saved, path


Computation = Callable[..., torch.Tensor]


def run(
    computation: Computation, over: bool, whole: bool
) -> tuple[list[torch.Tensor], Counter[str], Partitioned]:
    """Values and gradients of a computation split by our partition, its ops, and what it saved."""
    from functorch.compile import aot_function

    torch.manual_seed(0)
    shape = (2, 6, 64) if whole else (2, 6, 16)
    x, w = torch.randn(*shape, requires_grad=True), torch.randn(16, 64, requires_grad=True)
    cos, sin = torch.rand(2, 1, 1, 6, 16)
    ops: Counter[str] = Counter()
    told: list[Partitioned] = []

    def compiled(graph: fx.GraphModule, inputs: Any) -> Any:
        rope_over.write(graph)
        ops.update(map(ir.own_name, ir.calls(graph.graph)))
        return graph.forward

    ours = functools.partial(partition, Asked("default", told.append, over=over))
    function: Any = aot_function(computation, compiled, compiled, partition_fn=ours)
    out = function(x, w, cos, sin)
    outs = [*out] if isinstance(out, (tuple, list)) else [out]
    sum((o.float() ** 2).sum() for o in outs).backward()
    return [*outs, *(g for g in (x.grad, w.grad) if g is not None)], ops, told[0]


def heads(columns: torch.Tensor) -> torch.Tensor:
    return columns.unflatten(-1, (-1, 16)).transpose(1, 2)


def rotated(
    q: torch.Tensor, k: torch.Tensor | None, cos: Any, sin: Any, dtype: Any = torch.float32
) -> Any:
    return torch.ops.fusewright.rope(q, k, cos, sin, "half", 16, dtype)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def plain(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = map(heads, (x @ w).split([32, 16, 16], -1))
    return attended(*rotated(q, k, cos, sin), v)


def with_v_first(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    wide = x @ w
    q, k, v = heads(wide[..., 32:]), heads(wide[..., 16:32]), heads(wide[..., :16])
    return attended(*rotated(q, k, cos, sin), v)


def q_alone(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = map(heads, (x @ w).split([32, 16, 16], -1))
    return attended(rotated(q, None, cos, sin)[0], k, v)


def with_nothing_behind(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = map(heads, (x @ w).split([32, 16, 16], -1))
    turned = rotated(q, k, cos, sin)
    whole = [torch.cat((y, y0[..., 16:]), -1) for y, y0 in zip(turned, (q, k), strict=True)]
    return attended(*whole, v)


def one_after_the_other(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = map(heads, (x @ w).split([32, 16, 16], -1))
    return attended(rotated(q, None, cos, sin)[0], rotated(k, None, sin, cos)[0], v)


@pytest.mark.parametrize(
    "computation", [plain, with_v_first, q_alone, with_nothing_behind, one_after_the_other]
)
def test_what_is_written_over(computation: Computation) -> None:
    got, ops, told = run(computation, True, False)
    wanted, before, alone = run(computation, False, False)
    assert ops["rope_over_"] == before["rope_backward"] == ops["rope_backward"]
    assert not ops["rope_over"] and not ops["rope"]
    assert told.saved <= alone.saved
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def q_is_read_before(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = map(heads, (x @ w).split([32, 16, 16], -1))
    return attended(*rotated(q, k, cos, sin), v) + q.sum()


def q_is_read_in_the_backward(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = map(heads, (x @ w).split([32, 16, 16], -1))
    return attended(*rotated(q, k, cos, sin), v) * torch.sigmoid(q)


def the_whole_is_read(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    wide = x @ w
    q, k, v = map(heads, wide.split([32, 16, 16], -1))
    return attended(*rotated(q, k, cos, sin), v) + wide.sum(-1)[:, None, :, None]


def the_whole_is_a_result(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    wide = x @ w
    q, k, v = map(heads, wide.split([32, 16, 16], -1))
    return attended(*rotated(q, k, cos, sin), v), wide


def k_is_a_result(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = map(heads, (x @ w).split([32, 16, 16], -1))
    q, k = rotated(q, k, cos, sin)
    return attended(q, k, v), k


def v_is_read_before(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = map(heads, (x @ w).split([32, 16, 16], -1))
    return attended(*rotated(q, k, cos * v.sum(), sin), v)


def an_input(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = map(heads, x.split([32, 16, 16], -1))
    return attended(*rotated(q, k, cos, sin), v) + w.sum()


def made_by_something_else(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = map(heads, torch.sigmoid(x @ w).split([32, 16, 16], -1))
    return attended(*rotated(q, k, cos, sin), v)


def in_another_dtype(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    q, k, v = map(heads, (x @ w).split([32, 16, 16], -1))
    return attended(*rotated(q, k, cos, sin, torch.bfloat16), v.bfloat16())


def q_and_k_overlap(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    wide = x @ w
    q, k, v = heads(wide[..., :32]), heads(wide[..., 16:32]), heads(wide[..., 48:])
    return attended(*rotated(q, k, cos, sin), v)


def v_overlaps(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    wide = x @ w
    q, k, v = heads(wide[..., :32]), heads(wide[..., 32:48]), heads(wide[..., 40:56])
    return attended(*rotated(q, k, cos, sin), v)


def every_second_column(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    wide = x @ w
    q, k, v = heads(wide[..., :32:2]), heads(wide[..., 32:48]), heads(wide[..., 48:])
    return attended(*rotated(q, k, cos, sin), v)


def heads_begin_anywhere(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    wide = x @ w
    q, k, v = heads(wide[..., 1:17]), heads(wide[..., 17:33]), heads(wide[..., 48:])
    return attended(*rotated(q, k, cos, sin), v)


def expanded(x: Any, w: Any, cos: Any, sin: Any) -> Any:
    wide = x @ w
    q = heads(wide[..., :16]).expand(2, 2, 6, 16)
    return attended(*rotated(q, heads(wide[..., 32:48]), cos, sin), heads(wide[..., 48:]))


@pytest.mark.parametrize(
    "computation",
    [
        q_is_read_before,
        q_is_read_in_the_backward,
        the_whole_is_read,
        the_whole_is_a_result,
        k_is_a_result,
        v_is_read_before,
        an_input,
        made_by_something_else,
        in_another_dtype,
        q_and_k_overlap,
        v_overlaps,
        every_second_column,
        heads_begin_anywhere,
        expanded,
    ],
)
def test_what_is_left(computation: Computation) -> None:
    whole = computation is an_input
    got, ops, told = run(computation, True, whole)
    assert ops["rope"] and not ops["rope_over"] and not ops["rope_over_"]
    wanted, _, alone = run(computation, False, whole)
    assert told == alone
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("read", ["before", "behind", "result", "nobody"])
def test_a_half_in_which_the_input_is_needed_gets_a_copy(read: str) -> None:
    graph = fx.Graph()
    shapes = {"x": (2, 6, 16), "w": (2, 16, 64), "cos": (1, 1, 6, 16), "sin": (1, 1, 6, 16)}
    given = {n: graph.placeholder(n) for n in shapes}
    values = {n: torch.randn(s) for n, s in shapes.items()}
    for name, node in given.items():
        node.meta["val"] = values[name]
    call = graph.call_function
    whole = call(torch.ops.aten.bmm.default, (given["x"], given["w"]))
    outs = [call(torch.ops.aten.neg.default, (whole,))] if read == "before" else []
    where = (0, 2, 32, 1, 16)
    args = (whole, given["cos"], given["sin"], "half", 16, *where)
    outs.append(call(torch.ops.fusewright.rope_over.default, args))
    outs += [call(torch.ops.aten.neg.default, (whole,))] if read == "behind" else []
    outs += [whole] if read == "result" else []
    graph.output(tuple(outs))
    half = fx.GraphModule(torch.nn.Module(), graph)
    wanted = half(*values.values())
    assert rope_over.write(half) == (read == "nobody")
    for a, b in zip(half(*values.values()), wanted, strict=True):
        assert torch.equal(a, b)


def test_what_was_saved_is_not_written_over() -> None:
    """A rotation of a half's own input: a second backward reads that once more."""
    graph = fx.Graph()
    whole, cos, sin = (graph.placeholder(n) for n in ("whole", "cos", "sin"))
    args = (whole, cos, sin, "half", 16, 0, 2, 32, 1, 16)
    graph.output(graph.call_function(torch.ops.fusewright.rope_over.default, args))
    assert rope_over.write(fx.GraphModule(torch.nn.Module(), graph)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoint", [False, True])
def test_on_a_gpu_a_layer_launches_two_rotations(
    checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.profiler import ProfilerActivity, profile

    batch = {k: v.cuda() for k, v in models.batch(rows=2, length=64).items()}
    place = rope_over.place
    made = {}
    for over in (True, False):
        monkeypatch.setattr(rope_over, "place", place if over else lambda graph: 0)
        torch.manual_seed(0)
        built = checkpointed() if checkpoint else lora()()
        made[over] = fusewright.optimize(
            built.to(torch.bfloat16).cuda(), lowering="fx", strict=True
        )
        for _ in range(3):  # verified, seen, recorded
            training.train_step(made[over], batch, seed=3)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        ours, theirs = (
            [training.train_step(model, batch, seed=3) for _ in range(2)] for model in made.values()
        )
        torch.cuda.synchronize()
    on_gpu = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    launched = [e for e in on_gpu if e.name == "rope_kernel"]
    runs = 3 if checkpoint else 2  # a checkpoint's second forward rotates what it has made anew
    assert len(launched) == 2 * (runs + 3) * models.LAYERS
    for step, expected in zip(ours, theirs, strict=True):
        assert torch.equal(step.loss, expected.loss)
        for key, grad in expected.grads.items():
            assert torch.equal(step.grads[key], grad), key
