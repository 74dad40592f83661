"""pyfuse3's requests, answered by `vfs.FileSystem`. The only place where our errors become errnos.

Belongs here: translation between pyfuse3's objects and ours, and what is a matter of the mount (owner
mapping, timeouts, -o sync). Not here: any rule about files.
"""

import contextlib
import errno
import functools
import logging
import mmap
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar, cast

import pyfuse3
import trio

from aspenfs import errors
from aspenfs.fuse import loop, opened
from aspenfs.fuse.requests import (
    CREATE,
    OPEN,
    OPENDIR,
    WRITE_CACHE,
    WRITE_KILL_SUIDGID,
    Requests,
)
from aspenfs.limits import KIB, NAME_BYTES_MAX
from aspenfs.vfs.coherence import SHARED_TIMEOUT_S, Validity
from aspenfs.vfs.filesystem import ROOT_INODE, FileSystem
from aspenfs.vfs.tree import Attr, SetAttr

log = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])
READDIR_BYTES: Final = 32 * KIB  # what getdents(2) of the C library asks for
DIRENTPLUS_BYTES_MIN: Final = 160  # linux/fuse.h, struct fuse_direntplus and a short name
DOTS: Final = 2  # . and .. come before a directory's own entries, at positions 1 and 2
FUSEError = pyfuse3.FUSEError


class Presentation(NamedTuple):
    """How this mount shows attributes: fixed owner, permission bits taken away, and the longest timeouts."""

    uid: int | None = None
    gid: int | None = None
    umask: int = 0
    attr_timeout_s: float | None = None
    entry_timeout_s: float | None = None
    sync: bool = False


def answers(method: Method) -> Method:
    """Our errors become errnos; what is not ours is a bug: logged, EIO to this caller, the mount lives."""

    @functools.wraps(method)
    async def wrapped(*arguments: Any) -> Any:
        try:
            return await method(*arguments)
        except errors.AspenError as error:
            if error.errno == errno.EIO:
                log.error("%s: %s", method.__name__, error)
            raise FUSEError(error.errno) from None
        except OSError as error:
            log.exception("%s failed", method.__name__)
            raise FUSEError(error.errno or errno.EIO) from None
        except FUSEError:
            raise
        except Exception:
            log.exception("unexpected error in %s", method.__name__)
            raise FUSEError(errno.EIO) from None

    return cast(Method, wrapped)


