"""The chunk store's promises on a disk that works."""

import sys
import threading

import pytest

from aspenfs.blobs.format import digest_of
from aspenfs.blobs.index import PrefixIndex
from aspenfs.blobs.store import BlobStore
from aspenfs.errors import Busy, Corrupt, InvalidArgument, NotFound, TooLarge
from aspenfs.limits import BLOB_OPEN_FILES_MAX, CHUNK_BYTES_MAX
from aspenfs.runtime.disk import RealDisk
from aspenfs.sim.disk import SimDisk


class CoarseIndex(PrefixIndex):
    """Knows four bits of each digest: nearly all chunks share their prefix with others."""

    def add(self, prefix: int, location: int) -> None:
        super().add(prefix >> 60, location)

    def find(self, prefix: int):  # type: ignore[no-untyped-def]
        return super().find(prefix >> 60)

    def remove(self, prefix: int, location: int) -> bool:
        return super().remove(prefix >> 60, location)


def chunk(number: int, size: int = 300) -> bytes:
    return number.to_bytes(4, "little") * (size // 4)


def small(disk: SimDisk, **options: object) -> BlobStore:
    return BlobStore.open(disk, segment_bytes=4096, **options)  # type: ignore[arg-type]


def test_put_names_a_chunk_by_its_blake3_digest_and_get_gives_it_back() -> None:
    store = small(SimDisk())
    # The published BLAKE3 test vector for the input b"\x00".
    assert store.put(b"\0").hex() == "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"
    digest = store.put(chunk(1))
    assert store.get(digest) == chunk(1)
    assert store.length(digest) == 300
    assert store.has(digest)


def test_chunks_may_have_one_byte_to_the_largest_size_and_nothing_else() -> None:
    store = small(SimDisk())
    largest = bytes(CHUNK_BYTES_MAX)
    assert store.get(store.put(b"x")) == b"x"
    assert store.get(store.put(largest)) == largest
    with pytest.raises(InvalidArgument):
        store.put(b"")
    with pytest.raises(TooLarge):
        store.put(largest + b"x")


def test_put_takes_any_buffer_and_does_not_keep_it() -> None:
    store = small(SimDisk())
    buffer = bytearray(chunk(1))
    digest = store.put(memoryview(buffer)[:100])
    buffer[:] = bytes(300)
    assert store.get(digest) == chunk(1)[:100]
    assert store.put(bytearray(chunk(1)[:100])) == digest


def test_get_gives_parts_and_stops_at_the_end() -> None:
    store = small(SimDisk())
    data = bytes(range(256))
    digest = store.put(data)
    assert store.get(digest, 10, 20) == data[10:30]
    assert store.get(digest, 10) == data[10:]
    assert store.get(digest, 250, 100) == data[250:]
    assert store.get(digest, 256, 1) == b""
    assert store.get(digest, 0, 0) == b""
    for offset, size in ((-1, 5), (1, -5)):
        with pytest.raises(InvalidArgument):
            store.get(digest, offset, size)


def test_an_absent_chunk_is_not_found() -> None:
    store = small(SimDisk())
    absent = digest_of(b"absent")
    assert not store.has(absent)
    store.delete([absent])
    for ask in (store.get, store.length):
        with pytest.raises(NotFound, match=absent.hex()):
            ask(absent)


def test_an_identical_chunk_is_not_written_again() -> None:
    disk = SimDisk()
    store = small(disk)
    store.put(chunk(1))
    before, operations = store.stats(), disk.operations
    store.put(chunk(1))
    assert store.stats() == before
    assert disk.operations == operations


def test_an_identical_chunk_is_not_written_again_after_reopening() -> None:
    disk = SimDisk()
    store = small(disk)
    store.put(chunk(1))
    store.close()
    store = small(disk)
    before = store.stats()
    store.put(chunk(1))
    assert store.stats() == before
    assert before.chunks == 1


def test_a_deleted_chunk_is_gone_at_once_and_after_reopening_and_may_be_put_again() -> None:
    disk = SimDisk()
    store = small(disk)
    digests = [store.put(chunk(n)) for n in range(30)]
    assert store.get(digests[3]) == chunk(3)  # in the cache now
    store.delete(digests[:20])
    for reopened in (False, True):
        if reopened:
            store.close()
            store = small(disk)
        assert [store.has(digest) for digest in digests] == [False] * 20 + [True] * 10
        assert store.stats().chunks == 10
        with pytest.raises(NotFound):
            store.get(digests[3])
    assert store.put(chunk(3)) == digests[3]
    store.close()
    assert small(disk).get(digests[3]) == chunk(3)


def test_chunks_whose_digests_begin_alike_are_kept_apart() -> None:
    disk = SimDisk()
    store = small(disk, index=CoarseIndex())
    digests = [store.put(chunk(n)) for n in range(100)]
    store.delete(digests[::3])
    for _ in range(2):
        for number, digest in enumerate(digests):
            assert store.has(digest) == bool(number % 3)
            if number % 3:
                assert store.get(digest) == chunk(number)
        store.close()
        store = small(disk, index=CoarseIndex())


def test_a_chunk_read_in_pieces_is_read_from_the_disk_once() -> None:
    disk = SimDisk()
    store = small(disk, cache_bytes=1000)
    first, second = store.put(chunk(1)), store.put(chunk(2))
    store.get(first, 0, 100)
    disk.fail("pread", 5, times=-1)
    assert store.get(first, 100, 100) == chunk(1)[100:200]
    disk.heal()
    others = [store.put(chunk(n)) for n in range(3, 6)]
    for digest in (second, first, *others[:2]):  # the cache holds three
        store.get(digest)
    disk.fail("pread", 5, times=-1)
    assert store.get(first) == chunk(1)
    with pytest.raises(Corrupt, match="can not be read"):
        store.get(second)


def test_nothing_larger_than_the_cache_stays_in_it() -> None:
    disk = SimDisk()
    store = small(disk, cache_bytes=100)
    digest = store.put(chunk(1))
    store.get(digest)
    disk.fail("pread", 5, times=-1)
    with pytest.raises(Corrupt, match="can not be read"):
        store.get(digest)


def test_dirty_says_whether_a_sync_would_do_anything() -> None:
    disk = SimDisk()
    store = small(disk)
    said = [store.dirty]
    digests = [store.put(chunk(n)) for n in range(20)]
    said.append(store.dirty)
    store.sync()
    said.append(store.dirty)
    operations = disk.operations
    store.sync()
    assert disk.operations == operations
    store.delete(digests[:1])
    said.append(store.dirty)
    assert said == [False, True, False, True]


def test_what_was_put_before_a_sync_survives_a_power_failure() -> None:
    for seed in range(20):
        disk = SimDisk(seed)
        store = small(disk)
        digests = [store.put(chunk(n)) for n in range(40)]
        store.sync()
        disk.crash()
        disk.restart()
        store = small(disk)
        assert [bytes(store.get(digest)) for digest in digests] == [chunk(n) for n in range(40)]


def test_a_clean_close_leaves_nothing_to_scan() -> None:
    disk = SimDisk()
    store = small(disk)
    for number in range(40):
        store.put(chunk(number))
    store.close()
    operations = disk.operations
    reopened = small(disk)
    assert reopened.stats().chunks == 40
    assert disk.operations - operations <= 1  # the directory's own entry


def test_more_segments_than_file_handles(tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = BlobStore.open(RealDisk(tmp_path), segment_bytes=1024)
    count = 3 * BLOB_OPEN_FILES_MAX
    digests = [store.put(chunk(n, 1000)) for n in range(count)]
    store.sync()
    store.close()
    store = BlobStore.open(RealDisk(tmp_path), segment_bytes=1024, cache_bytes=0)
    for _ in range(2):
        assert [store.get(digest) for digest in digests] == [chunk(n, 1000) for n in range(count)]
    assert len(store._segments._opened) <= BLOB_OPEN_FILES_MAX
    store.close()


def test_sync_in_a_thread_while_chunks_are_put(tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = BlobStore.open(RealDisk(tmp_path), segment_bytes=1 << 16)
    done = threading.Event()
    failures: list[BaseException] = []

    def syncing() -> None:
        try:
            while not done.is_set():
                store.sync()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=syncing) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # between any two steps of the interpreter, not every few ms
    for thread in threads:
        thread.start()
    try:
        digests = [store.put(chunk(n, 2000)) for n in range(1500)]
        store.delete(digests[::2])
        for _ in store.collect(1 << 16):
            pass
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert failures == []
    store.close()
    store = BlobStore.open(RealDisk(tmp_path), segment_bytes=1 << 16)
    assert [store.has(digest) for digest in digests] == [False, True] * 750
    assert all(finding.problem is None for finding in store.verify())
    store.close()


def test_one_collection_at_a_time() -> None:
    store = small(SimDisk())
    digests = [store.put(chunk(n)) for n in range(40)]
    store.sync()
    store.delete(digests)
    running = store.collect(1)
    next(running)
    with pytest.raises(Busy):
        next(iter(store.collect(1)))
    running.close()  # type: ignore[attr-defined]
    before = store.stats().total_bytes
    for _ in store.collect():
        pass
    assert store.stats().total_bytes < before


def test_add_stores_what_is_not_there_and_says_so() -> None:
    store = small(SimDisk())
    digest = digest_of(chunk(1))
    assert store.add(digest, chunk(1))
    assert not store.add(digest, chunk(1))
    assert store.put(chunk(1)) == digest
    assert store.stats().chunks == 1
    with pytest.raises(InvalidArgument):
        store.add(digest_of(b""), b"")


def test_reading_once_leaves_the_cache_to_those_who_come_back() -> None:
    store = small(SimDisk(), cache_bytes=600)
    kept, passing = store.put(chunk(1)), [store.put(chunk(number)) for number in range(2, 9)]
    cached = store.get(kept)
    for digest in passing:
        assert digest_of(store.read(digest)) == digest
    assert store.get(kept) is cached
    assert store.read(kept) is cached
    with pytest.raises(NotFound):
        store.read(bytes(32))


def test_digests_gives_each_chunk_that_is_there_whatever_segment_it_lies_in() -> None:
    disk = SimDisk()
    store = small(disk)
    digests = [store.put(chunk(number)) for number in range(60)]
    store.delete(digests[:20])
    assert sorted(store.digests()) == sorted(digests[20:])
    walk = store.digests()
    assert next(walk) in digests[20:]
    store.sync()
    for _ in store.collect():
        pass
    late = store.put(chunk(99))
    assert {*walk} <= {*digests[20:], late}
    assert sorted(store.digests()) == sorted([*digests[20:], late])
    store.close()
    assert sorted(small(disk).digests()) == sorted([*digests[20:], late])
