"""A disk that gives back other bytes than it got, or none."""

import pytest
from crc32c import crc32c

from aspenfs.blobs.format import (
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    TOMBSTONE,
    digest_of,
    encode_record_header,
    encode_tombstone,
    location_of,
    record_size,
)
from aspenfs.blobs.store import BlobStore
from aspenfs.errors import Corrupt, NotFound, NotSupported, StorageError
from aspenfs.sim.disk import SimDisk

SIZE = 1000
FIRST = "blobs/00000001.segment"
TABLE = "blobs/00000001.table"


def chunk(number: int) -> bytes:
    return bytes([number]) * SIZE


def at(record: int, byte: int = 0) -> int:
    """Offset in the first segment of a byte of its n-th record."""
    return SEGMENT_HEADER_BYTES + record * record_size(SIZE) + byte


def open_store(disk: SimDisk) -> BlobStore:
    return BlobStore.open(disk, cache_bytes=0)


def filled(disk: SimDisk, count: int = 8, *, close: bool = True) -> tuple[BlobStore, list[bytes]]:
    """Each chunk synced before the next is put, so that the synced position is never far behind."""
    store = open_store(disk)
    digests = []
    for number in range(count):
        digests.append(store.put(chunk(number)))
        store.sync()
    if close:
        store.close()
        store = open_store(disk)
    return store, digests


def lose_table(disk: SimDisk) -> None:
    disk.unlink(TABLE)
    disk.sync_directory("blobs")


@pytest.mark.parametrize("byte", [RECORD_HEADER_BYTES, RECORD_HEADER_BYTES + SIZE - 1])
def test_a_flipped_bit_in_the_data_is_found_by_get(byte: int) -> None:
    disk = SimDisk()
    store, digests = filled(disk)
    disk.flip(FIRST, at(3, byte), 5)
    with pytest.raises(Corrupt) as caught:
        store.get(digests[3], 10, 20)
    assert caught.value.file == FIRST
    assert caught.value.offset == at(3)
    assert digests[3].hex() in str(caught.value)
    assert "aspen check" in str(caught.value)
    assert [bytes(store.get(d)) for n, d in enumerate(digests) if n != 3] == [
        chunk(n) for n in range(8) if n != 3
    ]


@pytest.mark.parametrize("byte", range(0, RECORD_HEADER_BYTES, 5))
def test_a_flipped_bit_in_a_header_is_found_by_get_and_has(byte: int) -> None:
    disk = SimDisk()
    store, digests = filled(disk)
    disk.flip(FIRST, at(3, byte), 1)
    assert not store.has(digests[3])
    with pytest.raises(Corrupt, match="header"):
        store.get(digests[3])
    assert store.stats().damaged == 1
    assert store.has(digests[2])
    assert store.has(digests[4])


def test_putting_a_damaged_chunk_again_heals_it() -> None:
    disk = SimDisk()
    store, digests = filled(disk)
    disk.flip(FIRST, at(3, RECORD_HEADER_BYTES), 0)
    with pytest.raises(Corrupt):
        store.get(digests[3])
    assert not store.has(digests[3])
    store.put(chunk(3))
    assert store.get(digests[3]) == chunk(3)
    store.close()
    assert open_store(disk).get(digests[3]) == chunk(3)


def test_a_read_that_fails_for_want_of_handles_does_not_brand_the_chunk() -> None:
    disk = SimDisk()
    store, digests = filled(disk)
    disk.fail("open", 24)
    with pytest.raises(StorageError, match="open files") as caught:
        store.get(digests[3])
    assert not isinstance(caught.value, Corrupt)
    assert store.get(digests[3]) == chunk(3)
    assert store.stats().damaged == 0


def test_a_chunk_that_can_be_read_after_all_counts_as_damaged_no_longer() -> None:
    disk = SimDisk()
    store, digests = filled(disk)
    disk.fail("pread", 5)
    with pytest.raises(Corrupt, match="can not be read"):
        store.get(digests[3])
    assert not store.has(digests[3])
    assert store.get(digests[3]) == chunk(3)
    assert store.has(digests[3])
    assert store.stats().damaged == 0


