"""Listings that the kernel keeps: that it keeps them, and that no change of names escapes it.

Whether the daemon was asked is seen by stopping it (SIGSTOP): then only the kernel can answer.
"""

import ctypes
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.mounting import Mount, wait_for
from tests.mount.posix.calls import (
    EXCHANGE,
    Directory,
    error,
    in_child,
    libc,
    renameat2,
    touch,
)

SHOWN_S = 30.0  # after a change from elsewhere; it takes milliseconds
ALONE_S = 10.0  # in which the kernel alone has given a listing, on a busy machine; it takes milliseconds
STRESS_S = 6.0


@pytest.fixture
def files(mount: Mount) -> Path:
    path = mount.mountpoint / "files" / f"listings-{time.monotonic_ns()}"
    path.mkdir()
    return path


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def list_with_a_stopped_daemon(mount: Mount, path: Path) -> list[str] | None:
    """What a process is given while the daemon is stopped; None if it waits for the daemon."""
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        done = subprocess.run(
            ["ls", "-f", str(path)], capture_output=True, text=True, timeout=ALONE_S, check=True
        )  # -f: no stat of anything
    except subprocess.TimeoutExpired:
        return None
    finally:
        os.kill(mount.pid, signal.SIGCONT)
    return sorted(set(done.stdout.split()) - {".", ".."})


def test_a_listing_is_given_by_the_kernel_alone_until_something_changes(own_mount: Mount) -> None:
    for tree in ("files", "kv", "cluster", ""):
        path = own_mount.mountpoint / tree
        if tree in ("files", "kv"):
            for number in range(300):
                touch(path / f"{number}")
        before = names(path)
        assert names(path) == before  # opendir(3) asks for the time that the first one has moved, too
        assert list_with_a_stopped_daemon(own_mount, path) == before, tree
        assert list_with_a_stopped_daemon(own_mount, path) == before, tree
    touch(own_mount.mountpoint / "files" / "new")
    assert list_with_a_stopped_daemon(own_mount, own_mount.mountpoint / "files") is None
    assert "new" in names(own_mount.mountpoint / "files")


def test_every_call_that_changes_names_shows_at_once(files: Path) -> None:
    def make() -> None:
        os.close(os.open(files / "made", os.O_CREAT | os.O_EXCL))

    (files / "sub").mkdir()
    touch(files / "a")
    touch(files / "sub" / "b")
    changes: list[tuple[Callable[[], object], set[str], set[str]]] = [
        (make, {"a", "made", "sub"}, {"b"}),
        (lambda: os.unlink(files / "made"), {"a", "sub"}, {"b"}),
        (lambda: os.link(files / "a", files / "sub" / "linked"), {"a", "sub"}, {"b", "linked"}),
        (lambda: os.symlink("x", files / "symbolic"), {"a", "sub", "symbolic"}, {"b", "linked"}),
        (lambda: os.rename(files / "symbolic", files / "renamed"), {"a", "sub", "renamed"}, {"b", "linked"}),
        (lambda: os.rename(files / "renamed", files / "sub" / "b"), {"a", "sub"}, {"b", "linked"}),
        (lambda: os.mkdir(files / "sub" / "dir"), {"a", "sub"}, {"b", "dir", "linked"}),
        (
            lambda: renameat2(files / "a", files / "sub" / "dir", EXCHANGE),
            {"a", "sub"},
            {"b", "dir", "linked"},
        ),
        (lambda: os.rename(files / "a", files / "up"), {"sub", "up"}, {"b", "dir", "linked"}),
        (lambda: os.rmdir(files / "up"), {"sub"}, {"b", "dir", "linked"}),
        (lambda: os.mkfifo(files / "fifo"), {"fifo", "sub"}, {"b", "dir", "linked"}),
    ]
    with Directory(files) as top, Directory(files / "sub") as sub:
        for number, (change, expected, below) in enumerate(changes):
            for _ in range(2):  # the second from the kernel's own pages
                names(files), names(files / "sub")
            change()
            assert set(os.listdir(files)) == expected, number
            assert set(os.listdir(files / "sub")) == below, number
            for directory, wanted in ((top, expected), (sub, below)):
                directory.rewind()
                assert {os.fsdecode(name) for name in directory.rest()} == wanted, number


def test_types_are_those_of_now(files: Path) -> None:
    """A name that turns from a file into a directory by rename: d_type tells."""
    touch(files / "name")
    (files / "other").mkdir()
    assert {entry.name: entry.is_dir() for entry in os.scandir(files)} == {"name": False, "other": True}
    renameat2(files / "name", files / "other", EXCHANGE)
    found = {entry.name: (entry.is_dir(), entry.inode()) for entry in os.scandir(files)}
    assert found == {name: (os.path.isdir(files / name), os.stat(files / name).st_ino) for name in found}


