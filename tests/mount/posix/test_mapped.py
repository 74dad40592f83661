"""mmap(2), msync(2), O_DIRECT, sync_file_range(2)."""

import mmap
import os
from pathlib import Path

import pytest

from tests.mount.posix.calls import error, in_child, sync_file_range, touch

PAGE = 4096
MIB = 1 << 20


def test_a_shared_mapping_writes_the_file(here: Path) -> None:
    touch(here / "file", b"a" * (3 * PAGE))
    descriptor = os.open(here / "file", os.O_RDWR)
    with mmap.mmap(descriptor, 3 * PAGE) as mapped:
        mapped[10:15] = b"hello"
        mapped[2 * PAGE :] = b"z" * PAGE
        assert os.pread(descriptor, 5, 10) == b"hello", "seen by read at once"
        mapped.flush()
    os.close(descriptor)
    data = (here / "file").read_bytes()
    assert data == b"a" * 10 + b"hello" + b"a" * (2 * PAGE - 15) + b"z" * PAGE


def test_munmap_and_close_alone_are_enough(here: Path) -> None:
    touch(here / "file", bytes(PAGE))
    descriptor = os.open(here / "file", os.O_RDWR)
    mapped = mmap.mmap(descriptor, PAGE)
    os.close(descriptor)
    mapped[:4] = b"kept"
    mapped.close()
    assert (here / "file").read_bytes()[:4] == b"kept"
    descriptor = os.open(here / "file", os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, PAGE) as aligned:
        assert os.preadv(descriptor, [aligned], 0) == PAGE
        assert aligned[:4] == b"kept", "it has left the page cache"
    os.close(descriptor)


def test_a_mapping_sees_writes_and_truncations(here: Path) -> None:
    touch(here / "file", b"a" * (2 * PAGE))
    descriptor = os.open(here / "file", os.O_RDWR)
    with mmap.mmap(descriptor, 2 * PAGE, prot=mmap.PROT_READ) as mapped:
        assert mapped[:3] == b"aaa"
        os.pwrite(descriptor, b"bcd", 0)
        assert mapped[:3] == b"bcd"
        os.ftruncate(descriptor, 10)
        assert mapped[8:12] == b"aa\0\0"
        os.ftruncate(descriptor, 2 * PAGE)
        assert mapped[PAGE : PAGE + 4] == bytes(4)
    os.close(descriptor)


def test_bytes_behind_the_end_of_the_last_page_are_not_written(here: Path) -> None:
    touch(here / "file", b"x" * 100)
    descriptor = os.open(here / "file", os.O_RDWR)
    with mmap.mmap(descriptor, 100) as mapped:
        mapped[99:100] = b"y"
        mapped.flush()
    assert os.fstat(descriptor).st_size == 100
    os.ftruncate(descriptor, 200)
    assert os.pread(descriptor, 200, 0) == b"x" * 99 + b"y" + bytes(100)
    os.close(descriptor)


