"""A tree as a value: what must be the same in two places, or before and after a remount."""

import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple


class Node(NamedTuple):
    """A name and what stat(2), read(2), readlink(2) and getxattr(2) say of it."""

    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int  # 0 for directories: what they say is the file system's own matter
    content: bytes  # digest of a file's bytes, target of a symbolic link
    xattrs: tuple[tuple[str, bytes], ...]
    mtime_ns: int
    ctime_ns: int
    ino: int

    def lasting(self) -> "Node":
        """Without what two file systems need not agree on."""
        return self._replace(mtime_ns=0, ctime_ns=0, ino=0)


def snapshot(root: Path) -> dict[bytes, Node]:
    """Every name below `root`, by its path from there; `root` itself is b""."""
    found = {b"": look(os.fsencode(root))}
    _below(os.fsencode(root), b"", found)
    return found


def _below(root: bytes, path: bytes, found: dict[bytes, Node]) -> None:
    with os.scandir(os.path.join(root, path)) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        below = path + b"/" + name if path else name
        found[below] = look(os.path.join(root, below))
        if stat.S_ISDIR(found[below].mode):
            _below(root, below, found)


def look(path: bytes) -> Node:
    """The node at a path."""
    info = os.lstat(path)
    content, size = b"", info.st_size
    if stat.S_ISREG(info.st_mode):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "blake2b").digest()
    elif stat.S_ISLNK(info.st_mode):
        content = os.readlink(path)
    elif stat.S_ISDIR(info.st_mode):
        size = 0
    names = sorted(os.listxattr(path, follow_symlinks=False))
    xattrs = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
    times = (info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
    return Node(
        info.st_mode, info.st_nlink, info.st_uid, info.st_gid, info.st_rdev, size, content, xattrs, *times
    )


def differences(one: dict[bytes, Node], other: dict[bytes, Node]) -> list[str]:
    """What differs, a line for each name; empty if nothing does."""
    lines = [f"only in the first: {path!r}" for path in sorted(one.keys() - other.keys())]
    lines += [f"only in the second: {path!r}" for path in sorted(other.keys() - one.keys())]
    for path in sorted(one.keys() & other.keys()):
        if one[path] != other[path]:
            fields = [
                f"{field}: {a!r} | {b!r}"
                for field, a, b in zip(Node._fields, one[path], other[path], strict=True)
                if a != b
            ]
            lines.append(f"{path!r}: {'; '.join(fields)}")
    return lines
