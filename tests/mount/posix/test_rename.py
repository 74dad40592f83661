"""rename(2) and renameat2(2)."""

import os
import select
import stat
from pathlib import Path

import pytest

from tests.mount.posix.calls import (
    EXCHANGE,
    NOREPLACE,
    OTHER,
    USER,
    WHITEOUT,
    as_user,
    error,
    renameat2,
    touch,
)

SAVES, ROUNDS = 600, 50


def test_a_file_moves_within_and_between_directories(here: Path) -> None:
    touch(here / "a", b"data", 0o604)
    (here / "directory").mkdir()
    before = os.stat(here / "a")
    os.rename(here / "a", here / "b")
    os.rename(here / "b", here / "directory" / "c")
    after = os.stat(here / "directory" / "c")
    assert (after.st_ino, after.st_mode, after.st_nlink) == (before.st_ino, before.st_mode, 1)
    assert after.st_mtime_ns == before.st_mtime_ns
    assert (here / "directory" / "c").read_bytes() == b"data"
    assert os.listdir(here) == ["directory"]


def test_a_file_replaces_a_file(here: Path) -> None:
    touch(here / "old", b"old")
    touch(here / "new", b"new")
    descriptor = os.open(here / "old", os.O_RDONLY)
    os.link(here / "old", here / "second name")
    os.rename(here / "new", here / "old")
    assert (here / "old").read_bytes() == b"new"
    assert (here / "second name").read_bytes() == b"old"
    assert os.read(descriptor, 10) == b"old", "who had it open reads on"
    assert os.fstat(descriptor).st_nlink == 1
    os.close(descriptor)
    assert sorted(os.listdir(here)) == ["old", "second name"]


def test_an_open_victim_stays_readable_and_writable(here: Path) -> None:
    touch(here / "old", b"o" * 50_000)
    touch(here / "new", b"new")
    descriptor = os.open(here / "old", os.O_RDWR)
    os.rename(here / "new", here / "old")
    assert os.fstat(descriptor).st_nlink == 0
    assert os.read(descriptor, 100_000) == b"o" * 50_000
    assert os.write(descriptor, b"tail") == 4
    assert os.fstat(descriptor).st_size == 50_004
    os.close(descriptor)


def test_a_directory_replaces_an_empty_directory_only(here: Path) -> None:
    (here / "full").mkdir()
    touch(here / "full" / "file")
    (here / "empty").mkdir()
    (here / "other").mkdir()
    assert error(os.rename, here / "other", here / "full") in ("ENOTEMPTY", "EEXIST")
    number = os.stat(here / "full").st_ino
    os.rename(here / "full", here / "empty")
    assert os.stat(here / "empty").st_ino == number
    assert os.listdir(here / "empty") == ["file"]
    assert sorted(os.listdir(here)) == ["empty", "other"]


def test_an_open_directory_that_is_replaced_is_empty(here: Path) -> None:
    (here / "victim").mkdir()
    (here / "new").mkdir()
    descriptor = os.open(here / "victim", os.O_RDONLY)
    os.rename(here / "new", here / "victim")
    assert os.fstat(descriptor).st_nlink == 0
    assert error(os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor) == "ENOENT"
    os.close(descriptor)


def test_errors_of_rename(here: Path) -> None:
    touch(here / "file")
    (here / "directory").mkdir()
    touch(here / "directory" / "x")
    assert error(os.rename, here / "none", here / "new") == "ENOENT"
    assert error(os.rename, here / "file", here / "none" / "new") == "ENOENT"
    assert error(os.rename, here / "directory", here / "file") == "ENOTDIR"
    assert error(os.rename, here / "file", here / "directory") == "EISDIR"
    assert error(os.rename, here / "file" / "x", here / "new") == "ENOTDIR"
    assert error(os.rename, here / "directory", here / "file" / "x") == "ENOTDIR"
    assert error(os.rename, f"{here}/file", f"{here}/new/") == "ENOTDIR"
    assert error(os.rename, f"{here}/file/", f"{here}/new") == "ENOTDIR"
    assert error(os.rename, f"{here}/directory/.", here / "new") == "EBUSY"
    assert error(os.rename, here / "directory", f"{here}/directory/..") in ("EBUSY", "EINVAL", "ENOTEMPTY")
    assert error(os.rename, here / "file", "/dev/shm/new") == "EXDEV"
    assert sorted(os.listdir(here)) == ["directory", "file"]


