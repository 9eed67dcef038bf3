"""The autograd rules and the way past the dispatcher: what is picked, and who still gets to see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.kernels import catalogue
from fusewright.runtime import rule
from fusewright.runtime.op import register_all
from fusewright.runtime.shortcut import shortcut

register_all()
OPS = torch.ops.fusewright
PLAIN = (-100, "mean", 0.0, 0.0, 1.0, 0.0)


def arguments(spec: Any) -> rule.Arguments:
    name = spec.name + ("_forward" if spec.forward_needs else "")
    return rule.Arguments(spec, getattr(OPS, name).default._schema)


@pytest.mark.parametrize("spec", [s for s in catalogue() if s.backward], ids=lambda s: s.name)
def test_a_selection_is_what_save_returns(spec: Any) -> None:
    args = arguments(spec)
    selection = rule._selection(spec, args)
    if selection is None:
        return
    values = [f"argument {n}" for n in args.names]
    outputs = tuple(f"output {i}" for i in range(args.results))
    pool = (*values, *outputs)
    expected = tuple(spec.save(dict(zip(args.names, values, strict=True)), outputs))
    assert selection.order(selection.tensors(pool) + selection.constants(pool)) == expected


def test_most_ops_need_no_call_of_save() -> None:
    plain = {
        s.name for s in catalogue() if s.backward and rule._selection(s, arguments(s)) is not None
    }
    assert plain >= {"glu", "glu_packed", "activation", "cross_entropy", "rms_norm", "layer_norm"}


def test_gradients_of_some_inputs_and_statistics_without() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    y, rstd = OPS.rms_norm(x, weight, 1e-6, 0.0, "output", torch.float32)
    assert y.requires_grad and not rstd.requires_grad
    (dweight,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(dweight, (x * rstd[..., None]).sum(0))


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nobody_used_has_no_gradient(used: int) -> None:
    x, e, w = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8), torch.randn(8)
    out = OPS.add_rms_norm(x, e, w, 1e-6, 0.0, "output", torch.float32)[used]
    with _Seen() as seen:
        (dx,) = torch.autograd.grad(out, x, torch.ones(3, 8))
    given = seen.arguments["fusewright.add_rms_norm_backward.default"]
    assert given[1 - used] is None and given[used] is not None
    if used == 1:
        assert torch.equal(dx, torch.ones(3, 8))
    else:
        assert not [n for n in seen.names if "zeros" in n], seen.names


def test_no_zeros_are_made_for_statistics() -> None:
    logits = torch.randn(3, 8, requires_grad=True)
    loss = OPS.cross_entropy(logits, torch.tensor([0, 1, 2]), *PLAIN)[0]
    one = torch.ones(())
    with _Seen() as seen:
        torch.autograd.grad(loss, logits, one)
    assert not [n for n in seen.names if "zeros" in n and "like" not in n], seen.names


def test_lists_are_laid_flat_and_back() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    layout, flat = rule.flatten((a, [a, b], 3, [], [1.0, 2.0]))
    assert layout == (-1, 2, -1, -1, -1) and flat == [a, a, b, 3, [], [1.0, 2.0]]
    assert rule._unflatten(layout, flat) == [a, [a, b], 3, [], [1.0, 2.0]]


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.arguments: dict[str, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        self.arguments[str(func)] = args
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


def test_the_shortcut_is_taken_by_plain_tensors_only() -> None:
    operator = OPS.glu.default
    taken = []

    def kernel(*values: Any) -> str:
        taken.append(values)
        return "kernel"

    call = shortcut(operator, kernel, "cpu")
    gate, up = torch.randn(2, 4), torch.nn.Parameter(torch.randn(2, 4))
    rest = ("silu", torch.float32)
    with torch.no_grad():
        expected = operator(gate, up, *rest)
        assert call(gate, up, *rest) == "kernel" and len(taken) == 1
        assert torch.equal(call(gate.as_subclass(_Subclass), up, *rest), expected)
        with _Seen() as seen:
            assert torch.equal(call(gate, up, *rest), expected)
        assert "fusewright.glu.default" in seen.names
        negated = torch.complex(gate, -gate).conj().imag
        assert negated.is_neg()
        assert torch.equal(call(negated, up, *rest), expected)
        assert call(gate.to("meta"), up.to("meta"), *rest).device.type == "meta"
        assert torch.equal(torch.func.functionalize(call)(gate, up, *rest), expected)
    assert len(taken) == 1
    assert shortcut(operator, kernel)(gate, gate, *rest) is not None and len(taken) == 1


def test_operators_with_lists_are_dispatched() -> None:
    operator = OPS.lora_group.default
    assert shortcut(operator, lambda *_: None) is operator


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_traced_forward_and_backward(backend: str) -> None:
    """Fake tensors and symbolic sizes go through the rules."""
    torch._dynamo.reset()

    def f(logits: torch.Tensor, gate: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        z = OPS.glu(logits, gate, "silu", torch.float32)
        return OPS.cross_entropy(z, labels, *PLAIN)[0]

    compiled = torch.compile(f, backend=backend, dynamic=True, fullgraph=True)
    for rows in (3, 5):
        leaves = [torch.randn(rows, 7, requires_grad=True) for _ in range(2)]
        labels = torch.arange(rows)
        ours, expected = (g(*leaves, labels) for g in (compiled, f))
        torch.testing.assert_close(ours, expected)
        for a, b in zip(*(torch.autograd.grad(t, leaves) for t in (ours, expected)), strict=True):
            torch.testing.assert_close(a, b)
