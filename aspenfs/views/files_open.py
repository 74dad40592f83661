"""An open regular file of files/, as one descriptor of a program has it.

On a node alone a write is accepted when write(2) returns. On several it is committed by then, or,
where the kernel tells of each close, by the time close(2) or fsync(2) return (`filesystem/write_behind.py`):
then these return the error of a commit that failed. Reads of this host show what was written here.
"""

import os
from typing import TYPE_CHECKING

from aspenfs import errors
from aspenfs.vfs.tree import OpenFile, is_write_back, must_append_whole

if TYPE_CHECKING:
    from aspenfs.views.files import FilesTree


class OpenInode(OpenFile):
    __slots__ = ("appends", "direct_io", "failures", "flags", "node", "tree", "unprivileged", "writer")

    def __init__(self, tree: "FilesTree", node: int, flags: int, *, unprivileged: bool) -> None:
        self.tree, self.node, self.flags, self.unprivileged = tree, node, flags, unprivileged
        self.writer: tuple[int, int] | None = None  # in `FilesTree.writers`
        self.appends = bool(flags & os.O_APPEND)
        self.direct_io = must_append_whole(flags, tree.store.alone)
        self.failures = tree.writes.failures[node][0] if node in tree.writes.failures else 0  # told already

    async def read(self, offset: int, size: int) -> bytes:
        tree = self.tree
        await tree.settled(self.node)
        if tree.writes.files:
            await tree.writes.settled_between(self.node, offset, offset + size)
        try:
            inode = tree.volume.inode(self.node)
            try:
                data = tree.content.read(self.node, offset, size, inode.size)
            except errors.Corrupt as problem:
                data = await tree.content.read_through(self.node, offset, size, problem)
        except errors.NotFound as error:  # this host was away for too long, and nobody kept the file for it
            raise errors.Stale(str(error)) from None
        tree.was_read(self.node, inode)
        return data  # type: ignore[return-value]  # any buffer will do for the kernel

    async def write(
        self, offset: int, data: bytes, mapped: bool | None = None, unprivileged: bool | None = None
    ) -> int:
        tree, node = self.tree, self.node
        if unprivileged is None:
            unprivileged = self.unprivileged
        if (self.direct_io or unprivileged) and not mapped:
            await tree.before_write(node, unprivileged)
        if tree.store.alone and node not in tree.writes.files:
            at = await self._place(offset, len(data), mapped) if self.appends else offset
            await tree.writer.write(node, at, data)
            return len(data)
        self._tell_failure()
        at = await self._place(offset, len(data), mapped) if self.appends else offset
        await tree.writes.write(node, at, offset, data)
        return len(data)

    async def _place(self, offset: int, size: int, mapped: bool | None) -> int | None:
        """Where a write by a handle that appends goes; None: to the end, wherever that is at apply."""
        if mapped is None and self.flags & os.O_ACCMODE == os.O_RDWR:
            await self.tree.writes.settled(self.node)  # else the end is not known here
            mapped = is_write_back(self.flags, offset, size, self.tree.size_of(self.node))
        return offset if mapped else None

    def _tell_failure(self) -> None:
        """Raises the error of writes that failed after they had returned, once for each open file."""
        count, error = self.tree.writes.failures.get(self.node, (0, None))
        if error is not None and count > self.failures:
            self.failures = count
            raise error.with_traceback(None)

    async def _settled(self) -> None:
        """Returns when what was written is committed or given up, and the file itself."""
        tree = self.tree
        if tree.writes.files:
            await tree.writes.settled(self.node)
        await tree.settled(self.node)

    async def flush(self) -> None:
        self.tree.closed(self)
        await self._settled()
        self._tell_failure()

    async def sync(self, data_only: bool) -> None:
        await self._settled()
        self._tell_failure()
        await self.tree.store.committed()

    async def release(self) -> None:
        await self._settled()
        self.tree.released(self)
