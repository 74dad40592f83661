"""What must hold in files/, verified row by row (docs/design/files.md, Invariants), and how to mend it.

A walk over one State or Store: the result is a list of problems, each with the operations that mend it,
if that is possible without guessing. Nothing is changed here. Needs memory for every inode (some 300
bytes each), so it is for `aspen check`, not for the request path.
"""

import stat
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from aspenfs.filesystem import layout
from aspenfs.filesystem.layout import dirent_key, inode_key, number, orphan_key
from aspenfs.kv.types import Operation, Record, add, delete, merge, patch, prefix_end, put

LOST_AND_FOUND = b"lost+found"


class Scannable(Protocol):
    """The part of a Store that a check needs."""

    def get(self, key: bytes) -> Record | None: ...
    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, Record]]: ...


class Problem(NamedTuple):
    """`where` is a path or the name of a row; `mend` is None where data is lost or a guess is needed."""

    where: str
    text: str
    mend: list[Operation] | None


class _Node:
    """What the walk has seen of one inode."""

    __slots__ = ("directories", "entries", "extents", "inode", "name", "names", "parent")

    def __init__(self, inode: layout.Inode) -> None:
        self.inode = inode
        self.names = self.entries = self.directories = self.extents = 0
        self.parent, self.name = 0, b""


