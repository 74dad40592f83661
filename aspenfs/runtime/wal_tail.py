"""The end of the log: the segment being written, and what the next frame has to say.

Here belongs putting frames behind the last one with a single pwrite, and leaving no trace when that
fails. What the frames mean, when to go on in another segment, and durability are `wal.py`'s, whose
lock is held in every call.
"""

import logging
from collections.abc import Sequence
from typing import Final

from aspenfs.errors import NoSpace, StorageError
from aspenfs.limits import KIB
from aspenfs.runtime.wal_format import FIRST_FRAME, Begin, Kind, encode_begin, encode_frame
from aspenfs.runtime.wal_recovery import Segment
from aspenfs.runtime.wal_segments import storage_error

logger = logging.getLogger(__name__)

CONTROL_BYTES: Final = 1 * KIB  # the end of a segment that only frames other than entries may use
PAGE_BYTES: Final = 4 * KIB  # of the page cache; a larger one would only cost some reads


class Tail:
    """Where the next frame goes. `run` and `claim` are the frame fields `run` and `synced`."""

    __slots__ = ("cached", "claim", "crc", "end", "entry_limit", "run", "segment", "tag")

    def __init__(self, run: int) -> None:
        self.run = run
        self.segment: Segment | None = None  # None: the log has no segment yet
        self.tag = self.end = self.crc = self.claim = 0
        # Entries end here; 0 until the BEGIN frame is written, so that the fast path leaves it alone.
        self.entry_limit = 0
        # Up to here the pages are in the page cache since we wrote them whole. A first write to a part
        # of any other page makes the kernel read that page from the disk, some ms; see `whole_pages`.
        self.cached = 0

    def start(self, segment: Segment) -> None:
        """Go on in a fresh segment; `claim` says nothing until it is set."""
        self.segment, self.tag = segment, segment.tag
        self.end, self.crc, self.claim = FIRST_FRAME, 0, 0
        self.entry_limit = self.cached = 0

    def resume(self, segment: Segment) -> None:
        """Go on behind the frames that were found in a segment and made durable."""
        self.start(segment)
        self.end = self.claim = segment.end
        self.crc = segment.crc
        self.entry_limit = segment.size - CONTROL_BYTES

    @property
    def position(self) -> tuple[int, int]:
        """(segment number, offset)."""
        return (0, 0) if self.segment is None else (self.segment.number, self.end)

    def room(self, *, entries: bool) -> int:
        """Bytes of frames that still fit."""
        if self.segment is None:
            return 0
        return self.segment.size - self.end - (CONTROL_BYTES if entries else 0)

    def write(
        self, frames: Sequence[tuple[int, int, int, bytes]], last_index: int, begin: Begin | None = None
    ) -> None:
        """Frames (kind, term, index, payload), behind a BEGIN frame if there is one, with one pwrite.

        Raises NoSpace or StorageError, and then none of them counts.
        """
        segment = self.segment
        assert segment is not None
        at, crc, tag, claim, run = self.end, self.crc, self.tag, self.claim, self.run
        parts: list[bytes] = []
        begin_end = at
        if begin is not None:
            assert at == FIRST_FRAME
            payload = encode_begin(begin)
            data, crc = encode_frame(
                at, tag, begin.previous_crc, claim, run, Kind.BEGIN, 0, last_index, payload
            )
            parts.append(data)
            at = begin_end = at + len(data)
        for kind, term, index, payload in frames:
            data, crc = encode_frame(at, tag, crc, claim, run, kind, term, index, payload)
            parts.append(data)
            at += len(data)
        data = self.whole_pages(b"".join(parts), at)
        try:
            segment.file.pwrite(data, self.end)
        except OSError as error:
            raise self.abandon(error, len(data)) from error
        self.end, self.crc = at, crc
        if begin is not None:
            segment.begin, segment.begin_end, segment.base = begin, begin_end, begin.index
            self.entry_limit = segment.size - CONTROL_BYTES

    def whole_pages(self, data: bytes, end: int) -> bytes:
        """`data`, which ends at `end`, with zeros up to the end of its last page, if that page is new.

        Behind the log's end is nothing that counts: zeros, or the frames of a recycled segment's past.
        """
        if end <= self.cached:
            return data
        assert self.segment is not None
        self.cached = min(end + PAGE_BYTES - 1 & -PAGE_BYTES, self.segment.size)
        return data + bytes(self.cached - end)

    def abandon(self, error: OSError, size: int) -> NoSpace | StorageError:
        """After a failed write of `size` bytes at the end: take care that none of it ever counts."""
        # Whatever prefix was written: the next frames carry another run, so that no leftover can
        # chain to them even if they repeat these byte for byte. Blanking it keeps a kill of this
        # process from bringing back what its caller is now told has failed.
        self.run = self.run + 1 & 0xFFFF
        segment = self.segment
        assert segment is not None
        try:
            segment.file.pwrite(bytes(size), self.end)
        except OSError:
            logger.warning(
                "wal leftover of a failed append not blanked segment=%s offset=%d", segment.name, self.end
            )
        return storage_error(error, f"appending to log segment {segment.name}")