class Operations(pyfuse3.Operations):
    """One mount's answers to the kernel."""

    supports_dot_lookup = False
    enable_writeback_cache = False  # not coherent between hosts (DESIGN §5)

    def __init__(
        self,
        filesystem: FileSystem,
        presentation: Presentation,
        *,
        acl: bool = False,
        directories_without_open: bool = True,
    ) -> None:
        """`directories_without_open`: the kernel may keep listings and open directories unasked, where no
        opendir must wait for others. It learns of changes by this mount's own calls and by the notifier."""
        super().__init__()
        self.enable_acl = acl
        self.directories_without_open = directories_without_open
        self.requests = Requests(loop.serving)
        filesystem.listings.page_bytes = mmap.PAGESIZE
        self.fs, self.show = filesystem, presentation
        self.plain = presentation._replace(sync=False) == Presentation()
        for tree in filesystem.trees:
            tree.owners_shown = (presentation.uid, presentation.gid, presentation.umask) == (None, None, 0)
        self._negative: dict[float, pyfuse3.EntryAttributes] = {}

    # --- attributes ---

    def _attributes(self, ino: int, validity: Validity, attr: Attr) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        _, mode, nlink, uid, gid, rdev, size, blocks, atime, mtime, ctime = attr
        entry.st_ino = ino
        entry.entry_timeout = validity.entry_timeout_s
        entry.attr_timeout = 0.0 if self.fs.asks_anew(mode) else validity.attr_timeout_s
        entry.st_mode = mode
        entry.st_nlink = nlink
        entry.st_uid = uid
        entry.st_gid = gid
        entry.st_rdev = rdev
        entry.st_size = size
        entry.st_blocks = blocks
        entry.st_atime_ns = atime
        entry.st_mtime_ns = mtime
        entry.st_ctime_ns = ctime
        if not self.plain:
            self._present(entry)
        return entry

    def _present(self, entry: pyfuse3.EntryAttributes) -> None:
        show = self.show
        if show.uid is not None:
            entry.st_uid = show.uid
        if show.gid is not None:
            entry.st_gid = show.gid
        entry.st_mode = pyfuse3.ModeT(entry.st_mode & ~show.umask)
        if show.attr_timeout_s is not None:
            entry.attr_timeout = min(entry.attr_timeout, show.attr_timeout_s)
        if show.entry_timeout_s is not None:
            entry.entry_timeout = min(entry.entry_timeout, show.entry_timeout_s)

    async def _done(self, inode: int) -> None:
        """-o sync: an answer waits until its change is committed. On several nodes it is."""
        if self.show.sync and self.fs.coherence.store.alone:
            await self.fs.locate(inode)[0].sync()

    @answers
    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        tree, attr = await self.fs.getattr(inode)
        return self._attributes(inode, tree, attr)

    @answers
    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        wanted = SetAttr(
            attr.st_mode & 0o7777 if fields.update_mode else None,
            attr.st_uid if fields.update_uid else None,
            attr.st_gid if fields.update_gid else None,
            attr.st_size if fields.update_size else None,
            attr.st_atime_ns if fields.update_atime else None,
            attr.st_mtime_ns if fields.update_mtime else None,
            attr.st_ctime_ns if fields.update_ctime else None,
        )
        tree, after = await self.fs.setattr(inode, wanted, ctx)
        await self._done(inode)
        return self._attributes(inode, tree, after)

    # --- names ---

    @answers
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        try:
            ino, validity, attr = await self.fs.lookup(parent_inode, name)
        except errors.NotFound:
            timeout_s = self.fs.locate(parent_inode)[0].negative_timeout_s
            if not timeout_s:
                raise
            if parent_inode == ROOT_INODE:  # `FileSystem.names_held` does not reach what has no name
                timeout_s = min(timeout_s, SHARED_TIMEOUT_S)
            return self._absent(timeout_s)
        return self._attributes(ino, validity, attr)

    def _absent(self, timeout_s: float) -> pyfuse3.EntryAttributes:
        """A negative entry, which the kernel keeps: inode 0 (fuse_lowlevel.h, fuse_reply_entry)."""
        entry = self._negative.get(timeout_s)
        if entry is None:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = cast(Any, 0)
            limit = self.show.entry_timeout_s
            entry.entry_timeout = timeout_s if limit is None else min(timeout_s, limit)
            self._negative[timeout_s] = entry
        return entry

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            try:
                self.fs.forget(inode, count)
            except Exception:
                log.exception("unexpected error in forget")

    @answers
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return await self.fs.readlink(inode)

    @answers
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        ino, validity, attr = await self.fs.mknod(parent_inode, name, mode, rdev, ctx)
        await self._done(parent_inode)
        return self._attributes(ino, validity, attr)

    @answers
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        ino, validity, attr = await self.fs.mkdir(parent_inode, name, mode, ctx)
        await self._done(parent_inode)
        return self._attributes(ino, validity, attr)

    @answers
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> Any:
        ino, validity, attr = await self.fs.symlink(parent_inode, name, target, ctx)
        await self._done(parent_inode)
        return self._attributes(ino, validity, attr)

    @answers
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> Any:
        ino, validity, attr = await self.fs.link(inode, new_parent_inode, new_name)
        await self._done(inode)
        return self._attributes(ino, validity, attr)

    @answers
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        await self.fs.unlink(parent_inode, name)
        await self._done(parent_inode)

    @answers
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        await self.fs.rmdir(parent_inode, name)
        await self._done(parent_inode)

    @answers
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any,
    ) -> None:
        await self.fs.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)
        await self._done(parent_inode_old)

    # --- open files ---

    @answers
    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE:
            self.requests.readable(OPEN, inode, ctx)  # for the writes that come
        fh, target, keep = await self.fs.open(inode, flags, ctx)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            return opened.read_only(fh, direct_io=target.direct_io, keep_cache=keep)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), direct_io=target.direct_io, keep_cache=keep)

    @answers
    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        if flags & os.O_ACCMODE:
            self.requests.readable(CREATE, parent_inode, ctx)
        fh, target, keep, ino, validity, attr = await self.fs.create(parent_inode, name, mode, flags, ctx)
        await self._done(parent_inode)
        info = pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), direct_io=target.direct_io, keep_cache=keep)
        return info, self._attributes(ino, validity, attr)

    @answers
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self.fs.file(fh).read(off, size)

    @answers
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        file = self.fs.file(fh)
        mapped = unprivileged = None
        syncs = self.show.sync
        writing = self.requests.writing(fh, off)
        if writing is not None:
            flags, uid, open_flags = writing
            mapped, unprivileged = bool(flags & WRITE_CACHE), bool(flags & WRITE_KILL_SUIDGID or uid)
            if not mapped:
                file.appends = bool(open_flags & os.O_APPEND)  # fcntl(2) may have changed it
                syncs = syncs or (file.direct_io and bool(open_flags & os.O_DSYNC))  # else the kernel asks
        written = await file.write(off, buf, mapped, unprivileged)
        if syncs:
            await file.sync(True)
        return written

    @answers
    async def flush(self, fh: int) -> None:
        await self.fs.file(fh).flush()
        if not self.fs.coherence.asks_at_close():
            # Every write was accepted when it returned, so there is nothing to do at close. The kernel
            # remembers this answer and spares each close a round trip.
            raise errors.NotImplementedHere("flush")

    @answers
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.fs.file(fh).sync(datasync)

    @answers
    async def release(self, fh: int) -> None:
        await self.fs.release(fh)

    # --- directories ---
    # They have no handles. Where the kernel does open them, their inode takes a handle's place.

    @answers
    async def opendir(self, inode: int, ctx: Any) -> int:
        coherence = self.fs.coherence
        if (
            self.directories_without_open
            and not coherence.asks_for_directories()
            and self.requests.readable(OPENDIR, inode, ctx)
        ):
            # The kernel remembers this answer: it opens directories by itself from now on, and keeps
            # their listings until they change.
            coherence.opendir_unasked = True
            raise errors.NotImplementedHere("opendir")
        await self.fs.opendir(inode)
        return inode

    @answers
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        inode, size = (fh, READDIR_BYTES) if fh else self.requests.directory(start_id)
        if await self._list(inode, start_id, size, token):
            return
        # At this answer the kernel takes all that readers up to here were given for the whole, and keeps it.
        if not self.fs.ended(inode, start_id) and not fh:
            with contextlib.suppress(OSError):
                await trio.to_thread.run_sync(pyfuse3.invalidate_inode, inode, abandon_on_cancel=True)

    async def _list(self, inode: int, start_id: int, size: int, token: Any) -> bool:
        """Gives entries behind a position, as many as there is room for; False: there are none."""
        fs, reply, attributes = self.fs, pyfuse3.readdir_reply, self._attributes
        given = False
        for at, (child, tree, name, attr) in enumerate(await fs.dots(inode) if start_id < DOTS else ()):
            # The kernel makes no use of the attributes of these two, and counts no lookup.
            if at >= start_id:
                given = True
                if not reply(token, name, attributes(child, tree, attr), at + 1):
                    return True
        position = start_id
        while listed := await fs.names(inode, position, size // DIRENTPLUS_BYTES_MIN + 1):
            found = await fs.listed(inode, [name for name, _ in listed])
            for (name, position), entry in zip(listed, found, strict=True):
                if entry is None:
                    fs.passed_over(inode)
                    continue
                child, tree, attr = entry
                if not reply(token, name, attributes(child, tree, attr), position):
                    return True
                given = True
                fs.remember(child)  # it came with attributes, so it counts as a lookup
        return given

    @answers
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.fs.sync()

    @answers
    async def releasedir(self, fh: int) -> None:
        pass

    # --- the rest ---

    @answers
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        usage = await self.fs.statfs(1)
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = usage.block_bytes
        data.f_blocks = usage.blocks
        data.f_bfree = data.f_bavail = usage.blocks_free
        data.f_files = usage.inodes
        data.f_ffree = data.f_favail = usage.inodes_free
        data.f_namemax = NAME_BYTES_MAX
        return data

    @answers
    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        return await self.fs.getxattr(inode, name)

    @answers
    async def listxattr(self, inode: int, ctx: Any) -> Sequence[bytes]:
        names = await self.fs.listxattr(inode)
        return [name for name in names if not name.startswith(b"trusted.")] if ctx.uid else names

    @answers
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        if name.startswith(b"system.") and not self.enable_acl:
            raise errors.NotSupported("access control lists need -o acl: the kernel would not check them")
        await self.fs.setxattr(inode, name, value, ctx)
        await self._done(inode)

    @answers
    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        await self.fs.removexattr(inode, name, ctx)
        await self._done(inode)

    @answers
    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        return True  # never asked: default_permissions