class Check:
    """One check of one file system. `problems()` runs it and may be interrupted between problems."""

    def __init__(self, state: Scannable, has_blob: Callable[[bytes], bool] | None) -> None:
        self.state, self.has_blob = state, has_blob
        self.nodes: dict[int, _Node] = {}
        self.references: dict[bytes, int] = {}
        self.named: set[bytes] = set()  # digests that extents name
        self.adopted = 0

    def problems(self) -> Iterator[Problem]:
        for key, record in self._rows(layout.INODE_PREFIX):
            if len(record.value) < layout.INODE.size or record.value[80] != layout.FORMAT:
                yield Problem(repr(key), "not an inode of a known format", None)
                continue
            self.nodes[int.from_bytes(key[3:11], "big")] = _Node(layout.unpack_inode(record.value))
        if not self.nodes and not any(True for _ in self._rows(layout.DIRENT_PREFIX)):
            return  # a store without a file system
        if layout.ROOT not in self.nodes:
            yield Problem("/", "the root directory is missing", None)
            return
        yield from self._entries()
        yield from self._reachable()
        yield from self._extents()
        yield from self._counts()
        yield from self._attributes()
        yield from self._blobs()
        yield from self._totals()

    def _rows(self, prefix: bytes) -> Iterator[tuple[bytes, Record]]:
        return self.state.scan(prefix, prefix_end(prefix))

    def _entries(self) -> Iterator[Problem]:
        for key, record in self._rows(layout.DIRENT_PREFIX):
            parent, name = int.from_bytes(key[3:11], "big"), key[11:]
            child, kind = layout.DIRENT.unpack(record.value)
            above, below = self.nodes.get(parent), self.nodes.get(child)
            where = f"{self.path(parent)}/{_text(name)}"
            if above is None or not stat.S_ISDIR(above.inode.mode):
                yield Problem(where, f"entry in inode {parent}, which is not a directory", [delete(key)])
                continue
            if below is None:
                yield Problem(where, f"names inode {child}, which is not there", [delete(key)])
                continue
            above.entries += 1
            if below.inode.mode >> 12 != kind:
                right = layout.DIRENT.pack(child, below.inode.mode >> 12)
                yield Problem(where, "the entry's type is not the inode's", [put(key, right)])
            below.names += 1
            if stat.S_ISDIR(below.inode.mode):
                above.directories += 1
                if below.names > 1:
                    yield Problem(where, "a directory with a second name", None)
                elif below.inode.parent != parent:
                    mend = [merge(inode_key(child), patch(layout.PARENT, number(parent)[::-1]))]
                    yield Problem(where, f"its parent is recorded as {below.inode.parent}", mend)
            below.parent, below.name = parent, name

    def _reachable(self) -> Iterator[Problem]:
        """Every inode has a name, every chain of parents ends at the root."""
        orphans = {int.from_bytes(key[3:11], "big") for key, _ in self._rows(layout.ORPHAN_PREFIX)}
        for gone in sorted(orphans - self.nodes.keys()):
            yield Problem(f"orphan {gone}", "its inode is not there", [delete(orphan_key(gone))])
        rooted = {layout.ROOT}
        for identifier, node in self.nodes.items():
            if identifier == layout.ROOT or identifier in orphans:
                continue
            if not node.names:
                yield Problem(f"inode {identifier}", "has no name", self._adopt(identifier, node))
                continue
            chain, at = [], identifier
            while at not in rooted and at not in chain and at in self.nodes and self.nodes[at].names:
                chain.append(at)
                at = self.nodes[at].parent
            if at in chain:
                yield Problem(f"inode {identifier}", "is in a loop of directories", None)
            elif at in rooted:
                rooted.update(chain)

    def _adopt(self, identifier: int, node: _Node) -> list[Operation]:
        """A name in /lost+found, which is made at need."""
        record = self.state.get(dirent_key(layout.ROOT, LOST_AND_FOUND))
        operations: list[Operation] = []
        if record is not None:
            home = layout.DIRENT.unpack(record.value)[0]
        else:
            home = 2  # reserved: ids below FIRST_ID are never handed out
            if not self.adopted:
                fields = (2, 0, 0, 0, 0, 0, 0, 0o40700, 0, 0, 0, layout.ROOT, layout.FORMAT, 0)
                operations += [
                    put(dirent_key(layout.ROOT, LOST_AND_FOUND), layout.DIRENT.pack(home, 4)),
                    put(inode_key(home), layout.INODE.pack(*fields)),
                    merge(inode_key(layout.ROOT), add(layout.ENTRIES, 1), add(layout.NLINK, 1)),
                    merge(layout.USAGE_KEY, add(0, 1)),
                ]
        self.adopted += 1
        kind = node.inode.mode >> 12
        edits = [add(layout.ENTRIES, 1)]
        if kind == 4:
            edits.append(add(layout.NLINK, 1))
            operations.append(merge(inode_key(identifier), patch(layout.PARENT, number(home)[::-1])))
        else:
            operations.append(merge(inode_key(identifier), patch(layout.NLINK, layout.I64(1))))
        name = b"#%d" % identifier
        return [
            *operations,
            put(dirent_key(home, name), layout.DIRENT.pack(identifier, kind)),
            merge(inode_key(home), *edits),
        ]

    def _extents(self) -> Iterator[Problem]:
        last, end = 0, 0
        for key, record in self._rows(layout.EXTENT_PREFIX):
            identifier = int.from_bytes(key[3:11], "big")
            if identifier != last:
                last, end = identifier, 0
            extent = layout.unpack_extent(key, record.value)
            node = self.nodes.get(identifier)
            if node is None:
                yield Problem(f"inode {identifier}", "bytes of an inode that is not there", [delete(key)])
                continue
            where = self.path(identifier)
            if extent.offset < end:
                yield Problem(where, f"extents overlap at {extent.offset}", None)
            end = extent.offset + extent.length
            if end > node.inode.size:
                text = f"extent {extent.offset}+{extent.length} beyond size {node.inode.size}"
                mend = [merge(inode_key(identifier), patch(layout.SIZE, layout.I64(end)))]
                yield Problem(where, text, mend)
            node.extents += extent.length
            if extent.data is None:
                self.references[extent.digest] = self.references.get(extent.digest, 0) + 1
                self.named.add(extent.digest)
                if self.has_blob is not None and not self.has_blob(extent.digest):
                    text = f"bytes {extent.offset}+{extent.length} are lost: no blob {extent.digest.hex()}"
                    yield Problem(where, text, None)

    def _counts(self) -> Iterator[Problem]:
        for identifier, node in self.nodes.items():
            inode = node.inode
            if stat.S_ISDIR(inode.mode):
                yield from self._count(identifier, "nlink", inode.nlink, 2 + node.directories, layout.NLINK)
                yield from self._count(identifier, "entries", inode.entries, node.entries, layout.ENTRIES)
            elif node.names or inode.nlink:
                yield from self._count(identifier, "nlink", inode.nlink, node.names, layout.NLINK)
            yield from self._count(identifier, "allocated", inode.allocated, node.extents, layout.ALLOCATED)

    def _count(self, identifier: int, what: str, found: int, right: int, field: int) -> Iterator[Problem]:
        # An inode without a name gets its counts with its new name.
        if found != right and (identifier == layout.ROOT or self.nodes[identifier].names):
            mend = [merge(inode_key(identifier), patch(field, layout.I64(right)))]
            yield Problem(self.path(identifier), f"{what} is {found}, should be {right}", mend)

    def _attributes(self) -> Iterator[Problem]:
        for key, _ in self._rows(layout.XATTR_PREFIX):
            identifier = int.from_bytes(key[3:11], "big")
            node = self.nodes.get(identifier)
            if node is None:
                yield Problem(f"inode {identifier}", "attribute of an inode that is not there", [delete(key)])
            elif not node.inode.flags & layout.HAS_XATTRS:
                flags = bytes([node.inode.flags | layout.HAS_XATTRS])
                mend = [merge(inode_key(identifier), patch(layout.FLAGS, flags))]
                yield Problem(self.path(identifier), "has hidden extended attributes", mend)

    def _blobs(self) -> Iterator[Problem]:
        for key, record in self._rows(layout.BLOB_PREFIX):
            found = int.from_bytes(record.value[:8], "little", signed=True)
            right = self.references.pop(key[3:], 0)
            if found != right:
                yield Problem(
                    f"blob {key[3:].hex()}", f"counted {found} times, named {right} times", [_set(key, right)]
                )
        for digest, right in self.references.items():
            yield Problem(
                f"blob {digest.hex()}",
                f"not counted, named {right} times",
                [_set(layout.BLOB_PREFIX + digest, right)],
            )

    def _totals(self) -> Iterator[Problem]:
        usage = self._number(layout.USAGE_KEY)
        if usage != len(self.nodes):
            mend = [_set(layout.USAGE_KEY, len(self.nodes) + (1 if self.adopted else 0))]
            yield Problem("usage", f"{usage} inodes counted, {len(self.nodes)} are there", mend)
        greatest, counter = max(self.nodes), self._number(layout.COUNTER_KEY)
        if greatest > counter:
            yield Problem(
                "counter",
                f"inode {greatest} beyond the last handed out {counter}",
                [_set(layout.COUNTER_KEY, greatest)],
            )

    def _number(self, key: bytes) -> int:
        record = self.state.get(key)
        return 0 if record is None else int.from_bytes(record.value[:8], "little", signed=True)

    def path(self, identifier: int) -> str:
        """A path for people, as far as parents are known."""
        parts: list[str] = []
        while identifier != layout.ROOT and len(parts) < 4096:
            node = self.nodes.get(identifier)
            if node is None or not node.parent:
                parts.append(f"<inode {identifier}>")
                break
            parts.append(_text(node.name))
            identifier = node.parent
        return "/" + "/".join(reversed(parts))


def unnamed_blobs(state: Scannable, digests: Iterable[bytes]) -> Iterator[bytes]:
    """Those of `digests` that no row counts: left by a crash between storing and naming."""
    for digest in digests:
        if state.get(layout.BLOB_PREFIX + digest) is None:
            yield digest


def _set(key: bytes, value: int) -> Operation:
    return put(key, layout.I64(value))


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


__all__ = ["Check", "Problem", "unnamed_blobs"]
