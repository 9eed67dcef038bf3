"""Whether the library's attention is as exact as attention written out, measured on the device at hand.

Both run forward and backward on one draw of 512 tokens against float64. The library's fused kernels
take fast exponentials and sum in pieces: on a CPU in float32 a gradient of theirs is up to five times as
far from float64, in bfloat16 the result is twice as near and the gradients of k and v are not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

_TOKENS, _HEADS = 512, 2
_FACTOR = 1.05  # the noise of one draw
_PARTS = ("the result", "the gradient of q", "the gradient of k", "the gradient of v")

Attend = Callable[..., torch.Tensor]


@functools.lru_cache(maxsize=64)
def shortfall(device: str, dtype: torch.dtype, widths: tuple[int, int], mask: str) -> str:
    """Why the library's attention is not to be used, or "".

    Args:
        device: its type; nothing is known of "meta", and nothing is held against it.
        dtype: of q, k and v.
        widths: of a head of q and k, and of v.
        mask: "none", "added" (finite) or "boolean".
    """
    if device == "meta":
        return ""
    try:
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            ours, theirs = _measured(device, dtype, widths, mask)
    except RuntimeError as error:
        return f"the library's attention does not run: {str(error).splitlines()[0]}"
    for part, mine, eager in zip(_PARTS, ours, theirs, strict=True):
        if not mine <= _FACTOR * eager:
            kind = str(dtype).removeprefix("torch.")
            return (
                f"the library's attention is less exact on {device} in {kind}: {part} is "
                f"{mine / eager:.1f} times as far from float64"
            )
    return ""


def _measured(
    device: str, dtype: torch.dtype, widths: tuple[int, int], mask: str
) -> tuple[list[float], list[float]]:
    """Relative errors of the library's and of the written out, of the parts in their order."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randn(1, _HEADS, _TOKENS, d, generator=generator).to(device, dtype)
        for d in (widths[0], widths[0], widths[1])
    ]
    cotangent = torch.randn(1, _HEADS, _TOKENS, widths[1], generator=generator).to(device, dtype)
    kept = torch.ones(1, 1, _TOKENS, _TOKENS, dtype=torch.bool, device=device).tril()
    given = {"none": None, "boolean": kept}.get(mask)
    if mask == "added":
        given = torch.zeros(kept.shape, dtype=dtype, device=device)
        given = given.masked_fill(~kept, torch.finfo(dtype).min)
    exact = _run(_written_out, [r.double() for r in rows], given, cotangent.double())
    errors = []
    for attend in (F.scaled_dot_product_attention, _written_out):
        found = _run(attend, rows, given, cotangent)
        pairs = zip(found, exact, strict=True)
        errors.append([float((f.double() - e).norm() / e.norm()) for f, e in pairs])
    return errors[0], errors[1]


def _run(
    attend: Attend, rows: list[torch.Tensor], mask: torch.Tensor | None, cotangent: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [r.detach().requires_grad_() for r in rows]
    added = mask is not None and mask.is_floating_point()
    given = mask.to(leaves[0].dtype) if added and mask is not None else mask
    out = attend(*leaves, given)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def _written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -float("inf"))
    elif mask is not None:
        scores = scores + mask
    inside = torch.promote_types(q.dtype, torch.float32)
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=inside).to(q.dtype), v)
