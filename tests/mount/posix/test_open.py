"""open(2), creat(2), close(2), dup(2), access(2), and how paths are walked (path_resolution(7))."""

import os
import stat
from pathlib import Path

import pytest

from tests.mount.posix.calls import OTHER, USER, as_user, error, in_child, mode_of, touch


def opened(path: Path | str | bytes, flags: int, mode: int = 0o666) -> str:
    """The errno's name of an open(2), "" if it succeeds; whatever it opened is closed again."""

    def open_and_close() -> None:
        os.close(os.open(path, flags, mode))

    return error(open_and_close)


def test_open_of_what_is_not_there(here: Path) -> None:
    assert opened(here / "none", os.O_RDONLY) == "ENOENT"
    assert opened(here / "none", os.O_RDWR | os.O_TRUNC) == "ENOENT"
    assert opened(here / "none" / "below", os.O_CREAT | os.O_WRONLY) == "ENOENT"
    assert opened(b"", os.O_RDONLY) == "ENOENT"
    assert os.listdir(here) == []


def test_a_component_that_is_a_file(here: Path) -> None:
    touch(here / "file")
    assert opened(here / "file" / "x", os.O_RDONLY) == "ENOTDIR"
    assert opened(f"{here}/file/", os.O_RDONLY) == "ENOTDIR"
    assert opened(f"{here}/file/.", os.O_RDONLY) == "ENOTDIR"
    assert error(os.stat, f"{here}/file/..") == "ENOTDIR"


def test_directories_open_for_reading_only(here: Path) -> None:
    (here / "directory").mkdir()
    assert opened(here / "directory", os.O_RDONLY) == ""
    assert opened(here / "directory", os.O_RDONLY | os.O_DIRECTORY) == ""
    assert opened(here / "directory", os.O_WRONLY) == "EISDIR"
    assert opened(here / "directory", os.O_RDWR) == "EISDIR"
    assert opened(here / "directory", os.O_RDONLY | os.O_CREAT) == "EISDIR"
    assert opened(here / "directory", os.O_RDONLY | os.O_TRUNC) == "EISDIR"
    assert opened(f"{here}/new/", os.O_WRONLY | os.O_CREAT) == "EISDIR"
    descriptor = os.open(here / "directory", os.O_RDONLY)
    assert error(os.read, descriptor, 1) == "EISDIR"
    assert error(os.ftruncate, descriptor, 0) == "EINVAL"
    os.close(descriptor)


def test_o_directory_on_a_file(here: Path) -> None:
    touch(here / "file")
    (here / "link").symlink_to("file")
    assert opened(here / "file", os.O_RDONLY | os.O_DIRECTORY) == "ENOTDIR"
    assert opened(here / "link", os.O_RDONLY | os.O_DIRECTORY) == "ENOTDIR"


def test_o_excl(here: Path) -> None:
    exclusive = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    assert opened(here / "file", exclusive) == ""
    assert opened(here / "file", exclusive) == "EEXIST"
    (here / "dangling").symlink_to("nowhere")
    assert opened(here / "dangling", exclusive) == "EEXIST"
    (here / "directory").mkdir()
    assert opened(here / "directory", exclusive) == "EEXIST"
    assert not (here / "nowhere").exists()


def test_creating_through_a_dangling_symbolic_link(here: Path) -> None:
    (here / "dangling").symlink_to("target")
    assert opened(here / "dangling", os.O_CREAT | os.O_WRONLY) == ""
    assert stat.S_ISREG(os.lstat(here / "target").st_mode)
    assert stat.S_ISLNK(os.lstat(here / "dangling").st_mode)


@pytest.mark.parametrize("mode", [0o666, 0o777, 0o600, 0o000, 0o1644, 0o4755, 0o2755])
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000, 0o777])
def test_creation_takes_mode_and_umask(here: Path, mode: int, mask: int) -> None:
    os.umask(mask)
    descriptor = os.open(here / "file", os.O_CREAT | os.O_RDWR, mode)
    assert os.write(descriptor, b"the mode is for later opens") > 0
    assert os.fstat(descriptor).st_mode == stat.S_IFREG | mode & ~mask
    os.close(descriptor)
    assert mode_of(here / "file") == mode & ~mask


