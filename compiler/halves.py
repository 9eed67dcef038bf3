"""The two halves of a joint graph as they are compiled, and whether they can be run by themselves.

AOTAutograd compiles a region's forward and backward and puts its own calls around them. Here both are
taken down on the way, with where each argument of the backward comes from. If the region does nothing
that those calls are for, ``runtime.region`` runs it instead.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._functorch import config
from torch._guards import TracingContext
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.graph import _BoxedCodeGen

from fusewright.compiler import ir, rope_over
from fusewright.compiler.partition import Asked
from fusewright.compiler.rerun import fits_inductor
from fusewright.runtime.region import Layout, Values, fitting, joined, watched

Call = Callable[..., Any]
aten = torch.ops.aten
_EMPTY = (
    "num_mutated_inp_runtime_indices", "num_intermediate_bases", "num_outputs_aliased",
    "num_backward_tokens", "num_graphsafe_rng_states", "is_rng_op_functionalized", "tokens",
    "grad_enabled_mutation", "num_opaque_objects_saved_for_bw", "num_tensors_saved_with_no_vc_check",
    "indices_of_inputs_that_requires_grad_with_mutations_in_bw", "act_input_indices",
)  # fmt: skip


def _outputs(graph: fx.Graph) -> list[Any]:
    (made,) = graph.output_node().args
    return [*made]  # type: ignore[misc]


class _Ends(NamedTuple):
    """What the halves take and give: their first and last nodes, and how many results there are."""

    given: list[fx.Node]
    made: list[Any]
    wanted: list[fx.Node]
    gradients: list[Any]
    results: int

    @classmethod
    def of(cls, forward: fx.Graph, backward: fx.Graph, results: int) -> _Ends:
        made, gradients = _outputs(forward), _outputs(backward)
        first = [list(g.find_nodes(op="placeholder")) for g in (forward, backward)]
        return cls(first[0], made, first[1], gradients, results)


class Halves:
    """What is known of one region's halves so far.

    Args:
        graph: the region's canonical graph.
        plain: whether the halves run as plain Python.
    """

    def __init__(self, graph: fx.Graph, plain: bool) -> None:
        self._plain = plain
        self._rerun: fx.GraphModule | None = None
        inputs = graph.find_nodes(op="placeholder")
        self._inputs = len(inputs)
        self._static = frozenset(at for at, n in enumerate(inputs) if n.meta.get("lasting"))
        self._autocast = torch._C._is_any_autocast_enabled()
        self._ends: _Ends | None = None
        self._layout: Layout | None = None
        self._forward: Call | None = None
        self._backward: Call | None = None
        self._metadata: Any = None

    def split(
        self,
        forward: fx.GraphModule,
        backward: fx.GraphModule,
        results: int,
        again: fx.GraphModule | None,
    ) -> None:
        """Take down how the joint graph was split; ``again`` is the forward without its results."""
        self._ends = _Ends.of(forward.graph, backward.graph, results)
        if again is None:
            return
        rope_over.write(again)  # the halves themselves where they are compiled
        if len(_outputs(again.graph)) == len(self._ends.made) - results:
            self._rerun = again

    def compiled(self, half: Call, forward: bool) -> None:
        """Take down a compiled half, which takes a list; called where it is compiled."""
        if not forward:
            self._backward = half
            return
        self._forward = half
        if not self._plain and not self._reruns_alike(getattr(half, "output_strides", None)):
            self._rerun = None
        context = TracingContext.try_get()
        self._metadata = None if context is None else context.fw_metadata
        if self._ends is not None and self._metadata is not None and not self._autocast:
            self._layout = _layout(self._ends, self._metadata, self._static)

    def _reruns_alike(self, strides: Sequence[Any] | None) -> bool:
        """Whether plain Python gives what Inductor's forward would, which gives these strides."""
        if self._rerun is None or self._ends is None:
            return False
        return fits_inductor(self._rerun.graph) and _as_traced(self._ends.made, strides)

    def around(self, run: Call, asked: Asked, random: bool) -> Call:
        """The halves by themselves where that is all there is to ``run``, AOTAutograd's function.

        Args:
            run: it.
            asked: ``asked.repeats`` is called for each call, if the halves can be run by themselves
                and without ``random`` numbers: is the forward to be run again in the backward?
            random: whether the region draws any.
        """
        layout, metadata = self._layout, self._metadata
        if layout is None or self._forward is None or self._backward is None:
            return run
        # Tensors that the graph itself holds are arguments of the halves that AOTAutograd adds.
        added = len(metadata.input_info) != self._inputs
        if added or _asks_for_more(metadata):
            return run
        layout = layout._replace(donated=bool(metadata.bw_donated_idxs))
        rerun = None if self._rerun is None else plain_python(self._rerun)
        once, again = joined(self._forward, self._backward, layout, rerun)
        repeats = None if random or asked.repeats is None else asked.repeats()
        if repeats is None:
            return lambda *args: run(*args) if watched() else once(args)
        return lambda *args: run(*args) if watched() else (again if repeats() else once)(args)


