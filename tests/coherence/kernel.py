"""A model of what a FUSE kernel caches, with the time that its threads may take anywhere (fs/fuse/*.c).

Modelled: dentries and attributes with timeouts; pages by READ and write(2), kept or dropped at open; the
version that makes an answer to GETATTR or LOOKUP void if its inode changed meanwhile (not if the kernel did
not know the inode yet); the directory lock under which LOOKUP is asked and names are dropped; the
page lock that a READ holds until its answer is in. A notifier tells it of changes after any delay.
"""

import os
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from aspenfs import errors
from aspenfs.vfs.filesystem import ROOT_INODE, FileSystem
from aspenfs.vfs.tree import Attr, SetAttr
from tests.filesystem.volumes import CALLER

PAGE = 16
REVALIDATIONS = 2  # that open(2) makes when it gets ESTALE: one


class Inode:
    def __init__(self) -> None:
        self.attr: Attr | None = None
        self.valid_until = 0.0
        self.size = 0
        self.version = 0
        self.pages: dict[int, bytes] = {}
        self.page_lock = trio.Lock()
        self.lock = trio.Lock()  # i_rwsem: of writers, and of names in a directory


class Descriptor:
    def __init__(self, ino: int, fh: int, file: Any) -> None:
        self.ino, self.fh, self.file = ino, fh, file


