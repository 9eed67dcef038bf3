"""Prove: a true claim passes; a wrong sign, constant or cast is refused with the step named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import capture, compile_one, perturbed, rows, to_bf16

from fusewright.compiler.prove import Candidate, Disproved, prove

EPS = 1e-6


def _norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    f = x.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _candidate(inputs: list[Any]) -> Candidate:
    """The claim about a graph before its rewrite, found anew."""
    from fusewright.patterns.rms_norm import RMSNorm

    graph = capture(_norm, inputs).canonical.graph
    (anchor,) = RMSNorm().anchors(graph)
    candidates = list(RMSNorm().candidates(anchor))
    return next(c for c in candidates if c.cast == "input" and c.inputs["weight"] is not None)


def _formula(change: Callable[..., Any]) -> Callable[..., Any]:
    def formula(t: dict[str, Any], rounder: Any) -> list[torch.Tensor]:
        y = t["x"] * torch.rsqrt(t["x"].square().mean(-1, keepdim=True) + EPS)
        return [change(y, t["weight"], rounder)]

    return formula


def _true(y: torch.Tensor, w: torch.Tensor, rounder: Any) -> torch.Tensor:
    return rounder(y, torch.bfloat16) * w


def _wrong_sign(y: torch.Tensor, w: torch.Tensor, rounder: Any) -> torch.Tensor:
    return -_true(y, w, rounder)


def _wrong_gradient(y: torch.Tensor, w: torch.Tensor, rounder: Any) -> torch.Tensor:
    return rounder(y, torch.bfloat16) * w.detach()


def _no_cast(y: torch.Tensor, w: torch.Tensor, rounder: Any) -> torch.Tensor:
    return y * w


def _nearly(y: torch.Tensor, w: torch.Tensor, rounder: Any) -> torch.Tensor:
    return _true(y, w, rounder) * (1 + 1e-8)


def test_a_true_claim_is_accepted() -> None:
    candidate = _candidate(to_bf16([rows(2, 5, 16), perturbed(16)]))
    proof = prove(replace(candidate, formula=_formula(_true)))
    assert proof.forward <= 1e-10 and proof.backward <= 1e-9


def test_a_proof_takes_one_thread_and_gives_the_others_back() -> None:
    seen = []

    def formula(t: dict[str, Any], rounder: Any) -> list[torch.Tensor]:
        seen.append(torch.get_num_threads())
        return _formula(_true)(t, rounder)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        prove(replace(_candidate(to_bf16([rows(2, 5, 16), perturbed(16)])), formula=formula))
        assert set(seen) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_wrong_sign, "float64: value differs"),
        (_nearly, "float64: value differs"),
        (_wrong_gradient, "float64: gradient differs"),
        (_no_cast, "casting mode: value differs"),
    ],
)
def test_a_false_claim_is_refused(change: Callable[..., Any], said: str) -> None:
    candidate = _candidate(to_bf16([rows(2, 5, 16), perturbed(16)]))
    with pytest.raises(Disproved, match=said):
        prove(replace(candidate, formula=_formula(change)))


def test_a_region_that_reads_more_than_it_says_is_refused() -> None:
    candidate = _candidate([rows(2, 5, 16), perturbed(16)])
    inputs = {"x": candidate.inputs["x"], "weight": None}
    with pytest.raises(Disproved, match="outside of the region"):
        prove(replace(candidate, inputs=inputs, formula=lambda t, r: [t["x"]]))


def test_one_value_in_two_roles_is_drawn_once() -> None:
    candidate = _candidate([rows(2, 5, 16), perturbed(16)])
    inputs = dict(candidate.inputs) | {"again": candidate.inputs["x"]}

    def formula(t: dict[str, Any], rounder: Any) -> list[torch.Tensor]:
        root = torch.rsqrt((t["x"] * t["again"]).mean(-1, keepdim=True) + EPS)
        return [t["x"] * root * t["weight"]]

    assert prove(replace(candidate, inputs=inputs, formula=formula)).forward <= 1e-10


def test_a_region_is_proven_where_gradients_are_off() -> None:
    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (8,), w)

    compiled = compile_one(norm)
    with torch.no_grad():
        compiled.run(torch.randn(2, 8), torch.randn(8))
    assert compiled.ops == {"layer_norm": 1}, compiled.misses
