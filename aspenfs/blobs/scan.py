"""What a segment holds when nothing but the segment itself can tell: after a crash, or without its table.

Every record carries how far the segment was durable when it was written; the greatest such mark
of a readable record is the *synced position*. Before it, a header that can not be read is damage
of the medium: it is reported and kept, and the search goes on behind it. Behind it, a power
failure may have left any mixture of old and new sectors: there each chunk is read and compared
with its digest, and what does not fit was never promised to anyone and is dropped.
"""

import errno
from collections.abc import Iterator
from typing import Final, NamedTuple

from aspenfs.blobs.format import (
    CHUNK,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC_BYTES,
    SEGMENT_HEADER_BYTES,
    TOMBSTONE_BYTES,
    RecordHeader,
    Table,
    decode_record_header,
    decode_segment_header,
    decode_tombstone,
    digest_of,
    location_of,
    prefix_of,
    record_size,
)
from aspenfs.seams import DiskFile

_WINDOW_BYTES: Final = 8 << 10
_SEARCH_BYTES: Final = 1 << 20


class Scan(NamedTuple):
    table: Table
    synced: int
    dropped_bytes: int  # behind the synced position and not whole


def scan(file: DiskFile, segment: int) -> Scan:
    """Read a segment from its headers, and from its data behind the synced position.

    The part behind the synced position that is whole is written once more with the same bytes:
    if a sync failed before the last process ended, the kernel holds those pages as clean although
    the disk never got them, and only a fresh write makes the next sync mean what it says.
    """
    size = file.size()
    records: list[tuple[int, RecordHeader]] = []
    gaps: list[tuple[int, int]] = []
    window = _Window(file)
    for offset, header, stop in _walk(window, segment, size):
        if header is None:
            gaps.append((offset, stop))
        else:
            records.append((offset, header))
    synced = max((header.synced for _, header in records), default=0)
    table = Table()
    dropped = 0
    if synced and decode_segment_header(window.read(0, SEGMENT_HEADER_BYTES)) is None:
        table.damaged.append((0, SEGMENT_HEADER_BYTES))
    for start, stop in gaps:
        if start < synced:
            table.damaged.append((start, stop - start))
        else:
            dropped += stop - start
    # Behind a gap a tombstone may be a picture of one inside somebody's data; a deleted chunk that
    # comes back does no harm, a live one that goes does.
    trusted = gaps[0][0] if gaps else size
    for offset, header in records:
        stop = offset + RECORD_HEADER_BYTES + header.length
        if header.kind == CHUNK:
            if (stop > synced or offset >= trusted) and not _confirm(file, segment, offset, header):
                dropped += stop - offset
                continue
            table.add_chunk(prefix_of(header.digest), offset, header.length)
        else:
            payload = file.pread(TOMBSTONE_BYTES, offset + RECORD_HEADER_BYTES)
            tombstone = decode_tombstone(payload, offset, header)
            if tombstone is None or offset >= trusted:
                dropped += stop - offset
                continue
            if stop > synced:
                _rewrite(file, payload, offset + RECORD_HEADER_BYTES)
                _rewrite(file, file.pread(RECORD_HEADER_BYTES, offset), offset)
            table.add_tombstone(tombstone)
        table.end = offset + record_size(header.length)
    return Scan(table, synced, dropped)


def _confirm(file: DiskFile, segment: int, offset: int, header: RecordHeader) -> bool:
    chunk = file.pread(header.length, offset + RECORD_HEADER_BYTES)
    if digest_of(chunk) != header.digest:
        return False
    _rewrite(file, chunk, offset + RECORD_HEADER_BYTES)
    _rewrite(file, file.pread(RECORD_HEADER_BYTES, offset), offset)
    return True


def _rewrite(file: DiskFile, data: bytes, offset: int) -> None:
    try:
        file.pwrite(data, offset)
    except OSError as error:
        # A copy-on-write file system needs room for this; a full disk must still open.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


class _Window:
    """Small reads in ascending order, several from one read of the file."""

    __slots__ = ("_data", "_file", "_start")

    def __init__(self, file: DiskFile) -> None:
        self._file, self._data, self._start = file, b"", 0

    def read(self, offset: int, size: int) -> bytes:
        at = offset - self._start
        if at < 0 or at + size > len(self._data):
            self._data, self._start, at = self._file.pread(_WINDOW_BYTES, offset), offset, 0
        return self._data[at : at + size]

    def find(self, magic: bytes, offset: int, size: int) -> int:
        """The first 8-byte aligned place of `magic` at or after `offset`, or -1."""
        while offset < size:
            data = self._file.pread(_SEARCH_BYTES, offset)
            at = data.find(magic)
            while at >= 0:
                if not (offset + at) & 7:
                    return offset + at
                at = data.find(magic, at + 1)
            offset += _SEARCH_BYTES  # aligned places never straddle two reads
        return -1


def _walk(window: _Window, segment: int, size: int) -> Iterator[tuple[int, RecordHeader | None, int]]:
    """(offset, header, end) of each record and, with None, of each stretch that holds none."""
    offset = SEGMENT_HEADER_BYTES
    while offset < size:
        header = _header_at(window, segment, offset, size)
        if header is not None:
            stop = offset + record_size(header.length)
            yield offset, header, stop
            offset = stop
            continue
        start = offset
        offset = (offset + 8) & ~7
        while header is None:
            offset = window.find(RECORD_MAGIC_BYTES, offset, size)
            if offset < 0:
                offset = size
                break
            header = _header_at(window, segment, offset, size)
            if header is None:
                offset += 8
        yield start, None, offset


def _header_at(window: _Window, segment: int, offset: int, size: int) -> RecordHeader | None:
    data = window.read(offset, RECORD_HEADER_BYTES)
    header = decode_record_header(data, location_of(segment, offset))
    if header is None or offset + RECORD_HEADER_BYTES + header.length > size:
        return None
    return header