def test_a_private_mapping_keeps_its_changes(here: Path) -> None:
    touch(here / "file", b"a" * PAGE)
    descriptor = os.open(here / "file", os.O_RDONLY)
    with mmap.mmap(descriptor, PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        mapped[:4] = b"mine"
        assert mapped[:5] == b"minea"
    os.close(descriptor)
    assert (here / "file").read_bytes() == b"a" * PAGE


def test_two_processes_share_a_mapping(here: Path) -> None:
    touch(here / "file", bytes(PAGE))

    def write() -> None:
        descriptor = os.open(here / "file", os.O_RDWR)
        with mmap.mmap(descriptor, PAGE) as mapped:
            mapped[100:105] = b"child"
        os.close(descriptor)

    descriptor = os.open(here / "file", os.O_RDWR)
    with mmap.mmap(descriptor, PAGE) as mapped:
        in_child(write)
        assert mapped[100:105] == b"child"
    os.close(descriptor)


def test_mapping_needs_the_right_open_mode(here: Path) -> None:
    touch(here / "file", b"a" * PAGE)
    reading = os.open(here / "file", os.O_RDONLY)
    writing = os.open(here / "file", os.O_WRONLY)
    assert error(mmap.mmap, reading, PAGE) == "EACCES"
    assert error(mmap.mmap, writing, PAGE, prot=mmap.PROT_READ) == "EACCES"
    os.close(reading)
    os.close(writing)


def test_a_mapping_of_an_unlinked_file_works(here: Path) -> None:
    touch(here / "file", b"a" * PAGE)
    descriptor = os.open(here / "file", os.O_RDWR)
    os.unlink(here / "file")
    with mmap.mmap(descriptor, PAGE) as mapped:
        mapped[:4] = b"gone"
        mapped.flush()
    assert os.pread(descriptor, 4, 0) == b"gone"
    os.close(descriptor)


def test_a_mapping_of_a_file_opened_to_append_writes_where_it_is_mapped(here: Path) -> None:
    """The kernel writes pages back through any open file; that it appends must not matter."""
    for size in (100, PAGE, 3 * PAGE + 17):
        touch(here / "file", b"a" * size)
        descriptor = os.open(here / "file", os.O_RDWR | os.O_APPEND)
        with mmap.mmap(descriptor, size) as mapped:
            mapped[size // 2 : size // 2 + 3] = b"bcd"
            mapped.flush()
        assert os.fstat(descriptor).st_size == size
        os.write(descriptor, b"end" * 2000)
        os.close(descriptor)
        data = (here / "file").read_bytes()
        assert data == b"a" * (size // 2) + b"bcd" + b"a" * (size - size // 2 - 3) + b"end" * 2000


def test_a_mapping_of_8_mib_written_at_random(here: Path) -> None:
    size = 8 * MIB
    model = bytearray(size)
    descriptor = os.open(here / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, size)
    with mmap.mmap(descriptor, size) as mapped:
        for step in range(500):
            at = step * 2_654_435_761 % (size - 100)
            mapped[at : at + 100] = model[at : at + 100] = bytes([step % 256]) * 100
        mapped.flush()
    os.close(descriptor)
    assert (here / "file").read_bytes() == bytes(model)


@pytest.mark.parametrize("blocks", [1, 8, 300])
def test_o_direct_reads_and_writes_aligned_blocks(here: Path, blocks: int) -> None:
    size = blocks * PAGE
    data = os.urandom(size)
    descriptor = os.open(here / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    with mmap.mmap(-1, size) as aligned:
        aligned[:] = data
        assert os.pwritev(descriptor, [aligned], 0) == size
        assert os.pwritev(descriptor, [aligned], 4 * size) == size
        aligned[:] = bytes(size)
        assert os.preadv(descriptor, [aligned], 4 * size) == size
        assert aligned[:] == data
        assert os.preadv(descriptor, [aligned], 2 * size) == size
        assert aligned[:] == bytes(size), "the hole"
    os.close(descriptor)
    assert (here / "file").read_bytes() == data + bytes(3 * size) + data


def test_o_direct_and_the_page_cache_see_each_other(here: Path) -> None:
    touch(here / "file", b"a" * PAGE)
    cached = os.open(here / "file", os.O_RDWR)
    direct = os.open(here / "file", os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, PAGE) as aligned:
        assert os.pread(cached, 1, 0) == b"a"
        aligned[:] = b"b" * PAGE
        os.pwritev(direct, [aligned], 0)
        assert os.pread(cached, 1, 0) == b"b"
        os.pwrite(cached, b"c", 0)
        os.preadv(direct, [aligned], 0)
        assert aligned[:2] == b"cb"
    os.close(cached)
    os.close(direct)


def test_sync_file_range(here: Path) -> None:
    touch(here / "file", b"a" * PAGE)
    descriptor = os.open(here / "file", os.O_RDWR)
    assert error(sync_file_range, descriptor, 0, PAGE, 7) == ""
    assert error(sync_file_range, descriptor, 0, PAGE, 64) == "EINVAL"
    os.close(descriptor)
