"""Cross-entropy, alone or together with the projection that makes its logits.

    z = scale x W^T + b          z' = softcap tanh(z / softcap)
    loss = sum over rows of [lse(z') - z'_label] / denominator, with label smoothing

Anchor: the library's cross-entropy, or its nll_loss of a log_softmax. Upwards lie casts, views, a logit scale and a softcap, a slice
of the tokens (a shift by hand), and the projection; downwards a division by the number of items.
With the projection the logits are never whole: see kernels/linear_cross_entropy.py. Class weights
are not offered by the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.compiler.prove import Candidate, Rounder
from fusewright.compiler.rewrite import call, item
from fusewright.patterns.log_probabilities import log_softmax_of

aten = torch.ops.aten

_REDUCTIONS = ("none", "mean", "sum")
_LIKELIHOODS = (aten.nll_loss_nd.default, aten.nll_loss.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)


@dataclass(frozen=True)
class _Loss:
    """A cross-entropy call and what surrounds it."""

    logits: fx.Node
    labels: fx.Node
    denominator: fx.Node | None
    out: fx.Node
    nodes: frozenset[fx.Node]
    reduction: str
    ignore_index: int
    smoothing: float
    scale: float = 1.0
    softcap: float = 0.0
    slices: tuple[tuple[Any, ...], ...] = ()


def anchors(graph: fx.Graph) -> Iterator[fx.Node]:
    """The library's cross-entropies, and its losses of log-probabilities."""
    kinds = (aten.cross_entropy_loss.default, *_LIKELIHOODS)
    return (n for n in ir.calls(graph) if ir.is_call(n, *kinds))


class LinearCrossEntropy:
    """Projection and loss in one: the logits are made, used and forgotten chunk by chunk."""

    name = "linear_cross_entropy"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """The library's cross-entropies."""
        return anchors(graph)

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """Claims about the loss at ``anchor``, with the division below it first."""
        for loss in _losses(anchor):
            linear, loss = _climb(loss)
            if linear is None:
                raise Refused("no plain projection makes the logits")
            if loss.reduction == "none":
                raise Refused("the loss is not reduced over the tokens")
            yield _fused(loss, linear)


class CrossEntropy:
    """The loss alone, where its logits are used elsewhere too."""

    name = "cross_entropy"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """The library's cross-entropies."""
        return anchors(graph)

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """Claims about the loss at ``anchor``: with the cast of the logits first."""
        base = list(_losses(anchor))[-1]
        yield _plain(_uncast(base))
        yield _plain(base)


def _losses(anchor: fx.Node) -> Iterator[_Loss]:
    logits, labels, weight = (ir.argument(anchor, i) for i in range(3))
    reduction, ignore_index = ir.argument(anchor, 3, 1), ir.argument(anchor, 4, -100)
    smoothing = ir.argument(anchor, 5, 0.0)
    if weight is not None:
        raise Refused("class weights are not offered by the kernel")
    made, above = len(ir.shape(logits)), frozenset[fx.Node]()
    if ir.is_call(anchor, *_LIKELIHOODS):
        logits, above = _under_log_softmax(logits)
    if made != 2 or ir.dtype(labels).is_floating_point:
        raise Refused("the logits are not rows of classes with one label each")
    loss = _Loss(
        logits, labels, None, anchor, above | {anchor},
        _REDUCTIONS[reduction], ignore_index, smoothing,
    )  # fmt: skip
    users = list(anchor.users)
    if loss.reduction == "sum" and len(users) == 1 and ir.is_call(users[0], aten.div.Tensor):
        divisor = ir.argument(users[0], 1)
        scalar = ir.is_tensor(divisor) and len(ir.shape(divisor)) == 0
        if users[0].args[0] is anchor and scalar:
            yield replace(loss, denominator=divisor, out=users[0], nodes=loss.nodes | {users[0]})
    yield loss


