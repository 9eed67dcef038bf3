"""optimize, report and restore on one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from fusewright.compiler import capture, coverage, explain, regions
from fusewright.compiler.config import Options
from fusewright.compiler.match import Pattern
from fusewright.compiler.planning import devices
from fusewright.compiler.planning.budget import parse
from fusewright.compiler.planning.execute import Memory
from fusewright.compiler.records import Binding
from fusewright.compiler.session import Session
from fusewright.runtime import module as modules
from fusewright.runtime.op import register_all

if TYPE_CHECKING:
    from fusewright.compiler.planning.devices import Device
    from fusewright.compiler.planning.plan import Planner


def optimize(
    model: Any, catalogue: Sequence[Pattern], options: dict[str, Any], notes: Sequence[str] = ()
) -> None:
    """Install the regions' forwards on ``model``; see ``fusewright.optimize``.

    ``notes`` are lines for the report.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize needs an nn.Module, got {type(model).__name__}")
    if _session(model) is not None:
        raise ValueError(
            f"this {type(model).__name__} is optimised already; fusewright.restore(model) undoes it"
        )
    session = Session(Options.build(catalogue, **options))
    for line in notes:
        session.note(line)
    found = regions.find(model)
    register_all()
    if found.head is None:
        session.note("no module takes labels: the loss is outside of the model and left alone")
    if session.options.memory_budget is not None:
        session.memory = _memory(model, catalogue, session)
    capture.install(model, found, session)


def _memory(model: nn.Module, catalogue: Sequence[Pattern], session: Session) -> Memory:
    """The budget, refused here already where it is no size; planned at the first batch."""
    device = devices.at_hand()
    budget = session.options.memory_budget
    assert budget is not None
    parse(budget, device.memory)

    def planner(sizes: tuple[int, int]) -> Planner:
        from fusewright.compiler.planning.plan import Planner, text_inputs, without_weights

        with modules.uninstalled(model):
            bare = without_weights(model)
        made = Planner(
            bare,
            text_inputs(bare),
            catalogue,
            _where(model, device),
            sizes,
            lowering=session.options.lowering,
        )
        # What the first capture of a block would ask for: it is not thrown away then.
        for _, block in regions.find(model).blocks:
            cls = modules.original_class(block) if modules.installed(block) else type(block)
            session.stored.expect(block, made.wishes.get(cls, ()))
        return made

    return Memory(budget, device, planner, session.note)


def _where(model: nn.Module, device: Device) -> Device:
    """The device as the model sees it."""
    there = any(p.is_cuda for p in model.parameters())
    return device if there else devices.on_cpu(device)


def report(model: Any) -> explain.CoverageReport:
    """The coverage report of an optimised model."""
    return coverage.report(_required(model), model)


def restore(model: Any) -> None:
    """Take the installed forwards off the model."""
    session = _required(model)
    capture.remove(model)
    session.stored.release()


def _session(model: nn.Module) -> Session | None:
    for module in model.modules():
        binding = modules.installed(module)
        if isinstance(binding, Binding):
            session: Session = binding.session
            return session
    return None


def _required(model: Any) -> Session:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    session = _session(model)
    if session is None:
        raise ValueError(
            f"this {type(model).__name__} is not optimised; call fusewright.optimize(model) first"
        )
    return session
