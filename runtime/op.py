"""Register a kernel family's ops with the dispatcher: schema, devices, fake, autograd.

An op is registered once per process under ``torch.ops.fusewright``. A low-level library with an
Autograd key is used because it is the cheapest of the ways torch offers: 16 microseconds a call,
forward with grad, against 32 for ``torch.library.custom_op``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fusewright.kernels import catalogue
from fusewright.kernels.spec import OpSpec

_NAMESPACE = "fusewright"


def _tensor_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value)


class _Arguments:
    """The forward's argument names, and which of them autograd must watch."""

    def __init__(self, spec: OpSpec, schema: torch._C.FunctionSchema) -> None:
        self.names = tuple(a.name for a in schema.arguments)
        if spec.forward_needs:
            self.names = self.names[: len(self.names) - len(spec.differentiable)]
        self.watched = tuple(self.names.index(n) for n in spec.differentiable)


def _needs(requires: dict[int, bool], watched: tuple[int, ...]) -> tuple[bool, ...]:
    return tuple(requires[i] for i in watched)


def _plain_rule(
    spec: OpSpec, forward: Callable[..., Any], backward: Callable[..., Any], args: _Arguments
) -> type[torch.autograd.Function]:
    """The autograd.Function of an op without lists of tensors: half the host time of the other."""
    which = spec.gradients or tuple(range(len(spec.differentiable)))
    watched, names, blank = args.watched, args.names, [None] * len(args.names)

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Any) -> Any:
            given = ctx.needs_input_grad
            ctx.needs = [given[i] for i in watched]
            with torch._C._AutoDispatchBelowAutograd():
                out = forward(*values, *ctx.needs) if spec.forward_needs else forward(*values)
            outputs = out if isinstance(out, tuple) else (out,)
            middle = spec.save(dict(zip(names, values, strict=True)), outputs)
            ctx.save_for_backward(*[v if isinstance(v, torch.Tensor) else None for v in middle])
            ctx.constants = [None if isinstance(v, torch.Tensor) else v for v in middle]
            ctx.mark_non_differentiable(*outputs[spec.outputs :])
            return out

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            middle = [
                c if t is None else t for t, c in zip(ctx.saved_tensors, ctx.constants, strict=True)
            ]
            out = backward(*grads[: spec.outputs], *middle, *ctx.needs)
            results = out if isinstance(out, tuple) else (out,)
            flat: list[Any] = blank.copy()
            for i, need, at in zip(watched, ctx.needs, which, strict=True):
                if need:
                    flat[i] = results[at]
            return tuple(flat)

    Rule.__name__ = Rule.__qualname__ = f"{spec.name}_rule"
    return Rule


def _autograd_function(
    spec: OpSpec, forward: Callable[..., Any], backward: Callable[..., Any], args: _Arguments
) -> type[torch.autograd.Function]:
    """The autograd.Function of one op; lists of tensors arrive flattened behind their lengths."""

    which = spec.gradients or tuple(range(len(spec.differentiable)))

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, layout: tuple[int, ...], *flat: Any) -> Any:
            values, spans, at = [], [], 0
            for n in layout:
                spans.append((at, at + max(n, 1) if n >= 0 else at + 1))
                values.append(list(flat[at : at + n]) if n >= 0 else flat[at])
                at += n if n >= 0 else 1
            needs: list[bool] = []
            starts = _starts(layout)
            for i in args.watched:
                width = layout[i] if layout[i] >= 0 else 1
                first = starts[i]
                needs.append(any(ctx.needs_input_grad[1 + first : 1 + first + width]))
            with torch._C._AutoDispatchBelowAutograd():
                out = forward(*values, *needs) if spec.forward_needs else forward(*values)
            outputs = out if isinstance(out, tuple) else (out,)
            middle = spec.save(dict(zip(args.names, values, strict=True)), outputs)
            tensors: list[torch.Tensor] = []
            plan: list[Any] = []
            for value in middle:
                if isinstance(value, torch.Tensor):
                    plan.append(("t", len(tensors)))
                    tensors.append(value)
                elif _tensor_list(value):
                    plan.append(("l", len(tensors), len(value)))
                    tensors.extend(value)
                else:
                    plan.append(("c", value))
            ctx.save_for_backward(*tensors)
            ctx.plan, ctx.needs, ctx.layout = plan, needs, layout
            ctx.mark_non_differentiable(*outputs[spec.outputs :])
            ctx.set_materialize_grads(True)
            return out

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = ctx.saved_tensors
            middle = []
            for kind, *at in ctx.plan:
                if kind == "t":
                    middle.append(saved[at[0]])
                elif kind == "l":
                    middle.append(list(saved[at[0] : at[0] + at[1]]))
                else:
                    middle.append(at[0])
            out = backward(*grads[: spec.outputs], *middle, *ctx.needs)
            results = out if isinstance(out, tuple) else (out,)
            starts, width = _starts(ctx.layout), sum(n if n >= 0 else 1 for n in ctx.layout)
            flat: list[Any] = [None] * width
            for i, need, at in zip(args.watched, ctx.needs, which, strict=True):
                if not need:
                    continue
                grad = results[at]
                if ctx.layout[i] >= 0:
                    flat[starts[i] : starts[i] + ctx.layout[i]] = grad
                else:
                    flat[starts[i]] = grad
            return (None, *flat)

    Rule.__name__ = Rule.__qualname__ = f"{spec.name}_rule"
    return Rule


@functools.lru_cache(maxsize=256)
def _starts(layout: tuple[int, ...]) -> tuple[int, ...]:
    starts, at = [], 0
    for n in layout:
        starts.append(at)
        at += n if n >= 0 else 1
    return tuple(starts)


def _flatten(values: tuple[Any, ...]) -> tuple[tuple[int, ...], list[Any]]:
    layout, flat = [], []
    for value in values:
        if _tensor_list(value):
            layout.append(len(value))
            flat.extend(value)
        else:
            layout.append(-1)
            flat.append(value)
    return tuple(layout), flat


def register(spec: OpSpec, library: torch.library.Library) -> None:
    """Define one op and its backward in ``library`` with devices, fakes and the autograd rule."""
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
    for name, which in kernels.items():
        library.impl(name, spec.reference[which], "CompositeExplicitAutograd")
        if spec.triton is not None:
            library.impl(name, spec.triton[which], "CUDA")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", spec.fake[which], lib=library)
    namespace = getattr(torch.ops, _NAMESPACE)
    forward = getattr(namespace, inner).default
    if not spec.backward:
        return
    backward = getattr(namespace, backward_name).default
    arguments = _Arguments(spec, forward._schema)
    watched = arguments.watched
    plain = "Tensor[]" not in forward_schema
    rule = (_plain_rule if plain else _autograd_function)(spec, forward, backward, arguments)

    def autograd(*values: Any) -> Any:
        if torch.is_grad_enabled() and any(_wants_grad(values[i]) for i in watched):
            if plain:
                return rule.apply(*values)
            return rule.apply(*((lf := _flatten(values))[0], *lf[1]))
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


def _wants_grad(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(_wants_grad(v) for v in value)


@functools.cache
def register_all() -> torch.library.Library:
    """Register every op of the catalogue; later calls return the same library."""
    library = torch.library.Library(_NAMESPACE, "DEF")
    for spec in catalogue():
        register(spec, library)
    return library
