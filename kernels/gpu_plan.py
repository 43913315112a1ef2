"""How Triton kernels cut a product into programs: functions of the shape alone.

Not of the batch and not of the device: so the order of additions, and with it every bit of the result, is the same for
a row alone and among others, and on every card.
"""

from __future__ import annotations

from dataclasses import dataclass

PROGRAMS = 1024  # of 128 threads: about 8 on each of some 130 multiprocessors, enough requests to hide the memory


@dataclass(frozen=True)
class Plan:
    """`steps` steps of the inner loop, `share` of them in each of `splits` parts that run side by side."""

    width: int  # items that one step of a program covers
    share: int
    splits: int


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`, and at least 1: lengths in Triton are powers of two."""
    return 1 << max(0, count - 1).bit_length()


def cut(items: int, width: int, programs: int) -> Plan:
    """Inner items in steps of at most `width`; split when `programs`, those that run anyway, leave the device idle."""
    width = min(width, power_of_two(items))
    steps = max(1, -(-items // width))
    wanted = max(1, min(steps, PROGRAMS // max(1, programs)))
    share = -(-steps // wanted)
    return Plan(width, share, -(-steps // share))
