"""An op's short way from the caller to its plan, and the autograd rule on it.

What the dispatcher and the general rule do for a plain tensor costs more than an op's kernel: every
argument becomes a C++ value and an object again, twice, and autograd asks about each. Here the
arguments are looked at once; autograd is told about the differentiable inputs and outputs alone, and
keeps the op's statistics as what they are to it, numbers between the forward and the backward.

Whoever wants to see the op (modes, transforms, tracers, the profiler, tensor subclasses) finds it on
the dispatcher's way, which remains what the op is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fusewright.kernels.spec import OpSpec
from fusewright.runtime.replay import Planned
from fusewright.runtime.rule import Arguments, picker

Call = Callable[..., Any]


class _Kept(NamedTuple):
    """What a backward needs of a forward: which tensors, the constants, and the order of both."""

    tensors: Call
    constants: tuple[Any, ...]
    order: Call


def _kept(
    spec: OpSpec, args: Arguments, values: tuple[Any, ...], outputs: tuple[Any, ...]
) -> tuple[_Kept, bool]:
    """What ``spec.save`` gives, as positions among the arguments and then the outputs.

    Together with whether no tensor was there twice: only then do the positions hold for other calls.
    """
    pool = values + outputs
    there = [i for i, v in enumerate(pool) if isinstance(v, torch.Tensor)]
    place = {id(pool[i]): i for i in there}
    tensors: list[int] = []
    constants: list[Any] = []
    ranks: list[tuple[bool, int]] = []
    for v in spec.save(dict(zip(args.names, values, strict=True)), outputs):
        if isinstance(v, torch.Tensor):
            ranks.append((True, len(tensors)))
            tensors.append(place[id(v)])
        else:
            ranks.append((False, len(constants)))
            constants.append(tuple(v) if isinstance(v, list) else v)
    order = [at if tensor else len(tensors) + at for tensor, at in ranks]
    return _Kept(picker(tensors), tuple(constants), picker(order)), len(place) == len(there)


def differentiated(
    spec: OpSpec, args: Arguments, forward: Planned, backward: Planned, dispatched: Call
) -> Call:
    """The op with gradients, of what ``forward.look`` found and the op's arguments.

    ``dispatched`` is the backward for gradients that may not go past the dispatcher.
    """
    outputs, count = spec.outputs, len(args.watched)
    sparse = spec.sparse
    targets = tuple(enumerate(spec.gradients or range(count)))
    watched_of = picker(args.watched)
    settle, look_back, settle_back = forward.settle, backward.look, backward.settle

    def pull(ctx: Any, *grads: Any) -> Any:
        kept, needs = ctx.kept, ctx.needs_input_grad[1:]
        values = (*grads, *kept.order(ctx.saved_tensors + kept.constants), *needs)
        found = look_back(values)
        out = dispatched(*values) if found is None else settle_back(found, values)
        results = out if type(out) is tuple else (out,)
        return (None, *[results[at] if needs[which] else None for which, at in targets])

    refusing = torch.autograd.function.once_differentiable(pull)

    class Quick(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, work: list[Any], *watched: Any) -> Any:
            found, values = work
            plan, tensors, rest = found
            out = settle(found, values) if plan is None else plan.run(tensors, rest)
            made = out if type(out) is tuple else (out,)
            kept = None if plan is None else plan.kept
            if kept is None:
                kept, alone = _kept(spec, args, values, made)
                if plan is not None and alone:
                    plan.kept = kept
            ctx.save_for_backward(*kept.tensors(values + made))
            ctx.kept = kept
            if sparse:
                ctx.set_materialize_grads(False)
            work.append(made)
            return made[0] if outputs == 1 else made[:outputs]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            # with gradients of gradients asked for, a graph that refuses them; no_grad costs time
            return (refusing if torch.is_grad_enabled() else pull)(ctx, *grads)

    Quick.__name__ = Quick.__qualname__ = f"{spec.name}_rule"
    parent: Any = super(torch.autograd.Function, Quick)
    apply = parent.apply  # what is left of apply where there are no transforms

    def call(found: tuple[Any, Any, Any], values: tuple[Any, ...]) -> Any:
        work = [found, values]
        out = apply(work, *watched_of(values))
        made = work[2]
        if len(made) == 1:
            return out
        return (out, *made[1:]) if outputs == 1 else (*out, *made[outputs:])

    return call


def shorten(
    packet: Any, planned: Planned, watched: tuple[int, ...], with_grad: Call | None
) -> None:
    """Have Python's calls of an op take the short way where they may.

    ``with_grad`` (see ``differentiated``) is for calls where one of the ``watched`` arguments needs a
    gradient; without it such calls are dispatched.
    """
    look, settle = planned.look, planned.settle
    count = len(packet.default._schema.arguments)
    watching = torch._C._len_torch_function_stack
    tracing, profiling = torch._C._get_tracing_state, torch._C._autograd._profiler_enabled
    included = torch._C._dispatch_tls_is_dispatch_key_included
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
    pre_dispatch = torch._C.DispatchKey.PreDispatch
    autograd = torch._C.DispatchKey.AutogradOther  # with it every device's is excluded
    recording = torch.is_grad_enabled

    def call(self: Any, /, *values: Any, **named: Any) -> Any:
        if (
            named
            or len(values) != count
            or watching()
            or profiling()
            or tracing() is not None
            or included(pre_dispatch)
        ):
            return self._op(*values, **named)
        found = look(values)
        if found is None:
            return self._op(*values)
        if recording():
            for i in watched:
                if wants_grad(values[i]) and not excluded(autograd):
                    return self._op(*values) if with_grad is None else with_grad(found, values)
        return settle(found, values)

    # The call as a method of a class: one call of a Python function less than an attribute.
    for op in (packet, packet.default):
        op.__class__ = type(f"Direct{type(op).__name__}", (type(op),), {"__call__": call})


def past(operator: Any, planned: Planned) -> Call:
    """``operator`` below autograd, past the dispatcher where there is nothing on the way."""
    look, settle = planned.look, planned.settle

    def call(*values: Any) -> Any:
        found = look(values)
        return operator(*values) if found is None else settle(found, values)

    return call


def wants_grad(value: Any) -> bool:
    """Whether autograd must know of an argument: a tensor, a list of them, or neither."""
    if value is None:
        return False
    if value.__class__ is list or value.__class__ is tuple:
        return any(map(wants_grad, value))
    return isinstance(value, torch.Tensor) and value.requires_grad


def way(planned: Planned, watched: tuple[int, ...], with_grad: Call) -> Call:
    """The short way from the op's Autograd kernel; NotImplemented where there is none."""
    look, settle = planned.look, planned.settle
    recording = torch.is_grad_enabled

    def short(values: tuple[Any, ...]) -> Any:
        found = look(values)
        if found is None:
            return NotImplemented
        if recording():
            for i in watched:
                value = values[i]
                if value is not None and value.requires_grad:
                    return with_grad(found, values)
        return settle(found, values)

    return short
