"""The bytes of segment files and of their tables (docs/design/blobs.md, format 1).

Here belongs how a header, a record and a table look on disk, and nothing that reads or writes files.
Decoders answer None for bytes that are not what was written; what to make of that is up to callers.
All numbers are little-endian.
"""

import struct
import sys
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from blake3 import blake3
from crc32c import crc32c

VERSION: Final = 1
DIGEST_BYTES: Final = 32
SEGMENT_SUFFIX: Final = ".segment"
TABLE_SUFFIX: Final = ".table"

CHUNK: Final = 1
TOMBSTONE: Final = 2

RECORD_MAGIC: Final = 0xB10BC4A5
RECORD_MAGIC_BYTES: Final = RECORD_MAGIC.to_bytes(4, "little")
_SEGMENT_MAGIC: Final = b"ASPNBLOB"
_TABLE_MAGIC: Final = b"ASPNBTAB"

# magic, version, segment id, reserved; then the crc of these
_SEGMENT: Final = struct.Struct("<8sB7xQI")
SEGMENT_HEADER_BYTES: Final = _SEGMENT.size + 4
# kind, length, synced, check, digest; before it magic and the crc of the place and of these
_RECORD_BODY: Final = struct.Struct("<B3xIII32s")
_RECORD: Final = struct.Struct("<IIB3xIII32s")
RECORD_HEADER_BYTES: Final = _RECORD.size
_U32X2: Final = struct.Struct("<II")
_PLACE: Final = struct.Struct("<Q")
# location that is dead, length of the chunk there, reserved
_TOMBSTONE: Final = struct.Struct("<QII")
TOMBSTONE_BYTES: Final = _TOMBSTONE.size
# magic, version, segment id, end, chunks, tombstones, damaged ranges; then the crc of all but itself
_TABLE: Final = struct.Struct("<8sB7xQQIII")

assert (SEGMENT_HEADER_BYTES, RECORD_HEADER_BYTES, TOMBSTONE_BYTES) == (32, 56, 16)
assert (array("I").itemsize, array("Q").itemsize) == (4, 8)


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """The name of a chunk: BLAKE3, 256 bits."""
    return blake3(data).digest()


def prefix_of(digest: bytes) -> int:
    """The first 64 bits: what the index knows of a digest."""
    return int.from_bytes(digest[:8], "big")


def location_of(segment: int, offset: int) -> int:
    return segment << 32 | offset


def record_size(length: int) -> int:
    """Bytes from a record's first byte to where the next one may start (8-byte aligned)."""
    return (RECORD_HEADER_BYTES + length + 7) & ~7


def segment_name(segment: int) -> str:
    return f"{segment:08x}{SEGMENT_SUFFIX}"


def table_name(segment: int) -> str:
    return f"{segment:08x}{TABLE_SUFFIX}"


class SegmentHeader(NamedTuple):
    version: int
    segment: int


def encode_segment_header(segment: int) -> bytes:
    head = _SEGMENT.pack(_SEGMENT_MAGIC, VERSION, segment, 0)
    return head + crc32c(head).to_bytes(4, "little")


def decode_segment_header(data: bytes) -> SegmentHeader | None:
    if len(data) < SEGMENT_HEADER_BYTES:
        return None
    head = data[: _SEGMENT.size]
    magic, version, segment, _ = _SEGMENT.unpack(head)
    if magic != _SEGMENT_MAGIC or int.from_bytes(data[_SEGMENT.size :][:4], "little") != crc32c(head):
        return None
    return SegmentHeader(version, segment)


class RecordHeader(NamedTuple):
    """`synced`: all bytes of the segment before it were durable when this record was written."""

    kind: int
    length: int
    synced: int
    check: int
    digest: bytes


def encode_record_header(
    location: int, kind: int, length: int, synced: int, check: int, digest: bytes
) -> bytes:
    body = _RECORD_BODY.pack(kind, length, synced, check, digest)
    # The place is part of the checksum: a copy of a segment stored as somebody's file is full of
    # records that look right, but none of them is where it says it is.
    return _U32X2.pack(RECORD_MAGIC, crc32c(body, crc32c(_PLACE.pack(location)))) + body


