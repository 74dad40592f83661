"""The clocks of one simulated machine: they drift, jump, and are read through `seams.Clock`.

Belongs here: how a node's time follows from virtual time. Rates are in parts per million; a boot-time
clock never goes back, as the kernel promises, but may leap (a suspended or migrated machine), and a wall
clock goes where somebody sets it.
"""

from typing import Final

from aspenfs.sim.scheduler import Scheduler

DRIFT_PPM_MAX: Final = 500  # of a disciplined clock (NTP's slew cap): two of them differ by 10^-3 at most
_EPOCH_NS: Final = 1_700_000_000 * 1_000_000_000
_MILLION: Final = 1_000_000


class SimClock:
    """A `seams.Clock`. Its rate may be changed at any time, without a leap."""

    def __init__(self, scheduler: Scheduler, *, boot_ns: int = 0, wall_offset_ns: int = 0) -> None:
        self._scheduler = scheduler
        self._since_ns = scheduler.now_ns
        self._boot_ns = boot_ns
        self._wall_offset_ns = wall_offset_ns
        self._leapt_ns = 0
        self.drift_ppm = 0

    def monotonic_ns(self) -> int:
        passed = self._scheduler.now_ns - self._since_ns
        return self._boot_ns + passed + passed * self.drift_ppm // _MILLION

    def awake_ns(self) -> int:
        """Without the leaps, as CLOCK_MONOTONIC."""
        return self.monotonic_ns() - self._leapt_ns

    def time_ns(self) -> int:
        return _EPOCH_NS + self.monotonic_ns() + self._wall_offset_ns

    def set_drift(self, ppm: int) -> None:
        """Gains `ppm` ns in a ms of virtual time from now on (negative: loses)."""
        self._boot_ns = self.monotonic_ns()
        self._since_ns = self._scheduler.now_ns
        self.drift_ppm = ppm

    def leap(self, by_ns: int) -> None:
        """The boot-time clock goes ahead by `by_ns` at once."""
        assert by_ns >= 0
        self._boot_ns += by_ns
        self._leapt_ns += by_ns

    def set_wall(self, by_ns: int) -> None:
        """Somebody sets the wall clock, forth or back."""
        self._wall_offset_ns += by_ns

    def virtual_ns(self, own_ns: int) -> int:
        """How much virtual time passes while this clock counts `own_ns`, at its present rate."""
        return max(1, own_ns * _MILLION // (_MILLION + self.drift_ppm))
