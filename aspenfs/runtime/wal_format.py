"""The bytes of the write-ahead log: segment header, frames, and how frames are read back.

Here belongs what `docs/design/wal.md` describes byte by byte, as functions over bytes and one
open file. Which frames of which file count, and what to do about damage, is `wal_recovery.py`.

A segment is a 512-byte header sector and then frames, each 8-byte aligned:

     0  crc       u32  crc32c of bytes 4..end of the padded frame, started with the frame's offset
     4  tag       u32  the segment's life: equal in all frames written to it as this segment
     8  length    u32  payload bytes
    12  previous  u32  crc of the frame before (chains the frames)
    16  synced    u32  this segment is durable below that offset, and all earlier ones are; 0: no claim
    20  kind      u8
    21  zero      u8
    22  run       u16  differs after every opening and every failed append
    24  term      u64
    32  index     u64
    40  payload, zero-padded to a multiple of 8
"""

from collections.abc import Iterator
from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

from crc32c import crc32c

from aspenfs.errors import Corrupt, StorageError
from aspenfs.limits import MIB, WAL_FRAME_BYTES_MAX
from aspenfs.seams import DiskFile

FORMAT_VERSION: Final = 1
MAGIC: Final = b"ASPENWAL"
CLUSTER_ID_BYTES: Final = 16
FIRST_FRAME: Final = 512  # frames start in a sector of their own, so the header is never rewritten
FRAME_HEADER_BYTES: Final = 40
ADVICE: Final = "restore this file from a backup or rejoin this node to its cluster; `aspen check` tells more"

_HEADER: Final = Struct("<8sII16sQQI")  # magic, version, first frame, cluster id, number, size, tag
_CRC: Final = Struct("<I")
_BODY: Final = Struct("<IIIIBBHQQ")  # a frame header without its crc
_FRAME: Final = Struct("<IIIIIBBHQQ")
_BEGIN: Final = Struct("<QIIIIQ")  # previous segment, its end, its synced offset, flags, vote length, term
VOTE_BYTES_MAX: Final = 256
BEGIN_BYTES_MAX: Final = FRAME_HEADER_BYTES + _BEGIN.size + VOTE_BYTES_MAX + 8
_PADDING: Final = tuple(bytes(-size & 7) for size in range(8))
_READ_BYTES: Final = 1 * MIB


class Kind(IntEnum):
    """Frame types. Those below HARD_STATE are log entries: their indices are contiguous."""

    ENTRY = 1
    CONFIGURATION = 2
    HARD_STATE = 16  # term and vote (payload)
    BEGIN = 32  # first frame of a segment: where the one before ended, and what must outlive it
    TRUNCATE = 33  # entries above `index` are void
    RESET = 34  # all entries are void; the log goes on after `index`
    MARK = 35  # only carries `synced`


ENTRY_KIND_MAX: Final = 15


class Header(NamedTuple):
    cluster_id: bytes
    number: int
    size: int
    tag: int


class Begin(NamedTuple):
    """What the BEGIN frame of a segment says; `index` is that of the last entry before it."""

    previous_segment: int  # 0: the first one of this log
    previous_end: int
    previous_synced: int
    previous_crc: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    hard_state: tuple[int, bytes] | None


class RawFrame(NamedTuple):
    """A frame whose crc, tag and offset agree; `end` is the offset after its padding."""

    offset: int
    end: int
    crc: int
    previous: int
    synced: int
    kind: int
    run: int
    term: int
    index: int  # type: ignore[assignment]
    payload: memoryview


def segment_name(number: int) -> str:
    return f"{number:016x}.wal"


def segment_number(name: str) -> int | None:
    """The number in a segment's file name, None for any other file."""
    if len(name) != 20 or not name.endswith(".wal"):
        return None
    try:
        return int(name[:16], 16)
    except ValueError:
        return None


# --- header ---


def segment_tag(cluster_id: bytes, number: int) -> int:
    """Differs between any two lives of a file: numbers are never used twice. Not 0, as blank space is."""
    return crc32c(cluster_id + number.to_bytes(8, "little")) or 1


def encode_header(cluster_id: bytes, number: int, size: int) -> bytes:
    assert len(cluster_id) == CLUSTER_ID_BYTES
    assert FIRST_FRAME < size < 1 << 32
    tag = segment_tag(cluster_id, number)
    fields = _HEADER.pack(MAGIC, FORMAT_VERSION, FIRST_FRAME, cluster_id, number, size, tag)
    return fields + _CRC.pack(crc32c(fields))


def decode_header(file: DiskFile, name: str) -> Header:
    """Raises Corrupt, or StorageError for a version that this program does not know."""
    data = file.pread(_HEADER.size + _CRC.size, 0)
    fields = data[: _HEADER.size]
    if len(data) < _HEADER.size + _CRC.size:
        raise Corrupt(name, len(data), "the segment header is cut off", ADVICE)
    if _CRC.unpack(data[_HEADER.size :])[0] != crc32c(fields):
        raise Corrupt(name, 0, "the segment header does not match its checksum", ADVICE)
    magic, version, first_frame, cluster_id, number, size, tag = _HEADER.unpack(fields)
    if magic != MAGIC:
        raise Corrupt(name, 0, "this is not a log segment", ADVICE)
    if version != FORMAT_VERSION or first_frame != FIRST_FRAME:
        raise StorageError(
            f"{name}: log format version {version} is not known to this program (it knows {FORMAT_VERSION}); "
            "run the aspenfs release that wrote it, or a newer one"
        )
    return Header(cluster_id, number, size, tag)