def plain_python(graph: fx.GraphModule) -> Call:
    """A graph as a function of a list, which it empties: what is read last is freed at once."""
    # Views were chosen by the fake tensors' strides, and the real ones may be others.
    for node in graph.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    graph.graph.set_codegen(_BoxedCodeGen())
    graph.recompile()
    _LazyGraphModule.force_recompile(graph)  # else each call asks whether it is compiled
    run: Any = functools.partial(type(graph).forward, graph)
    run._boxed_call = True
    return run  # type: ignore[no-any-return]


def at_once() -> AbstractContextManager[Any]:
    """The context in which AOTAutograd compiles both halves, and not what another process has left.

    A backward that were compiled when it first runs would leave the forwards before it to AOTAutograd,
    which keeps other tensors, and an activation checkpoint counts them.
    """
    context: Any = config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False)
    return context  # type: ignore[no-any-return]


def _asks_for_more(metadata: Any) -> bool:
    """Whether the region does what only AOTAutograd's calls around it can."""
    if any(getattr(metadata, name, None) for name in _EMPTY):
        return True
    return any(i.mutates_data or i.mutates_metadata for i in metadata.input_info)


def _layout(ends: _Ends, metadata: Any, static: frozenset[int]) -> Layout | None:
    """How the halves fit together; None where anything about that is not plain."""
    given, made, wanted, gradients, results = ends
    infos = metadata.output_info
    if len(infos) != results or not all(map(_is_plain, infos)):
        return None
    fits = [_fit(m) for m in metadata.subclass_tangent_meta]
    whole = all(isinstance(n, fx.Node) for n in made) and None not in fits
    if not whole or len(gradients) != len(given) or len(given) != len(metadata.input_info):
        return None
    tangents = [at for at, info in enumerate(infos) if _has_gradient(info)]
    places = _places(given, made[results:], results)
    own = [n for n in wanted if "tangents" not in str(n.target)]
    if len(wanted) - len(own) != len(tangents) or len(fits) != len(tangents):
        return None
    if any(n.name not in places for n in own):
        return None
    return Layout(
        results,
        tuple(at for at, info in enumerate(infos) if not info.requires_grad),
        tuple((at, frozenset(i.dynamic_dims)) for at, i in enumerate(infos) if i.dynamic_dims),
        tuple(at for at, g in enumerate(gradients) if isinstance(g, fx.Node)),
        _values(given, places, static),
        _values(wanted, places, static),
        tuple(tangents),
        tuple(fits),  # type: ignore[arg-type]
        metadata.deterministic is False,
    )


def _places(given: Sequence[fx.Node], saved: Sequence[fx.Node], results: int) -> dict[str, int]:
    """By name, where a value is: among the arguments, or behind them among what the forward gives."""
    places = {n.name: len(given) + results + at for at, n in enumerate(saved)}
    return places | {n.name: at for at, n in enumerate(given)}


def _values(nodes: Sequence[fx.Node], places: dict[str, int], static: frozenset[int]) -> Values:
    """What a half takes; what has no place is a tangent."""
    numbers = [n for n in nodes if n.name in places and not ir.is_tensor(n)]
    tensors = [n for n in nodes if n.name in places and ir.is_tensor(n)]
    parts = (
        numbers,
        [n for n in tensors if places[n.name] not in static],
        [n for n in tensors if places[n.name] in static],
    )
    ranks = {n: at for at, n in enumerate(n for part in parts for n in part)}
    ups = itertools.count(len(ranks))
    order = tuple(ranks[n] if n in ranks else next(ups) for n in nodes)
    numbers_at, passing, lasting = (tuple(places[n.name] for n in part) for part in parts)
    return Values(numbers_at, passing, lasting, order)


def _as_traced(made: Sequence[Any], strides: Sequence[Any] | None) -> bool:
    """Whether Inductor's code gives tensors in the strides that were traced."""
    if strides is None or len(strides) != len(made):
        return False
    return all(
        found is not None and [*map(str, ir.value(n).stride())] == [*map(str, found)]
        for n, found in zip(made, strides, strict=True)
        if ir.is_tensor(n)
    )


def _is_plain(info: Any) -> bool:
    """Whether an output is a tensor of its own."""
    return info.output_type.name in ("non_alias", "unsafe_view_alias") and issubclass(
        info.raw_type, torch.Tensor
    )


def _has_gradient(info: Any) -> bool:
    return bool(getattr(info, "requires_grad_for_backward", info.requires_grad))


def _fit(meta: Any) -> Call | None:
    """What brings a tangent into the strides that were traced; None for one of a subclass."""
    form = getattr(meta, "memory_format", None)
    return fitting(form) if type(meta).__name__ == "PlainTensorMeta" and form else None
