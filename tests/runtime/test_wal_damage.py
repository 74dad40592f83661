"""Damage of what had been durable is refused, with file and offset; a torn tail is cut."""

import errno
import random

import pytest
from crc32c import crc32c

from aspenfs.errors import Corrupt, NoSpace, StorageError, SyncFailed
from aspenfs.runtime.wal import Kind, Wal, verify
from aspenfs.runtime.wal_format import FIRST_FRAME, FRAME_HEADER_BYTES, segment_name
from aspenfs.sim.disk import SimDisk
from tests.runtime.wal_driver import CLUSTER, Driver, open_wal

SMALL = 4096


def _synced_log() -> SimDisk:
    """Three segments, all synced, the last frame being the mark that says so."""
    disk = SimDisk()
    wal = open_wal(disk, segment_bytes=SMALL)
    for index in range(1, 20):
        wal.append(Kind.ENTRY, 1, index, b"%d" % index * (index * 11 % 190))
        if index == 8:
            wal.save_hard_state(2, b"me")
    wal.append(Kind.ENTRY, 1, 20, b"last" * 300)
    wal.append(Kind.ENTRY, 1, 21, b"last" * 300)
    wal.sync()
    disk.kill()
    disk.restart()
    return disk


def _used(disk: SimDisk) -> dict[str, int]:
    return {segment.name: segment.used_bytes for segment in verify(disk, "wal").segments}


def _images(disk: SimDisk) -> dict[str, bytes]:
    return {name: disk.open(f"wal/{name}").pread(1 << 20, 0) for name in disk.list("wal")}


def test_a_flipped_bit_anywhere_in_a_synced_log_is_refused_with_file_and_offset() -> None:
    disk = _synced_log()
    used = _used(disk)
    before = _images(disk)
    assert len(used) == 3
    rng = random.Random(1)
    mark = max(used)
    for name, end in used.items():
        # The header's unused rest and the last mark, behind which there is nothing, do not count.
        # Steps of 3 meet every byte of a frame header, as frames start at multiples of 8.
        places = [*range(56), *range(FIRST_FRAME, end - FRAME_HEADER_BYTES * (name == mark), 3)]
        for offset in places:
            bit = rng.randrange(8)
            disk.flip(f"wal/{name}", offset, bit)
            with pytest.raises(
                Corrupt, match=rf"^{name}: corrupt at offset \d+: .*; restore .* or rejoin"
            ) as caught:
                open_wal(disk, segment_bytes=SMALL)
            assert caught.value.file == name
            # The frame that does not hold starts at or before the bit; a frame here is under 1300 bytes.
            assert 0 <= offset - caught.value.offset < 1300, (name, offset)
            assert verify(disk, "wal").problem == str(caught.value)
            disk.flip(f"wal/{name}", offset, bit)
    assert _images(disk) == before, "a refused log is left as it was"
    assert open_wal(disk, segment_bytes=SMALL).last_index == 21


def test_a_flipped_bit_in_the_last_mark_costs_nothing() -> None:
    for offset in range(FRAME_HEADER_BYTES):
        disk = _synced_log()
        name, end = max(_used(disk).items())
        disk.flip(f"wal/{name}", end - FRAME_HEADER_BYTES + offset, 1)
        assert open_wal(disk, segment_bytes=SMALL).last_index == 21


def test_lost_sectors_of_a_synced_log_are_refused() -> None:
    disk = _synced_log()
    for name, end in _used(disk).items():
        for sector in range(FIRST_FRAME, end - FRAME_HEADER_BYTES, 512):
            file = disk.open(f"wal/{name}")
            kept = file.pread(512, sector)
            if name == max(_used(disk)) and sector + 512 >= end - FRAME_HEADER_BYTES:
                continue  # takes the mark with it
            file.pwrite(bytes(512), sector)
            with pytest.raises(Corrupt, match=rf"^{name}: corrupt at offset \d+"):
                open_wal(disk, segment_bytes=SMALL)
            file.pwrite(kept, sector)
    assert open_wal(disk, segment_bytes=SMALL).last_index == 21


def test_a_missing_or_shortened_segment_is_refused_by_name() -> None:
    disk = _synced_log()
    disk.unlink(f"wal/{segment_name(2)}")
    with pytest.raises(Corrupt, match=rf"{segment_name(2)}: .* the file is missing"):
        open_wal(disk, segment_bytes=SMALL)
    disk = _synced_log()
    disk.open(f"wal/{segment_name(2)}").truncate(2000)
    with pytest.raises(Corrupt, match=rf"{segment_name(2)}: corrupt at offset 2000: .* cut off"):
        open_wal(disk, segment_bytes=SMALL)
    disk = _synced_log()
    disk.open(f"wal/{segment_name(3)}").truncate(30)
    with pytest.raises(Corrupt, match=f"{segment_name(3)}.*header is cut off"):
        open_wal(disk, segment_bytes=SMALL)