def decode_record_header(data: bytes, location: int) -> RecordHeader | None:
    """`data` holds the header's bytes exactly."""
    if len(data) != RECORD_HEADER_BYTES:
        return None
    magic, crc, kind, length, synced, check, digest = _RECORD.unpack(data)
    if magic != RECORD_MAGIC or crc != crc32c(data[8:], crc32c(_PLACE.pack(location))):
        return None
    if kind not in (CHUNK, TOMBSTONE) or synced > location & 0xFFFFFFFF:
        return None
    return RecordHeader(kind, length, synced, check, digest)


class Tombstone(NamedTuple):
    """The chunk at `target` (a location) is deleted. It kills that copy and no other, ever."""

    offset: int
    target: int
    length: int


def encode_tombstone(target: int, length: int) -> bytes:
    return _TOMBSTONE.pack(target, length, 0)


def decode_tombstone(payload: bytes, offset: int, header: RecordHeader) -> Tombstone | None:
    if len(payload) != TOMBSTONE_BYTES or crc32c(payload) != header.check:
        return None
    target, length, _ = _TOMBSTONE.unpack(payload)
    return Tombstone(offset, target, length)


class Table:
    """What lies where in one segment, in columns: 16 bytes a chunk, 16 a tombstone.

    `end` is where the last whole record ends; `damaged` are ranges (offset, bytes) that were
    synced once and can not be read as records any more.
    """

    __slots__ = ("_dead", "_lengths", "_offsets", "_prefixes", "damaged", "end")

    def __init__(self) -> None:
        self._prefixes = array("Q")
        self._offsets = array("I")
        self._lengths = array("I")
        self._dead: tuple[array[int], array[int], array[int]] = (array("I"), array("Q"), array("I"))
        self.damaged: list[tuple[int, int]] = []
        self.end = SEGMENT_HEADER_BYTES

    def add_chunk(self, prefix: int, offset: int, length: int) -> None:
        self._prefixes.append(prefix)
        self._offsets.append(offset)
        self._lengths.append(length)

    def add_tombstone(self, tombstone: Tombstone) -> None:
        for column, value in zip(self._dead, tombstone, strict=True):
            column.append(value)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(prefix, offset, length) in the order of offsets; sees chunks added meanwhile."""
        return zip(self._prefixes, self._offsets, self._lengths, strict=False)

    def tombstones(self) -> Iterator[Tombstone]:
        return map(Tombstone, *self._dead)

    def counts(self) -> tuple[int, int]:
        """Chunks, tombstones."""
        return len(self._offsets), len(self._dead[0])

    def encode(self, segment: int) -> bytes:
        chunks, tombstones = self.counts()
        ranges = array("I", [number for pair in self.damaged for number in pair])
        head = _TABLE.pack(_TABLE_MAGIC, VERSION, segment, self.end, chunks, tombstones, len(self.damaged))
        columns = (self._prefixes, self._dead[1], self._offsets, self._lengths, self._dead[0], self._dead[2])
        body = b"".join((head, *map(_column_bytes, (*columns, ranges))))
        return body + crc32c(body).to_bytes(4, "little")

    @classmethod
    def decode(cls, data: bytes, segment: int) -> "Table | None":
        """None unless `data` is the whole, undamaged table of that segment in this format."""
        if len(data) < _TABLE.size + 4 or int.from_bytes(data[-4:], "little") != crc32c(data[:-4]):
            return None
        magic, version, owner, end, chunks, tombstones, damaged = _TABLE.unpack_from(data)
        size = _TABLE.size + 16 * (chunks + tombstones) + 8 * damaged + 4
        if (magic, version, owner) != (_TABLE_MAGIC, VERSION, segment) or len(data) != size:
            return None
        table = cls()
        table.end = end
        ranges = array("I")
        at = _TABLE.size
        for column, count in (
            (table._prefixes, chunks),
            (table._dead[1], tombstones),
            (table._offsets, chunks),
            (table._lengths, chunks),
            (table._dead[0], tombstones),
            (table._dead[2], tombstones),
            (ranges, 2 * damaged),
        ):
            stop = at + count * column.itemsize
            column.frombytes(data[at:stop])
            if sys.byteorder == "big":
                column.byteswap()
            at = stop
        table.damaged = list(zip(ranges[::2], ranges[1::2], strict=True))
        return table


def _column_bytes(column: "array[int]") -> bytes:
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()
