"""The interface of a tree: what a view must answer so that it can be mounted.

Belongs here: the nouns of a file system without a kernel (Attr, Caller, OpenFile) and the
base class `Tree`, whose defaults are those of a read-only tree. Not here: numbers of handles and
inodes as the kernel sees them (`filesystem.py`), pyfuse3 (`fuse/`), anything of one tree (`views/`).

A node is named by its node id, 48 bits, which the tree chooses: for a stored node it is the same on
every host and never reused. Names are bytes. All methods raise `aspenfs.errors`. A method that does
not need the network must not suspend: the fast path of the daemon depends on it.
"""

import os
import re
import stat
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from aspenfs import errors
from aspenfs.kv.types import Event


class Attr(NamedTuple):
    """stat(2) of a node; `mode` with the type bits, `blocks` in units of 512 bytes, times in ns."""

    node: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class SetAttr(NamedTuple):
    """What setattr changes; None = leave. Applied in POSIX order: owner, size, times, mode last."""

    mode: int | None = None  # permission bits only
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None


class Caller(Protocol):
    """Who asks, as the kernel reports it."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...
    @property
    def umask(self) -> int: ...


class Usage(NamedTuple):
    """statfs: bytes and inodes of the storage under a tree."""

    block_bytes: int
    blocks: int
    blocks_free: int
    inodes: int
    inodes_free: int


class Touched(NamedTuple):
    """What a change made stale: attributes and data of `node`, or the entry `name` in `parent`."""

    node: int | None = None
    data: bool = False  # pages too, not attributes only
    parent: int | None = None
    name: bytes = b""
    child: int | None = None  # what the name meant, 0: nothing; None if the tree does not know


def check_found(attr: Attr, flags: int, caller: Caller, *, owners_shown: bool) -> None:
    """A file turned out to exist when it was to be made: another host was faster. The kernel takes it for the
    caller's own, and does not check whether it may be opened so. Stale, unless that is plain, for root or by
    the owner's bits: at Stale the kernel looks the name up, and checks."""
    wanted = _ACCESS[flags & os.O_ACCMODE] | (stat.S_IWUSR if flags & os.O_TRUNC else 0)
    owns = owners_shown and caller.uid == attr.uid and attr.mode & wanted == wanted
    if caller.uid and not owns:
        raise errors.Stale(f"inode {attr.node} has come meanwhile")


def check_change(attr: Attr, wanted: SetAttr, caller: Caller, now_ns: int) -> SetAttr:
    """What `caller` may change of an inode that is `attr` now; NotPermitted. As setattr_prepare in Linux,
    which goes by the owner and group that its inode has in memory: by a descriptor these are not looked up
    anew, however long ago another host has changed them. Whoever is not root counts as without capabilities.

    Others than the owner may set the times to now, if they may write, and take set-user-ID and set-group-ID
    bits away by writing: the kernel sees to the former, and asks for the latter in the writer's name."""
    mode = wanted.mode
    if not caller.uid:
        return wanted
    if caller.uid != attr.uid:
        times = [time for time in (wanted.atime_ns, wanted.mtime_ns) if time is not None]
        gains = mode is not None and (attr.mode ^ mode) & 0o7777 & ~(attr.mode & SET_IDS)
        owns = wanted.uid is not None or wanted.gid is not None
        if gains or owns or any(abs(time - now_ns) > _NOW_NS for time in times):
            check_owner(attr, caller)
    elif mode is not None and mode & stat.S_ISGID:
        gid = attr.gid if wanted.gid is None else wanted.gid
        if not in_group(caller, gid):
            return wanted._replace(mode=mode & ~stat.S_ISGID)
    return wanted


def check_owner(attr: Attr, caller: Caller) -> None:
    """NotPermitted."""
    if caller.uid not in (0, attr.uid):
        raise errors.NotPermitted(f"inode {attr.node} is not that user's any more")


def in_group(caller: Caller, gid: int) -> bool:
    """Whether a process belongs to a group, as far as this process can see it."""
    if caller.gid == gid:
        return True
    try:
        status = Path(f"/proc/{caller.pid}/status").read_bytes()
    except OSError:
        return False
    groups = re.search(rb"^Groups:(.*)$", status, re.MULTILINE)
    return groups is not None and str(gid).encode() in groups[1].split()