def test_a_lost_or_damaged_table_is_rebuilt_from_the_segment() -> None:
    for damage in (
        lose_table,
        lambda disk: disk.flip(TABLE, 70, 0),
        lambda disk: disk.open(TABLE).truncate(60),
    ):
        disk = SimDisk()
        store, digests = filled(disk)
        store.delete(digests[:1])
        store.close()
        damage(disk)
        store = open_store(disk)
        assert [store.has(digest) for digest in digests] == [False] + [True] * 7
        assert store.stats().dropped_bytes == 0
        assert TABLE.removeprefix("blobs/") in disk.list("blobs")


def test_a_bad_header_before_valid_records_costs_that_chunk_only_and_is_reported() -> None:
    disk = SimDisk()
    _, digests = filled(disk)
    lose_table(disk)
    disk.flip(FIRST, at(3, 20), 0)
    for _ in range(2):  # by scanning, then from the rebuilt table
        store = open_store(disk)
        assert [store.has(digest) for digest in digests] == [True] * 3 + [False] + [True] * 4
        with pytest.raises(NotFound):
            store.get(digests[3])
        problems = [finding for finding in store.verify() if finding.problem]
        assert [(p.digest, p.problem.offset) for p in problems if p.problem] == [(None, at(3))]
        assert store.stats().dropped_bytes == 0


def test_bad_data_in_the_synced_part_is_damage_and_not_quietly_dropped() -> None:
    disk = SimDisk()
    _, digests = filled(disk)
    lose_table(disk)
    disk.flip(FIRST, at(3, RECORD_HEADER_BYTES), 0)
    store = open_store(disk)
    with pytest.raises(Corrupt):
        store.get(digests[3])


def test_a_torn_chunk_behind_the_synced_position_is_absent_and_those_behind_it_are_not() -> None:
    disk = SimDisk()
    store, digests = filled(disk, 4, close=False)
    digests += [store.put(chunk(n)) for n in range(4, 8)]
    disk.kill()
    disk.restart()
    disk.flip(FIRST, at(5, RECORD_HEADER_BYTES + 7), 0)
    disk.flip(FIRST, at(6, 3), 0)
    store = open_store(disk)
    assert [store.has(digest) for digest in digests] == [True] * 5 + [False] * 2 + [True]
    assert store.stats().dropped_bytes >= 2 * SIZE
    assert all(finding.problem is None for finding in store.verify())
    assert [store.put(chunk(n)) for n in (5, 6)] == digests[5:7]
    store.close()
    store = open_store(disk)
    assert [bytes(store.get(digest)) for digest in digests] == [chunk(n) for n in range(8)]


def test_records_inside_a_chunk_are_not_taken_for_records() -> None:
    """Somebody keeps a copy of a segment in the file system, and a header before it goes bad."""
    other = SimDisk()
    victim, digests = filled(other, 3, close=False)
    victim.delete(digests[:1])
    inner = other.open(FIRST)
    copy = inner.pread(inner.size(), 0)

    disk = SimDisk()
    store = open_store(disk)
    store.put(chunk(0))
    outer = store.put(copy + bytes(-len(copy) % 8))
    store.put(chunk(2))
    store.sync()
    store.put(chunk(3))
    store.close()
    lose_table(disk)
    disk.flip(FIRST, at(1, 20), 0)
    store = open_store(disk)
    assert not store.has(outer)
    assert store.has(digest_of(chunk(0)))
    assert not store.has(digest_of(chunk(1)))
    assert store.has(digest_of(chunk(2)))


def test_a_tombstone_inside_a_chunk_kills_nobody() -> None:
    """Made to hold at the very place where it will lie, and found when its chunk's header goes bad."""
    disk = SimDisk()
    store = open_store(disk)
    victim = store.put(chunk(0))
    inside = at(1, RECORD_HEADER_BYTES)
    payload = encode_tombstone(location_of(1, SEGMENT_HEADER_BYTES), SIZE)
    place = location_of(1, inside)
    fake = encode_record_header(place, TOMBSTONE, len(payload), 0, crc32c(payload), victim) + payload
    outer = store.put(fake + bytes(-len(fake) % 8))
    last = store.put(chunk(2))
    store.close()
    lose_table(disk)
    disk.flip(FIRST, at(1, 20), 0)
    store = open_store(disk)
    assert [store.has(digest) for digest in (victim, outer, last)] == [True, False, True]


