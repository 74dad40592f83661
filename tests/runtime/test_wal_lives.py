"""Outcomes of power failures that random sweeps meet too rarely, made by hand, sector by sector.

`_lose` is what a power failure does to sectors that were written but not synced: they are as they
were before, which in fresh space is zeros.
"""

import pytest

from aspenfs.errors import Corrupt
from aspenfs.runtime.wal import Kind, Wal, verify
from aspenfs.runtime.wal_format import (
    FIRST_FRAME,
    FRAME_HEADER_BYTES,
    encode_frame,
    segment_name,
    segment_tag,
    walk_frames,
)
from aspenfs.runtime.wal_tail import PAGE_BYTES
from aspenfs.sim.disk import SimDisk, SimulatedCrash
from tests.runtime.wal_driver import CLUSTER, open_wal

SECTOR = 512


def _power_failure(disk: SimDisk) -> None:
    """Every write that `_lose` was not told of has reached the disk."""
    disk.kill()
    disk.restart()


def _lose(disk: SimDisk, segment: int, start: int, end: int) -> None:
    disk.open(f"wal/{segment_name(segment)}").pwrite(bytes(end - start), start)


def _numbers(disk: SimDisk) -> list[int]:
    return [int(segment.name[:16], 16) for segment in verify(disk, "wal").segments]


def _end(disk: SimDisk, segment: int = 1) -> int:
    return next(s.used_bytes for s in verify(disk, "wal").segments if s.name == segment_name(segment))


def _indices(wal: Wal) -> list[int]:
    return [frame.index for frame in wal.replay(wal.first_index)]


def _append(wal: Wal, count: int, *, size: int = 100) -> None:
    for index in range(wal.last_index + 1, wal.last_index + 1 + count):
        wal.append(Kind.ENTRY, 1, index, b"x" * size)


def test_a_frame_behind_a_lost_mark_does_not_come_back_when_the_same_mark_is_written_again() -> None:
    disk = SimDisk()
    wal = open_wal(disk)
    _append(wal, 1)
    # Let the mark end at a page's end: a frame behind it can survive without it, and also the
    # zeros that the log writes up to the end of a page.
    at = _end(disk)
    wal.append(Kind.ENTRY, 1, 2, b"x" * (PAGE_BYTES - at - 2 * FRAME_HEADER_BYTES))
    wal.sync()
    mark = _end(disk) - FRAME_HEADER_BYTES
    assert mark + FRAME_HEADER_BYTES == PAGE_BYTES
    _append(wal, 1)
    _power_failure(disk)
    _lose(disk, 1, mark, mark + FRAME_HEADER_BYTES)
    for _ in range(3):
        wal = open_wal(disk)
        assert _indices(wal) == [1, 2]
        _power_failure(disk)


@pytest.mark.parametrize("operation", range(1, 9))
def test_a_segment_that_lost_its_first_frame_does_not_speak_for_its_next_life(operation: int) -> None:
    """Its later frames stay on disk when it is recycled; were it given the same number, they would count."""
    disk = SimDisk()
    wal = open_wal(disk)
    while len(_numbers(disk)) < 2:
        wal.close()
        wal = open_wal(disk)  # all that is there is durable, and the second segment's frames will say so
        _append(wal, 1, size=300)
    _append(wal, 14, size=300)  # more than one page, as the log writes new pages whole
    last = wal.last_index
    first, second = _numbers(disk)
    _power_failure(disk)
    _lose(disk, second, FIRST_FRAME, 2 * SECTOR + 8)
    # The process dies at some point while it makes a spare of the segment.
    disk.kill_at(disk.operations + operation)
    with pytest.raises(SimulatedCrash):
        open_wal(disk)
    disk.restart()
    wal = open_wal(disk)
    assert wal.last_index == last - 15
    end = _end(disk, first)
    wal.save_hard_state(9, b"")
    assert _end(disk, first) == end + FRAME_HEADER_BYTES
    _append(wal, 1, size=300)  # what the former life wrote behind this one is still there
    assert _numbers(disk)[1] > second, "no number is used twice"
    _power_failure(disk)
    _lose(disk, first, end, 8192)  # the old segment's end was not synced
    assert open_wal(disk).last_index == last - 15


def test_a_spare_of_which_the_past_is_not_known_is_wiped() -> None:
    disk = SimDisk()
    disk.make_directory("wal")
    frame, _ = encode_frame(2 * SECTOR, segment_tag(CLUSTER, 1), 0, 5000, 1, Kind.MARK, 0, 0, b"")
    disk.open("wal/spare.wal", create=True).pwrite(frame + b"junk" * 1000, 2 * SECTOR)
    wal = open_wal(disk)
    assert disk.open(f"wal/{segment_name(1)}").pread(8192, FIRST_FRAME) == bytes(8192 - FIRST_FRAME)
    _append(wal, 1)
    _power_failure(disk)
    assert _indices(open_wal(disk)) == [1]


def test_what_was_synced_is_not_trimmed_on_the_word_of_an_unsynced_truncation() -> None:
    for seed in range(40):
        disk = SimDisk(seed)
        wal = open_wal(disk)
        _append(wal, 30, size=300)
        assert len(verify(disk, "wal").segments) == 2
        wal.sync()
        wal.truncate_after(10)
        wal.trim(11)
        disk.crash()
        disk.restart()
        wal = open_wal(disk)
        assert wal.last_index in (10, 30)
        assert _indices(wal) == list(range(1, wal.last_index + 1))


def test_a_truncation_during_a_sync_lowers_what_that_sync_promises() -> None:
    wal = open_wal(SimDisk())
    _append(wal, 10)

    def meanwhile() -> None:
        wal.truncate_after(6)
        _append(wal, 5)

    assert wal.sync(meanwhile) == 6
    assert wal.synced_index == 6
    assert wal.sync() == wal.synced_index == 11


def test_the_frame_at_the_end_of_a_full_segment_must_be_the_one_that_was_there() -> None:
    """A chain can hold and yet not be the one that the next segment goes on from."""
    for synced in (False, True):
        disk = SimDisk()
        wal = open_wal(disk)
        _append(wal, 1)
        if synced:
            wal.sync()
        while len(_numbers(disk)) < 2:
            _append(wal, 1, size=300)
        if synced:
            wal.sync()
        _power_failure(disk)
        last = _replace_last_frame(disk, 1)
        if synced:
            with pytest.raises(Corrupt, match=rf"{segment_name(1)}: corrupt at offset"):
                open_wal(disk)
        else:
            assert open_wal(disk).last_index == last


def _replace_last_frame(disk: SimDisk, segment: int) -> int:
    """Put another entry, properly chained, in place of a segment's last one; its index."""
    tag = segment_tag(CLUSTER, segment)
    file = disk.open(f"wal/{segment_name(segment)}")
    frame = list(walk_frames(file, tag, FIRST_FRAME, 0, 8192))[-1]
    assert frame.kind == Kind.ENTRY
    other, _ = encode_frame(
        frame.offset,
        tag,
        frame.previous,
        frame.synced,
        frame.run,
        frame.kind,
        frame.term,
        frame.index,
        b"y" * 300,
    )
    assert len(other) == frame.end - frame.offset
    file.pwrite(other, frame.offset)
    return frame.index
