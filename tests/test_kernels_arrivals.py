"""The last program of a launch: it sees what all have written, and the counter is zero again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from repeated import interpreted_launches

from fusewright.kernels import arrivals, cross_entropy
from fusewright.kernels.arrival_kernels import arrive, start_anew
from fusewright.kernels.launch import tl, triton
from fusewright.runtime.op import register_all
from fusewright.runtime.replay import planned

register_all()
OP = torch.ops.fusewright.cross_entropy
FORM = (-100, "mean", 0.0, 0.0, 1.0, 0.0)


@triton.jit
def _squares(out_ptr, sum_ptr, counter_ptr, BLOCK: tl.constexpr):
    """out[i] = i^2 by program i; the last one adds them up and the programs' numbers."""
    program = tl.program_id(0)
    tl.store(out_ptr + program, program * program)
    last, numbers = arrive(counter_ptr, program)
    if last:
        at = tl.arange(0, BLOCK)
        squares = tl.load(out_ptr + at, mask=at < tl.num_programs(0), other=0, cache_modifier=".cg")
        tl.store(sum_ptr, tl.sum(squares, axis=0))
        tl.store(sum_ptr + 1, numbers)
        start_anew(counter_ptr)


@pytest.mark.parametrize("programs", [1, 7, 1000])
def test_the_last_program_sees_all(backend: Backend, programs: int) -> None:
    counter = arrivals.counter(torch.device(backend.device))
    for _ in range(3):
        out = torch.full((programs,), -1, dtype=torch.int32, device=backend.device)
        sums = torch.full((2,), -1, dtype=torch.int64, device=backend.device)
        _squares[(programs,)](out, sums, counter, BLOCK=1024)
        numbers = torch.arange(programs)
        assert sums.tolist() == [int((numbers * numbers).sum()), int(numbers.sum())]
        assert int(counter) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled in this process")
def test_a_repetition_asks_for_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan takes the current stream's counter each time, not the one that it was recorded with."""
    asked = []
    real = arrivals.counter

    def counter(device: torch.device) -> torch.Tensor:
        def fetch() -> tuple[torch.Tensor, int]:
            made = real(device)
            asked.append(made)
            return made, made.data_ptr()

        made = fetch()[0]
        arrivals.recording.fetched(made, fetch)
        return made

    monkeypatch.setattr("fusewright.kernels.cross_entropy_launch.counter", counter)
    calls = []

    def host(*values: Any) -> Any:
        calls.append(values)
        return cross_entropy.triton_fwd(*values)

    logits, labels = torch.randn(5, 33), torch.tensor([3, -100, 0, 32, 7])
    with interpreted_launches():
        run = planned(host, OP.default._schema, "cpu")
        losses = [run.call(logits, labels, *FORM)[0] for _ in range(5)]
    assert len(calls) == 2
    assert len(asked) == len({id(t) for t in asked}) == 5
    expected = torch.nn.functional.cross_entropy(logits.double(), labels)
    torch.testing.assert_close(torch.stack(losses).double(), expected.expand(5))


@pytest.mark.gpu
def test_streams_and_graphs_have_counters_of_their_own() -> None:
    device = torch.device("cuda")
    logits = torch.randn(4096, 1000, device=device)
    labels = torch.randint(0, 1000, (4096,), device=device)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    losses = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                losses.append(OP(logits, labels, *FORM)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OP(logits, labels, *FORM)[0]
    for stream in streams:
        with torch.cuda.stream(stream):
            losses.append(OP(logits, labels, *FORM)[0])
        graph.replay()
        losses.append(captured.clone())
    torch.cuda.synchronize()
    stacked = torch.stack(losses)
    assert (stacked == stacked[0]).all(), "one result, whichever program was the last"
    torch.testing.assert_close(stacked[0].double(), expected)