def test_changes_by_the_command_line_show_in_kv(mount: Mount) -> None:
    kv = mount.mountpoint / "kv"
    top = f"listed-{time.monotonic_ns()}"
    (kv / top).mkdir()

    def shows(path: Path, expected: list[str]) -> bool:
        return wait_for(lambda: names(path) == expected, SHOWN_S)

    for step in range(3):
        assert names(kv / top) == names(kv / top) == []
        mount.aspen("kv", "put", f"{top}/key", f"{step}")
        assert shows(kv / top, ["key"])
        mount.aspen("kv", "put", f"{top}/implicit/deep/key", "x")
        assert shows(kv / top, ["implicit", "key"])
        assert names(kv / top / "implicit") == ["deep"]
        assert names(kv / top / "implicit" / "deep") == ["key"]
        mount.aspen("kv", "put", f"{top}/implicit/deep", "a key besides")
        assert shows(kv / top / "implicit" / "deep", ["%value", "key"])
        mount.aspen("kv", "delete", f"{top}/key")
        assert shows(kv / top, ["implicit"])
        assert top in names(kv)
        descriptor = os.open(kv / top / "implicit", os.O_RDONLY)
        mount.aspen("kv", "delete", "--prefix", f"{top}/implicit/")
        assert shows(kv / top, [])
        # docs/design/kv-paths.md: until there is such a key again.
        assert error(os.listdir, descriptor) == "ENOENT"
        os.close(descriptor)
    mount.aspen("kv", "put", f"{top}-beside", "x")
    assert wait_for(lambda: f"{top}-beside" in names(kv), SHOWN_S)


def test_the_root_of_a_subtree_mount_shows_what_others_change() -> None:
    mount = Mount()
    try:
        mount.start().aspen("kv", "put", "app/first", "x")
        mount.stop()
        mount.start(spec="demo:/kv/app")
        assert names(mount.mountpoint) == names(mount.mountpoint) == ["first"]
        mount.aspen("kv", "put", "app/second", "x")
        assert wait_for(lambda: names(mount.mountpoint) == ["first", "second"], SHOWN_S)
        mount.aspen("kv", "delete", "app/first")
        assert wait_for(lambda: names(mount.mountpoint) == ["second"], SHOWN_S)
        mount.assert_healthy()
    finally:
        mount.close()


def test_a_removed_directory_that_was_listed_is_empty(files: Path) -> None:
    (files / "gone").mkdir()
    touch(files / "gone" / "file")
    descriptor = os.open(files / "gone", os.O_RDONLY)
    assert os.listdir(descriptor) == ["file"]

    def stay() -> list[object]:
        os.chdir(files / "gone")
        before = os.listdir(".")
        os.unlink("file")
        os.rmdir(files / "gone")
        return [before, os.listdir("."), os.listdir(descriptor), error(os.scandir, files / "gone")]

    assert in_child(stay) == [["file"], [], [], "ENOENT"]
    os.fsync(descriptor)
    os.close(descriptor)


