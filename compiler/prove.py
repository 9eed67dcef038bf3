"""Prove that a candidate computes its family's formula.

Region and formula are both run in float64 on the CPU, on several draws and input scales, values and
vector-Jacobian products. The run is made twice: once pure, once with every *explicit* narrowing
cast of the region emulated (round to the narrow dtype and back), which makes float64 see where the
user asked for rounding. An explicit cast is therefore honoured to the bit; the implicit rounding
between two bf16 operations may be dropped, never added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir, proofs

aten = torch.ops.aten

TOLERANCE = 1e-10
_VJP_TOLERANCE = 1e-9
_SCALES = (1.0, 1e-4, 1e-2, 30.0)
_SIZES = (2, 3, 5, 7, 4, 6)

Rounder = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
Draw = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """A region of the graph and the formula it is claimed to compute.

    Attributes:
        nodes: the calls that the rewrite removes.
        inputs: role -> node that the proof starts from (None: the role is absent).
        reads: role -> further node that the replacement reads. A projection that is replaced as it
            stands need not be proven: the proof starts from its result and ``reads`` names its
            operands.
        outputs: nodes of the region that are used outside, in the formula's order.
        formula: (inputs by role, rounder) -> outputs; plain differentiable PyTorch.
        emit: (graph, inputs by role) -> the replacement nodes, in the order of ``outputs``.
        params: what was read off the graph, for the report.
        cast: the casting mode, for the report.
        scaled: roles that are drawn at several scales (activations); others at scale 1.
        draw: role -> how to draw it, where a normal draw is no valid input.
        constant: roles that the kernel gives no gradient (tables); the graph's must not need one.
        share: how many instances of the family one candidate holds (q and k together: 2).
    """

    nodes: frozenset[fx.Node]
    inputs: Mapping[str, fx.Node | None]
    outputs: tuple[fx.Node, ...]
    formula: Callable[[dict[str, Any], Rounder], Sequence[torch.Tensor]]
    emit: Callable[[fx.Graph, Mapping[str, Any]], Sequence[fx.Node]]
    params: dict[str, Any]
    cast: str = ""
    scaled: tuple[str, ...] = ()
    draw: dict[str, Draw] = field(default_factory=dict)
    share: int = 1
    kernel: str = ""
    constant: tuple[str, ...] = ()
    reads: Mapping[str, fx.Node | None] = field(default_factory=dict)

    @property
    def sources(self) -> dict[str, fx.Node | None]:
        """Every role that the replacement may read."""
        return {**self.inputs, **self.reads}


@dataclass(frozen=True)
class Proof:
    """The largest relative errors seen while a candidate was accepted."""

    forward: float
    backward: float


class Disproved(Exception):
    """The candidate is not what was claimed; the message names the step and the numbers."""


def prove(candidate: Candidate) -> Proof:
    """Accept the candidate, or raise Disproved with the reason."""
    key = proofs.key(candidate)
    known = None if key is None else proofs.recall(key)
    if known is not None:
        return known
    found = _prove(candidate)
    if key is not None:
        proofs.remember(key, found)
    return found


def _prove(candidate: Candidate) -> Proof:
    failures = (RuntimeError, TypeError, ValueError, IndexError, KeyError)
    hints = _hints(candidate)
    # The region may be compiled where gradients are off.
    with _on_one_thread(), torch.enable_grad():
        try:
            return _prove_at(candidate, _small(hints))
        except Disproved:
            raise
        except failures:
            pass
        # A region may rely on a relation between sizes that small ones break: use the traced ones.
        try:
            return _prove_at(candidate, hints)
        except failures as error:
            raise Disproved(f"could not be evaluated: {type(error).__name__}: {error}") from error


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """At sizes like these, waking torch's other threads costs more than their help is worth."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _prove_at(candidate: Candidate, sizes: dict[Any, int]) -> Proof:
    worst_y = worst_g = 0.0
    for rounding in (False, True):
        for scale in _SCALES if candidate.scaled and not rounding else (1.0,):
            drawn = _draw(candidate, sizes, scale, rounding)
            y, g = _compare(candidate, drawn, sizes, rounding, scale)
            worst_y, worst_g = max(worst_y, y), max(worst_g, g)
    return Proof(worst_y, worst_g)


def _compare(
    candidate: Candidate, drawn: dict[str, Any], sizes: dict[Any, int], rounding: bool, scale: float
) -> tuple[float, float]:
    rounder: Rounder = round_through if rounding else _exact
    named = [(r, t) for r, t in drawn.items() if isinstance(t, torch.Tensor) and t.requires_grad]
    env = {n: drawn[r] for r, n in candidate.inputs.items() if n is not None}
    found = [evaluate(env, out, candidate.nodes, sizes, rounder) for out in candidate.outputs]
    claimed = list(candidate.formula(dict(drawn), rounder))
    if rounding:
        kinds = [ir.dtype(o) for o in candidate.outputs]
        found = [round_through(t, d) for t, d in zip(found, kinds, strict=True)]
        claimed = [round_through(t, d) for t, d in zip(claimed, kinds, strict=True)]
    error = _worst(found, claimed, "value", scale, TOLERANCE, rounding)
    generator = torch.Generator().manual_seed(11)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in claimed]
    leaves = [t for _, t in named]
    ours = torch.autograd.grad(claimed, leaves, cotangents, allow_unused=True)
    theirs = torch.autograd.grad(found, leaves, cotangents, allow_unused=True)
    zeros = [torch.zeros_like(t) for t in leaves]
    filled = [
        [z if g is None else g for g, z in zip(gs, zeros, strict=True)] for gs in (theirs, ours)
    ]
    slope = _worst(filled[0], filled[1], "gradient", scale, _VJP_TOLERANCE, rounding)
    return error, slope


