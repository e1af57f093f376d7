"""How many processor cores there are for this process: the one place that counts them.

Not here: which devices a framework computes on (``jax_devices.py``).
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of computing in so many microseconds, or "max"


def cores(quota: Path = QUOTA) -> int:
    """How many cores this process may use: of the machine's, by affinity, and by a container's quota.

    Args:
        quota: the file that tells the last.

    Example:
        >>> 1 <= cores() <= (os.cpu_count() or 1)
        True
    """
    count = os.cpu_count() or 1
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError, ZeroDivisionError):
        allowed, period = quota.read_text().split()
        count = min(count, max(1, round(int(allowed) / int(period))))
    return count
