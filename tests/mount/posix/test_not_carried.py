"""What docs/posix.md says that pyfuse3 does not carry, and what a program meets instead."""

import array
import fcntl
import os
import tempfile

from tests.mount.places import Place
from tests.mount.posix.calls import error, syncfs, touch

FS_IOC_GETFLAGS = 0x8008_6601
FICLONE = 0x4004_9409


def test_o_tmpfile_is_refused_and_temporary_files_work(place: Place) -> None:
    failed = error(lambda: os.close(os.open(place.path, os.O_TMPFILE | os.O_RDWR, 0o600)))
    assert failed == ("EOPNOTSUPP" if place.is_aspen else "")
    with tempfile.TemporaryFile(dir=place.path) as file:
        file.write(b"data")
        file.seek(0)
        assert file.read() == b"data"
        assert os.fstat(file.fileno()).st_nlink == 0
    assert os.listdir(place.path) == []


def test_flags_of_inodes_are_not_there(place: Place) -> None:
    touch(place.path / "file")
    descriptor = os.open(place.path / "file", os.O_RDONLY)
    failed = error(fcntl.ioctl, descriptor, FS_IOC_GETFLAGS, array.array("L", [0]))
    os.close(descriptor)
    assert failed == ("ENOTTY" if place.is_aspen else "")


def test_ficlone_is_refused(place: Place) -> None:
    """ext4 has no shared extents either."""
    touch(place.path / "source", b"x" * 8192)
    source, target = (os.open(place.path / name, os.O_RDWR | os.O_CREAT) for name in ("source", "target"))
    assert error(fcntl.ioctl, target, FICLONE, source) == "EOPNOTSUPP"
    os.close(source)
    os.close(target)


def test_syncfs_returns_0(place: Place) -> None:
    touch(place.path / "file", b"data")
    descriptor = os.open(place.path, os.O_RDONLY)
    assert error(syncfs, descriptor) == ""
    os.close(descriptor)
