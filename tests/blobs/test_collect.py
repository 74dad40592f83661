"""What collection gives back, what it copies, and what it leaves."""

import os
from pathlib import Path

import pytest

from aspenfs.blobs.collect import CollectStep
from aspenfs.blobs.store import BlobStore
from aspenfs.limits import BLOB_OPEN_FILES_MAX
from aspenfs.runtime.disk import RealDisk
from aspenfs.sim.disk import SimDisk

SEGMENT_BYTES = 4096  # six of the chunks below


def chunk(number: int) -> bytes:
    return number.to_bytes(4, "big") * 150


def open_store(disk: SimDisk) -> BlobStore:
    return BlobStore.open(disk, segment_bytes=SEGMENT_BYTES, cache_bytes=0)


def filled(disk: SimDisk, count: int) -> tuple[BlobStore, list[bytes]]:
    store = open_store(disk)
    digests = [store.put(chunk(n)) for n in range(count)]
    store.sync()
    return store, digests


def collect(store: BlobStore, **options: float) -> list[CollectStep]:
    steps = []
    for step in store.collect(1000, **options):
        if step.needs_sync:
            store.sync()
        steps.append(step)
    return steps


def test_nothing_is_collected_where_nothing_was_deleted() -> None:
    disk = SimDisk()
    store, _ = filled(disk, 60)
    operations = disk.operations
    assert collect(store) == []
    assert disk.operations == operations


def test_only_segments_with_a_low_live_share_are_copied_from() -> None:
    disk = SimDisk()
    store, digests = filled(disk, 24)
    store.delete(digests[:4] + digests[6:8])  # two of six live in the first, four of six in the second
    steps = collect(store)
    assert {step.segment for step in steps} == {0, 1}
    assert sum(step.copied_bytes for step in steps) == 1200
    assert "00000001.segment" not in disk.list("blobs")
    assert "00000001.table" not in disk.list("blobs")
    assert "00000002.segment" in disk.list("blobs")
    assert [store.has(d) for d in digests] == [n not in (0, 1, 2, 3, 6, 7) for n in range(24)]


def test_a_segment_without_live_chunks_is_given_back_without_copying() -> None:
    disk = SimDisk()
    store, digests = filled(disk, 12)
    store.delete(digests[:6])
    before = store.stats().total_bytes
    steps = collect(store)
    assert sum(step.copied_bytes for step in steps) == 0
    freed = sum(step.freed_bytes for step in steps)
    assert freed == before - store.stats().total_bytes > 3900


def test_collection_comes_to_an_end() -> None:
    """Tombstones that are still needed do not chase each other from segment to segment."""
    disk = SimDisk()
    store, digests = filled(disk, 600)
    store.delete(digests[::3])  # no segment falls to half: all tombstones stay needed
    store.sync()
    for _ in range(3):
        collect(store)
        store.close()
        store = open_store(disk)
    operations = disk.operations
    assert sum(step.copied_bytes + step.freed_bytes for step in collect(store)) == 0
    assert disk.operations == operations
    assert [store.has(d) for d in digests] == [bool(n % 3) for n in range(600)]


def test_a_tombstone_outlives_its_segment_as_long_as_it_is_needed() -> None:
    disk = SimDisk()
    store, digests = filled(disk, 12)
    more = [store.put(chunk(n)) for n in range(12, 14)]
    store.delete([digests[0]])  # in a segment that stays; the tombstone lies beside `more`
    more += [store.put(chunk(n)) for n in range(14, 24)]
    store.sync()
    store.delete(more[:6])
    collect(store)
    assert "00000003.segment" not in disk.list("blobs")
    assert "00000001.segment" in disk.list("blobs")
    store.close()
    assert not open_store(disk).has(digests[0])


@pytest.mark.parametrize("seed", range(20))
def test_a_tombstone_outlives_its_segment_until_the_unlinking_of_its_target_is_durable(seed: int) -> None:
    disk = SimDisk(seed)
    store, digests = filled(disk, 6)
    digests.append(store.put(chunk(6)))
    store.delete(digests[:6])  # tombstones in the second segment, whose only chunk goes as well
    digests += [store.put(chunk(n)) for n in range(7, 15)]
    store.delete([digests[6]])
    store.delete(digests[7:11])
    store.sync()
    for step in store.collect(1000):
        if step.needs_sync:
            store.sync()
        if step.segment == 2 and step.freed_bytes:
            break
    disk.crash()
    disk.restart()
    assert [open_store(disk).has(digest) for digest in digests] == [False] * 11 + [True] * 4


def test_small_segments_of_many_short_lives_become_one() -> None:
    disk = SimDisk()
    for number in range(8):
        store = open_store(disk)
        store.put(chunk(number))
        if number == 6:
            assert collect(store) == []  # not yet a crowd
        store.close()
    store = open_store(disk)
    assert store.stats().segments == 8
    collect(store)
    assert store.stats().segments <= 2
    assert store.stats().chunks == 8
    store.close()
    assert all(finding.problem is None for finding in open_store(disk).verify())


