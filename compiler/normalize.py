"""Normalize: retrace a Dynamo graph into the canonical graph, pre-dispatch ATen with provenance.

Spellings of one computation collapse here (``x.pow(2)``, ``torch.square``; ``F.linear``,
``nn.Linear``), sizes stay symbolic, every node keeps the user's source line. What make_fx cannot
carry over (it keeps only the forward of a custom autograd.Function) is emitted whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.traceback import preserve_node_meta
from torch.utils._pytree import tree_leaves, tree_map

from fusewright.compiler import batched, ir
from fusewright.compiler.legality import mutations, storage_root

aten = torch.ops.aten

# torch's other names for one operator, of the same signature; pre-dispatch tracing keeps them apart.
_OTHER_NAMES: dict[Any, Any] = {
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.multiply.Scalar: aten.mul.Scalar,
    aten.divide.Tensor: aten.div.Tensor,
    aten.divide.Scalar: aten.div.Scalar,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.true_divide.Scalar: aten.div.Scalar,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.subtract.Scalar: aten.sub.Scalar,
    aten.negative.default: aten.neg.default,
    aten.absolute.default: aten.abs.default,
    aten.clip.default: aten.clamp.default,
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.swapaxes.default: aten.transpose.int,
    aten.swapdims.default: aten.transpose.int,
    aten.greater.Scalar: aten.gt.Scalar,
    aten.greater.Tensor: aten.gt.Tensor,
    aten.greater_equal.Scalar: aten.ge.Scalar,
    aten.less.Scalar: aten.lt.Scalar,
    aten.less.Tensor: aten.lt.Tensor,
    aten.less_equal.Scalar: aten.le.Scalar,
}

_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast


class NotNormalizable(Exception):
    """The graph has something that the canonical form cannot express; the message says what."""


class _Retrace(fx.Interpreter):
    """Runs the Dynamo graph under make_fx, emitting higher-order operators as single nodes.

    Autocast that the user's code switches is switched for the retrace too, so that the recorded
    dtypes are the true ones; make_fx alone would note the switch and not follow it.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.entered: list[torch.autocast] = []
        self.autocast_device: str | None = None
        try:
            self.mapped = batched.sections(gm.graph)
        except batched.NotMapped as reason:
            raise NotNormalizable(str(reason)) from reason
        self.ahead: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        section = self.mapped.get(node)
        if section is not None:
            values = [self.env[n] for n in section.inputs]
            plain = batched.unmapped(section, values, self.module)
            results = fx.Interpreter(plain).run(*values)
            self.ahead = dict.fromkeys(section.nodes)
            self.ahead.update(zip(section.outputs, results, strict=True))
        return self.ahead[node] if node in self.ahead else super().run_node(node)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is _ENTER_AUTOCAST:
            self.autocast_device = str(args[0])
            self.entered.append(torch.autocast(*args))
            return self.entered[-1].__enter__()
        if target is _EXIT_AUTOCAST:
            return self.entered.pop().__exit__(None, None, None)
        if target in (torch.tensor, torch.as_tensor) and not _reads_tensors(args, kwargs):
            return _emit_constant(target, args, kwargs)
        whole = isinstance(target, HigherOrderOperator) or target is ir.DATA
        whole = whole or type(target).__name__ == "AutogradFunctionApply"
        return (
            _emit_whole(target, args, kwargs)
            if whole
            else super().call_function(target, args, kwargs)
        )


def _reads_tensors(args: Any, kwargs: Any) -> bool:
    return any(
        isinstance(leaf, (torch.Tensor, torch.SymInt)) for leaf in tree_leaves((args, kwargs))
    )


