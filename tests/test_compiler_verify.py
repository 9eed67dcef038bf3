"""Verify: a rewrite that computes something else is reverted with its reason, and training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import compile_one, perturbed, rows
from torch import fx

from fusewright.compiler import verify
from fusewright.compiler.pipeline import CompileError
from fusewright.compiler.prove import Candidate
from fusewright.compiler.records import Verdict
from fusewright.compiler.rewrite import call
from fusewright.compiler.verify import _errors, _judge
from fusewright.patterns.rms_norm import RMSNorm


def _norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class _Wrong(RMSNorm):
    """Proves the norm and then emits something else in its place."""

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        for candidate in super().candidates(anchor):
            yield replace(candidate, emit=self._emit(candidate))

    def _emit(self, candidate: Candidate) -> Any:
        def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
            (right,) = candidate.emit(graph, read)
            return [call(graph, *self.spoil(right))]

        return emit


_SPOILT = {
    "value": lambda right: (torch.ops.aten.mul.Tensor, (right, 1.01)),
    "gradient": lambda right: (torch.ops.aten.detach.default, (right,)),
}


def _compiled(spoil: Any, strict: bool) -> Any:
    compiled = compile_one(_norm, verify="first_step", strict=strict)
    options = replace(compiled.session.options, patterns=(_Wrong(spoil),))
    compiled.session.options = options
    return compiled


@pytest.mark.parametrize("what", _SPOILT)
def test_a_wrong_rewrite_is_reverted(what: str) -> None:
    compiled = _compiled(_SPOILT[what], strict=False)
    for _ in range(2):
        x, w = rows(2, 5, 16), perturbed(16)
        ours, eager = compiled.run(x, w), _norm(x, w)
        torch.testing.assert_close(ours, eager)
        for mine, theirs in zip(
            torch.autograd.grad(ours.sin().sum(), (x, w)),
            torch.autograd.grad(eager.sin().sum(), (x, w)),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)
    (record,) = compiled.session.records
    assert record.verdict.status == "reverted" and record.failure.startswith("reverted: ")
    assert record.verdict.reason


@pytest.mark.parametrize("what", _SPOILT)
def test_strict_raises(what: str) -> None:
    compiled = _compiled(_SPOILT[what], strict=True)
    with pytest.raises(CompileError, match="reverted"):
        compiled.run(rows(2, 5, 16), perturbed(16))


def test_a_right_rewrite_is_accepted() -> None:
    compiled = compile_one(_norm, verify="first_step")
    compiled.run(rows(2, 5, 16), perturbed(16))
    (record,) = compiled.session.records
    assert record.verdict.status == "accepted" and compiled.ops == {"rms_norm": 1}
    assert record.verdict.backward is None or record.verdict.backward >= 0


@pytest.mark.parametrize("wants", [False, True])
def test_what_the_graph_writes_to_is_left_to_the_step(wants: bool) -> None:
    """Verification runs the graph several times before the step does, which must find what it was given."""

    def layer(x: torch.Tensor, w: torch.Tensor, given: torch.Tensor, seen: torch.Tensor) -> Any:
        seen.add_(1)
        given[:, 1:].mul_(2.0)
        return _norm(x, w) * given * seen

    w = perturbed(16)

    def step(run: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, base, seen = rows(2, 5, 16), rows(2, 5, 16), torch.ones(2, 5, 1)
        out = run(x, w, given := base * 1 if wants else base.detach().clone(), seen)
        leaves = (x, w, base) if wants else (x, w)
        return [out, given, seen, *torch.autograd.grad(out.sin().sum(), leaves)]

    compiled = compile_one(layer, verify="first_step")
    for _ in range(2):
        for ours, eager in zip(step(compiled.run), step(layer), strict=True):
            torch.testing.assert_close(ours, eager)
    (record,) = compiled.session.records
    assert record.verdict.status == "accepted", record.verdict
    assert compiled.ops == {"rms_norm": 1}


class _Cut(RMSNorm):
    """Proves the norm and then emits one that keeps the gradient from its input alone."""

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        for candidate in super().candidates(anchor):
            yield replace(candidate, emit=self._emit(candidate))

    def _emit(self, candidate: Candidate) -> Any:
        def emit(graph: fx.Graph, read: Mapping[str, Any]) -> Any:
            cut = call(graph, torch.ops.aten.detach.default, (read["x"],))
            return candidate.emit(graph, {**read, "x": cut})

        return emit


def _layers(pattern: RMSNorm) -> list[Any]:
    """The records of a first layer, behind which nothing is trained, and of one more of its kind."""
    compiled = compile_one(_norm, verify="first_step", strict=False)
    compiled.session.options = replace(compiled.session.options, patterns=(pattern,))
    w = perturbed(16)
    for x in (rows(2, 5, 16).detach(), rows(2, 5, 16)):
        compiled.run(x, w).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    return compiled.session.records


def test_equal_layers_are_verified_once() -> None:
    first, second = _layers(RMSNorm())
    assert first.verdict.status == second.verdict.status == "accepted"
    assert "verify" in first.seconds and "verify" not in second.seconds


def test_what_only_the_second_layer_needs_is_verified() -> None:
    first, second = _layers(_Cut())
    assert first.verdict.status == "accepted"
    assert second.verdict.status == "reverted" and second.verdict.reason


def test_a_slice_of_a_larger_tensor_is_verified() -> None:
    """Its stride is a size of none of the inputs' shapes."""
    compiled = compile_one(_norm, verify="first_step")
    compiled.run(rows(2, 5, 3, 16)[:, :, 1], perturbed(16))
    (record,) = compiled.session.records
    assert record.verdict.status == "accepted", record.verdict.reason


