"""Names: directory entries, links, renames, and the end of inodes (POSIX.1-2017, rename(2), unlink(2)).

Every operation is one transaction. Permissions are the kernel's business (default_permissions); what
depends on the tree itself (existence, types, emptiness, loops) is checked here, and again by the
transaction's compares when it applies.
"""

import stat
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from aspenfs import errors
from aspenfs.filesystem import acl
from aspenfs.filesystem.change import Change
from aspenfs.filesystem.content import Content
from aspenfs.filesystem.layout import (
    CTIME,
    DIRENT,
    DIRENT_PREFIX,
    ENTRIES,
    FORMAT,
    FORMAT_AT,
    GID,
    HAS_XATTRS,
    I64,
    INODE,
    MODE,
    MTIME,
    NLINK,
    PARENT,
    ROOT,
    TIMES2,
    USAGE_KEY,
    Inode,
    dirent_key,
    inode_key,
    number,
    orphan_key,
    unpack_inode,
    xattr_key,
)
from aspenfs.filesystem.references import References
from aspenfs.filesystem.volume import ATTEMPTS, Volume, conflict
from aspenfs.kv.store import Begun
from aspenfs.kv.types import (
    EQUAL,
    Compare,
    Edit,
    Operation,
    absent,
    add,
    compare_field,
    compare_mod_revision,
    compare_value,
    delete,
    exists,
    merge,
    patch,
    prefix_end,
    put,
    range_empty,
)
from aspenfs.limits import LINKS_MAX, NAME_BYTES_MAX, SYMLINK_BYTES_MAX

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_LOCK: Final = b"f/r"  # changed by every move of a directory to another parent
DIRECTORY: Final = stat.S_IFDIR >> 12
SYMLINK: Final = stat.S_IFLNK >> 12
_new = tuple.__new__


def _check_length(name: bytes) -> None:
    if len(name) > NAME_BYTES_MAX:
        raise errors.NameTooLong(f"a name has at most {NAME_BYTES_MAX} bytes")


class Entry(NamedTuple):
    """A directory entry: `kind` is the type bits of the mode, shifted right by 12."""

    name: bytes
    node: int
    kind: int


class Removed(NamedTuple):
    """What lost a name: its inode as it is afterwards; `gone` if its row went with the name."""

    node: int
    inode: Inode
    gone: bool


class Birth(NamedTuple):
    """A file that is made: its inode, the bytes of its row, and the transaction under way."""

    inode: Inode
    row: bytes
    begun: Begun


