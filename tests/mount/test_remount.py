"""What a tree is before, it is after: umount and mount, kill -9 and mount."""

import os
import random
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from tests.mount.mounting import Mount, alive, wait_for
from tests.mount.posix.calls import touch
from tests.mount.snapshot import differences, snapshot


def build(root: Path) -> None:
    """A tree with something of everything that can be stored."""
    rng = random.Random(7)
    for number in range(300):
        directory = root / f"d{number % 17}" / f"e{number % 5}"
        directory.mkdir(parents=True, exist_ok=True)
        touch(directory / f"file-{number}", rng.randbytes(rng.choice((0, 1, 100, 5000, 20_000, 70_000))))
    big = os.open(root / "big", os.O_RDWR | os.O_CREAT)
    for piece in range(5):
        os.pwrite(big, rng.randbytes(700_000), piece * 3_000_000)
    os.ftruncate(big, 20_000_000)
    os.close(big)
    os.link(root / "big", root / "d1" / "second name")
    os.symlink("../d1/second name", root / "d2" / "link")
    os.symlink(b"\xff" * 4095, root / "long link")
    os.mkfifo(root / "fifo")
    os.mknod(root / "device", stat.S_IFCHR | 0o620, os.makedev(4, 5))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "s"))
    touch(os.fsencode(root) + b"/\xfe\xff", b"bytes", 0o4711)
    touch(root / ("n" * 255), b"long")
    for name, value in {
        "user.a": b"1",
        "trusted.b": b"2" * 5000,
        "security.c": b"",
        "user.d": b"4" * 65_536,
    }.items():
        os.setxattr(root / "big", name, value)
    os.setxattr(root / "d3", "user.directory", b"yes")
    os.chmod(root / "d4", 0o2770)
    os.chown(root / "d4", 12, 34)
    (root / "empty").mkdir(mode=0o1777)
    os.rename(root / "d5", root / "d6" / "moved")
    os.utime(root / "d6", ns=(1, 2))
    os.utime(root / "long link", ns=(-(10**9), 10**18 + 7), follow_symlinks=False)


def assert_checked(mount: Mount) -> None:
    """`aspen check` finds nothing, and the log has no complaint."""
    mount.aspen("check")
    mount.assert_healthy()


@pytest.mark.parametrize("end", ["umount", "SIGTERM", "SIGKILL"])
def test_the_tree_is_the_same_after_a_remount(own_mount: Mount, end: str) -> None:
    root = own_mount.mountpoint / "files"
    build(root)
    unnamed = os.open(root / "d7" / "e0" / "open and unlinked", os.O_RDWR | os.O_CREAT)
    os.write(unnamed, b"x" * 100_000)
    os.unlink(root / "d7" / "e0" / "open and unlinked")
    before, free = snapshot(root), os.statvfs(root).f_ffree
    if end == "SIGKILL":
        own_mount.kill()
        with pytest.raises(OSError, match=r"not connected|connection abort"):
            os.read(unnamed, 1)
        os.close(unnamed)
    else:
        os.close(unnamed)
        if end == "umount":
            own_mount.stop()
        else:
            os.kill(own_mount.pid, signal.SIGTERM)
            assert wait_for(lambda: not alive(own_mount.pid), 30)
            assert not own_mount.is_mounted()
    own_mount.start()
    after = snapshot(root)
    assert differences(before, after) == []
    assert wait_for(lambda: os.statvfs(root).f_ffree == free + 1, 30), "the file without a name stays"
    assert_checked(own_mount)


def test_what_is_done_after_a_remount_lasts_too(own_mount: Mount) -> None:
    """Inode numbers go on where they were, also after a crash: none is handed out twice."""
    root = own_mount.mountpoint / "files"
    numbers: set[int] = set()
    for life in range(4):
        for number in range(50):
            path = root / f"{life}-{number}"
            touch(path, b"x" * number)
            numbers.add(os.stat(path).st_ino)
        if life % 2:
            own_mount.kill()
        else:
            own_mount.stop()
        own_mount.start()
    assert len(numbers) == 200
    assert {entry.stat().st_ino for entry in os.scandir(root)} == numbers
    assert_checked(own_mount)


def test_keys_and_their_attributes_last(own_mount: Mount) -> None:
    root = own_mount.mountpoint / "kv"
    script = """
        mkdir -p app/db empty; echo one > app/db/host; ln -s app/db/host link; printf %1000s x > large
        chmod 600 large; chown 12:34 link large; touch -d '2001-01-01 UTC' app/db/host; echo x > gone; rm gone
    """
    subprocess.run(["bash", "-euc", script], cwd=root, check=True)
    os.setxattr(root / "large", "user.note", b"mine")
    own_mount.aspen("kv", "put", "by/command", "value")
    before = snapshot(root)
    own_mount.kill()
    own_mount.start()
    between = snapshot(root)
    own_mount.stop()
    own_mount.start()
    # Of this mount only: numbers of inodes in kv/, and the times of directories that nobody made.
    kept = [
        {path: node._replace(ino=0) for path, node in each.items() if path not in (b"", b"by")}
        for each in (before, between, snapshot(root))
    ]
    assert differences(kept[0], kept[1]) == []
    assert differences(kept[0], kept[2]) == []
    assert_checked(own_mount)
