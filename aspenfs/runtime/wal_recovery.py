"""Reading a log directory back: which segments and frames count, and what is damage.

Here belongs everything that only reads: `recover` (what `Wal.open` and `aspen check` build on) and
`verify`. It changes no byte; acting on the findings is `wal.py`'s.

The one hard question is whether a frame that does not hold was lost in a power failure before
anyone was promised anything (cut the log there), or had been durable and is damaged now (refuse).
Each frame tells up to where the log was durable when the frame was written. So: if any intact
frame anywhere claims durability beyond the first bad frame, that frame had been durable.
`docs/design/wal.md` has the steps.
"""

from collections.abc import Iterator
from typing import NamedTuple

from aspenfs.errors import Corrupt, StorageError
from aspenfs.runtime.wal_format import (
    ADVICE,
    ENTRY_KIND_MAX,
    FIRST_FRAME,
    Begin,
    Kind,
    RawFrame,
    decode_begin,
    decode_header,
    find_frames,
    read_frame,
    segment_name,
    segment_number,
    walk_frames,
)
from aspenfs.seams import Disk, DiskFile

SPARE = "spare.wal"


class Segment:
    """One segment file, as recovery and the live log know it.

    `base` is the index after which its first entry comes; truncations in it lower it. `end` is
    where its frames end, `crc` the crc of the last one.
    """

    __slots__ = (
        "base",
        "begin",
        "begin_end",
        "crc",
        "end",
        "file",
        "frames",
        "last_index",
        "number",
        "size",
        "tag",
    )

    def __init__(self, number: int, size: int, tag: int, file: DiskFile) -> None:
        self.number, self.size, self.tag, self.file = number, size, tag, file
        self.begin: Begin | None = None
        self.begin_end = FIRST_FRAME
        self.base = 0
        self.last_index = 0
        self.end = FIRST_FRAME
        self.crc = 0
        self.frames = 0

    @property
    def name(self) -> str:
        return segment_name(self.number)