class Kernel:
    """The kernel of one host, and the Notices port of its mount. `delay` is any short time."""

    def __init__(self, delay: Callable[[], float], slow: Callable[[], float], nursery: trio.Nursery) -> None:
        self.fs: FileSystem
        self.delay, self.slow, self.nursery = delay, slow, nursery
        self.dentries: dict[tuple[int, bytes], tuple[int, float]] = {}
        self.inodes: dict[int, Inode] = {}
        self.versions = 0
        self.untold: dict[int, int] = {}
        self.old_pages: dict[int, int] = {}

    def inode(self, ino: int) -> Inode:
        return self.inodes.setdefault(ino, Inode())

    # --- the Notices port ---

    def touch(self, inode: int, data: bool) -> None:
        self.untold[inode] = self.untold.get(inode, 0) + 1
        self.old_pages[inode] = self.old_pages.get(inode, 0) + data
        self.nursery.start_soon(self._told, inode, data)

    async def _told(self, ino: int, data: bool) -> None:
        await trio.sleep(self.slow())
        self.drop_attributes(ino)
        if data:
            await self._drop_pages(ino)
        self.old_pages[ino] -= data
        self.untold[ino] -= 1

    def entry(self, parent_inode: int, name: bytes) -> None:
        async def told() -> None:
            await trio.sleep(self.slow())
            async with self.inode(parent_inode).lock:
                self.dentries.pop((parent_inode, name), None)

        self.nursery.start_soon(told)

    def everything(self) -> None:
        self.dentries.clear()
        for ino in self.inodes:
            self.touch(ino, True)

    def is_untold(self, inode: int) -> bool:
        return self.untold.get(inode, 0) > 0

    def holds_old_pages(self, inode: int) -> bool:
        return self.old_pages.get(inode, 0) > 0

    def drop_attributes(self, inode: int) -> None:
        if inode in self.inodes:
            self._changed(inode).valid_until = 0.0

    # --- what it does with answers ---

    def _changed(self, ino: int) -> Inode:
        found = self.inode(ino)
        self.versions += 1
        found.version = self.versions
        return found

    async def _drop_pages(self, ino: int) -> None:
        if ino in self.inodes:
            async with self.inode(ino).page_lock:
                self.inode(ino).pages.clear()

    async def _install(self, ino: int, attr: Attr, timeout_s: float, asked: int) -> None:
        """fuse_change_attributes: unless the inode has changed since the question."""
        found = self.inode(ino)
        if found.version > asked:
            found.valid_until = 0.0
            return
        old, found.attr = found.attr, attr
        found.valid_until = trio.current_time() + timeout_s
        grown = found.size != attr.size
        found.size = attr.size
        if old is not None and (grown or old.mtime_ns != attr.mtime_ns):  # AUTO_INVAL_DATA
            await self._drop_pages(ino)

    async def lookup(self, parent: int, name: bytes, *, revalidate: bool = False) -> int:
        held = self.dentries.get((parent, name))
        if held is not None and held[1] > trio.current_time() and not revalidate:
            if not held[0]:
                raise errors.NotFound(name)
            return held[0]
        async with self.inode(parent).lock:
            asked = self.versions
            try:
                ino, validity, attr = await self.fs.lookup(parent, name)
            except errors.NotFound:
                timeout_s = self.fs.locate(parent)[0].negative_timeout_s
                await trio.sleep(self.delay())
                self.dentries[parent, name] = 0, trio.current_time() + timeout_s
                raise
            entry_s, attr_s = validity.entry_timeout_s, validity.attr_timeout_s
            await trio.sleep(self.delay())
            self.dentries[parent, name] = ino, trio.current_time() + entry_s
            await self._install(ino, attr, attr_s, asked)
            return ino

    async def _fresh_size(self, ino: int) -> int:
        found = self.inode(ino)
        if found.valid_until <= trio.current_time():
            asked = self.versions
            tree, attr = await self.fs.getattr(ino)
            timeout_s = tree.attr_timeout_s
            await trio.sleep(self.delay())
            await self._install(ino, attr, timeout_s, asked)
        return found.size

    # --- system calls ---

    async def open(self, parent: int, name: bytes, flags: int) -> Descriptor:
        """open(2) of a name in a directory, O_CREAT and O_TRUNC too; ESTALE is looked up again once."""
        for attempt in range(REVALIDATIONS):
            try:
                try:
                    ino = await self.lookup(parent, name, revalidate=attempt > 0)
                except errors.NotFound:
                    if not flags & os.O_CREAT:
                        raise
                    return await self._create(parent, name, flags)
                fh, file, keep = await self.fs.open(ino, flags, CALLER)
                await trio.sleep(self.delay())
                if flags & os.O_TRUNC:
                    found = self._changed(ino)
                    found.size, found.valid_until = 0, 0.0
                    await self._drop_pages(ino)
                elif not keep:
                    await self._drop_pages(ino)
                return Descriptor(ino, fh, file)
            except errors.Stale:
                if attempt:
                    raise
        raise AssertionError("not reached")

    async def _create(self, parent: int, name: bytes, flags: int) -> Descriptor:
        async with self.inode(parent).lock:
            asked = self.versions
            fh, file, _, ino, validity, attr = await self.fs.create(parent, name, 0o644, flags, CALLER)
            entry_s, attr_s = validity.entry_timeout_s, validity.attr_timeout_s
            await trio.sleep(self.delay())
            self.dentries[parent, name] = ino, trio.current_time() + entry_s
            await self._install(ino, attr, attr_s, asked)
            self._changed(parent).valid_until = 0.0
            return Descriptor(ino, fh, file)

    async def read(self, descriptor: Descriptor) -> bytes:
        """The whole file, as read(2) from its start gives it."""
        ino = descriptor.ino
        size = await self._fresh_size(ino)
        found, data = self.inode(ino), b""
        for page in range((size + PAGE - 1) // PAGE):
            async with found.page_lock:
                if page not in found.pages:
                    answer = bytes(await descriptor.file.read(page * PAGE, PAGE))
                    await trio.sleep(self.delay())
                    found.pages[page] = answer.ljust(PAGE, b"\0")
                data += found.pages[page]
        return data[:size]

    async def write(self, descriptor: Descriptor, offset: int, data: bytes) -> None:
        """pwrite(2), through the page cache: a page that it does not fill and that is not there stays so."""
        ino = descriptor.ino
        found = self.inode(ino)
        async with found.lock:
            for page in range(offset // PAGE, (offset + len(data) + PAGE - 1) // PAGE):
                low, high = max(offset, page * PAGE), min(offset + len(data), (page + 1) * PAGE)
                piece = data[low - offset : high - offset]
                held = found.pages.get(page)
                if held is not None or high - low == PAGE:
                    held = held or bytes(PAGE)
                    at = low - page * PAGE
                    found.pages[page] = held[:at] + piece + held[at + len(piece) :]
            await descriptor.file.write(offset, data)
            await trio.sleep(self.delay())
            self._changed(ino).size = max(found.size, offset + len(data))
            found.valid_until = min(found.valid_until, 0.0)

    async def set_mtime(self, descriptor: Descriptor, mtime_ns: int) -> None:
        """futimens(2)."""
        ino = descriptor.ino
        async with self.inode(ino).lock:
            asked = self.versions
            tree, attr = await self.fs.setattr(ino, SetAttr(mtime_ns=mtime_ns), CALLER)
            await trio.sleep(self.delay())
            await self._install(ino, attr, tree.attr_timeout_s, asked)

    async def close(self, descriptor: Descriptor) -> None:
        if self.fs.coherence.asks_at_close():
            await descriptor.file.flush()
        await trio.sleep(self.delay())
        self.nursery.start_soon(self.fs.release, descriptor.fh)

    async def names(self, directory: int, change: Callable[[], Awaitable[object]], *gone: bytes) -> None:
        """rename(2), unlink(2) in one directory: `change` under its lock; then these names are not held."""
        async with self.inode(directory).lock:
            await change()
            await trio.sleep(self.delay())
            for name in gone:
                self.dentries.pop((directory, name), None)

    async def directory(self, name: bytes) -> int:
        return await self.lookup(ROOT_INODE, name)