class Namespace:
    """Operations on names of one volume. `in_use(node)` says whether a handle is open on it here,
    `is_known(node)` whether the kernel here has looked it up and not forgotten it."""

    def __init__(
        self,
        volume: Volume,
        content: Content,
        in_use: Callable[[int], bool],
        is_known: Callable[[int], bool],
    ) -> None:
        self.volume, self.content, self.store = volume, content, volume.store
        self.in_use, self.is_known = in_use, is_known
        self.going: set[int] = (
            set()
        )  # files that a transaction under way destroys, because nobody has them open

    # --- looking ---

    def find(self, parent: int, name: bytes) -> tuple[int, int]:
        """(node, kind) of a name. NotFound, NameTooLong."""
        record = self.store.get(DIRENT_PREFIX + parent.to_bytes(8, "big") + name)
        if record is None:
            _check_length(name)
            raise errors.NotFound(name)
        return DIRENT.unpack(record.value)

    def entries(self, parent: int, after: bytes | None, limit: int) -> list[Entry]:
        """Up to `limit` entries in byte order of their names, behind `after` (None: from the start)."""
        prefix = DIRENT_PREFIX + number(parent)
        start = prefix if after is None else prefix + after + b"\0"
        found = self.store.range(start, prefix_end(prefix), limit=limit)
        unpack = DIRENT.unpack
        return [_new(Entry, (key[11:], *unpack(record[0]))) for key, record in found]

    # --- making ---

    async def make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        rdev: int = 0,
        target: bytes = b"",
        node: int = 0,
    ) -> tuple[int, Inode]:
        """A new inode of any type under a new name; `mode` with its type bits, `node` an id that nobody has
        had (0: makes one). AlreadyExists.

        In a set-group-ID directory it gets the directory's group, and a directory the bit too
        (mkdir(2), inode(7)).
        """
        node = node or await self.volume.new_id()
        for _ in range(ATTEMPTS):
            inode, compares, then = self._making(parent, name, mode, uid, gid, rdev, target, node)
            result = await self.store.txn(compares, then, origin=self.volume)
            if result.succeeded:
                return node, inode
        raise conflict("create")

    def begin(self, parent: int, name: bytes, mode: int, uid: int, gid: int, node: int) -> Birth | None:
        """As `make` of a regular file, without waiting; None where its outcome is not settled at once
        (`Store.begin`). The caller sees to it that nobody else on this host changes the directory until
        this returns (the kernel's lock of it), nor uses the file before it is there."""
        inode, compares, then = self._making(parent, name, mode, uid, gid, 0, b"", node)
        begun = self.store.begin(compares, then, origin=self.volume)
        return None if begun is None else Birth(inode, INODE.pack(*inode), begun)

    def _making(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        rdev: int,
        target: bytes,
        node: int,
    ) -> tuple[Inode, Sequence[Compare], Sequence[Operation]]:
        """A new inode, and the transaction that makes it."""
        _check_length(name)
        if len(target) > SYMLINK_BYTES_MAX:
            raise errors.NameTooLong(f"a symbolic link's target has at most {SYMLINK_BYTES_MAX} bytes")
        name_key, parent_key = dirent_key(parent, name), inode_key(parent)
        compares, mode_now, gid_now, inherited = self._heritage(parent, node, mode, gid)
        if self.store.get(name_key) is not None:
            raise errors.AlreadyExists(name)
        now = self.volume.now()
        kind = mode >> 12
        nlink, up = (2, parent) if kind == DIRECTORY else (1, 0)
        flags = HAS_XATTRS if inherited else 0
        size = len(target)
        fields = (nlink, size, 0, 0, now, now, now, mode_now, uid, gid_now, rdev, up, FORMAT, flags)
        then = (
            put(name_key, DIRENT.pack(node, kind)),
            put(inode_key(node), INODE.pack(*fields) + target),
            merge(parent_key, *_parent_edits(1, 1 if kind == DIRECTORY else 0, now)),
            merge(USAGE_KEY, add(0, 1)),
            *inherited,
        )
        return _new(Inode, fields), (absent(name_key), *compares), then

    def _heritage(
        self, parent: int, node: int, mode: int, gid: int
    ) -> tuple[list[Compare], int, int, list[Operation]]:
        """Mode, group and ACLs of a new inode in `parent`, and compares that hold while that is so."""
        key = inode_key(parent)
        above = self.volume.directory(parent)
        compares = (
            [exists(key)] if self.store.alone else [_same(key, above, MODE), _same(key, above, FORMAT_AT)]
        )
        directory = mode >> 12 == DIRECTORY
        if above.mode & stat.S_ISGID:
            compares.append(_same(key, above, GID))
            gid = above.gid
            if directory:
                mode |= stat.S_ISGID
        inherited: list[Operation] = []
        if above.flags & HAS_XATTRS and mode >> 12 != SYMLINK:
            default = self.store.get(xattr_key(parent, acl.DEFAULT))
            revision = 0 if default is None else default.mod_revision
            compares.append(compare_mod_revision(xattr_key(parent, acl.DEFAULT), EQUAL, revision))
            if default is not None:
                mode, inherited = self._inherit(default.value, node, mode, directory)
        return compares, mode, gid, inherited

    @staticmethod
    def _inherit(default: bytes, node: int, mode: int, directory: bool) -> tuple[int, list[Operation]]:
        """The mode of a new inode under a default ACL, and the ACLs that it gets."""
        access, mode = acl.inherited(acl.parse(default), mode)
        operations: list[Operation] = []
        if not acl.is_minimal(access):
            operations.append(put(xattr_key(node, acl.ACCESS), acl.pack(access)))
        if directory:
            operations.append(put(xattr_key(node, acl.DEFAULT), default))
        return mode, operations

    async def link(self, node: int, parent: int, name: bytes) -> Inode:
        """One more name for a file that is not a directory. NotPermitted, TooManyLinks, AlreadyExists."""
        _check_length(name)
        key, name_key, parent_key = inode_key(node), dirent_key(parent, name), inode_key(parent)
        for _ in range(ATTEMPTS):
            record = self.store.get(key)
            if record is None:
                raise errors.NotFound(f"inode {node}")
            inode = unpack_inode(record.value)
            kind = inode.mode >> 12
            if kind == DIRECTORY:
                raise errors.NotPermitted("a directory has one name")
            if inode.nlink == 0:
                raise errors.NotFound("the file has no name any more")
            if inode.nlink >= LINKS_MAX:
                raise errors.TooManyLinks(f"an inode has at most {LINKS_MAX} names")
            self.volume.directory(parent)
            if self.store.get(name_key) is not None:
                raise errors.AlreadyExists(name)
            now = self.volume.now()
            result = await self.volume.txn(
                (
                    absent(name_key),
                    exists(parent_key),
                    compare_mod_revision(key, EQUAL, record.mod_revision),
                ),
                (
                    put(name_key, DIRENT.pack(node, kind)),
                    merge(key, add(NLINK, 1), patch(CTIME, I64(now))),
                    merge(parent_key, *_parent_edits(1, 0, now)),
                ),
            )
            if result.succeeded:
                return inode._replace(nlink=inode.nlink + 1, ctime=now)
        raise conflict("link")

    # --- removing ---

    async def unlink(self, parent: int, name: bytes) -> Removed:
        """Takes a name from a file. NotFound, IsADirectory."""
        for _ in range(ATTEMPTS):
            node, kind = self.find(parent, name)
            if kind == DIRECTORY:
                raise errors.IsADirectory(name)
            now = self.volume.now()
            change = Change()
            removed = self._drop_name(change, parent, name, node, kind, now)
            change.then.append(merge(inode_key(parent), *_parent_edits(-1, 0, now)))
            if await self._apply(change):
                return removed
        raise conflict("unlink")

    async def rmdir(self, parent: int, name: bytes) -> Removed:
        """Removes an empty directory. NotFound, NotADirectory, DirectoryNotEmpty."""
        for _ in range(ATTEMPTS):
            node, kind = self.find(parent, name)
            if kind != DIRECTORY:
                raise errors.NotADirectory(name)
            now = self.volume.now()
            change = Change()
            removed = self._drop_name(change, parent, name, node, kind, now)
            change.then.append(merge(inode_key(parent), *_parent_edits(-1, -1, now)))
            if await self._apply(change):
                return removed
        raise conflict("rmdir")

    def _drop_name(
        self, change: Change, parent: int, name: bytes, node: int, kind: int, now: int, keep: bool = False
    ) -> Removed:
        """Adds to `change` what removing this name does to the entry and its inode, not to the parent.

        With `keep` the inode of a file stays as an orphan, as one that is open does, and on several nodes
        any: it may be open elsewhere.
        """
        key, name_key = inode_key(node), dirent_key(parent, name)
        record = self.store.get(key)
        if record is None:
            raise errors.NotFound(f"inode {node}")
        inode = unpack_inode(record.value)
        change.compares += (
            compare_value(name_key, EQUAL, DIRENT.pack(node, kind)),
            compare_mod_revision(key, EQUAL, record.mod_revision),
        )
        change.then.append(delete(name_key))
        if kind == DIRECTORY:
            if inode.entries:
                raise errors.DirectoryNotEmpty(name)
            below = DIRENT_PREFIX + number(node)
            change.compares.append(range_empty(below, prefix_end(below)))
            change.destroy(node, inode, [])
            change.count(-1)
            return Removed(node, inode._replace(nlink=0, ctime=now), True)
        if inode.nlink > 1:
            change.then.append(merge(key, add(NLINK, -1), patch(CTIME, I64(now))))
            return Removed(node, inode._replace(nlink=inode.nlink - 1, ctime=now), False)
        after = inode._replace(nlink=0, ctime=now)
        released = None
        if self.store.alone and not keep and not self.in_use(node):
            released = (
                self.content.release_operations(node, inode.size) if inode.allocated else ([], References())
            )
        if released is None:
            change.then += (
                merge(key, add(NLINK, -1), patch(CTIME, I64(now))),
                put(orphan_key(node), b""),
            )
            return Removed(node, after, False)
        change.destroy(node, inode, released[0])
        change.count(-1)
        change.references.append(released[1])
        change.going = node
        return Removed(node, after, True)

    async def _apply(self, change: Change) -> bool:
        self.going.add(change.going)
        try:
            return await change.apply(self.volume)
        finally:
            self.going.discard(change.going)

    async def keep(self, node: int) -> None:
        """For who has just opened a file that is `going`: that transaction fails and is made anew, as one
        that leaves an orphan; or it was first. Stale."""
        key = inode_key(node)
        if not (await self.volume.txn([exists(key)], [merge(key, add(NLINK, 0))])).succeeded:
            raise errors.Stale(f"inode {node} is gone")

    # --- rename ---

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> Removed | None:
        """renameat2(2); what lost its last or a name by being replaced, if anything did."""
        _check_length(new_name)
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise errors.InvalidArgument(f"rename flags {flags:#x} are not supported")
        for _ in range(ATTEMPTS):
            node, kind = self.find(parent, name)
            self.volume.directory(new_parent)
            try:
                victim, victim_kind = self.find(new_parent, new_name)
            except errors.NotFound:
                victim, victim_kind = 0, 0
            if victim == node or (parent == new_parent and name == new_name):
                return None
            if flags & RENAME_NOREPLACE and victim:
                raise errors.AlreadyExists(new_name)
            now = self.volume.now()
            change = Change()
            if flags & RENAME_EXCHANGE:
                if not victim:
                    raise errors.NotFound(new_name)
                self._exchange(
                    change, (parent, name, node, kind), (new_parent, new_name, victim, victim_kind), now
                )
                removed = None
            else:
                removed = self._move(
                    change, (parent, name, node, kind), (new_parent, new_name, victim, victim_kind), now
                )
            if await self._apply(change):
                return removed
        raise conflict("rename")

    def _move(
        self,
        change: Change,
        source: tuple[int, bytes, int, int],
        target: tuple[int, bytes, int, int],
        now: int,
    ) -> Removed | None:
        (parent, name, node, kind), (new_parent, new_name, victim, victim_kind) = source, target
        removed = None
        name_key, new_key = dirent_key(parent, name), dirent_key(new_parent, new_name)
        entry = DIRENT.pack(node, kind)
        directory = 1 if kind == DIRECTORY else 0
        if victim:
            if directory and victim_kind != DIRECTORY:
                raise errors.NotADirectory(new_name)
            if not directory and victim_kind == DIRECTORY:
                raise errors.IsADirectory(new_name)
            # An open by the old name may be under way with an inode that the kernel has looked up: rename
            # must look atomic to it, so it finds the old file, not none.
            keep = self.is_known(victim)
            removed = self._drop_name(change, new_parent, new_name, victim, victim_kind, now, keep)
        else:
            change.compares.append(absent(new_key))
        change.compares.append(compare_value(name_key, EQUAL, entry))
        change.then += (delete(name_key), put(new_key, entry))
        self._moved(change, node, kind, parent, new_parent, now)
        if parent == new_parent:
            change.then.append(
                merge(
                    inode_key(parent), *_parent_edits(-1 if victim else 0, -directory if victim else 0, now)
                )
            )
        else:
            change.compares.append(exists(inode_key(new_parent)))
            change.then += (
                merge(inode_key(parent), *_parent_edits(-1, -directory, now)),
                merge(
                    inode_key(new_parent), *_parent_edits(0 if victim else 1, 0 if victim else directory, now)
                ),
            )
        return removed

    def _exchange(
        self,
        change: Change,
        one: tuple[int, bytes, int, int],
        other: tuple[int, bytes, int, int],
        now: int,
    ) -> None:
        for (parent, name, node, kind), (new_parent, new_name, _, new_kind) in ((one, other), (other, one)):
            entry = DIRENT.pack(node, kind)
            change.compares.append(compare_value(dirent_key(parent, name), EQUAL, entry))
            change.then.append(put(dirent_key(new_parent, new_name), entry))
            self._moved(change, node, kind, parent, new_parent, now)
            if parent != new_parent:
                gained = (new_kind == DIRECTORY) - (kind == DIRECTORY)
                change.then.append(merge(inode_key(parent), *_parent_edits(0, gained, now)))
        if one[0] == other[0]:
            change.then.append(merge(inode_key(one[0]), *_parent_edits(0, 0, now)))

    def _moved(self, change: Change, node: int, kind: int, parent: int, new_parent: int, now: int) -> None:
        """The moved inode's own ctime and, for a directory that changes place, its parent."""
        edits: list[Edit] = [patch(CTIME, I64(now))]
        if kind == DIRECTORY and parent != new_parent:
            self._refuse_loop(node, new_parent)
            lock = self.store.get(RENAME_LOCK)
            revision = 0 if lock is None else lock.mod_revision
            if not change.locked:
                change.compares.append(compare_mod_revision(RENAME_LOCK, EQUAL, revision))
                change.then.append(put(RENAME_LOCK, b""))
                change.locked = True
            edits.append(patch(PARENT, number(new_parent)[::-1]))
        change.compares.append(exists(inode_key(node)))
        change.then.append(merge(inode_key(node), *edits))

    def _refuse_loop(self, node: int, new_parent: int) -> None:
        """A directory may not move into itself or below itself. InvalidArgument."""
        at = new_parent
        while at != ROOT:
            if at == node:
                raise errors.InvalidArgument("a directory cannot move into itself")
            at = self.volume.inode(at).parent


def _same(key: bytes, inode: Inode, offset: int) -> Compare:
    """The eight bytes at `offset` of an inode are as they were read: one field, or two that lie together."""
    return compare_field(
        key, offset, EQUAL, int.from_bytes(INODE.pack(*inode)[offset : offset + 8], "little", signed=True)
    )


def _parent_edits(entries: int, directories: int, now: int) -> list[Edit]:
    """Edits of a directory's inode when it gains (or loses) entries, `directories` of them directories."""
    edits: list[Edit] = [patch(MTIME, TIMES2(now, now))]
    if entries:
        edits.append(add(ENTRIES, entries))
    if directories:
        edits.append(add(NLINK, directories))
    return edits
