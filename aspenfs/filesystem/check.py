"""What must hold in files/, verified row by row (docs/design/files.md, Invariants), and how to mend it.

A walk over one State or Store that stands still: the result is a list of problems, each with the
operations that mend it, if that is possible without guessing. Nothing is changed here. A serving daemon
runs it too, so it keeps 40 bytes for an inode and some 200 for a blob, in arrays, which the garbage
collector does not walk; rows are read again rather than held.
"""

import stat
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, Protocol

from aspenfs.filesystem import layout
from aspenfs.filesystem.layout import Extent, Inode, dirent_key, inode_key, number, orphan_key
from aspenfs.kv.types import Operation, Record, add, delete, merge, patch, prefix_end, put

LOST_AND_FOUND = b"lost+found"
DIRECTORY: Final = stat.S_IFDIR >> 12
NAMES_KEPT: Final = 16  # directories whose names are kept for paths
UNKNOWN, ROOTED, UNROOTED, DETACHED = range(4)  # what is known of where an inode's chain of parents ends


class Scannable(Protocol):
    """The part of a Store that a check needs."""

    def get(self, key: bytes) -> Record | None: ...
    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, Record]]: ...


class Problem(NamedTuple):
    """`where` is a path or the name of a row; `mend` is None where data is lost or a guess is needed."""

    where: str
    text: str
    mend: list[Operation] | None


class _Nodes:
    """What the walk has seen of each inode: a column a property, a row an inode, in order of their ids."""

    def __init__(self) -> None:
        self.ids = array("Q")
        self.kinds = bytearray()  # type bits of the mode, shifted right by 12
        self.names = array("I")  # entries that name it
        self.parents = array("Q")  # the directory of the last of them
        self.entries = array("I")  # of a directory, and how many of them are directories
        self.directories = array("I")
        self.bytes = array("Q")  # in extents

    def add(self, identifier: int, kind: int) -> None:
        self.ids.append(identifier)
        self.kinds.append(kind)
        for column in (self.names, self.parents, self.entries, self.directories, self.bytes):
            column.append(0)

    def find(self, identifier: int) -> int:
        """The row, -1 if there is none."""
        at = bisect_left(self.ids, identifier)
        return at if at < len(self.ids) and self.ids[at] == identifier else -1


