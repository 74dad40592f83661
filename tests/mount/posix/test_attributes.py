"""chmod(2), chown(2), set-ID bits, utimensat(2), stat(2), statvfs(3)."""

import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.places import Place
from tests.mount.posix.calls import (
    OTHER,
    USER,
    UTIME_NOW,
    UTIME_OMIT,
    as_user,
    error,
    mode_of,
    renameat2,
    touch,
    utimensat,
)

SUID, SGID, STICKY = 0o4000, 0o2000, 0o1000
COARSE_CLOCK = 5  # CLOCK_REALTIME_COARSE of linux/time.h


def owned(path: Path, uid: int, gid: int, mode: int, data: bytes = b"data") -> Path:
    touch(path, data)
    os.chown(path, uid, gid)
    os.chmod(path, mode)
    return path


# --- chmod ---


def test_chmod_sets_all_twelve_bits(here: Path) -> None:
    touch(here / "file")
    (here / "directory").mkdir()
    for path in (here / "file", here / "directory"):
        kind = stat.S_IFMT(os.stat(path).st_mode)
        for mode in (0o0000, 0o7777, 0o4755, 0o2070, 0o1777, 0o0421):
            os.chmod(path, mode)
            assert os.stat(path).st_mode == kind | mode


def test_only_the_owner_and_root_change_modes(here: Path) -> None:
    path = owned(here / "file", USER, 500, 0o666)
    assert as_user(OTHER, lambda: error(os.chmod, path, 0o600), gid=500) == "EPERM"
    assert as_user(USER, lambda: error(os.chmod, path, 0o600)) == ""
    assert error(os.chmod, path, 0o644) == ""
    assert error(os.chmod, here / "none", 0o600) == "ENOENT"
    assert error(os.chmod, path / "x", 0o600) == "ENOTDIR"


def test_set_group_id_is_dropped_by_a_chmod_of_an_owner_outside_the_group(here: Path) -> None:
    path = owned(here / "file", USER, 500, 0o755)
    as_user(USER, lambda: os.chmod(path, SGID | 0o755))
    assert mode_of(path) == 0o755
    as_user(USER, lambda: os.chmod(path, SGID | 0o755), groups=[500])
    assert mode_of(path) == SGID | 0o755
    os.chmod(path, SUID | SGID | 0o755)
    assert mode_of(path) == SUID | SGID | 0o755


def test_sticky_may_be_set_on_files_by_their_owner(here: Path) -> None:
    path = owned(here / "file", USER, USER, 0o644)
    as_user(USER, lambda: os.chmod(path, STICKY | 0o644))
    assert mode_of(path) == STICKY | 0o644


# --- chown ---


def test_only_root_gives_files_away(here: Path) -> None:
    path = owned(here / "file", USER, USER, 0o644)
    assert as_user(USER, lambda: error(os.chown, path, OTHER, -1)) == "EPERM"
    assert as_user(OTHER, lambda: error(os.chown, path, OTHER, -1)) == "EPERM"
    assert as_user(USER, lambda: error(os.chown, path, -1, 500)) == "EPERM"
    assert as_user(USER, lambda: error(os.chown, path, -1, 500), groups=[500]) == ""
    assert as_user(USER, lambda: error(os.chown, path, USER, 500), groups=[500]) == ""
    assert as_user(OTHER, lambda: error(os.chown, path, -1, OTHER)) == "EPERM"
    os.chown(path, 7, 8)
    found = os.stat(path)
    assert (found.st_uid, found.st_gid) == (7, 8)
    os.chown(path, -1, 9)
    os.chown(path, 10, -1)
    found = os.stat(path)
    assert (found.st_uid, found.st_gid) == (10, 9)
    os.chown(path, (1 << 32) - 2, (1 << 32) - 2)
    assert os.stat(path).st_uid == (1 << 32) - 2


def test_chown_clears_the_set_id_bits(here: Path) -> None:
    for mode, after in [(0o6755, 0o755), (0o6711, 0o711), (0o4644, 0o644), (0o2745, 0o2745)]:
        path = owned(here / "file", USER, 500, mode)
        os.chown(path, OTHER, -1)
        expected = after if mode != 0o2745 else mode  # without x for the group it is no set-group-ID
        assert mode_of(path) == expected, oct(mode)
    path = owned(here / "file", USER, 500, 0o6755)
    as_user(USER, lambda: os.chown(path, -1, 501), groups=[500, 501])
    assert mode_of(path) == 0o755
    (here / "directory").mkdir()
    os.chmod(here / "directory", 0o6755)
    os.chown(here / "directory", USER, 500)
    assert mode_of(here / "directory") == 0o6755, "of directories they stay"


