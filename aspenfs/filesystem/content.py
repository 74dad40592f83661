"""The bytes of files: extents, their reads, writes and truncation, and the life of blobs.

Extents of a file never overlap, lie within its size, and are at most CHUNK_BYTES_MAX long; what no
extent covers reads as zeros. A write is one transaction with the size and times of its inode, so a
crash leaves a prefix of the writes. Small writes travel in the log; an inline extent that small
appends have grown to INLINE_EXTENT_BYTES_MAX is sealed as a blob, larger writes become blobs at once.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Final

from aspenfs import errors
from aspenfs.filesystem.layout import (
    ALLOCATED,
    BLOB_PREFIX,
    EXTENT_INLINE,
    EXTENT_PREFIX,
    I64,
    MTIME,
    SIZE,
    TIMES2,
    Extent,
    Inode,
    extent_key,
    inode_key,
    number,
    pack_extent,
    part,
    unpack_extent,
    unpack_inode,
)
from aspenfs.filesystem.references import References, count_in
from aspenfs.filesystem.volume import ATTEMPTS, Volume, conflict
from aspenfs.kv.types import (
    EQUAL,
    Operation,
    add,
    compare_field,
    compare_mod_revision,
    cut,
    delete,
    delete_range,
    merge,
    patch,
    prefix_end,
    put,
)
from aspenfs.limits import (
    BLOB_FETCH_AHEAD_BYTES,
    BLOB_FETCH_AHEAD_MAX,
    FILE_BYTES_MAX,
    MIB,
    TXN_OPS_MAX,
)

# What one transaction releases at most; the least of the three ends it.
REFERENCES_A_STEP: Final = 96  # an operation each
EXTENTS_A_STEP: Final = 2_048  # in one range; some ms of the loop
INLINE_BYTES_A_STEP: Final = 2 * MIB  # read to be released
PAGE: Final = 64  # extents fetched at a time
NO_CHUNKS: Final[Mapping[bytes, bytes]] = {}
OPS_ROOM: Final = TXN_OPS_MAX - 8


class Content:
    """Reads and writes of one volume's files. Sizes and offsets in bytes."""

    def __init__(self, volume: Volume) -> None:
        self.volume, self.store, self.blobs = volume, volume.store, volume.blobs

    # --- reading ---

    def read(
        self, node: int, offset: int, size: int, file_size: int, chunks: Mapping[bytes, bytes] = NO_CHUNKS
    ) -> bytes | memoryview:
        """Up to `size` bytes, fewer only at the end of a file of `file_size` bytes. `chunks` are looked at
        for what can not be read here. Corrupt."""
        end = min(offset + size, file_size)
        if offset >= end:
            return b""
        first = self.store.get(EXTENT_PREFIX + number(node) + b"\0\0\0\0\0\0\0\0") if offset == 0 else None
        if first is not None and first.value[0] == EXTENT_INLINE and len(first.value) > end:
            return first.value[1 : end + 1]
        extents = self.overlapping(node, offset, end)
        if len(extents) == 1:
            only = extents[0]
            if only.offset <= offset and only.offset + only.length >= end:
                return self._bytes(only, offset, end, chunks)
        buffer = bytearray(end - offset)
        for extent in extents:
            start, stop = max(offset, extent.offset), min(end, extent.offset + extent.length)
            buffer[start - offset : stop - offset] = self._bytes(extent, start, stop, chunks)
        return memoryview(buffer)

    def _bytes(
        self, extent: Extent, start: int, stop: int, chunks: Mapping[bytes, bytes]
    ) -> bytes | memoryview:
        if extent.data is not None:
            return extent.data[start - extent.offset : stop - extent.offset]
        at, size = extent.start + start - extent.offset, stop - start
        try:
            return self.blobs.get(extent.digest, at, size)
        except (errors.NotFound, errors.Corrupt) as error:
            if extent.digest in chunks:
                return memoryview(chunks[extent.digest])[at : at + size]
            if isinstance(error, errors.Corrupt):
                raise
            advice = "`aspen check` names the files; restore them from a backup"
            raise errors.Corrupt("blobs", 0, f"there is no {error}, which a file names", advice) from error

    async def read_through(
        self, node: int, offset: int, size: int, problem: errors.Corrupt
    ) -> bytes | memoryview:
        """As `read`, which failed with `problem`: what is not here comes from other nodes. Unavailable."""
        if not self.volume.replicas.shared:
            raise problem
        chunks: dict[bytes, bytes] = {}  # kept until the end of this call: the disk may have no room
        for _ in range(ATTEMPTS):
            file_size = self.volume.inode(node).size  # others may change the file while we wait
            try:
                return self.read(node, offset, size, file_size, chunks)
            except errors.Corrupt as error:
                problem = error
            end = min(offset + size, file_size)
            wanted = self._absent(node, offset, end)
            ahead = self._absent(node, end, min(end + BLOB_FETCH_AHEAD_BYTES, file_size))
            for at, digest in enumerate(wanted):
                if not self.blobs.has(digest) and digest not in chunks:  # it may have come meanwhile
                    others = [*wanted[at + 1 :], *ahead]
                    chunks[digest] = await self.volume.replicas.fetch(digest, others)
        raise problem

    def _absent(self, node: int, start: int, end: int) -> list[bytes]:
        """The blobs of [start, end) that can not be read here, in order; the first of very many."""
        if start >= end:
            return []
        extents = self.overlapping(node, start, end, BLOB_FETCH_AHEAD_MAX)
        digests = dict.fromkeys(extent.digest for extent in extents if extent.data is None)
        return [digest for digest in digests if not self.blobs.has(digest)]

    def overlapping(self, node: int, start: int, end: int, limit: int = 0) -> list[Extent]:
        """The extents with a byte in [start, end), in order; with a limit, no more than some that many."""
        found = self.store.range(extent_key(node, 0), extent_key(node, start + 1), limit=1, reverse=True)
        extents = [unpack_extent(key, record.value) for key, record in found]
        if extents and extents[0].offset + extents[0].length <= start:
            extents.clear()
        if end - start > 1:
            extents += [
                unpack_extent(key, record.value)
                for key, record in self.store.range(
                    extent_key(node, start + 1), extent_key(node, end), limit=limit
                )
            ]
        return extents

    # --- truncation ---

    async def truncate(self, node: int, size: int) -> Inode:
        """Sets the size; the inode after. A long tail is cut from its end in several transactions,
        each of which leaves a file of a size between the old and the new one."""
        if size > FILE_BYTES_MAX:
            raise errors.TooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
        key = inode_key(node)
        failures = 0
        while failures < ATTEMPTS:
            record = self.store.get(key)
            if record is None:
                raise errors.Stale(f"inode {node} is gone")
            inode = unpack_inode(record.value)
            references = References()
            operations: list[Operation] = []
            freed, reached = 0, size
            if size < inode.size and inode.allocated:
                operations, freed, reached = self._cut_tail(node, inode.size, size, references)
                operations += references.operations()
            now = self.volume.now()
            operations.append(
                merge(key, patch(SIZE, I64(reached)), add(ALLOCATED, -freed), patch(MTIME, TIMES2(now, now)))
            )
            result = await self.volume.txn(
                (compare_mod_revision(key, EQUAL, record.mod_revision),), operations
            )
            if not result.succeeded:
                failures += 1
                continue
            self.volume.unreference(references.lost())
            if reached == size:
                return inode._replace(size=size, allocated=inode.allocated - freed, mtime=now, ctime=now)
            await self.volume.breathe()
        raise conflict(f"truncate of inode {node}")

    def _cut_tail(
        self, node: int, end: int, size: int, references: References
    ) -> tuple[list[Operation], int, int]:
        """Operations that drop up to a step's worth of extents behind `size` of a file of `end` bytes,
        the bytes freed, and the size that the file then has."""
        freed, reached = self._tail(node, end, size, references)
        operations = [delete_range(extent_key(node, reached), extent_key(node, end))] if freed else []
        if size and reached == size:
            for extent in self.overlapping(node, size - 1, size):
                surplus = extent.offset + extent.length - size
                if surplus > 0:
                    freed += surplus
                    kept = part(extent, extent.offset, size)
                    key = extent_key(node, extent.offset)
                    operations.append(
                        merge(key, cut(1 + kept.length))
                        if kept.data is not None
                        else put(key, pack_extent(kept))
                    )
        return operations, freed, reached

    def _tail(self, node: int, end: int, size: int, references: References) -> tuple[int, int]:
        """Looks from `end`, the size of the file, at up to a step's worth of extents that begin at `size`
        or behind it: the bytes in them, and where the first of them begins; `size` if these are all."""
        # Not from beyond the end: what earlier steps have deleted there costs time until it is applied.
        low, high = extent_key(node, size), extent_key(node, end)
        freed = 0
        while found := self.store.range(low, high, limit=PAGE, reverse=True):
            for key, record in found:
                if (
                    len(references.deltas) == REFERENCES_A_STEP
                    or references.extents == EXTENTS_A_STEP
                    or references.inline_bytes > INLINE_BYTES_A_STEP
                ):
                    return freed, int.from_bytes(high[11:], "big")
                extent = unpack_extent(key, record.value)
                if extent.data is None:
                    references.change(extent.digest, -1)
                else:
                    references.inline_bytes += extent.length
                references.extents += 1
                freed += extent.length
                high = key
            if len(found) < PAGE:
                break
        return freed, size

    def release_operations(self, node: int, size: int) -> tuple[list[Operation], References] | None:
        """Operations that drop all extents of a file of `size` bytes, if one transaction can hold them,
        else None."""
        references = References()
        freed, reached = self._tail(node, size, 0, references)
        if reached:
            return None
        operations = [delete_range(extent_key(node, 0), extent_key(node, size))] if freed else []
        return operations + references.operations(), references

    # --- garbage ---

    def find_garbage(self, start: bytes, limit: int) -> bytes | None:
        """Makes candidates of what an earlier life left without a name: looks at `limit` rows from `start`
        (at first b""). Where to go on, or None at the end."""
        rows = self.store.range(start or BLOB_PREFIX, prefix_end(BLOB_PREFIX), limit=limit)
        self.volume.unreference(key[len(BLOB_PREFIX) :] for key, row in rows if not count_in(row))
        return rows[-1][0] + b"\0" if len(rows) == limit else None

    async def collect(self, most: int = 100) -> int:
        """Deletes blobs that no extent names, of up to `most` candidates; how many it deleted.

        Entries above the store's replay floor may be evaluated again by the next start, which then needs
        the bytes that they name. So a blob goes once its count became 0 at or below the floor. Its row goes
        after it: until then the next life finds it (`find_garbage`). The log syncs deletions of bytes before
        its own entries.
        """
        volume, replicas, unreferenced = self.volume, self.volume.replicas, self.volume.unreferenced
        if not unreferenced or not replicas.may_collect:
            return 0
        # A node without a quorum does not know what is named by now. From here on nothing comes in between
        # until the bytes are gone.
        await self.store.barrier()
        floor = self.store.replay_floor
        doomed: dict[bytes, int] = {}
        rows: list[bytes] = []
        for digest in list(islice(unreferenced, most)):
            noticed = unreferenced.pop(digest)
            if digest in volume.pinned or replicas.is_pinned(digest):
                continue  # losing the pin makes it a candidate again
            row = self.store.get(BLOB_PREFIX + digest)
            if volume.spares(digest) or (noticed if row is None else row.mod_revision) > floor:
                unreferenced[digest] = noticed  # behind the others
            elif not count_in(row):
                doomed[digest] = noticed
                if row is not None and replicas.removes_rows:
                    rows.append(BLOB_PREFIX + digest)
        try:
            self.blobs.delete(list(doomed))
            if rows:
                compares = [compare_field(key, 0, EQUAL, 0) for key in rows]
                if not (await volume.txn(compares, [delete(key) for key in rows])).succeeded:
                    unreferenced.update(doomed)
        except BaseException:
            unreferenced.update(doomed)
            raise
        return len(doomed)
