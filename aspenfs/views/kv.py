"""The tree `kv/`: one file is one key of the store, and every change one transaction.

Routes the calls of a tree to what does them: names (`kv_paths`, `kv_names`, `kv_rename`), contents
(`kv_files`), directories (`kv_listing`), and what others' changes make stale (`kv_touched`). All share
one `KeySpace`. The rules a user sees are in docs/design/kv-paths.md.

Nothing here awaits but transactions, so what is read between two of them is one state of the store.
"""

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from aspenfs import errors
from aspenfs.kv.store import Store
from aspenfs.kv.types import Event, Operation, Record, cut, exists, merge, set_attributes
from aspenfs.limits import VALUE_BYTES_MAX
from aspenfs.seams import Clock
from aspenfs.vfs.tree import (
    Attr,
    Caller,
    OpenFile,
    SetAttr,
    Touched,
    Tree,
    Usage,
    check_change,
    check_found,
)
from aspenfs.views import kv_attributes, kv_names
from aspenfs.views.kv_files import KVFile, edit, truncate
from aspenfs.views.kv_listing import list_names
from aspenfs.views.kv_nodes import ROOT, DirectoryNode, FileNode
from aspenfs.views.kv_paths import levels
from aspenfs.views.kv_rename import rename
from aspenfs.views.kv_space import CONFLICTS_MAX, KEYS, MARKERS, Change, KeySpace
from aspenfs.views.kv_touched import touched


