"""Crashes of the log at every disk operation: what was synced is there, the rest is a prefix."""

import random

import pytest

from aspenfs.sim.disk import SimDisk, SimulatedCrash
from tests.runtime.wal_driver import Driver

ACTIONS = 60


def _operations(seed: int) -> int:
    disk = SimDisk(seed)
    driver = Driver(disk, random.Random(seed))
    driver.open()
    driver.work(ACTIONS)
    return disk.operations


def _run_into_crash(seed: int, operation: int, *, kill: bool) -> None:
    disk = SimDisk(seed * 1_000_003 + operation)
    if kill:
        disk.kill_at(operation)
    else:
        disk.crash_at(operation)
    driver = Driver(disk, random.Random(seed))
    with pytest.raises(SimulatedCrash):  # noqa: PT012 - the crash may come in either
        driver.open()
        driver.work(ACTIONS)
    disk.restart()
    driver.check_found(killed=kill)
    # What a crash left behind must not be taken for the log's continuation later on.
    driver.work(15)
    disk.crash()
    disk.restart()
    driver.check_found(killed=False)
    driver.work(15)
    disk.kill()
    disk.restart()
    driver.check_found(killed=True)


@pytest.mark.parametrize("seed", range(6))
def test_power_failure_at_every_operation_leaves_a_prefix_with_all_that_was_synced(seed: int) -> None:
    for operation in range(1, _operations(seed) + 1):
        _run_into_crash(seed, operation, kill=False)


@pytest.mark.parametrize("seed", range(3))
def test_kill_at_every_operation_leaves_all_that_was_appended(seed: int) -> None:
    for operation in range(1, _operations(seed) + 1):
        _run_into_crash(seed, operation, kill=True)
