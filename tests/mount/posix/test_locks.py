"""flock(2) and fcntl(2) locks between the processes of one machine, leases aside."""

import fcntl
import os
import struct
from pathlib import Path

from tests.mount.posix.calls import error, in_child, touch

F_OFD_SETLK = 37


def test_flock_excludes_other_processes(here: Path) -> None:
    touch(here / "file")
    mine = os.open(here / "file", os.O_RDWR)

    def attempt(operation: int) -> str:
        theirs = os.open(here / "file", os.O_RDWR)
        return error(fcntl.flock, theirs, operation | fcntl.LOCK_NB)

    fcntl.flock(mine, fcntl.LOCK_EX)
    assert in_child(lambda: attempt(fcntl.LOCK_EX)) == "EAGAIN"
    assert in_child(lambda: attempt(fcntl.LOCK_SH)) == "EAGAIN"
    fcntl.flock(mine, fcntl.LOCK_SH)
    assert in_child(lambda: attempt(fcntl.LOCK_SH)) == ""
    assert in_child(lambda: attempt(fcntl.LOCK_EX)) == "EAGAIN"
    fcntl.flock(mine, fcntl.LOCK_UN)
    assert in_child(lambda: attempt(fcntl.LOCK_EX)) == ""
    os.close(mine)


def test_flock_ends_with_the_last_close(here: Path) -> None:
    touch(here / "file")
    mine = os.open(here / "file", os.O_RDWR)
    second = os.dup(mine)
    other = os.open(here / "file", os.O_RDWR)
    fcntl.flock(mine, fcntl.LOCK_EX)
    os.close(mine)
    assert error(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB) == "EAGAIN"
    os.close(second)
    assert error(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB) == ""
    os.close(other)


def test_record_locks_of_ranges(here: Path) -> None:
    touch(here / "file", b"0123456789")
    mine = os.open(here / "file", os.O_RDWR)
    fcntl.lockf(mine, fcntl.LOCK_EX, 4, 2)

    def attempt(start: int, length: int) -> str:
        theirs = os.open(here / "file", os.O_RDWR)
        return error(fcntl.lockf, theirs, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)

    assert in_child(lambda: attempt(0, 2)) == ""
    assert in_child(lambda: attempt(0, 3)) == "EAGAIN"
    assert in_child(lambda: attempt(5, 1)) == "EAGAIN"
    assert in_child(lambda: attempt(6, 10)) == ""

    def holder() -> int:
        theirs = os.open(here / "file", os.O_RDWR)
        query = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        return int(struct.unpack("hhqqi", fcntl.fcntl(theirs, fcntl.F_GETLK, query)[:28])[4])

    assert in_child(holder) == os.getpid()
    os.close(os.open(here / "file", os.O_RDONLY))
    assert in_child(lambda: attempt(0, 0)) == "", "any close of the process lets go (fcntl(2))"
    os.close(mine)


def test_open_file_description_locks(here: Path) -> None:
    touch(here / "file")
    first = os.open(here / "file", os.O_RDWR)
    second = os.open(here / "file", os.O_RDWR)
    lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(first, F_OFD_SETLK, lock)
    assert error(fcntl.fcntl, second, F_OFD_SETLK, lock) == "EAGAIN"
    os.close(first)
    assert error(fcntl.fcntl, second, F_OFD_SETLK, lock) == ""
    os.close(second)