SET_IDS: Final = stat.S_ISUID | stat.S_ISGID
_NOW_NS: Final = 2_000_000_000  # between the kernel's asking and ours
_ACCESS: Final = (stat.S_IRUSR, stat.S_IWUSR, stat.S_IRUSR | stat.S_IWUSR, stat.S_IRUSR | stat.S_IWUSR)


PAGE_BYTES: Final = 4096


def is_write_back(flags: int, offset: int, length: int, size: int) -> bool:
    """Whether a write by a handle opened with `flags` is the kernel writing a mapping's pages back, by
    whichever handle the file of `size` bytes has: such a write has its place, also on one that appends.

    For where the kernel's own flag is not to be had (`OpenFile.write`). An append of this mount comes with
    the size as its offset, pages lie before the end. Only an append that another host has overtaken can
    look the same, if it is of whole pages at a page's start.
    """
    return (
        flags & os.O_ACCMODE == os.O_RDWR  # others cannot be mapped for writing
        and offset < size
        and offset % PAGE_BYTES == 0
        and (length % PAGE_BYTES == 0 or offset + length == size)
    )


def must_append_whole(flags: int, alone: bool) -> bool:
    """Whether a file must be opened past the page cache, because the kernel cuts a write through it at a
    page's end: what another host appends could come between the parts. One that may be mapped can not
    be opened so; see `WriteBehind` and docs/posix.md."""
    return not alone and bool(flags & os.O_APPEND) and flags & os.O_ACCMODE == os.O_WRONLY