def test_a_directory_cannot_move_below_itself(here: Path) -> None:
    (here / "a" / "b" / "c").mkdir(parents=True)
    assert error(os.rename, here / "a", here / "a" / "x") == "EINVAL"
    assert error(os.rename, here / "a", here / "a" / "b" / "c" / "x") == "EINVAL"
    assert error(os.rename, here / "a" / "b" / "c", here / "a" / "b") == "ENOTEMPTY"
    assert error(renameat2, here / "a", here / "a" / "b", EXCHANGE) == "EINVAL"
    assert error(renameat2, here / "a" / "b", here / "a", EXCHANGE) in ("EINVAL", "ENOTEMPTY")
    assert (here / "a" / "b" / "c").is_dir()


def test_a_name_renamed_to_itself_or_to_another_of_the_same_inode_stays(here: Path) -> None:
    touch(here / "a", b"data")
    os.link(here / "a", here / "b")
    os.rename(here / "a", here / "a")
    os.rename(here / "a", here / "b")
    assert sorted(os.listdir(here)) == ["a", "b"], "rename(2): it does nothing"
    assert os.stat(here / "a").st_nlink == 2
    (here / "d").mkdir()
    os.rename(here / "d", here / "d")
    assert (here / "d").is_dir()


def test_symbolic_links_are_renamed_themselves(here: Path) -> None:
    touch(here / "file", b"data")
    (here / "link").symlink_to("file")
    os.rename(here / "link", here / "moved")
    assert os.readlink(here / "moved") == "file"
    touch(here / "victim")
    os.rename(here / "moved", here / "victim")
    assert os.readlink(here / "victim") == "file"
    touch(here / "replacement", b"new")
    os.rename(here / "replacement", here / "victim")
    assert stat.S_ISREG(os.lstat(here / "victim").st_mode)
    assert (here / "file").read_bytes() == b"data"


def test_noreplace(here: Path) -> None:
    touch(here / "a", b"a")
    touch(here / "b", b"b")
    (here / "d").mkdir()
    assert error(renameat2, here / "a", here / "b", NOREPLACE) == "EEXIST"
    assert error(renameat2, here / "a", here / "d", NOREPLACE) == "EEXIST"
    assert error(renameat2, here / "d", here / "b", NOREPLACE) == "EEXIST"
    assert error(renameat2, here / "none", here / "new", NOREPLACE) == "ENOENT"
    assert error(renameat2, here / "a", here / "new", NOREPLACE) == ""
    assert ((here / "new").read_bytes(), (here / "b").read_bytes()) == (b"a", b"b")


@pytest.mark.parametrize("apart", [False, True])
def test_exchange(here: Path, apart: bool) -> None:
    (here / "there").mkdir()
    other = here / "there" if apart else here
    touch(here / "file", b"f")
    touch(other / "file2", b"f2")
    (here / "directory" / "sub").mkdir(parents=True)
    (here / "link").symlink_to("target")
    numbers = {os.lstat(here / "file").st_ino, os.lstat(other / "file2").st_ino}
    renameat2(here / "file", other / "file2", EXCHANGE)
    assert ((here / "file").read_bytes(), (other / "file2").read_bytes()) == (b"f2", b"f")
    assert {os.lstat(here / "file").st_ino, os.lstat(other / "file2").st_ino} == numbers
    links, other_links = os.stat(here).st_nlink, os.stat(other).st_nlink
    renameat2(here / "directory", other / "file2", EXCHANGE)
    assert (here / "directory").read_bytes() == b"f"
    assert os.listdir(other / "file2") == ["sub"]
    if apart:
        assert (os.stat(here).st_nlink, os.stat(other).st_nlink) == (links - 1, other_links + 1)
        assert os.stat(other / "file2" / "..").st_ino == os.stat(other).st_ino
    renameat2(other / "file2", here / "link", EXCHANGE)
    assert os.readlink(other / "file2") == "target"
    assert os.listdir(here / "link") == ["sub"]


def test_errors_of_exchange_and_flags(here: Path) -> None:
    touch(here / "a")
    touch(here / "b")
    assert error(renameat2, here / "a", here / "none", EXCHANGE) == "ENOENT"
    assert error(renameat2, here / "none", here / "a", EXCHANGE) == "ENOENT"
    assert error(renameat2, here / "a", here / "b", EXCHANGE | NOREPLACE) == "EINVAL"
    assert error(renameat2, here / "a", here / "b", EXCHANGE | WHITEOUT) == "EINVAL"
    assert error(renameat2, here / "a", here / "b", 128) == "EINVAL"
    assert error(renameat2, here / "a", here / "a", EXCHANGE) == ""


