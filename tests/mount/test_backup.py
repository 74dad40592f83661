"""A backup of a real mount under load, restored and mounted: the same tree, the same keys, and it goes on."""

import hashlib
import json
import os
import threading
from pathlib import Path

from tests.mount.mounting import Mount


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Every name below `root` with what a program can see of it, times in ns."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = Path(directory, name)
            status = path.lstat()
            content = b""
            if path.is_symlink():
                content = os.fsencode(os.readlink(path))
            elif path.is_file():
                content = hashlib.sha256(path.read_bytes()).digest()
            keys = [] if path.is_symlink() else os.listxattr(path)
            attributes = {key: os.getxattr(path, key) for key in keys}
            what = status.st_mode, status.st_nlink, status.st_size, status.st_mtime_ns
            found[str(path.relative_to(root))] = (*what, content, attributes)
    return found


def fill(files: Path) -> None:
    (files / "deep/er").mkdir(parents=True)
    for number in range(40):
        (files / "deep" / f"small{number}").write_bytes(b"%d" % number * 100)
    for number in range(4):
        (files / "deep/er" / f"large{number}").write_bytes(os.urandom(1_500_000 + number))
    with open(files / "sparse", "wb") as sparse:
        sparse.write(b"begin")
        sparse.seek(5 << 20)
        sparse.write(b"end")
    os.link(files / "sparse", files / "deep/link")
    (files / "symbolic").symlink_to("deep/er")
    os.setxattr(files / "deep/small1", "user.note", b"kept")
    os.mkfifo(files / "pipe")


def test_a_backup_taken_under_load_is_mounted_again_elsewhere(own_mount: Mount, tmp_path: Path) -> None:
    files, target = own_mount.mountpoint / "files", tmp_path / "demo.aspen"
    fill(files)
    own_mount.aspen("kv", "put", "app/db", "one")
    own_mount.aspen("kv", "put", "app/db", "two")
    wanted = tree(files)
    stop = threading.Event()

    def load() -> None:
        for number in range(10_000):
            if stop.is_set():
                return
            path = own_mount.mountpoint / "files" / f"load{number % 20}"
            path.write_bytes(os.urandom(60_000))
            if number % 3 == 2:
                path.unlink()

    writer = threading.Thread(target=load)
    writer.start()
    try:
        told = json.loads(own_mount.aspen("backup", "--json", str(target)))
    finally:
        stop.set()
        writer.join()
    assert told["lost"] == []
    own_mount.aspen("backup", "--verify", str(target))
    own_mount.assert_healthy()
    own_mount.stop()

    other = Mount()
    try:
        other.aspen("restore", str(target), "--name", "demo2")
        other.start(spec="demo2")
        restored = tree(other.mountpoint / "files")
        assert {name: what for name, what in restored.items() if "load" not in name} == wanted
        assert other.aspen("kv", "get", "app/db") == b"two"
        (other.mountpoint / "files/new").write_bytes(os.urandom(100_000))
        other.aspen("kv", "put", "app/db", "three")
        assert b"clean" in other.aspen("check")
        status = json.loads(other.aspen("status", "--json"))
        assert status["healthy"], status
        other.assert_healthy()
        other.stop()
        assert b"clean" in other.aspen("check", "--offline")
    finally:
        other.close()
