"""What a rehearsal foresees is what the step launches: nothing is left to compile at a launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import models
import pytest
import quantised
import torch
import training
from torch._subclasses.fake_tensor import FakeTensor

import fusewright
from fusewright.compiler import driver, foresee, pipeline, verify
from fusewright.kernels import codes, early, lora_products, room, thin
from fusewright.kernels.early import Kernel, Pointer
from fusewright.kernels.launcher import Launcher
from fusewright.runtime import rehearsal

BF16 = torch.bfloat16


class Seen:
    """Kernels by their keys: those that were foreseen, and those that were launched."""

    def __init__(self) -> None:
        self.foreseen: dict[Any, str] = {}
        self.launched: dict[Any, str] = {}
        self.failures: list[str] = []
        self.of_halves: set[str] = set()

    @property
    def late(self) -> list[str]:
        """Kernels that were launched and not foreseen."""
        return sorted(n for key, n in self.launched.items() if key not in self.foreseen)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """The ops run their kernels on the CPU, in Triton's interpreter, and everything is written down."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled in this process")
    found = Seen()
    launch = Launcher._launch

    def launched(
        self: Any, grid: Any, tensors: Any, numbers: Any, constants: Any, warps: int
    ) -> Any:
        pointers = [None if t is None else Pointer(t.dtype, t.data_ptr()) for t in tensors]
        kernel = Kernel(
            self.kernel, (*pointers, *numbers, *constants), {"num_warps": warps, **self._options}
        )
        found.launched[kernel.key] = self.kernel.__name__
        return launch(self, grid, tensors, numbers, constants, warps)

    def foreseeing(rewritten: Any, canonical: Any, inputs: Any, verified: bool, device: Any) -> int:
        with pipeline.lower.autocast_off(device):
            made = foresee.rehearse(rewritten, canonical, inputs, verified)
        found.failures += made.failures
        found.foreseen |= {k.key: k.function.__name__ for k in made.kernels}
        return len(made.kernels)

    def foreseeing_halves(forward: Any, backward: Any, inputs: Any) -> None:
        made = foresee.rehearse_halves(forward, backward, [*map(_real, inputs)])
        found.failures += made.failures
        found.foreseen |= {k.key: k.function.__name__ for k in made.kernels}
        found.of_halves |= {k.function.__name__ for k in made.kernels}

    monkeypatch.setattr(Launcher, "_launch", launched)
    monkeypatch.setattr(pipeline, "foresee", foreseeing)
    monkeypatch.setattr(pipeline, "foresee_halves", foreseeing_halves)
    monkeypatch.setattr(lora_products.thin, "reference", thin.thin)
    rehearsal.hosts()
    fusewright.runtime.op.register_all()
    library = torch.library.Library("fusewright", "IMPL")
    for name, host in rehearsal.hosts().items():
        library.impl(name.rpartition(":")[2], host, "CPU")
    yield found
    library._destroy()


def _real(value: Any) -> Any:
    """The value; for the stand-in of a stream that wants no gradient, a tensor like it."""
    if not isinstance(value, FakeTensor):
        return value
    return torch.empty([int(n.node.hint) for n in value.shape], dtype=value.dtype)


def _model(mode: str) -> Any:
    if mode == "4 bits":
        pytest.importorskip("bitsandbytes")
        return quantised.build(quantised.Form(compute=BF16, dtype=BF16), thin=BF16)
    # the second of two layers launches what the first does not: the gradient of its input
    model = models.build("llama", layers=2 if mode == "lora" else 1).to(BF16)
    return model if mode == "full" else models.with_lora(model).to(BF16)


@pytest.mark.parametrize(
    ("mode", "lowering"),
    [("lora", "fx"), ("room", "fx"), ("4 bits", "fx"), ("full", "fx"), ("room", "inductor")],
)
def test_every_launch_was_foreseen(
    mode: str, lowering: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "serves", lambda *_: mode in ("room", "4 bits"))
    monkeypatch.setattr(verify, "_LARGEST", 8)  # of 16 tokens: the cut has sizes of its own
    codes._code.cache_clear()  # what is made once and kept must not be made on stand-ins
    model = _model(mode)
    fusewright.optimize(model, lowering=lowering, verify="first_step")
    training.train_step(model, models.batch())
    assert all(r.symbolic for r in driver._required(model).records)
    assert seen.failures == []
    assert len(seen.launched) >= 10
    assert seen.late == []
    if lowering == "fx":  # whatever a step launches within the blocks is in their halves
        within = {n for n in seen.launched.values() if n in ("rope_kernel", "norm_backward")}
        assert within <= seen.of_halves and seen.of_halves <= set(seen.foreseen.values())


def test_kernels_that_were_started_are_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[list[Kernel]] = []
    monkeypatch.setattr(early, "_compile", lambda kernels, device: compiled.append([*kernels]))
    monkeypatch.setattr(early, "_started", set())
    first, second = (Kernel(test_every_launch_was_foreseen, (n,), {}) for n in (1, 2))
    cpu = torch.device("cpu")
    early.start([first, first], cpu)
    early.start([first, second], cpu)
    early.start([first], torch.device("meta"))  # another device has its own
    early.start([second], cpu)
    early.wait()
    assert compiled == [[first], [second], [first]]


def test_a_checkpoint_does_not_count_what_a_rehearsal_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights are moved, and what follows rehearsed, within the first layer's checkpoint."""
    rehearsed = []

    def foreseeing(rewritten: Any, canonical: Any, inputs: Any, verified: bool, device: Any) -> int:
        rehearsed.append(foresee.rehearse(rewritten, canonical, inputs, verified).failures)
        return 0

    monkeypatch.setattr(pipeline, "foresee", foreseeing)
    monkeypatch.setattr(room, "serves", lambda *_: True)
    eager = _model("lora")
    eager.gradient_checkpointing_enable({"use_reentrant": False})
    ours = fusewright.optimize(models.twin(eager), lowering="fx", verify="first_step", strict=True)
    training.train_step(ours, models.batch())
    assert rehearsed and not any(rehearsed)