# --- frames ---


def encode_frame(
    offset: int,
    tag: int,
    previous: int,
    synced: int,
    run: int,
    kind: int,
    term: int,
    index: int,
    payload: bytes,
) -> tuple[bytes, int]:
    """The padded frame for this offset, and its crc (the next frame's `previous`)."""
    padded = payload + _PADDING[len(payload) & 7]
    body = _BODY.pack(tag, len(payload), previous, synced, kind, 0, run, term, index)
    crc = crc32c(padded, crc32c(body, offset))
    return _CRC.pack(crc) + body + padded, crc


def encode_begin(begin: Begin) -> bytes:
    """The payload of a BEGIN frame; `previous_crc` and `index` ride in the frame header."""
    term, vote = begin.hard_state or (0, b"")
    flags = 0 if begin.hard_state is None else 1
    fixed = _BEGIN.pack(
        begin.previous_segment, begin.previous_end, begin.previous_synced, flags, len(vote), term
    )
    return fixed + vote


def decode_begin(frame: RawFrame) -> Begin | None:
    payload = frame.payload
    if frame.kind != Kind.BEGIN or len(payload) < _BEGIN.size:
        return None
    segment, end, synced, flags, vote_length, term = _BEGIN.unpack_from(payload)
    vote = bytes(payload[_BEGIN.size :])
    if len(vote) != vote_length:
        return None
    hard_state = (term, vote) if flags & 1 else None
    return Begin(segment, end, synced, frame.previous, frame.index, hard_state)


def read_frame(file: DiskFile, tag: int, offset: int) -> RawFrame | None:
    """The frame at `offset` if there is an intact one of this segment's life; its `previous` is unchecked."""
    head = file.pread(FRAME_HEADER_BYTES, offset)
    if len(head) < FRAME_HEADER_BYTES:
        return None
    length = _FRAME.unpack(head)[2]
    if length > WAL_FRAME_BYTES_MAX:
        return None
    return _parse(memoryview(file.pread(_frame_bytes(length), offset)), 0, offset, tag)


def walk_frames(file: DiskFile, tag: int, offset: int, previous: int, limit: int) -> Iterator[RawFrame]:
    """Chained frames from `offset` on, up to `limit` or the first one that does not hold.

    Payloads are views of a read buffer: copy what is kept beyond the next step.
    """
    window = memoryview(b"")
    base = offset
    while True:
        at = offset - base
        frame = _parse(window, at, offset, tag)
        if frame is None:
            # Either the window ends within this frame, or the frame is not there.
            known = window[at : at + FRAME_HEADER_BYTES]
            need = FRAME_HEADER_BYTES
            if len(known) == FRAME_HEADER_BYTES:
                length = _FRAME.unpack(known)[2]
                need = _frame_bytes(length)
                if length > WAL_FRAME_BYTES_MAX or len(window) - at >= need:
                    return
            if offset + need > limit:
                return
            fresh = memoryview(file.pread(min(max(_READ_BYTES, need), limit - offset), offset))
            if len(fresh) <= len(window) - at:
                return
            window, base = fresh, offset
            continue
        if frame.previous != previous or frame.end > limit:
            return
        yield frame
        offset, previous = frame.end, frame.crc


def find_frames(file: DiskFile, tag: int, offset: int, limit: int) -> Iterator[RawFrame]:
    """Every intact frame of this segment's life at or after `offset`, chained or not.

    This is how damage is told from a torn tail: it finds what lies behind a hole. The tag makes
    the search a plain substring search; blank or recycled space yields nothing.
    """
    needle = tag.to_bytes(4, "little")
    step = _READ_BYTES
    base = offset
    while base < limit:
        chunk = file.pread(min(step + FRAME_HEADER_BYTES, limit - base), base)
        hit = chunk.find(needle)
        while hit >= 0:
            start = base + hit - 4
            if 4 <= hit < step + 4 and not start & 7:
                frame = read_frame(file, tag, start)
                if frame is not None and frame.end <= limit:
                    yield frame
            hit = chunk.find(needle, hit + 1)
        base += step


def _frame_bytes(length: int) -> int:
    return FRAME_HEADER_BYTES + (length + 7 & ~7)


def _parse(window: memoryview, at: int, offset: int, tag: int) -> RawFrame | None:
    if len(window) - at < FRAME_HEADER_BYTES:
        return None
    crc, its_tag, length, previous, synced, kind, _zero, run, term, index = _FRAME.unpack_from(window, at)
    if its_tag != tag or length > WAL_FRAME_BYTES_MAX:
        return None
    end = at + FRAME_HEADER_BYTES + (length + 7 & ~7)
    if end > len(window) or crc32c(window[at + 4 : end], offset) != crc:
        return None
    payload = window[at + FRAME_HEADER_BYTES : at + FRAME_HEADER_BYTES + length]
    return RawFrame(offset, offset + end - at, crc, previous, synced, kind, run, term, index, payload)
