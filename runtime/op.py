"""Register a kernel family's ops with the dispatcher: schema, devices, fake, autograd.

An op is registered once per process under ``torch.ops.fusewright``. A low-level library with an
Autograd key is used because it is the cheapest of the ways torch offers: 16 microseconds a call,
forward with grad, against 32 for ``torch.library.custom_op``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fusewright.kernels import catalogue
from fusewright.kernels.spec import OpSpec
from fusewright.runtime.rule import Arguments, applied
from fusewright.runtime.shortcut import shortcut

_NAMESPACE = "fusewright"


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
    arguments = Arguments(spec, forward._schema)
    if spec.triton is not None:
        forward = shortcut(forward, spec.triton[0])
        backward = shortcut(backward, spec.triton[1])
    apply = applied(spec, forward, backward, arguments)
    watched = arguments.watched

    def autograd(*values: Any) -> Any:
        if torch.is_grad_enabled():
            for i in watched:
                if _wants_grad(values[i]):
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
