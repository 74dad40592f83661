"""Giving the space of deleted chunks back: live chunks move on, then their segment goes.

For each segment: (1) its live chunks are read, verified and appended to the current segment; the
old place stays in the index beside the new one, so that a deletion meanwhile kills both copies;
(2) tombstones of it that are still needed are appended too; (3) sync; (4) it is unlinked; (5) its
places leave the index. A crash before (4) leaves two copies of some chunks, which does no harm and
ends with the next collection. A chunk that can not be read keeps its segment where it is.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from aspenfs.blobs.files import Segment
from aspenfs.blobs.format import TOMBSTONE_BYTES, Tombstone, location_of, record_size
from aspenfs.blobs.index import BlobIndex
from aspenfs.blobs.segments import SegmentSet
from aspenfs.errors import Corrupt

_ENTRY_COST: Final = 1024  # looking at one entry takes about as long as copying so many bytes
_RECORD_COST: Final = 16 << 10  # and reading and writing one, over its bytes
_SMALL_SEGMENTS: Final = 8  # so many small ones (one for each start of the daemon) become one
_SMALL_SHARE: Final = 4  # small: under a quarter of a full one


class CollectStep(NamedTuple):
    """What one step did; `segment` is 0 for the last one."""

    segment: int
    copied_bytes: int
    freed_bytes: int  # free once a sync has followed
    needs_sync: bool


def collect(
    segments: SegmentSet, index: BlobIndex, damaged: set[int], step_bytes: int, live_share_max: float
) -> Iterator[CollectStep]:
    """Segments whose live share is at most `live_share_max`, emptiest first; then crowds of small ones.

    Emptiest first, because a segment without live chunks needs no room to be given back: a full
    disk gets its first bytes from those.
    """
    for segment in _candidates(segments, live_share_max):
        move = _Move(segments, index, damaged, segment, step_bytes)
        yield from move.count_tombstones()
        live = segment.live + move.tombstones * record_size(TOMBSTONE_BYTES)
        if live <= live_share_max * segment.end or _is_small(segments, segment):
            yield from move.steps()
            if segments.wants_sync():
                yield from _give_back(segments, segment.id)
    if segments.removed:
        yield from _give_back(segments, 0)


def _give_back(segments: SegmentSet, number: int) -> Iterator[CollectStep]:
    """A sync frees the blocks of what was removed: the caller's, or else one of our own."""
    yield CollectStep(number, 0, 0, True)
    if segments.removed:
        segments.sync()


def _candidates(segments: SegmentSet, live_share_max: float) -> list[Segment]:
    sealed = [s for s in segments.segments.values() if s.sealed and not s.kept]
    small = [s for s in sealed if _is_small(segments, s)]
    if len(small) < _SMALL_SEGMENTS:
        small = []
    sparse = [s for s in sealed if s.live <= live_share_max * s.end]
    return sorted({*sparse, *small}, key=lambda s: (s.live / s.end, s.id))


def _is_small(segments: SegmentSet, segment: Segment) -> bool:
    return segment.end < segments.segment_bytes // _SMALL_SHARE


class _Move:
    """One segment on its way out."""

    def __init__(
        self, segments: SegmentSet, index: BlobIndex, damaged: set[int], segment: Segment, step_bytes: int
    ) -> None:
        self.tombstones = 0  # still needed: their chunk lies in a segment that is still there
        self._segments, self._index, self._damaged = segments, index, damaged
        self._segment, self._table = segment, segments.table(segment)
        self._step_bytes = step_bytes
        self._base = location_of(segment.id, 0)

    def count_tombstones(self) -> Iterator[CollectStep]:
        cost = 0
        for tombstone in self._table.tombstones():
            self.tombstones += self._is_needed(tombstone)
            cost += _ENTRY_COST
            if cost >= self._step_bytes:
                yield CollectStep(self._segment.id, 0, 0, False)
                cost = 0

    def _is_needed(self, tombstone: Tombstone) -> bool:
        target = tombstone.target >> 32
        return target != self._segment.id and self._segments.exists(target)

    def steps(self) -> Iterator[CollectStep]:
        segment = self._segment
        if self._table.damaged:
            segment.kept = True
            return
        cost = copied = 0
        for prefix, offset, _ in self._table.chunks():
            cost += _ENTRY_COST
            if self._index.contains(prefix, self._base | offset):
                try:
                    size = self._move_chunk(prefix, self._base | offset)
                except Corrupt:
                    self._damaged.add(self._base | offset)
                    segment.kept = True
                    continue  # the others are safe in two places; this one stays for `verify`
                copied += size
                cost += size + _RECORD_COST
            if cost >= self._step_bytes:
                yield CollectStep(segment.id, copied, 0, False)
                cost = copied = 0
        if segment.kept:
            return
        for step in self._move_tombstones(copied, cost):
            yield step
            copied = 0
        yield from self._leave(copied)

    def _move_chunk(self, prefix: int, location: int) -> int:
        """Bytes copied: 0 if another good copy is there (an earlier collection was interrupted)."""
        segments = self._segments
        header = segments.header(location)
        chunk = segments.chunk(location, header)
        for other in self._index.find(prefix):
            if other >> 32 != location >> 32 and other >> 32 in segments.segments:
                try:
                    there = segments.header(other)
                    if there.digest == header.digest:
                        segments.chunk(other, there)
                        return 0
                except Corrupt:
                    self._damaged.add(other)
        self._index.add(prefix, segments.append_chunk(header.digest, chunk))
        return header.length

    def _move_tombstones(self, copied: int, cost: int) -> Iterator[CollectStep]:
        segments = self._segments
        for tombstone in self._table.tombstones():
            cost += _ENTRY_COST
            if self._is_needed(tombstone):
                cost += _RECORD_COST
                try:
                    digest = segments.header(self._base | tombstone.offset).digest
                except Corrupt:
                    digest = bytes(32)  # for readers of the file only; the location is what counts
                segments.append_tombstone(digest, tombstone.target, tombstone.length)
            if cost >= self._step_bytes:
                yield CollectStep(self._segment.id, copied, 0, False)
                cost = copied = 0

    def _leave(self, copied: int) -> Iterator[CollectStep]:
        segment, segments = self._segment, self._segments
        position = segments.position()
        if not segments.is_durable(position):
            yield CollectStep(segment.id, copied, 0, True)
            copied = 0
            if not segments.is_durable(position):
                segments.sync()
        # The file first: a place that left the index earlier would escape a deletion that comes
        # between two steps, and be found alive again if the process ended before the unlink.
        segments.remove(segment)
        entries = self._table.chunks()
        try:
            yield CollectStep(segment.id, copied, segment.end, False)
            cost = 0
            for prefix, offset, _ in entries:
                self._forget(prefix, offset)
                cost += _ENTRY_COST
                if cost >= self._step_bytes:
                    yield CollectStep(segment.id, 0, 0, False)
                    cost = 0
        finally:
            for prefix, offset, _ in entries:  # none are left, unless the collection was dropped
                self._forget(prefix, offset)

    def _forget(self, prefix: int, offset: int) -> None:
        self._index.remove(prefix, self._base | offset)
        self._damaged.discard(self._base | offset)