def _emit_constant(target: Any, args: Any, kwargs: Any) -> Any:
    """A tensor made of numbers: its value is an attribute, and the graph makes a copy of its own.

    Traced under the fake mode it would have no value.
    """
    tracer: Any = _tracer(target)
    fake_mode: Any = detect_fake_mode()
    with disable_proxy_modes_tracing(), unset_fake_temporarily():
        made = target(*args, **kwargs).detach()
    name = f"constant_{sum(n.op == 'get_attr' for n in tracer.graph.nodes)}"
    tracer.root.register_buffer(name, made)
    proxy = tracer.create_proxy("get_attr", name, (), {})
    copied = tracer.create_proxy("call_function", aten.clone.default, (proxy,), {})
    with disable_proxy_modes_tracing():
        fake = fake_mode.from_tensor(made, static_shapes=True)
    proxy.node.meta["val"] = fake
    return track_tensor_tree(fake, copied, constant=None, tracer=tracer)


def _tracer(target: Any) -> Any:
    mode = get_proxy_mode()
    if mode is None:
        raise NotNormalizable(f"{target} outside of tracing")
    tracer: Any = mode.tracer
    return tracer


def _emit_whole(target: Any, args: Any, kwargs: Any) -> Any:
    tracer = _tracer(target)
    with disable_proxy_modes_tracing():
        out = target(*args, **kwargs)

    def to_proxy(leaf: Any) -> Any:
        if isinstance(leaf, fx.GraphModule):
            name = f"body_{len(list(tracer.root.children()))}"
            tracer.root.add_module(name, leaf)
            return tracer.create_proxy("get_attr", name, (), {})
        return tracer.unwrap_proxy(leaf)

    proxy = tracer.create_proxy(
        "call_function", target, tree_map(to_proxy, tuple(args)), tree_map(to_proxy, dict(kwargs))
    )
    return track_tensor_tree(out, proxy, constant=None, tracer=tracer)


def normalize(gm: fx.GraphModule) -> fx.GraphModule:
    """The canonical graph of a Dynamo graph, with the same placeholders and outputs.

    Where the graph switches autocast itself, the switches are gone and ``meta["autocast"]`` names
    their device: the casts are then still to be made explicit.

    Raises:
        NotNormalizable: the graph has no fake tensors, or holds what the form cannot express.
    """
    examples = [
        n.meta.get("example_value", n.meta.get("val"))
        for n in gm.graph.nodes
        if n.op == "placeholder"
    ]
    mode = next((e.fake_mode for e in examples if hasattr(e, "fake_mode")), None)
    if mode is None:
        raise NotNormalizable("the region reads no tensor")
    # Dynamo's own tracing context must stay as it is: its guards are built from it afterwards.
    retrace = _Retrace(gm)
    try:
        with torch._guards.tracing(None), preserve_node_meta(), mode:
            canonical = make_fx(retrace.run, pre_dispatch=True, tracing_mode="real")(*examples)
    finally:
        for left in reversed(retrace.entered):
            left.__exit__(None, None, None)
    _settle_constants(canonical)
    canonical.meta["autocast"] = retrace.autocast_device
    for node in reversed(canonical.graph.nodes):
        if node.target in (_ENTER_AUTOCAST, _EXIT_AUTOCAST):
            canonical.graph.erase_node(node)
    # What AOTAutograd reads off Dynamo's graphs: where inputs come from, and which keep their address.
    if not list(canonical.parameters()) + list(canonical.buffers()):
        canonical.meta |= {key: value for key, value in gm.meta.items() if "dynamo" in key}
        vars(canonical)["_param_name_to_source"] = getattr(gm, "_param_name_to_source", {})
    # The fake tensors that make_fx records are detached and no longer say whether they are parameters.
    given = gm.graph.find_nodes(op="placeholder")
    for node, example, of in zip(
        canonical.graph.find_nodes(op="placeholder"), examples, given, strict=True
    ):
        if hasattr(of, "_dynamo_source"):
            node._dynamo_source = of._dynamo_source
        if "tensor_dict" in of.meta:
            node.meta["tensor_dict"] = of.meta["tensor_dict"]
        node.meta["requires_grad"] = bool(getattr(example, "requires_grad", False))
        node.meta["parameter"] = isinstance(example, torch.nn.Parameter)
        node.meta["lasting"] = _is_of_module(of)
    simplify(canonical.graph)
    drop_dead(canonical.graph)
    canonical.recompile()
    return canonical


