"""The chunk store: bytes in, digest out; and back, verified.

Chunks are named by their BLAKE3 digest and stored once, whoever puts them. What keeps a chunk alive
is decided above: this store forgets exactly what `delete` names. All methods belong to the event
loop's thread and do not wait for the disk's medium, but `sync`, which blocks and may run in any.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aspenfs import limits
from aspenfs.blobs.cache import ChunkCache
from aspenfs.blobs.check import Finding, verify, walk
from aspenfs.blobs.collect import CollectStep, collect
from aspenfs.blobs.format import RecordHeader, digest_of, location_of, prefix_of, record_size
from aspenfs.blobs.index import BlobIndex, PrefixIndex
from aspenfs.blobs.segments import SegmentSet
from aspenfs.errors import Busy, Corrupt, InvalidArgument, NoSpace, NotFound, TooLarge
from aspenfs.seams import Disk


class BlobStats(NamedTuple):
    """`live_bytes` counts records, headers included; a chunk on its way to another segment twice."""

    chunks: int
    live_bytes: int
    total_bytes: int
    segments: int
    damaged: int  # copies known to be unreadable
    dropped_bytes: int  # found torn at open: put, never synced, lost


class BlobStore:
    """See the head of this file; `open` makes one. One store a directory at a time."""

    def __init__(self, segments: SegmentSet, index: BlobIndex, cache: ChunkCache) -> None:
        self._segments, self._index, self._cache = segments, index, cache
        self._damaged: set[int] = set()  # locations that were read and found bad
        self._owed: deque[tuple[bytes, int, int]] = deque()  # tombstones that found no room
        self._collecting = False

    @classmethod
    def open(
        cls, disk: Disk, directory: str = "blobs", *, segment_bytes: int = limits.BLOB_SEGMENT_BYTES,
        index: BlobIndex | None = None, cache_bytes: int = limits.BLOB_CACHE_BYTES,
    ) -> "BlobStore":  # fmt: skip
        """Blocking. What is found is durable when it returns. An `index` must be empty.

        Reads the tables of sealed segments; only what the last life had not sealed is scanned.
        StorageError or SyncFailed: the disk fails; NotSupported: a newer format.
        """
        index = PrefixIndex() if index is None else index
        segments = SegmentSet(disk, directory, segment_bytes)
        dead: set[int] = set()
        for segment, table in segments.load():
            dead.update([tombstone.target for tombstone in table.tombstones()])
            base, live, add = location_of(segment.id, 0), 0, index.add
            for prefix, offset, length in table.chunks():
                if not dead or base | offset not in dead:
                    add(prefix, base | offset)
                    live += record_size(length)
            segment.live = live
        return cls(segments, index, ChunkCache(cache_bytes))

    # --- chunks ---

    def put(self, data: bytes | bytearray | memoryview) -> bytes:
        """The digest of a chunk of 1 to CHUNK_BYTES_MAX bytes, stored unless it was already.

        It survives the end of this process at once, and a power failure after the next `sync`.
        NoSpace changes nothing, and a later put may succeed. A chunk whose only copy is known to
        be damaged is stored anew.
        """
        digest = digest_of(data)
        self.add(digest, data)
        return digest

    def add(self, digest: bytes, data: bytes | bytearray | memoryview) -> bool:
        """`put` for who has the chunk's digest already, and answers for it; whether it was stored anew."""
        size = len(data)
        if not size:
            raise InvalidArgument("a chunk has at least one byte")
        if size > limits.CHUNK_BYTES_MAX:
            raise TooLarge(f"a chunk has at most {limits.CHUNK_BYTES_MAX} bytes, not {size}")
        if self._locate(digest) is not None:
            return False
        if self._owed:
            self._pay()
        self._index.add(prefix_of(digest), self._segments.append_chunk(digest, data))
        return True

    def get(self, digest: bytes, offset: int = 0, size: int | None = None) -> bytes | memoryview:
        """`size` bytes (default: the rest) from `offset`; fewer at the chunk's end.

        The whole chunk is verified when it comes from the disk. A part is a view of the cached
        chunk: it keeps the whole in memory as long as it is held. NotFound; Corrupt if no copy
        can be read.
        """
        chunk = self._cache.get(digest)
        if chunk is None:
            chunk = self._read(digest)
            self._cache.add(digest, chunk)
        if offset == 0 and (size is None or size >= len(chunk)):
            return chunk
        if offset < 0 or (size is not None and size < 0):
            raise InvalidArgument(f"offset {offset}, size {size}")
        return memoryview(chunk)[offset : None if size is None else offset + size]

    def read(self, digest: bytes) -> bytes:
        """As `get`, whole, for who reads many chunks once: those that readers come back to stay cached."""
        return self._cache.get(digest) or self._read(digest)

    def has(self, digest: bytes) -> bool:
        """Stored, and not known to be damaged."""
        return self._locate(digest) is not None

    def length(self, digest: bytes) -> int:
        found = self._locate(digest)
        if found is None:
            raise NotFound(f"chunk {digest.hex()}")
        return found.length

    def delete(self, digests: Sequence[bytes]) -> None:
        """Forget these chunks; absent ones are no error. `collect` gives the space back.

        A deletion that a power failure loses brings the chunk back, nothing worse. On a full disk
        the chunks are forgotten all the same, and that is written down when there is room.
        """
        if self._owed:
            self._pay()
        for digest in digests:
            prefix = prefix_of(digest)
            for location in self._places(prefix):
                try:
                    header = self._segments.header(location)
                    if header.digest != digest:
                        continue
                    length = header.length
                except Corrupt:
                    length = 0  # nothing but its prefix is left of this copy
                try:
                    self._segments.append_tombstone(digest, location, length)
                except NoSpace:
                    self._owed.append((digest, location, length))
                self._index.remove(prefix, location)
                self._damaged.discard(location)
                if length:
                    self._segments.segments[location >> 32].live -= record_size(length)
            self._cache.drop(digest)

    def _pay(self) -> None:
        """Write the tombstones owed, as far as there is room."""
        try:
            while self._owed:
                digest, location, length = self._owed[0]
                if self._segments.exists(location >> 32):
                    self._segments.append_tombstone(digest, location, length)
                self._owed.popleft()
        except NoSpace:
            pass

    def _places(self, prefix: int) -> Sequence[int]:
        """Where chunks with that prefix lie; places whose segment was just collected left out."""
        found = self._index.find(prefix)
        if not found:
            return found
        segments = self._segments.segments
        return [location for location in found if location >> 32 in segments]

    def _locate(self, digest: bytes) -> RecordHeader | None:
        """The header of a copy not known to be damaged."""
        for location in self._places(prefix_of(digest)):
            if location not in self._damaged:
                try:
                    header = self._segments.header(location)
                except Corrupt:
                    self._damaged.add(location)
                    continue
                if header.digest == digest:
                    return header
        return None

    def _read(self, digest: bytes) -> bytes:
        problem: Corrupt | None = None
        for location in self._places(prefix_of(digest)):
            try:
                header = self._segments.header(location)
                if header.digest != digest:
                    continue
                chunk = self._segments.chunk(location, header)
            except Corrupt as error:
                self._damaged.add(location)
                problem = problem or error
                continue
            self._damaged.discard(location)
            return chunk
        raise problem or NotFound(f"chunk {digest.hex()}")

    # --- durability ---

    @property
    def dirty(self) -> bool:
        """Is there anything that `sync` would make durable?"""
        return self._segments.dirty

    def sync(self) -> None:
        """Blocking, from any thread: all that was put before the call is durable when it returns.

        SyncFailed: the process must end; every later put, delete and sync fails likewise.
        """
        self._segments.sync()

    def close(self) -> None:
        """Sync and seal, so that the next open scans nothing."""
        self._segments.close()

    # --- upkeep ---

    def collect(self, step_bytes: int = limits.MIB, *, live_share_max: float = 0.5) -> Iterator[CollectStep]:
        """Give back the space of deleted chunks, a bounded step each time it is asked for the next.

        See `collect.py` for what is collected. Where a step says `needs_sync`, call `sync` in a
        thread before going on; otherwise the next step blocks in it. It may be dropped at any
        point. NoSpace: the disk is too full to copy. Busy: another one is under way.
        """
        if self._collecting:
            raise Busy("a collection is under way")
        self._collecting = True
        try:
            if self._owed:
                self._pay()
            yield from collect(self._segments, self._index, self._damaged, step_bytes, live_share_max)
        finally:
            self._collecting = False

    def verify(self, *, quarantine: bool = False) -> Iterator[Finding]:
        """Read every chunk; (digest, None) or (digest if known, the problem) for each.

        With `quarantine` damaged records are copied to `quarantine/` beside the segments and
        forgotten, so that `has` denies them and their segments can be collected.
        """
        return verify(self._segments, self._index, self._damaged, quarantine=quarantine)

    def digests(self) -> Iterator[bytes]:
        """The chunks that are here, one a step, read from their headers; some 3 µs each. Those put,
        moved or deleted meanwhile may be given or not, or twice; what has no readable header is left out."""
        return walk(self._segments, self._index)

    def stats(self) -> BlobStats:
        segments = self._segments.segments.values()
        return BlobStats(
            chunks=len(self._index),
            live_bytes=sum(segment.live for segment in segments),
            total_bytes=sum(segment.end for segment in segments),
            segments=len(segments),
            damaged=len(self._damaged),
            dropped_bytes=self._segments.dropped_bytes,
        )
