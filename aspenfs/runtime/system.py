"""The real clock and the real entropy: the only place that asks the machine for time or randomness."""

import os
import time


class SystemClock:
    """`seams.Clock` of this machine."""

    __slots__ = ()

    def time_ns(self) -> int:
        return time.time_ns()

    def monotonic_ns(self) -> int:
        # CLOCK_MONOTONIC stands still while the machine sleeps: leases would outlive their time.
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def awake_ns(self) -> int:
        """CLOCK_MONOTONIC: as `monotonic_ns`, but stands still while the machine sleeps."""
        return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class SystemEntropy:
    """`seams.Entropy` of this machine's kernel."""

    __slots__ = ()

    def random_bytes(self, size: int) -> bytes:
        return os.urandom(size)
