"""Plans give what the host functions give, and whoever wants to see an op still does.

The kernels run in Triton's interpreter, see ``repeated``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from repeated import interpreted_launches
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.kernels import catalogue
from fusewright.runtime import op

NAME = "fusewright_planned"
F32 = torch.float32
CALLS: Counter[str] = Counter()  # of host functions, by op
LOSS = (-100, "mean", 0.1, 0.0, 1.0, 0.0)
NORM = (1e-6, 0.0, "output", F32)


def _counted(name: str, function: Any) -> Any:
    def call(*values: Any) -> Any:
        CALLS[name] += 1
        return function(*values)

    return call


@pytest.fixture(scope="module")
def ops() -> Any:
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled in this process")
    kept, op._NAMESPACE = op._NAMESPACE, NAME
    library = torch.library.Library(NAME, "DEF")
    for spec in catalogue():
        if spec.triton is not None and "[]" not in spec.forward:
            forward, backward = spec.triton
            pair = _counted(spec.name, forward), _counted(spec.name + "_backward", backward)
            op.register(dataclasses.replace(spec, triton=pair), library, "cpu")
    op._NAMESPACE = kept
    with interpreted_launches():
        yield getattr(torch.ops, NAME)
    library._destroy()


def _new(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _heads(heads: int) -> torch.Tensor:
    return _new(2, 3, heads, 16).transpose(1, 2)


CASES: dict[str, Any] = {
    "rms_norm": lambda: (_new(2, 3, 16), _new(16), *NORM),
    "add_rms_norm": lambda: (_new(2, 3, 16), _new(2, 3, 16), _new(16), *NORM),
    "layer_norm": lambda: (_new(2, 3, 16), _new(16), _new(16), *NORM),
    "rope": lambda: (_heads(4), _heads(2), _new(1, 1, 3, 16), _new(1, 1, 3, 16), "half", 16, F32),
    "qk_norm_rope": lambda: (
        *(_heads(4), _heads(2), _new(16), _new(16), *NORM),
        *(_new(1, 1, 3, 16), _new(1, 1, 3, 16), "half", 16, F32),
    ),
    "gated_rms_norm": lambda: (
        *(_new(2, 3, 16), _new(2, 3, 16), _new(16), *NORM[:3], "after", "silu", 16, F32),
    ),
    "glu": lambda: (_new(2, 3, 16), _new(2, 3, 16), "silu", F32),
    "glu_packed": lambda: (_new(2, 3, 16), "silu", True, False, F32),
    "activation": lambda: (_new(2, 3, 16), "gelu", F32),
    "cross_entropy": lambda: (_new(4, 16), torch.tensor([1, -100, 3, 15]), *LOSS),
}


def _step(function: Any, spec: Any, values: tuple[Any, ...]) -> list[torch.Tensor]:
    """The outputs and the gradients of the differentiable inputs."""
    names = [a.split(" ")[-1].strip() for a in spec.forward.split("(")[1].split(")")[0].split(",")]
    values = tuple(
        v.detach().requires_grad_(n in spec.differentiable) if isinstance(v, torch.Tensor) else v
        for n, v in zip(names, values, strict=True)
    )
    out = function(*values)
    outputs = out if isinstance(out, tuple) else (out,)
    ups = [torch.linspace(-1, 2, o.numel()).reshape(o.shape) for o in outputs[: spec.outputs]]
    leaves = [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]
    grads = torch.autograd.grad(outputs[: spec.outputs], leaves, ups)
    assert not any(o.requires_grad for o in outputs[spec.outputs :])
    return [*(o.detach() for o in outputs), *grads]


@pytest.mark.parametrize("name", CASES)
def test_a_plan_repeats_the_host_function(ops: Any, name: str) -> None:
    """Five calls on new numbers; from the third on the host functions are not called."""
    spec = next(s for s in catalogue() if s.name == name)
    rule = torch.ops.fusewright
    op.register_all()
    for count in (1, 2, 2, 2, 2):
        values = CASES[name]()
        ours = _step(getattr(ops, name), spec, values)
        eager = _step(getattr(rule, name), spec, values)
        del ours[spec.outputs : -len(spec.differentiable)]  # what kernels save is their own affair
        del eager[spec.outputs : -len(spec.differentiable)]
        for a, b in zip(ours, eager, strict=True):
            assert a.stride() == b.stride() and a.dtype == b.dtype
            torch.testing.assert_close(a, b)
        assert CALLS[name] == CALLS[name + "_backward"] == count, "the plan was not taken"


def test_what_writes_into_its_argument_and_gives_nothing(ops: Any) -> None:
    op.register_all()
    for count in (1, 2, 2, 2, 2):
        whole = _new(2, 3, 128)
        args = (_new(1, 1, 3, 16), _new(1, 1, 3, 16), "half", 16, 0, 4, 64, 2, 16)
        wanted = torch.ops.fusewright.rope_over(whole, *args)
        assert ops.rope_over_(whole, *args) is None
        torch.testing.assert_close(whole, wanted)
        assert CALLS["rope_over_"] == count, "the plan was not taken"


def test_other_pointers_and_shapes_take_the_host_function(ops: Any) -> None:
    call, rest = ops.activation, ("tanh", F32)
    for _ in range(3):
        call(_new(2, 8), *rest)
    before = CALLS["activation"]
    shifted = _new(17)[1:].reshape(2, 8)
    assert shifted.data_ptr() % 16
    for x, host in ((_new(2, 8), 0), (shifted, 1), (_new(8, 2).t(), 1), (_new(2, 8), 0)):
        torch.testing.assert_close(call(x, *rest), x.tanh())
        before += host
        assert CALLS["activation"] == before


def test_many_signatures_in_turn(ops: Any) -> None:
    """More of them than are asked first: shapes, strides, an absent weight, gradients, constants."""
    cases = [(n, w, grad) for n in (8, 16, 24) for w in (False, True) for grad in (False, True)]
    for turn in range(5):
        for width, weighted, grad in cases:
            for eps in (1e-6, 0.5):
                x = _new(2, 5, width + 4)[..., :width] if width == 24 else _new(2, 5, width)
                x.requires_grad_(grad)
                w = _new(width) if weighted else None
                before = CALLS["rms_norm"]
                y = ops.rms_norm(x, w, eps, 0.0, "output", F32)[0]
                assert y.requires_grad == grad
                # two calls of each signature, of which requires_grad is none, teach it
                assert CALLS["rms_norm"] - before == (turn == 0)
                expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
                torch.testing.assert_close(y, expected if w is None else expected * w)


def test_strided_rows_are_copied_by_the_plan_too(ops: Any) -> None:
    for _ in range(4):
        x = _new(4, 3, 8).permute(1, 0, 2)[:, ::2]
        x = x.expand(3, 2, 8)[..., ::2]
        torch.testing.assert_close(ops.glu(x, 2 * x, "relu", F32), x.relu() * 2 * x)
    before = CALLS["glu"]
    torch.testing.assert_close(ops.glu(x, 2 * x, "relu", F32), x.relu() * 2 * x)
    assert CALLS["glu"] == before


def test_one_tensor_twice(ops: Any) -> None:
    """A call with one tensor for two arguments teaches nothing about calls with two."""
    rest = ("identity", F32)
    for _ in range(3):
        x = _new(5, 8).requires_grad_()
        y = ops.glu(x, x, *rest)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * x)
    for same in (False, False, True, False):
        a = _new(5, 8).requires_grad_()
        b = a if same else _new(5, 8).requires_grad_()
        y = ops.glu(a, b, *rest)
        torch.testing.assert_close(y, a * b)
        (da,) = torch.autograd.grad(y.sum(), a)
        torch.testing.assert_close(da, (2 * a if same else b))


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


def test_whoever_wants_to_see_does(ops: Any) -> None:
    x, rest = _new(3, 8), ("silu", F32)
    expected = [ops.activation(x, *rest) for _ in range(3)][-1]
    with _Seen() as seen:
        assert torch.equal(ops.activation(x, *rest), expected)
    assert f"{NAME}.activation.default" in seen.names
    assert type(ops.activation(x.as_subclass(_Subclass), *rest)) is _Subclass
    with torch.profiler.profile() as record:
        ops.activation(x, *rest)
    assert f"{NAME}::activation" in {e.key for e in record.key_averages()}
    made = torch.fx.experimental.proxy_tensor.make_fx(
        lambda t: ops.activation(t, *rest), pre_dispatch=True
    )(x)
    assert any("activation" in str(n.target) for n in made.graph.nodes)


def _kept_by(call: Any) -> int:
    """How many tensors autograd hands to the hooks on what it saves."""
    kept: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return len(kept)


def test_gradient_modes(ops: Any) -> None:
    x, rest = _new(3, 8).requires_grad_(), ("sigmoid", F32)
    for _ in range(3):
        y = ops.activation(x, *rest)
        with torch.no_grad():
            assert not ops.activation(x, *rest).requires_grad
        with torch._C._AutoDispatchBelowAutograd():
            assert ops.activation(x, *rest).grad_fn is None
        with torch.inference_mode():
            assert ops.activation(x, *rest).is_inference()
        first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        up = torch.ones_like(y).requires_grad_()
        (again,) = torch.autograd.grad(y, x, up, create_graph=True)
        torch.testing.assert_close(again, first)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            again.sum().backward()
        assert _kept_by(lambda: ops.activation(x, *rest)) == 1
        y = ops.activation(w := x.clone(), *rest)
        w.detach().zero_()
        with pytest.raises(RuntimeError, match="inplace"):
            y.sum().backward()


def test_constants_are_converted_and_refused_as_ever(ops: Any) -> None:
    x = _new(3, 8)
    for _ in range(3):
        y = ops.rms_norm(x, None, 0, 0, "output", F32)[0]
        torch.testing.assert_close(y, ops.rms_norm(x, None, 0.0, 0.0, "output", F32)[0])
        torch.testing.assert_close(y, ops.rms_norm(x, None, 0.0, 0.0, "output", out_dtype=F32)[0])
        for bad in ((x, None, "a", 0.0, "output", F32), (x,), (3, None, 0.0, 0.0, "output", F32)):
            with pytest.raises(RuntimeError, match="rms_norm"):
                ops.rms_norm(*bad)
        with pytest.raises(ValueError, match="cast: expected"):
            ops.rms_norm(x, None, 0.0, 0.0, "outside", F32)
        with pytest.raises(ValueError, match="weight: expected shape"):
            ops.rms_norm(x, _new(7), 0.0, 0.0, "output", F32)
