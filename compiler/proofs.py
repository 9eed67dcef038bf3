"""Proofs that were given before: a candidate that is the same claim about the same region is not proven twice.

A proof draws its inputs from fixed seeds, so that it is a function of the region (its calls, their
constants, the shapes and dtypes of all values) and of the formula (its code and what it closes over).
``key`` writes all of that down; where something cannot be written down, there is no key and no memory.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fusewright.compiler import ir

if TYPE_CHECKING:
    from fusewright.compiler.prove import Candidate, Proof

_MOST = 1024
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type, torch.dtype,
          torch.device, torch.layout, torch.memory_format)  # fmt: skip
_given: dict[Any, Proof] = {}


class _Unknown(Exception):
    """Something that cannot be written down."""


def recall(key: Any) -> Proof | None:
    """The proof of an earlier candidate with this key."""
    return _given.get(key)


def remember(key: Any, proof: Proof) -> None:
    """Keep a proof; of too many the oldest goes."""
    if len(_given) >= _MOST:
        del _given[next(iter(_given))]
    _given[key] = proof


def key(candidate: Candidate) -> Any:
    """Everything that the proof depends on; None where it cannot be told."""
    order = list(next(iter(candidate.nodes)).graph.nodes) if candidate.nodes else []
    leaves = set(candidate.inputs.values())  # what makes them is not evaluated
    region = [n for n in order if n in candidate.nodes and n not in leaves]
    places: dict[fx.Node, Any] = {n: ("call", i) for i, n in enumerate(region)}
    for role, node in candidate.inputs.items():
        if node is not None:
            places[node] = ("input", role)
    write = _Writer(places)
    try:
        values = [(r, None if n is None else write.value(n)) for r, n in candidate.inputs.items()]
        calls = [(write(n.target), write(n.args), write(n.kwargs), write.value(n)) for n in region]
        shared = [(r, places.get(n)) for r, n in candidate.inputs.items() if n is not None]
        claim = (write(candidate.formula), write(candidate.draw), candidate.scaled)
        outputs = [places[n] for n in candidate.outputs]
        found = (values, calls, shared, outputs, claim, candidate.constant)
        hash(found := _frozen(found))
    except (_Unknown, KeyError, TypeError):
        return None
    return found


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


class _Writer:
    """Writes values down by what they are, and the region's nodes by their places."""

    def __init__(self, places: Mapping[fx.Node, Any]) -> None:
        self.places = places
        self.open: list[int] = []

    def value(self, node: fx.Node) -> Any:
        """Shape and dtype of a node's value, sizes by their numbers and by which symbols they are."""
        return self._meta(ir.value(node))

    def _meta(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (
                tuple(map(self._size, value.shape)), tuple(map(self._size, value.stride())),
                value.dtype, value.device, bool(value.requires_grad),
            )  # fmt: skip
        if isinstance(value, (tuple, list)):
            return tuple(map(self._meta, value))
        if isinstance(value, (torch.SymInt, int)):
            return self._size(value)
        return self(value)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        symbols = size.node.expr.free_symbols
        hints = sorted(ir.traced_symbol(size, s) for s in symbols)
        return "symbolic", ir.traced(size), tuple(hints)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value in self.places:
                return "node", self.places[value]
            if value.op == "placeholder" and not ir.is_tensor(value):
                return "number", self.value(value)
            raise _Unknown(value)
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return str(value)
        if id(value) in self.open:
            return "again", self.open.index(id(value))
        self.open.append(id(value))
        try:
            return self._within(value)
        finally:
            self.open.pop()

    def _within(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value), tuple(map(self, value))
        if isinstance(value, Mapping):
            return "map", tuple((self(k), self(v)) for k, v in value.items())
        if isinstance(value, (set, frozenset)):
            return "set", frozenset(map(self, value))
        if isinstance(value, functools.partial):
            return "partial", self(value.func), self(value.args), self(value.keywords)
        if isinstance(value, types.MethodType):
            return "method", self(value.__func__), self(value.__self__)
        if isinstance(value, types.FunctionType):
            cells = tuple(self(c.cell_contents) for c in value.__closure__ or ())
            named = (value.__module__, value.__qualname__)
            defaults = (self(value.__defaults__), self(value.__kwdefaults__))
            return named, value.__code__, cells, defaults, self._called(value)
        if isinstance(value, types.BuiltinFunctionType):
            return "builtin", getattr(value, "__module__", ""), value.__qualname__
        if dataclasses.is_dataclass(value):
            fields = tuple(self(getattr(value, f.name)) for f in dataclasses.fields(value))
            return type(value), fields
        raise _Unknown(value)

    def _called(self, function: types.FunctionType) -> Any:
        """The functions that one of ours names: who replaces one of them makes another claim."""
        if not (function.__module__ or "").startswith("fusewright."):
            return ()
        found = ((n, function.__globals__.get(n)) for n in sorted(_names(function.__code__)))
        return tuple((n, self(f)) for n, f in found if isinstance(f, types.FunctionType))


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*inner)
