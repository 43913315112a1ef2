"""Points where a test may kill the process, to prove that an interrupted run can be resumed."""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "GOSSAMER_FAILPOINT"
_hits: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Kill this process with SIGKILL when GOSSAMER_FAILPOINT is `name`, or at the N-th hit when it is `name:N`."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    point, _, number = wanted.partition(":")
    if point != name:
        return
    _hits[name] += 1
    if _hits[name] == int(number or 1):
        os.kill(os.getpid(), signal.SIGKILL)
