"""Verify: at the first step, hold the rewritten region against float64 and against eager.

The region's real inputs are cut down along its symbolic sizes (a few rows, a few tokens) and run
three times: as captured, as rewritten, and as captured in float64. The rewrite stays if its error
against float64 is not above eager's, on the outputs and on every gradient. Dropout is off in all
three, since float64 would draw other masks.

A region may amplify rounding, so that moving its inputs by a last place makes eager's own error thrice
what it was. Where the first run is above eager's it is therefore joined by others on inputs moved like
that, and the mean errors over all of them are compared, with the same bounds: what a rewrite does wrong
stays in every one of them.

Where an equal graph will want the gradient of one input more (``fusewright.compiler.known``), the captured
graph runs with it and the rewritten one both with it and without: what is wanted decides which kernels a
backward runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from fusewright.compiler import ir, known
from fusewright.compiler.exact import Float64, Quiet
from fusewright.compiler.known import Wanted
from fusewright.compiler.legality import written
from fusewright.compiler.records import Verdict

log = logging.getLogger(__name__)

_LARGEST = 48
_BUDGET = 2**28
_MEAN_FACTOR, _TENSOR_FACTOR = 1.1, 2.0
_ONE_DIGIT = 0.1
_DRAWS = 8  # of roundings, where the first speaks against the rewrite

_Errors = dict[int, tuple[float, float]]  # by tensor: the rewritten region's and the captured one's


class _Different(Exception):
    """The rewritten region gives other things than the captured one; the message says which."""


class NotVerifiable(Exception):
    """The region cannot be run in float64 or cut down; the message says why."""


def verify(
    canonical: fx.GraphModule,
    rewritten: fx.GraphModule,
    args: Sequence[Any],
    plain: fx.GraphModule | None = None,
) -> dict[Wanted, Verdict]:
    """Whether the rewritten graph is at least as exact as the captured one, on real inputs.

    ``plain`` is the captured graph in operators that run in float64, where it has others. There is a
    verdict for the inputs that want a gradient, and one for each further choice that could be made.
    """
    *fewer, most = known.variants(canonical, args)
    found = _verify(canonical, rewritten, args, plain, (most, *fewer))
    if fewer and fewer[0] not in found:
        found = _verify(canonical, rewritten, args, plain, tuple(fewer))  # not with one more
    return found


def _verify(
    canonical: fx.GraphModule,
    rewritten: fx.GraphModule,
    args: Sequence[Any],
    plain: fx.GraphModule | None,
    variants: tuple[Wanted, ...],
) -> dict[Wanted, Verdict]:
    """Verdicts on the variants, of which the first wants what the others want."""
    most = variants[0]

    def unverified(reason: str) -> dict[Wanted, Verdict]:
        return {most: Verdict(reason=reason)}

    try:
        cut = cut_inputs(canonical, args)
        kept = _kept(canonical, rewritten)
        exact = _run(Float64(plain or canonical), cut, most, torch.float64, kept)
    except NotVerifiable as reason:
        return unverified(str(reason))
    except IndexError:
        raise  # a label or an id out of range, of which eager says the same
    except Exception as error:
        # Other libraries' operators refuse float64 in errors of any kind.
        log.debug("float64", exc_info=True)
        return unverified(f"the region does not run in float64: {_brief(error)}")
    try:
        eager = _run(Quiet(canonical), cut, most, None, kept)
    except Exception as error:
        # As above, by the cut sizes.
        log.debug("captured", exc_info=True)
        return unverified(f"the region does not run on cut inputs: {_brief(error)}")
    coarsest = max((torch.finfo(v.dtype).eps for v in cut if _is_floating(v)), default=0.0)
    found: dict[Wanted, Verdict] = {}
    errors: dict[Wanted, list[_Errors]] = {}
    for wanted in variants:
        try:
            ours = _run(Quiet(rewritten), cut, wanted, None, kept)
            errors[wanted] = [_errors(exact.only(wanted), eager.only(wanted), ours.all)]
            found[wanted] = _judge(errors[wanted], coarsest)
        except _Different as reason:
            found[wanted] = Verdict(status="reverted", reason=str(reason))
        except Exception as error:
            # Whatever our part of it raises, the captured graph runs in its place.
            log.debug("rewritten", exc_info=True)
            said = f"the rewritten region failed: {_brief(error)}"
            found[wanted] = Verdict(status="reverted", reason=said)
    refused = {w: errors[w] for w, v in found.items() if v.status == "reverted" and w in errors}
    if refused:
        del exact, eager
        try:
            _draw_more(Float64(plain or canonical), Quiet(canonical), rewritten, cut, kept, refused)
        except Exception:  # then the first run decides
            log.debug("other roundings", exc_info=True)
        else:
            found |= {w: _judge(draws, coarsest) for w, draws in refused.items()}
    return found


def _draw_more(
    float64: Float64,
    captured: Quiet,
    rewritten: fx.GraphModule,
    cut: list[Any],
    kept: list[int],
    errors: dict[Wanted, list[_Errors]],
) -> None:
    """Add the errors on inputs that are moved by about a last place; one set of results at a time."""
    most = frozenset().union(*errors)
    for seed in range(1, _DRAWS):
        moved = _moved(cut, most, seed)
        exact = _run(float64, moved, most, torch.float64, kept)
        eager = _run(captured, moved, most, None, kept)
        for wanted, draws in errors.items():
            ours = _run(Quiet(rewritten), moved, wanted, None, kept)
            draws.append(_errors(exact.only(wanted), eager.only(wanted), ours.all))


def _moved(cut: list[Any], wanted: Wanted, seed: int) -> list[Any]:
    """The inputs, of which those that want a gradient are moved up or down a little, or not at all.

    The rest stays where it is: a kernel may know a frozen weight by its memory.
    """
    generator = torch.Generator().manual_seed(seed)

    def moved(value: torch.Tensor) -> torch.Tensor:
        steps = torch.randint(-1, 2, value.shape, generator=generator).to(value)
        return value + value * (steps * torch.finfo(value.dtype).eps)

    return [moved(v) if i in wanted and _is_floating(v) else v for i, v in enumerate(cut)]


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def cut_inputs(graph: fx.GraphModule, args: Sequence[Any]) -> list[Any]:
    """The real inputs, cut to a few rows along every symbolic size; what is cut is in one piece again."""
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    sizes: dict[Any, int] = {}
    for node, real in zip(placeholders, args, strict=True):
        val = ir.value(node)
        if isinstance(val, torch.Tensor) and isinstance(real, torch.Tensor):
            for symbolic, size in zip(val.shape, real.shape, strict=True):
                if isinstance(symbolic, torch.SymInt) and symbolic.node.expr.is_symbol:
                    sizes[symbolic.node.expr] = min(int(size), _LARGEST)
    out: list[Any] = []
    total = 0
    for node, real in zip(placeholders, args, strict=True):
        val = ir.value(node)
        if isinstance(val, torch.SymInt):
            # One that nobody reads may be a stride, of what is a slice of a larger tensor.
            out.append(_size(val, sizes) if node.users else real)
        elif isinstance(val, torch.Tensor) and isinstance(real, torch.Tensor):
            piece = real.detach()
            for dim, symbolic in enumerate(val.shape):
                if isinstance(symbolic, torch.SymInt):
                    piece = piece.narrow(dim, 0, _size(symbolic, sizes))
            total += 0 if isinstance(real, torch.nn.Parameter) else piece.numel()
            if real.is_contiguous():
                piece = piece.contiguous()  # as the real one is: kernels are chosen by it
            out.append(piece.requires_grad_(False))
        else:
            out.append(real)
    if total > _BUDGET:
        raise NotVerifiable("its inputs are large and their sizes static, so no slice can be cut")
    return out


def _size(symbolic: torch.SymInt, sizes: dict[Any, int]) -> int:
    found = symbolic.node.expr.subs(sizes)
    if not found.is_number:
        raise NotVerifiable(f"the size {symbolic.node.expr} is not given by its inputs' shapes")
    return int(found)


def _kept(canonical: fx.GraphModule, rewritten: fx.GraphModule) -> list[int]:
    """Places of the outputs that both graphs give; a deferred one is None in the rewritten."""
    before, after = (_flat(g.graph.output_node().args) for g in (canonical, rewritten))
    pairs = enumerate(zip(before, after, strict=False))
    return [i for i, (a, b) in pairs if a is not None and b is not None]


class _Results(NamedTuple):
    """Floating outputs of a run, and gradients by the places of their inputs."""

    outputs: list[torch.Tensor | None]
    gradients: dict[int, torch.Tensor | None]

    @property
    def all(self) -> list[torch.Tensor | None]:
        return [*self.outputs, *self.gradients.values()]

    def only(self, wanted: Wanted) -> list[torch.Tensor | None]:
        """The outputs, and these gradients."""
        return [*self.outputs, *(g for i, g in self.gradients.items() if i in wanted)]


def _run(
    runner: fx.Interpreter,
    cut: list[Any],
    wanted: Wanted,
    dtype: torch.dtype | None,
    kept: list[int],
) -> _Results:
    """Outputs, and gradients of the wanted inputs, for one fixed cotangent."""
    leaves: list[Any] = []
    changed = written(runner.graph)
    for place, value in enumerate(cut):
        if isinstance(value, torch.Tensor):
            # What gets no gradient is not copied: a kernel may know a frozen weight by its memory.
            value = value.clone() if place in wanted else value.detach()
            if dtype is not None and place in wanted:
                value = value.to(dtype)  # the rest where it is read
            value.requires_grad_(place in wanted)
        leaves.append(value)
    devices = sorted({v.device.index for v in leaves if isinstance(v, torch.Tensor) and v.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        # A copy of what the graph writes to: the step is still to come, and a leaf cannot be written.
        handed = [v.clone() if at in changed else v for at, v in enumerate(leaves)]
        outputs = _flat(runner.run(*handed))
    results = [outputs[i] for i in kept if isinstance(outputs[i], torch.Tensor)]
    results = [r for r in results if r.is_floating_point()]
    places = sorted(wanted)
    generator = torch.Generator().manual_seed(3)
    pairs = [(r, torch.randn(r.shape, generator=generator).to(r)) for r in results]
    pairs = [(r, c) for r, c in pairs if r.requires_grad]
    grads: Sequence[torch.Tensor | None] = ()
    if pairs and places:
        given = [leaves[i] for i in places]
        floats, cotangents = zip(*pairs, strict=True)
        grads = torch.autograd.grad(floats, given, cotangents, allow_unused=True)
    return _Results([r.detach() for r in results], dict(zip(places, grads, strict=False)))


def _mean(values: Iterable[float]) -> float:
    found = [*values]
    return sum(found) / len(found)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _flat(part)]
    return [value]


def _errors(
    exact: list[torch.Tensor | None],
    eager: list[torch.Tensor | None],
    ours: list[torch.Tensor | None],
) -> _Errors:
    if not len(exact) == len(eager) == len(ours):
        raise _Different("the rewritten region has other outputs")
    errors: _Errors = {}
    for at, (x, e, o) in enumerate(zip(exact, eager, ours, strict=True)):
        if (e is None) != (o is None):
            raise _Different("another set of inputs gets a gradient")
        if x is None or e is None or o is None or x.numel() == 0:
            continue
        scale = float(x.norm())
        if scale == 0.0 or not (float((e - x).norm()) < float("inf")):
            continue
        errors[at] = float((o - x).norm()) / scale, float((e - x).norm()) / scale
    return errors


def _judge(draws: Sequence[_Errors], eps: float) -> Verdict:
    """A verdict on each tensor's mean errors over the draws."""
    found: dict[int, list[tuple[float, float]]] = {}
    for errors in draws:
        for at, pair in errors.items():
            found.setdefault(at, []).append(pair)
    pairs = [(_mean(o for o, _ in of), _mean(e for _, e in of)) for of in found.values()]
    if not pairs:
        return Verdict(reason="it has no floating outputs or gradients to compare")
    # A gradient that is zero in exact arithmetic (of a bias on attention's keys, say), or all but
    # cancelled, is nothing but rounding: eager has no digit of it right, and a mean over it would
    # say nothing of the others.
    meant = [(o, e) for o, e in pairs if e < _ONE_DIGIT] or pairs
    mean_ours, mean_eager = _mean(o for o, _ in meant), _mean(e for _, e in meant)
    verdict = Verdict("accepted", "", mean_ours, mean_eager)
    worst = max(pairs, key=lambda p: p[0] - _TENSOR_FACTOR * p[1])
    # In float32 both errors are sums of a few last bits, which the region itself may amplify, and
    # their ratio says little; in bf16 the mean over a region's tensors is steady.
    mean_slack, tensor_slack = (eps / 32, eps / 4) if eps > 1e-4 else (8 * eps, 32 * eps)
    mean_factor = _MEAN_FACTOR if eps > 1e-4 else _TENSOR_FACTOR
    if not mean_ours <= mean_factor * mean_eager + mean_slack:
        verdict.status = "reverted"
        verdict.reason = f"mean error {mean_ours:.2e} against eager's {mean_eager:.2e}"
    elif not worst[0] <= _TENSOR_FACTOR * worst[1] + tensor_slack:
        verdict.status = "reverted"
        verdict.reason = f"one tensor's error {worst[0]:.2e} against eager's {worst[1]:.2e}"
    return verdict