def test_opening_what_exists_leaves_its_mode(here: Path) -> None:
    touch(here / "file", b"data", 0o640)
    assert opened(here / "file", os.O_CREAT | os.O_RDWR, 0o777) == ""
    assert mode_of(here / "file") == 0o640
    assert (here / "file").read_bytes() == b"data"


def test_o_trunc(here: Path) -> None:
    touch(here / "file", b"data" * 10_000)
    before = os.stat(here / "file")
    descriptor = os.open(here / "file", os.O_WRONLY | os.O_TRUNC)
    assert os.fstat(descriptor).st_size == 0
    os.close(descriptor)
    after = os.stat(here / "file")
    assert (after.st_size, after.st_blocks, after.st_ino) == (0, 0, before.st_ino)
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns > before.st_ctime_ns
    assert (here / "file").read_bytes() == b""


def test_o_trunc_needs_write_permission_and_leaves_the_data(here: Path) -> None:
    touch(here / "file", b"data", 0o644)
    assert as_user(USER, lambda: opened(here / "file", os.O_RDONLY | os.O_TRUNC)) == "EACCES"
    assert as_user(USER, lambda: opened(here / "file", os.O_WRONLY | os.O_TRUNC)) == "EACCES"
    assert (here / "file").read_bytes() == b"data"


def test_the_access_mode_binds_the_descriptor(here: Path) -> None:
    touch(here / "file", b"data")
    reading = os.open(here / "file", os.O_RDONLY)
    writing = os.open(here / "file", os.O_WRONLY)
    assert error(os.write, reading, b"x") == "EBADF"
    assert error(os.read, writing, 1) == "EBADF"
    assert error(os.ftruncate, reading, 0) == "EINVAL"
    os.close(reading)
    os.close(writing)
    assert error(os.read, reading, 1) == "EBADF"


def test_an_open_descriptor_outlives_its_permissions(here: Path) -> None:
    touch(here / "file", b"data", 0o644)
    os.chown(here / "file", USER, USER)

    def write_after_chmod() -> bytes:
        descriptor = os.open(here / "file", os.O_RDWR)
        os.fchmod(descriptor, 0)
        os.pwrite(descriptor, b"D", 0)
        return os.pread(descriptor, 10, 0)

    assert as_user(USER, write_after_chmod) == b"Data"
    assert as_user(USER, lambda: opened(here / "file", os.O_RDONLY)) == "EACCES"


def test_o_nofollow(here: Path) -> None:
    touch(here / "file")
    (here / "link").symlink_to("file")
    (here / "directory").mkdir()
    touch(here / "directory" / "inside")
    (here / "way").symlink_to("directory")
    assert opened(here / "link", os.O_RDONLY | os.O_NOFOLLOW) == "ELOOP"
    assert opened(here / "file", os.O_RDONLY | os.O_NOFOLLOW) == ""
    assert opened(here / "way" / "inside", os.O_RDONLY | os.O_NOFOLLOW) == ""
    assert opened(here / "way", os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY) == "ENOTDIR"


