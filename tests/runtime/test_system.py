"""The machine's clock and entropy keep the promises of `seams`."""

import time

from aspenfs.runtime.system import SystemClock, SystemEntropy


def test_monotonic_clock_never_goes_back_and_counts_suspend() -> None:
    clock = SystemClock()
    readings = [clock.monotonic_ns() for _ in range(1000)]
    assert readings == sorted(readings)
    before, now = time.clock_gettime_ns(time.CLOCK_BOOTTIME), clock.monotonic_ns()
    assert before <= now <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def test_wall_clock_is_the_time_of_day_in_ns() -> None:
    before, now = time.time_ns(), SystemClock().time_ns()
    assert before <= now <= time.time_ns()


def test_entropy_has_the_size_asked_for_and_does_not_repeat() -> None:
    entropy = SystemEntropy()
    assert [len(entropy.random_bytes(size)) for size in (0, 1, 16, 4096)] == [0, 1, 16, 4096]
    assert entropy.random_bytes(16) != entropy.random_bytes(16)
