"""A log whose fdatasync failed, opened again without a reboot: what is read then may be in memory alone.

The kernel marks pages clean when writing them back failed, and keeps them: a new process reads them, and its
fdatasync has nothing to write. So a log that is opened writes again what no frame says to be durable.
"""

import errno
import random

import pytest

from aspenfs.errors import SyncFailed
from aspenfs.runtime.wal import Kind, Wal
from aspenfs.sim.disk import SimDisk

CLUSTER = bytes(range(16))


def open_wal(disk: SimDisk) -> Wal:
    return Wal.open(disk, "wal", CLUSTER, segment_bytes=8 << 10, background=False)


def payloads(wal: Wal) -> list[bytes]:
    return [frame.payload for frame in wal.replay(wal.first_index)]


def grow(wal: Wal, entries: int, size: int) -> None:
    for _ in range(entries):
        index = wal.last_index + 1
        wal.append(Kind.ENTRY, 1, index, b"%d:" % index + bytes(size))


@pytest.mark.parametrize("size", [10, 600, 3_000])
@pytest.mark.parametrize("seed", range(20))
def test_what_a_reopened_log_hands_out_survives_the_power(seed: int, size: int) -> None:
    disk = SimDisk(seed)
    rng = random.Random(seed)
    wal = open_wal(disk)
    grow(wal, rng.randint(0, 5), size)
    wal.sync()
    grow(wal, rng.randint(1, 8), size)
    disk.fail("datasync", errno.EIO)
    with pytest.raises(SyncFailed):
        wal.sync()
    disk.kill()  # the process ends, the machine does not
    disk.restart()

    wal = open_wal(disk)
    found = payloads(wal)
    if rng.random() < 0.5:
        grow(wal, 1, size)
        wal.sync()
        found = payloads(wal)
    disk.crash()
    disk.restart()

    assert payloads(open_wal(disk))[: len(found)] == found


class Recording(SimDisk):
    """Notes the order of syncs."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.synced: list[str] = []
        self.gate = self.synced.append

    def sync_directory(self, path: str) -> None:
        self.synced.append(path)
        super().sync_directory(path)


def test_names_are_synced_before_what_is_in_them_is_relied_on() -> None:
    disk = Recording(1)
    wal = open_wal(disk)
    grow(wal, 1, 10)
    wal.sync()
    disk.kill()
    disk.restart()
    disk.synced.clear()
    open_wal(disk)
    assert disk.synced.index("wal") < disk.synced.index("0000000000000001.wal")
