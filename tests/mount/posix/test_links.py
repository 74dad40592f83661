"""unlink(2), link(2), symlink(2), readlink(2), mknod(2), and files without a name."""

import os
import socket
import stat
from pathlib import Path

from tests.mount.mounting import Mount
from tests.mount.places import Place
from tests.mount.posix.calls import OTHER, USER, as_user, error, mode_of, touch

# --- unlink ---


def test_errors_of_unlink(here: Path) -> None:
    touch(here / "file")
    (here / "directory").mkdir()
    assert error(os.unlink, here / "none") == "ENOENT"
    assert error(os.unlink, here / "directory") == "EISDIR"
    assert error(os.unlink, here / "file" / "x") == "ENOTDIR"
    assert error(os.unlink, f"{here}/file/") == "ENOTDIR"
    assert error(os.unlink, f"{here}/directory/.") in ("EINVAL", "EISDIR")
    assert error(os.unlink, f"{here}/directory/..") in ("ENOTEMPTY", "EISDIR")
    assert sorted(os.listdir(here)) == ["directory", "file"]


def test_unlink_needs_w_on_the_directory_not_on_the_file(here: Path) -> None:
    touch(here / "file", b"", 0o000)
    assert as_user(USER, lambda: error(os.unlink, here / "file")) == "EACCES"
    os.chmod(here, 0o777)
    assert as_user(USER, lambda: error(os.unlink, here / "file")) == ""
    assert os.listdir(here) == []


def test_the_sticky_bit_keeps_what_belongs_to_others(here: Path) -> None:
    os.chmod(here, 0o1777)
    touch(here / "roots")
    as_user(USER, lambda: touch(here / "users"))
    (here / "directory").mkdir()
    assert as_user(USER, lambda: error(os.unlink, here / "roots")) == "EPERM"
    assert as_user(USER, lambda: error(os.rmdir, here / "directory")) == "EPERM"
    assert as_user(USER, lambda: error(os.rename, here / "roots", here / "mine")) == "EPERM"
    assert as_user(USER, lambda: error(os.rename, here / "users", here / "roots")) == "EPERM"
    assert as_user(OTHER, lambda: error(os.unlink, here / "users")) == "EPERM"
    assert as_user(USER, lambda: error(os.unlink, here / "users")) == ""
    os.chown(here, USER, USER)
    assert as_user(USER, lambda: error(os.unlink, here / "roots")) == "", "the directory's owner may"


def test_an_unlinked_file_lives_while_it_is_open(here: Path) -> None:
    touch(here / "file", b"data" * 10_000)
    descriptor = os.open(here / "file", os.O_RDWR)
    os.unlink(here / "file")
    assert not (here / "file").exists()
    assert os.fstat(descriptor).st_nlink == 0
    assert os.pread(descriptor, 4, 0) == b"data"
    os.pwrite(descriptor, b"more", 100_000)
    os.ftruncate(descriptor, 100_002)
    os.fchmod(descriptor, 0o600)
    os.fchown(descriptor, USER, USER)
    os.utime(descriptor, ns=(1, 2))
    os.setxattr(descriptor, "user.x", b"y")
    assert os.getxattr(descriptor, "user.x") == b"y"
    os.fsync(descriptor)
    found = os.fstat(descriptor)
    assert (found.st_size, found.st_mode & 0o777, found.st_uid, found.st_mtime_ns) == (
        100_002,
        0o600,
        USER,
        2,
    )
    assert os.pread(descriptor, 10, 99_998) == b"\0\0mo"
    os.close(descriptor)


def test_an_unlinked_name_can_be_created_anew_while_the_old_is_open(here: Path) -> None:
    touch(here / "file", b"old")
    old = os.open(here / "file", os.O_RDONLY)
    os.unlink(here / "file")
    touch(here / "file", b"new")
    assert os.read(old, 10) == b"old"
    assert (here / "file").read_bytes() == b"new"
    assert os.fstat(old).st_ino != os.stat(here / "file").st_ino
    os.close(old)


def test_an_unlinked_file_can_be_reached_through_proc(here: Path) -> None:
    touch(here / "file", b"data")
    descriptor = os.open(here / "file", os.O_RDONLY)
    os.unlink(here / "file")
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    os.write(again, b"DATA")
    assert os.read(descriptor, 10) == b"DATA"
    assert error(os.link, f"/proc/self/fd/{descriptor}", here / "back") in ("ENOENT", "EXDEV")
    os.close(again)
    os.close(descriptor)


