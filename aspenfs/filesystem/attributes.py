"""Attributes and extended attributes of inodes (chmod(2), chown(2), utimensat(2), xattr(7))."""

import stat
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from aspenfs import errors
from aspenfs.filesystem import acl
from aspenfs.filesystem.layout import (
    ATIME,
    CTIME,
    FLAGS,
    GID,
    HAS_XATTRS,
    I64,
    MODE,
    MTIME,
    U32,
    UID,
    XATTR_PREFIX,
    Inode,
    inode_key,
    number,
    unpack_inode,
    xattr_key,
)
from aspenfs.filesystem.volume import ATTEMPTS, Volume, conflict
from aspenfs.kv.store import Store
from aspenfs.kv.types import (
    EQUAL,
    Edit,
    Operation,
    Record,
    compare_mod_revision,
    delete,
    exists,
    max_,
    merge,
    patch,
    prefix_end,
    put,
)
from aspenfs.limits import XATTR_BYTES_MAX, XATTR_LIST_BYTES_MAX, XATTR_VALUE_BYTES_MAX

NAMESPACES: Final = (b"user.", b"trusted.", b"security.")
PERMISSIONS: Final = 0o7777
_CAPABILITY: Final = b"security.capability"
# ns that an inode holds: the years 1677 to 2262. Times beyond are kept as the nearest, as the kernel does
# for file systems that tell it their range.
Change = Mapping[str, int]  # mode, uid, gid, atime, mtime, ctime: those that are set
TIME_MIN: Final = -(1 << 63)
TIME_MAX: Final = (1 << 63) - 1


_PLACES: Final[dict[str, tuple[int, Callable[[int], bytes]]]] = {
    "mode": (MODE, U32), "uid": (UID, U32), "gid": (GID, U32),
    "atime": (ATIME, I64), "mtime": (MTIME, I64), "ctime": (CTIME, I64),
}  # fmt: skip


def changed(inode: Inode, change: Change) -> Inode:
    """The inode after a change. Of a `mode` the permission bits count."""
    fields = dict(change)
    for name in ("atime", "mtime"):
        if name in fields:
            fields[name] = max(TIME_MIN, min(fields[name], TIME_MAX))
    if "ctime" in fields:
        fields["ctime"] = max(fields["ctime"], inode.ctime)
    if "mode" in fields:
        fields["mode"] = inode.mode & ~PERMISSIONS | fields["mode"] & PERMISSIONS
    return inode._replace(**fields)


def edits_of(inode: Inode, change: Change) -> list[Edit]:
    """What a change does to the row of an inode."""
    after = changed(inode, change)
    places = [(name, *_PLACES[name]) for name in _PLACES if name in change]
    return [patch(place, pack(getattr(after, name))) for name, place, pack in places]


def access_of(store: Store, node: int, inode: Inode, change: Change) -> list[Operation]:
    """What a change does beside the row: an access control list follows the mode."""
    if "mode" in change and inode.flags & HAS_XATTRS:
        held = store.get(xattr_key(node, acl.ACCESS))
        if held is not None:
            value = acl.pack(acl.with_mode(acl.parse(held.value), change["mode"]))
            return [put(xattr_key(node, acl.ACCESS), value)]
    return []


def without_set_ids(mode: int) -> int:
    """What a write by a user without privilege leaves of a mode. Where the group may not execute it, the
    set-group-ID bit means something else."""
    return mode & ~(stat.S_ISUID | stat.S_ISGID if mode & stat.S_IXGRP else stat.S_ISUID)


