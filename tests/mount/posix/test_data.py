"""read(2), write(2) and their kin: bytes, offsets, holes, sizes, truncation."""

import fcntl
import os
import resource
from pathlib import Path

import pytest

from tests.mount.places import Place
from tests.mount.posix.calls import USER, as_user, error, fallocate, in_child, no_limit_signal, touch

RW_NEW = os.O_RDWR | os.O_CREAT
KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    "size", [0, 1, 511, 4096, 4097, 16_383, 16_384, 65_536, MIB - 1, MIB, MIB + 1, 3 * MIB + 5]
)
def test_what_is_written_is_read(here: Path, size: int) -> None:
    data = os.urandom(size)
    (here / "file").write_bytes(data)
    assert (here / "file").read_bytes() == data
    found = os.stat(here / "file")
    assert found.st_size == size
    assert found.st_blocks * 512 >= size


def test_read_at_and_behind_the_end(here: Path) -> None:
    touch(here / "file", b"12345")
    descriptor = os.open(here / "file", os.O_RDONLY)
    assert os.pread(descriptor, 100, 3) == b"45"
    assert os.pread(descriptor, 100, 5) == b""
    assert os.pread(descriptor, 100, 1 << 40) == b""
    assert os.read(descriptor, 0) == b""
    assert error(os.pread, descriptor, 1, -1) == "EINVAL"
    os.close(descriptor)


def test_lseek(here: Path) -> None:
    touch(here / "file", b"0123456789")
    descriptor = os.open(here / "file", os.O_RDWR)
    assert os.lseek(descriptor, -3, os.SEEK_END) == 7
    assert os.read(descriptor, 2) == b"78"
    assert os.lseek(descriptor, -4, os.SEEK_CUR) == 5
    assert error(os.lseek, descriptor, -1, os.SEEK_SET) == "EINVAL"
    assert error(os.lseek, descriptor, -11, os.SEEK_END) == "EINVAL"
    assert os.lseek(descriptor, 100, os.SEEK_SET) == 100, "behind the end"
    assert os.fstat(descriptor).st_size == 10, "seeking alone writes nothing"
    assert error(os.lseek, descriptor, 0, 99) == "EINVAL"
    os.close(descriptor)


def test_small_writes_at_random_places_are_kept(here: Path) -> None:
    model = bytearray()
    descriptor = os.open(here / "file", RW_NEW)
    for step in range(300):
        offset, data = step * 7919 % 60_000, bytes([step % 255 + 1]) * (step % 97 + 1)
        if len(model) < offset + len(data):
            model.extend(bytes(offset + len(data) - len(model)))
        model[offset : offset + len(data)] = data
        assert os.pwrite(descriptor, data, offset) == len(data)
        if step % 50 == 0:
            assert os.pread(descriptor, 100_000, 0) == bytes(model)
    os.close(descriptor)
    assert (here / "file").read_bytes() == bytes(model)


def test_large_writes_over_each_other(here: Path) -> None:
    model = bytearray()
    with open(here / "file", "wb+", buffering=0) as file:
        for offset, size in [(0, 200_000), (50_000, 70_000), (190_000, 300_000), (10, 20), (60_000, 16_384)]:
            data = os.urandom(size)
            model.extend(bytes(max(0, offset + size - len(model))))
            model[offset : offset + size] = data
            file.seek(offset)
            file.write(data)
        file.seek(0)
        assert file.read() == bytes(model)


def test_a_write_far_behind_the_end_leaves_a_hole(here: Path) -> None:
    far = 5 << 30
    descriptor = os.open(here / "file", RW_NEW)
    os.pwrite(descriptor, b"end", far)
    found = os.fstat(descriptor)
    assert found.st_size == far + 3
    assert found.st_blocks * 512 < MIB
    assert os.pread(descriptor, 10, 0) == bytes(10)
    assert os.pread(descriptor, 10, far - 5) == bytes(5) + b"end"
    assert os.pread(descriptor, MIB, 1 << 30) == bytes(MIB)
    os.close(descriptor)


