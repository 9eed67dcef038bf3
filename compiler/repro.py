"""Write a test case for each kind of missed site: the sub-graph around it as plain PyTorch.

The sub-graph is grown around the anchor until the compiler refuses it for the same reason as in the
model; so what is written reproduces, with a few rows and the model's own widths.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fusewright.compiler import ir
from fusewright.compiler.legality import needs_gradient
from fusewright.compiler.match import Miss
from fusewright.compiler.pipeline import match_and_rewrite
from fusewright.compiler.records import GraphRecord
from fusewright.compiler.session import Session

aten = torch.ops.aten

_DEPTHS = (2, 4, 8, 16)
_HEAVY = 2**22  # elements of a weight that is taken along only where nothing else reproduces
_ROWS = (2, 3, 5, 7, 4, 6)

_TEMPLATE = '''"""{pattern} leaves this alone.

{reason}

From {where}.
The first test holds what the compiler says today, the second what is wished for: it fails now, and
says so when it no longer does.
"""

import pytest
import torch
from torch import device, inf, nan  # noqa: F401  names that printed constants use

import fusewright


{code}

def inputs():
    generator = torch.Generator().manual_seed(0)
    return (
{inputs}
    )


def test_is_left_alone():
    report = fusewright.examine(region, *inputs())
    reasons = [r.reason for r in report.rows if r.pattern == {pattern!r} and r.status == "missed"]
    assert any(r.startswith({stem!r}) for r in reasons), report


@pytest.mark.xfail(reason={reason!r}, strict=True)
def test_is_rewritten():
    report = fusewright.examine(region, *inputs()).require({pattern}=1)
    assert not [r for r in report.rows if r.pattern == {pattern!r} and r.status == "missed"], report
'''


def emit(session: Session, folder: Path) -> list[Path]:
    """Write one pytest file for each kind of miss of the session's live graphs."""
    written: list[Path] = []
    seen: set[tuple[str, str, str]] = set()
    for record in session.records:
        if not record.modules or record.canonical is None:
            continue
        for miss in record.misses:
            key = (miss.pattern, miss.location, miss.reason)
            if key not in seen:
                seen.add(key)
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / _name(miss, len(seen))
                path.write_text(_source(miss, record, session), encoding="utf-8")
                written.append(path)
    return written


def _name(miss: Miss, number: int) -> str:
    place = miss.location.rpartition("/")[2].replace(".py", "")
    return f"test_{number:02d}_{miss.pattern}_{re.sub(r'[^0-9A-Za-z]+', '_', place)}.py"


def _source(miss: Miss, record: GraphRecord, session: Session) -> str:
    part = _smallest(miss, record, session)
    code = str(part.graph.python_code("self").src).strip()
    code = re.sub(r";  (\w+ = )+None", "", code.replace("def forward(self, ", "def region("))
    place = miss.location.rpartition("site-packages/")[2]
    line = f"  # {place}: the anchor"
    code = re.sub(rf"^(    {re.escape(miss.anchor)} = .*)$", rf"\1{line}", code, flags=re.MULTILINE)
    sizes: dict[Any, int] = {}
    drawn = [_draw(n, sizes) for n in part.graph.find_nodes(op="placeholder")]
    where = f"{place or 'unknown source'}, {miss.module or record.region}"
    return _TEMPLATE.format(
        pattern=miss.pattern,
        reason=f"{miss.step}: {miss.reason}",
        stem=_stem(miss),
        where=where,
        code=code + "\n",
        inputs="\n".join(f"        {d}," for d in drawn),
    )


def _stem(miss: Miss) -> str:
    """The reason up to its first number, name or path, which differ in another graph."""
    return re.split(r"['/]|\b\d", f"{miss.step}: {miss.reason}")[0].rstrip()


def _smallest(miss: Miss, record: GraphRecord, session: Session) -> fx.GraphModule:
    """The smallest sub-graph tried that is refused for the same reason; the whole one at last."""
    for names in _growing(miss, record.canonical.graph):
        part = _extract(record.canonical.graph, names)
        trial = GraphRecord(record.kind, record.region)
        match_and_rewrite(copy.deepcopy(part), session, trial)
        if any(m.pattern == miss.pattern and _stem(m) == _stem(miss) for m in trial.misses):
            return part
    everything = {n.name for n in record.canonical.graph.nodes if ir.is_call(n)}
    return _extract(record.canonical.graph, everything)