# --- link ---


def test_two_names_of_one_file(here: Path) -> None:
    touch(here / "a", b"data", 0o640)
    before = os.stat(here / "a")
    os.link(here / "a", here / "b")
    a, b = os.stat(here / "a"), os.stat(here / "b")
    assert a.st_ino == b.st_ino
    assert a.st_nlink == b.st_nlink == 2
    assert a.st_ctime_ns > before.st_ctime_ns
    assert a.st_mtime_ns == before.st_mtime_ns
    (here / "b").write_bytes(b"through b")
    assert (here / "a").read_bytes() == b"through b"
    os.chmod(here / "a", 0o600)
    assert mode_of(here / "b") == 0o600
    os.unlink(here / "a")
    after = os.stat(here / "b")
    assert (after.st_nlink, after.st_ino) == (1, a.st_ino)
    assert after.st_ctime_ns > a.st_ctime_ns
    assert (here / "b").read_bytes() == b"through b"


def test_errors_of_link(here: Path) -> None:
    touch(here / "file")
    touch(here / "other")
    (here / "directory").mkdir()
    assert error(os.link, here / "none", here / "new") == "ENOENT"
    assert error(os.link, here / "file", here / "other") == "EEXIST"
    assert error(os.link, here / "file", here / "directory") == "EEXIST"
    assert error(os.link, here / "directory", here / "new") == "EPERM"
    assert error(os.link, here / "file", here / "none" / "new") == "ENOENT"
    assert error(os.link, here / "file", here / "other" / "new") == "ENOTDIR"
    assert error(os.link, here / "file", "/dev/shm/new") == "EXDEV"
    assert as_user(USER, lambda: error(os.link, here / "file", here / "new")) in ("EACCES", "EPERM")
    assert os.stat(here / "file").st_nlink == 1


def test_a_symbolic_link_itself_may_have_two_names(here: Path) -> None:
    (here / "link").symlink_to("nowhere")
    os.link(here / "link", here / "second", follow_symlinks=False)
    assert os.readlink(here / "second") == "nowhere"
    assert os.lstat(here / "second").st_nlink == 2


def test_links_and_renames_between_trees_are_exdev(mount: Mount) -> None:
    file = mount.mountpoint / "files" / "link-between-trees"
    touch(file)
    (mount.mountpoint / "kv" / "key").write_bytes(b"value")
    for call in (os.link, os.rename):
        assert error(call, file, mount.mountpoint / "kv" / "new") == "EXDEV"
        assert error(call, mount.mountpoint / "kv" / "key", mount.mountpoint / "files" / "new") == "EXDEV"
    file.unlink()


# --- symbolic links ---


def test_symbolic_links_keep_any_target(here: Path) -> None:
    targets = [
        b"a",
        b"/",
        b"..",
        b"no/such/thing",
        b"\xff\xfe",
        b"x" * 255,
        (b"y" * 200 + b"/") * 20 + b"z" * 75,
    ]
    assert len(targets[-1]) == 4095
    for number, target in enumerate(targets):
        link = os.fsencode(here) + b"/%d" % number
        os.symlink(target, link)
        assert os.readlink(link) == target
        found = os.lstat(link)
        assert stat.S_ISLNK(found.st_mode)
        assert found.st_size == len(target)
        assert found.st_mode & 0o777 == 0o777


def test_errors_of_symlink_and_readlink(here: Path) -> None:
    touch(here / "file")
    assert error(os.symlink, "x", here / "file") == "EEXIST"
    assert error(os.symlink, "", here / "new") == "ENOENT"
    assert error(os.symlink, "x" * 4096, here / "new") == "ENAMETOOLONG"
    assert error(os.symlink, "x", here / "none" / "new") == "ENOENT"
    assert error(os.symlink, "x", here / "file" / "new") == "ENOTDIR"
    assert as_user(USER, lambda: error(os.symlink, "x", here / "new")) == "EACCES"
    assert error(os.readlink, here / "none") == "ENOENT"
    assert error(os.readlink, here / "file") == "EINVAL"
    assert error(os.readlink, here) == "EINVAL"
    assert os.listdir(here) == ["file"]