def test_writev_and_readv(here: Path) -> None:
    descriptor = os.open(here / "file", RW_NEW)
    assert os.writev(descriptor, [b"one", b"", b"two" * 5_000, b"three"]) == 15_008
    assert os.pwritev(descriptor, [b"O", b"N"], 0) == 2
    first, second = bytearray(5), bytearray(7)
    assert os.preadv(descriptor, [first, second], 0) == 12
    assert bytes(first + second) == b"ONetwotwotwo"
    os.close(descriptor)


def test_o_append_ignores_the_offset(here: Path) -> None:
    touch(here / "file", b"begin")
    descriptor = os.open(here / "file", os.O_RDWR | os.O_APPEND)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, b"-a")
    os.pwrite(descriptor, b"-b", 0)  # pwrite(2), BUGS: Linux appends here too
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == 7
    (here / "other").write_bytes(b"")
    other = os.open(here / "file", os.O_WRONLY)
    os.pwrite(other, b"-far", 20)
    os.close(other)
    os.write(descriptor, b"-c")
    os.close(descriptor)
    assert (here / "file").read_bytes() == b"begin-a-b" + bytes(11) + b"-far-c"


def test_o_append_may_be_switched_on_and_off(here: Path) -> None:
    touch(here / "file", b"begin")
    descriptor = os.open(here / "file", os.O_RDWR)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_APPEND)
    os.write(descriptor, b"+")
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    os.pwrite(descriptor, b"B", 0)
    os.close(descriptor)
    assert (here / "file").read_bytes() == b"Begin+"


@pytest.mark.parametrize("access", [os.O_RDWR, os.O_WRONLY])
def test_o_append_of_open_may_be_switched_off(here: Path, access: int) -> None:
    touch(here / "file", b"begin")
    descriptor = os.open(here / "file", access | os.O_APPEND)
    os.write(descriptor, b"+")
    fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
    os.pwrite(descriptor, b"B", 0)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    os.pwrite(descriptor, b"-", 0)
    os.close(descriptor)
    assert (here / "file").read_bytes() == b"Begin+-"


def test_processes_that_append_never_overwrite_each_other(here: Path) -> None:
    touch(here / "log")

    def append(who: int) -> None:
        descriptor = os.open(here / "log", os.O_WRONLY | os.O_APPEND)
        for number in range(200):
            os.write(descriptor, f"{who} {number:04d} {'x' * (number % 50)}\n".encode())
        os.close(descriptor)

    children = []
    for who in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                append(who)
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    lines = (here / "log").read_text().splitlines()
    assert len(lines) == 800
    for who in range(4):
        numbers = [int(line.split()[1]) for line in lines if line.startswith(f"{who} ")]
        assert numbers == list(range(200))


def test_another_descriptor_sees_a_write_at_once(here: Path) -> None:
    touch(here / "file", b"old")
    reading = os.open(here / "file", os.O_RDONLY)
    assert os.pread(reading, 10, 0) == b"old"
    writing = os.open(here / "file", os.O_WRONLY)
    os.write(writing, b"newer")
    assert os.pread(reading, 10, 0) == b"newer"
    assert os.fstat(reading).st_size == 5
    os.ftruncate(writing, 2)
    assert os.pread(reading, 10, 0) == b"ne"
    os.close(reading)
    os.close(writing)


# --- truncate ---


@pytest.mark.parametrize("size", [0, 1, 99, 4096, 20_000, 100_000, 2 * MIB])
@pytest.mark.parametrize("wanted", [0, 1, 50, 4095, 16_384, 99_999, 3 * MIB])
def test_truncate_cuts_or_extends_with_zeros(here: Path, size: int, wanted: int) -> None:
    data = os.urandom(size)
    touch(here / "file", data)
    os.truncate(here / "file", wanted)
    assert os.stat(here / "file").st_size == wanted
    assert (here / "file").read_bytes() == data[:wanted] + bytes(max(0, wanted - size))


