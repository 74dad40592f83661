"""Extended attributes: setxattr(2), getxattr(2), listxattr(2), removexattr(2), xattr(7)."""

import ctypes
import os
from pathlib import Path

from tests.mount.places import Place
from tests.mount.posix.calls import USER, as_user, error, libc, touch


def test_set_get_list_remove(here: Path) -> None:
    path = here / "file"
    touch(path)
    values = {
        "user.a": b"1",
        "user.empty": b"",
        "user.bytes": bytes(range(256)),
        "user." + "n" * 250: b"long",
    }
    for name, value in values.items():
        os.setxattr(path, name, value)
    assert set(os.listxattr(path)) == set(values)
    for name, value in values.items():
        assert os.getxattr(path, name) == value
    os.setxattr(path, "user.a", b"another")
    assert os.getxattr(path, "user.a") == b"another"
    for name in values:
        os.removexattr(path, name)
        assert error(os.getxattr, path, name) == "ENODATA"
    assert os.listxattr(path) == []


def test_create_and_replace(here: Path) -> None:
    path = here / "file"
    touch(path)
    assert error(os.setxattr, path, "user.a", b"1", os.XATTR_REPLACE) == "ENODATA"
    assert error(os.setxattr, path, "user.a", b"1", os.XATTR_CREATE) == ""
    assert error(os.setxattr, path, "user.a", b"2", os.XATTR_CREATE) == "EEXIST"
    assert os.getxattr(path, "user.a") == b"1"
    assert error(os.setxattr, path, "user.a", b"3", os.XATTR_REPLACE) == ""
    assert os.getxattr(path, "user.a") == b"3"


def test_errors(here: Path) -> None:
    path = here / "file"
    touch(path)
    assert error(os.getxattr, path, "user.none") == "ENODATA"
    assert error(os.removexattr, path, "user.none") == "ENODATA"
    assert error(os.setxattr, path, "nonsense.x", b"") == "EOPNOTSUPP"
    assert error(os.getxattr, path, "nonsense.x") == "EOPNOTSUPP"
    assert error(os.setxattr, path, "user." + "n" * 251, b"") == "ERANGE"
    assert error(os.setxattr, path, "", b"") == "ERANGE"
    assert error(os.getxattr, here / "none", "user.x") == "ENOENT"
    assert error(os.setxattr, path, "user.x", b"x" * 65_537) == "E2BIG"
    assert os.listxattr(path) == []


def get_into(path: Path, name: bytes, room: int) -> tuple[int, int]:
    """(result, errno) of getxattr(2) with a buffer of `room` bytes."""
    buffer = ctypes.create_string_buffer(max(room, 1))
    ctypes.set_errno(0)
    result = libc.getxattr(os.fsencode(path), name, buffer, ctypes.c_size_t(room))
    return result, ctypes.get_errno()


def test_asking_for_the_size_and_too_small_buffers(here: Path) -> None:
    path = here / "file"
    touch(path)
    os.setxattr(path, "user.x", b"12345")
    assert get_into(path, b"user.x", 0) == (5, 0)
    assert get_into(path, b"user.x", 4) == (-1, 34)  # ERANGE
    assert get_into(path, b"user.x", 5) == (5, 0)
    assert get_into(path, b"user.x", 100) == (5, 0)
    names = ctypes.create_string_buffer(100)
    assert libc.listxattr(os.fsencode(path), names, ctypes.c_size_t(0)) == 7
    assert libc.listxattr(os.fsencode(path), names, ctypes.c_size_t(3)) == -1
    assert libc.listxattr(os.fsencode(path), names, ctypes.c_size_t(100)) == 7
    assert names.raw[:7] == b"user.x\0"


def test_the_largest_value(place: Place) -> None:
    """64 KiB, the kernel's own limit; ext4 has room for a block."""
    path = place.path / "file"
    touch(path)
    largest = os.urandom(65_536)
    if place.is_aspen:
        os.setxattr(path, "user.large", largest)
        assert os.getxattr(path, "user.large") == largest
    else:
        assert error(os.setxattr, path, "user.large", largest) in ("ENOSPC", "E2BIG", "")
    os.setxattr(path, "user.small", b"x")
    assert os.getxattr(path, "user.small") == b"x"


