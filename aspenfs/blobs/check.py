"""Going through every chunk: to compare it with its name, for `aspen check` (repair only when asked), or to
see which there are."""

from collections.abc import Iterator
from typing import NamedTuple

from aspenfs.blobs.files import Segment
from aspenfs.blobs.format import (
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    Table,
    location_of,
    record_size,
)
from aspenfs.blobs.index import BlobIndex
from aspenfs.blobs.segments import SegmentSet
from aspenfs.errors import Corrupt


class Finding(NamedTuple):
    """`digest` is None where not even that could be read."""

    digest: bytes | None
    problem: Corrupt | None


def verify(
    segments: SegmentSet, index: BlobIndex, damaged: set[int], *, quarantine: bool
) -> Iterator[Finding]:
    """One chunk a step. Chunks put, moved or deleted meanwhile may be seen or not."""
    for number in sorted(segments.segments):
        segment = segments.segments.get(number)
        if segment is None:
            continue
        table = segments.table(segment)
        for offset, size in list(table.damaged):
            what = "the segment's header" if offset < SEGMENT_HEADER_BYTES else "a stretch of lost records"
            advice = "its chunks are missing: restore them from a peer or a backup"
            yield Finding(None, Corrupt(segment.path, offset, f"{what}, {size} bytes", advice))
        for prefix, offset, length in table.chunks():
            location = location_of(number, offset)
            if number not in segments.segments or not index.contains(prefix, location):
                continue
            digest: bytes | None = None
            try:
                header = segments.header(location)
                digest = header.digest
                segments.chunk(location, header)
            except Corrupt as problem:
                damaged.add(location)
                if quarantine:
                    _put_aside(segments, segment, offset, RECORD_HEADER_BYTES + length)
                    segments.append_tombstone(digest or bytes(32), location, length)
                    index.remove(prefix, location)
                    damaged.discard(location)
                    segment.live -= record_size(length)
                yield Finding(digest, problem)
            else:
                damaged.discard(location)
                yield Finding(digest, None)
        if quarantine and number in segments.segments:
            _clear(segments, segment, table)


def walk(segments: SegmentSet, index: BlobIndex) -> Iterator[bytes]:
    """The digest of each chunk."""
    for number in sorted(segments.segments):
        segment = segments.segments.get(number)
        if segment is None:
            continue
        for prefix, offset, _ in segments.table(segment).chunks():
            location = location_of(number, offset)
            if number in segments.segments and index.contains(prefix, location):
                try:
                    digest = segments.header(location).digest
                except Corrupt:
                    continue  # who reads it, or `verify`, finds that out
                yield digest


def _clear(segments: SegmentSet, segment: Segment, table: Table) -> None:
    if table.damaged:
        for offset, size in table.damaged:
            _put_aside(segments, segment, offset, size)
        table.damaged = []
        segments.replace_table(segment, table)
    segment.kept = False


def _put_aside(segments: SegmentSet, segment: Segment, offset: int, size: int) -> None:
    try:
        data = segments.raw(segment, offset, size)
    except Corrupt:
        data = b""  # the disk does not give the bytes at all
    segments.save_aside(f"{segment.id:08x}-{offset:08x}", data)
