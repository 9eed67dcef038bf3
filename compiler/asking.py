"""One capture of a block for all layers: of the first as if its stream wanted a gradient, as others' do.

Where nothing is trained in front of the layers, the first one's input wants no gradient, which Dynamo
guards on. The block is therefore handed an input that seems to want one: another tensor on the same
memory, behind a function of autograd's that gives nothing back. The compiled graph gets the input as it
is, and has been lowered for both, so that the first layer's backward computes no more than it must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from fusewright.compiler import ir, known


class Stream(NamedTuple):
    """The hidden states that a block is given now.

    Attributes:
        given: what the compiled code gets.
        asked: whether it only seems to want a gradient.
        run: the compiled code.
    """

    given: torch.Tensor
    asked: bool
    run: Callable[..., Any]


class _Asking(torch.autograd.Function):
    """Its second argument, as a result that wants a gradient and gives none back."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


class Streams:
    """The streams of one model's blocks, and which compiled code serves those with and without.

    Attributes:
        now: that of the block that runs now; None outside of one, and where nothing is to be known.
        used: whether captures are to be shared at all.
    """

    def __init__(self) -> None:
        self.now: Stream | None = None
        self.used = True
        self._shared: dict[Callable[..., Any], bool] = {}
        self._anchor: torch.Tensor | None = None

    def enter(
        self,
        run: Callable[..., Any],
        module: nn.Module,
        args: Any,
        kwargs: Any,
        several: Callable[[], bool],
    ) -> tuple[Any, Any]:
        """The block's arguments as the compiled code is to be given them, and note the stream.

        Args:
            run: the compiled code.
            module: the block.
            args, kwargs: its arguments.
            several: whether other blocks run this code.
        """
        self.now = None
        plain = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        found = _stream(args, kwargs) if self.used and plain else None
        if found is None:
            return args, kwargs
        if run not in self._shared:
            trained = any(p.requires_grad for p in module.parameters())
            self._shared[run] = trained and not found.requires_grad and several()
        if not self._shared[run]:
            return args, kwargs
        given = found
        if not found.requires_grad:
            if self._anchor is None:
                self._anchor = torch.empty((), requires_grad=True)
            given = _Asking.apply(self._anchor, found)  # type: ignore[no-untyped-call]
            args, kwargs = tree_map_only(
                torch.Tensor, lambda t: given if t is found else t, (args, kwargs)
            )
        self.now = Stream(given, given is not found, run)
        return args, kwargs

    @property
    def asked(self) -> bool:
        """Whether the stream of the block that runs now only seems to want a gradient."""
        return self.now is not None and self.now.asked

    def true(self, values: Sequence[Any]) -> Sequence[Any]:
        """A graph's inputs as they are."""
        now = self.now
        if now is None or not now.asked:
            return values
        return [v.detach() if v is now.given else v for v in values]

    def place(self, graph: fx.Graph, inputs: Sequence[Any]) -> int | None:
        """Which of the inputs of a graph that is being compiled is the stream; None if not for both.

        Where that is not plain, this code serves the streams that want a gradient alone from now on.
        """
        if self.now is None:
            return None
        at = next((i for i, v in enumerate(inputs) if v is self.now.given), None)
        if at is None or at != known.stream(graph):
            self.part()
            return None
        return at

    def part(self) -> None:
        """Have the code that is being compiled serve the streams that want a gradient, and no others."""
        if self.now is not None:
            self._shared[self.now.run] = False


def _stream(args: Any, kwargs: Any) -> torch.Tensor | None:
    """The first tensor that looks like hidden states, if it is a plain one."""
    for value in (*args, *kwargs.values()):
        if type(value) is torch.Tensor and value.dim() == 3 and value.is_floating_point():
            return None if value.is_inference() else value
    return None


def unasked(graph: fx.Graph, inputs: Sequence[Any], place: int) -> list[Any]:
    """The inputs of a graph with a stand-in for the stream that wants no gradient."""
    value = ir.value(graph.find_nodes(op="placeholder")[place])
    with value.fake_mode:
        made = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
    return [made if at == place else v for at, v in enumerate(inputs)]