def test_a_bad_segment_header_does_not_hide_its_chunks() -> None:
    disk = SimDisk()
    _, digests = filled(disk)
    lose_table(disk)
    disk.flip(FIRST, 3, 0)
    store = open_store(disk)
    assert all(store.has(digest) for digest in digests)
    assert [f.problem.offset for f in store.verify() if f.problem] == [0]


def test_a_newer_format_is_refused_with_advice() -> None:
    disk = SimDisk()
    filled(disk)[0].close()
    lose_table(disk)
    file = disk.open(FIRST)
    head = bytearray(file.pread(28, 0))
    head[8] = 2
    file.pwrite(head + crc32c(bytes(head)).to_bytes(4, "little"), 0)
    with pytest.raises(NotSupported, match="format 2"):
        open_store(disk)


def test_a_renamed_segment_is_refused_with_advice() -> None:
    disk = SimDisk()
    filled(disk)[0].close()
    disk.rename(FIRST, "blobs/00000007.segment")
    disk.unlink(TABLE)
    with pytest.raises(Corrupt, match="give it its name back"):
        open_store(disk)


def test_files_of_others_are_left_alone() -> None:
    disk = SimDisk()
    disk.make_directory("blobs")
    names = ["README", "zzzzzzzz.segment", "1.segment", "lost+found"]
    for name in names:
        disk.open(f"blobs/{name}", create=True)
    filled(disk)
    assert set(names) <= set(disk.list("blobs"))


def test_verify_reports_each_chunk_and_changes_nothing() -> None:
    disk = SimDisk()
    store, digests = filled(disk)
    disk.flip(FIRST, at(3, RECORD_HEADER_BYTES), 0)
    disk.flip(FIRST, at(5, 20), 0)
    operations = disk.operations
    findings = list(store.verify())
    assert {f.digest for f in findings if not f.problem} == {
        d for n, d in enumerate(digests) if n not in (3, 5)
    }
    assert [f.digest for f in findings if f.problem] == [digests[3], None]
    assert disk.operations == operations
    assert store.stats().damaged == 2


def test_quarantine_puts_damaged_records_aside_and_forgets_them() -> None:
    disk = SimDisk()
    store, digests = filled(disk)
    disk.flip(FIRST, at(3, RECORD_HEADER_BYTES), 0)
    disk.flip(FIRST, at(5, 20), 0)
    assert sum(f.problem is not None for f in store.verify(quarantine=True)) == 2
    assert disk.list("blobs/quarantine") == [f"00000001-{at(3):08x}", f"00000001-{at(5):08x}"]
    saved = disk.open(f"blobs/quarantine/00000001-{at(3):08x}")
    assert saved.pread(SIZE, RECORD_HEADER_BYTES) == b"\x02" + chunk(3)[1:]
    for _ in range(2):
        assert [store.has(d) for d in digests] == [n not in (3, 5) for n in range(8)]
        assert [f for f in store.verify() if f.problem] == []
        assert store.stats().damaged == 0
        store.close()
        store = open_store(disk)


def test_a_lost_stretch_keeps_its_segment_until_quarantine() -> None:
    disk = SimDisk()
    _, digests = filled(disk)
    lose_table(disk)
    disk.flip(FIRST, at(3, 20), 0)
    store = open_store(disk)
    store.delete(digests[:3] + digests[4:])
    list(store.collect())
    assert "00000001.segment" in disk.list("blobs")
    assert sum(f.problem is not None for f in store.verify(quarantine=True)) == 1
    list(store.collect())
    assert "00000001.segment" not in disk.list("blobs")
    assert disk.list("blobs/quarantine") == [f"00000001-{at(3):08x}"]


def test_collect_never_copies_a_damaged_chunk_nor_removes_it() -> None:
    disk = SimDisk()
    store, digests = filled(disk)
    disk.flip(FIRST, at(3, RECORD_HEADER_BYTES), 0)
    store.delete(digests[4:])
    list(store.collect())
    with pytest.raises(Corrupt):
        store.get(digests[3])
    assert "00000001.segment" in disk.list("blobs")
    list(store.verify(quarantine=True))
    list(store.collect())
    assert "00000001.segment" not in disk.list("blobs")
    assert [bytes(store.get(digest)) for digest in digests[:3]] == [chunk(n) for n in range(3)]