def _worst(
    found: Sequence[torch.Tensor],
    claimed: Sequence[torch.Tensor],
    what: str,
    scale: float,
    tolerance: float,
    rounding: bool,
) -> float:
    worst = 0.0
    for a, b in zip(found, claimed, strict=True):
        if a.shape != b.shape:
            raise Disproved(f"{what} has shape {tuple(a.shape)}, the formula {tuple(b.shape)}")
        size = max(float(b.detach().norm()), 1e-300)
        error = float((a - b).detach().norm()) / size
        if not error <= tolerance:
            step = "casting mode" if rounding else "float64"
            raise Disproved(
                f"{step}: {what} differs by {error:.1e} relative at input scale {scale:g}"
            )
        worst = max(worst, error)
    return worst


def round_through(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to ``dtype`` and return to the tensor's own; gradients pass straight through."""
    if not dtype.is_floating_point or dtype in (torch.float32, torch.float64):
        return t
    return t + (t.detach().to(dtype).to(t.dtype) - t.detach())


def _exact(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t


def _draw(
    candidate: Candidate, sizes: dict[Any, int], scale: float, rounding: bool
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    drawn: dict[str, Any] = {}
    known: dict[fx.Node | None, Any] = {None: None}
    for role, node in candidate.inputs.items():
        if node is None or node in known:  # absent, or one value in two roles
            drawn[role] = known[node]
            continue
        val = ir.value(node)
        if not isinstance(val, torch.Tensor):
            drawn[role] = known[node] = _concrete(val, sizes)
            continue
        extent = tuple(_concrete(s, sizes) for s in val.shape)
        if role in candidate.draw:
            t = candidate.draw[role](extent, generator)
        elif val.dtype.is_floating_point:
            t = torch.randn(extent, generator=generator, dtype=torch.float64)
            t = t * scale if role in candidate.scaled else t
        else:
            raise Disproved(f"no way to draw the {val.dtype} input {role!r}")
        if t.is_floating_point():
            t = round_through(t, val.dtype) if rounding else t
            t = t.detach().requires_grad_(role not in candidate.constant)
        drawn[role] = known[node] = t
    return drawn


def _concrete(size: Any, sizes: dict[Any, int]) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return sizes[expression] if expression in sizes else int(expression.subs(sizes))


def _hints(candidate: Candidate) -> dict[Any, int]:
    """The traced size of every symbol that the region's shapes mention."""
    hints: dict[Any, int] = {}
    for node in (*candidate.inputs.values(), *candidate.nodes):
        for size in _sizes_of(node):
            for symbol in size.node.expr.free_symbols:
                hints.setdefault(symbol, ir.traced_symbol(size, symbol))
    return hints


def _small(hints: dict[Any, int]) -> dict[Any, int]:
    """A small size for every symbol; symbols of equal traced size stay equal.

    The graph may rely on an equality through a guard (rows of logits and of labels) that no
    substitution shows.
    """
    distinct = sorted(set(hints.values()))
    small = {hint: _SIZES[i % len(_SIZES)] for i, hint in enumerate(distinct)}
    return {symbol: small[hint] for symbol, hint in hints.items()}


def _sizes_of(node: fx.Node | None) -> list[torch.SymInt]:
    val = ir.value(node) if node is not None else None
    if isinstance(val, torch.SymInt):
        return [val]
    if isinstance(val, torch.Tensor):
        sizes: tuple[Any, ...] = tuple(val.shape)
        return [s for s in sizes if isinstance(s, torch.SymInt)]
    return []


def evaluate(
    env: dict[fx.Node, Any],
    target: fx.Node,
    nodes: frozenset[fx.Node],
    sizes: dict[Any, int],
    rounder: Rounder,
) -> Any:
    """The float64 value of ``target``, computing only calls in ``nodes`` from ``env``."""
    if target in env:
        return env[target]
    if target.op == "placeholder" and not isinstance(ir.value(target), torch.Tensor):
        return _concrete(ir.value(target), sizes)
    if target not in nodes:
        raise Disproved(f"reads {target.name}, which lies outside of the region")

    def argument(leaf: fx.Node) -> Any:
        val = ir.value(leaf)
        if isinstance(val, (torch.SymInt, int)) and leaf not in env:
            return _concrete(val, sizes)
        return evaluate(env, leaf, nodes, sizes, rounder)

    args = fx.map_arg(target.args, argument)
    kwargs = fx.map_arg(target.kwargs, argument)
    env[target] = _apply(target, args, dict(kwargs), rounder)
    return env[target]


def _apply(node: fx.Node, args: Any, kwargs: dict[str, Any], rounder: Rounder) -> Any:
    if ir.is_cast(node):
        source, wanted = ir.dtype(node.args[0]), ir.dtype(node)  # type: ignore[arg-type]
        return rounder(args[0], wanted) if wanted.itemsize < source.itemsize else args[0]
    if node.target in ir.CASTS and ir.is_floating(node):
        return args[0].to(torch.float64)
    wanted_dtype = kwargs.get("dtype")
    if isinstance(wanted_dtype, torch.dtype) and wanted_dtype.is_floating_point:
        kwargs["dtype"] = torch.float64
    args = tuple(
        torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a for a in args
    )
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    return node.target(*args, **kwargs)  # type: ignore[operator]
