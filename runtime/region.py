"""A region's forward and backward as one autograd function, without AOTAutograd's wrappers around it.

AOTAutograd prepares each call for whatever a graph may do: write over inputs, return views of them,
make tensors of subclasses. Most blocks do nothing of that, and then what is left is to run one half,
keep what the other half reads, and run that. What lives as long as the module does, its parameters and
what belongs to them, is kept as it is: autograd's hooks on saved tensors (an activation checkpoint, say)
have nothing to gain of it, and of 70 tensors that a layer over 4-bit weights keeps it is 60. That
nobody has written over it is checked as autograd does, by its version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch._dynamo import compiled_autograd

from fusewright.runtime.rule import picker

Call = Callable[..., Any]
_BOXED = hasattr(torch.autograd.function.BackwardCFunction, "apply_boxed")
_MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: "
    "a tensor {shape} of the module is at version {got}; expected version {expected} instead"
)
_DETERMINISTIC = (
    "This compiled backward function is being run with torch.use_deterministic_algorithms(True), but "
    "the forward was compiled while torch.use_deterministic_algorithms(False) was set."
)

_DONATED = (
    "This backward function was compiled with donated buffers, which needs create_graph=False and "
    "retain_graph=False in all backward() calls; torch._functorch.config.donated_buffer=False "
    "compiles it without."
)


class Values(NamedTuple):
    """Some values by what is to become of them until they are read.

    Attributes:
        numbers: positions of sizes.
        passing: positions of tensors that autograd keeps.
        lasting: positions of tensors that live as long as the module does.
        order: for each value, which one it is of numbers + passing + lasting (and what comes behind).
    """

    numbers: tuple[int, ...]
    passing: tuple[int, ...]
    lasting: tuple[int, ...]
    order: tuple[int, ...]


class Layout(NamedTuple):
    """What the halves of a region take and give.

    Attributes:
        results: how many of the values that the forward gives are the region's own, from the first.
        plain: those of them that have no gradient.
        dynamic: (which of them, its dimensions that Dynamo is to take for symbolic).
        differentiable: arguments that the backward has gradients of.
        given: the forward's arguments.
        read: what the backward takes, among the forward's arguments and then everything that it
            gives; behind them come the tangents.
        tangents: results whose gradients it takes.
        fits: per tangent, what brings it into the strides in which the backward reads it.
        undetermined: whether it was compiled where algorithms need not be deterministic.
        donated: whether the backward writes over what was kept, and can run once only.
    """

    results: int
    plain: tuple[int, ...]
    dynamic: tuple[tuple[int, frozenset[int]], ...]
    differentiable: tuple[int, ...]
    given: Values
    read: Values
    tangents: tuple[int, ...]
    fits: tuple[Call, ...]
    undetermined: bool
    donated: bool = False


def watched() -> bool:
    """Whether somebody wants to see the region's calls: a transform, or autograd that is compiled."""
    return (
        torch._C._are_functorch_transforms_active() or compiled_autograd.compiled_autograd_enabled
    )


def fitting(form: Any) -> Call:
    """What brings a gradient into AOTAutograd's ``MemoryFormatMeta``."""
    wanted, size, stride = form.memory_format, form.size, form.stride
    if wanted is not None:
        return lambda t: (
            t if t.is_contiguous(memory_format=wanted) else t.contiguous(memory_format=wanted)
        )

    def fit(t: torch.Tensor) -> torch.Tensor:
        if t.stride() == stride:
            return t
        return torch.empty_strided(size, stride, dtype=t.dtype, device=t.device).copy_(t)

    return fit


def _owned(t: torch.Tensor) -> torch.Tensor:
    """What may be saved: a view would keep autograd's record of what it is a view of."""
    return t.detach() if t._is_view() else t


def _told(t: torch.Tensor, dims: frozenset[int]) -> None:
    """Mark a result's symbolic sizes, as AOTAutograd does."""
    t._dynamo_weak_dynamic_indices = set(dims)  # type: ignore[attr-defined]
    t._has_dynamo_dim_marking = True  # type: ignore[attr-defined]


