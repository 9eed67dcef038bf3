"""The autograd rules of ops: what a forward keeps, and how a backward's results become gradients.

Most of a small op's time on the host was once spent here, so whatever follows from an op's schema is
worked out when it is registered: a call picks values by position and looks at no name.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fusewright.kernels.spec import OpSpec

Call = Callable[..., Any]
Rule = type[torch.autograd.Function]


class Arguments:
    """The forward's argument names, which of them are tensors, and which autograd must watch."""

    def __init__(self, spec: OpSpec, schema: torch._C.FunctionSchema) -> None:
        arguments = schema.arguments
        if spec.forward_needs:
            arguments = arguments[: len(arguments) - len(spec.differentiable)]
        self.names = tuple(a.name for a in arguments)
        kinds = [str(a.type) for a in arguments]
        self.tensors = tuple(i for i, k in enumerate(kinds) if k in ("Tensor", "Optional[Tensor]"))
        self.lists = any("List[" in k and "Tensor" in k for k in kinds)
        self.results = len(schema.returns)
        self.many = bool(schema.returns) and str(schema.returns[0].type) == "List[Tensor]"
        self.watched = tuple(self.names.index(n) for n in spec.differentiable)


class _Selection(NamedTuple):
    """The backward's middle arguments: positions of tensors and of constants, and their order.

    Positions count the forward's arguments and then its outputs; the order counts the tensors and
    then the constants.
    """

    tensors: Call
    constants: Call
    order: Call


class _Placeholder:
    """Stands for a value while ``save`` is asked what it selects; anything more is refused."""

    def __bool__(self) -> bool:
        raise TypeError("a placeholder has no value")

    def __eq__(self, other: object) -> bool:
        raise TypeError("a placeholder has no value")

    __hash__ = None  # type: ignore[assignment]


def picker(at: Sequence[int]) -> Call:
    """A function that takes the values at these positions, always as a tuple."""
    if len(at) > 1:
        return operator.itemgetter(*at)
    return operator.itemgetter(slice(at[0], at[0] + 1)) if at else lambda values: ()


def _selection(spec: OpSpec, args: Arguments) -> _Selection | None:
    """What ``save`` selects, or None where it computes: then it is called each time."""
    given = [_Placeholder() for _ in args.names]
    outputs = tuple(_Placeholder() for _ in range(args.results))
    place = {id(p): i for i, p in enumerate((*given, *outputs))}
    named: dict[str, Any] = dict(zip(args.names, given, strict=True))
    try:
        at = [place[id(v)] for v in spec.save(named, outputs)]  # type: ignore[arg-type]
    except (AttributeError, KeyError, TypeError):
        return None
    is_tensor = [i >= len(given) or i in args.tensors for i in at]
    tensors = [i for i, t in zip(at, is_tensor, strict=True) if t]
    constants = [i for i, t in zip(at, is_tensor, strict=True) if not t]
    ranks, next_of = [], [len(tensors), 0]
    for t in is_tensor:
        ranks.append(next_of[t])
        next_of[t] += 1
    # next_of[1] counts the tensors from 0, next_of[0] the constants behind them
    return _Selection(picker(tensors), picker(constants), picker(ranks))


def rule_of(spec: OpSpec, forward: Call, backward: Call, args: Arguments) -> Rule:
    """The rule of an op; its ``apply`` takes the op's arguments, see ``flatten`` for lists."""
    selection = None if args.lists or spec.forward_needs else _selection(spec, args)
    if selection is None:
        rule = _general_rule(spec, forward, backward, args)
    else:
        rule = _plain_rule(spec, forward, backward, args, selection)
    rule.__name__ = rule.__qualname__ = f"{spec.name}_rule"
    return rule


def applied(spec: OpSpec, forward: Call, backward: Call, args: Arguments) -> Call:
    """The op's forward with gradients, as a function of the op's arguments."""
    rule = rule_of(spec, forward, backward, args)
    if issubclass(rule, _Plain):
        transforms = torch._C._are_functorch_transforms_active
        parent: Any = super(torch.autograd.Function, rule)
        alone = parent.apply  # what is left of apply where there are no transforms
        whole: Call = rule.apply
        return lambda *values: whole(*values) if transforms() else alone(*values)
    apply: Call = rule.apply
    if not args.many:
        return lambda *values: apply(*((lf := flatten(values))[0], *lf[1]))
    rest = args.results - 1

    def nested(*values: Any) -> Any:
        layout, flat = flatten(values)
        out = apply(layout, *flat)
        cut = len(out) - rest
        return (list(out[:cut]), *out[cut:]) if rest else list(out)

    return nested


class _Plain(torch.autograd.Function):
    """A rule whose ``apply`` takes the op's arguments as they are."""


