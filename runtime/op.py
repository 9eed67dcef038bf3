"""Register a kernel family's ops with the dispatcher: schema, devices, fake, autograd.

An op is registered once per process under ``torch.ops.fusewright``. A low-level library with an
Autograd key is used because it is the cheapest of the ways torch offers: 16 microseconds a call,
forward with grad, against 32 for ``torch.library.custom_op``. Python's own calls with plain tensors do
not even go that way (``quick``).
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fusewright.kernels import catalogue
from fusewright.kernels.spec import OpSpec, Work
from fusewright.runtime import quick
from fusewright.runtime.replay import Planned, planned
from fusewright.runtime.rule import Arguments, applied
from fusewright.runtime.shortcut import shortcut

_NAMESPACE = "fusewright"


def register(spec: OpSpec, library: torch.library.Library, device: str = "cuda") -> None:
    """Define one op and its backward in ``library`` with devices, fakes and the autograd rule.

    ``device`` is the type of device that ``spec.triton`` is for.
    """
    backward_name = spec.backward.split("(", 1)[0]
    forward_schema = spec.forward
    if spec.forward_needs:
        # The public op decides from requires_grad; the flags travel on the op below it.
        inner = spec.name + "_forward"
        flags = ", ".join(f"bool need_{n}" for n in spec.differentiable)
        head, result = spec.forward.split(") ->", 1)
        library.define(spec.forward)
        forward_schema = inner + head[len(spec.name) :] + ", " + flags + ") ->" + result
        library.define(forward_schema)
    else:
        inner = spec.name
        library.define(spec.forward)
    kernels = {inner: 0}
    if spec.backward:
        library.define(spec.backward)
        kernels[backward_name] = 1
    plans: list[Planned | None] = [None, None]
    for name, which in kernels.items():
        library.impl(name, spec.reference[which], "CompositeExplicitAutograd")
        if spec.triton is not None:
            plan = plans[which] = _planned(spec, name, which, device)
            call = spec.triton[which] if plan is None else plan.call
            library.impl(name, call, device.upper())
        torch.library.register_fake(f"{_NAMESPACE}::{name}", spec.fake[which], lib=library)
    if spec.backward:
        _differentiate(spec, library, inner, plans, device)
    elif plans[0] is not None:
        quick.shorten(_packet(inner), plans[0], plans[0].tensors, None)


def _packet(name: str) -> Any:
    return getattr(getattr(torch.ops, _NAMESPACE), name)


def _differentiate(
    spec: OpSpec,
    library: torch.library.Library,
    inner: str,
    plans: list[Planned | None],
    device: str,
) -> None:
    """Give the op its autograd rule, and the short way to its plans where it has any."""
    backward_packet = _packet(spec.backward.split("(", 1)[0])
    forward, backward = _packet(inner).default, backward_packet.default
    arguments = Arguments(spec, forward._schema)
    watched = arguments.watched
    short = None
    forward_plan, backward_plan = plans
    if spec.triton is not None:
        forward, backward = (
            shortcut(op, kernel, device) if plan is None else quick.past(op, plan)
            for op, kernel, plan in zip((forward, backward), spec.triton, plans, strict=True)
        )
    apply = applied(spec, forward, backward, arguments)
    if forward_plan is not None and backward_plan is not None:
        if arguments.lists:
            rule = lambda found, values: apply(*values)
        else:
            rule = quick.differentiated(spec, arguments, forward_plan, backward_plan, backward)
            short = quick.way(forward_plan, watched, rule)
        quick.shorten(_packet(spec.name), forward_plan, watched, rule)
        quick.shorten(backward_packet, backward_plan, backward_plan.tensors, None)

    def autograd(*values: Any) -> Any:
        if short is not None:
            out = short(values)
            if out is not NotImplemented:
                return out
        if torch.is_grad_enabled():
            for i in watched:
                if quick.wants_grad(values[i]):
                    return apply(*values)
        with torch._C._AutoDispatchBelowAutograd():
            if spec.forward_needs:
                return forward(*values, *[False] * len(watched))
            return forward(*values)

    library.impl(spec.name, autograd, "Autograd")
    if spec.forward_needs:
        # Inference mode has no Autograd key: the public op goes straight to the one below.
        library.impl(
            spec.name, lambda *v: forward(*v, *[False] * len(watched)), "CompositeExplicitAutograd"
        )


@functools.cache
def register_all() -> torch.library.Library:
    """Register every op of the catalogue; later calls return the same library."""
    library = torch.library.Library(_NAMESPACE, "DEF")
    for spec in catalogue():
        register(spec, library)
    return library


@functools.cache
def cheap_ops() -> frozenset[str]:
    """Names of the ops whose forward the backward may run again (``OpSpec.cheap``)."""
    return frozenset(s.name for s in catalogue() if s.cheap and not s.forward_needs)


@functools.cache
def flop_formulas() -> dict[str, Work]:
    """By operator name, what ``OpSpec.flops`` says of the op and of its backward."""
    found: dict[str, Work] = {}
    for spec in catalogue():
        if spec.flops is not None:
            names = spec.name, spec.backward.split("(", 1)[0]
            found |= dict(zip(names, spec.flops, strict=True))
    return found


@functools.cache
def passing_formulas() -> dict[str, Work]:
    """By operator name, what ``OpSpec.passing`` says of the op and of its backward."""
    found: dict[str, Work] = {}
    for spec in catalogue():
        if spec.passing is not None:
            names = spec.name, spec.backward.split("(", 1)[0]
            found |= dict(zip(names, spec.passing, strict=True))
    return found


@functools.cache
def workspaces() -> dict[str, OpSpec]:
    """By name, the ops that say what memory they need at once (``OpSpec.workspace``)."""
    return {s.name: s for s in catalogue() if s.workspace is not None}


def _planned(spec: OpSpec, name: str, which: int, device: str) -> Planned | None:
    """The host function with plans; None where it decides by values, such as how many rows count."""
    assert spec.triton is not None
    schema = getattr(getattr(torch.ops, _NAMESPACE), name).default._schema
    if spec.forward_needs:
        return None
    return planned(spec.triton[which], schema, device)