def test_chown_to_nothing_new(here: Path) -> None:
    path = owned(here / "file", USER, 500, 0o644)
    before = os.stat(path)
    os.chown(path, -1, -1)
    os.chown(path, USER, 500)
    after = os.stat(path)
    assert (after.st_uid, after.st_gid, after.st_mtime_ns) == (USER, 500, before.st_mtime_ns)


# --- set-ID bits and data ---


@pytest.mark.parametrize("mode", [0o6777, 0o4777, 0o2777, 0o2767, 0o1777])
def test_a_write_by_another_user_clears_the_set_id_bits(place: Place, mode: int) -> None:
    """Set-group-ID without x for the group, once a mark for locking: the kernel's FUSE leaves that alone."""
    path = owned(place.path / "file", USER, 500, mode)

    def write() -> None:
        descriptor = os.open(path, os.O_WRONLY)
        os.write(descriptor, b"x")
        os.close(descriptor)

    as_user(OTHER, write)
    kept = mode & ~SUID
    if mode & 0o010 or not place.is_aspen:
        kept &= ~SGID
    assert mode_of(path) == kept
    assert path.read_bytes() == b"xata"


def test_truncation_by_another_user_clears_the_set_id_bits(here: Path) -> None:
    path = owned(here / "file", USER, 500, 0o6777)
    as_user(OTHER, lambda: os.truncate(path, 2))
    assert mode_of(path) == 0o777
    os.chmod(path, 0o6777)
    as_user(OTHER, lambda: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)))
    assert mode_of(path) == 0o777


def test_root_writes_and_the_set_id_bits_stay(here: Path) -> None:
    path = owned(here / "file", USER, 500, 0o6777)
    with path.open("r+b") as file:
        file.write(b"x")
    assert mode_of(path) == 0o6777


def test_a_mount_is_nosuid_unless_asked(place: Place) -> None:
    """docs/posix.md."""
    program = place.path / "id"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    os.chmod(program, 0o4755)

    def run() -> str:
        return subprocess.run([program, "-u"], capture_output=True, text=True, check=True).stdout.strip()

    assert as_user(USER, run) == (str(USER) if place.is_aspen else "0")


# --- times ---


def test_utimensat_keeps_nanoseconds(here: Path) -> None:
    touch(here / "file")
    for seconds, nanoseconds in [(1_000_000_000, 123_456_789), (0, 1), (2_000_000_000, 999_999_999), (-1, 5)]:
        utimensat(here / "file", (seconds, nanoseconds), (seconds + 1, nanoseconds))
        found = os.stat(here / "file")
        assert found.st_atime_ns == seconds * 10**9 + nanoseconds
        assert found.st_mtime_ns == (seconds + 1) * 10**9 + nanoseconds


def test_utime_omit_and_utime_now(here: Path) -> None:
    touch(here / "file")
    path = here / "file"
    utimensat(path, (10, 1), (20, 2))
    utimensat(path, (0, UTIME_OMIT), (30, 3))
    assert (os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns) == (10_000_000_001, 30_000_000_003)
    utimensat(path, (40, 4), (0, UTIME_OMIT))
    assert (os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns) == (40_000_000_004, 30_000_000_003)
    start = time.time_ns() - 20_000_000  # the kernel's clock for files ticks every few ms
    utimensat(path, (0, UTIME_NOW), (0, UTIME_OMIT))
    assert start <= os.stat(path).st_atime_ns <= time.time_ns()
    assert os.stat(path).st_mtime_ns == 30_000_000_003
    utimensat(path, None, None)
    assert start <= os.stat(path).st_mtime_ns <= time.time_ns()
    assert error(utimensat, path, (0, 1 << 30), (0, 0)) == "EINVAL"


def test_who_may_change_times(here: Path) -> None:
    path = owned(here / "file", USER, USER, 0o644)
    assert as_user(OTHER, lambda: error(utimensat, path, (1, 1), (1, 1))) == "EPERM"
    assert as_user(OTHER, lambda: error(utimensat, path, None, None)) == "EACCES"
    assert as_user(OTHER, lambda: error(utimensat, path, (0, UTIME_NOW), (0, UTIME_NOW))) == "EACCES"
    assert as_user(OTHER, lambda: error(utimensat, path, (0, UTIME_OMIT), (0, UTIME_OMIT))) == ""
    assert as_user(USER, lambda: error(utimensat, path, (1, 1), (1, 1))) == ""
    os.chmod(path, 0o666)
    assert as_user(OTHER, lambda: error(utimensat, path, None, None)) == ""
    assert as_user(OTHER, lambda: error(utimensat, path, (0, UTIME_NOW), (0, UTIME_OMIT))) == "EPERM"
    assert error(utimensat, here / "none", None, None) == "ENOENT"


