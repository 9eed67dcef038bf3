"""A checkpoint inside a block's own forward: the node that Dynamo makes of it drops random state."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusewright
from fusewright.compiler import known, pipeline
from fusewright.compiler.records import Verdict


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _Norm(width)
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down, self.drop = nn.Linear(2 * width, width), nn.Dropout(0.1)

    def _body(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.drop(self.down(F.silu(self.gate(h)) * self.up(h)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._body, x, use_reentrant=False)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.layers = nn.ModuleList([_Block(32) for _ in range(3)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


@pytest.mark.parametrize("lowering", ["fx", "inductor"])
def test_dropout_under_an_inner_checkpoint(lowering: str) -> None:
    eager = _Model()
    ours = fusewright.optimize(copy.deepcopy(eager), lowering=lowering)
    ids = torch.randint(0, 50, (2, 9))

    def step(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(5)
        loss = F.cross_entropy(model(ids).view(-1, 50), ids.view(-1))
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    for mine, theirs in zip(step(ours), step(eager), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert fusewright.report(ours).counts == {"rms_norm": 3, "glu": 3}


class _Sharing(_Block):
    """Leaves its normalised rows behind for later layers, and finds its own when it is recomputed."""

    gradient_checkpointing = False

    def forward(self, x: torch.Tensor, seen: dict[int, torch.Tensor]) -> torch.Tensor:
        h = self.norm(x)
        seen[id(self)] = h
        return self.norm(x + self.down(F.silu(self.gate(h)) * self.up(h)))


class _SharingModel(_Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Sharing(32) for _ in range(3)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, seen = self.embed(ids), {}
        for layer in self.layers:
            if layer.gradient_checkpointing:
                x = checkpoint(layer, x, seen, use_reentrant=False)
            else:
                x = layer(x, seen)
        return self.out(x)


def test_a_recompute_that_is_compiled_anew_saves_what_the_forward_saved() -> None:
    """The blocks run without checkpoints first; the recompute then meets a state of its own."""
    eager = _SharingModel()
    ours = fusewright.optimize(copy.deepcopy(eager), lowering="fx")
    ids = torch.randint(0, 50, (2, 9))
    for checkpointing in (False, True):
        grads = []
        for model in (ours, eager):
            for layer in model.layers:
                layer.gradient_checkpointing = checkpointing
            loss = model(ids).square().mean()
            grads.append(torch.autograd.grad(loss, list(model.parameters())))
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_recompute_that_is_compiled_anew_is_not_judged_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What would be refused there has run in the forward pass, and the two must save the same."""
    judged: list[bool] = []

    def verify(canonical: Any, rewritten: Any, args: Any, plain: Any) -> Any:
        recomputes = torch._C._current_graph_task_id() != -1
        judged.append(recomputes)
        verdict = Verdict("reverted" if recomputes else "accepted")
        return {wanted: replace(verdict) for wanted in known.variants(canonical, args)}

    monkeypatch.setattr(pipeline, "verify", verify)
    monkeypatch.setattr(known, "fingerprint", lambda *_: None)  # each graph is unlike any before
    ours = fusewright.optimize(_SharingModel(), lowering="fx")
    for checkpointing in (False, True):
        for layer in ours.layers:
            layer.gradient_checkpointing = checkpointing
        captured = len(fusewright.report(ours).regions)
        ours(torch.randint(0, 50, (2, 9))).square().mean().backward()
    assert len(fusewright.report(ours).regions) > captured
    assert judged and not any(judged)