def _under_log_softmax(node: fx.Node) -> tuple[fx.Node, frozenset[fx.Node]]:
    """The logits of log-probabilities, and what lies between; views that keep the classes may."""
    passed = {node}
    while ir.is_call(node, *_RESHAPES) and ir.last(node) == ir.last(ir.argument(node, 0)):
        node = ir.argument(node, 0)
        passed.add(node)
    logits = log_softmax_of(node)
    if logits is None:
        raise Refused("the loss is not of a log_softmax over the classes")
    return logits, frozenset(passed)


def _uncast(loss: _Loss) -> _Loss:
    node, passed = loss.logits, set(loss.nodes)
    while ir.widens(node) or ir.is_call(node, *_RESHAPES):
        if not ir.is_cast(node) and len(ir.shape(ir.argument(node, 0))) != 2:
            # The kernel takes rows: keep the view below the cast, and cast nothing.
            break
        passed.add(node)
        node = node.args[0]  # type: ignore[assignment]
    if len(ir.shape(node)) != 2:
        return loss
    return replace(loss, logits=node, nodes=frozenset(passed))


def _climb(loss: _Loss) -> tuple[fx.Node | None, _Loss]:
    """The projection above the loss, and the loss with everything between the two read off."""
    node, passed = loss.logits, set(loss.nodes)
    factors, softcap = [], 0.0
    slices: list[tuple[Any, ...]] = []
    while _projection(node) is None:
        passed.add(node)
        reshapes = (
            ir.is_call(node, *_RESHAPES) and not slices
        )  # a slice is of the projection's shape
        if ir.widens(node) or reshapes or ir.is_call(node, *ir.IDENTITIES):
            node = node.args[0]  # type: ignore[assignment]
        elif _cuts_tokens(node):
            slices.insert(0, tuple(node.args[1:]))
            node = node.args[0]  # type: ignore[assignment]
        elif ir.is_call(node, aten.mul.Tensor, aten.div.Tensor) and _literal(node) is not None:
            value, node = _literal(node)  # type: ignore[misc]
            factors.append(value)
        elif ir.is_call(node, aten.tanh.default) and not softcap and len(factors) == 1:
            softcap = factors.pop()
            node = node.args[0]  # type: ignore[assignment]
        else:
            return None, loss
    passed.add(node)
    scale = softcap if softcap else 1.0
    for factor in factors:
        scale *= factor
    loss = replace(loss, nodes=frozenset(passed), scale=scale, softcap=softcap)
    return node, replace(loss, slices=tuple(slices))


def _cuts_tokens(node: fx.Node) -> bool:
    """A slice with literal bounds of any dimension but the classes."""
    if not ir.is_call(node, aten.slice.Tensor) or any(
        isinstance(a, fx.Node) for a in node.args[1:]
    ):
        return False
    source: Any = node.args[0]
    return ir.normal_dim(source, ir.argument(node, 1, 0)) != len(ir.shape(source)) - 1