class Times:
    """Which times of a path an operation moves: a subset of "amc", in this order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def moved_by(self, operation: Callable[[], object]) -> str:
        before = os.lstat(self.path)
        # The clock behind the times of files ticks every 1-10 ms: wait for it to move.
        start = time.clock_gettime_ns(COARSE_CLOCK)
        while time.clock_gettime_ns(COARSE_CLOCK) == start:
            pass
        operation()
        after = os.lstat(self.path)
        moved = ""
        for letter in "amc":
            old, new = (getattr(each, f"st_{letter}time_ns") for each in (before, after))
            assert new >= old, f"{letter}time went back"
            moved += letter * (new > old)
        return moved


def test_which_times_move_of_a_file(here: Path) -> None:
    path = here / "file"
    touch(path, b"data")
    times = Times(path)
    descriptor = os.open(path, os.O_RDWR)
    assert times.moved_by(lambda: os.write(descriptor, b"x")) == "mc"
    assert times.moved_by(lambda: os.pwrite(descriptor, b"", 0)) == ""
    assert times.moved_by(lambda: os.ftruncate(descriptor, 2)) == "mc"
    assert times.moved_by(lambda: os.ftruncate(descriptor, 200)) == "mc"
    assert times.moved_by(lambda: os.ftruncate(descriptor, 200)) == "mc", "ftruncate(2) to the same size"
    assert times.moved_by(lambda: os.truncate(path, 100)) == "mc"
    assert times.moved_by(lambda: os.fchmod(descriptor, 0o600)) == "c"
    assert times.moved_by(lambda: os.chown(path, USER, USER)) == "c"
    assert times.moved_by(lambda: os.link(path, here / "second")) == "c"
    assert times.moved_by(lambda: os.unlink(here / "second")) == "c"
    assert times.moved_by(lambda: os.setxattr(path, "user.x", b"y")) == "c"
    assert times.moved_by(lambda: os.removexattr(path, "user.x")) == "c"
    assert times.moved_by(lambda: os.close(os.open(path, os.O_RDWR | os.O_CREAT))) == ""
    assert times.moved_by(lambda: os.close(os.open(path, os.O_RDWR | os.O_TRUNC))) == "mc"
    assert times.moved_by(lambda: os.stat(path)) == ""
    os.close(descriptor)


def test_rename_moves_the_ctime_of_what_is_renamed_and_replaced(here: Path) -> None:
    touch(here / "a")
    before = os.stat(here / "a")
    Times(here).moved_by(lambda: os.rename(here / "a", here / "b"))
    after = os.stat(here / "b")
    assert after.st_ctime_ns > before.st_ctime_ns
    assert after.st_mtime_ns == before.st_mtime_ns
    touch(here / "victim")
    os.link(here / "victim", here / "victims other name")
    assert Times(here / "victims other name").moved_by(lambda: os.rename(here / "b", here / "victim")) == "c"


def test_which_times_move_of_a_directory(here: Path) -> None:
    parent = here / "parent"
    parent.mkdir()
    times = Times(parent)
    assert times.moved_by(lambda: touch(parent / "file")) == "mc"
    assert times.moved_by(lambda: (parent / "sub").mkdir()) == "mc"
    assert times.moved_by(lambda: (parent / "link").symlink_to("x")) == "mc"
    assert times.moved_by(lambda: os.mkfifo(parent / "fifo")) == "mc"
    assert times.moved_by(lambda: os.link(parent / "file", parent / "second")) == "mc"
    assert times.moved_by(lambda: os.rename(parent / "second", parent / "third")) == "mc"
    assert times.moved_by(lambda: renameat2(parent / "third", parent / "link", 2)) == "mc"
    assert times.moved_by(lambda: os.rename(parent / "third", here / "moved")) == "mc"
    assert times.moved_by(lambda: os.rename(here / "moved", parent / "third")) == "mc"
    assert times.moved_by(lambda: os.unlink(parent / "third")) == "mc"
    assert times.moved_by(lambda: touch(parent / "sub" / "inner")) == ""
    assert times.moved_by(lambda: touch(parent / "file", b"longer")) == ""
    assert times.moved_by(lambda: os.chmod(parent / "file", 0o600)) == ""
    assert times.moved_by(lambda: os.unlink(parent / "sub" / "inner")) == ""
    assert times.moved_by(lambda: os.rmdir(parent / "sub")) == "mc"
    assert times.moved_by(lambda: error(os.rmdir, parent / "none")) == ""
    assert times.moved_by(lambda: error(os.mkdir, parent / "file")) == ""


def test_all_times_of_something_new_are_the_same_moment(here: Path) -> None:
    start = time.time_ns() - 20_000_000
    touch(here / "file")
    (here / "directory").mkdir()
    (here / "link").symlink_to("x")
    os.mkfifo(here / "fifo")
    for name in ("directory", "link", "fifo"):
        found = os.lstat(here / name)
        assert found.st_atime_ns == found.st_mtime_ns == found.st_ctime_ns, name
        assert start <= found.st_ctime_ns <= time.time_ns()


def test_atime_moves_as_relatime_says(here: Path) -> None:
    """Only when it is not newer than mtime or ctime, or is a day old (mount(8))."""
    path = here / "file"
    touch(path, b"data")

    def read() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        # Past the page cache: files/ moves it for reads that reach the daemon (docs/posix.md).
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.read(descriptor, 10)
        os.close(descriptor)

    os.fsync(fd := os.open(path, os.O_RDONLY))
    os.close(fd)
    assert Times(path).moved_by(read) == "a", "as old as mtime"
    assert Times(path).moved_by(read) == "", "newer than mtime"
    day_ago = time.time_ns() - 25 * 3600 * 10**9
    os.utime(path, ns=(day_ago, day_ago - 10**9))
    assert Times(path).moved_by(read) == "a"


def test_atime_of_a_directory_and_of_a_symbolic_link(here: Path) -> None:
    (here / "directory").mkdir()
    touch(here / "directory" / "file")
    (here / "link").symlink_to("directory")
    assert Times(here / "directory").moved_by(lambda: os.listdir(here / "directory")) == "a"
    assert Times(here / "link").moved_by(lambda: os.readlink(here / "link")) == "a"


# --- stat ---


def test_stat_of_each_kind(here: Path) -> None:
    touch(here / "file", b"12345")
    (here / "link").symlink_to("file")
    os.mkfifo(here / "fifo")
    device = os.stat(here).st_dev
    numbers = set()
    for name, size in [("file", 5), ("link", 4), ("fifo", 0)]:
        found = os.lstat(here / name)
        assert (found.st_size, found.st_nlink, found.st_uid, found.st_gid) == (size, 1, 0, 0)
        assert found.st_dev == device
        assert found.st_blksize >= 512
        numbers.add(found.st_ino)
    assert len(numbers) == 3
    assert error(os.stat, here / "none") == "ENOENT"
    assert error(os.stat, here / "file" / "x") == "ENOTDIR"


def test_stat_needs_x_on_the_way_only(here: Path) -> None:
    (here / "closed").mkdir()
    touch(here / "closed" / "file", b"", 0)
    os.chmod(here / "closed", 0o711)
    assert as_user(USER, lambda: error(os.stat, here / "closed" / "file")) == ""
    os.chmod(here / "closed", 0o766)
    assert as_user(USER, lambda: error(os.stat, here / "closed" / "file")) == "EACCES"


def test_fstat_and_stat_agree_after_each_change(here: Path) -> None:
    path = here / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    changes: list[Callable[[], object]] = [
        lambda: os.write(descriptor, b"x" * 5000),
        lambda: os.ftruncate(descriptor, 100),
        lambda: os.chmod(path, 0o600),
        lambda: os.link(path, here / "b"),
        lambda: os.pwrite(descriptor, b"y", 1 << 30),
        lambda: os.unlink(here / "b"),
        lambda: os.utime(path, ns=(3, 4)),
    ]
    for change in changes:
        change()
        assert os.fstat(descriptor) == os.stat(path)
    os.close(descriptor)


# --- statvfs ---


def test_statvfs_is_plausible(here: Path) -> None:
    found = os.statvfs(here)
    assert found.f_namemax == 255
    assert 0 < found.f_bavail <= found.f_bfree < found.f_blocks
    assert 0 < found.f_ffree < found.f_files
    assert found.f_bsize == found.f_frsize == 4096
    descriptor = os.open(here, os.O_RDONLY)
    assert os.fstatvfs(descriptor).f_blocks == found.f_blocks
    os.close(descriptor)


def test_inodes_are_counted(place: Place) -> None:
    before = os.statvfs(place.path).f_ffree
    for number in range(10):
        touch(place.path / f"{number}")
    after = os.statvfs(place.path).f_ffree
    if place.is_aspen:  # on the machine's ext4 others make files too
        assert after == before - 10
    os.unlink(place.path / "3")
    if place.is_aspen:
        assert os.statvfs(place.path).f_ffree == before - 9


def test_df_works(here: Path) -> None:
    run = subprocess.run(["df", "-P", here], capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) == 2
    run = subprocess.run(["df", "-Pi", here], capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) == 2
