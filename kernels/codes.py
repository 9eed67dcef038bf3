"""The values of the 16 nibbles of bitsandbytes' two 4-bit formats.

nf4: quantiles of the normal distribution, scaled to [-1, 1] (T. Dettmers et al., "QLoRA", 2023,
appendix E). fp4: a sign, two bits of exponent and one of mantissa, over the largest value 12.
"""

from __future__ import annotations

import functools

import torch

from fusewright.kernels import recording

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
KINDS = ("nf4", "fp4")


def code(kind: str, device: torch.device) -> torch.Tensor:
    """The value of each nibble, (16,) float32.

    Raises:
        ValueError: the format is not known.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    made = _code(kind, device)
    recording.table(made, (), lambda _: made)
    return made


@functools.cache
def _code(kind: str, device: torch.device) -> torch.Tensor:
    # Kept for good, so it must not be what a mode that is active now makes of it, such as a fake tensor.
    real = torch._C._DisableTorchDispatch()
    with real, torch.inference_mode(False), torch.no_grad():
        if kind == "nf4":
            return torch.tensor(_NF4, dtype=torch.float32, device=device)
        half = torch.tensor(_FP4, dtype=torch.float32) / 12.0
        return torch.cat((half, 0.0 - half)).to(device)