class Recovered:
    """What is in a log directory. Positions are (segment number, offset)."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []  # the chain, oldest first; files are open
        self.dropped: list[Segment] = []  # prepared but never begun, or behind a torn tail; files are open
        self.has_spare = False  # a spare file of which is known under which number it last lived
        self.first_index = 1
        self.last_index = 0
        self.hard_state: tuple[int, bytes] | None = None
        self.run = 0
        self.synced: tuple[int, int] = (0, 0)  # the furthest durability that any frame claims
        self.void_after: list[tuple[tuple[int, int], int]] = []  # see `wal_replay.Void`
        self.torn_bytes = 0  # intact or torn frames behind the end, not part of the log
        self.next_number = 1

    def close(self) -> None:
        for segment in self.segments + self.dropped:
            segment.file.close()

    def take(self, segment: Segment, frame: RawFrame) -> None:
        """Account for one frame of the chain, in order. Corrupt if it can not follow."""
        kind = frame.kind
        if kind <= ENTRY_KIND_MAX:
            if frame.index != self.last_index + 1:
                cause = f"entry {frame.index} follows entry {self.last_index}"
                raise Corrupt(segment.name, frame.offset, cause, ADVICE)
            self.last_index = frame.index
        elif kind == Kind.HARD_STATE:
            self.hard_state = (frame.term, bytes(frame.payload))
        elif kind == Kind.TRUNCATE:
            self.last_index = frame.index
            self.first_index = min(self.first_index, frame.index + 1)
            segment.base = min(segment.base, frame.index)
            self.void_after.append(((segment.number, frame.offset), frame.index))
        elif kind == Kind.RESET:
            self.last_index = frame.index
            self.first_index = frame.index + 1
            segment.base = frame.index
            self.void_after.append(((segment.number, frame.offset), 0))
        elif kind != Kind.MARK:
            cause = f"frame type {kind} is not known to this program"
            raise Corrupt(segment.name, frame.offset, cause, "run the aspenfs release that wrote it")
        self._note(segment, frame)

    def begin(self, segment: Segment, frame: RawFrame, begin: Begin) -> None:
        """Account for the BEGIN frame of the next segment of the chain."""
        if not self.segments:
            self.first_index = begin.index + 1
            self.last_index = begin.index
            self.hard_state = begin.hard_state
        elif begin.index != self.last_index:
            cause = (
                f"it goes on after entry {begin.index}, but the segment before ends with {self.last_index}"
            )
            raise Corrupt(segment.name, FIRST_FRAME, cause, ADVICE)
        if begin.previous_synced:
            self.synced = max(self.synced, (begin.previous_segment, begin.previous_synced))
        segment.base = segment.last_index = begin.index
        segment.begin, segment.begin_end = begin, frame.end
        self.segments.append(segment)
        self._note(segment, frame)

    def _note(self, segment: Segment, frame: RawFrame) -> None:
        segment.end, segment.crc = frame.end, frame.crc
        segment.last_index = self.last_index
        segment.frames += 1
        self.run = frame.run
        if frame.synced:
            self.synced = (segment.number, frame.synced)


def recover(disk: Disk, directory: str, cluster_id: bytes | None) -> Recovered:
    """Read the log in `directory` (steps 1-6 of docs/design/wal.md); `cluster_id` None accepts any.

    Raises Corrupt for damage, StorageError for a log of another cluster or a newer format.
    """
    found = Recovered()
    candidates = _open_segments(disk, directory, cluster_id, found)
    try:
        _follow_chain(candidates, found)
    except BaseException:
        for segment in candidates:
            segment.file.close()
        raise
    return found


def _open_segments(disk: Disk, directory: str, cluster_id: bytes | None, found: Recovered) -> list[Segment]:
    segments: list[Segment] = []
    try:
        for name in disk.list(directory):
            if name == SPARE:
                number = _spare_number(disk, f"{directory}/{name}")
                if number is not None:
                    found.has_spare = True
                    found.next_number = max(found.next_number, number + 1)
                continue
            number = segment_number(name)
            if number is None:
                continue
            segment = _open_segment(disk, directory, number, cluster_id)
            segments.append(segment)
            found.next_number = max(found.next_number, number + 1)
    except BaseException:
        for segment in segments:
            segment.file.close()
        raise
    return segments


def _open_segment(disk: Disk, directory: str, number: int, cluster_id: bytes | None) -> Segment:
    name = segment_name(number)
    file = disk.open(f"{directory}/{name}")
    try:
        header = decode_header(file, name)
        if header.number != number:
            raise Corrupt(name, 0, f"the file holds segment {header.number}, not {number}", ADVICE)
        if cluster_id is not None and header.cluster_id != cluster_id:
            raise StorageError(
                f"{name}: this log belongs to cluster {header.cluster_id.hex()}, not to {cluster_id.hex()}; "
                "give this node the state directory of its own cluster"
            )
        size = file.size()
        if size < header.size:
            raise Corrupt(name, size, f"the file was made with {header.size} bytes and is cut off", ADVICE)
    except BaseException:
        file.close()
        raise
    return Segment(number, header.size, header.tag, file)


def _spare_number(disk: Disk, path: str) -> int | None:
    file = disk.open(path)
    try:
        return decode_header(file, path).number
    except StorageError:
        return None  # half made, or by another release: what is in it must be wiped
    finally:
        file.close()


def _follow_chain(candidates: list[Segment], found: Recovered) -> None:
    begins: dict[int, tuple[RawFrame, Begin]] = {}
    successors: dict[int, Segment] = {}
    for segment in candidates:
        frame = read_frame(segment.file, segment.tag, FIRST_FRAME)
        begin = decode_begin(frame) if frame is not None else None
        if frame is not None and begin is not None:
            segment.begin = begin
            begins[segment.number] = (frame, begin)
            if begin.previous_segment in successors:
                raise Corrupt(segment.name, FIRST_FRAME, "two segments follow the same one", ADVICE)
            successors[begin.previous_segment] = segment
    here: Segment | None = candidates[0] if candidates else None
    while here is not None:
        if here.number not in begins:
            _tail(found, candidates, (here.number, FIRST_FRAME))
            return
        found.begin(here, *begins[here.number])
        follower = successors.get(here.number)
        ends = begins[follower.number][1] if follower is not None else None
        limit = ends.previous_end if ends is not None else here.size
        last = FIRST_FRAME
        for frame in walk_frames(here.file, here.tag, here.end, here.crc, limit):
            found.take(here, frame)
            last = frame.offset
        if ends is None or here.end != limit:
            _tail(found, candidates, (here.number, here.end))
            return
        if here.crc != ends.previous_crc:
            # The frames chain, but they are not those that were there when the log went on.
            _tail(found, candidates, (here.number, last))
            return
        here = follower


def _tail(found: Recovered, candidates: list[Segment], bad: tuple[int, int]) -> None:
    """The chain ends at `bad`. Corrupt if anything says that the log had been durable beyond it."""
    number, offset = bad
    for segment in candidates:
        if segment.number < number:
            continue
        start = offset if segment.number == number else FIRST_FRAME
        for frame in find_frames(segment.file, segment.tag, start, segment.size):
            if any(claim > bad for claim in _claims(segment, frame)):
                raise _damage(candidates, bad, segment, frame)
            found.torn_bytes += frame.end - frame.offset
    assert found.synced <= bad
    chain = {segment.number for segment in found.segments}
    found.dropped = [segment for segment in candidates if segment.number not in chain]


def _damage(candidates: list[Segment], bad: tuple[int, int], witness: Segment, frame: RawFrame) -> Corrupt:
    """Where the damage is: at `bad`, or in what should lie between it and the witness."""
    says = f"but {witness.name} at offset {frame.offset} shows that it had been written and synced"
    known = {segment.number: segment for segment in candidates}
    here: Segment | None = witness
    while here is not None and here.number != bad[0]:
        if here.begin is None:
            return Corrupt(here.name, FIRST_FRAME, f"no valid first frame, {says}", ADVICE)
        number = here.begin.previous_segment
        here = known.get(number)
        if here is None:
            return Corrupt(segment_name(number), 0, f"the file is missing, {says}", ADVICE)
    return Corrupt(segment_name(bad[0]), bad[1], f"no valid frame here, {says}", ADVICE)


def _claims(segment: Segment, frame: RawFrame) -> Iterator[tuple[int, int]]:
    """Positions below which the log was durable when `frame` was written."""
    if frame.synced > FIRST_FRAME:
        yield segment.number, frame.synced
    elif frame.synced and segment.begin is not None:
        # All segments before were durable. Where they ended only an intact BEGIN frame tells.
        yield segment.begin.previous_segment, segment.begin.previous_end
    begin = decode_begin(frame)
    if begin is not None and begin.previous_synced:
        yield begin.previous_segment, begin.previous_synced


class SegmentReport(NamedTuple):
    name: str
    first_index: int  # of the entries in it, superseded ones included
    last_index: int
    frames: int
    used_bytes: int
    size_bytes: int


class Report(NamedTuple):
    """What `aspen check` says of a log. `problem` is None when the log can be opened."""

    segments: list[SegmentReport]
    first_index: int
    last_index: int
    hard_state: tuple[int, bytes] | None
    unsynced_bytes: int  # frames behind the last durable point that a frame claims
    torn_bytes: int  # written but behind the end: will be dropped when the log is opened
    problem: str | None


def verify(disk: Disk, directory: str, cluster_id: bytes | None = None) -> Report:
    """Check every byte that counts, changing nothing. Not on a log that is open for appending."""
    try:
        found = recover(disk, directory, cluster_id)
    except StorageError as error:
        return Report([], 0, 0, None, 0, 0, str(error))
    segments = [
        SegmentReport(s.name, s.base + 1, s.last_index, s.frames, s.end, s.size) for s in found.segments
    ]
    unsynced = 0
    for segment in found.segments:
        number, offset = found.synced
        if segment.number >= number:
            unsynced += segment.end - (offset if segment.number == number else FIRST_FRAME)
    found.close()
    return Report(
        segments, found.first_index, found.last_index, found.hard_state, unsynced, found.torn_bytes, None
    )