def _growing(miss: Miss, graph: fx.Graph) -> Iterator[set[str]]:
    by_name = {n.name: n for n in graph.nodes}
    start = {by_name[n] for n in miss.nodes | {miss.anchor} if n in by_name}
    for heavy in (False, True):
        # First what the site is made of; what becomes of it only where the reason lies there.
        for depth, down in [(d, down) for d in _DEPTHS for down in (False, True)]:
            found, frontier = set(start), set(start)
            for _ in range(depth):
                near = {
                    m for n in frontier for m in (*n.all_input_nodes, *(n.users if down else ()))
                }
                frontier = {n for n in near - found if _plain(n) and (heavy or not _is_heavy(n))}
                found |= frontier
            yield {n.name for n in found}


def _plain(node: fx.Node) -> bool:
    """A call that can be written out: no higher-order operator, no switch of a mode."""
    return ir.is_call(node) and (
        isinstance(node.target, torch._ops.OpOverload) or ir.as_slice(node) is not None
    )


def _is_heavy(node: fx.Node) -> bool:
    return any(
        ir.is_tensor(n) and n.op == "placeholder" and ir.value(n).numel() > _HEAVY
        for n in node.all_input_nodes
        if n.meta.get("parameter")
    )


def _extract(graph: fx.Graph, names: set[str]) -> fx.GraphModule:
    """The calls of these names as a graph of their own; what they read becomes its inputs."""
    nodes: list[fx.Node] = []
    for node in graph.nodes:
        # Where a call's several results are not taken along, its pieces are what is read.
        whole = all(ir.is_tensor(a) or _is_number(a) or a in nodes for a in node.all_input_nodes)
        if node.name in names and whole:
            nodes.append(node)
    leaves = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in set(nodes)))
    out = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    tensors = [n for n in leaves if ir.is_tensor(n)]
    differentiated = needs_gradient(graph)
    for leaf in tensors:
        copies[leaf] = out.placeholder(leaf.name)
        copies[leaf].meta = leaf.meta | {"requires_grad": leaf in differentiated}
    for leaf in leaves:
        if leaf not in copies:
            copies[leaf] = _number(out, leaf, tensors, copies)
    for node in nodes:
        copies[node] = out.node_copy(node, copies.__getitem__)
    results = [n for n in nodes if ir.is_tensor(n) and (not n.users or set(n.users) - set(nodes))]
    out.output(tuple(copies[n] for n in results))
    return fx.GraphModule(torch.nn.Module(), out)


def _is_number(node: fx.Node) -> bool:
    return isinstance(ir.value(node), (int, float, bool, torch.SymInt, torch.SymFloat))


def _number(
    out: fx.Graph, leaf: fx.Node, tensors: list[fx.Node], copies: dict[fx.Node, fx.Node]
) -> fx.Node:
    """A size that the sub-graph reads: off a tensor's shape where it stands in one."""
    val = ir.value(leaf)
    for tensor in tensors if isinstance(val, torch.SymInt) else ():
        for dim, size in enumerate(ir.shape(tensor)):
            if size == val.node.expr:
                made = out.call_function(aten.sym_size.int, (copies[tensor], dim))
                made.meta["val"] = val
                return made
    made = out.placeholder(leaf.name)
    made.meta = dict(leaf.meta)
    return made


def _draw(node: fx.Node, sizes: dict[Any, int]) -> str:
    """The Python that makes one input: a few rows for each symbolic size."""
    val = ir.value(node)
    if not isinstance(val, torch.Tensor):
        return repr(ir.traced(val))
    extent = ", ".join(str(_small(s, sizes)) for s in val.shape)
    if val.dtype.is_floating_point:
        made = f"torch.randn(({extent},), generator=generator).to({val.dtype})".replace("(,)", "()")
        if node.meta.get("parameter"):
            return f"torch.nn.Parameter({made}, {bool(node.meta['requires_grad'])})"
        return made + (".requires_grad_()" if node.meta["requires_grad"] else "")
    fill = "ones" if val.dtype is torch.bool else "zeros"
    return f"torch.{fill}(({extent},), dtype={val.dtype})".replace("(,)", "()")


def _small(size: Any, sizes: dict[Any, int]) -> int:
    """A small number for a symbolic size; sizes that were equal when traced stay equal."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    for symbol in size.node.expr.free_symbols:
        traced = ir.traced_symbol(size, symbol)
        sizes.setdefault(traced, _ROWS[len(sizes) % len(_ROWS)])
    known = {s: sizes[ir.traced_symbol(size, s)] for s in size.node.expr.free_symbols}
    return int(size.node.expr.subs(known))