def test_fsync_of_a_directory_waits_for_the_disk(mount: Mount, files: Path) -> None:
    touch(files / "file")
    descriptor = os.open(files, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.fdatasync(descriptor)
    os.close(descriptor)
    status = mount.aspen("status", "--json")
    assert b'"ok": true' in status or b'"ok":true' in status


def getdents(descriptor: int, size: int) -> list[tuple[bytes, int]]:
    """One getdents64(2) with so small a buffer: names and positions."""
    buffer = ctypes.create_string_buffer(size)
    length = libc.syscall(217, descriptor, buffer, size)
    if length < 0:
        raise OSError(ctypes.get_errno(), "getdents64")
    found, at = [], 0
    while at < length:
        position = int.from_bytes(buffer.raw[at + 8 : at + 16], "little")
        step = int.from_bytes(buffer.raw[at + 16 : at + 18], "little")
        found.append((buffer.raw[at + 19 : at + step].split(b"\0")[0], position))
        at += step
    return found


def test_readers_with_buffers_of_all_sizes_see_what_stays_once(files: Path) -> None:
    """Some begin early, some late, some seek back; names come and go; all on one cached listing."""
    noise = random.Random(5)
    staying = {b"stay-%d" % number for number in range(400)}
    above = os.fsencode(files) + b"/"
    for name in staying:
        touch(above + name)
    others: set[bytes] = set()
    for _ in range(6):
        readers: list[tuple[int, int, list[bytes], list[int]]] = [
            (os.open(files, os.O_RDONLY), size, [], []) for size in (64, 280, 1000, 4096, 32768)
        ]
        running = list(readers)
        seeks = 12
        while running:
            reader = noise.choice(running)
            descriptor, size, seen, positions = reader
            batch = getdents(descriptor, size)
            if not batch:
                running.remove(reader)
            seen += [name for name, _ in batch]
            positions += [position for _, position in batch]
            if positions and seeks and noise.random() < 0.05:
                seeks -= 1
                at = noise.randrange(len(positions))
                os.lseek(descriptor, positions[at], os.SEEK_SET)
                del seen[at + 1 :], positions[at + 1 :]
                if reader not in running:
                    running.append(reader)
            if noise.random() < 0.3:
                name = b"other-%d" % noise.randrange(100)
                if name in others:
                    others.remove(name)
                    os.unlink(above + name)
                else:
                    others.add(name)
                    touch(above + name)
        for descriptor, size, seen, _ in readers:
            os.close(descriptor)
            assert len(set(seen)) == len(seen), size
            assert staying <= set(seen), size
        assert set(os.listdir(os.fsencode(files))) == staying | others


def read_on(descriptor: int, size: int = 32768) -> list[bytes]:
    found = []
    while batch := getdents(descriptor, size):
        found += [name for name, _ in batch]
    return found


@pytest.mark.parametrize("more", [0, 128, 1])
def test_a_reader_misses_nothing_where_a_listing_fills_its_pages(files: Path, more: int) -> None:
    """The kernel does not find the reader's position in the listing that it keeps, and takes it for the end,
    if that listing ends where a page does: 128 entries of 32 bytes, with the dots."""
    names_there = [b"f%03d" % number for number in range(126 + more)]
    above = os.fsencode(files) + b"/"
    for name in names_there:
        touch(above + name)
    descriptor = os.open(files, os.O_RDONLY)
    seen = [name for name, _ in getdents(descriptor, 1000)]
    os.unlink(above + seen[3])
    touch(above + b"new")
    for _ in range(3):
        assert len(os.listdir(files)) == 126 + more
    seen += read_on(descriptor)
    os.close(descriptor)
    assert len(set(seen)) == len(seen)
    assert set(names_there) <= set(seen)


def test_a_listing_that_somebody_left_halfway_is_kept_when_another_completes_it(own_mount: Mount) -> None:
    path = own_mount.mountpoint / "files"
    for number in range(600):
        touch(path / f"{number}")
    for changes in (False, True):
        touch(path / f"begins-anew-{changes}")
        descriptor = os.open(path, os.O_RDONLY)
        assert len(getdents(descriptor, 4096)) < 300
        os.close(descriptor)
        if changes:
            touch(path / "new")
        for _ in range(3):
            before = names(path)
        assert list_with_a_stopped_daemon(own_mount, path) == before


def _list_all_the_time(path: Path, staying: frozenset[str], end_s: float) -> None:
    while time.monotonic() < end_s:
        found = os.listdir(path)
        assert len(set(found)) == len(found)
        assert staying <= set(found)


def _change_and_look(path: Path, mine: str, end_s: float) -> int:
    """Every change of its own it sees in the very next listing, whatever the others do."""
    noise = random.Random(mine)
    there: set[str] = set()
    rounds = 0
    while time.monotonic() < end_s:
        rounds += 1
        name = f"{mine}-{noise.randrange(30)}"
        if name not in there:
            touch(path / name)
            there.add(name)
        elif noise.random() < 0.5:
            os.unlink(path / name)
            there.remove(name)
        else:
            new = f"{mine}-renamed-{rounds}"
            os.rename(path / name, path / new)
            there.remove(name)
            there.add(new)
        found = os.listdir(path)
        assert len(set(found)) == len(found)
        assert {name for name in found if name.startswith(mine)} == there
    return rounds


@pytest.mark.parametrize("count", [20, 700])
def test_no_listing_is_old_however_many_list_and_change_at_once(files: Path, count: int) -> None:
    staying = frozenset(f"stay-{number}" for number in range(count))
    for name in staying:
        touch(files / name)
    context = multiprocessing.get_context("fork")
    end_s = time.monotonic() + STRESS_S
    workers = [
        *(context.Process(target=_list_all_the_time, args=(files, staying, end_s)) for _ in range(3)),
        *(context.Process(target=_change_and_look, args=(files, mine, end_s)) for mine in ("one", "two")),
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
