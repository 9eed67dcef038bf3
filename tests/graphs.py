"""Check what becomes of one small computation: captured, matched and rewritten as a block is.

``check`` and ``check_untouched`` take a plain function or module, send it through Dynamo with our
settings and through the compiler, and compare what runs with eager: outputs, inputs that the code
may have changed in place, and every gradient. The run-time verification is off, so that it cannot
hide a wrong rewrite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from training import _InDouble

from fusewright.compiler.capture import Backend, compiled_forward
from fusewright.compiler.config import Options
from fusewright.compiler.dynamo import mark_rows
from fusewright.compiler.match import Miss
from fusewright.compiler.records import GraphRecord
from fusewright.compiler.session import Session
from fusewright.patterns import DEFAULT
from fusewright.runtime.op import register_all

Computation = Callable[..., Any] | nn.Module
SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Compiled:
    """A computation behind our backend, and what the compiler recorded about it."""

    run: Callable[..., Any]
    session: Session

    @property
    def ops(self) -> dict[str, int]:
        """How often each torch.ops.fusewright op stands in the rewritten graphs."""
        found: Counter[str] = Counter()
        for record in self.session.records:
            nodes = record.rewritten.graph.nodes if record.rewritten is not None else ()
            for node in nodes:
                if getattr(node.target, "namespace", "") == "fusewright":
                    found[node.target._schema.name.partition("::")[2]] += 1
        return dict(found)

    @property
    def misses(self) -> list[Miss]:
        """Every site that was looked at and left alone."""
        return [m for record in self.session.records for m in record.misses]


def compile_one(computation: Computation, kind: str = "block", **options: Any) -> Compiled:
    """The computation as a region of ``kind``; it is captured at its first run."""
    register_all()
    given = {"lowering": "fx", "verify": "off", "logits": "eager", "strict": True} | options
    session = Session(Options.build(DEFAULT, **given))
    backend = Backend(session, kind, "computation")
    bound = (computation,) if isinstance(computation, nn.Module) else ()
    compiled = compiled_forward(type(computation).forward if bound else computation, backend)

    def run(*inputs: Any) -> Any:
        mark_rows(inputs)
        revert = session.settings[kind]()
        try:
            return compiled(*bound, *inputs)
        finally:
            revert()

    return Compiled(run, session)


def capture(
    computation: Computation, inputs: Sequence[Any], kind: str = "block", **options: Any
) -> GraphRecord:
    """The record, with the canonical graph, of the computation's one graph on these inputs."""
    compiled = compile_one(computation, kind, **options)
    compiled.run(*_passed(inputs))
    (record,) = compiled.session.records
    return record


def check(
    computation: Computation,
    inputs: Sequence[Any],
    expected: Mapping[str, int],
    *,
    kind: str = "block",
) -> Compiled:
    """Assert which ops the computation becomes, and that it computes what eager does.

    Args:
        computation: a function of ``inputs``, or a module; returns a tensor or several.
        inputs: tensors and constants. Parameters are taken as a block's own, other floating
            tensors as activations (no leaves); all get a gradient if they require one. In float32
            every result is within 1e-5 of eager's; with bf16 among them the errors against float64
            are measured, and ours must not be above eager's.
        expected: op -> how many calls of it.
    """
    compiled = compile_one(computation, kind)
    tensors = [i for i in inputs if isinstance(i, torch.Tensor) and i.is_floating_point()]
    tensors += list(computation.parameters()) if isinstance(computation, nn.Module) else []
    if any(t.dtype is torch.bfloat16 for t in tensors):
        _assert_not_worse(compiled.run, computation, inputs)
    else:
        _assert_equal(compiled.run, computation, inputs)
    assert compiled.ops == dict(expected), f"{compiled.ops}, missed: {compiled.misses}"
    return compiled


def check_untouched(
    computation: Computation,
    inputs: Sequence[Any],
    pattern: str,
    reason: str | None,
    *,
    kind: str = "block",
) -> Compiled:
    """Assert that nothing is rewritten, that ``pattern`` says why, and that eager's results stand.

    Args:
        computation, inputs: as for ``check``.
        pattern: who must have looked at it.
        reason: part of what it says, ``step: reason``; None where there is nothing in the graph
            that the family would look at, so that nobody owes a reason.
    """
    compiled = check(computation, inputs, {}, kind=kind)
    said = [f"{m.step}: {m.reason}" for m in compiled.misses if m.pattern == pattern]
    if reason is None:
        assert not said, said
    else:
        assert any(reason in s for s in said), f"{pattern} said {said}"
    return compiled