@pytest.mark.parametrize(("later", "status"), [(0.02, "accepted"), (0.023, "reverted")])
def test_where_one_rounding_refuses_eight_decide(
    later: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On inputs moved by about a last place: what is wrong is wrong in all of them."""
    seen: list[torch.Tensor] = []

    def errors(exact: Any, eager: Any, ours: Any) -> dict[int, tuple[float, float]]:
        seen.append(exact[0])
        return {0: (later if len(seen) > 1 else 0.03, 0.02)}

    monkeypatch.setattr(verify, "_errors", errors)
    compiled = compile_one(_norm, verify="first_step", strict=False)
    compiled.run(rows(2, 5, 16).bfloat16(), perturbed(16).bfloat16())
    (record,) = compiled.session.records
    assert record.verdict.status == status, record.verdict
    first, *others = seen[:8]
    assert len(others) == 7 and not any(torch.equal(first, o) for o in others)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0.1, atol=0.1)


def _noisy(exact: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
    return exact + size * exact.norm() * noise / noise.norm()


def _judged(exact: list[torch.Tensor], eager: list[float], ours: list[float]) -> Verdict:
    """The verdict on results with these relative errors, in bfloat16."""
    made = [
        [_noisy(x, size, seed) for x, size in zip(exact, sizes, strict=True)]
        for seed, sizes in ((1, eager), (2, ours))
    ]
    errors = _errors(list(exact), list(made[0]), list(made[1]))
    return _judge([errors], torch.finfo(torch.bfloat16).eps)


def test_a_gradient_that_is_only_rounding_does_not_decide() -> None:
    exact = [torch.randn(64), torch.randn(64), 1e-12 * torch.randn(64)]
    assert _judged(exact, [1e-3, 1e-3, 1e6], [1e-3, 1e-3, 1.5e6]).status == "accepted"
    assert _judged(exact, [1e-3, 1e-3, 1e6], [4e-3, 4e-3, 0.5e6]).status == "reverted"
    assert _judged(exact, [1e-3, 1e-3, 1e6], [1e-3, 1e-3, 1e9]).status == "reverted"


@torch.library.custom_op("fusewright_tests::picky", mutates_args=())
def _picky(x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.float64:
        raise LookupError("only 16 and 32 bits")
    return x.clone()


_picky.register_fake(torch.empty_like)
_picky.register_autograd(lambda ctx, dy: dy)


def test_what_refuses_float64_runs_unverified() -> None:
    def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return _norm(_picky(x), w)

    compiled = compile_one(layer, verify="first_step")
    x, w = rows(5, 32), perturbed(32)
    compiled.run(x, w).sum().backward()
    (record,) = compiled.session.records
    assert record.matches and record.verdict.status == "not verified"
    assert "LookupError: only 16 and 32 bits" in record.verdict.reason
