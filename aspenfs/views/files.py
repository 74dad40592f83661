"""files/: the POSIX file system of `filesystem/` as a tree.

Belongs here: what is of this mount only, and dies with it: open handles, access times not yet written
(relatime, no commit per read), and the last attributes of inodes that lost their name while the kernel
still held them. Everything else is in the store. Not here: what an open file does (`files_open.py`).

On several nodes a transaction suspends, and others' come in between. So what a reply tells of an inode is
looked up when the reply is made, with no await behind it.
"""

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final

from aspenfs import errors
from aspenfs.filesystem import layout
from aspenfs.filesystem.attributes import AttributeOperations, without_set_ids
from aspenfs.filesystem.births import Births
from aspenfs.filesystem.content import Content
from aspenfs.filesystem.namespace import RENAME_EXCHANGE, Namespace, Removed
from aspenfs.filesystem.orphans import Orphans
from aspenfs.filesystem.volume import ATTEMPTS, Volume, conflict
from aspenfs.filesystem.write_behind import WriteBehind
from aspenfs.filesystem.writing import Writer
from aspenfs.kv.types import Event, Record
from aspenfs.limits import TXN_OPS_MAX
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
    check_owner,
    in_group,
)
from aspenfs.views.files_open import OpenInode

SENT_BACK_NS: Final = 10**9  # the kernel comes again at once, but may have to wait
SENT_BACK_MAX: Final = 1000
DAY_NS: Final = 24 * 3600 * 10**9
INODES_MAX: Final = (1 << 48) - 1
# A new file that is opened so is committed before open(2) returns: its end must be known, each write must be
# durable.
COMMITTED: Final = os.O_APPEND | os.O_SYNC | os.O_DSYNC


