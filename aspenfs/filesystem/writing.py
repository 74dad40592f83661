"""How bytes get into files: each piece becomes extents, as many pieces as possible one transaction.

A write is one transaction with the size and times of its inode, so a crash leaves a prefix of the
writes. Small pieces travel in the log; an inline extent that small appends have grown to
INLINE_EXTENT_BYTES_MAX is sealed as a blob, larger pieces become blobs at once. The transaction compares
the revision of the inode, which every change of its bytes moves: what was planned still fits, or the plan is
made anew. So it is decided at apply where an append goes. Not here: when to write (`write_behind.py`).
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from aspenfs import errors
from aspenfs.filesystem.attributes import Change, access_of, edits_of
from aspenfs.filesystem.births import Births
from aspenfs.filesystem.content import EXTENTS_A_STEP, OPS_ROOM, Content
from aspenfs.filesystem.layout import (
    ALLOCATED,
    BLOB_EXTENT,
    EXTENT_BLOB,
    EXTENT_INLINE,
    I64,
    MTIME,
    SIZE,
    TIMES2,
    Extent,
    Inode,
    extent_key,
    inode_key,
    pack_extent,
    part,
    unpack_inode,
)
from aspenfs.filesystem.references import References
from aspenfs.filesystem.volume import ATTEMPTS, Volume, conflict
from aspenfs.kv.types import (
    EQUAL,
    PUT,
    Edit,
    Operation,
    add,
    append,
    compare_mod_revision,
    compare_value,
    delete_range,
    merge,
    patch,
    put,
)
from aspenfs.limits import (
    CHUNK_BYTES_MAX,
    FILE_BYTES_MAX,
    INLINE_EXTENT_BYTES_MAX,
    INLINE_WRITE_BYTES_MAX,
    MIB,
)

INLINE_BYTES_MAX: Final = MIB // 2  # that travel in one transaction, and what the last piece puts back
BLOBS_MAX: Final = 32  # that one transaction names anew: their bytes are sent to others before it


class Piece:
    """Bytes to be written at `offset`, or at the end (None): `data`, or `length` bytes from `start` of a
    blob, which is pinned until the piece is written or given up. `time`, in ns: when that was asked for."""

    __slots__ = ("data", "digest", "length", "offset", "start", "time")

    def __init__(
        self,
        time: int,
        offset: int | None,
        data: bytes,
        digest: bytes = b"",
        start: int = 0,
        length: int = 0,
    ) -> None:
        self.offset, self.data, self.digest, self.start = offset, data, digest, start
        self.length, self.time = length or len(data), time

    def halves(self, offset: int) -> tuple["Piece", "Piece"]:
        """Two pieces in its place, at `offset`."""
        half, time = self.length // 2, self.time
        if self.digest:
            return (
                Piece(time, offset, b"", self.digest, self.start, half),
                Piece(time, offset + half, b"", self.digest, self.start + half, self.length - half),
            )
        return Piece(time, offset, self.data[:half]), Piece(time, offset + half, self.data[half:])


class _Step(NamedTuple):
    """What one piece does: operations on extents, the bytes that it adds, where the extents begin that it
    changes, inline bytes that it puts back beside it, and a blob that was made of an inline extent."""

    operations: list[Operation]
    allocated: int
    changed: set[int]
    put_back: int = 0
    sealed: bytes = b""


# Where the pieces go, operations on extents, references, bytes added, where the last byte ends, blobs sealed.
Planned = tuple[list[int], list[Operation], References, int, int, list[bytes]]


class _Plan:
    """A transaction of some pieces of one file."""

    def __init__(self) -> None:
        self.starts: list[int] = []  # where each goes
        self.spans: list[tuple[int, int]] = []
        self.changed: set[int] = set()
        self.operations: list[Operation] = []
        self.references = References()
        self.allocated = self.size = self.inline_bytes = self.blobs = 0
        self.sealed: list[bytes] = []

    def has_room(self, start: int, piece: Piece) -> bool:
        """Whether it may come along, as far as can be told before it is planned."""
        end = start + piece.length
        return (
            all(end <= low or high <= start for low, high in self.spans)
            and self.blobs < BLOBS_MAX
            and self.inline_bytes + len(piece.data) <= INLINE_BYTES_MAX
        )

    def take(self, start: int, piece: Piece, step: _Step, references: References) -> bool:
        """False if it must wait for the next transaction: it changes what this one has changed already, or
        there is no room."""
        deltas = len(self.references.deltas.keys() | references.deltas.keys())
        if step.changed & self.changed or len(self.operations) + len(step.operations) + deltas > OPS_ROOM:
            return False
        self.starts.append(start)
        self.spans.append((start, start + piece.length))
        self.changed |= step.changed
        self.operations += step.operations
        for digest, delta in references.deltas.items():
            self.references.change(digest, delta)
        self.allocated += step.allocated
        self.size = max(self.size, start + piece.length)
        self.inline_bytes += len(piece.data) + step.put_back
        self.blobs += bool(piece.digest or step.sealed)
        if step.sealed:
            self.sealed.append(step.sealed)
        return True


class Writer:
    """Writes of one volume's files."""

    def __init__(self, volume: Volume, content: Content) -> None:
        self.volume, self.store, self.content, self.blobs = volume, volume.store, content, volume.blobs
        self.births: Births | None = None  # files that may be written to though they are not there yet

    async def write(self, node: int, offset: int | None, data: bytes) -> int:
        """Writes all of `data` at `offset`, or at the end (None: O_APPEND); the offset it went to."""
        written_at = offset
        for at in range(0, len(data), CHUNK_BYTES_MAX):
            chunk = data if len(data) <= CHUNK_BYTES_MAX else data[at : at + CHUNK_BYTES_MAX]
            piece = self.piece(self.volume.now(), None if offset is None else offset + at, chunk)
            try:
                (went,) = await self.write_some(node, (piece,))
            finally:
                self.done_with(piece)
            written_at = went if written_at is None else written_at
        return written_at or 0

    def piece(self, time: int, offset: int | None, data: bytes) -> Piece:
        """A piece of at most CHUNK_BYTES_MAX; a large one is in the chunk store from now on. NoSpace."""
        if len(data) < INLINE_WRITE_BYTES_MAX:
            return Piece(time, offset, data)
        return Piece(time, offset, b"", self._pin(data), 0, len(data))

    def done_with(self, piece: Piece) -> None:
        if piece.digest:
            self._unpin(piece.digest)

    async def write_some(
        self, node: int, pieces: Sequence[Piece], change: Change | None = None
    ) -> list[int]:
        """Writes as many of the pieces, in order, as fit into one transaction, one at least; where they
        went. If that is all of them, attributes are changed too (with a ctime). Stale, TooLarge."""
        key = inode_key(node)
        for _ in range(ATTEMPTS):
            record, birth = self.store.get(key), None
            if record is not None:
                inode = unpack_inode(record.value)
                same = compare_mod_revision(key, EQUAL, record.mod_revision)
            else:
                birth = self.births and self.births.children.get(node)
                if not birth:
                    raise errors.Stale(f"inode {node} is gone")
                inode, same = birth.birth.inode, compare_value(key, EQUAL, birth.birth.row)
            plan = self._planned(node, inode, pieces)
            if plan is None:
                start = await self._write_halves(node, inode, pieces[0])
                if change and len(pieces) == 1:
                    await self.write_some(node, (), change)
                return [start]
            starts, operations, references, allocated, size, sealed = plan
            edits: list[Edit] = []
            if pieces:
                # Not before what was committed since: who looks for what is newer must find it.
                written = max(pieces[len(starts) - 1].time, inode.ctime)
                edits.append(patch(MTIME, TIMES2(written, written)))
            if size > inode.size:
                edits.append(patch(SIZE, I64(size)))
            if allocated:
                edits.append(add(ALLOCATED, allocated))
            if references.deltas:
                operations += references.operations()
            if change and len(starts) == len(pieces):
                edits += edits_of(inode, change)
                operations += access_of(self.store, node, inode, change)
            operations.append(merge(key, *edits))
            try:
                result = await self.volume.txn((same,), operations)
            finally:
                for digest in sealed:
                    self._unpin(digest)
            if result.succeeded:
                if references.deltas:
                    self.volume.unreference(references.lost())
                return starts
            if birth:
                assert self.births is not None  # it is one of them
                await self.births.settled(node)
        raise conflict(f"write to inode {node}")

    async def _write_halves(self, node: int, inode: Inode, piece: Piece) -> int:
        start = inode.size if piece.offset is None else piece.offset
        for half in piece.halves(start):
            await self.write_some(node, (half,))
        return start

    # --- planning ---

    def _planned(self, node: int, inode: Inode, pieces: Sequence[Piece]) -> Planned | None:
        """A transaction of the first of the pieces; None if the very first needs more than one."""
        if not pieces:
            return [], [], References(), 0, 0, []
        return self._plan(node, inode, pieces) if len(pieces) > 1 else self._single(node, inode, pieces[0])

    def _single(self, node: int, inode: Inode, piece: Piece) -> Planned | None:
        """A transaction of one piece; None if it needs more than one."""
        start = inode.size if piece.offset is None else piece.offset
        size = start + piece.length
        if size > FILE_BYTES_MAX:
            raise errors.TooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
        references = References()
        step = self._step(node, inode, start, piece, references)
        if step is None or len(step.operations) + len(references.deltas) > OPS_ROOM:
            self._drop(step)
            return None
        sealed = [step.sealed] if step.sealed else []
        return [start], step.operations, references, step.allocated, size, sealed

    def _plan(self, node: int, inode: Inode, pieces: Sequence[Piece]) -> Planned | None:
        """A transaction of the first of several pieces; None if the very first needs more than one."""
        plan = _Plan()
        end = inode.size
        for piece in pieces:
            start = end if piece.offset is None else piece.offset
            if start + piece.length > FILE_BYTES_MAX or (plan.starts and not plan.has_room(start, piece)):
                break
            references = References()
            step = self._step(node, inode, start, piece, references)
            if step is None or not plan.take(start, piece, step, references):
                self._drop(step)
                break
            end = max(end, plan.size)
        if not plan.starts:
            return self._single(node, inode, pieces[0])
        return plan.starts, plan.operations, plan.references, plan.allocated, plan.size, plan.sealed

    def _drop(self, step: _Step | None) -> None:
        if step is not None and step.sealed:
            self._unpin(step.sealed)

    def _step(
        self, node: int, inode: Inode, start: int, piece: Piece, references: References
    ) -> _Step | None:
        """What a piece does to the extents as they are stored; None if more lie under it than one
        transaction may take away."""
        end, data = start + piece.length, piece.data
        operations: list[Operation] = []
        allocated, changed = 0, {start}
        if start < inode.size and inode.allocated:
            overlaps = self.content.overlapping(node, start, end, EXTENTS_A_STEP)
            if len(overlaps) >= EXTENTS_A_STEP:
                return None
            if len(overlaps) == 1 and data:
                only = overlaps[0]
                if only.data is not None and only.offset <= start and end <= only.offset + only.length:
                    at = 1 + start - only.offset
                    return _Step([merge(extent_key(node, only.offset), patch(at, data))], 0, {only.offset})
            operations, allocated = self._carve(node, overlaps, start, end, references)
            changed.update(extent.offset for extent in overlaps)
        elif data and start and inode.allocated:
            grown = self._grow(node, start, data, references)
            if grown is not None:
                return grown
        if data:
            operations.append(put(extent_key(node, start), b"\0" + data))
        else:
            references.change(piece.digest, 1)
            value = BLOB_EXTENT.pack(EXTENT_BLOB, piece.length, piece.start, piece.digest)
            operations.append(put(extent_key(node, start), value))
        put_back = sum(len(operation[2]) for operation in operations[:-1] if operation[0] == PUT)
        return _Step(operations, allocated + piece.length, changed, put_back)

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

    def _grow(self, node: int, start: int, data: bytes, references: References) -> _Step | None:
        """A small piece right behind an inline extent joins it; None if there is none."""
        found = self.store.range(extent_key(node, 0), extent_key(node, start), limit=1, reverse=True)
        if not found:
            return None
        key, record = found[0]
        offset = int.from_bytes(key[11:19], "big")
        if record.value[0] != EXTENT_INLINE or offset + len(record.value) - 1 != start:
            return None
        if len(record.value) - 1 + len(data) <= INLINE_EXTENT_BYTES_MAX:
            return _Step([merge(key, append(data))], len(data), {offset})
        joined = record.value[1:] + data
        digest = self._pin(joined)
        references.change(digest, 1)
        value = BLOB_EXTENT.pack(EXTENT_BLOB, len(joined), 0, digest)
        return _Step([put(key, value)], len(data), {offset}, sealed=digest)

    # --- chunks that nothing names yet ---

    def _pin(self, data: bytes) -> bytes:
        digest = self.blobs.put(data)
        self.volume.pinned[digest] = self.volume.pinned.get(digest, 0) + 1
        return digest

    def _unpin(self, digest: bytes) -> None:
        pins = self.volume.pinned[digest] - 1
        if pins:
            self.volume.pinned[digest] = pins
        else:
            del self.volume.pinned[digest]
            self.volume.unreference((digest,))  # cheap to look at again, costly to forget
