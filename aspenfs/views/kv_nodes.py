"""Which node is which key: the nodes that the kernel may know, and nothing else.

A file's node id is made of its key's creation, so it is the same on every host and after a restart;
a renamed file keeps the id it had for as long as the kernel knows it. Directories are prefixes and
have no creation: their ids are counted from here. Not here: the store.
"""

from aspenfs.kv.types import Record
from aspenfs.views.kv_attributes import is_symlink

ROOT = 1
COUNTED = 1 << 47  # ids of our own counting
_CREATION_MASK = COUNTED - 1
_ORDINAL_BITS = 7  # TXN_OPS_MAX keys can be created by one transaction


class FileNode:
    """One file: a key since its creation, or, once that is gone, what it held last."""

    __slots__ = ("created", "id", "key", "orphan", "symlink")

    def __init__(self, number: int, key: bytes, created: int, symlink: bool) -> None:
        self.id = number
        self.key: bytes | None = key  # None: gone from the store
        self.created = created  # revision; tells this file from a later one under the same key
        self.symlink = symlink
        self.orphan: Record | None = None  # content of an unlinked file that may still be open


class DirectoryNode:
    __slots__ = ("absent", "changed_ns", "id", "name_bytes_min", "prefix", "removed")

    def __init__(self, number: int, prefix: bytes, name_bytes_min: int) -> None:
        self.id = number
        self.prefix = prefix
        self.name_bytes_min = name_bytes_min
        self.changed_ns = 0  # when an entry last came or went, as far as this mount saw
        self.absent = False  # nothing was below it when we last looked
        self.removed = False  # by rmdir or rename: the kernel will not use this node for a new one


Node = FileNode | DirectoryNode


class Nodes:
    """The table. Ids of files that collide with one still known get a counted id instead."""

    def __init__(self) -> None:
        self.root = DirectoryNode(ROOT, b"", 0)
        self.by_id: dict[int, Node] = {ROOT: self.root}
        self.files: dict[bytes, FileNode] = {}  # by key in the store
        self.directories: dict[bytes, DirectoryNode] = {b"": self.root}  # by prefix
        self._counter = COUNTED

    def file(self, key: bytes, record: Record) -> FileNode:
        """The node of the file that is `record` under `key`."""
        node = self.files.get(key)
        symlink = is_symlink(record)
        if node is not None:
            if node.created == record.create_revision and node.symlink is symlink:
                return node
            node.key = None
        number = (record.create_revision << _ORDINAL_BITS | record.ordinal) & _CREATION_MASK
        if number in self.by_id:
            number = self._count()
        node = FileNode(number, key, record.create_revision, symlink)
        self.by_id[number] = self.files[key] = node
        return node

    def directory(self, prefix: bytes, name_bytes_min: int) -> DirectoryNode:
        node = self.directories.get(prefix)
        if node is None:
            number = self._count()
            node = DirectoryNode(number, prefix, name_bytes_min)
            self.by_id[number] = self.directories[prefix] = node
        return node

    def _count(self) -> int:
        self._counter += 1
        return self._counter

    def orphan(self, key: bytes, last: Record | None) -> FileNode | None:
        """The key is gone; its node, if known, keeps `last` for those who have it open."""
        node = self.files.pop(key, None)
        if node is not None:
            node.key, node.orphan = None, last
        return node

    def vanished(self, record: Record) -> FileNode:
        """The node of a file of ours that was removed, or replaced, before anybody could look at it."""
        number = (record.create_revision << _ORDINAL_BITS | record.ordinal) & _CREATION_MASK
        if number in self.by_id:
            number = self._count()
        node = FileNode(number, b"", record.create_revision, is_symlink(record))
        node.key, node.orphan = None, record
        self.by_id[number] = node
        return node

    def move(self, node: FileNode, key: bytes, created: int) -> None:
        """The file is under another key now, which nobody else may have (see `orphan`)."""
        if node.key is not None and self.files.get(node.key) is node:
            del self.files[node.key]
        node.key, node.created = key, created
        self.files[key] = node

    def remove_directory(self, prefix: bytes) -> DirectoryNode | None:
        """It was removed here; a new one under the same name is another node."""
        node = self.directories.pop(prefix, None)
        if node is not None:
            node.removed = True
        return node

    def move_directory(self, node: DirectoryNode, prefix: bytes) -> None:
        if self.directories.get(node.prefix) is node:
            del self.directories[node.prefix]
        node.prefix = prefix
        self.directories[prefix] = node

    def forget(self, number: int) -> None:
        node = self.by_id.get(number)
        if node is None or node is self.root:
            return
        del self.by_id[number]
        if isinstance(node, FileNode):
            if node.key is not None and self.files.get(node.key) is node:
                del self.files[node.key]
        elif self.directories.get(node.prefix) is node:
            del self.directories[node.prefix]