def perturbed(*extent: int, around: float = 1.0) -> nn.Parameter:
    """A parameter near ``around``: a wrong gradient of a constant one could go unseen."""
    return nn.Parameter(around + 0.3 * torch.randn(*extent))


def rows(*extent: int) -> torch.Tensor:
    """An activation that wants a gradient."""
    return torch.randn(*extent, requires_grad=True)


def named(value: Any) -> str | None:
    """A test's id: the computation's name."""
    return value.__name__ if callable(value) else ""


def to_bf16(inputs: Sequence[Any]) -> list[Any]:
    """The same inputs with floating tensors in bfloat16."""
    return [_cast(i, torch.bfloat16) for i in inputs]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    cast = value.detach().to(dtype).requires_grad_(value.requires_grad)
    return nn.Parameter(cast) if isinstance(value, nn.Parameter) else cast


def _passed(inputs: Sequence[Any]) -> list[Any]:
    """What is handed over: an activation is nobody's leaf, so that it may be changed in place."""
    return [
        i.clone() if isinstance(i, torch.Tensor) and not isinstance(i, nn.Parameter) else i
        for i in inputs
    ]


def _step(run: Callable[..., Any], leaves: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Outputs, inputs afterwards, then gradients of the leaves for fixed cotangents."""
    torch.manual_seed(5)
    handed = _passed(inputs)
    out = run(*handed)
    outputs = list(out) if isinstance(out, (tuple, list)) else [out]
    generator = torch.Generator().manual_seed(9)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    after = [h for h in handed if isinstance(h, torch.Tensor) and h.is_floating_point()]
    return [v.detach() for v in (*outputs, *after)] + list(grads)


def _leaves(computation: Computation, inputs: Sequence[Any]) -> list[torch.Tensor]:
    own = list(computation.parameters()) if isinstance(computation, nn.Module) else []
    return [i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad] + own


def _assert_equal(run: Callable[..., Any], computation: Computation, inputs: Sequence[Any]) -> None:
    leaves = _leaves(computation, inputs)
    ours, eager = _step(run, leaves, inputs), _step(computation, leaves, inputs)
    assert len(ours) == len(eager)
    for at, (mine, theirs) in enumerate(zip(ours, eager, strict=True)):
        assert (mine is None) == (theirs is None), f"result {at} is None on one side"
        if mine is not None:
            difference = float((mine - theirs).norm())
            assert difference <= 1e-5 * float(theirs.norm()), f"result {at} is off by {difference}"


def _assert_not_worse(
    run: Callable[..., Any], computation: Computation, inputs: Sequence[Any]
) -> None:
    """Mean relative error over results and draws at most 1.05 times eager's, the noise here."""
    ours, eager = 0.0, 0.0
    for seed in SEEDS:
        drawn = _redrawn(inputs, seed)
        leaves = _leaves(computation, drawn)
        mine, theirs = _step(run, leaves, drawn), _step(computation, leaves, drawn)
        exact = [_cast(i, torch.float64) for i in drawn]
        with _InDouble():
            oracle = _step(computation, _leaves(computation, exact), exact)
        for m, t, o in zip(mine, theirs, oracle, strict=True):
            assert (m is None) == (t is None)
            if o is not None and bool(o.any()):
                assert m.dtype is t.dtype
                ours += float((m.double() - o).norm() / o.norm())
                eager += float((t.double() - o).norm() / o.norm())
    assert ours <= 1.05 * eager, f"our mean error is {ours / max(eager, 1e-300):.3f} of eager's"


def _redrawn(inputs: Sequence[Any], seed: int) -> list[Any]:
    """The inputs with the activations drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    return [
        _cast(torch.randn(i.shape, generator=generator).requires_grad_(True), i.dtype)
        if isinstance(i, torch.Tensor) and i.requires_grad and not isinstance(i, nn.Parameter)
        else i
        for i in inputs
    ]
