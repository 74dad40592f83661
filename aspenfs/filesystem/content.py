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
    BLOB_EXTENT,
    BLOB_PREFIX,
    EXTENT_BLOB,
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
    unpack_extent,
    unpack_inode,
)
from aspenfs.filesystem.references import count_in
from aspenfs.filesystem.volume import ATTEMPTS, Volume, conflict
from aspenfs.kv.types import (
    EQUAL,
    Operation,
    add,
    append,
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
    CHUNK_BYTES_MAX,
    FILE_BYTES_MAX,
    INLINE_EXTENT_BYTES_MAX,
    INLINE_WRITE_BYTES_MAX,
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


class References:
    """Changes of blob reference counts that a transaction makes."""

    def __init__(self) -> None:
        self.deltas: dict[bytes, int] = {}

    def change(self, digest: bytes, delta: int) -> None:
        self.deltas[digest] = self.deltas.get(digest, 0) + delta

    def operations(self) -> list[Operation]:
        return [merge(BLOB_PREFIX + digest, add(0, delta)) for digest, delta in self.deltas.items() if delta]

    def lost(self) -> list[bytes]:
        return [digest for digest, delta in self.deltas.items() if delta < 0]


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
                if digest not in chunks:
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

    # --- writing ---

    async def write(self, node: int, offset: int | None, data: bytes) -> int:
        """Writes all of `data` at `offset`, or at the end (None: O_APPEND); the offset it went to."""
        written_at = offset
        for at in range(0, len(data), CHUNK_BYTES_MAX):
            piece = data if len(data) <= CHUNK_BYTES_MAX else data[at : at + CHUNK_BYTES_MAX]
            went = await self._write_piece(node, None if offset is None else offset + at, piece)
            written_at = went if written_at is None else written_at
        return written_at or 0

    async def _write_piece(self, node: int, offset: int | None, data: bytes) -> int:
        key = inode_key(node)
        for _ in range(ATTEMPTS):
            record = self.store.get(key)
            if record is None:
                raise errors.Stale(f"inode {node} is gone")
            inode = unpack_inode(record.value)
            start = inode.size if offset is None else offset
            if start + len(data) > FILE_BYTES_MAX:
                raise errors.TooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
            references = References()
            plan = self._plan(node, inode, start, data, references)
            operations, allocated, digest = plan or ([], 0, None)
            operations += references.operations()
            if plan is None or len(operations) > OPS_ROOM:
                self._unpin(digest)
                half = len(data) // 2
                await self._write_piece(node, start, data[:half])
                await self._write_piece(node, start + half, data[half:])
                return start
            now = self.volume.now()
            edits = [patch(MTIME, TIMES2(now, now))]
            if start + len(data) > inode.size:
                edits.append(patch(SIZE, I64(start + len(data))))
            if allocated:
                edits.append(add(ALLOCATED, allocated))
            operations.append(merge(key, *edits))
            try:
                result = await self.volume.txn(
                    (compare_mod_revision(key, EQUAL, record.mod_revision),), operations
                )
            finally:
                self._unpin(digest)
            if result.succeeded:
                self.volume.unreference(references.lost())
                return start
        raise conflict(f"write to inode {node}")

    def _plan(
        self, node: int, inode: Inode, start: int, data: bytes, references: References
    ) -> tuple[list[Operation], int, bytes | None] | None:
        """Operations on extents, bytes newly allocated, and the digest that was pinned; None if more
        extents lie under the data than one transaction may take away."""
        end = start + len(data)
        small = len(data) < INLINE_WRITE_BYTES_MAX
        operations: list[Operation] = []
        allocated = 0
        if start < inode.size and inode.allocated:
            overlaps = self.overlapping(node, start, end, EXTENTS_A_STEP)
            if len(overlaps) >= EXTENTS_A_STEP:
                return None
            if len(overlaps) == 1 and small:
                only = overlaps[0]
                if only.data is not None and only.offset <= start and end <= only.offset + only.length:
                    at = 1 + start - only.offset
                    return [merge(extent_key(node, only.offset), patch(at, data))], 0, None
            operations, allocated = self._carve(node, overlaps, start, end, references)
        elif small and start and inode.allocated:
            grown = self._grow(node, start, data, references)
            if grown is not None:
                return grown
        if small:
            operations.append(put(extent_key(node, start), b"\0" + data))
            return operations, allocated + len(data), None
        digest = self._pin(data)
        references.change(digest, 1)
        value = BLOB_EXTENT.pack(EXTENT_BLOB, len(data), 0, digest)
        operations.append(put(extent_key(node, start), value))
        return operations, allocated + len(data), digest

    def _carve(
        self, node: int, overlaps: list[Extent], start: int, end: int, references: References
    ) -> tuple[list[Operation], int]:
        """Takes [start, end) out of the extents there; the operations and the (negative) bytes freed."""
        operations: list[Operation] = [delete_range(extent_key(node, start), extent_key(node, end))]
        freed = 0
        for extent in overlaps:
            stop = extent.offset + extent.length
            freed += min(stop, end) - max(extent.offset, start)
            pieces = 0
            if extent.offset < start:
                operations.append(
                    put(extent_key(node, extent.offset), pack_extent(part(extent, extent.offset, start)))
                )
                pieces += 1
            if stop > end:
                operations.append(put(extent_key(node, end), pack_extent(part(extent, end, stop))))
                pieces += 1
            if extent.data is None:
                references.change(extent.digest, pieces - 1)
        return operations, -freed

    def _grow(
        self, node: int, start: int, data: bytes, references: References
    ) -> tuple[list[Operation], int, bytes | None] | None:
        """A small write right behind an inline extent joins it; None if there is none."""
        found = self.store.range(extent_key(node, 0), extent_key(node, start), limit=1, reverse=True)
        if not found:
            return None
        key, record = found[0]
        offset = int.from_bytes(key[11:19], "big")
        if record.value[0] != EXTENT_INLINE or offset + len(record.value) - 1 != start:
            return None
        if len(record.value) - 1 + len(data) <= INLINE_EXTENT_BYTES_MAX:
            return [merge(key, append(data))], len(data), None
        joined = record.value[1:] + data
        digest = self._pin(joined)
        references.change(digest, 1)
        return [put(key, BLOB_EXTENT.pack(EXTENT_BLOB, len(joined), 0, digest))], len(data), digest

    def _pin(self, data: bytes) -> bytes:
        digest = self.blobs.put(data)
        self.volume.pinned[digest] = self.volume.pinned.get(digest, 0) + 1
        return digest

    def _unpin(self, digest: bytes | None) -> None:
        if digest is None:
            return
        pins = self.volume.pinned[digest] - 1
        if pins:
            self.volume.pinned[digest] = pins
        else:
            del self.volume.pinned[digest]
            self.volume.unreference((digest,))  # cheap to look at again, costly to forget

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
        freed = count = inline_bytes = 0
        while found := self.store.range(low, high, limit=PAGE, reverse=True):
            for key, record in found:
                if (
                    len(references.deltas) == REFERENCES_A_STEP
                    or count == EXTENTS_A_STEP
                    or inline_bytes > INLINE_BYTES_A_STEP
                ):
                    return freed, int.from_bytes(high[11:], "big")
                extent = unpack_extent(key, record.value)
                if extent.data is None:
                    references.change(extent.digest, -1)
                else:
                    inline_bytes += extent.length
                freed += extent.length
                count += 1
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


def part(extent: Extent, start: int, stop: int) -> Extent:
    """The piece [start, stop) (file offsets) of an extent."""
    skip = start - extent.offset
    if extent.data is not None:
        data = extent.data[skip : skip + stop - start]
        return Extent(start, len(data), data, 0, b"")
    return Extent(start, stop - start, None, extent.start + skip, extent.digest)