_OWNER: Final = ("uid", "gid")
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
    keyspaces = (layout.INODE_PREFIX[:2],)
    writable = True
    entry_timeout_s = attr_timeout_s = negative_timeout_s = 3600.0  # all changes pass through this daemon

    def __init__(self, volume: Volume, usage: Callable[[], Usage], *, atime: bool = True) -> None:
        self.volume, self.store, self.usage, self.keep_atime = volume, volume.store, usage, atime
        self.content = Content(volume)
        self.writer = Writer(volume, self.content)
        self.writes = WriteBehind(volume, self.writer, lambda node: self.displaced(node))
        self.names = Namespace(volume, self.content, self.is_open, lambda node: self.is_known(node))
        self.orphans = Orphans(volume, self.content, self.is_open, lambda node: self.is_known(node))
        self.attributes = AttributeOperations(volume)
        self.births = Births(volume, self.names, self._not_born)
        self.writer.births = self.births
        self.begins_files = True  # a new file, and its attributes, may be committed when it is closed
        self.open_counts: dict[int, int] = {}
        # (inode, thread) -> how often that has it open for writing, and has not closed it
        self.writers: dict[tuple[int, int], int] = {}
        self.sent_back: dict[int, int] = {}  # thread -> when an open of its was: see `_may_open`
        self.ghosts: dict[int, Attr] = {}  # no row any more, but the kernel may still ask
        self.atimes: dict[int, int] = {}
        # The directory that was last listed in one go, its revision then, and its entries: a change of any of
        # them changes the directory too.
        self.just_listed: tuple[int, int, dict[bytes, int]] = 0, 0, {}

    def is_open(self, node: int) -> bool:
        return node in self.open_counts

    # --- reading ---

    async def settled(self, node: int) -> None:
        if self.births.children:
            await self.births.settled(node)

    async def _named(self, parent: int, name: bytes) -> None:
        if self.births.children:
            await self.births.named(parent, name)

    async def _written(self, parent: int, name: bytes) -> None:
        """Before a file gets another name: what was written and set before is there under it."""
        if self.writes.files:
            with suppress(errors.NotFound):
                await self.writes.settled(self.names.find(parent, name)[0])

    async def lookup(self, parent: int, name: bytes) -> Attr:
        await self._named(parent, name)
        node, _ = self.names.find(parent, name)
        settled = 0
        while node in self.writes.files and node != settled:
            await self.writes.settled(node)
            settled = node
            node, _ = self.names.find(parent, name)
        return self._attr(node)

    async def getattr(self, node: int) -> Attr:
        children = self.births.children
        if node in self.writes.files or node in children:
            expected = self._expected(node)
            if expected is not None:
                return self._shown(node, expected)
            await self.settled(node)
            await self.writes.settled(node)
        attr = self._attr(node)
        if children and stat.S_ISDIR(attr.mode):
            # It is asked for on the way to each file that is made in it, and does not wait for those.
            count, made = self.births.inside(node)
            if count:
                attr = attr._replace(size=attr.size + count, mtime_ns=made, ctime_ns=made)
        return attr

    def names_it(self, parent: int, name: bytes, node: int) -> bool:
        if self.births.names_it(parent, name, node):
            return True
        row = self.store.get(layout.dirent_key(parent, name))
        return row is not None and layout.DIRENT.unpack(row.value)[0] == node

    def size_of(self, node: int) -> int:
        record = self.store.get(layout.inode_key(node))
        if record is None:
            raise errors.Stale(f"inode {node} is gone")
        return layout.unpack_inode(record.value).size

    def _attr(self, node: int) -> Attr:
        record = self.store.get(layout.INODE_PREFIX + node.to_bytes(8, "big"))
        if record is None:
            ghost = self.ghosts.get(node)
            if ghost is None:
                raise errors.NotFound(f"inode {node}")
            return ghost
        return self._shown(node, _unpack_inode(record[0]))

    def _shown(self, node: int, inode: layout.Inode) -> Attr:
        """With what was read here since."""
        attr = to_attr(node, inode)
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
        await self.settled(node)
        # First: who removes its last name from now on leaves an orphan.
        handle = self._handle(node, flags, caller)
        try:
            record = self.store.get(layout.INODE_PREFIX + node.to_bytes(8, "big"))
            # Without a name it may be on its way out, unless it is held.
            if record is None or (record[0].startswith(_NO_NAME) and not self._may_open(node, flags, caller)):
                raise errors.Stale(f"inode {node} is gone")
            if self.sent_back and not record[0].startswith(_NO_NAME):
                self.sent_back.pop(caller.pid, None)
            if node in self.names.going:
                await self.names.keep(node)
            if flags & os.O_TRUNC:
                await self.writes.settled(node)
                await self.content.truncate(node, 0)
                await self.attributes.drop_privileges(node, set_ids=caller.uid != 0)
        except BaseException:
            self.released(handle)
            raise
        return handle

    def _may_open(self, node: int, flags: int, caller: Caller) -> bool:
        """Whether an inode that has lost its name may be opened here. What is written to it is lost, if
        nobody else has it open: whoever came by the name that the kernel knew may want what has that name
        now. At Stale the kernel looks up again; what loses its name then loses it while it is opened."""
        if not self.orphans.may_open(node):
            return False
        if not flags & os.O_ACCMODE or self.open_counts[node] > 1:
            return True
        now = self.volume.monotonic_ns()
        sent_back = self.sent_back.pop(caller.pid, None)
        if sent_back is not None and now - sent_back < SENT_BACK_NS:
            return True
        if len(self.sent_back) >= SENT_BACK_MAX:
            self.sent_back.clear()
        self.sent_back[caller.pid] = now
        return False

    def _handle(self, node: int, flags: int, caller: Caller) -> OpenInode:
        self.open_counts[node] = self.open_counts.get(node, 0) + 1
        handle = OpenInode(self, node, flags, unprivileged=caller.uid != 0)
        if flags & os.O_ACCMODE and caller.pid:  # 0: somebody whom this process can not see
            handle.writer = writer = node, caller.pid
            self.writers[writer] = self.writers.get(writer, 0) + 1
        return handle

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
            assert record is not None  # it is a directory
            self.just_listed = node, record.mod_revision, {name: child for name, child, _ in entries}
        names = [entry[0] for entry in entries]
        return names, names[-1] if len(names) == limit else None

    def listing_version(self, node: int) -> int | None:
        record = self.store.get(layout.inode_key(node))
        return None if record is None else record.mod_revision

    async def listed(self, node: int, names: Sequence[bytes]) -> list[Attr | None]:
        directory, revision, children = self.just_listed
        for child in self.writes.files.keys() & children.values():
            await self.writes.settled(child)
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
        owner = None  # who must still be it when the change is made
        if caller.uid and self.owners_shown:
            attr = ghost or self._attr_expected(node)
            wanted = check_change(attr, wanted, caller, self.volume.now())
            owner = caller.uid if caller.uid == attr.uid else None
        if ghost is not None:
            self.ghosts[node] = ghost = _changed(ghost, wanted, self.volume.now())
            return ghost
        size, change = wanted.size, _changes(wanted)
        if size is None and self._tells_at_close(node, caller):
            inode = self._expected(node)
            # With extended attributes there may be an access control list to change, too.
            if inode is not None and not ("mode" in change and inode.flags & layout.HAS_XATTRS):
                self.writes.change(node, change)
                self._read_as_of(node, wanted)
                return await self.getattr(node)
        await self.settled(node)
        if self.writes.files:
            await self.writes.settled(node)
        inode = None
        # Owner first, size, then times and mode, which also undo what a size change did to the times.
        if size is not None:
            owners: dict[str, int] = {name: change.pop(name) for name in _OWNER if name in change}
            if owners:
                await self.attributes.change(node, owners, owner)
            inode = await self.content.truncate(node, size)
            await self.attributes.drop_privileges(node, set_ids=caller.uid != 0)
        if change:
            inode = await self.attributes.change(node, change, owner)
        self._read_as_of(node, wanted)
        return self._attr(node) if inode is None else self._now(node, inode)

    async def before_write(self, node: int, unprivileged: bool) -> None:
        """Takes from a file what must not lend more to what is written: capabilities, and if the writer is
        `unprivileged` set-user-ID and set-group-ID bits. The kernel does so before it writes to its pages, by
        the attributes that it has, which may be old; before it writes past them it does not."""
        child = self.births.children.get(node)
        record = self.store.get(layout.inode_key(node))
        if record is not None:
            inode = layout.unpack_inode(record.value)
        elif child is not None:
            inode = child.birth.inode
        else:
            return  # the write tells
        mode = self.writes.mode(node, inode.mode) if unprivileged else 0
        if without_set_ids(mode) != mode or self.attributes.lends(node, inode):
            await self.settled(node)
            await self.writes.settled(node)
            await self.attributes.drop_privileges(node, set_ids=unprivileged)

    def _attr_expected(self, node: int) -> Attr:
        """What it will be when all of this host is committed, as far as that can be told. Stale."""
        inode = self._expected(node)
        if inode is not None:
            return to_attr(node, inode)
        try:
            return self._attr(node)
        except errors.NotFound as error:
            raise errors.Stale(str(error)) from None

    def _read_as_of(self, node: int, wanted: SetAttr) -> None:
        if wanted.atime_ns is not None:
            self.atimes.pop(node, None)

    def is_under_way(self, node: int) -> bool:
        if node in self.writes.files:
            return True
        children = self.births.children
        return bool(children) and (node in children or self.births.inside(node)[0] > 0)

    def _tells_at_close(self, node: int, caller: Caller) -> bool:
        """Whether a change by `caller` may fail behind its back: it has written to the file, the outcome of
        which is open, and is told of both when it closes it."""
        early = self.begins_files and self.writes.returns_early and not self.store.alone
        under_way = node in self.writes.files or node in self.births.children
        return early and under_way and (node, caller.pid) in self.writers and self.writes.has_room(node)

    def _expected(self, node: int) -> layout.Inode | None:
        """The inode as it will be when all that this host has under way is committed; None where that can not
        be told. Who asks on this host need not wait for it: it is what local programs have done."""
        record = self.store.get(layout.inode_key(node))
        child = self.births.children.get(node)
        if record is not None:
            return self.writes.expected(node, layout.unpack_inode(record.value))
        return None if child is None else self.writes.expected(node, child.birth.inode)

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Attr, OpenFile]:
        for _ in range(ATTEMPTS):
            try:
                return await self._create(parent, name, stat.S_IFREG | mode & 0o7777, flags, caller)
            except errors.AlreadyExists:
                if flags & os.O_EXCL:
                    raise
            await self.fresh()  # it is opened: what was closed elsewhere by now is in it
            try:
                found = self._attr(self.names.find(parent, name)[0])
            except errors.NotFound:
                continue  # it went meanwhile
            if not stat.S_ISREG(found.mode):
                raise errors.Stale(f"{name!r} has come meanwhile, and is no regular file")
            check_found(found, flags, caller, owners_shown=self.owners_shown)
            try:
                handle = await self.open(found.node, flags, caller)
                return self._attr(found.node), handle
            except (errors.NotFound, errors.Stale):
                continue
        raise conflict("create")

    async def _create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Attr, OpenFile]:
        node = await self.volume.new_id()
        handle = self._handle(node, flags, caller)  # first: others may remove it as soon as it is there
        try:
            if self.begins_files and self.writes.returns_early and not flags & COMMITTED:
                begun = self.births.begin(parent, name, mode, caller.uid, caller.gid, node)
                if begun is not None:
                    if flags & os.O_EXCL:  # a lock: nobody else must ever believe to have it
                        await self.births.own(node)
                    return to_attr(node, begun), handle
            _, inode = await self.names.make(parent, name, mode, caller.uid, caller.gid, node=node)
        except BaseException:
            self.released(handle)
            raise
        return self._now(node, inode), handle

    def _not_born(self, node: int, parent: int, name: bytes, error: errors.AspenError) -> None:
        """The kernel believes in a file that is not there: who has it open is told, and the kernel too."""
        self.writes.failed(node, error)
        self.misnamed(parent, name)

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attr:
        return self._now(*await self.names.make(parent, name, mode, caller.uid, caller.gid, rdev))

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attr:
        mode = stat.S_IFDIR | mode & 0o7777
        return self._now(*await self.names.make(parent, name, mode, caller.uid, caller.gid))

    async def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attr:
        mode = stat.S_IFLNK | 0o777
        return self._now(*await self.names.make(parent, name, mode, caller.uid, caller.gid, 0, target))

    async def link(self, node: int, parent: int, name: bytes) -> Attr:
        await self.settled(node)
        await self.writes.settled(node)
        return self._now(node, await self.names.link(node, parent, name))

    def _now(self, node: int, inode: layout.Inode) -> Attr:
        """The attributes of an inode that our transaction has left as `inode`: others may have changed it
        since that was applied, even ended it."""
        if self.store.alone:
            return to_attr(node, inode)
        if self.store.get(layout.inode_key(node)) is None and node not in self.ghosts:
            self.ghosts[node] = to_attr(node, inode)._replace(nlink=0)
        return self._attr(node)

    async def unlink(self, parent: int, name: bytes) -> None:
        await self._named(parent, name)
        self._removed(await self.names.unlink(parent, name))

    async def rmdir(self, parent: int, name: bytes) -> None:
        await self._named(parent, name)
        self._removed(await self.names.rmdir(parent, name))

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        await self._named(parent, name)
        await self._named(new_parent, new_name)
        await self._written(parent, name)
        if flags & RENAME_EXCHANGE:
            await self._written(new_parent, new_name)
        removed = await self.names.rename(parent, name, new_parent, new_name, flags)
        if removed is not None:
            self._removed(removed)

    def _removed(self, removed: Removed) -> None:
        node, inode, gone = removed
        if gone:
            self.ghosts[node] = to_attr(node, inode)
            self.atimes.pop(node, None)
        elif not inode.nlink:
            self.orphans.removed(node)

    def noticed(self, event: Event, own: bool) -> None:
        key, record, previous = event
        kind = key[:3]
        if kind == layout.INODE_PREFIX:
            if record is None and previous is not None:
                node = int.from_bytes(key[3:11], "big")
                self.atimes.pop(node, None)
                if self.is_known(node) and node not in self.ghosts:
                    self.ghosts[node] = to_attr(node, _unpack_inode(previous.value))._replace(nlink=0)
        elif kind == layout.ORPHAN_PREFIX or kind == layout.SESSION_PREFIX:
            self.orphans.noticed(event)

    def replaced(self) -> None:
        self.orphans.leapt()

    # --- extended attributes ---

    async def getxattr(self, node: int, name: bytes) -> bytes:
        if self.births.has_no_attributes(node):  # the kernel asks for security.capability at each write
            raise errors.NoAttribute(name)
        await self.settled(node)
        return self.attributes.get(node, name)

    async def listxattr(self, node: int) -> Sequence[bytes]:
        await self.settled(node)
        return self.attributes.list(node)

    async def setxattr(self, node: int, name: bytes, value: bytes, caller: Caller | None = None) -> None:
        await self.settled(node)
        await self.writes.settled(node)  # a mode that was set before
        keeps_group = self._may_set_acl(node, name, caller)
        await self.attributes.set(node, name, value, keeps_group=keeps_group)

    def _may_set_acl(self, node: int, name: bytes, caller: Caller | None) -> bool:
        """NotPermitted, as for a mode (`check_change`); whether a set-group-ID bit is kept."""
        if caller is None or not caller.uid or not self.owners_shown or not name.startswith(b"system."):
            return True
        attr = self._attr_expected(node)
        check_owner(attr, caller)
        return in_group(caller, attr.gid)

    async def removexattr(self, node: int, name: bytes, caller: Caller | None = None) -> None:
        await self.settled(node)
        await self.writes.settled(node)
        self._may_set_acl(node, name, caller)
        try:
            await self.attributes.remove(node, name)
        except errors.NoAttribute:
            if not name.startswith(b"system."):
                raise  # an access control list that says nothing is as good as none

    # --- life ---

    async def sync(self) -> None:
        await self.births.all_settled()
        await self.flush_atimes()
        await self.store.committed()

    def closed(self, handle: OpenInode) -> None:
        """It may be for the last time that its opener hears of errors."""
        writer, handle.writer = handle.writer, None
        if writer is not None:
            self.writers[writer] -= 1
            if not self.writers[writer]:
                del self.writers[writer]

    def released(self, handle: OpenInode) -> None:
        self.closed(handle)
        node = handle.node
        left = self.open_counts[node] - 1
        if left:
            self.open_counts[node] = left
            return
        del self.open_counts[node]
        self.writes.failures.pop(node, None)
        if not self.is_known(node):
            self.orphans.unused(node)

    def forgotten(self, node: int) -> None:
        self.ghosts.pop(node, None)
        if not self.is_open(node):
            self.orphans.unused(node)

    @property
    def write_behind(self) -> bool:
        return self.writes.returns_early

    @write_behind.setter
    def write_behind(self, allowed: bool) -> None:
        self.writes.returns_early = allowed

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
        return await self.orphans.reap(most)

    def parent_of(self, node: int) -> int:
        return self.volume.directory(node).parent

    def touched(self, event: Event) -> Iterable[Touched]:
        key = event.key
        kind = key[:3]
        node = int.from_bytes(key[3:11], "big")
        if kind == layout.DIRENT_PREFIX:
            previous = event.previous
            child = 0 if previous is None else layout.DIRENT.unpack(previous.value)[0]
            yield Touched(parent=node, name=key[11:], child=child)
            yield Touched(node=node)
        elif kind == layout.INODE_PREFIX:
            yield Touched(node=node, data=_size(event.record) != _size(event.previous))
        elif kind == layout.XATTR_PREFIX:
            yield Touched(node=node)
        elif kind == layout.EXTENT_PREFIX:
            yield Touched(node=node, data=True)


def _size(record: Record | None) -> bytes | None:
    return None if record is None else record.value[layout.SIZE : layout.SIZE + 8]


def _changes(wanted: SetAttr) -> dict[str, int]:
    mode, uid, gid, _, atime, mtime, ctime = wanted
    some = {"mode": mode, "uid": uid, "gid": gid, "atime": atime, "mtime": mtime, "ctime": ctime}
    return {name: value for name, value in some.items() if value is not None}


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