def test_what_truncate_cut_does_not_come_back(here: Path) -> None:
    for size in (100, 30_000, MIB):
        touch(here / "file", b"s" * size)
        os.truncate(here / "file", 10)
        os.truncate(here / "file", size)
        assert (here / "file").read_bytes() == b"s" * 10 + bytes(size - 10)
        descriptor = os.open(here / "file", os.O_WRONLY)
        os.ftruncate(descriptor, 5)
        os.pwrite(descriptor, b"!", 50)
        os.close(descriptor)
        assert (here / "file").read_bytes() == b"s" * 5 + bytes(45) + b"!"


def test_truncate_gives_the_blocks_back(here: Path) -> None:
    touch(here / "file", b"x" * MIB)
    assert os.stat(here / "file").st_blocks >= 2048
    os.truncate(here / "file", 4096)
    assert os.stat(here / "file").st_blocks <= 16
    os.truncate(here / "file", 100 * MIB)
    assert os.stat(here / "file").st_blocks <= 16, "extending allocates nothing"


def test_truncating_a_file_of_many_pieces(here: Path) -> None:
    descriptor = os.open(here / "file", RW_NEW)
    for number in range(400):
        os.pwrite(descriptor, b"piece", number * 10_000)
    os.ftruncate(descriptor, 15_000)
    assert os.pread(descriptor, 5 * MIB, 0) == b"piece" + bytes(9_995) + b"piece" + bytes(4_995)
    os.ftruncate(descriptor, 0)
    assert os.fstat(descriptor).st_blocks == 0
    os.close(descriptor)


def test_errors_of_truncate(here: Path) -> None:
    touch(here / "file", b"data", 0o644)
    (here / "directory").mkdir()
    assert error(os.truncate, here / "none", 0) == "ENOENT"
    assert error(os.truncate, here / "directory", 0) == "EISDIR"
    assert error(os.truncate, here / "file" / "x", 0) == "ENOTDIR"
    assert error(os.truncate, here / "file", -1) == "EINVAL"
    assert as_user(USER, lambda: error(os.truncate, here / "file", 0)) == "EACCES"
    os.mkfifo(here / "fifo")
    assert error(os.truncate, here / "fifo", 0) == "EINVAL"
    assert (here / "file").read_bytes() == b"data"


# --- limits ---


def test_efbig_beyond_the_largest_file(place: Place) -> None:
    """64 TiB in files/ (docs/posix.md); 16 TiB less one block on ext4 with blocks of 4 KiB."""
    largest = 1 << 46 if place.is_aspen else (1 << 44) - 4096
    path = place.path / "file"
    descriptor = os.open(path, RW_NEW, 0o644)
    os.ftruncate(descriptor, largest)
    assert os.fstat(descriptor).st_size == largest
    assert error(os.ftruncate, descriptor, largest + 1) == "EFBIG"
    assert error(os.pwrite, descriptor, b"x", largest) == "EFBIG"
    assert os.pwrite(descriptor, b"last", largest - 4) == 4
    assert os.pread(descriptor, 10, largest - 4) == b"last"
    assert os.fstat(descriptor).st_size == largest
    os.close(descriptor)


def test_efbig_beyond_the_limit_of_the_process(here: Path) -> None:
    def write_too_much() -> tuple[int, str, str]:
        no_limit_signal()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        descriptor = os.open(here / "file", RW_NEW)
        partial = os.write(descriptor, b"x" * 3000)
        return partial, error(os.write, descriptor, b"x"), error(os.ftruncate, descriptor, 2000)

    assert in_child(write_too_much) == (1000, "EFBIG", "EFBIG")
    assert os.stat(here / "file").st_size == 1000


# --- allocation and copies ---


