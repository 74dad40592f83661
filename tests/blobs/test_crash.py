"""Power fails, or the process is killed, inside every single disk operation of a busy life.

The same scripted life is led again and again, and ended at operation 1, 2, 3 … After each end
the store is opened and compared with what had been promised by then.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest

from aspenfs.blobs.format import digest_of
from aspenfs.blobs.store import BlobStore
from aspenfs.seams import DiskFile
from aspenfs.sim.disk import SimDisk, SimFile, SimulatedCrash

SEGMENT_BYTES = 4096


class Promises:
    """What the store has promised so far, by digest."""

    def __init__(self) -> None:
        self.contents: dict[bytes, bytes] = {}
        self.put: set[bytes] = set()  # put returned, not deleted since
        self.durable: set[bytes] = set()  # and a sync has returned since
        self.deleted: set[bytes] = set()  # delete returned, not put since
        self.gone: set[bytes] = set()  # and a sync has returned since

    def synced(self) -> None:
        self.durable |= self.put
        self.gone |= self.deleted


def live(disk: SimDisk, seed: int, promises: Promises) -> None:
    """A life of puts, syncs, deletions and collections, over what earlier lives have left."""
    rng = random.Random(seed)
    store = BlobStore.open(disk, segment_bytes=SEGMENT_BYTES)
    for _ in range(30):
        dice = rng.random()
        if dice < 0.55:
            data = rng.randbytes(rng.choice((1, 60, 500, 900, 2000, 5000)))
            digest = digest_of(data)
            promises.contents[digest] = data
            promises.deleted.discard(digest)
            promises.gone.discard(digest)
            store.put(data)
            promises.put.add(digest)
        elif dice < 0.7:
            store.sync()
            promises.synced()
        elif dice < 0.85 and promises.put:
            doomed = rng.sample(sorted(promises.put), rng.randint(1, min(4, len(promises.put))))
            promises.put.difference_update(doomed)
            promises.durable.difference_update(doomed)
            store.delete(doomed)
            promises.deleted.update(doomed)
        else:
            steps = rng.randint(1, 60)
            for step in store.collect(2048):
                steps -= 1
                if step.needs_sync and rng.random() < 0.7:
                    store.sync()
                    promises.synced()
                if not steps:
                    break
    store.close()
    promises.synced()


def check(store: BlobStore, promises: Promises, *, killed: bool) -> None:
    promised = promises.put if killed else promises.durable
    for digest, data in promises.contents.items():
        if digest in promised:
            assert store.has(digest)
        if digest in (promises.deleted if killed else promises.gone):
            assert not store.has(digest)
        if store.has(digest):
            assert store.get(digest) == data
    findings = list(store.verify())
    assert [finding for finding in findings if finding.problem] == []
    assert {finding.digest for finding in findings} <= set(promises.contents)


def sweep(end: Callable[[SimDisk, int], None], seed: int, *, killed: bool) -> None:
    disk = SimDisk(seed)
    live(disk, seed, Promises())
    for at in range(1, disk.operations + 1):
        disk, promises = SimDisk(seed * 100_003 + at), Promises()
        end(disk, at)
        with pytest.raises(SimulatedCrash):
            live(disk, seed, promises)
        disk.restart()
        store = BlobStore.open(disk, segment_bytes=SEGMENT_BYTES)
        check(store, promises, killed=killed)
        # Opening made all it found durable, and the next life goes on from there.
        found = {digest for digest in promises.contents if store.has(digest)}
        lost = set(promises.contents) - found
        promises.put, promises.durable = set(found), set(found)
        promises.deleted, promises.gone = set(lost), set(lost)
        live(disk, seed + 1, promises)
        disk.crash()
        disk.restart()
        check(BlobStore.open(disk, segment_bytes=SEGMENT_BYTES), promises, killed=False)


@pytest.mark.parametrize("seed", range(2))
def test_a_power_failure_at_any_operation_loses_nothing_that_was_synced(seed: int) -> None:
    sweep(SimDisk.crash_at, seed, killed=False)


@pytest.mark.parametrize("seed", [10])
def test_a_kill_at_any_operation_loses_nothing_that_was_put(seed: int) -> None:
    sweep(SimDisk.kill_at, seed, killed=True)


@pytest.mark.parametrize("seed", range(4))
def test_a_crash_at_any_operation_of_opening_after_a_crash(seed: int) -> None:
    for at in range(1, 60):
        disk, promises = SimDisk(seed * 1009 + at), Promises()
        disk.crash_at(60 + 3 * seed)
        with pytest.raises(SimulatedCrash):
            live(disk, seed, promises)
        disk.restart()
        disk.crash_at(disk.operations + at)
        try:
            BlobStore.open(disk, segment_bytes=SEGMENT_BYTES)
        except SimulatedCrash:
            disk.restart()
        else:
            disk.crash()
            disk.restart()
        check(BlobStore.open(disk, segment_bytes=SEGMENT_BYTES), promises, killed=False)


class _BusyFile:
    """Lets somebody act while a datasync is under way, before and after its work."""

    def __init__(self, file: SimFile, act: Callable[[], None]) -> None:
        self._file, self._act = file, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def datasync(self) -> None:
        self._act()
        self._file.datasync()
        self._act()


class _BusyDisk:
    def __init__(self, disk: SimDisk, act: Callable[[], None]) -> None:
        self._disk, self._act = disk, act

    def __getattr__(self, name: str) -> Any:
        return getattr(self._disk, name)

    def open(self, path: str, *, create: bool = False) -> DiskFile:
        return _BusyFile(self._disk.open(path, create=create), self._act)

    def sync_directory(self, path: str) -> None:
        self._act()
        self._disk.sync_directory(path)
        self._act()


@pytest.mark.parametrize("seed", range(20))
def test_chunks_put_while_a_sync_is_under_way_are_not_taken_for_durable(seed: int) -> None:
    disk, rng = SimDisk(seed), random.Random(seed)
    stores: list[BlobStore] = []
    put: dict[bytes, bytes] = {}

    def act() -> None:
        for _ in range(rng.choice((0, 1, 5)) if stores else 0):
            data = rng.randbytes(rng.choice((20, 700, 3000)))
            put[stores[0].put(data)] = data

    stores.append(BlobStore.open(_BusyDisk(disk, act), segment_bytes=SEGMENT_BYTES))
    for _ in range(rng.randint(1, 8)):
        act()
        promised = set(put)
        stores[0].sync()
    disk.crash()
    disk.restart()
    store = BlobStore.open(disk, segment_bytes=SEGMENT_BYTES)
    assert all(store.get(digest) == put[digest] for digest in promised)
    assert {finding.digest for finding in store.verify() if not finding.problem} <= set(put)
    assert [finding for finding in store.verify() if finding.problem] == []


def test_chunks_read_after_a_failed_sync_and_a_restart_are_written_once_more() -> None:
    """The kernel calls pages clean that a failed fsync has lost: a later sync alone saves nothing."""
    for seed in range(30):
        disk = SimDisk(seed)
        store = BlobStore.open(disk)
        digests = [store.put(bytes([n]) * 700) for n in range(20)]
        disk.fail("datasync", 5)
        with pytest.raises(Exception, match="restart"):
            store.sync()
        disk.kill()
        disk.restart()
        store = BlobStore.open(disk)
        assert all(store.has(digest) for digest in digests)
        disk.crash()
        disk.restart()
        store = BlobStore.open(disk)
        assert [bytes(store.get(digest)) for digest in digests] == [bytes([n]) * 700 for n in range(20)]
