"""Call an op's CUDA kernels without the dispatcher, where it would do nothing on the way to them.

Below autograd a plain CUDA tensor meets nothing but the op's CUDA function, and to find that out
costs the dispatcher several microseconds: every argument becomes a C++ value and an object again.
Whatever wants to see the op in between (a mode, a transform, a tensor subclass, fake tensors while a
graph is traced) still does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusewright.runtime.seen import is_plain


def shortcut(
    operator: torch._ops.OpOverload, kernel: Callable[..., Any], device: str = "cuda"
) -> Callable[..., Any]:
    """A function that calls ``kernel`` where only it could run, and otherwise ``operator``.

    ``kernel`` must be what ``operator`` has registered for ``device``. Operators with lists of
    tensors are always dispatched.
    """
    kinds = [str(a.type) for a in operator._schema.arguments]
    if any("List[" in kind and "Tensor" in kind for kind in kinds):
        return operator
    at = tuple(i for i, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]"))
    modes = torch._C._len_torch_dispatch_stack
    transforms = torch._C._are_functorch_transforms_active

    def call(*values: Any) -> Any:
        if modes() or transforms():
            return operator(*values)
        for i in at:
            value = values[i]
            if value is None:
                continue
            if not is_plain(type(value)) or value.device.type != device or value.is_neg():
                return operator(*values)
        return kernel(*values)

    return call
