"""mkdir(2), rmdir(2), readdir(3) and its positions."""

import itertools
import os
import stat
from pathlib import Path

import pytest

from tests.mount.places import Place
from tests.mount.posix.calls import USER, Directory, as_user, error, in_child, mode_of, touch

# --- mkdir ---


def test_errors_of_mkdir(here: Path) -> None:
    touch(here / "file")
    (here / "link").symlink_to("nowhere")
    assert error(os.mkdir, here / "file") == "EEXIST"
    assert error(os.mkdir, here / "link") == "EEXIST"
    assert error(os.mkdir, here) == "EEXIST"
    assert error(os.mkdir, here / "none" / "new") == "ENOENT"
    assert error(os.mkdir, here / "file" / "new") == "ENOTDIR"
    assert error(os.mkdir, f"{here}/.") == "EEXIST"
    assert error(os.mkdir, f"{here}/..") == "EEXIST"
    assert as_user(USER, lambda: error(os.mkdir, here / "new")) == "EACCES"
    assert sorted(os.listdir(here)) == ["file", "link"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
@pytest.mark.parametrize("mode", [0o777, 0o700, 0o1777, 0o000])
def test_mkdir_takes_mode_and_umask(here: Path, mode: int, mask: int) -> None:
    os.umask(mask)
    os.mkdir(here / "new", mode)
    assert os.stat(here / "new").st_mode == stat.S_IFDIR | mode & ~mask


def test_a_new_directory_is_empty_and_owned_by_its_maker(here: Path) -> None:
    os.chmod(here, 0o777)
    as_user(USER, lambda: os.mkdir(here / "new"), gid=500)
    found = os.stat(here / "new")
    assert (found.st_uid, found.st_gid, found.st_nlink) == (USER, 500, 2)
    with Directory(here / "new") as directory:
        assert sorted(entry.name for entry in iter(directory.read, None)) == [b".", b".."]


def test_nlink_of_a_directory_counts_its_subdirectories(here: Path) -> None:
    for number in range(5):
        (here / f"d{number}").mkdir()
        touch(here / f"f{number}")
        assert os.stat(here).st_nlink == 3 + number
    os.rmdir(here / "d0")
    os.unlink(here / "f0")
    assert os.stat(here).st_nlink == 6
    os.rename(here / "d1", here / "d2" / "moved")
    assert os.stat(here).st_nlink == 5
    assert os.stat(here / "d2").st_nlink == 3
    os.rename(here / "d3", here / "d4")
    assert os.stat(here).st_nlink == 4


def test_a_set_group_id_directory_hands_down_its_group(here: Path) -> None:
    shared = here / "shared"
    shared.mkdir()
    os.chown(shared, 0, 500)
    os.chmod(shared, 0o2777)

    def create() -> None:
        touch(shared / "file")
        (shared / "below").mkdir()
        (shared / "link").symlink_to("x")
        os.mkfifo(shared / "fifo")

    as_user(USER, create)
    for name in ("file", "below", "link", "fifo"):
        found = os.lstat(shared / name)
        assert (found.st_uid, found.st_gid) == (USER, 500), name
    assert mode_of(shared / "below") == 0o2755
    assert mode_of(shared / "file") == 0o644
    as_user(USER, lambda: (shared / "below" / "deeper").mkdir())
    assert os.stat(shared / "below" / "deeper").st_gid == 500


def test_set_group_id_of_a_new_file_needs_membership(here: Path) -> None:
    """inode_init_owner of the kernel: an executable of a group that one is not in gets no S_ISGID."""
    os.chown(here, 0, 500)
    os.chmod(here, 0o2777)

    def create(name: str) -> None:
        os.umask(0)
        os.close(os.open(here / name, os.O_CREAT | os.O_WRONLY, 0o2775))

    as_user(USER, lambda: create("stranger"))
    as_user(USER, lambda: create("member"), groups=[500])
    assert mode_of(here / "stranger") == 0o775
    assert mode_of(here / "member") == 0o2775


# --- rmdir ---


def test_errors_of_rmdir(here: Path) -> None:
    touch(here / "file")
    (here / "full" / "sub").mkdir(parents=True)
    (here / "link").symlink_to("full")
    assert error(os.rmdir, here / "none") == "ENOENT"
    assert error(os.rmdir, here / "file") == "ENOTDIR"
    assert error(os.rmdir, here / "link") == "ENOTDIR"
    assert error(os.rmdir, here / "file" / "x") == "ENOTDIR"
    assert error(os.rmdir, here / "full") == "ENOTEMPTY"
    assert error(os.rmdir, f"{here}/full/sub/.") == "EINVAL"
    assert error(os.rmdir, f"{here}/full/sub/..") == "ENOTEMPTY"
    assert as_user(USER, lambda: error(os.rmdir, here / "full" / "sub")) == "EACCES"
    assert error(os.rmdir, here / "full" / "sub") == ""
    assert error(os.rmdir, f"{here}/full/") == ""


def test_a_working_directory_may_be_removed(here: Path) -> None:
    (here / "gone").mkdir()

    def stay() -> list[object]:
        os.chdir(here / "gone")
        os.rmdir(here / "gone")
        return [
            error(os.getcwd),
            os.stat(".").st_nlink,
            os.listdir("."),
            error(os.mkdir, "x"),
            error(touch, "x"),
            error(os.symlink, "x", "y"),
            error(os.stat, "x"),
            error(os.rename, here / "other", "x"),
        ]

    touch(here / "other")
    assert in_child(stay) == ["ENOENT", 0, [], "ENOENT", "ENOENT", "ENOENT", "ENOENT", "ENOENT"]


def test_an_open_directory_may_be_removed(here: Path) -> None:
    (here / "gone").mkdir()
    descriptor = os.open(here / "gone", os.O_RDONLY)
    os.rmdir(here / "gone")
    assert os.fstat(descriptor).st_nlink == 0
    assert os.listdir(descriptor) == []
    os.fchmod(descriptor, 0o2711)
    os.fchown(descriptor, USER, -1)
    os.utime(descriptor, ns=(5, 6))
    found = os.fstat(descriptor)
    assert (found.st_mode, found.st_uid, found.st_mtime_ns) == (stat.S_IFDIR | 0o2711, USER, 6)
    os.close(descriptor)


def test_a_name_can_be_a_directory_a_file_and_a_link_in_turn(here: Path) -> None:
    for _ in range(5):
        (here / "name").mkdir()
        assert os.path.isdir(here / "name")
        (here / "name").rmdir()
        touch(here / "name", b"x")
        assert (here / "name").read_bytes() == b"x"
        (here / "name").unlink()
        (here / "name").symlink_to("x")
        assert os.readlink(here / "name") == "x"
        (here / "name").unlink()
        assert not os.path.lexists(here / "name")


# --- readdir ---


def test_readdir_tells_inode_numbers_and_types(here: Path) -> None:
    touch(here / "file")
    (here / "directory").mkdir()
    (here / "link").symlink_to("file")
    os.mkfifo(here / "fifo")
    with Directory(here) as directory:
        entries = {entry.name: entry for entry in iter(directory.read, None)}
    assert set(entries) == {b".", b"..", b"file", b"directory", b"link", b"fifo"}
    for name, entry in entries.items():
        found = os.lstat(here / os.fsdecode(name))
        assert entry.ino == found.st_ino, name
        assert entry.kind == found.st_mode >> 12, name


def test_dot_dot_leads_up_after_a_move(here: Path) -> None:
    (here / "a" / "inner").mkdir(parents=True)
    (here / "b").mkdir()
    os.rename(here / "a" / "inner", here / "b" / "inner")
    with Directory(here / "b" / "inner") as directory:
        entries = {entry.name: entry.ino for entry in iter(directory.read, None)}
    assert entries[b".."] == os.stat(here / "b").st_ino == os.stat(here / "b" / "inner" / "..").st_ino


def test_errors_of_opendir(here: Path) -> None:
    touch(here / "file")
    assert error(Directory, here / "file") == "ENOTDIR"
    assert error(Directory, here / "none") == "ENOENT"
    os.chmod(here, 0o711)
    assert as_user(USER, lambda: error(Directory, here)) == "EACCES"


def test_seekdir_returns_to_where_telldir_was(here: Path) -> None:
    for number in range(1000):
        touch(here / f"file-{number}")
    with Directory(here) as directory:
        positions, names = [directory.tell()], []
        while (entry := directory.read()) is not None:
            names.append(entry.name)
            positions.append(directory.tell())
        for at in (500, 3, 1001, 999, 700):
            directory.seek(positions[at])
            following = [entry.name for entry in itertools.islice(iter(directory.read, None), 3)]
            assert following == names[at : at + 3], at
        directory.seek(positions[600])
        for name in names[605:610]:
            if name not in (b".", b".."):
                os.unlink(os.fsencode(here) + b"/" + name)
        left = [entry.name for entry in iter(directory.read, None)]
        assert left[-300:] == names[-300:]
        for at in (20, 700, 599, 1000, 0):
            directory.seek(positions[at])
            found = directory.read()
            assert found is not None
            assert found.name == names[at], "positions hold though entries before them went"


def test_rewinddir_sees_what_is_there_now(here: Path) -> None:
    touch(here / "old")
    with Directory(here) as directory:
        assert directory.rest() == [b"old"]
        touch(here / "new")
        os.unlink(here / "old")
        assert directory.rest() == []
        directory.rewind()
        assert directory.rest() == [b"new"]


def test_a_directory_can_be_emptied_while_it_is_read(here: Path) -> None:
    """As rm -r does: every name is seen, though each goes as soon as it is."""
    names = {b"%d" % number for number in range(3000)}
    above = os.fsencode(here)
    for name in names:
        touch(above + b"/" + name)
    seen = []
    with Directory(here) as directory:
        while (entry := directory.read()) is not None:
            if entry.name not in (b".", b".."):
                seen.append(entry.name)
                os.unlink(above + b"/" + entry.name)
    assert len(seen) == 3000
    assert set(seen) == names
    os.rmdir(here)


@pytest.mark.timeout(400)  # half a minute on an idle machine
def test_what_stays_in_100000_entries_is_listed_exactly_once(place: Place) -> None:
    """Between any two calls of getdents(2), entries before and behind the position come and go."""
    above, count = f"{place.path}/", 100_000 if place.is_aspen else 5_000
    sources = [f"entry-{number:06d}-{'x' * (number % 40)}" for number in range(count)]
    for name in sources:
        os.mknod(above + name)
    removed: set[str] = set()
    added: set[str] = set()
    seen: list[bytes] = []
    with Directory(place.path) as directory:
        while (entry := directory.read()) is not None:
            seen.append(entry.name)
            at = len(seen)
            if at % 97 == 0:
                victim = sources[at * 31_337 % count]
                if victim not in removed:
                    removed.add(victim)
                    os.unlink(above + victim)
                for new in (f"aaa-{at}", f"entry-{at % count:06d}-new-{at}", f"zzz-{at}"):
                    added.add(new)
                    os.mknod(above + new)
    names = [os.fsdecode(name) for name in seen if name not in (b".", b"..")]
    assert len(names) == len(set(names)), "nothing appears twice"
    assert set(sources) - removed <= set(names), "what stays appears"
    assert set(names) <= set(sources) | added, "nothing appears that never was"
    assert set(os.listdir(place.path)) == set(sources) - removed | added


def test_size_of_a_directory_is_its_number_of_entries(place: Place) -> None:
    """docs/posix.md; ext4 tells the bytes of its blocks."""
    for number in range(3):
        touch(place.path / f"{number}")
    (place.path / "directory").mkdir()
    os.unlink(place.path / "0")
    assert (os.stat(place.path).st_size == 3) == place.is_aspen