def test_permissions_of_rename(here: Path) -> None:
    (here / "closed").mkdir(mode=0o755)
    (here / "open").mkdir()
    os.chmod(here / "open", 0o777)
    touch(here / "closed" / "file")
    touch(here / "open" / "file")
    move = as_user
    assert move(USER, lambda: error(os.rename, here / "open/file", here / "closed/new")) == "EACCES"
    assert move(USER, lambda: error(os.rename, here / "closed/file", here / "open/new")) == "EACCES"
    assert move(USER, lambda: error(os.rename, here / "open/file", here / "open/new")) == ""


def test_a_directory_of_another_cannot_change_its_parent_without_w_on_it(here: Path) -> None:
    """Its own .. would change (rename(2), EACCES)."""
    for name in ("from", "to"):
        (here / name).mkdir()
        os.chmod(here / name, 0o777)
    (here / "from" / "roots").mkdir(mode=0o755)
    os.mkdir(here / "from" / "writable")
    os.chmod(here / "from" / "writable", 0o777)
    source, target = here / "from", here / "to"
    assert as_user(USER, lambda: error(os.rename, source / "roots", target / "x")) == "EACCES"
    assert as_user(USER, lambda: error(os.rename, source / "roots", source / "renamed")) == ""
    assert as_user(USER, lambda: error(os.rename, source / "writable", target / "x")) == ""


def test_the_sticky_bit_guards_both_ends(here: Path) -> None:
    for name in ("sticky", "free"):
        (here / name).mkdir()
    os.chmod(here / "sticky", 0o1777)
    os.chmod(here / "free", 0o777)
    as_user(OTHER, lambda: touch(here / "sticky" / "others"))
    as_user(USER, lambda: touch(here / "sticky" / "mine"))
    as_user(USER, lambda: touch(here / "free" / "mine"))
    sticky, free = here / "sticky", here / "free"
    assert as_user(USER, lambda: error(os.rename, sticky / "others", free / "x")) == "EPERM"
    assert as_user(USER, lambda: error(os.rename, free / "mine", sticky / "others")) == "EPERM"
    assert as_user(USER, lambda: error(renameat2, free / "mine", sticky / "others", EXCHANGE)) == "EPERM"
    assert as_user(USER, lambda: error(os.rename, free / "mine", sticky / "mine")) == ""
    assert as_user(USER, lambda: error(os.rename, sticky / "mine", free / "x")) == ""


def test_rename_is_atomic_for_a_reader(here: Path) -> None:
    """While names change in circles, a reader of `current` always finds a whole file (docs/posix.md)."""
    touch(here / "current", b"0" * 1000)
    pid = os.fork()
    if pid == 0:
        try:
            for number in range(1, 400):
                touch(here / "next", b"%d" % (number % 10) * 1000)
                os.rename(here / "next", here / "current")
        finally:
            os._exit(0)
    wrong = 0
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        try:
            data = (here / "current").read_bytes()
        except OSError:
            wrong += 1
            continue
        wrong += len(data) != 1000 or len(set(data)) != 1
    assert wrong == 0


def test_a_name_that_is_replaced_all_the_time_always_has_its_attributes(here: Path) -> None:
    """Calls that name it find the old file or the new one, never none."""
    path, data = here / "current", b"x" * 100

    def save() -> None:
        descriptor = os.open(here / "next", os.O_CREAT | os.O_WRONLY, 0o644)
        os.setxattr(descriptor, "user.x", b"y")
        os.close(descriptor)
        os.rename(here / "next", path)

    touch(path, data)
    save()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        failed = 1
        try:
            os.close(writer)
            saved = 0
            while saved < SAVES or not select.select([reader], [], [], 0)[0]:
                save()
                saved += 1
            failed = 0
        finally:
            os._exit(failed)
    os.close(reader)
    calls = (
        lambda: os.stat(path),
        lambda: os.chmod(path, 0o640),
        lambda: os.utime(path),
        lambda: os.truncate(path, 50),
        lambda: os.getxattr(path, "user.x"),
    )
    errors = set()
    for _ in range(ROUNDS):
        errors |= {error(call) for call in calls}
    os.close(writer)  # it goes on until now, however slow these calls were
    ended = os.waitpid(pid, os.WNOHANG)
    while ended[0] == 0:
        errors |= {error(call) for call in calls}
        ended = os.waitpid(pid, os.WNOHANG)
    assert errors == {""}
    assert ended[1] == 0
