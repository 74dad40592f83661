"""files/: the POSIX file system of `filesystem/` as a tree.

Belongs here: what is of this mount only, and dies with it: open handles, access times not yet written
(relatime, no commit per read), and the last attributes of inodes that lost their name while the kernel
still held them. Everything else is in the store.

A write(2) is one transaction, accepted when it returns: there is never anything to flush at close(2).
"""

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from aspenfs import errors
from aspenfs.filesystem import layout
from aspenfs.filesystem.attributes import AttributeOperations
from aspenfs.filesystem.content import Content
from aspenfs.filesystem.namespace import Namespace, Removed
from aspenfs.filesystem.volume import Volume
from aspenfs.kv.types import Event
from aspenfs.limits import TXN_OPS_MAX
from aspenfs.vfs.tree import (
    Attr,
    Caller,
    OpenFile,
    SetAttr,
    Touched,
    Tree,
    Usage,
    is_write_back,
)

DAY_NS: Final = 24 * 3600 * 10**9
INODES_MAX: Final = (1 << 48) - 1
SET_IDS: Final = stat.S_ISUID | stat.S_ISGID


_NO_NAME: Final = layout.I64(0)  # how the value of an inode begins when its nlink is 0
_new = tuple.__new__  # half the cost of a NamedTuple's own constructor
_unpack_inode: Callable[[bytes], layout.Inode] = layout.INODE.unpack_from  # type: ignore[assignment]


def to_attr(node: int, inode: layout.Inode) -> Attr:
    """stat(2) of an inode; a directory's size is its number of entries."""
    nlink, size, allocated, entries, atime, mtime, ctime, mode, uid, gid, rdev, _, _, _ = inode
    if mode & 0o170000 == 0o040000:
        size = entries
    blocks = (allocated + 511) >> 9
    return _new(Attr, (node, mode, nlink, uid, gid, rdev, size, blocks, atime, mtime, ctime))


