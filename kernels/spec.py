"""What a kernel family declares about an op: schemas, implementations, and what the backward needs.

An op is a pair of dispatcher operators. The forward returns its differentiable outputs first and
then the statistics that its backward saves; the backward returns one gradient per differentiable
input, and an empty tensor of shape (0,) for each one that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

Implementation = Callable[..., Any]
Work = Callable[[Sequence[Any], Any], Any]


class Passing(NamedTuple):
    """What a run takes beside its results: bytes within it alone, and bytes moved before its products."""

    memory: Any
    moved: Any


@dataclass(frozen=True)
class OpSpec:
    """One differentiable operator.

    Attributes:
        forward: schema of the forward, e.g. ``"rms_norm(Tensor x, ...) -> (Tensor y, Tensor rstd)"``.
        backward: schema of the backward. Its leading arguments are the gradients of the
            differentiable outputs, its trailing ones the ``bool need_<input>`` flags in the order of
            ``differentiable``; what lies between is given by ``save``. Empty where nothing is
            differentiable; the second of each pair of implementations is then not used. Where its
            gradients are ``Tensor?``, an output that nobody used has None, else a tensor of zeros.
        differentiable: names of the inputs that may receive a gradient.
        outputs: how many leading outputs are differentiable; the rest are statistics.
        save: maps (inputs by name, all outputs) to the backward's middle arguments. Tensors among
            them are kept by autograd and so may come from inputs and outputs only.
        reference: (forward, backward) in plain PyTorch, for any device.
        triton: (forward, backward) launching Triton kernels, or None where there are none.
        fake: (forward, backward) shape functions.
        forward_needs: the forward computes gradients itself and so takes the ``need_<input>`` flags
            as its trailing arguments (e.g. a chunked loss).
        gradients: which result of the backward is the gradient of each differentiable input; two
            inputs may share one (a sum's operands). In order if empty.
        cheap: the forward is one pass over its data, without products and random draws: the backward
            may run it again where that keeps less memory alive.
        flops: (forward, backward), each mapping the op's arguments and its results to the FLOPs of its
            matrix products; symbolic sizes give symbolic numbers. None where there are no products.
        passing: (forward, backward), each mapping the op's arguments and its results to what a run takes
            beside them; symbolic as ``flops``. None where that is nothing to speak of.
        workspace: where the forward computes gradients itself: (the op's arguments, names of the inputs
            that are trained) -> bytes of scratch memory and results at once.
    """

    forward: str
    backward: str
    differentiable: tuple[str, ...]
    outputs: int
    save: Callable[[dict[str, Any], tuple[torch.Tensor, ...]], Sequence[Any]]
    reference: tuple[Implementation, Implementation]
    fake: tuple[Implementation, Implementation]
    triton: tuple[Implementation, Implementation] | None = None
    forward_needs: bool = False
    gradients: tuple[int, ...] = ()
    cheap: bool = False
    flops: tuple[Work, Work] | None = None
    passing: tuple[Work, Work] | None = None
    workspace: Callable[[Sequence[Any], frozenset[str]], int] | None = None

    @property
    def name(self) -> str:
        """The operator's name in ``torch.ops.fusewright``."""
        return self.forward.split("(", 1)[0]

    @property
    def sparse(self) -> bool:
        """Whether the backward takes None for the gradient of an output that nobody used."""
        kinds = self.backward.partition("(")[2].split(",")[: self.outputs]
        return all(kind.strip().startswith("Tensor?") for kind in kinds)


def one_way(
    schema: str,
    reference: Implementation,
    triton: Implementation,
    fake: Implementation,
    flops: Work,
) -> OpSpec:
    """An op that is not differentiated: it stands in a half whose derivation is done."""
    return OpSpec(
        forward=schema,
        backward="",
        differentiable=(),
        outputs=0,
        save=lambda inputs, outputs: (),
        reference=(reference, reference),
        triton=(triton, triton),
        fake=(fake, fake),
        flops=(flops, flops),
    )
