"""An RMS norm's output where nobody kept it: made of the norm's input and its statistics.

    y = x r (offset + w)        r as the norm's forward has saved it

Shapes and rounding are those of ``rms_norm``; y has the forward's bits, being the same expression of the
same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusewright.kernels.reduce import compute_dtype
from fusewright.kernels.rms_norm import gain, round_through


class Norm(NamedTuple):
    """What of an RMS norm makes its output from its input, as in ``rms_norm``.

    Attributes:
        weight: w (D,) or None.
        rstd: r of every row, in the order of the input's leading dimensions.
    """

    weight: torch.Tensor | None
    rstd: torch.Tensor
    offset: float
    cast: str

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """y (..., D) of x, in its dtype."""
        dtype = compute_dtype(x, self.weight)
        y = x.to(dtype) * self.rstd.reshape(*x.shape[:-1], 1).to(dtype)
        if self.cast == "input":
            y = round_through(y, x.dtype)
        scale = gain(self.weight, self.offset, dtype)
        return (y if scale is None else y * scale).to(x.dtype)
