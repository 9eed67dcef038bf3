"""What a call of each op costs the host, in microseconds: ``python bench/host_cost.py``.

On a GPU the real thing. Without one, tensors of the CPU pose for it: the ops are registered once more
with their host functions for the CPU, and a stub stands where the compiled kernel would be launched,
so everything up to the launch is measured and nothing is computed. An eager ``silu(gate) * up`` with
gradients is timed beside them and tells how fast the machine is; on a GPU it contains two launches.

Columns: a call that records for autograd, the same brought by the dispatcher (as C++ code calls an
op), a call that does not record, the host function by itself without a plan, ``autograd.grad`` of the
op, and the backward op by itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fusewright.kernels import catalogue, launcher
from fusewright.kernels.spec import OpSpec
from fusewright.runtime import op, recording

STUBBED = "fusewright_stubbed"
BF16 = torch.bfloat16
HIDDEN, ROWS, LENGTH = 256, 2, 16


class Case(NamedTuple):
    """An op's tensors and constants."""

    name: str
    tensors: list[torch.Tensor]
    constants: tuple[Any, ...]


@dataclass(frozen=True)
class Cost:
    """Microseconds of one call."""

    op: str
    with_grad: float
    dispatched: float
    without: float
    host: float
    autograd_grad: float
    backward: float


def cases(device: str) -> list[Case]:
    """Small inputs, so that a GPU waits for the host and never the other way round."""

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(BF16)

    x, other = new(ROWS, LENGTH, HIDDEN), new(ROWS, LENGTH, HIDDEN)
    weight, bias = new(HIDDEN), new(HIDDEN)
    q, k = (new(ROWS, LENGTH, heads, 64).transpose(1, 2) for heads in (4, 2))
    table = new(1, 1, LENGTH, 64)
    labels = torch.arange(ROWS * LENGTH, device=device)
    return [
        Case("rms_norm", [x, weight], (1e-6, 0.0, "output", BF16)),
        Case("add_rms_norm", [x, other, weight], (1e-6, 0.0, "output", BF16)),
        Case("layer_norm", [x, weight, bias], (1e-6, 0.0, "output", BF16)),
        Case("rope", [q, k, table, table.clone()], ("half", 64, BF16)),
        Case("glu", [x, other], ("silu", BF16)),
        Case("glu_packed", [x], ("silu", True, False, BF16)),
        Case("activation", [x], ("silu", BF16)),
        Case("cross_entropy", [x[0], labels[:LENGTH]], (-100, "mean", 0.0, 0.0, 1.0, 0.0)),
    ]


def timed(calls: list[Callable[[], Any]], repeats: int = 200, rounds: int = 24) -> list[float]:
    """Microseconds of each call, the best of some rounds; in a round each has its turn.

    A machine that is slow for a while is slow for all of them. A GPU is never behind by more than a
    turn.
    """
    on_gpu = torch.cuda.is_available()
    # without a GPU nobody is waited for: the process's own time is what others cannot lengthen
    wait, now = (torch.cuda.synchronize, time.perf_counter) if on_gpu else (int, time.process_time)
    best = [float("inf")] * len(calls)
    gc.collect()
    gc.disable()
    for number in range(rounds + 1):  # the first one compiles and makes plans
        for at, call in enumerate(calls):
            wait()
            started = now()
            for _ in range(repeats):
                call()
            if number:
                best[at] = min(best[at], now() - started)
    gc.enable()
    return [b / repeats * 1e6 for b in best]


class _Compiled:
    """Stands for a compiled kernel; launching it does nothing."""

    function, packed_metadata = 1, (4, 1, 0)

    @staticmethod
    def run(*arguments: Any) -> None:
        return None


class _Kernel:
    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., _Compiled]:
        return lambda *arguments, **options: _Compiled()


def stub() -> Any:
    """The ops' namespace with nothing behind the launches; assertions on the device are left out."""
    launcher.Launcher.kernel = property(  # type: ignore[assignment]
        lambda self: _Kernel(), lambda self, kernel: None
    )
    torch._assert_async = lambda *arguments: None  # type: ignore[assignment]
    launcher.current_stream = recording.current_stream = lambda index: 0
    op._NAMESPACE = STUBBED
    library = torch.library.Library(STUBBED, "DEF")
    for spec in catalogue():
        op.register(spec, library, "cpu")
    op._NAMESPACE = "fusewright"
    namespace = getattr(torch.ops, STUBBED)
    namespace.library = library  # registered for as long as it lives
    return namespace


def ways(case: Case, spec: OpSpec, namespace: Any) -> list[Callable[[], Any]]:
    """The calls of an op that ``Cost`` names, in its order."""
    packet = getattr(namespace, case.name)
    overload = packet.default
    backward = getattr(namespace, spec.backward.split("(", 1)[0]).default
    values = (*case.tensors, *case.constants)
    names = [a.name for a in overload._schema.arguments]
    leaves = [
        v.detach().clone(memory_format=torch.preserve_format) if isinstance(v, torch.Tensor) else v
        for v in values
    ]
    wanted = [leaves[names.index(n)].requires_grad_() for n in spec.differentiable]
    out = overload(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    ups = [torch.ones_like(o) for o in outputs[: spec.outputs]]
    plain = [v.detach() if isinstance(v, torch.Tensor) else v for v in leaves]
    bare = tuple(o.detach() for o in outputs)
    middle = spec.save(dict(zip(names, plain, strict=True)), bare)
    back = (*ups, *middle, *[True] * len(wanted))
    return [
        lambda: overload(*leaves),
        lambda: overload._op(*leaves),
        lambda: overload(*values),
        lambda: spec.triton[0](*values),  # type: ignore[index]
        lambda: torch.autograd.grad(outputs[: spec.outputs], wanted, ups, retain_graph=True),
        lambda: backward(*back),
    ]


def eager() -> Callable[[], Any]:
    """An eager silu(gate) * up with gradients."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate, up = torch.randn(2, ROWS, LENGTH, HIDDEN, device=device).to(BF16).unbind()
    gate.requires_grad_(), up.requires_grad_()
    return lambda: F.silu(gate) * up


def main() -> None:
    """Print the table; ``--json PATH`` writes it too."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", help="where to write the numbers")
    path = parser.parse_args().json
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        op.register_all()
    namespace = torch.ops.fusewright if on_gpu else stub()
    specs = {s.name: s for s in catalogue()}
    given = cases("cuda" if on_gpu else "cpu")
    names = [f.name for f in fields(Cost)]
    calls = [call for case in given for call in ways(case, specs[case.name], namespace)]
    *found, reference = timed([*calls, eager()])
    per = len(names) - 1
    costs = [Cost(c.name, *found[at * per : (at + 1) * per]) for at, c in enumerate(given)]
    print("".join(f"{n:>14}" for n in names))
    for c in costs:
        print(f"{c.op:>14}" + "".join(f"{getattr(c, n):14.1f}" for n in names[1:]))
    print(f"eager silu(gate) * up with gradients: {reference:.1f}")
    if path is not None:
        device = torch.cuda.get_device_name() if on_gpu else "cpu, launches stubbed"
        whole = {"device": device, "torch": torch.__version__, "eager": reference}
        Path(path).write_text(json.dumps(whole | {"ops": [asdict(c) for c in costs]}, indent=1))


if __name__ == "__main__":
    main()