def test_symbolic_links_are_followed_and_not_followed(here: Path) -> None:
    (here / "directory").mkdir()
    touch(here / "directory" / "file", b"data", 0o600)
    (here / "link").symlink_to("directory")
    (here / "link" / "up").symlink_to("../directory/file")
    assert (here / "link" / "up").read_bytes() == b"data"
    os.chmod(here / "link" / "up", 0o640)
    assert mode_of(here / "directory" / "file") == 0o640
    os.chown(here / "link", USER, USER, follow_symlinks=False)
    assert os.lstat(here / "link").st_uid == USER
    assert os.stat(here / "link").st_uid == 0
    os.utime(here / "link", ns=(5, 6), follow_symlinks=False)
    assert os.lstat(here / "link").st_mtime_ns == 6
    assert error(os.rmdir, here / "link") == "ENOTDIR"
    os.unlink(here / "link")
    assert sorted(os.listdir(here / "directory")) == ["file", "up"]


# --- mknod ---


def test_fifos_carry_bytes(here: Path) -> None:
    os.mkfifo(here / "fifo", 0o622)
    found = os.lstat(here / "fifo")
    assert found.st_mode == stat.S_IFIFO | 0o600
    assert error(os.mkfifo, here / "fifo") == "EEXIST"
    both = os.open(here / "fifo", os.O_RDWR | os.O_NONBLOCK)
    os.write(both, b"through")
    assert os.read(both, 10) == b"through"
    os.close(both)
    assert error(os.open, here / "fifo", os.O_WRONLY | os.O_NONBLOCK) == "ENXIO"


def test_sockets_bind_and_connect(here: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        os.chdir(here)  # a path of a socket has 108 bytes at most
        try:
            server.bind("socket")
            server.listen()
            assert stat.S_ISSOCK(os.lstat("socket").st_mode)
            assert error(os.open, "socket", os.O_RDONLY) == "ENXIO"
            client.connect("socket")
            client.sendall(b"hello")
            connection, _ = server.accept()
            with connection:
                assert connection.recv(10) == b"hello"
            with socket.socket(socket.AF_UNIX) as second:
                assert error(second.bind, "socket") == "EADDRINUSE"
        finally:
            os.chdir("/")


def test_devices_keep_their_numbers(here: Path) -> None:
    numbers = [os.makedev(1, 3), os.makedev(8, 255), os.makedev(259, 70_000), os.makedev(4095, (1 << 20) - 1)]
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        for number in numbers:
            path = here / f"{kind}-{number}"
            os.mknod(path, kind | 0o660, number)
            found = os.lstat(path)
            assert found.st_mode == kind | 0o640
            assert found.st_rdev == number


def test_only_root_makes_devices(here: Path) -> None:
    os.chmod(here, 0o777)
    assert as_user(USER, lambda: error(os.mknod, here / "d", stat.S_IFCHR | 0o666, 259)) == "EPERM"
    assert as_user(USER, lambda: error(os.mknod, here / "d", stat.S_IFBLK | 0o666, 259)) == "EPERM"
    assert as_user(USER, lambda: error(os.mknod, here / "f", stat.S_IFREG | 0o666)) == ""
    assert as_user(USER, lambda: error(os.mknod, here / "p", stat.S_IFIFO | 0o666)) == ""
    assert stat.S_ISREG(os.lstat(here / "f").st_mode)


def test_a_mount_is_nodev_unless_asked(place: Place) -> None:
    """docs/posix.md: a device can be kept, but not used."""
    os.mknod(place.path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    result = error(lambda: os.close(os.open(place.path / "null", os.O_RDONLY)))
    assert result == ("EACCES" if place.is_aspen else "")


def test_errors_of_mknod(here: Path) -> None:
    touch(here / "file")
    assert error(os.mknod, here / "file", stat.S_IFREG | 0o600) == "EEXIST"
    assert error(os.mknod, here / "none" / "x", stat.S_IFREG | 0o600) == "ENOENT"
    assert error(os.mknod, here / "x", stat.S_IFDIR | 0o700) == "EPERM"
    assert error(os.mknod, here / "x", stat.S_IFLNK | 0o700) == "EINVAL"
    assert as_user(USER, lambda: error(os.mkfifo, here / "x")) == "EACCES"