def _unchanged(static: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    for t, expected in zip(static, versions, strict=True):
        if t._version != expected:
            shape = tuple(t.shape)
            raise RuntimeError(_MODIFIED.format(shape=shape, got=t._version, expected=expected))


class _Refused(torch.autograd.Function):
    """Gradients that are asked for with a graph: it refuses, whatever they depend on."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *grads: torch.Tensor) -> Any:
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "a compiled region's backward cannot be differentiated (no double backward)"
        )


class _Keeper:
    """Takes values apart for autograd to keep, and puts them together again."""

    def __init__(self, values: Values) -> None:
        self.parts = tuple(picker(at) for at in values[:3])
        self.order = picker(values.order)

    def keep(self, ctx: Any, pool: Sequence[Any]) -> None:
        numbers, passing, lasting = (part(pool) for part in self.parts)
        ctx.save_for_backward(*map(_owned, passing))
        ctx.rest = numbers, lasting, [t._version for t in lasting]

    def kept(self, ctx: Any, saved: Sequence[Any], *behind: Any) -> list[Any]:
        numbers, lasting, versions = ctx.rest
        _unchanged(lasting, versions)
        return [*self.order((*numbers, *saved, *lasting, *behind))]

    def put(self, pool: Sequence[Any], *behind: Any) -> list[Any]:
        """As if they had been kept."""
        numbers, passing, lasting = (part(pool) for part in self.parts)
        return [*self.order((*numbers, *map(_owned, passing), *lasting, *behind))]


def joined(
    forward: Call, backward: Call, layout: Layout, rerun: Call | None = None
) -> tuple[Call, Call]:
    """The region as a function of its arguments, and the same with its forward run again.

    The second keeps its arguments alone, and its backward begins with another forward: what an
    activation checkpoint does, without its hooks on every tensor and Dynamo's second look at the
    module. There must be nothing random in it.

    Args:
        forward, backward: the compiled halves; each takes a list, which it may empty.
        layout: what they take and give.
        rerun: gives what the forward does but its results, in less time.
    """
    given, read = _Keeper(layout.given), _Keeper(layout.read)

    def again(ctx: Any, saved: Sequence[Any], *ups: Any) -> list[Any]:
        args = given.kept(ctx, saved)
        ctx.maybe_clear_saved_tensors()
        autocast = torch._C._is_any_autocast_enabled()
        with torch._C._DisableAutocast() if autocast else nullcontext():
            made = rerun([*args]) if rerun else forward([*args])[layout.results :]
            pool = (*args, *[None] * layout.results, *made)
            del args, made
        return read.put(pool, *ups)

    def once(ctx: Any, saved: Sequence[Any], *ups: Any) -> list[Any]:
        args = read.kept(ctx, saved, *ups)
        ctx.maybe_clear_saved_tensors()
        return args

    repeatable = layout._replace(donated=False)  # what is written over is made anew
    return (
        _function(forward, backward, layout, lambda ctx, pool: read.keep(ctx, pool), once),
        _function(forward, backward, repeatable, lambda ctx, pool: given.keep(ctx, pool), again),
    )


def _function(forward: Call, backward: Call, layout: Layout, keep: Call, kept: Call) -> Call:
    """One autograd function: ``kept(ctx, saved, *tangents)`` gives the backward's arguments."""
    gradients_of, results = picker(layout.differentiable), layout.results
    tangents = tuple(zip(layout.tangents, layout.fits, strict=True))
    bare = torch._C.DisableTorchFunctionSubclass

    def pull(ctx: Any, *grads: Any) -> Any:
        if layout.undetermined and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(_DETERMINISTIC)
        if layout.donated and torch._C._autograd._get_current_graph_task_keep_graph():
            raise RuntimeError(_DONATED)
        # Hooks on what was kept run others' code (a checkpoint's recompute), in the state it began in.
        saved = ctx.saved_tensors
        with bare():
            args = kept(ctx, saved, *[fit(grads[at]) for at, fit in tangents])
            del grads, saved
            return (None, *gradients_of(backward(args)))

    class Region(torch.autograd.Function):
        boxed_grads_call = _BOXED  # they come in a list that may be emptied

        @staticmethod
        def forward(ctx: Any, args: Sequence[Any], *watched: Any) -> Any:
            with bare():
                outs = forward([*args])
                keep(ctx, (*args, *outs))
                made = [
                    torch.ops.aten._unsafe_view(t, t.shape) if t._is_view() else t
                    for t in outs[:results]
                ]
            if layout.plain:
                ctx.mark_non_differentiable(*[made[at] for at in layout.plain])
            ctx._materialize_non_diff_grads = False
            return tuple(made)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if _BOXED:
                (whole,) = grads
                grads = (*whole,)
                whole.clear()
            if not torch.is_grad_enabled():
                return pull(ctx, *grads)
            with torch.no_grad():
                out = pull(ctx, *grads)
            refuse: Any = _Refused.apply
            return (None, *refuse(torch.empty(0, requires_grad=True), *out[1:]))

    parent: Any = super(torch.autograd.Function, Region)
    apply = parent.apply  # what is left of apply where there are no transforms

    def call(args: Sequence[Any]) -> Any:
        out = apply(args, *gradients_of(args))
        for at, dims in layout.dynamic:
            _told(out[at], dims)
        return out

    return call