class AttributeOperations:
    """Changes of what stat(2) and getxattr(2) show, on one volume."""

    def __init__(self, volume: Volume) -> None:
        self.volume, self.store = volume, volume.store

    def _row(self, node: int) -> tuple[Record, Inode]:
        """Stale when a rename replaced it since the kernel looked: then that looks up again."""
        record = self.store.get(inode_key(node))
        if record is None:
            raise errors.Stale(f"inode {node} is gone")
        return record, unpack_inode(record.value)

    async def change(self, node: int, change: Change, owner: int | None = None) -> Inode:
        """Makes a change in one transaction. The inode after. NotPermitted if it is not that `owner`'s."""
        key = inode_key(node)
        for _ in range(ATTEMPTS):
            record, inode = self._row(node)
            if owner is not None and inode.uid != owner:
                raise errors.NotPermitted(f"inode {node} is not that user's any more")
            timed = {"ctime": self.volume.now(), **change}
            operations = [merge(key, *edits_of(inode, timed)), *access_of(self.store, node, inode, timed)]
            result = await self.store.txn(
                (compare_mod_revision(key, EQUAL, record.mod_revision),), operations, origin=self.volume
            )
            if result.succeeded:
                return changed(inode, timed)
        raise conflict("setattr")

    def lends(self, node: int, inode: Inode) -> bool:
        """Whether a program in this file gets capabilities(7) that its caller lacks."""
        return bool(inode.flags & HAS_XATTRS) and self.store.get(xattr_key(node, _CAPABILITY)) is not None

    async def drop_privileges(self, node: int, *, set_ids: bool) -> None:
        """Takes away what lends a program more than its caller has: capabilities(7), and if `set_ids` the
        set-user-ID and set-group-ID bits, as Linux does in file_remove_privs. This host's kernel is told,
        too: it does not know that. Stale."""
        key = inode_key(node)
        for _ in range(ATTEMPTS):
            record, inode = self._row(node)
            mode, held = without_set_ids(inode.mode) if set_ids else inode.mode, self.lends(node, inode)
            if mode == inode.mode and not held:
                return
            edits = edits_of(inode, {"mode": mode, "ctime": self.volume.now()})
            operations = [merge(key, *edits), *([delete(xattr_key(node, _CAPABILITY))] if held else [])]
            same = compare_mod_revision(key, EQUAL, record.mod_revision)
            if (await self.store.txn((same,), operations)).succeeded:
                return
        raise conflict("taking privileges away")

    async def record_reads(self, atimes: dict[int, int]) -> bool:
        """Writes up to TXN_OPS_MAX access times that were kept in memory; nodes that are gone are passed
        over. False if one went meanwhile: nothing is written then."""
        nodes = [node for node in atimes if self.store.get(inode_key(node)) is not None]
        if not nodes:
            return True
        result = await self.volume.txn(
            [exists(inode_key(node)) for node in nodes],
            [merge(inode_key(node), max_(ATIME, atimes[node])) for node in nodes],
        )
        return bool(result.succeeded)

    # --- extended attributes ---

    def get(self, node: int, name: bytes) -> bytes:
        """NoAttribute, NotSupported for a namespace that we do not keep."""
        if not name.startswith(NAMESPACES) and name not in (acl.ACCESS, acl.DEFAULT):
            raise errors.NotSupported(f"extended attributes are kept in {NAMESPACES}")
        if not self._row(node)[1].flags & HAS_XATTRS:
            raise errors.NoAttribute(name)
        record = self.store.get(xattr_key(node, name))
        if record is None:
            raise errors.NoAttribute(name)
        return record.value

    def list(self, node: int) -> Sequence[bytes]:
        if not self._row(node)[1].flags & HAS_XATTRS:
            return ()
        prefix = XATTR_PREFIX + number(node)
        return [key[11:] for key, _ in self.store.range(prefix, prefix_end(prefix), keys_only=True)]

    async def set(self, node: int, name: bytes, value: bytes, *, keeps_group: bool = True) -> None:
        """NotSupported outside user., trusted., security. and the two ACLs; NoSpace when the names grow
        over 64 KiB or the values over 1 MiB. An access ACL sets the mode; one that says no more than the
        mode is not kept. Who is not of the inode's group (not `keeps_group`) takes its set-group-ID bit."""
        if not name.startswith(NAMESPACES) and name not in (acl.ACCESS, acl.DEFAULT):
            raise errors.NotSupported(f"extended attributes are kept in {NAMESPACES}")
        if name in NAMESPACES:
            raise errors.InvalidArgument("a namespace is no name")
        if len(value) > XATTR_VALUE_BYTES_MAX:
            raise errors.ArgumentTooLong(f"a value has at most {XATTR_VALUE_BYTES_MAX} bytes")
        for _ in range(ATTEMPTS):
            record, inode = self._row(node)
            self._check_room(node, name, value)
            edits: list[Edit] = [patch(CTIME, I64(self.volume.now()))]
            keep = True
            if name in (acl.ACCESS, acl.DEFAULT):
                entries = acl.parse(value)
                if name == acl.ACCESS:
                    kept = ~0o777 if keeps_group else ~(0o777 | stat.S_ISGID)
                    edits.append(patch(MODE, U32(inode.mode & kept | acl.mode_bits(entries))))
                    keep = not acl.is_minimal(entries)
                elif inode.mode & 0o170000 != 0o040000:
                    raise errors.AccessDenied("only a directory has a default access control list")
            key = xattr_key(node, name)
            if keep:
                edits.append(patch(FLAGS, bytes([inode.flags | HAS_XATTRS])))
            result = await self.volume.txn(
                [compare_mod_revision(inode_key(node), EQUAL, record.mod_revision)],
                [put(key, value) if keep else delete(key), merge(inode_key(node), *edits)],
            )
            if result.succeeded:
                return
        raise conflict("setxattr")

    def _check_room(self, node: int, name: bytes, value: bytes) -> None:
        """NoSpace if the attributes would be too much with this one. Each change of one changes the inode,
        so whoever compares that one's revision may rely on the answer."""
        prefix = XATTR_PREFIX + number(node)
        sizes = {key[11:]: len(record.value) for key, record in self.store.range(prefix, prefix_end(prefix))}
        sizes[name] = len(value)
        if sum(map(len, sizes)) + len(sizes) > XATTR_LIST_BYTES_MAX or sum(sizes.values()) > XATTR_BYTES_MAX:
            raise errors.NoSpace("too many extended attributes")

    async def remove(self, node: int, name: bytes) -> None:
        """NoAttribute."""
        self.get(node, name)
        now = self.volume.now()
        result = await self.volume.txn(
            [exists(inode_key(node)), exists(xattr_key(node, name))],
            [delete(xattr_key(node, name)), merge(inode_key(node), patch(CTIME, I64(now)))],
        )
        if not result.succeeded:
            raise errors.NoAttribute(name)