def _plain_rule(
    spec: OpSpec, forward: Call, backward: Call, args: Arguments, selection: _Selection
) -> Rule:
    """The rule of an op without lists of tensors whose ``save`` only selects."""
    tensors, constants, order = selection
    results_at = spec.gradients or tuple(range(len(spec.differentiable)))
    watched, count, outputs = args.watched, len(args.names), spec.outputs
    dense = not spec.sparse
    needs_of = picker(watched)
    targets = tuple(zip(range(len(watched)), watched, results_at, strict=True))

    class Plain(_Plain):
        @staticmethod
        def forward(ctx: Any, *values: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                out = forward(*values)
            if type(out) is tuple:
                pool = values + out
                ctx.mark_non_differentiable(*out[outputs:])
                ctx._materialize_non_diff_grads = False  # no zeros for the statistics
                ctx.set_materialize_grads(dense)
            else:
                pool = (*values, out)
            ctx.save_for_backward(*tensors(pool))
            ctx.constants = constants(pool)
            ctx.needs = needs_of(ctx.needs_input_grad)
            return out

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            needs = ctx.needs
            middle = order(ctx.saved_tensors + ctx.constants)
            out = backward(*grads[:outputs], *middle, *needs)
            results = out if type(out) is tuple else (out,)
            flat: list[Any] = [None] * count
            for which, to, at in targets:
                if needs[which]:
                    flat[to] = results[at]
            return tuple(flat)

    return Plain


def flatten(values: tuple[Any, ...]) -> tuple[tuple[int, ...], list[Any]]:
    """Lists of tensors laid flat: the layout has their lengths, and -1 for what is no list."""
    layout, flat = [], []
    for value in values:
        if _tensor_list(value):
            layout.append(len(value))
            flat.extend(value)
        else:
            layout.append(-1)
            flat.append(value)
    return tuple(layout), flat


def _tensor_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value)


@functools.lru_cache(maxsize=256)
def _starts(layout: tuple[int, ...]) -> tuple[int, ...]:
    """Where each value begins among the flat ones, and the end."""
    starts = [0]
    for n in layout:
        starts.append(starts[-1] + (n if n >= 0 else 1))
    return tuple(starts)


def _unflatten(layout: tuple[int, ...], flat: Sequence[Any]) -> list[Any]:
    starts = _starts(layout)
    return [
        flat[at] if n < 0 else list(flat[at : at + n])
        for n, at in zip(layout, starts, strict=False)
    ]


def _general_rule(spec: OpSpec, forward: Call, backward: Call, args: Arguments) -> Rule:
    """The rule of any op; it takes the layout of ``flatten`` before its flat values."""
    results_at = spec.gradients or tuple(range(len(spec.differentiable)))

    class General(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, layout: tuple[int, ...], *flat: Any) -> Any:
            values, starts = _unflatten(layout, flat), _starts(layout)
            wanted = ctx.needs_input_grad[1:]
            needs = [any(wanted[starts[i] : starts[i + 1]]) for i in args.watched]
            with torch._C._AutoDispatchBelowAutograd():
                out = forward(*values, *needs) if spec.forward_needs else forward(*values)
            outputs = out if isinstance(out, tuple) else (out,)
            middle = spec.save(dict(zip(args.names, values, strict=True)), outputs)
            ctx.middle, kept = flatten(tuple(middle))
            ctx.save_for_backward(*[v if isinstance(v, torch.Tensor) else None for v in kept])
            ctx.constants = [None if isinstance(v, torch.Tensor) else v for v in kept]
            ctx.needs, ctx.layout = needs, layout
            ctx.mark_non_differentiable(*outputs[spec.outputs :])
            ctx._materialize_non_diff_grads = False  # no zeros for the statistics
            ctx.set_materialize_grads(not spec.sparse)
            ctx.pieces = len(outputs[0]) if args.many else 0
            return (*outputs[0], *outputs[1:]) if args.many else out

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            kept = [
                c if t is None else t for t, c in zip(ctx.saved_tensors, ctx.constants, strict=True)
            ]
            middle = _unflatten(ctx.middle, kept)
            given: Sequence[Any] = grads[: spec.outputs]
            if args.many:
                rest = grads[ctx.pieces :][: spec.outputs - 1]
                given = (list(grads[: ctx.pieces]), *rest)
            out = backward(*given, *middle, *ctx.needs)
            results = out if isinstance(out, tuple) else (out,)
            starts = _starts(ctx.layout)
            flat: list[Any] = [None] * starts[-1]
            for i, need, at in zip(args.watched, ctx.needs, results_at, strict=True):
                if need:
                    grad = results[at]
                    flat[starts[i] : starts[i + 1]] = grad if ctx.layout[i] >= 0 else [grad]
            # Of a list some may want a gradient and some not.
            wanted = ctx.needs_input_grad[1:]
            return (None, *(g if w else None for g, w in zip(flat, wanted, strict=True)))

    return General