class FilesTree(Tree):
    """The file system as the kernel sees it. `usage` gives the disk's own figures."""

    name = "files"
    root = layout.ROOT
    writable = True
    entry_timeout_s = attr_timeout_s = negative_timeout_s = 3600.0  # all changes pass through this daemon

    def __init__(self, volume: Volume, usage: Callable[[], Usage], *, atime: bool = True) -> None:
        self.volume, self.store, self.usage, self.keep_atime = volume, volume.store, usage, atime
        self.content = Content(volume)
        self.names = Namespace(volume, self.content, self.is_open, lambda node: self.is_known(node))
        self.attributes = AttributeOperations(volume)
        self.open_counts: dict[int, int] = {}
        self.ghosts: dict[int, Attr] = {}  # no row any more, but the kernel may still ask
        self.orphans: set[int] = set()  # a row without a name, kept for a handle or for the kernel
        self.doomed: dict[int, None] = {}  # orphans that nobody holds any more: to be reaped, in this order
        self.atimes: dict[int, int] = {}
        # The directory that was last listed in one go, its revision then, and its entries: a change of any of
        # them changes the directory too.
        self.just_listed: tuple[int, int, dict[bytes, int]] = 0, 0, {}

    def is_open(self, node: int) -> bool:
        return node in self.open_counts

    # --- reading ---

    async def lookup(self, parent: int, name: bytes) -> Attr:
        node, _ = self.names.find(parent, name)
        return self._attr(node)

    async def getattr(self, node: int) -> Attr:
        return self._attr(node)

    def _attr(self, node: int) -> Attr:
        record = self.store.get(layout.INODE_PREFIX + node.to_bytes(8, "big"))
        if record is None:
            ghost = self.ghosts.get(node)
            if ghost is None:
                raise errors.NotFound(f"inode {node}")
            return ghost
        attr = to_attr(node, _unpack_inode(record[0]))
        if node in self.atimes:
            return attr._replace(atime_ns=max(attr.atime_ns, self.atimes[node]))
        return attr

    async def readlink(self, node: int) -> bytes:
        record = self.store.get(layout.inode_key(node))
        if record is None:
            raise errors.Stale(f"inode {node} is gone")
        self.was_read(node, layout.unpack_inode(record.value))
        return record.value[layout.TARGET :]

    async def open(self, node: int, flags: int, caller: Caller) -> OpenFile:
        """Stale when a rename or unlink came between the kernel's lookup and this: it looks up again."""
        handle = self._handle(node, flags)  # first: who removes its last name from now on leaves an orphan
        try:
            record = self.store.get(layout.INODE_PREFIX + node.to_bytes(8, "big"))
            # Without a name it may be on its way out, unless it is held.
            if record is None or (record[0].startswith(_NO_NAME) and node not in self.orphans):
                raise errors.Stale(f"inode {node} is gone")
            if node in self.names.going:
                await self.names.keep(node)
            if flags & os.O_TRUNC:
                inode = await self.content.truncate(node, 0)
                if inode.mode & SET_IDS and caller.uid:
                    await self.attributes.change(node, mode=_without_set_ids(inode.mode))
        except BaseException:
            self.released(node)
            raise
        return handle

    def _handle(self, node: int, flags: int) -> "OpenInode":
        self.open_counts[node] = self.open_counts.get(node, 0) + 1
        return OpenInode(self, node, flags)

    def list_names(self, node: int, behind: Any, limit: int) -> tuple[Sequence[bytes], Any]:
        if behind is None:
            record = self.store.get(layout.inode_key(node))
            if record is None:
                return (), None
            inode = layout.unpack_inode(record.value)
            if not stat.S_ISDIR(inode.mode):
                raise errors.NotADirectory(f"inode {node}")
            self.was_read(node, inode)
        entries = self.names.entries(node, behind, limit)
        if behind is None and len(entries) < limit:
            self.just_listed = node, record.mod_revision, {name: child for name, child, _ in entries}
        names = [entry[0] for entry in entries]
        return names, names[-1] if len(names) == limit else None

    async def listed(self, node: int, names: Sequence[bytes]) -> list[Attr | None]:
        directory, revision, children = self.just_listed
        record = self.store.get(layout.inode_key(node))
        if directory != node or record is None or record.mod_revision != revision:
            return await super().listed(node, names)
        found: list[Attr | None] = []
        for name in names:
            try:
                found.append(self._attr(children[name]))
            except (KeyError, errors.NotFound):
                found.append(None)
        return found

    async def statfs(self) -> Usage:
        count = self.volume.inode_count()
        return self.usage()._replace(inodes=INODES_MAX, inodes_free=INODES_MAX - count)

    def was_read(self, node: int, inode: layout.Inode) -> None:
        """relatime: the access time moves only if it is not newer than a change, or a day old."""
        if not self.keep_atime:
            return
        atime = self.atimes.get(node, inode.atime)
        now = self.volume.now()
        if atime <= inode.mtime or atime <= inode.ctime or now - atime > DAY_NS:
            self.atimes[node] = now

    # --- changing ---

    async def setattr(self, node: int, wanted: SetAttr, caller: Caller) -> Attr:
        ghost = self.ghosts.get(node)
        if ghost is not None:
            self.ghosts[node] = ghost = _changed(ghost, wanted, self.volume.now())
            return ghost
        mode, uid, gid, size, atime, mtime, ctime = wanted
        if atime is not None:
            self.atimes.pop(node, None)
        inode = None
        # Owner first, size, then times and mode, which also undo what a size change did to the times.
        if uid is not None or gid is not None:
            inode = await self.attributes.change(
                node, uid=uid, gid=gid, **({} if size is not None else _rest(mode, atime, mtime, ctime))
            )
        if size is not None:
            inode = await self.content.truncate(node, size)
        if (mode, atime, mtime, ctime) != (None,) * 4 and (size is not None or inode is None):
            inode = await self.attributes.change(node, **_rest(mode, atime, mtime, ctime))
        return self._attr(node) if inode is None else to_attr(node, inode)

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Attr, OpenFile]:
        try:
            node, inode = await self.names.make(
                parent, name, stat.S_IFREG | mode & 0o7777, caller.uid, caller.gid
            )
        except errors.AlreadyExists:
            if flags & os.O_EXCL:
                raise
            node, kind = self.names.find(parent, name)
            if kind != stat.S_IFREG >> 12:
                raise
            handle = await self.open(node, flags, caller)
            return self._attr(node), handle
        return to_attr(node, inode), self._handle(node, flags)

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attr:
        return to_attr(*await self.names.make(parent, name, mode, caller.uid, caller.gid, rdev))

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attr:
        mode = stat.S_IFDIR | mode & 0o7777
        return to_attr(*await self.names.make(parent, name, mode, caller.uid, caller.gid))

    async def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attr:
        mode = stat.S_IFLNK | 0o777
        return to_attr(*await self.names.make(parent, name, mode, caller.uid, caller.gid, 0, target))

    async def link(self, node: int, parent: int, name: bytes) -> Attr:
        return to_attr(node, await self.names.link(node, parent, name))

    async def unlink(self, parent: int, name: bytes) -> None:
        self._removed(await self.names.unlink(parent, name))

    async def rmdir(self, parent: int, name: bytes) -> None:
        self._removed(await self.names.rmdir(parent, name))

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        removed = await self.names.rename(parent, name, new_parent, new_name, flags)
        if removed is not None:
            self._removed(removed)

    def _removed(self, removed: Removed) -> None:
        node, inode, gone = removed
        if gone:
            self.ghosts[node] = to_attr(node, inode)
            self.atimes.pop(node, None)
        elif not inode.nlink:
            if self.is_open(node) or self.is_known(node):
                self.orphans.add(node)
            else:
                self.doomed[node] = None

    # --- extended attributes ---

    async def getxattr(self, node: int, name: bytes) -> bytes:
        return self.attributes.get(node, name)

    async def listxattr(self, node: int) -> Sequence[bytes]:
        return self.attributes.list(node)

    async def setxattr(self, node: int, name: bytes, value: bytes) -> None:
        await self.attributes.set(node, name, value)

    async def removexattr(self, node: int, name: bytes) -> None:
        await self.attributes.remove(node, name)

    # --- life ---

    async def sync(self) -> None:
        await self.flush_atimes()
        await self.store.committed()

    def released(self, node: int) -> None:
        left = self.open_counts[node] - 1
        if left:
            self.open_counts[node] = left
            return
        del self.open_counts[node]
        if node in self.orphans and not self.is_known(node):
            self._doom(node)

    def forgotten(self, node: int) -> None:
        self.ghosts.pop(node, None)
        if node in self.orphans and not self.is_open(node):
            self._doom(node)

    def _doom(self, node: int) -> None:
        self.orphans.discard(node)
        self.doomed[node] = None

    def unmounted(self) -> None:
        """The kernel holds nothing any more, and will not say so."""
        for node in list(self.orphans):
            self._doom(node)

    async def flush_atimes(self) -> None:
        """Writes the access times that reads have moved."""
        nodes = list(self.atimes)
        for at in range(0, len(nodes), TXN_OPS_MAX):
            # They stay in memory until they are written: else stat(2) would show time going back.
            some = {node: self.atimes[node] for node in nodes[at : at + TXN_OPS_MAX] if node in self.atimes}
            if await self.attributes.record_reads(some):
                for node, atime in some.items():
                    if self.atimes.get(node) == atime:
                        del self.atimes[node]
            await self.volume.breathe()

    async def reap(self, most: int = 64) -> int:
        """Ends up to `most` orphans that nobody holds any more; how many it ended."""
        ended = 0
        while self.doomed and ended < most:
            node = next(iter(self.doomed))
            del self.doomed[node]
            try:
                await self.names.reap(node)
            except BaseException:
                self.doomed[node] = None  # behind the others
                raise
            ended += 1
        return ended

    def recover(self) -> int:
        """At start: what was open and without a name when the last daemon ended is to be reaped; how many.
        Not done here: on a full disk the mount must come up, so that something can be deleted."""
        orphans = self.names.orphans()
        self.doomed.update(dict.fromkeys(orphans))
        return len(orphans)

    def parent_of(self, node: int) -> int:
        return self.volume.directory(node).parent

    def touched(self, event: Event) -> Iterable[Touched]:
        key = event.key
        kind = key[:3]
        node = int.from_bytes(key[3:11], "big")
        if kind == layout.DIRENT_PREFIX:
            yield Touched(parent=node, name=key[11:])
            yield Touched(node=node)
        elif kind == layout.INODE_PREFIX or kind == layout.XATTR_PREFIX:
            yield Touched(node=node)
        elif kind == layout.EXTENT_PREFIX:
            yield Touched(node=node, data=True)