def test_posix_fallocate_extends_and_keeps_the_data(place: Place) -> None:
    """docs/posix.md: glibc writes a zero into each block, so files/ has the size but reserves no space."""
    touch(place.path / "file", b"data")
    descriptor = os.open(place.path / "file", os.O_RDWR)
    os.posix_fallocate(descriptor, 0, 100_000)
    found = os.fstat(descriptor)
    assert found.st_size == 100_000
    assert (found.st_blocks * 512 >= 90_000) == (not place.is_aspen)
    assert os.pread(descriptor, 200_000, 0) == b"data" + bytes(99_996)
    os.close(descriptor)


def test_fallocate_itself_is_not_carried(place: Place) -> None:
    """docs/posix.md: pyfuse3 has no fallocate; programs that ask fall back to writing."""
    descriptor = os.open(place.path / "file", RW_NEW)
    keep_size, punch_hole = 1, 2
    expected = "EOPNOTSUPP" if place.is_aspen else ""
    assert error(fallocate, descriptor, 0, 0, 4096) == expected
    assert error(fallocate, descriptor, keep_size, 0, 8192) == expected
    assert error(fallocate, descriptor, keep_size | punch_hole, 0, 4096) == expected
    assert os.fstat(descriptor).st_size == (0 if place.is_aspen else 4096)
    os.close(descriptor)


def test_seek_hole_and_data_see_only_data(place: Place) -> None:
    """docs/posix.md: correct, but not sparse."""
    descriptor = os.open(place.path / "file", RW_NEW)
    os.ftruncate(descriptor, MIB)
    os.pwrite(descriptor, b"x" * 4096, MIB)
    end = MIB + 4096
    assert os.lseek(descriptor, 0, os.SEEK_DATA) == (0 if place.is_aspen else MIB)
    assert os.lseek(descriptor, MIB, os.SEEK_HOLE) == end
    assert error(os.lseek, descriptor, end, os.SEEK_DATA) == "ENXIO"
    assert error(os.lseek, descriptor, end, os.SEEK_HOLE) == "ENXIO"
    os.close(descriptor)


def test_sendfile_splice_and_copy_file_range(here: Path) -> None:
    data = os.urandom(300_000)
    touch(here / "source", data)
    source = os.open(here / "source", os.O_RDONLY)
    target = os.open(here / "target", RW_NEW)
    sent = 0
    while sent < 100_000:
        sent += os.sendfile(target, source, sent, 100_000 - sent)
    while sent < 200_000:
        sent += os.copy_file_range(source, target, 200_000 - sent, sent, sent)
    reader, writer = os.pipe()
    while sent < 300_000:
        moved = os.splice(source, writer, min(60_000, 300_000 - sent), offset_src=sent)
        while moved:
            out = os.splice(reader, target, moved, offset_dst=sent)
            moved, sent = moved - out, sent + out
    for descriptor in (source, target, reader, writer):
        os.close(descriptor)
    assert (here / "target").read_bytes() == data


def test_copy_file_range_to_another_file_system_is_exdev(here: Path) -> None:
    """So cp(1) and its kin fall back to reading and writing."""
    touch(here / "source", b"data" * 1000)
    source = os.open(here / "source", os.O_RDONLY)
    target = os.memfd_create("target")
    assert error(os.copy_file_range, source, target, 4000) == "EXDEV"
    os.close(source)
    os.close(target)


# --- telling the disk ---


def test_fsync_and_its_kin_succeed(here: Path) -> None:
    descriptor = os.open(here / "file", RW_NEW)
    os.write(descriptor, b"data")
    os.fsync(descriptor)
    os.fdatasync(descriptor)
    os.close(descriptor)
    directory = os.open(here, os.O_RDONLY)
    os.fsync(directory)
    os.fdatasync(directory)
    os.close(directory)
    reading = os.open(here / "file", os.O_RDONLY)
    os.fsync(reading)
    os.close(reading)


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
def test_synchronous_writes(here: Path, flag: int) -> None:
    descriptor = os.open(here / "file", RW_NEW | flag)
    for number in range(5):
        assert os.write(descriptor, f"{number}\n".encode() * 1000) == 2000
    os.close(descriptor)
    assert os.stat(here / "file").st_size == 10_000
