"""Handing out the entries of a log in order, leaving out those that a later truncation made void.

Here belongs reading alone; which segments there are and where they end is told by the caller.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aspenfs.errors import Corrupt
from aspenfs.runtime.wal_format import ADVICE, ENTRY_KIND_MAX, FIRST_FRAME, segment_name, walk_frames
from aspenfs.seams import Disk

# Entries before a position (segment number, offset) and above an index are void.
Void = tuple[tuple[int, int], int]


class Frame(NamedTuple):
    """A log entry as replayed, and where it stands: `segment` is a number, see `segment_name`."""

    kind: int
    term: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    payload: bytes
    segment: int
    offset: int


class Piece(NamedTuple):
    """One segment to read: its first entry comes after `base`, its frames end at `end`."""

    number: int
    base: int
    tag: int
    previous_crc: int
    end: int


def replay(
    disk: Disk,
    directory: str,
    pieces: Sequence[Piece],
    voids: Sequence[Void],
    from_index: int,
    last_index: int,
) -> Iterator[Frame]:
    """Entries `from_index`..`last_index`. Raises Corrupt when what was appended does not read back."""
    # A live entry above the base of a segment is in that segment or a later one, as truncations
    # lower the base: so the last segment with a base below `from_index` is where to start.
    start = max((at for at, piece in enumerate(pieces) if piece.base < from_index), default=0)
    # An entry is void if a truncation behind it has a lower index: what counts at any place is the
    # lowest truncation still to come. The next one in reading order is last in `floors`.
    floors: list[Void] = []
    lowest = last_index
    for position, index in reversed(voids):
        lowest = min(lowest, index)
        floors.append((position, lowest))
    expected = from_index
    for piece in pieces[start:]:
        if expected > last_index:
            return
        name = segment_name(piece.number)
        offset = FIRST_FRAME
        file = disk.open(f"{directory}/{name}")
        try:
            for frame in walk_frames(file, piece.tag, FIRST_FRAME, piece.previous_crc, piece.end):
                offset = frame.end
                while floors and floors[-1][0] <= (piece.number, frame.offset):
                    floors.pop()
                if frame.kind > ENTRY_KIND_MAX or frame.index != expected:
                    continue
                if floors and frame.index > floors[-1][1]:
                    continue
                expected += 1
                payload = bytes(frame.payload)
                yield Frame(frame.kind, frame.term, frame.index, payload, piece.number, frame.offset)
        finally:
            file.close()
        if offset != piece.end and expected <= last_index:
            raise Corrupt(name, offset, "the frame here does not read back as it was written", ADVICE)
    if expected <= last_index:
        raise Corrupt(directory, 0, f"entry {expected} is missing from the log", ADVICE)
