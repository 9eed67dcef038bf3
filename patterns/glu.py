"""Gated linear units: y = f(gate) up, with f one of the activations in kernels/activations.py.

Anchor: a product of two tensors of one shape of which one operand is a nonlinear function of a
single tensor. Which f it is, is found by the proof, so a hand-written spelling counts as well as
the library's. Where gate and up are the two halves of one tensor the packed op is used: its
backward writes both gradients into one buffer. The backward is derived in kernels/glu.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.match import Refused
from fusewright.compiler.prove import Candidate, Rounder
from fusewright.compiler.rewrite import call

aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_NONLINEAR = {
    aten.silu.default: ("silu",),
    aten.gelu.default: ("gelu", "gelu_tanh"),
    aten.relu.default: ("relu", "relu2"),
    aten.sigmoid.default: ("sigmoid", "silu"),
    aten.tanh.default: ("tanh", "gelu_tanh"),
    aten.erf.default: ("gelu",),
    aten.clamp.default: ("relu", "relu2"),
    aten.clamp_min.default: ("relu", "relu2"),
}
_LINEAR_STEPS = (
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.pow.Tensor_Scalar,
    aten.square.default,
    aten.div.Tensor,
)


class GLU:
    """See the module's docstring."""

    name = "glu"

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """Products of two different tensors of one shape with a nonlinearity on one side."""
        for node in ir.calls(graph):
            if not ir.is_call(node, aten.mul.Tensor) or not ir.is_floating(node):
                continue
            sides = ir.operands(node)
            alike = all(ir.is_floating(s) and ir.shape(s) == ir.shape(node) for s in sides)
            if alike and any(_gates(node, s) for s in dict.fromkeys(sides)):
                yield node

    def candidates(self, anchor: fx.Node) -> Iterator[Candidate]:
        """Claims about the product: either side may be the gate."""
        results = [u for u in anchor.users if ir.is_cast(u)] if len(anchor.users) == 1 else []
        for side in ir.operands(anchor):
            up = ir.other_operand(anchor, side)
            for gate, inside, names in _gates(anchor, side):
                for out in (*results, anchor):
                    yield from _claims(anchor, out, gate, up, inside, names)
        if len(ir.shape(anchor)) < 2:
            raise Refused("a product of vectors, not of rows")


def _gates(product: fx.Node, side: fx.Node) -> list[tuple[fx.Node, frozenset[fx.Node], Any]]:
    """(gate, calls between gate and side, possible activations) for a nonlinear ``side``."""
    other = ir.other_operand(product, side)
    found = []
    inside: set[fx.Node] = set()
    stack, activation = [side], None
    while stack:
        node = stack.pop()
        if node in inside:
            continue
        if _activates(node):
            inside.add(node)
            activation = activation or node
            continue
        if ir.is_cast(node) or ir.is_call(node, *_LINEAR_STEPS):
            inside.add(node)
            stack += [a for a in node.all_input_nodes if a is not side]
        elif activation is None and not stack:
            return []
    if activation is None:
        return []
    gate = ir.strip_casts(activation.all_input_nodes[0])
    names = _NONLINEAR[activation.target]  # type: ignore[index]
    for root in dict.fromkeys((_spelled_root(activation), gate, activation.all_input_nodes[0])):
        if root is None or ir.shape(root) != ir.shape(product):
            continue
        nodes = _closure(side, root)
        if nodes is not None and ir.strip_casts(other) is not root:
            found.append((root, nodes, names))
    return found


def _activates(node: fx.Node) -> bool:
    """Whether the node is a nonlinearity that some activation starts with.

    A clamp is one at zero only: the proof's draws could miss where another one sets in.
    """
    if ir.is_call(node, aten.clamp.default, aten.clamp_min.default):
        return ir.argument(node, 1) == 0 and ir.argument(node, 2) is None
    return ir.is_call(node) and node.target in _NONLINEAR