def _is_of_module(given: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is found from the region's module, and lives as long."""
    source: Any = getattr(given.meta.get("grapharg"), "source", None)
    while getattr(source, "base", None) is not None:
        source = source.base
    return bool(getattr(source, "local_name", "") == "self")


def _settle_constants(canonical: fx.GraphModule) -> None:
    """Tensors that the code makes of numbers were traced as fake ones: put their values back."""
    for node in canonical.graph.find_nodes(op="get_attr"):
        made = getattr(canonical, node.target, None)
        if isinstance(made, FakeTensor):
            if made.constant is None:
                raise NotNormalizable(
                    "it reads a tensor that is neither an input nor computed from one"
                )
            setattr(canonical, node.target, made.constant)


def simplify(graph: fx.Graph) -> None:
    """Drop what changes nothing, and make equal casts and equal views of one value one node."""
    for node in ir.calls(graph):
        node.target = _OTHER_NAMES.get(node.target, node.target)
    _drop_identities(graph)
    written = {root for _, root in mutations(graph)}
    _merge_views(graph, written)
    made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in list(ir.calls(graph)):
        if not ir.is_cast(node) or not _plain_cast(node):
            continue
        source: Any = node.args[0]
        if storage_root(source) in written or storage_root(node) in written:
            continue
        # To a wider dtype and back is no change; a cast may then start from the value itself.
        while ir.widens(source) and _plain_cast(source):
            source = source.args[0]
        target = source if ir.dtype(source) == ir.dtype(node) else None
        target = target or made.setdefault((node.args[0], ir.dtype(node)), node)  # type: ignore[arg-type]
        if target is not node:
            node.replace_all_uses_with(target)
            graph.erase_node(node)


def _merge_views(graph: fx.Graph, written: set[fx.Node]) -> None:
    """One node for each view that the code takes several times of a value that is not written."""
    made: dict[Any, fx.Node] = {}
    for node in list(ir.calls(graph)):
        views = ir.is_call(node, *ir.VIEWS, aten.slice.Tensor, aten.select.int)
        if not views or node.target is aten.reshape.default or node.kwargs:
            continue
        if storage_root(node) in written:
            continue
        key = (node.target, *(tuple(a) if isinstance(a, list) else a for a in node.args))
        known = made.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)


def _plain_cast(node: fx.Node) -> bool:
    return node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs


def drop_dead(graph: fx.Graph) -> None:
    """Remove calls whose results nobody uses and that change nothing.

    fx's own elimination goes on into the bodies of higher-order operators, which are not canonical:
    an in-place method there counts as pure and would be lost. A random draw stays, since it moves
    the generator.
    """
    for node in reversed(graph.nodes):
        pure = node.op == "get_attr" or (node.op == "call_function" and not node.is_impure())
        if pure and not node.users:
            graph.erase_node(node)


def _drop_identities(graph: fx.Graph) -> None:
    """Remove aliases, casts to the same dtype and slices of everything, as the metadata proves."""
    for node in list(ir.calls(graph)):
        source = ir.argument(node, 0)
        if not ir.is_tensor(source):
            continue
        same = node.target in ir.CASTS and _same_tensor(node, source)
        same = same or node.target is aten.alias.default
        if same or _slices_all(node):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _same_tensor(node: fx.Node, source: fx.Node) -> bool:
    a, b = ir.value(node), ir.value(source)
    target: Any = node.target
    copies = bool(node.kwargs.get("copy")) or target is aten._to_copy.default
    copies = copies or node.kwargs.get("memory_format") not in (None, torch.preserve_format)
    tail = {aten.to.dtype: 2, aten.to.other: 2, aten.to.device: 3}.get(target, len(node.args))
    copies = copies or any(bool(v) for v in node.args[tail:])
    return not copies and a.dtype == b.dtype and a.device == b.device


def _slices_all(node: fx.Node) -> bool:
    if not ir.is_call(node, aten.slice.Tensor):
        return False
    start, stop, step = (
        ir.argument(node, i, default) for i, default in ((2, 0), (3, None), (4, 1))
    )
    unbounded = stop is None or (isinstance(stop, int) and stop >= 2**63 - 1)
    return bool(start in (0, None) and unbounded and step == 1)
