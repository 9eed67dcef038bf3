"""Log-probabilities of given classes: p_i = z_{i, y_i} - log sum_j exp(z_ij), over the last dimension.

What preference and reward methods train on: one log-probability a token. Anchor: a gather of one entry a
row, of a log_softmax, or of rows from which their own logsumexp is subtracted. It is the cross-entropy of
each row with the sign changed, which is the op it becomes; the backward is derived in
kernels/cross_entropy.py. Every label counts, as in a gather: none is ignored.

What it saves: a log_softmax writes the log-probabilities of all classes and keeps them; the op reads the
logits, writes one number a row, and keeps the logits and two numbers a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.compiler.prove import Candidate, Rounder
from fusewright.compiler.rewrite import call, item

aten = torch.ops.aten

_GATHERS = (aten.gather.default, aten.take_along_dim.default)
_NONE_IGNORED = -(2**31)  # no label that a gather would take


@dataclass(frozen=True)
class _Site:
    """Rows of logits, the entry that is taken of each, and the calls that it takes."""

    logits: fx.Node
    index: fx.Node
    out: fx.Node
    nodes: frozenset[fx.Node]
    dropped: bool  # whether the gathered dimension of width one is gone
    negated: bool = False  # the logsumexp less the entry: the loss itself


class LogProbabilities:
    """See the module's docstring."""

    name = "log_probabilities"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Gathers from a log_softmax, or from rows whose logsumexp is subtracted."""
        for node in ir.calls(graph):
            if not ir.is_call(node, *_GATHERS) or not ir.is_floating(_gathered(node)[0]):
                continue
            if _is_log_softmax(_gathered(node)[0]) or _difference(node) is not None:
                yield node

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """Claims about the gather at ``anchor``, with the cast of the logits first."""
        source, index = _gathered(anchor)
        rank = len(ir.shape(source))
        if not _along_classes(anchor) or ir.last(index) != 1:
            raise Refused("it does not take one class of each row")
        if len(ir.shape(index)) != rank or not ir.hold_equal(source, index, range(rank - 1)):
            raise Refused("there is not one label for each row")
        if not isinstance(ir.last(source), int):
            raise Refused("the number of classes is not static")
        site = _of_log_softmax(anchor) or _of_difference(anchor)
        if site is None:
            raise Refused("it is not of a log_softmax over the classes, nor less their logsumexp")
        wide = site
        while ir.widens(wide.logits):
            below: Any = ir.argument(wide.logits, 0)
            wide = replace(wide, logits=below, nodes=wide.nodes | {wide.logits})
        for claimed in dict.fromkeys((wide, site)):
            yield _claim(claimed)


def _gathered(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(source, index) of a gather, or of take_along_dim, which has the index before the dimension."""
    along = ir.is_call(node, aten.take_along_dim.default)
    return ir.argument(node, 0), ir.argument(node, 1 if along else 2)


def _along_classes(node: fx.Node) -> bool:
    """Whether a gather is along the last dimension of rows."""
    source, _ = _gathered(node)
    dim = ir.argument(node, 2 if node.target is aten.take_along_dim.default else 1)
    rank = len(ir.shape(source))
    return rank >= 2 and isinstance(dim, int) and dim % rank == rank - 1


def _is_log_softmax(node: Any) -> bool:
    while ir.is_cast(node):
        node = node.args[0]
    return ir.is_call(node, aten.log_softmax.int)


def _log_softmax(picked: fx.Node) -> fx.Node | None:
    """The log_softmax over the last dimension that the gather is of."""
    return log_softmax_of(_gathered(picked)[0])


def log_softmax_of(node: fx.Node) -> fx.Node | None:
    """The rows whose log_softmax the node is, over the last dimension and no narrower than they are."""
    if not ir.is_call(node, aten.log_softmax.int):
        return None
    rows: fx.Node = ir.argument(node, 0)
    last = ir.normal_dim(rows, ir.argument(node, 1)) == len(ir.shape(rows)) - 1
    return rows if last and ir.dtype(node).itemsize >= ir.dtype(rows).itemsize else None