def _spelled_root(activation: fx.Node) -> fx.Node | None:
    """The tensor that an activation written out by hand is a function of."""
    node = activation.all_input_nodes[0]
    while ir.is_cast(node) or ir.is_call(node, *_LINEAR_STEPS):
        tensors = [a for a in node.all_input_nodes if ir.is_tensor(a)]
        if not tensors:
            return None
        node = tensors[0]
    return node


def _closure(side: fx.Node, gate: fx.Node) -> frozenset[fx.Node] | None:
    """The calls that compute ``side`` from ``gate`` alone; None if something else is read."""
    inside: set[fx.Node] = set()
    stack = [side]
    while stack:
        node = stack.pop()
        if node is gate or node in inside:
            continue
        steps = ir.is_call(node, *_LINEAR_STEPS) or _activates(node) or ir.is_cast(node)
        if not steps or len(inside) > 24:
            return None
        inside.add(node)
        stack += node.all_input_nodes
    return frozenset(inside)


def _claims(
    product: fx.Node,
    out: fx.Node,
    gate: fx.Node,
    up: fx.Node,
    inside: frozenset[fx.Node],
    names: tuple[str, ...],
) -> Iterator[Candidate]:
    casts: set[fx.Node] = set()
    while ir.widens(up) and ir.dtype(up) != ir.dtype(gate):
        casts.add(up)
        up = up.args[0]  # type: ignore[assignment]
    if ir.dtype(up) != ir.dtype(gate):  # the kernel takes one dtype; a wider root may follow
        return
    nodes = inside | casts | {product, out}
    packed = _packed(gate, up)
    for name in names:
        if packed is not None:
            yield _candidate(packed[0], None, packed[1], out, nodes, gate, up, name)
        yield _candidate(gate, up, True, out, nodes, gate, up, name)


def _packed(gate: fx.Node, up: fx.Node) -> tuple[fx.Node, bool] | None:
    """(the tensor whose halves they are, whether the gate comes first)."""
    a, b = ir.as_slice(gate), ir.as_slice(up)
    if a is None or b is None or a[0] is not b[0] or a[1] != b[1] or a[4] != 1 or b[4] != 1:
        return None
    source, dim = a[0], a[1]
    width = ir.shape(source)[dim]
    if dim != len(ir.shape(source)) - 1 or not isinstance(width, int) or width % 2:
        return None
    halves = {(0, width // 2), (width // 2, width)}
    if {(a[2], a[3]), (b[2], b[3])} != halves:
        return None
    return source, a[2] == 0


def _candidate(
    source: fx.Node,
    other: fx.Node | None,
    gate_first: bool,
    out: fx.Node,
    nodes: frozenset[fx.Node],
    gate: fx.Node,
    up: fx.Node,
    name: str,
) -> Candidate:
    activation, out_dtype = ACTIVATIONS[name], ir.dtype(out)
    params = {"activation": name, "packed": other is None}
    if other is None:
        pieces = {p for p in (gate, up, *gate.all_input_nodes, *up.all_input_nodes)}
        nodes = nodes | {p for p in pieces if p is not source and ir.is_call(p)}

        def packed_formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
            low, high = t["gate_up"].chunk(2, dim=-1)
            g, u = (low, high) if gate_first else (high, low)
            return [activation(g) * u]

        def packed_emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
            args = (read["gate_up"], name, gate_first, False, out_dtype)
            return [call(graph, torch.ops.fusewright.glu_packed.default, args, out)]

        return Candidate(
            nodes, {"gate_up": source}, (out,), packed_formula, packed_emit, params,
            cast="output", scaled=("gate_up",), kernel="glu_packed",
        )  # fmt: skip

    def formula(t: dict[str, Any], rounder: Rounder) -> list[torch.Tensor]:
        return [activation(t["gate"]) * t["up"]]

    def emit(graph: fx.Graph, read: Mapping[str, Any]) -> list[fx.Node]:
        args = (read["gate"], read["up"], name, out_dtype)
        return [call(graph, torch.ops.fusewright.glu.default, args, out)]

    return Candidate(
        nodes, {"gate": source, "up": other}, (out,), formula, emit, params,
        cast="output", scaled=("gate", "up"), kernel="glu",
    )  # fmt: skip
