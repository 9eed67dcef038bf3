"""What a Trainer's loggers are told: coverage, tokens/s, model FLOP utilisation, peak memory.

    trainer = Trainer(fusewright.optimize(model), ...)
    TrainingLog().add_to(trainer)
    trainer.train()

The numbers go out with the Trainer's own (TensorBoard, Weights & Biases, or what ``report_to`` names),
to the console and to ``trainer.state.log_history``. Works with TRL's trainers too.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from torch import nn

import fusewright

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fusewright.integrations needs transformers: pip install 'fusewright[hf]'",
        name=error.name,
    ) from error

GIB = 2**30

# Dense bf16 FLOP/s with float32 accumulation, from the vendors' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "MI300X": 1307e12,
}


class TrainingLog(TrainerCallback):  # type: ignore[misc]
    """Adds Fusewright's numbers to each line that a Trainer logs in training.

    =================================  ===============================================================
    ``fusewright/coverage``            rewritten over rewritten and missed sites, 0 to 1
    ``fusewright/tokens_per_second``   of this process since the last line, padding included
    ``fusewright/mfu``                 model FLOPs per second over ``peak_flops``; only where it is known
    ``fusewright/peak_memory_gib``     most bytes allocated on the GPU; without one, of the process
    ``fusewright/predicted_peak_gib``  of the plan for ``memory_budget``, or as it was given
    =================================  ===============================================================

    The model's FLOPs per token are those of the captured regions in one step, counted on the first
    batch (no recomputation, nothing for frozen weights); the first step, in which everything is
    compiled, is in none of the speeds.

    Args:
        peak_flops: the device's peak in FLOP/s; by default from :data:`PEAK_FLOPS`, by its name.
        predicted_peak: bytes, logged beside the measured peak; by default the plan's that the model was
            optimised with, which is made for the first batch.
    """

    def __init__(
        self, peak_flops: float | None = None, predicted_peak: float | None = None
    ) -> None:
        self.peak_flops = peak_flops if peak_flops is not None else _peak_of_this_device()
        self.predicted_peak = predicted_peak
        self._planned: float | None = None
        self._coverage = 0.0
        self._flops_per_token = 0.0
        self._tokens = self._first_batch = 0
        self._since = 0.0
        self._hook: Any = None

    def add_to(self, trainer: Any) -> Any:
        """Put the callback before the trainer's loggers, so that they log its numbers.

        ``Trainer(callbacks=[...])`` would put it behind them. Returns the trainer.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        return trainer

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Start counting.

        Raises:
            ValueError: the model is not optimised.
        """
        fusewright.report(model)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._tokens = self._first_batch = 0
        self._since = 0.0
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the counting hook off the model again."""
        self._hook.remove()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """After the first step: read the report, then start the clock."""
        if self._since:
            return
        report = fusewright.report(model)
        self._coverage, self._planned = report.coverage, report.predicted_peak
        self._flops_per_token = report.totals.get("flops", 0) / max(self._first_batch, 1)
        self._start_again()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the numbers to a line of training's, for the loggers behind and the history."""
        if logs is None or "loss" not in logs or not self._since:
            return
        values = {"coverage": self._coverage, "peak_memory_gib": _peak_memory() / GIB}
        if self._tokens:
            rate = self._tokens / (time.perf_counter() - self._since)
            values["tokens_per_second"] = rate
            if self.peak_flops:
                values["mfu"] = rate * self._flops_per_token / self.peak_flops
        predicted = self._planned if self.predicted_peak is None else self.predicted_peak
        if predicted is not None:
            values["predicted_peak_gib"] = predicted / GIB
        named = {f"fusewright/{name}": value for name, value in values.items()}
        logs.update(named)
        if state.log_history:
            state.log_history[-1].update(named)
        self._start_again()

    def _start_again(self) -> None:
        self._tokens = 0
        self._since = time.perf_counter()

    def _count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        given = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        if isinstance(given, torch.Tensor):
            tokens = given.shape[:2].numel()
            self._tokens += tokens
            self._first_batch = self._first_batch or tokens


def _peak_of_this_device() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def _peak_memory() -> int:
    """Bytes: the most that was allocated on the GPU, or what the process held at most."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
