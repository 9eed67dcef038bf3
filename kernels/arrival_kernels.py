"""What the programs of a launch do with the counter of ``arrivals``."""

from __future__ import annotations

from fusewright.kernels.launch import tl, triton


@triton.jit
def arrive(counter_ptr, number):
    """Whether this program is the last of its launch to arrive, and the sum of all programs' numbers.

    Every program must call it once, behind its last store; the last one then sees what all have
    stored, calls ``start_anew``, and is the only one that may use the sum. ``number``: 0 to 2^31 - 1, also
    in sum; it is an integer because sums of these have one result in any order.
    """
    tl.debug_barrier()  # the stores of all threads come before the one that counts
    mine = (tl.full([], 0, tl.int64) + number) * 4294967296 + 1
    total = tl.atomic_add(counter_ptr, mine, sem="acq_rel", scope="gpu") + mine
    return (total & 4294967295) == tl.num_programs(0), total >> 32


@triton.jit
def start_anew(counter_ptr):
    """Leave the counter as the next launch on the stream expects it."""
    tl.store(counter_ptr, 0)