def _projection(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(x, weight, bias) of a linear layer, or of a product with a transposed weight."""
    if ir.is_call(node, aten.linear.default):
        x, weight, bias = (ir.argument(node, i) for i in range(3))
        return x, weight, bias
    if ir.is_call(node, aten.matmul.default):
        x, turned = ir.operands(node)
        if ir.is_call(turned, aten.t.default, aten.numpy_T.default, aten.transpose.int):
            weight = turned.args[0]
            return (x, weight, None) if len(ir.shape(weight)) == 2 else None
    return None


def _literal(node: fx.Node) -> tuple[float, fx.Node] | None:
    """(factor, other operand) of a product or quotient with a number."""
    a, b = ir.operands(node)
    if isinstance(b, (int, float)) and ir.is_tensor(a):
        return (float(b) if node.target is aten.mul.Tensor else 1.0 / float(b)), a
    if isinstance(a, (int, float)) and ir.is_tensor(b) and node.target is aten.mul.Tensor:
        return float(a), b
    return None


def _formula(loss: _Loss, logits: torch.Tensor, t: dict[str, Any]) -> torch.Tensor:
    z = logits * loss.scale
    if loss.softcap:
        z = loss.softcap * torch.tanh(z / loss.softcap)
    out = F.cross_entropy(
        z,
        t["labels"],
        ignore_index=loss.ignore_index,
        reduction=loss.reduction,
        label_smoothing=loss.smoothing,
    )
    return out if t.get("denominator") is None else out / t["denominator"]


def _labels(loss: _Loss, classes: Any) -> Any:
    def draw(extent: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        labels = torch.randint(0, classes, extent, generator=generator)
        labels.view(-1)[-1:] = loss.ignore_index
        return labels

    return draw


def _count(extent: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.full(extent, 5)


def _params(loss: _Loss) -> dict[str, Any]:
    shown = {"reduction": loss.reduction, "ignore_index": loss.ignore_index}
    shown |= {"num_items": True} if loss.denominator is not None else {}
    shown |= {"softcap": loss.softcap} if loss.softcap else {}
    shown |= {"scale": loss.scale} if loss.scale != 1.0 else {}
    return shown | ({"label_smoothing": loss.smoothing} if loss.smoothing else {})


def _as_recorded(graph: fx.Graph, made: fx.Node, out: fx.Node) -> fx.Node:
    if ir.dtype(made) == ir.dtype(out):
        return made
    return call(graph, aten.to.dtype, (made, ir.dtype(out)), out)


def _fused(loss: _Loss, linear: fx.Node) -> Candidate:
    x, weight, bias = _projection(linear)  # type: ignore[misc]
    inputs = {"logits": linear, "labels": loss.labels, "denominator": loss.denominator}
    classes = ir.shape(weight)[0]

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        z = t["logits"]
        for cut in loss.slices:
            z = aten.slice.Tensor(z, *cut)
        return [_formula(loss, z.reshape(-1, z.shape[-1]), t)]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        rows = read["x"]
        for cut in loss.slices:
            rows = call(graph, aten.slice.Tensor, (rows, *cut), linear)
        rows = call(graph, aten.reshape.default, (rows, [-1, ir.last(rows)]), linear)
        args = (
            rows, read["weight"], read["bias"], read["labels"], read["denominator"],
            loss.ignore_index, loss.reduction, loss.smoothing, loss.softcap, loss.scale, 0.0,
        )  # fmt: skip
        target = torch.ops.fusewright.linear_cross_entropy.default
        return [_as_recorded(graph, item(graph, call(graph, target, args, loss.out), 0), loss.out)]

    return Candidate(
        nodes=loss.nodes,
        inputs=inputs,
        reads={"x": x, "weight": weight, "bias": bias},
        outputs=(loss.out,),
        formula=formula,
        emit=emit,
        params=_params(loss),
        cast="output",
        draw={"labels": _labels(loss, classes), "denominator": _count},
        constant=("denominator",),
        kernel="linear_cross_entropy",
    )


def _plain(loss: _Loss) -> Candidate:
    classes = ir.last(loss.logits)

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        return [_formula(loss, t["logits"].reshape(-1, classes), t)]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        rows = read["logits"]
        if len(ir.shape(rows)) != 2:
            rows = call(graph, aten.reshape.default, (rows, [-1, classes]), loss.out)
        args = (
            rows, read["labels"], loss.ignore_index, loss.reduction,
            loss.smoothing, loss.softcap, loss.scale, 0.0,
        )  # fmt: skip
        target = torch.ops.fusewright.cross_entropy.default
        return [_as_recorded(graph, item(graph, call(graph, target, args, loss.out), 0), loss.out)]

    return Candidate(
        nodes=loss.nodes,
        inputs={"logits": loss.logits, "labels": loss.labels},
        outputs=(loss.out,),
        formula=formula,
        emit=emit,
        params=_params(loss),
        cast="output",
        draw={"labels": _labels(loss, classes)},
        kernel="cross_entropy",
    )