def test_64_kib_of_names_and_no_more(place: Place) -> None:
    path = place.path / "file"
    touch(path)
    result, number = "", 0
    while not result and number < 300:
        number += 1
        result = error(os.setxattr, path, f"user.{number:04d}{'n' * 246}", b"")
    assert result == "ENOSPC"
    assert len(os.listxattr(path)) == number - 1
    if place.is_aspen:
        assert number - 1 == 65_536 // 256


def test_directories_have_them_and_symbolic_links_do_not(here: Path) -> None:
    (here / "directory").mkdir()
    (here / "link").symlink_to("directory")
    os.setxattr(here / "directory", "user.x", b"y")
    assert os.getxattr(here / "link", "user.x") == b"y"
    assert error(os.setxattr, here / "link", "user.x", b"y", follow_symlinks=False) == "EPERM"
    assert error(os.getxattr, here / "link", "user.x", follow_symlinks=False) in ("EPERM", "ENODATA")
    assert os.listxattr(here / "link", follow_symlinks=False) == []
    os.setxattr(here / "link", "trusted.x", b"z", follow_symlinks=False)
    assert os.getxattr(here / "link", "trusted.x", follow_symlinks=False) == b"z"
    os.mkfifo(here / "fifo")
    assert error(os.setxattr, here / "fifo", "user.x", b"y") == "EPERM"


def test_namespaces_and_permissions(here: Path) -> None:
    path = here / "file"
    touch(path, b"", 0o644)
    os.setxattr(path, "user.a", b"u")
    os.setxattr(path, "trusted.b", b"t")
    os.setxattr(path, "security.c", b"s")
    assert set(os.listxattr(path)) == {"user.a", "trusted.b", "security.c"}
    assert as_user(USER, lambda: os.getxattr(path, "user.a")) == b"u"
    assert as_user(USER, lambda: error(os.setxattr, path, "user.a", b"x")) == "EACCES"
    assert as_user(USER, lambda: error(os.removexattr, path, "user.a")) == "EACCES"
    assert as_user(USER, lambda: sorted(os.listxattr(path))) == ["security.c", "user.a"]
    assert error(os.setxattr, path, "user.", b"") == "EINVAL"
    assert as_user(USER, lambda: error(os.getxattr, path, "trusted.b")) == "ENODATA"
    assert as_user(USER, lambda: error(os.setxattr, path, "trusted.b", b"x")) == "EPERM"
    assert as_user(USER, lambda: error(os.setxattr, path, "security.c", b"x")) == "EPERM"
    assert as_user(USER, lambda: os.getxattr(path, "security.c")) == b"s"
    os.chmod(path, 0o600)
    assert as_user(USER, lambda: error(os.getxattr, path, "user.a")) == "EACCES"


def test_only_the_owner_marks_a_sticky_directory(here: Path) -> None:
    (here / "shared").mkdir()
    os.chmod(here / "shared", 0o1777)
    assert as_user(USER, lambda: error(os.setxattr, here / "shared", "user.x", b"y")) == "EPERM"


def test_they_follow_the_inode(here: Path) -> None:
    touch(here / "a")
    os.setxattr(here / "a", "user.x", b"y")
    os.link(here / "a", here / "b")
    os.rename(here / "a", here / "c")
    assert os.getxattr(here / "b", "user.x") == os.getxattr(here / "c", "user.x") == b"y"
    touch(here / "a")
    assert os.listxattr(here / "a") == []
    os.unlink(here / "b")
    assert os.getxattr(here / "c", "user.x") == b"y"


def test_posix_acls_are_not_carried(place: Place) -> None:
    """docs/posix.md."""
    touch(place.path / "file")
    acl = bytes.fromhex("0200000001000600ffffffff04000400ffffffff20000400ffffffff")
    result = error(os.setxattr, place.path / "file", "system.posix_acl_access", acl)
    assert result == ("EOPNOTSUPP" if place.is_aspen else "")