def test_swapped_segments_are_refused() -> None:
    disk = _synced_log()
    disk.rename(f"wal/{segment_name(1)}", "wal/x")
    disk.rename(f"wal/{segment_name(2)}", f"wal/{segment_name(1)}")
    disk.rename("wal/x", f"wal/{segment_name(2)}")
    with pytest.raises(Corrupt, match="holds segment 2, not 1"):
        open_wal(disk, segment_bytes=SMALL)


def test_damage_in_a_tail_that_was_never_synced_is_cut() -> None:
    for place in range(400):
        disk = SimDisk()
        wal = open_wal(disk)
        wal.append(1, 1, 1, b"one")
        wal.sync()
        start = verify(disk, "wal").segments[0].used_bytes
        for index in range(2, 7):
            wal.append(1, 1, index, b"x" * 33)
        disk.flip(f"wal/{segment_name(1)}", start + place, place % 8)
        disk.kill()
        disk.restart()
        wal = open_wal(disk)
        assert wal.last_index == 1 + place // 80, "cut before the damaged frame"
        wal.append(1, 1, wal.last_index + 1, b"y" * 33)
        wal.sync()
        last = wal.last_index
        wal.close()
        frames = list(open_wal(disk).replay(1))
        assert [frame.index for frame in frames] == list(range(1, last + 1))
        assert frames[-1].payload == b"y" * 33


def test_a_frame_written_after_a_sync_convicts_damage_before_it() -> None:
    disk = SimDisk()
    wal = open_wal(disk)
    for index in (1, 2, 3):
        wal.append(1, 1, index, b"x" * 100)
    wal.sync()
    wal.append(1, 1, 4, b"unsynced")
    disk.flip(f"wal/{segment_name(1)}", 900, 0)
    disk.kill()
    disk.restart()
    with pytest.raises(
        Corrupt, match=r"corrupt at offset 872: .* offset 1016 shows that it had been written and synced"
    ):
        open_wal(disk)


def test_a_newer_format_is_refused_without_calling_it_damage() -> None:
    disk = _synced_log()
    file = disk.open(f"wal/{segment_name(1)}")
    header = bytearray(file.pread(52, 0))
    header[8] = 2
    file.pwrite(bytes(header) + crc32c(bytes(header)).to_bytes(4, "little"), 0)
    with pytest.raises(StorageError, match="format version 2 is not known") as caught:
        open_wal(disk)
    assert not isinstance(caught.value, Corrupt)


# --- failing calls ---


def test_a_failed_fdatasync_ends_the_log() -> None:
    disk = SimDisk(3)
    wal = open_wal(disk)
    wal.append(1, 1, 1, b"a")
    wal.sync()
    wal.append(1, 1, 2, b"b")
    disk.fail("datasync", errno.EIO)
    with pytest.raises(SyncFailed, match="fdatasync of the log failed"):
        wal.sync()
    for call in (
        lambda: wal.append(1, 1, 3, b"c"),
        lambda: wal.append_many([(1, 1, 3, b"c")]),
        lambda: wal.save_hard_state(2, b""),
        lambda: wal.truncate_after(1),
        lambda: wal.trim(1),
        wal.sync,
    ):
        with pytest.raises(SyncFailed):
            call()
    wal.close()
    disk.crash()
    disk.restart()
    assert open_wal(disk).last_index in (1, 2)


def test_a_failed_fdatasync_while_opening_is_a_sync_failure() -> None:
    disk = _synced_log()
    for nth in range(1, 5):
        disk.fail("datasync", errno.EIO, at=disk.operations + nth)
        with pytest.raises(SyncFailed):
            open_wal(disk, segment_bytes=SMALL)
        disk.heal()
    assert open_wal(disk, segment_bytes=SMALL).last_index == 21


def test_a_failed_append_adds_nothing_and_the_next_one_takes_its_place() -> None:
    for cause, expected in ((errno.ENOSPC, NoSpace), (errno.EIO, StorageError), (errno.EDQUOT, NoSpace)):
        for seed in range(30):
            disk = SimDisk(seed)
            wal = open_wal(disk)
            wal.append(1, 1, 1, b"one")
            disk.fail("pwrite", cause)
            with pytest.raises(expected, match=r"appending to log segment 0000000000000001\.wal"):
                wal.append_many([(1, 1, 2, b"x" * 100), (1, 1, 3, b"x" * 100), (Kind.HARD_STATE, 9, 0, b"")])
            assert (wal.last_index, wal.hard_state) == (1, None)
            # The same again, but shorter: what is left of the failed one must not continue it.
            wal.append(1, 1, 2, b"x" * 100)
            disk.kill()
            disk.restart()
            wal = open_wal(disk)
            assert [frame.index for frame in wal.replay(1)] == [1, 2]
            assert wal.hard_state is None


