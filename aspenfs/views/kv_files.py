"""An open file of `kv/`: reads see the key as it is, every write(2) is one transaction.

A write names the creation of the key that was opened. If the key was deleted meanwhile, by anyone, the
write goes to the file that was unlinked, as in any file system; it never brings the key back and
never lands in a later key of the same name. Reads are of the current value, because the kernel's
pages belong to the node, not to the open file: a snapshot read into them would be stale for others.
"""

import os
from collections.abc import Callable, Sequence

from aspenfs import errors
from aspenfs.kv.merge import apply_edits
from aspenfs.kv.types import (
    EQUAL,
    Edit,
    Record,
    append,
    compare_create_revision,
    cut,
    merge,
    patch,
    set_attributes,
)
from aspenfs.limits import VALUE_BYTES_MAX
from aspenfs.vfs.tree import OpenFile, is_write_back, must_append_whole
from aspenfs.views.kv_attributes import stamp
from aspenfs.views.kv_nodes import FileNode
from aspenfs.views.kv_space import CONFLICTS_MAX, Change, KeySpace


async def edit(space: KeySpace, node: FileNode, *edits: Edit) -> int:
    """Applies edits to the file wherever it is now, its key or its orphan; the revision, 0 for an orphan."""
    for _ in range(CONFLICTS_MAX):
        if space.record(node) is None or node.key is None:
            node.orphan = _edited(space.content(node), edits)
            return 0
        key = node.key
        result = await space.commit(Change(
            [compare_create_revision(key, EQUAL, node.created)], [merge(key, *edits)],
        ))
        if result is not None:
            return result.revision
    raise errors.Conflict(node.key)


def _edited(record: Record, edits: Sequence[Edit]) -> Record:
    value, attributes = apply_edits(record.value, record.attributes, edits)
    return record._replace(value=value, attributes=attributes)


async def truncate(space: KeySpace, node: FileNode, size: int) -> None:
    """TooLarge."""
    if size > VALUE_BYTES_MAX:
        raise errors.TooLarge(f"a value has at most {VALUE_BYTES_MAX} bytes")
    await edit(space, node, cut(size), set_attributes(stamp(space.clock.time_ns())))


class KVFile(OpenFile):
    """`displaced` hears of bytes that are not where the kernel has them."""

    __slots__ = ("appends", "direct_io", "displaced", "flags", "node", "space", "waits")

    def __init__(
        self, space: KeySpace, node: FileNode, flags: int, displaced: Callable[[int], None]
    ) -> None:
        self.space, self.node, self.flags, self.displaced = space, node, flags, displaced
        self.appends = bool(flags & os.O_APPEND)
        self.direct_io = must_append_whole(flags, space.store.alone)
        self.waits = bool(flags & os.O_DSYNC)  # O_SYNC contains it

    async def read(self, offset: int, size: int) -> bytes:
        return self.space.content(self.node).value[offset:offset + size]

    async def write(
        self, offset: int, data: bytes, mapped: bool | None = None, unprivileged: bool | None = None
    ) -> int:
        """As much as a value can take, as POSIX has it for the file size limit; TooLarge if nothing."""
        space, node, believed = self.space, self.node, offset
        appends = False
        if self.appends:
            size = len(space.content(node).value)
            appends = not (is_write_back(self.flags, offset, len(data), size) if mapped is None else mapped)
            if appends:
                offset = size  # the kernel's idea of the end may be old; the end is where it is at apply
        room = VALUE_BYTES_MAX - offset
        if room < len(data):
            if room <= 0:
                raise errors.TooLarge(f"a value has at most {VALUE_BYTES_MAX} bytes")
            data = data[:room]
        written = append(data) if appends else patch(offset, data)
        revision = await edit(space, node, written, set_attributes(stamp(space.clock.time_ns())))
        if appends and not space.store.alone:
            record = space.record(node)
            if (record is None or record.mod_revision != revision
                    or len(record.value) != believed + len(data)):  # fmt: skip
                self.displaced(node.id)
        if self.waits and revision:
            await space.store.committed(revision)
        return len(data)

    async def sync(self, data_only: bool) -> None:
        record = self.space.record(self.node)
        if record is not None:
            await self.space.store.committed(record.mod_revision)
