"""No space, and syncs that fail."""

import errno

import pytest

from aspenfs.blobs.format import digest_of
from aspenfs.blobs.store import BlobStore
from aspenfs.errors import NoSpace, StorageError, SyncFailed
from aspenfs.sim.disk import SimDisk

SEGMENT_BYTES = 4096


def chunk(number: int, size: int = 600) -> bytes:
    return number.to_bytes(4, "big") * (size // 4)


def open_store(disk: SimDisk) -> BlobStore:
    return BlobStore.open(disk, segment_bytes=SEGMENT_BYTES, cache_bytes=0)


def fill(store: BlobStore, size: int = 600) -> list[bytes]:
    """Puts until there is no space."""
    digests: list[bytes] = []
    while True:
        try:
            digests.append(store.put(chunk(len(digests), size)))
        except NoSpace:
            return digests


def assert_all(store: BlobStore, digests: list[bytes]) -> None:
    assert [bytes(store.get(digest)) for digest in digests] == [chunk(n) for n in range(len(digests))]
    assert all(finding.problem is None for finding in store.verify())


@pytest.mark.parametrize("capacity", range(20_000, 24_100, 257))
def test_a_full_disk_refuses_puts_and_works_again_when_space_is_freed(capacity: int) -> None:
    disk = SimDisk(capacity_bytes=capacity)
    store = open_store(disk)
    digests = fill(store)
    assert store.stats().chunks == len(digests) > 20
    assert_all(store, digests)
    with pytest.raises(NoSpace):
        store.put(chunk(len(digests)))
    disk.capacity_bytes *= 2
    digests.append(store.put(chunk(len(digests))))
    assert_all(store, digests)
    store.sync()
    disk.crash()
    disk.restart()
    store = open_store(disk)
    assert_all(store, digests)
    assert store.stats().dropped_bytes == 0


def test_large_chunks_on_a_full_disk() -> None:
    for capacity in range(100_000, 140_000, 1777):
        disk = SimDisk(capacity_bytes=capacity)
        store = BlobStore.open(disk, segment_bytes=1 << 20, cache_bytes=0)
        kept = fill(store, 30_000)
        small = store.put(b"x") if disk.free_bytes() > 100 else None
        disk.kill()
        disk.restart()
        store = BlobStore.open(disk, segment_bytes=1 << 20, cache_bytes=0)
        assert [bytes(store.get(d)) for d in kept] == [chunk(n, 30_000) for n in range(len(kept))]
        assert small is None or store.get(small) == b"x"
        assert store.stats().dropped_bytes == 0
        store.close()


def test_space_on_a_full_disk_is_given_back_by_delete_and_collect() -> None:
    disk = SimDisk(capacity_bytes=24_000)
    store = open_store(disk)
    digests = fill(store)
    store.sync()
    disk.capacity_bytes = 24_000 - disk.free_bytes()  # not one byte left
    store.delete(digests[:-2])
    assert [store.has(digest) for digest in digests] == [False] * (len(digests) - 2) + [True] * 2
    freed = sum(step.freed_bytes for step in store.collect())
    assert freed > 15_000
    assert store.put(chunk(0)) == digests[0]
    store.close()
    store = open_store(disk)
    # Deletions that found no room were written down later, or became void with their segments.
    assert [store.has(digest) for digest in digests] == [True] + [False] * (len(digests) - 3) + [True] * 2


def test_deletions_on_a_full_disk_are_written_down_when_there_is_room() -> None:
    disk = SimDisk(capacity_bytes=24_000)
    store = open_store(disk)
    digests = fill(store)
    disk.capacity_bytes -= disk.free_bytes()
    store.delete(digests[::2])
    disk.capacity_bytes += 10_000
    more = store.put(chunk(1000))
    disk.kill()
    disk.restart()
    store = open_store(disk)
    assert [store.has(digest) for digest in digests] == [bool(n % 2) for n in range(len(digests))]
    assert store.has(more)


def test_a_collection_that_finds_no_room_to_copy_changes_nothing() -> None:
    disk = SimDisk(capacity_bytes=24_000)
    store = open_store(disk)
    digests = fill(store)
    store.sync()
    disk.capacity_bytes += 1000  # for the tombstones
    store.delete(digests[1::2])
    disk.capacity_bytes -= disk.free_bytes()
    with pytest.raises(NoSpace):
        list(store.collect(live_share_max=0.9))
    kept = digests[::2]
    assert [bytes(store.get(digest)) for digest in kept] == [chunk(n) for n in range(0, len(digests), 2)]
    disk.capacity_bytes += 10_000
    assert sum(step.freed_bytes for step in store.collect(live_share_max=0.9)) > 5_000
    assert [bytes(store.get(digest)) for digest in kept] == [chunk(n) for n in range(0, len(digests), 2)]


def test_a_full_disk_can_be_opened() -> None:
    for seed in range(20):
        disk = SimDisk(seed, capacity_bytes=20_000 + 100 * seed)
        store = open_store(disk)
        digests = fill(store)
        disk.kill()
        disk.restart()
        disk.capacity_bytes -= disk.free_bytes()
        assert_all(open_store(disk), digests)


@pytest.mark.parametrize("operation", ["datasync", "sync_directory"])
def test_a_failed_sync_is_for_ever(operation: str) -> None:
    disk = SimDisk()
    store = open_store(disk)
    digest = store.put(chunk(1))
    disk.fail(operation, errno.EIO)  # type: ignore[arg-type]
    with pytest.raises(SyncFailed, match="restart"):
        store.sync()
    for again in (store.sync, lambda: store.put(chunk(2)), lambda: store.delete([digest])):
        with pytest.raises(SyncFailed):
            again()
    assert store.get(digest) == chunk(1)
    assert not store.has(digest_of(chunk(2)))
    store.close()


def test_a_failed_sync_seals_nothing() -> None:
    disk = SimDisk()
    store = open_store(disk)
    for number in range(20):
        store.put(chunk(number))
    disk.fail("datasync", errno.EIO)
    with pytest.raises(SyncFailed):
        store.sync()
    assert not [name for name in disk.list("blobs") if name.endswith(".table")]


def test_a_failed_sync_at_open_is_not_survived() -> None:
    disk = SimDisk()
    open_store(disk).put(chunk(1))
    disk.kill()
    disk.restart()
    disk.fail("datasync", errno.EIO)
    with pytest.raises(SyncFailed):
        open_store(disk)


def test_a_failed_write_leaves_the_store_usable() -> None:
    for seed in range(20):
        disk = SimDisk(seed)
        store = BlobStore.open(disk, cache_bytes=0)
        digests = [store.put(chunk(0)), store.put(chunk(1))]
        disk.fail("pwrite", errno.EIO, at=disk.operations + 1)
        if seed % 2:
            disk.fail("truncate", errno.EIO)
        with pytest.raises(StorageError):
            store.put(chunk(2, 40_000 if seed % 4 else 600))
        digests += [store.put(chunk(n)) for n in range(2, 5)]
        store.sync()
        disk.crash()
        disk.restart()
        assert_all(BlobStore.open(disk, cache_bytes=0), digests)


def test_nothing_is_appended_behind_bytes_that_could_not_be_cut_off() -> None:
    disk = SimDisk()
    store = BlobStore.open(disk, cache_bytes=0)
    store.put(chunk(0))
    for cut in (True, False):
        disk.fail("pwrite", errno.EIO)
        if not cut:
            disk.fail("truncate", errno.EIO)
        with pytest.raises(StorageError):
            store.put(chunk(1))
        store.put(chunk(2 + cut))
        assert store.stats().segments == (1 if cut else 2)


def test_a_table_that_finds_no_room_is_done_without() -> None:
    disk = SimDisk()
    store = open_store(disk)
    digests = [store.put(chunk(n)) for n in range(30)]
    disk.capacity_bytes -= disk.free_bytes()
    store.sync()
    assert not store.dirty
    tables = [name for name in disk.list("blobs") if name.endswith(".table")]
    assert [disk.open(f"blobs/{name}").size() for name in tables] == [0] * 4
    store.delete(digests[:24])
    list(store.collect())
    disk.capacity_bytes += 10_000
    store.close()
    assert [open_store(disk).has(digest) for digest in digests] == [False] * 24 + [True] * 6