def test_leftovers_of_a_failed_append_do_not_chain_even_if_they_could_not_be_blanked() -> None:
    for seed in range(60):
        disk = SimDisk(seed)
        wal = open_wal(disk)
        wal.append(1, 1, 1, b"one")
        disk.fail("pwrite", errno.EIO, times=2)
        with pytest.raises(StorageError):
            wal.append_many([(1, 1, index, b"x" * 100) for index in range(2, 9)])
        wal.append(1, 1, 2, b"x" * 100)
        disk.kill()
        disk.restart()
        assert [frame.index for frame in open_wal(disk).replay(1)] == [1, 2]


def _append_until_refused(wal: Wal) -> int:
    """The index of the entry for which there was no space."""
    for index in range(wal.last_index + 1, 1000):
        try:
            wal.append(1, 1, index, b"x" * 300)
        except NoSpace:
            return index
    raise AssertionError("there was space for everything")


def test_a_full_disk_refuses_appends_loses_nothing_and_goes_on_when_space_is_freed() -> None:
    disk = SimDisk(capacity_bytes=3 * 8192 + 1000)
    wal = open_wal(disk)
    index = _append_until_refused(wal)
    assert wal.last_index == index - 1 > 50
    assert wal.short_of_space
    wal.save_hard_state(7, b"me")  # has room of its own
    wal.sync()
    with pytest.raises(NoSpace):
        wal.append(1, 1, index, b"x" * 300)
    wal.close()
    wal = open_wal(disk)
    assert (wal.last_index, wal.hard_state, wal.short_of_space) == (index - 1, (7, b"me"), True)
    disk.capacity_bytes *= 2
    wal.sync()
    for _ in range(20):
        wal.append(1, 1, wal.last_index + 1, b"x" * 300)
    assert not wal.short_of_space
    wal.sync()
    disk.crash()
    disk.restart()
    assert [frame.index for frame in open_wal(disk).replay(1)] == list(range(1, index + 20))


def test_trimming_makes_room_on_a_full_disk() -> None:
    disk = SimDisk(capacity_bytes=3 * 8192 + 1000)
    wal = open_wal(disk)
    for _ in range(10):
        index = _append_until_refused(wal)
        wal.sync()
        wal.trim(index)
        wal.append(1, 1, index, b"x" * 300)
    assert wal.last_index == index > 200


def _work_with_a_fault(seed: int, operation: int, call: str) -> None:
    disk = SimDisk(seed * 7919 + operation)
    driver = Driver(disk, random.Random(seed))
    driver.open()
    disk.fail(call, errno.ENOSPC if call == "allocate" else errno.EIO, at=operation)  # type: ignore[arg-type]
    for _ in range(40):
        issued = len(driver.steps)
        try:
            driver.work(1)
        except SyncFailed:
            break
        except (NoSpace, StorageError):
            del driver.steps[issued:]
    disk.kill()
    disk.restart()
    driver.check_found(killed=True)


@pytest.mark.parametrize("call", ["pwrite", "allocate", "rename", "unlink", "truncate", "open"])
def test_a_failing_call_at_every_operation_loses_nothing(call: str) -> None:
    for seed in range(3):
        for operation in range(1, 80):
            _work_with_a_fault(seed, operation, call)


@pytest.mark.parametrize("call", ["datasync", "sync_directory"])
def test_a_failing_sync_at_every_operation_keeps_what_had_been_synced(call: str) -> None:
    ended = 0
    for seed in range(4):
        for operation in range(1, 90):
            disk = SimDisk(seed * 7919 + operation)
            driver = Driver(disk, random.Random(seed))
            disk.fail(call, errno.EIO, at=operation)  # type: ignore[arg-type]
            try:
                driver.open()
                driver.work(40)
            except StorageError:
                ended += 1
                if driver.wal is not None:
                    with pytest.raises(SyncFailed):
                        driver.wal.sync()
            disk.crash()
            disk.restart()
            driver.check_found(killed=False)
    assert ended > 100


def test_nothing_happens_to_a_log_of_which_the_disk_can_not_be_read() -> None:
    disk = _synced_log()
    before = _images(disk)
    disk.fail("pread", errno.EIO, at=disk.operations)
    with pytest.raises((OSError, StorageError)):
        Wal.open(disk, "wal", CLUSTER, segment_bytes=SMALL, background=False)
    assert _images(disk) == before