class OpenInode(OpenFile):
    """An open regular file."""

    __slots__ = ("flags", "node", "tree")

    def __init__(self, tree: FilesTree, node: int, flags: int) -> None:
        self.tree, self.node, self.flags = tree, node, flags

    async def read(self, offset: int, size: int) -> bytes:
        tree = self.tree
        inode = tree.volume.inode(self.node)
        try:
            data = tree.content.read(self.node, offset, size, inode.size)
        except errors.Corrupt as problem:
            data = await tree.content.read_through(self.node, offset, size, problem)
        tree.was_read(self.node, inode)
        return data  # type: ignore[return-value]  # any buffer will do for the kernel

    async def write(self, offset: int, data: bytes) -> int:
        at: int | None = offset
        if self.flags & os.O_APPEND:
            size = self.tree.volume.inode(self.node).size
            if not is_write_back(self.flags, offset, len(data), size):
                at = None
        await self.tree.content.write(self.node, at, data)
        return len(data)

    async def sync(self, data_only: bool) -> None:
        await self.tree.store.committed()

    async def release(self) -> None:
        self.tree.released(self.node)


def _rest(mode: int | None, atime: int | None, mtime: int | None, ctime: int | None) -> dict[str, int | None]:
    return {"mode": mode, "atime": atime, "mtime": mtime, "ctime": ctime}


def _without_set_ids(mode: int) -> int:
    """The permission bits after a truncation by a user without privilege, which open(2) leaves to us."""
    return mode & 0o7777 & ~(SET_IDS if mode & stat.S_IXGRP else stat.S_ISUID)


def _changed(attr: Attr, wanted: SetAttr, now: int) -> Attr:
    """What setattr makes of an inode that is no more than these attributes."""
    fields = {
        field: value
        for field, value in zip(SetAttr._fields, wanted, strict=True)
        if value is not None and field != "mode"
    }
    if wanted.mode is not None:
        fields["mode"] = stat.S_IFMT(attr.mode) | wanted.mode
    return attr._replace(**{"ctime_ns": now, **fields})
