"""The log without faults: what is appended is there, also after trimming, rolling and reopening."""

import errno
import itertools
import json
import threading
import time
from pathlib import Path

import pytest

from aspenfs.errors import Closed, StorageError, TxnTooLarge
from aspenfs.limits import WAL_FRAME_BYTES_MAX
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.wal import Kind, Wal, verify
from aspenfs.runtime.wal_format import FIRST_FRAME, segment_name
from aspenfs.sim.disk import SimDisk
from tests.runtime.wal_driver import CLUSTER, SEGMENT_BYTES, open_wal
from tools.inspect_wal import main as inspect


def _fill(wal: Wal, count: int, *, size: int = 300, term: int = 1) -> None:
    for index in range(wal.last_index + 1, wal.last_index + 1 + count):
        wal.append(Kind.ENTRY, term, index, index.to_bytes(4, "big") * (size // 4))


def _indices(wal: Wal, from_index: int | None = None) -> list[int]:
    return [frame.index for frame in wal.replay(wal.first_index if from_index is None else from_index)]


def _segments(disk: SimDisk) -> list[str]:
    return [name for name in disk.list("wal") if name != "spare.wal"]


def test_a_new_log_is_empty_and_goes_on_with_entry_1() -> None:
    disk = SimDisk()
    for _ in range(2):
        wal = open_wal(disk)
        assert (wal.first_index, wal.last_index, wal.synced_index, wal.hard_state) == (1, 0, 0, None)
        assert list(wal.replay(1)) == []
        assert wal.sync() == 0
        wal.close()


def test_entries_of_every_size_come_back_with_kind_term_payload_and_place() -> None:
    disk = SimDisk()
    wal = Wal.open(disk, "deep/er/wal", CLUSTER, segment_bytes=16 << 20, background=False)
    sizes = [*range(20), 511, 512, 1 << 20, 3_333_333, WAL_FRAME_BYTES_MAX, 5]
    expected = []
    for index, size in enumerate(sizes, 1):
        kind = Kind.CONFIGURATION if index % 3 == 0 else Kind.ENTRY
        payload = bytes([index]) * size
        wal.append(kind, index // 5, index, payload)
        expected.append((kind, index // 5, index, payload))
    for _ in range(2):
        frames = list(wal.replay(1))
        assert [frame[:4] for frame in frames] == expected
        places = [(frame.segment, frame.offset) for frame in frames]
        assert places == sorted(set(places))
        assert [frame.index for frame in wal.replay(23)] == [23, 24, 25, 26]
        wal.close()
        wal = Wal.open(disk, "deep/er/wal", CLUSTER, segment_bytes=16 << 20, background=False)


def test_append_many_writes_entries_and_hard_state_with_one_write() -> None:
    disk = SimDisk()
    wal = open_wal(disk)
    _fill(wal, 1)
    before = disk.operations
    wal.append_many([(Kind.HARD_STATE, 7, 0, b"node-2"), (1, 7, 2, b"a"), (1, 7, 3, b"b")])
    assert disk.operations == before + 1
    wal.append_many([])
    assert wal.hard_state == (7, b"node-2")
    disk.kill()
    disk.restart()
    wal = open_wal(disk)
    assert wal.hard_state == (7, b"node-2")
    assert _indices(wal) == [1, 2, 3]


def test_a_sync_is_one_fdatasync_and_none_when_nothing_was_appended() -> None:
    disk = SimDisk()
    wal = open_wal(disk)
    _fill(wal, 3)
    assert wal.synced_index == 0
    disk.fail("sync_directory", errno.EIO)
    before = disk.operations
    assert wal.sync() == 3
    assert disk.operations == before + 2, "one fdatasync, and the mark that says so"
    assert wal.synced_index == 3
    assert wal.sync() == 3
    assert disk.operations == before + 2


def test_rolling_over_happens_between_syncs_and_loses_nothing() -> None:
    disk = SimDisk()
    wal = open_wal(disk)
    _fill(wal, 100)
    assert len(_segments(disk)) > 4
    assert wal.sync() == 100
    disk.crash()
    disk.restart()
    wal = open_wal(disk)
    assert _indices(wal) == list(range(1, 101))
    assert _indices(wal, 57) == list(range(57, 101))


def test_truncated_entries_are_void_also_across_segments_and_reopening() -> None:
    disk = SimDisk()
    wal = open_wal(disk)
    _fill(wal, 60)
    wal.truncate_after(30)
    assert wal.last_index == 30
    _fill(wal, 30, term=2)
    wal.truncate_after(45)
    wal.truncate_after(45)
    _fill(wal, 20, term=3)
    expected = [1] * 30 + [2] * 15 + [3] * 20
    for _ in range(2):
        for start in (1, 29, 31, 46, 65, 66):
            assert [frame.term for frame in wal.replay(start)] == expected[start - 1 :]
        wal.close()
        wal = open_wal(disk)
    wal.truncate_after(0)
    assert (wal.first_index, wal.last_index, _indices(wal)) == (1, 0, [])


def test_truncation_lowers_what_is_known_to_be_durable() -> None:
    wal = open_wal(SimDisk())
    _fill(wal, 10)
    wal.sync()
    wal.truncate_after(6)
    _fill(wal, 3)
    assert wal.synced_index == 6
    assert wal.sync() == wal.synced_index == 9


def test_trim_drops_whole_segments_below_and_recycles_one() -> None:
    disk = SimDisk()
    wal = open_wal(disk)
    _fill(wal, 100)
    wal.trim(100)
    assert wal.first_index == 1, "nothing goes before it is synced"
    wal.sync()
    count = len(_segments(disk))
    wal.trim(60)
    assert 40 < wal.first_index <= 60
    assert len(_segments(disk)) < count
    assert "spare.wal" in disk.list("wal")
    first = wal.first_index
    disk.crash()
    disk.restart()
    wal = open_wal(disk)
    assert wal.first_index == first
    assert _indices(wal) == list(range(first, 101))
    wal.trim(1000)
    assert wal.last_index == 100
    assert len(_indices(wal)) == 101 - wal.first_index


def test_term_and_vote_outlive_the_segment_that_they_were_written_to() -> None:
    disk = SimDisk()
    wal = open_wal(disk)
    wal.save_hard_state(5, b"voted for me")
    _fill(wal, 100)
    wal.sync()
    wal.trim(100)
    assert wal.first_index > 50
    wal.close()
    assert open_wal(disk).hard_state == (5, b"voted for me")


def test_old_frames_of_recycled_segments_are_never_replayed() -> None:
    disk = SimDisk()
    for turn in range(12):
        wal = open_wal(disk)
        first = wal.first_index
        assert _indices(wal) == list(range(first, wal.last_index + 1))
        _fill(wal, 37, term=turn)
        wal.sync()
        wal.trim(wal.last_index)
        _fill(wal, 1, term=turn)
        expected = list(wal.replay(wal.first_index))
        if turn % 2:
            disk.kill()
            disk.restart()
        else:
            wal.close()
        wal = open_wal(disk)
        assert list(wal.replay(wal.first_index)) == expected
        wal.close()
    assert len(disk.list("wal")) <= 4


def test_reset_goes_on_after_any_index() -> None:
    disk = SimDisk()
    wal = open_wal(disk)
    _fill(wal, 40)
    wal.reset(1000)
    assert (wal.first_index, wal.last_index) == (1001, 1000)
    assert _indices(wal) == []
    _fill(wal, 2)
    wal.sync()
    wal.trim(1001)
    disk.crash()
    disk.restart()
    wal = open_wal(disk)
    assert (wal.first_index, _indices(wal)) == (1001, [1001, 1002])


def test_entries_that_fit_nowhere_are_refused_and_change_nothing() -> None:
    wal = open_wal(SimDisk())
    _fill(wal, 5)
    with pytest.raises(TxnTooLarge):
        wal.append(1, 1, 6, bytes(SEGMENT_BYTES))
    with pytest.raises(TxnTooLarge):
        wal.append(1, 1, 6, bytes(WAL_FRAME_BYTES_MAX + 1))
    with pytest.raises(TxnTooLarge):
        wal.append_many([(1, 1, index, bytes(1000)) for index in range(6, 20)])
    _fill(wal, 2)
    assert _indices(wal) == [1, 2, 3, 4, 5, 6, 7]


def test_a_gap_in_the_indices_is_our_mistake() -> None:
    wal = open_wal(SimDisk())
    for index in (0, 2):
        with pytest.raises(AssertionError):
            wal.append(1, 1, index, b"")
    _fill(wal, 1)
    with pytest.raises(AssertionError):
        wal.append(1, 1, 3, b"")
    with pytest.raises(AssertionError):
        wal.append_many([(1, 1, 2, b""), (1, 1, 4, b"")])
    _fill(wal, 1)
    assert _indices(wal) == [1, 2]


def test_another_clusters_log_is_refused_by_name() -> None:
    disk = SimDisk()
    open_wal(disk).close()
    with pytest.raises(StorageError, match=r"0000000000000001\.wal: this log belongs to cluster 0001"):
        Wal.open(disk, "wal", b"x" * 16, segment_bytes=SEGMENT_BYTES, background=False)


def test_a_closed_log_refuses_everything() -> None:
    disk = SimDisk()
    wal = open_wal(disk)
    _fill(wal, 3)
    wal.close()
    wal.close()
    for call in (lambda: wal.append(1, 1, 4, b""), wal.sync, lambda: wal.trim(1)):
        with pytest.raises(Closed):
            call()
    assert open_wal(disk).last_index == 3


def test_segment_size_may_change_between_openings() -> None:
    disk = SimDisk()
    for size in (8192, 16384, 4096, 65536):
        wal = open_wal(disk, segment_bytes=size)
        _fill(wal, 40)
        wal.sync()
        wal.trim(wal.last_index - 5)
        wal.close()
    assert open_wal(disk).last_index == 160


@pytest.mark.parametrize("real", [False, True])
def test_appends_syncs_and_trims_go_on_beside_each_other(real: bool, tmp_path: Path) -> None:
    disk = RealDisk(tmp_path) if real else SimDisk()
    others = threading.enumerate()  # what another test has left behind is not judged here
    wal = Wal.open(disk, "wal", CLUSTER, segment_bytes=64 << 10)
    total, failures = 4000, []
    finished = threading.Event()

    def sync() -> None:
        try:
            while not finished.is_set():
                covered = wal.last_index
                assert wal.sync() >= covered
                wal.trim(wal.synced_index - 500)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=sync) for _ in range(2)]
    for thread in threads:
        thread.start()
    _fill(wal, total)
    deadline = time.monotonic() + 20
    while wal.first_index == 1 and not failures and time.monotonic() < deadline:  # the threads were late
        _fill(wal, 10)
        total += 10
        time.sleep(0.001)
    finished.set()
    for thread in threads:
        thread.join()
    assert failures == []
    first = wal.first_index
    assert first > 1
    wal.close()
    wal = Wal.open(disk, "wal", CLUSTER, segment_bytes=64 << 10)
    for frame, index in itertools.zip_longest(wal.replay(first), range(first, total + 1)):
        assert frame.index == index
        assert frame.payload == index.to_bytes(4, "big") * 75
    wal.close()
    assert "wal-segments" not in {thread.name for thread in threading.enumerate() if thread not in others}


def test_verify_reports_segments_and_what_is_not_known_to_be_synced() -> None:
    disk = SimDisk()
    wal = open_wal(disk)
    _fill(wal, 40)
    wal.sync()
    wal.save_hard_state(3, b"v")
    _fill(wal, 1, size=40)
    disk.kill()
    disk.restart()
    before = disk.operations
    report = verify(disk, "wal", CLUSTER)
    assert disk.operations == before
    assert report.problem is None
    assert (report.first_index, report.last_index, report.hard_state) == (1, 41, (3, b"v"))
    assert report.segments[0].name == segment_name(1)
    assert sum(segment.frames for segment in report.segments) == 41 + len(report.segments) + 2
    assert report.unsynced_bytes == 40 + 48 + 80, "the mark, the vote and an entry"


def test_the_inspector_prints_every_frame_and_names_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wal = Wal.open(RealDisk(tmp_path), "wal", CLUSTER, segment_bytes=SEGMENT_BYTES)
    _fill(wal, 30)
    wal.save_hard_state(2, b"me")
    wal.close()
    assert inspect([str(tmp_path / "wal"), "--frames"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("kind=ENTRY") == 30
    assert printed.count("kind=BEGIN") == 2
    assert "entries 1..30  term and vote (2, b'me')" in printed
    assert inspect([str(tmp_path / "wal"), "--all", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[-1]["last_index"] == 30
    assert rows[-1]["problem"] is None
    path = tmp_path / "wal" / segment_name(1)
    damaged = bytearray(path.read_bytes())
    damaged[FIRST_FRAME + 400] ^= 1
    path.write_bytes(damaged)
    assert inspect([str(tmp_path / "wal")]) == 1
    assert f"{segment_name(1)}: corrupt at offset" in capsys.readouterr().out
