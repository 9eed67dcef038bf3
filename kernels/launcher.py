"""Launch a Triton kernel again without asking Triton again what to launch.

Triton specialises every argument of every launch: some 15 microseconds for twenty arguments. What it
compiles depends on dtypes, on the alignment of pointers and on numbers, so where all of these are as
they were before, so is the compiled kernel.

A launch can be recorded, so that whoever recorded a whole host function can repeat its launches
without running the function again (``fusewright.runtime.replay``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusewright.kernels import early
from fusewright.kernels.launch import HAS_TRITON
from fusewright.kernels.recording import Launch, Request, recorder

if HAS_TRITON:
    from triton import knobs

_MOST = 2048  # launches remembered of one kernel, before all are forgotten
current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: 0
)


def hooked() -> bool:
    """Whether somebody (a profiler) watches launches; then Triton launches."""
    hook = knobs.runtime.launch_enter_hook if HAS_TRITON else None
    return hook is not None and bool(getattr(hook, "calls", True))


class Launcher:
    """A kernel whose arguments are tensors first, then numbers, then constants, all positional.

    ``options`` are compiler options that every launch has, such as enable_fp_fusion.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel = kernel
        self._options = options
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        tensors: Sequence[torch.Tensor | None],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
    ) -> None:
        """Launch on the current device and stream; ``tensors[at]`` may be None where it is optional.

        At least one tensor must be given. Tensors are of the current device.
        """
        steps = recorder.steps
        if steps is None:
            self._launch(grid, tensors, numbers, constants, warps)
        elif recorder.rehearsing:
            options = {"num_warps": warps, **self._options}
            steps.append(Request(self.kernel, tuple(tensors), (*numbers, *constants), options))
        else:
            # What Triton or its interpreter do with tensors is no part of the host function.
            with torch._C._DisableTorchDispatch():
                compiled = self._launch(grid, tensors, numbers, constants, warps)
            steps.append(Launch(compiled, grid, tuple(tensors), numbers, constants))

    def _launch(
        self,
        grid: tuple[int, int],
        tensors: Sequence[torch.Tensor | None],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
    ) -> Any:
        """Launch, and return the compiled kernel; None under the interpreter."""
        index = -1
        bits = 0
        pointers: list[int | None] = []
        dtypes: list[torch.dtype | None] = []
        for t in tensors:
            if t is None:
                pointers.append(None)
                dtypes.append(None)
            else:
                pointer = t.data_ptr()
                bits |= pointer
                pointers.append(pointer)
                dtypes.append(t.dtype)
                index = t.get_device()
        key = (index, *dtypes, *numbers, *constants, warps)
        compiled = self._known.get(key)
        if compiled is None or bits & 15 or hooked():
            if early.under_way():
                early.wait()
            launched = self.kernel[grid](
                *tensors, *numbers, *constants, num_warps=warps, **self._options
            )  # fmt: skip
            if launched is not None and index >= 0 and not bits & 15:
                if len(self._known) >= _MOST:
                    self._known.clear()
                self._known[key] = launched
            return launched
        compiled.run(
            *grid, 1, current_stream(index), compiled.function, compiled.packed_metadata,
            None, None, None, *pointers, *numbers, *constants,
        )  # fmt: skip
        return compiled