def test_o_path(here: Path) -> None:
    touch(here / "file", b"data", 0)
    (here / "link").symlink_to("file")
    descriptor = os.open(here / "link", os.O_PATH | os.O_NOFOLLOW)
    assert stat.S_ISLNK(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    descriptor = os.open(here / "file", os.O_PATH)
    assert error(os.read, descriptor, 1) == "EBADF"
    assert os.fstat(descriptor).st_size == 4
    os.close(descriptor)


def test_names_of_255_bytes_and_of_256(here: Path) -> None:
    longest = here / ("n" * 255)
    too_long = here / ("n" * 256)
    assert opened(longest, os.O_CREAT | os.O_WRONLY) == ""
    assert os.listdir(here) == [longest.name]
    assert opened(too_long, os.O_RDONLY) == "ENAMETOOLONG"
    assert opened(too_long, os.O_CREAT | os.O_WRONLY) == "ENAMETOOLONG"
    for call in (os.stat, os.mkdir, os.unlink, os.rmdir, os.readlink):
        assert error(call, too_long) == "ENAMETOOLONG", call
    assert error(os.rename, longest, too_long) == "ENAMETOOLONG"
    assert error(os.rename, too_long, longest) == "ENAMETOOLONG"
    assert error(os.link, longest, too_long) == "ENAMETOOLONG"
    assert error(os.symlink, "x", too_long) == "ENAMETOOLONG"
    assert error(os.mkfifo, too_long) == "ENAMETOOLONG"


def test_names_of_any_bytes(here: Path) -> None:
    names = [bytes([byte]) for byte in range(1, 256) if byte not in b"/."]
    names += [b"...", b" ", b"\n\t", b"\xff" * 255, "häß – 漢字".encode(), b"\xc3", b"a\\b", b"*?[]"]
    above = os.fsencode(here)
    for name in dict.fromkeys(names):
        touch(above + b"/" + name, name)
    assert sorted(os.listdir(above)) == sorted(set(names))
    for name in names:
        with open(above + b"/" + name, "rb") as file:
            assert file.read() == name


def test_a_path_of_path_max(here: Path) -> None:
    """4,095 bytes and the final NUL: one more is too long."""
    components = "/d" * 300
    os.makedirs(f"{here}{components}")
    room = 4095 - len(f"{here}{components}/")
    name = f"{'./' * ((room - 1) // 2)}{'f' * (2 - room % 2)}"
    path = f"{here}{components}/{name}"
    assert len(path) == 4095
    assert opened(path, os.O_CREAT | os.O_WRONLY) == ""
    assert opened(path + "f", os.O_CREAT | os.O_WRONLY) == "ENAMETOOLONG"


def test_a_tree_deeper_than_path_max_can_be_walked_step_by_step(here: Path) -> None:
    name = "n" * 200

    def descend() -> int:
        os.chdir(here)
        for _ in range(30):
            os.mkdir(name)
            os.chdir(name)
        touch("bottom", b"here")
        depth = 0
        while not os.path.exists("top"):
            os.chdir("..")
            depth += 1
        return depth

    touch(here / "top")
    assert in_child(descend) == 30


def test_symbolic_link_loops(here: Path) -> None:
    (here / "self").symlink_to("self")
    (here / "a").symlink_to("b")
    (here / "b").symlink_to("a")
    assert opened(here / "self", os.O_RDONLY) == "ELOOP"
    assert opened(here / "a", os.O_RDONLY | os.O_CREAT) == "ELOOP"
    assert error(os.stat, here / "b" / "x") == "ELOOP"
    previous = "end"
    touch(here / "end", b"arrived")
    for number in range(41):
        (here / f"l{number}").symlink_to(previous)
        previous = f"l{number}"
    assert (here / "l39").read_bytes() == b"arrived"
    assert opened(here / "l40", os.O_RDONLY) == "ELOOP"


def test_open_checks_permissions_by_owner_group_and_others(here: Path) -> None:
    path = here / "file"
    touch(path)
    os.chown(path, USER, 500)
    flags = {4: os.O_RDONLY, 2: os.O_WRONLY, 6: os.O_RDWR}
    who = {6: (USER, USER), 3: (OTHER, 500), 0: (OTHER, OTHER)}  # shift of their bits: uid, gid
    for shift, (uid, gid) in who.items():
        for bits in range(8):
            os.chmod(path, bits << shift)
            results = as_user(uid, lambda: {k: opened(path, f) for k, f in flags.items()}, gid=gid)
            for wanted, result in results.items():
                assert result == ("" if bits & wanted == wanted else "EACCES"), (shift, bits, wanted)
    os.chmod(path, 0o040)
    assert as_user(OTHER, lambda: opened(path, os.O_RDONLY), groups=[500]) == "", "a supplementary group"
    assert opened(path, os.O_RDWR) == "", "root"


def test_a_directory_needs_x_to_be_walked_r_to_be_listed_and_w_to_be_changed(here: Path) -> None:
    directory = here / "directory"
    directory.mkdir()
    touch(directory / "file", b"", 0o666)

    def attempt() -> list[str]:
        return [
            opened(directory / "file", os.O_RDWR),
            error(os.listdir, directory),
            opened(directory / "new", os.O_CREAT | os.O_WRONLY),
            error(os.unlink, directory / "new"),
            opened(directory / "absent", os.O_RDONLY),
        ]

    denied = "EACCES"
    os.chmod(directory, 0o700)
    assert as_user(USER, attempt) == [denied, denied, denied, denied, denied]
    os.chmod(directory, 0o701)
    assert as_user(USER, attempt) == ["", denied, denied, "ENOENT", "ENOENT"]
    os.chmod(directory, 0o704)
    assert as_user(USER, attempt) == [denied, "", denied, denied, denied]
    os.chmod(directory, 0o703)
    assert as_user(USER, attempt) == ["", denied, "", "", "ENOENT"]
    os.chmod(directory, 0o702)
    assert as_user(USER, attempt) == [denied, denied, denied, denied, denied]


def test_the_creator_owns_the_file(here: Path) -> None:
    os.chmod(here, 0o777)
    as_user(USER, lambda: touch(here / "file"), gid=OTHER)
    found = os.stat(here / "file")
    assert (found.st_uid, found.st_gid) == (USER, OTHER)


def test_access(here: Path) -> None:
    path = here / "file"
    touch(path, b"", 0o640)
    os.chown(path, USER, 500)
    checks = [os.F_OK, os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.W_OK]
    assert as_user(USER, lambda: [os.access(path, m) for m in checks]) == [True, True, True, False, True]
    in_group = as_user(OTHER, lambda: [os.access(path, m) for m in checks], gid=500)
    assert in_group == [True, True, False, False, False]
    stranger = as_user(OTHER, lambda: [os.access(path, m) for m in checks])
    assert stranger == [True, False, False, False, False]
    assert not os.access(path, os.X_OK), "not even root executes what nobody may"
    os.chmod(path, 0o001)
    assert os.access(path, os.X_OK)
    assert not os.access(here / "none", os.F_OK)


def test_programs_run_and_need_x(here: Path) -> None:
    touch(here / "script", b"#!/bin/sh\nexit 7\n", 0o755)
    assert os.spawnl(os.P_WAIT, str(here / "script"), "script") == 7
    os.chmod(here / "script", 0o644)
    assert error(in_child, lambda: os.execl(here / "script", "script")) == "EACCES"


def test_dup_shares_the_offset_and_closes_apart(here: Path) -> None:
    touch(here / "file", b"0123456789")
    first = os.open(here / "file", os.O_RDWR)
    second = os.dup(first)
    assert os.read(first, 3) == b"012"
    assert os.read(second, 3) == b"345"
    os.close(first)
    assert os.write(second, b"X") == 1
    os.close(second)
    assert (here / "file").read_bytes() == b"012345X789"


def test_two_opens_have_offsets_of_their_own(here: Path) -> None:
    touch(here / "file", b"0123456789")
    first, second = (os.open(here / "file", os.O_RDWR) for _ in range(2))
    assert os.read(first, 3) == b"012"
    assert os.read(second, 5) == b"01234"
    os.write(first, b"X")
    os.lseek(second, 3, os.SEEK_SET)
    assert os.read(second, 1) == b"X"
    os.close(first)
    os.close(second)


def test_openat_beneath_an_open_directory(here: Path) -> None:
    (here / "directory").mkdir()
    directory = os.open(here / "directory", os.O_RDONLY | os.O_DIRECTORY)
    os.rename(here / "directory", here / "moved")
    descriptor = os.open("file", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=directory)
    os.close(descriptor)
    os.close(directory)
    assert os.listdir(here / "moved") == ["file"]
