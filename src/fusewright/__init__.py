"""Fusewright: a graph compiler for fine-tuning.

    model = fusewright.optimize(model)
    print(fusewright.report(model))
    fusewright.restore(model)

Importing this package imports torch alone; the compiler, the patterns and the kernels are loaded by
the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from fusewright.compiler.explain import CoverageReport
    from fusewright.compiler.planning.plan import MemoryPlan

    Model = TypeVar("Model", bound=nn.Module)

__version__ = "0.1.0"
__all__ = ["examine", "optimize", "plan", "report", "restore"]


def optimize(
    model: Model,
    *,
    patterns: Sequence[str] | None = None,
    memory_budget: str | float | None = None,
    lowering: str = "auto",
    verify: str = "first_step",
    logits: str = "lazy",
    strict: bool = False,
) -> Model:
    """Make the model's training step faster and smaller, in place; returns the same object.

    Nothing is compiled here: each region is captured, rewritten and verified when the first training
    step reaches it. Evaluation, ``no_grad`` and ``generate`` run the original code. What cannot be
    captured, proven or verified runs as before, and :func:`report` says why.

    Args:
        model: any ``nn.Module`` with repeated layers; a Hugging Face model, with or without PEFT.
        patterns: names of the patterns to use; all by default.
        memory_budget: the most device memory that a step may take: "22GiB", bytes, a share ("90%", 0.9)
            or "auto". At the first batch it is planned what each block saves and runs again (see
            :func:`plan`); a step that cannot fit raises before it runs. None runs cheap calls again.
        lowering: "fx" (plain FX, starts in seconds), "inductor", or "auto" (Inductor on a GPU).
        verify: "first_step" holds each region against float64 at its first step; "off" does not.
        logits: "lazy" computes ``outputs.logits`` when they are read, "eager" always; "chunked" answers
            what is asked of them some rows at a time, also where the model is given no labels.
        strict: raise where a region cannot be compiled or verified, instead of falling back.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: unknown option or pattern; no repeated blocks; or already optimised.
        RuntimeError: ``strict``, and a package is older than supported (a warning otherwise).
    """
    _start_compilers(model)
    from fusewright.compiler import driver
    from fusewright.patterns import DEFAULT
    from fusewright.versions import warn_of_unsupported

    notes = warn_of_unsupported(strict)
    options = {
        "patterns": patterns,
        "memory_budget": memory_budget,
        "lowering": lowering,
        "verify": verify,
        "logits": logits,
        "strict": strict,
    }
    driver.optimize(model, DEFAULT, options, notes)
    return model


def _start_compilers(model: object) -> None:
    """Start what compiles kernels, where there is a GPU, beside the seconds that the compiler's import takes."""
    from torch import nn

    from fusewright.kernels import early

    if isinstance(model, nn.Module) and any(p.is_cuda for p in model.parameters()):
        early.prepare()


def report(model: nn.Module) -> CoverageReport:
    """What was rewritten in an optimised model, what was not and why.

    Raises:
        ValueError: the model is not optimised.
    """
    from fusewright.compiler import driver

    return driver.report(model)


def examine(computation: Callable[..., Any], *inputs: Any) -> CoverageReport:
    """What would be rewritten in one function or module: the report of its forward as a block's.

    Args:
        computation: a function of the inputs, or a module.
        inputs: real tensors and constants; the computation is run on them once.
    """
    from fusewright.compiler.examine import examine as look
    from fusewright.patterns import DEFAULT

    return look(computation, inputs, DEFAULT)


def plan(
    model: nn.Module | str,
    batch: int = 1,
    sequence: int = 0,
    budget: str | float = "auto",
    *,
    device: str = "",
    optimizer: str = "adamw",
    lora: int = 0,
    dtype: str = "bfloat16",
    base: str = "",
) -> MemoryPlan:
    """The fastest training step of a language model that fits a memory budget, without running it.

    Needs no GPU and no weights: the layers are captured and differentiated on the meta device, and what
    they keep and run again is chosen from cost formulas.

    Args:
        model: a model, or what ``fusewright report`` takes: a model type, a config.json, a folder.
        batch: rows.
        sequence: tokens a row; 0 is what the config allows, at most 4096.
        budget: "22GiB", bytes, a share of the device ("90%", 0.9), or "auto".
        device: "h200", "h100", "a100", "a100-40gb", or a JSON file of another's rates, as one is left in
            the cache folder for a GPU that was measured; "" is the device at hand, else "h100".
        optimizer: "adamw", "adamw-8bit", "sgd" or "sgd-momentum".
        lora: adapters of this rank on every linear of a model that is given by name.
        dtype: of a model that is given by name.
        base: "nf4" or "fp4": the linears of such a model are bitsandbytes' 4-bit ones (QLoRA); "" is not.

    Raises:
        ValueError: the budget is no size, or too small: then it has the least budget as ``least``;
            an unknown device or optimizer; or a model whose layers cannot be captured.
    """
    from fusewright import planned

    options = {"device": device, "optimizer": optimizer, "lora": lora, "dtype": dtype, "base": base}
    return planned.plan(model, batch, sequence, budget, **options)


def restore(model: Model) -> Model:
    """Undo :func:`optimize` completely; returns the same object.

    Raises:
        ValueError: the model is not optimised.
    """
    from fusewright.compiler import driver

    driver.restore(model)
    return model


def __getattr__(name: str) -> Any:
    if name == "CoverageReport":
        from fusewright.compiler.explain import CoverageReport

        return CoverageReport
    if name == "MemoryPlan":
        from fusewright.compiler.planning.plan import MemoryPlan

        return MemoryPlan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