class OpenFile:
    """An open file of a tree. The defaults answer as a file that can do nothing."""

    direct_io = False  # the kernel must not cache its pages
    appends = False  # O_APPEND, as of the last write
    keep_cache = True  # pages cached earlier are still right

    async def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer only at the end of the file."""
        raise errors.BadHandle("not open for reading")

    async def write(
        self, offset: int, data: bytes, mapped: bool | None = None, unprivileged: bool | None = None
    ) -> int:
        """`mapped`: whether the kernel writes back a mapping's page, which has its place, also by a handle
        that appends; None: not to be told, see `is_write_back`. `unprivileged`: whether the writer may not
        leave a set-user-ID bit where it is; None: not to be told."""
        raise errors.ReadOnly("read-only tree")

    async def flush(self) -> None:
        """At each close(2) of a descriptor."""

    async def sync(self, data_only: bool) -> None:
        """fsync(2), fdatasync(2): returns when what was written is committed."""

    async def release(self) -> None:
        """At the last close; no error of it can reach anybody."""


class Tree:
    """A mountable tree; a subclass overrides what it can do. The defaults refuse changes with EROFS."""

    name: str = ""  # its name in the root directory
    root: int = 1  # node id of its root directory
    # How long the kernel may keep answers, in seconds (changes from elsewhere also invalidate).
    entry_timeout_s: float = 1.0
    attr_timeout_s: float = 1.0
    negative_timeout_s: float = 0.0
    writable = False
    keyspaces: Collection[bytes] = ()  # of the store, by their two first bytes, whose changes concern it
    shared = True  # it shows the store: what other hosts have committed is waited for

    # A write may return before it is committed: each close(2) asks for its outcome (`OpenFile.flush`).
    write_behind = False

    owners_shown = True  # the kernel goes by the owners and modes that this tree tells

    # --- what the driver puts in their place ---
    def is_known(self, node: int) -> bool:
        """Whether the kernel has looked the node up and not forgotten it."""
        return False

    def displaced(self, node: int) -> None:
        """What the kernel has of the bytes of a file is not what is stored: it should drop it."""

    def misnamed(self, parent: int, name: bytes) -> None:
        """What the kernel believes that a name means is not so: it should look it up again."""

    async def fresh(self) -> None:
        """Returns when reads here show all that was committed anywhere before the call."""

    # --- being sure ---
    def is_under_way(self, node: int) -> bool:
        """Whether changes of the node by this host are not committed yet: what is told of it may change."""
        return False

    async def settled(self, node: int) -> None:
        """Before a directory is listed: what has been made in it here is there."""

    def names_it(self, parent: int, name: bytes, node: int) -> bool:
        """Whether a name means this node now. Asked on several nodes, where it may have changed since our
        own transaction made it so."""
        return True

    # --- reading ---
    async def lookup(self, parent: int, name: bytes) -> Attr:
        raise errors.NotFound(name)

    async def getattr(self, node: int) -> Attr:
        raise errors.NotFound(node)

    async def readlink(self, node: int) -> bytes:
        raise errors.InvalidArgument("not a symbolic link")

    async def open(self, node: int, flags: int, caller: Caller) -> OpenFile:
        """`flags` of open(2), O_TRUNC included (the kernel leaves truncation to us)."""
        raise errors.NotFound(node)

    def list_names(self, node: int, behind: Any, limit: int) -> tuple[Sequence[bytes], Any]:
        """Up to `limit` names in a directory, without . and .., and what `behind` must be to go on; None:
        that was all. The first call says None.

        In an order of the tree's own, in which a name has its place as long as it is there: what is there
        from the first call until the last is given once, however the directory changes in between. A
        directory that is gone, but still somebody's working directory, is empty. NotADirectory.
        """
        raise errors.NotADirectory(node)

    def listing_version(self, node: int) -> int | None:
        """A number that differs after each change of the names in a directory; None: nobody can tell."""
        return None

    async def listed(self, node: int, names: Sequence[bytes]) -> list[Attr | None]:
        """What names that `list_names` gave are now, as by `lookup`; None: gone."""
        found: list[Attr | None] = []
        for name in names:
            try:
                found.append(await self.lookup(node, name))
            except errors.NotFound:
                found.append(None)
        return found

    def parent_of(self, node: int) -> int:
        """The directory that `..` of a directory leads to; the root's own parent is the root."""
        return node

    async def statfs(self) -> Usage:
        return Usage(4096, 0, 0, 0, 0)

    # --- changing ---
    async def setattr(self, node: int, wanted: SetAttr, caller: Caller) -> Attr:
        raise errors.ReadOnly("read-only tree")

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Attr, OpenFile]:
        """A new regular file, open; an existing one is opened unless O_EXCL (AlreadyExists)."""
        raise errors.ReadOnly("read-only tree")

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Attr:
        raise errors.ReadOnly("read-only tree")

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Attr:
        raise errors.ReadOnly("read-only tree")

    async def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Attr:
        raise errors.ReadOnly("read-only tree")

    async def link(self, node: int, parent: int, name: bytes) -> Attr:
        raise errors.ReadOnly("read-only tree")

    async def unlink(self, parent: int, name: bytes) -> None:
        raise errors.ReadOnly("read-only tree")

    async def rmdir(self, parent: int, name: bytes) -> None:
        raise errors.ReadOnly("read-only tree")

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """`flags` of renameat2(2): 0, RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2)."""
        raise errors.ReadOnly("read-only tree")

    # --- extended attributes: names with their namespace, b"user.x" ---
    async def getxattr(self, node: int, name: bytes) -> bytes:
        raise errors.NoAttribute(name)

    async def listxattr(self, node: int) -> Sequence[bytes]:
        return ()

    async def setxattr(self, node: int, name: bytes, value: bytes, caller: Caller | None = None) -> None:
        raise errors.NotSupported("this tree has no extended attributes")

    async def removexattr(self, node: int, name: bytes, caller: Caller | None = None) -> None:
        raise errors.NotSupported("this tree has no extended attributes")

    # --- life ---
    async def sync(self) -> None:
        """syncfs(2), fsyncdir: everything accepted so far is committed."""

    def forgotten(self, node: int) -> None:
        """The kernel no longer knows the node, and no handle is open: it may be reaped."""

    def noticed(self, event: Event, own: bool) -> None:
        """A change of the store at apply, perhaps this mount's own; called on several nodes only, before
        `touched`."""

    def replaced(self) -> None:
        """The state of the store is another one, without the changes that lead to it."""

    def touched(self, event: Event) -> Iterable[Touched]:
        """What a change of the store, made elsewhere, makes stale in the kernel's caches."""
        return ()
