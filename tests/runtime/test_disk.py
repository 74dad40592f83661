"""Both disks keep the port's promises; the simulated one also breaks in the ways that it says."""

import errno
import random
import threading
from pathlib import Path

import pytest

from aspenfs.runtime.disk import RealDisk
from aspenfs.seams import Disk
from aspenfs.sim.disk import SimDisk, SimulatedCrash
from aspenfs.sim.disk_image import SECTOR


@pytest.fixture(params=["real", "simulated"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    return RealDisk(tmp_path) if request.param == "real" else SimDisk()


# --- what both keep ---


def test_written_bytes_are_read_back_and_a_read_is_short_only_at_the_end(disk: Disk) -> None:
    file = disk.open("a", create=True)
    file.pwrite(b"hello", 3)
    file.pwrite(memoryview(b"HE"), 3)
    assert file.pread(100, 0) == b"\0\0\0HEllo"
    assert file.pread(3, 2) == b"\0HE"
    assert file.pread(10, 8) == b""
    assert file.size() == 8
    file.close()
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.pread(1, 0)


def test_allocate_fills_with_zeros_and_never_shrinks(disk: Disk) -> None:
    file = disk.open("a", create=True)
    file.pwrite(b"x" * 10, 0)
    file.allocate(3_000_000)
    assert file.size() == 3_000_000
    assert file.pread(3_000_000, 0) == b"x" * 10 + bytes(2_999_990)
    file.allocate(5)
    assert file.size() == 3_000_000
    file.truncate(4)
    assert file.pread(10, 0) == b"xxxx"
    file.datasync()
    file.close()


def test_open_without_create_needs_the_file(disk: Disk) -> None:
    with pytest.raises(FileNotFoundError):
        disk.open("a")
    disk.open("a", create=True).close()
    disk.open("a").close()
    with pytest.raises(FileNotFoundError):
        disk.open("no/a", create=True)
    with pytest.raises(FileNotFoundError):
        disk.list("no")
    with pytest.raises(FileNotFoundError):
        disk.unlink("b")
    with pytest.raises(FileNotFoundError):
        disk.rename("b", "c")


def test_names_move_replace_and_go(disk: Disk) -> None:
    disk.make_directory("d/e")
    disk.make_directory("d/e")
    for name, content in (("d/b", b"1"), ("d/a", b"2")):
        file = disk.open(name, create=True)
        file.pwrite(content, 0)
        file.close()
    assert disk.list("d") == ["a", "b", "e"]
    disk.rename("d/a", "d/b")
    disk.rename("d/b", "d/e/c")
    file = disk.open("d/e/c")
    assert file.pread(9, 0) == b"2"
    disk.unlink("d/e/c")
    assert file.pread(9, 0) == b"2"
    file.close()
    assert (disk.list("d"), disk.list("d/e")) == (["e"], [])
    disk.sync_directory("d/e")
    disk.sync_directory("")
    assert disk.free_bytes() > 0


def test_real_files_are_the_owners_and_closed_on_exec(tmp_path: Path) -> None:
    disk = RealDisk(tmp_path / "root")
    disk.make_directory("")
    disk.open("a", create=True).close()
    assert (tmp_path / "root" / "a").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "root").stat().st_mode & 0o777 == 0o700


# --- power failures ---


def _sectors(data: bytes) -> list[bytes]:
    return [data[at : at + SECTOR] for at in range(0, len(data), SECTOR)]


def _synced_file(disk: SimDisk, content: bytes) -> None:
    file = disk.open("a", create=True)
    file.pwrite(content, 0)
    file.datasync()
    disk.sync_directory("")


def _after_crash(disk: SimDisk, path: str = "a") -> bytes:
    disk.crash()
    disk.restart()
    return disk.open(path).pread(1 << 20, 0)


def test_what_was_synced_survives_a_crash() -> None:
    for seed in range(20):
        disk = SimDisk(seed)
        _synced_file(disk, b"a" * 5000)
        assert _after_crash(disk) == b"a" * 5000


def test_unsynced_sectors_are_lost_torn_and_reordered_each_on_its_own() -> None:
    seen: set[tuple[int, ...]] = set()
    for seed in range(300):
        disk = SimDisk(seed)
        _synced_file(disk, b"0" * 2048)
        file = disk.open("a")
        file.pwrite(b"1" * 2048, 0)
        file.pwrite(b"2" * 1024, 512)
        found = _sectors(_after_crash(disk))
        assert all(len(set(sector)) == 1 for sector in found), "a sector is atomic"
        seen.add(tuple(sector[0] - ord("0") for sector in found))
    assert {(0, 0, 0, 0), (1, 2, 2, 1)} < seen, "nothing and everything are among the outcomes"
    assert any(image[0] == 0 and image[3] == 1 for image in seen), "the later part alone may be there"
    assert any(image[1] == 1 for image in seen), "an older version of a sector may be there"
    assert all(image[0] < 2 and image[3] < 2 for image in seen)


def test_a_size_is_lost_with_what_lies_beyond_it() -> None:
    sizes = set()
    for seed in range(100):
        disk = SimDisk(seed)
        _synced_file(disk, b"0" * 1000)
        file = disk.open("a")
        file.allocate(4000)
        file.truncate(600)
        found = _after_crash(disk)
        sizes.add(len(found))
        assert found == (b"0" * 1000 + bytes(3000))[: len(found)]
    assert sizes == {600, 1000, 4000}


def test_a_durable_truncation_does_not_give_back_what_it_cut() -> None:
    for seed in range(100):
        disk = SimDisk(seed)
        _synced_file(disk, b"0" * 2000)
        file = disk.open("a")
        file.truncate(100)
        file.allocate(2000)
        found = _after_crash(disk)
        if len(found) == 2000 and found != b"0" * 2000:
            assert found == b"0" * 100 + bytes(1900)


def test_names_without_a_directory_sync_may_or_may_not_be_there() -> None:
    seen = set()
    for seed in range(200):
        disk = SimDisk(seed)
        _synced_file(disk, b"old")
        disk.open("b", create=True).close()
        disk.rename("a", "c")
        disk.open("d", create=True).close()
        disk.sync_directory("")
        disk.unlink("d")
        disk.open("e", create=True).close()
        disk.crash()
        disk.restart()
        seen.add(tuple(disk.list("")))
    assert seen == {
        ("b", "c", "d"), ("b", "c"), ("b", "c", "d", "e"), ("b", "c", "e"),
    }  # fmt: skip


def test_a_rename_is_atomic_also_when_it_is_lost() -> None:
    seen = set()
    for seed in range(50):
        disk = SimDisk(seed)
        _synced_file(disk, b"old")
        new = disk.open("new", create=True)
        new.pwrite(b"new", 0)
        new.datasync()
        disk.sync_directory("")
        disk.rename("new", "a")
        content = _after_crash(disk)
        seen.add(content)
        assert disk.list("") == (["a"] if content == b"new" else ["a", "new"])
    assert seen == {b"old", b"new"}


def test_a_directory_that_was_not_synced_takes_its_files_with_it() -> None:
    lost = 0
    for seed in range(50):
        disk = SimDisk(seed)
        disk.make_directory("d")
        file = disk.open("d/a", create=True)
        file.pwrite(b"x", 0)
        file.datasync()
        disk.sync_directory("d")
        disk.crash()
        disk.restart()
        lost += "d" not in disk.list("")
    assert 0 < lost < 50


def test_a_kill_loses_nothing() -> None:
    disk = SimDisk()
    file = disk.open("a", create=True)
    file.pwrite(b"x" * 3000, 0)
    disk.rename("a", "b")
    disk.kill()
    disk.restart()
    assert disk.list("") == ["b"]
    assert disk.open("b").pread(5000, 0) == b"x" * 3000


def test_after_a_crash_every_call_raises_until_restart_and_old_handles_for_ever() -> None:
    disk = SimDisk()
    _synced_file(disk, b"x")
    file = disk.open("a")
    disk.crash()
    for call in (lambda: disk.open("a"), lambda: disk.list(""), lambda: file.pread(1, 0), disk.free_bytes):
        with pytest.raises(SimulatedCrash):
            call()
    disk.restart()
    with pytest.raises(SimulatedCrash):
        file.pwrite(b"y", 0)
    assert disk.open("a").pread(9, 0) == b"x"


def test_crash_at_goes_down_inside_that_operation_and_counts_like_a_run_without() -> None:
    def work(disk: SimDisk) -> None:
        disk.make_directory("d")
        file = disk.open("d/a", create=True)
        file.allocate(5000)
        file.pwrite(b"x" * 2000, 0)
        file.truncate(4000)
        file.datasync()
        disk.rename("d/a", "d/b")
        disk.sync_directory("d")
        disk.unlink("d/b")

    whole = SimDisk()
    work(whole)
    assert whole.operations == 9
    for operation in range(1, 10):
        for down_at in (SimDisk.crash_at, SimDisk.kill_at):
            disk = SimDisk(operation)
            down_at(disk, operation)
            with pytest.raises(SimulatedCrash):
                work(disk)
            assert disk.operations == operation
            disk.restart()
    disk = SimDisk()
    disk.crash_at(10)
    work(disk)


def test_equal_seeds_and_calls_give_equal_images() -> None:
    def image(seed: int) -> bytes:
        disk = SimDisk(seed)
        _synced_file(disk, b"0" * 8192)
        file = disk.open("a")
        rng = random.Random(1)
        for _ in range(30):
            file.pwrite(bytes([rng.randrange(256)]) * rng.randrange(900), rng.randrange(8000))
        return _after_crash(disk)

    assert image(7) == image(7)
    assert len({image(seed) for seed in range(10)}) > 3


# --- errors ---


def test_a_failed_datasync_loses_data_for_good_and_calls_it_clean() -> None:
    lost = 0
    for seed in range(40):
        disk = SimDisk(seed)
        _synced_file(disk, b"0" * 4096)
        file = disk.open("a")
        file.pwrite(b"1" * 4096, 0)
        disk.fail("datasync", errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            file.datasync()
        assert file.pread(4096, 0) == b"1" * 4096, "the cache still shows it"
        file.datasync()
        lost += _after_crash(disk) != b"1" * 4096
    assert lost > 20


def test_a_failed_write_leaves_a_prefix() -> None:
    disk = SimDisk()
    file = disk.open("a", create=True)
    disk.fail("pwrite", errno.EIO, at=disk.operations + 2, times=2)
    file.pwrite(b"a" * 1000, 0)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            file.pwrite(b"b" * 1000, 0)
        found = file.pread(2000, 0)
        assert found == (b"b" * found.count(b"b")).ljust(1000, b"a")
    file.pwrite(b"c" * 1000, 0)


def test_a_full_disk_takes_what_fits_and_works_again_when_space_is_freed() -> None:
    disk = SimDisk(capacity_bytes=10_000)
    disk.open("a", create=True).allocate(4_000)
    file = disk.open("b", create=True)
    with pytest.raises(OSError, match="No space") as caught:
        file.pwrite(b"x" * 7_000, 0)
    assert caught.value.errno == errno.ENOSPC
    assert (file.size(), disk.free_bytes()) == (6_000, 0)
    file.pwrite(b"y" * 6_000, 0)
    with pytest.raises(OSError, match="No space"):
        file.allocate(6_001)
    disk.unlink("a")
    assert disk.free_bytes() == 4_000
    file.allocate(10_000)
    file.truncate(0)
    assert disk.free_bytes() == 10_000


def test_a_flipped_bit_is_read_and_stays() -> None:
    disk = SimDisk()
    _synced_file(disk, b"\0" * 1000)
    disk.flip("a", 700, 3)
    expected = b"\0" * 700 + b"\x08" + b"\0" * 299
    assert disk.open("a").pread(2000, 0) == expected
    assert _after_crash(disk) == expected


def test_threads_may_share_a_disk_and_a_file(disk: Disk) -> None:
    file = disk.open("a", create=True)

    def write(worker: int) -> None:
        for turn in range(200):
            file.pwrite(bytes([worker]) * 64, (turn * 4 + worker) * 64)
            if turn % 50 == 0:
                file.datasync()

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.pread(1 << 20, 0) == b"".join(bytes([worker]) * 64 for _ in range(200) for worker in range(4))
    file.close()


def test_only_an_empty_directory_is_removed(tmp_path: Path) -> None:
    for disk in (RealDisk(tmp_path), SimDisk()):
        disk.make_directory("a/b")
        with pytest.raises(OSError, match="not empty"):
            disk.remove_directory("a")
        disk.remove_directory("a/b")
        disk.remove_directory("a")
        with pytest.raises(FileNotFoundError):
            disk.remove_directory("a")
        assert disk.list("") == []