class Check:
    """One check of one file system. `problems()` runs it and may be interrupted between problems."""

    def __init__(self, state: Scannable, has_blob: Callable[[bytes], bool] | None) -> None:
        self.state, self.has_blob = state, has_blob
        self.nodes = _Nodes()
        self.references: dict[bytes, int] = {}  # digest -> extents that name it
        self.adopted = 0
        self._names: dict[int, dict[int, bytes]] = {}

    @property
    def inodes(self) -> int:
        return len(self.nodes.ids)

    def problems(self) -> Iterator[Problem]:
        for key, record in self._rows(layout.INODE_PREFIX):
            if len(record.value) < layout.INODE.size or record.value[80] != layout.FORMAT:
                yield Problem(repr(key), "not an inode of a known format", None)
                continue
            self.nodes.add(int.from_bytes(key[3:11], "big"), layout.unpack_inode(record.value).mode >> 12)
        if not self.inodes and not any(True for _ in self._rows(layout.DIRENT_PREFIX)):
            return  # a store without a file system
        if self.nodes.find(layout.ROOT) < 0:
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

    def _inode(self, identifier: int) -> Inode:
        record = self.state.get(inode_key(identifier))
        assert record is not None, "the state stands still"
        return layout.unpack_inode(record.value)

    # --- names ---

    def _entries(self) -> Iterator[Problem]:
        nodes = self.nodes
        parent, above = 0, -1
        for key, record in self._rows(layout.DIRENT_PREFIX):
            identifier = int.from_bytes(key[3:11], "big")
            if identifier != parent:
                parent, above = identifier, nodes.find(identifier)
            if above < 0 or nodes.kinds[above] != DIRECTORY:
                text = f"entry in inode {parent}, which is not a directory"
                yield Problem(self._entry(key), text, [delete(key)])
                continue
            if len(record.value) != layout.DIRENT.size:
                yield Problem(self._entry(key), "not an entry of a known format", None)
                continue
            child, kind = layout.DIRENT.unpack(record.value)
            below = nodes.find(child)
            if below < 0:
                yield Problem(self._entry(key), f"names inode {child}, which is not there", [delete(key)])
                continue
            nodes.entries[above] += 1
            nodes.names[below] += 1
            nodes.parents[below] = parent
            right = nodes.kinds[below]
            if right != kind:
                mend = [put(key, layout.DIRENT.pack(child, right))]
                yield Problem(self._entry(key), "the entry's type is not the inode's", mend)
            if right == DIRECTORY:
                nodes.directories[above] += 1
                yield from self._directory(key, parent, child, below)

    def _directory(self, key: bytes, parent: int, child: int, below: int) -> Iterator[Problem]:
        if self.nodes.names[below] > 1:
            yield Problem(self._entry(key), "a directory with a second name", None)
            return
        recorded = self._inode(child).parent
        if recorded != parent:
            mend = [merge(inode_key(child), patch(layout.PARENT, number(parent)[::-1]))]
            yield Problem(self._entry(key), f"its parent is recorded as {recorded}", mend)

    def _reachable(self) -> Iterator[Problem]:
        """Every inode has a name, every chain of parents ends at the root."""
        nodes = self.nodes
        orphans = {int.from_bytes(key[3:11], "big") for key, _ in self._rows(layout.ORPHAN_PREFIX)}
        for gone in sorted(orphan for orphan in orphans if nodes.find(orphan) < 0):
            yield Problem(f"orphan {gone}", "its inode is not there", [delete(orphan_key(gone))])
        ends = bytearray(self.inodes)
        ends[nodes.find(layout.ROOT)] = ROOTED
        for row, identifier in enumerate(nodes.ids):
            if identifier == layout.ROOT or identifier in orphans:
                continue
            if not nodes.names[row]:
                yield Problem(f"inode {identifier}", "has no name", self._adopt(identifier, nodes.kinds[row]))
            elif self._end(row, ends) == UNROOTED:
                yield Problem(f"inode {identifier}", "is in a loop of directories", None)

    def _end(self, row: int, ends: bytearray) -> int:
        """Where the chain of parents of a row ends; noted for all on the way, so no way is gone twice."""
        nodes, chain = self.nodes, []
        while row >= 0 and ends[row] == UNKNOWN and nodes.names[row]:
            ends[row] = UNROOTED  # unless the way ends elsewhere than on itself
            chain.append(row)
            row = nodes.find(nodes.parents[row])
        end = DETACHED if row < 0 or ends[row] == UNKNOWN else ends[row]
        for at in chain:
            ends[at] = end
        return end

    def _adopt(self, identifier: int, kind: int) -> list[Operation]:
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
                    put(dirent_key(layout.ROOT, LOST_AND_FOUND), layout.DIRENT.pack(home, DIRECTORY)),
                    put(inode_key(home), layout.INODE.pack(*fields)),
                    merge(inode_key(layout.ROOT), add(layout.ENTRIES, 1), add(layout.NLINK, 1)),
                    merge(layout.USAGE_KEY, add(0, 1)),
                ]
        self.adopted += 1
        edits = [add(layout.ENTRIES, 1)]
        if kind == DIRECTORY:
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

    # --- bytes ---

    def _extents(self) -> Iterator[Problem]:
        nodes = self.nodes
        last, row, end, size = 0, -1, 0, 0
        for key, record in self._rows(layout.EXTENT_PREFIX):
            identifier = int.from_bytes(key[3:11], "big")
            if identifier != last:
                last, row, end = identifier, nodes.find(identifier), 0
                size = self._inode(identifier).size if row >= 0 else 0
            if row < 0:
                yield Problem(f"inode {identifier}", "bytes of an inode that is not there", [delete(key)])
                continue
            try:
                extent = layout.unpack_extent(key, record.value)
            except (struct.error, IndexError):
                yield Problem(self.path(identifier), f"not an extent of a known format: {key.hex()}", None)
                continue
            if extent.offset < end:
                yield Problem(self.path(identifier), f"extents overlap at {extent.offset}", None)
            end = extent.offset + extent.length
            if end > size:
                text = f"extent {extent.offset}+{extent.length} beyond size {size}"
                mend = [merge(inode_key(identifier), patch(layout.SIZE, layout.I64(end)))]
                yield Problem(self.path(identifier), text, mend)
            nodes.bytes[row] += extent.length
            if extent.data is None:
                yield from self._named(identifier, extent)

    def _named(self, identifier: int, extent: Extent) -> Iterator[Problem]:
        digest = extent.digest
        self.references[digest] = self.references.get(digest, 0) + 1
        if self.has_blob is not None and not self.has_blob(digest):
            text = f"bytes {extent.offset}+{extent.length} are lost: no blob {digest.hex()}"
            yield Problem(self.path(identifier), text, None)

    def _counts(self) -> Iterator[Problem]:
        nodes = self.nodes
        for key, record in self._rows(layout.INODE_PREFIX):
            identifier = int.from_bytes(key[3:11], "big")
            row = nodes.find(identifier)
            # An inode without a name gets its counts with its new name.
            if row < 0 or (identifier != layout.ROOT and not nodes.names[row]):
                continue
            inode = layout.unpack_inode(record.value)
            counts = [("allocated", inode.allocated, nodes.bytes[row], layout.ALLOCATED)]
            if nodes.kinds[row] == DIRECTORY:
                counts.append(("nlink", inode.nlink, 2 + nodes.directories[row], layout.NLINK))
                counts.append(("entries", inode.entries, nodes.entries[row], layout.ENTRIES))
            else:
                counts.append(("nlink", inode.nlink, nodes.names[row], layout.NLINK))
            for what, found, right, field in counts:
                if found != right:
                    mend = [merge(key, patch(field, layout.I64(right)))]
                    yield Problem(self.path(identifier), f"{what} is {found}, should be {right}", mend)

    def _attributes(self) -> Iterator[Problem]:
        last, flags = 0, 0
        for key, _ in self._rows(layout.XATTR_PREFIX):
            identifier = int.from_bytes(key[3:11], "big")
            if self.nodes.find(identifier) < 0:
                yield Problem(f"inode {identifier}", "attribute of an inode that is not there", [delete(key)])
                continue
            if identifier != last:
                last, flags = identifier, self._inode(identifier).flags
            if not flags & layout.HAS_XATTRS:
                mend = [merge(inode_key(identifier), patch(layout.FLAGS, bytes([flags | layout.HAS_XATTRS])))]
                yield Problem(self.path(identifier), "has hidden extended attributes", mend)

    def _blobs(self) -> Iterator[Problem]:
        counted = 0
        for key, record in self._rows(layout.BLOB_PREFIX):
            found = int.from_bytes(record.value[:8], "little", signed=True)
            right = self.references.get(key[3:], 0)
            counted += right > 0
            if found != right:
                text = f"counted {found} times, named {right} times"
                yield Problem(f"blob {key[3:].hex()}", text, [_set(key, right)])
        if counted == len(self.references):
            return
        for digest, right in self.references.items():
            key = layout.BLOB_PREFIX + digest
            if self.state.get(key) is None:
                yield Problem(f"blob {digest.hex()}", f"not counted, named {right} times", [_set(key, right)])

    def _totals(self) -> Iterator[Problem]:
        usage = self._number(layout.USAGE_KEY)
        if usage != self.inodes:
            mend = [_set(layout.USAGE_KEY, self.inodes + (1 if self.adopted else 0))]
            yield Problem("usage", f"{usage} inodes counted, {self.inodes} are there", mend)
        greatest, counter = self.nodes.ids[-1], self._number(layout.COUNTER_KEY)
        if greatest > counter:
            yield Problem(
                "counter",
                f"inode {greatest} beyond the last handed out {counter}",
                [_set(layout.COUNTER_KEY, greatest)],
            )

    def _number(self, key: bytes) -> int:
        record = self.state.get(key)
        return 0 if record is None else int.from_bytes(record.value[:8], "little", signed=True)

    # --- words for people ---

    def path(self, identifier: int) -> str:
        """A path, as far as parents are known."""
        parts: list[str] = []
        while identifier != layout.ROOT and len(parts) < 4096:
            parent = self._parent(identifier)
            name = self._children(parent).get(identifier) if parent else None
            if name is None:
                parts.append(f"<inode {identifier}>")
                break
            parts.append(_text(name))
            identifier = parent
        return "/" + "/".join(reversed(parts))

    def _entry(self, key: bytes) -> str:
        return f"{self.path(int.from_bytes(key[3:11], 'big')).rstrip('/')}/{_text(key[11:])}"

    def _parent(self, identifier: int) -> int:
        row = self.nodes.find(identifier)
        if row < 0:
            return 0
        return self.nodes.parents[row] or self._inode(identifier).parent

    def _children(self, parent: int) -> dict[int, bytes]:
        names = self._names.get(parent)
        if names is None:
            if len(self._names) == NAMES_KEPT:
                del self._names[next(iter(self._names))]
            names = self._names[parent] = {}
            for key, record in self._rows(layout.DIRENT_PREFIX + number(parent)):
                names[int.from_bytes(record.value[:8], "little")] = key[11:]
        return names


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
