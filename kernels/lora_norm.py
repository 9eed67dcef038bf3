"""Backwards of adapted layers whose x is an RMS norm's output, with the norm's input and statistics.

    x = h r (offset + w)        dA_i = P_i^T x

x is read for dA alone, whose product makes it of h while that is in registers (``thin_kernels``): it
need not be kept, nor the norm run again. Shapes, derivations and rounding are those of ``lora``,
``lora_mlp`` and ``rms_norm``; x has the bits of the norm's forward. Every adapter reads x, and no
weight is trained.

    lora_group_norm_backward, lora_mlp_norm_backward: the backwards' arguments with h for x, then the norm's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fusewright.kernels import lora, lora_mlp
from fusewright.kernels.lora_group import backward_flops
from fusewright.kernels.normed import Norm
from fusewright.kernels.spec import Implementation, one_way

_NORM = ", Tensor? norm_weight, Tensor norm_rstd, float norm_offset, str norm_cast"
_MORE = len(Norm._fields)


def _of(run: Callable[..., Any]) -> Implementation:
    """A backward's host function, whose last arguments are the norm's."""

    def normed(*args: Any) -> Any:
        return run(*args[:-_MORE], norm=Norm(*args[-_MORE:]))

    return normed


def _without(run: Callable[..., Any]) -> Implementation:
    """What asks nothing of the norm."""
    return lambda *args: run(*args[:-_MORE])


def _schema(base: str) -> str:
    """The schema of a backward with the norm's arguments behind its own."""
    head, result = base.split(") ->", 1)
    return f"{head.replace('_backward(', '_norm_backward(', 1)}{_NORM}) ->{result}"


_GROUP, _MLP = lora.OPS[0], lora_mlp.OPS[1]

OPS = (
    dataclasses.replace(
        one_way(
            _schema(_GROUP.backward),
            _of(lora.host_bwd),
            _of(lora.device_bwd),
            _without(lora._fake_bwd),
            lambda args, out: backward_flops(args[:-_MORE], out),
        ),
        passing=(lambda args, out: lora._backward_passing(args[:-_MORE], out),) * 2,
    ),
    one_way(
        _schema(_MLP.forward),
        _of(lora_mlp.host_bwd),
        _of(lora_mlp.device_bwd),
        _without(lora_mlp._fake_bwd),
        lambda args, out: lora_mlp._flops_bwd(args[:-_MORE], out),
    ),
)
