"""What a tree must hold after a sequence of operations: the model behind the load of `load.py`.

Belongs here: the operations as plain lists (so that they fit in a journal), what each does to the tree,
and which states a cut-off operation may leave. Not here: doing them on a real mount.

Paths are relative to the mountpoint. Bytes are named by a seed and a size, so a journal stays short.
"""

import copy
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

Operation = list[Any]
ATOMIC_BYTES = 64 << 10  # an aligned write(2) of up to this is there as a whole or not at all
PAGE = 4096  # the kernel cuts longer ones at pages, and others behind the page in whose middle they begin


def pattern(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


class File:
    """A regular file; two names of one file share it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.mode = 0o644
        self.attributes: dict[str, bytes] = {}


class Directory:
    pass


class Symlink:
    def __init__(self, target: str) -> None:
        self.target = target


class Seen(NamedTuple):
    """One name as it is found, or as it should be."""

    kind: str
    content: bytes  # of a file; where a link points
    mode: int  # 0 where it is not compared
    nlink: int  # so too
    attributes: tuple[tuple[str, bytes], ...]
    same_as: str  # the first name, in order, of the same file


class Model:
    """Names and what they lead to."""

    def __init__(self) -> None:
        self.names: dict[str, File | Directory | Symlink] = {}

    # --- looking ---

    def files(self, tree: str) -> list[str]:
        return [p for p, node in self.names.items() if p.startswith(tree) and isinstance(node, File)]

    def directories(self, tree: str) -> list[str]:
        return [p for p, node in self.names.items() if p.startswith(tree) and isinstance(node, Directory)]

    def file(self, path: str) -> File:
        node = self.names[path]
        assert isinstance(node, File)
        return node

    def is_empty(self, path: str) -> bool:
        return not any(name.startswith(path + "/") for name in self.names)

    def seen(self) -> dict[str, Seen]:
        """As `load.look` would find it."""
        first: dict[int, str] = {}
        count: dict[int, int] = {}
        subdirectories: dict[str, int] = {}
        for path in sorted(self.names):
            node = self.names[path]
            first.setdefault(id(node), path)
            count[id(node)] = count.get(id(node), 0) + 1
            if isinstance(node, Directory):
                above = path.rpartition("/")[0]
                subdirectories[above] = subdirectories.get(above, 0) + 1
        found = {}
        for path, node in self.names.items():
            posix = path.startswith("files/")
            if isinstance(node, File):
                attributes = tuple(sorted(node.attributes.items()))
                mode, nlink = (node.mode, count[id(node)]) if posix else (0, 0)
                found[path] = Seen("file", bytes(node.data), mode, nlink, attributes, first[id(node)])
            elif isinstance(node, Symlink):
                found[path] = Seen("link", node.target.encode(), 0, 0, (), path)
            else:
                nlink = 2 + subdirectories.get(path, 0) if posix else 0
                found[path] = Seen("directory", b"", 0, nlink, (), path)
        return found

    # --- changing ---

    def apply(self, operation: Operation) -> None:
        kind, *arguments = operation
        getattr(self, "_" + kind)(*arguments)

    def after(self, operation: Operation) -> "Model":
        changed = copy.deepcopy(self)
        changed.apply(operation)
        return changed

    def possible(self, operation: Operation) -> Iterator["Model"]:
        """The states that are right if nobody knows whether `operation` was done."""
        yield self
        yield self.after(operation)
        if operation[0] in ("write", "append"):
            *first, seed, size = operation
            offset = first[2] if operation[0] == "write" else len(self.file(first[1]).data)
            for done in _cuts(offset, size):
                part = copy.deepcopy(self)
                part._put_bytes(part.file(first[1]).data, offset, pattern(seed, size)[:done])
                yield part

    @staticmethod
    def _put_bytes(data: bytearray, offset: int, piece: bytes) -> None:
        if len(data) < offset:
            data.extend(bytes(offset - len(data)))
        data[offset : offset + len(piece)] = piece

    def _mkdir(self, path: str) -> None:
        self.names[path] = Directory()

    def _rmdir(self, path: str) -> None:
        assert self.is_empty(path)
        del self.names[path]

    def _create(self, path: str) -> None:
        self.names[path] = File()

    def _write(self, path: str, offset: int, seed: int, size: int) -> None:
        self._put_bytes(self.file(path).data, offset, pattern(seed, size))

    def _append(self, path: str, seed: int, size: int) -> None:
        self.file(path).data.extend(pattern(seed, size))

    def _truncate(self, path: str, size: int) -> None:
        data = self.file(path).data
        if size < len(data):
            del data[size:]
        else:
            data.extend(bytes(size - len(data)))

    def _rename(self, old: str, new: str) -> None:
        node = self.names[old]
        if self.names.get(new) is node:
            return  # two names of one file: rename(2) does nothing
        self.names[new] = self.names.pop(old)
        for path in [name for name in self.names if name.startswith(old + "/")]:
            self.names[new + path[len(old) :]] = self.names.pop(path)

    def _exchange(self, one: str, other: str) -> None:
        self.names[one], self.names[other] = self.names[other], self.names[one]

    def _unlink(self, path: str) -> None:
        del self.names[path]

    _unlink_open = _unlink

    def _link(self, old: str, new: str) -> None:
        self.names[new] = self.names[old]

    def _symlink(self, target: str, path: str) -> None:
        self.names[path] = Symlink(target)

    def _chmod(self, path: str, mode: int) -> None:
        self.file(path).mode = mode

    def _setxattr(self, path: str, name: str, seed: int, size: int) -> None:
        self.file(path).attributes[name] = pattern(seed, size)

    def _sync(self, path: str) -> None:
        pass

    def _txn(self, puts: list[tuple[str, int, int]], deletes: list[str]) -> None:
        """By the control socket: all of it or nothing."""
        for path, seed, size in puts:
            self.names[path] = File()
            self.file(path).data[:] = pattern(seed, size)
        for path in deletes:
            del self.names[path]

    def _put(self, path: str, seed: int, size: int) -> None:
        self._txn([(path, seed, size)], [])


def _cuts(offset: int, size: int) -> range:
    """After how many bytes the kernel may cut a write into requests."""
    first = PAGE - offset % PAGE
    return range(first, size if size > ATOMIC_BYTES else min(size, first + (first < PAGE)), PAGE)