def test_chunks_put_read_and_deleted_between_steps() -> None:
    disk = SimDisk()
    store, digests = filled(disk, 24)
    store.delete(digests[:3])
    alive = dict(zip(digests[3:], map(chunk, range(3, 24)), strict=True))
    for at, step in enumerate(store.collect(1)):
        if step.needs_sync:
            store.sync()
        if step.segment == 1 and digests[3] in alive and step.copied_bytes:
            store.delete([digests[3]])  # just copied: two copies to forget
            del alive[digests[3]]
        data = chunk(100 + at)
        alive[store.put(data)] = data
        for digest, content in alive.items():
            assert store.get(digest) == content
    assert digests[3] not in alive
    for _ in range(2):
        assert [store.has(d) for d in digests[:4]] == [False] * 4
        assert {f.digest for f in store.verify()} == set(alive)
        assert store.stats().chunks == len(alive)
        store.close()
        store = open_store(disk)


def test_between_the_unlinking_and_the_end_chunks_are_found_at_their_new_places_only() -> None:
    for stop in range(1, 8):
        disk = SimDisk()
        store, digests = filled(disk, 12)
        store.delete(digests[:3])
        after = 0
        steps = iter(store.collect(1))
        for step in steps:
            after += step.freed_bytes > 0 or after > 0
            if after == stop:
                break
        store.delete(digests[3:5])
        store.delete(digests[3:5])
        assert [store.has(d) for d in digests] == [False] * 5 + [True] * 7
        assert [bytes(store.get(d)) for d in digests[5:]] == [chunk(n) for n in range(5, 12)]
        del steps  # dropped half-way, it leaves no old places
        assert store.stats().chunks == 7
        assert store.put(chunk(3)) == digests[3]
        assert store.get(digests[3]) == chunk(3)


def test_a_deletion_in_mid_collection_holds_after_a_kill() -> None:
    for stop in range(1, 40):
        disk = SimDisk()
        store, digests = filled(disk, 12)
        store.delete(digests[:3])
        for at, step in enumerate(store.collect(1)):
            if step.needs_sync:
                store.sync()
            if at == stop:
                break
        store.delete([digests[3]])
        disk.kill()
        disk.restart()
        assert [open_store(disk).has(d) for d in digests[:6]] == [False] * 4 + [True] * 2


def test_an_interrupted_collection_is_finished_later_without_copying_twice() -> None:
    disk = SimDisk()
    store, digests = filled(disk, 12)
    store.delete(digests[:3])
    for step in store.collect(1):
        if step.needs_sync:
            break
    store.sync()
    disk.crash()
    disk.restart()
    store = open_store(disk)
    assert store.stats().chunks == 9
    steps = collect(store)
    assert sum(step.copied_bytes for step in steps) == 0
    assert sum(step.freed_bytes for step in steps) > 3900
    assert {f.digest for f in store.verify() if not f.problem} == set(digests[3:])


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_unlinked_before_its_copies_are_durable(seed: int) -> None:
    disk = SimDisk(seed)
    store, digests = filled(disk, 12)
    store.delete(digests[:3])
    for step in store.collect(1):  # the caller does not sync: the collection does
        if step.freed_bytes:
            break
    disk.crash()
    disk.restart()
    store = open_store(disk)
    assert all(store.has(digest) for digest in digests[3:])


def test_removed_segments_hold_no_handles_for_long(tmp_path: Path) -> None:
    store = BlobStore.open(RealDisk(tmp_path), segment_bytes=SEGMENT_BYTES)
    digests = [store.put(chunk(n)) for n in range(6 * 100)]
    store.close()
    store = BlobStore.open(RealDisk(tmp_path), segment_bytes=SEGMENT_BYTES)
    store.delete(digests)
    store.sync()
    handles, syncs = len(os.listdir("/proc/self/fd")), 0
    for step in store.collect():
        assert len(os.listdir("/proc/self/fd")) <= handles + 8
        syncs += step.needs_sync
    assert syncs < 20  # one for eight segments or so, not one for each
    assert not store.dirty
    assert len(os.listdir("/proc/self/fd")) < handles - BLOB_OPEN_FILES_MAX // 2
    assert len(list((tmp_path / "blobs").glob("*.segment"))) <= 20
    store.close()


def test_tombstones_of_what_is_gone_are_not_carried_along() -> None:
    disk = SimDisk()
    store, digests = filled(disk, 600)
    store.delete(digests)
    store.close()
    store = open_store(disk)
    collect(store)
    store.close()
    assert disk.list("blobs") == []


def test_steps_are_bounded() -> None:
    store = BlobStore.open(SimDisk(), segment_bytes=1 << 20)
    digests = [store.put(n.to_bytes(4, "big") * 5000) for n in range(200)]
    store.close()
    store.delete(digests[::2])
    for step in store.collect(100_000, live_share_max=0.6):
        assert step.copied_bytes <= 100_000 + 20_000