class KVTree(Tree):
    """`uid` and `gid` own what has no owner: keys that were not made through a mount."""

    name = "kv"
    root = ROOT
    keyspaces = (KEYS, MARKERS)
    writable = True

    def __init__(self, store: Store, clock: Clock, uid: int = 0, gid: int = 0,
                 usage: Callable[[], Usage] | None = None) -> None:
        self.space = KeySpace(store, clock, uid, gid)
        self.usage = usage

    @property
    def origin(self) -> object:
        """The `origin` of this tree's transactions: events that carry it are not for `touched`."""
        return self.space.origin

    # --- reading ---

    async def lookup(self, parent: int, name: bytes) -> Attr:
        space = self.space
        found = kv_names.look(space, space.directory(parent), name)
        if found is None:
            raise errors.NotFound(name)
        if isinstance(found, DirectoryNode):
            return space.directory_attr(found)
        return space.file_attr(*found)

    def names_it(self, parent: int, name: bytes, node: int) -> bool:
        found = kv_names.look(self.space, self.space.directory(parent), name)
        there = found[0] if isinstance(found, tuple) else found
        return there is not None and there.id == node

    async def getattr(self, node: int) -> Attr:
        space = self.space
        found = space.nodes.by_id.get(node)
        if isinstance(found, FileNode):
            return space.file_attr(found, space.content(found))
        return space.directory_attr(space.directory(node))

    async def readlink(self, node: int) -> bytes:
        found = self.space.nodes.by_id.get(node)
        if not isinstance(found, FileNode) or not found.symlink:
            raise errors.InvalidArgument("not a symbolic link")
        return self.space.content(found).value

    async def open(self, node: int, flags: int, caller: Caller) -> OpenFile:
        found = self.space.file(node)
        return await self._open(found, flags)

    async def _open(self, node: FileNode, flags: int) -> OpenFile:
        if node.symlink:
            raise errors.LoopDetected(node.key)
        self.space.content(node)  # Stale, if it went unseen
        if flags & os.O_TRUNC:
            await truncate(self.space, node, 0)
        return KVFile(self.space, node, flags, lambda number: self.displaced(number))

    def list_names(self, node: int, behind: Any, limit: int) -> tuple[Sequence[bytes], Any]:
        return list_names(self.space, self.space.directory(node), behind, limit)

    def listing_version(self, node: int) -> int | None:
        return self.space.changes  # what is below a directory may change its names too

    def parent_of(self, node: int) -> int:
        above = b""
        for level in levels(self.space.directory(node).prefix):
            above = level.parent
        return self.space.directory_node(above).id

    async def statfs(self) -> Usage:
        return self.usage() if self.usage is not None else await super().statfs()

    # --- changing ---

    async def setattr(self, node: int, wanted: SetAttr, caller: Caller) -> Attr:
        space = self.space
        now = space.clock.time_ns()
        if caller.uid and self.owners_shown:
            wanted = check_change(await self.getattr(node), wanted, caller, now)
        changes = kv_attributes.changed(wanted, now)
        found = space.nodes.by_id.get(node)
        if isinstance(found, FileNode):
            size = wanted.size
            if size is None:
                await edit(space, found, set_attributes(changes))
            elif size > VALUE_BYTES_MAX:
                raise errors.TooLarge(f"a value has at most {VALUE_BYTES_MAX} bytes")
            else:
                await edit(space, found, cut(size), set_attributes(changes))
            return space.file_attr(found, space.content(found))
        directory = space.directory(node)
        if wanted.size is not None:
            raise errors.IsADirectory(directory.prefix)
        await self._edit_marker(directory, merge(MARKERS + directory.prefix, set_attributes(changes)))
        if wanted.mtime_ns is not None:
            directory.changed_ns = 0  # what was set is shown, until the next change
        return space.directory_attr(directory)

    async def _edit_marker(self, directory: DirectoryNode, operation: Operation) -> None:
        """A directory whose attributes are set has a marker from then on."""
        space = self.space
        key = MARKERS + directory.prefix
        for _ in range(CONFLICTS_MAX):
            if directory.removed or not space.is_directory(directory.prefix):
                raise errors.NotFound(directory.prefix)
            marked = space.store.get(key) is not None
            if await space.commit(Change([exists(key)] if marked else [], [operation])) is not None:
                return
        raise errors.Conflict(directory.prefix)

    async def create(self, parent: int, name: bytes, mode: int, flags: int,
                     caller: Caller) -> tuple[Attr, OpenFile]:
        space = self.space
        node, _, made = await kv_names.make_file(space, parent, name, mode, flags, caller)
        if not made:
            await self.fresh()  # it is opened: what was closed elsewhere by now is in it
            found = space.file_attr(node, space.content(node))
            check_found(found, flags, caller, owners_shown=self.owners_shown)
        # A new file needs no O_TRUNC; it would be a second revision.
        target = await self._open(node, flags & ~os.O_TRUNC if made else flags)
        return space.file_attr(node, space.content(node)), target

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attr:
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise errors.NotPermitted("a key is a regular file")
        node, _, _ = await kv_names.make_file(self.space, parent, name, mode, os.O_EXCL, caller)
        return self.space.file_attr(node, self.space.content(node))

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attr:
        return self.space.directory_attr(
            await kv_names.make_directory(self.space, parent, name, mode, caller))

    async def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attr:
        return self.space.file_attr(
            *await kv_names.make_symlink(self.space, parent, name, target, caller))

    async def link(self, node: int, parent: int, name: bytes) -> Attr:
        raise errors.NotPermitted("a key has one name")

    async def unlink(self, parent: int, name: bytes) -> None:
        await kv_names.unlink(self.space, parent, name)

    async def rmdir(self, parent: int, name: bytes) -> None:
        await kv_names.rmdir(self.space, parent, name)

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        await rename(self.space, parent, name, new_parent, new_name, flags)

    # --- extended attributes ---

    def _attributed(self, node: int) -> Record | None:
        """The record with a node's attributes; None for a directory without a marker."""
        space = self.space
        found = space.nodes.by_id.get(node)
        if isinstance(found, FileNode):
            return space.content(found)
        return space.marker(space.directory(node).prefix)

    async def getxattr(self, node: int, name: bytes) -> bytes:
        record = self._attributed(node)
        if record is None:
            raise errors.NoAttribute(name)
        return kv_attributes.xattr_value(record, name)

    async def listxattr(self, node: int) -> Sequence[bytes]:
        found = self.space.nodes.by_id.get(node)
        if isinstance(found, FileNode) and found.symlink:
            return ()  # the kernel lets nobody read user.* of a symbolic link (xattr(7)): cp -a would stumble
        record = self._attributed(node)
        return kv_attributes.xattr_names(record) if record is not None else ()

    async def setxattr(
        self, node: int, name: bytes, value: bytes, caller: Caller | None = None
    ) -> None:
        attribute = kv_attributes.settable(name)
        record = self._attributed(node)
        held = record.attributes if record is not None else {}
        await self._set_attributes(node, kv_attributes.with_xattr(held, attribute, value))

    async def removexattr(self, node: int, name: bytes, caller: Caller | None = None) -> None:
        attribute = kv_attributes.settable(name)
        record = self._attributed(node)
        if record is None or attribute not in record.attributes:
            raise errors.NoAttribute(name)
        await self._set_attributes(node, {attribute: b""})

    async def _set_attributes(self, node: int, changes: dict[str, int | bytes | str]) -> None:
        space = self.space
        changes[kv_attributes.CTIME] = space.clock.time_ns()
        found = space.nodes.by_id.get(node)
        if isinstance(found, FileNode):
            await edit(space, found, set_attributes(changes))
        else:
            directory = space.directory(node)
            await self._edit_marker(directory, merge(MARKERS + directory.prefix, set_attributes(changes)))

    # --- life ---

    async def sync(self) -> None:
        await self.space.store.committed()

    def forgotten(self, node: int) -> None:
        self.space.nodes.forget(node)

    def noticed(self, event: Event, own: bool) -> None:
        if own:
            self.space.applied(event)

    def replaced(self) -> None:
        self.space.changes += 1

    def touched(self, event: Event) -> Iterable[Touched]:
        return touched(self.space, event)