def _dropped(picked: fx.Node) -> fx.Node | None:
    """The gathered entries without their dimension of width one, where that is all that reads them."""
    (user, *more) = picked.users or [None]
    if user is None or more:
        return None
    last = len(ir.shape(picked)) - 1
    squeezed = ir.is_call(user, aten.squeeze.dim) and user.args[1] in (-1, last)
    selected = ir.is_call(user, aten.select.int) and user.args[1] in (-1, last)
    return user if squeezed or (selected and user.args[2] in (0, -1)) else None


def _of_log_softmax(picked: fx.Node) -> _Site | None:
    rows = _log_softmax(picked)
    if rows is None:
        return None
    source, index = _gathered(picked)
    short = _dropped(picked)
    out = picked if short is None else short
    return _Site(rows, index, out, frozenset({source, picked, out}), short is not None)


@dataclass(frozen=True)
class _Difference:
    """Gathered entries less a logsumexp, or the other way round."""

    out: fx.Node
    total: fx.Node
    dropped: bool
    negated: bool


def _difference(picked: fx.Node) -> _Difference | None:
    """The subtraction that the gathered entries and a logsumexp of the same shape go into."""
    short = _dropped(picked)
    for taken in (picked, short):
        for user in () if taken is None else taken.users:
            if not ir.is_call(user, aten.sub.Tensor) or user.kwargs or len(user.args) != 2:
                continue
            other: Any = ir.other_operand(user, taken)  # type: ignore[arg-type]
            if ir.is_call(other, aten.logsumexp.default):
                kept = bool(ir.argument(other, 2, False))
                if kept is (taken is picked):
                    return _Difference(user, other, taken is short, user.args[1] is taken)
    return None


def _of_difference(picked: fx.Node) -> _Site | None:
    found = _difference(picked)
    if found is None:
        return None
    source, index = _gathered(picked)
    summed: Any = found.total.args[0]
    rows = ir.strip_casts(source)
    if rows is not ir.strip_casts(summed) or not ir.last_dim_only(summed, found.total.args[1]):
        return None
    nodes = {picked, found.out, found.total, *(u for u in picked.users if found.dropped)}
    for node in (source, summed):
        while node is not rows:
            nodes.add(node)
            node = node.args[0]
    return _Site(rows, index, found.out, frozenset(nodes), found.dropped, found.negated)


def _claim(site: _Site) -> Candidate:
    classes, out = ir.last(site.logits), site.out

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        taken = torch.log_softmax(t["logits"], -1).gather(-1, t["labels"])
        taken = -taken if site.negated else taken
        return [taken.squeeze(-1) if site.dropped else taken]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        rows = call(graph, aten.reshape.default, (read["logits"], [-1, classes]), out)
        labels = call(graph, aten.reshape.default, (read["labels"], [-1]), out)
        args = (rows, labels, _NONE_IGNORED, "none", 0.0, 0.0, 1.0, 0.0)
        loss = item(graph, call(graph, torch.ops.fusewright.cross_entropy.default, args, out), 0)
        taken = loss if site.negated else call(graph, aten.neg.default, (loss,), out)
        taken = call(graph, aten.reshape_as.default, (taken, read["labels"]), out)
        if site.dropped:
            taken = call(graph, aten.squeeze.dim, (taken, -1), out)
        if ir.dtype(taken) != ir.dtype(out):
            taken = call(graph, aten.to.dtype, (taken, ir.dtype(out)), out)
        return [taken]

    def labels(extent: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randint(0, classes, extent, generator=generator)

    return Candidate(
        nodes=site.nodes,
        inputs={"logits": site.logits, "labels": site.index},
        outputs=(out,),
        formula=formula,
        emit=emit,
        params={"classes": classes},
        cast="output",
        scaled=("logits",),
        draw={"labels": labels},
        kernel="cross_entropy",
    )
