"""The write-ahead log: entries, term and vote in one sequence of frames, durable with one fdatasync.

Here belongs the log as its user sees it: append, sync, truncate, trim, replay. The bytes are in
`wal_format.py`, reading a directory back in `wal_recovery.py`, segment files in `wal_segments.py`,
and `docs/design/wal.md` describes all of it.

What is true:
 - `append` returns when the frame is in the page cache: it survives the end of this process.
   It is durable when a `sync` that *started after* it has returned.
 - What is found after a crash is a prefix of what was appended, and holds all that was synced.
 - An append that raises has added nothing, and the log can be appended to again. (As after any failed
   write, a power failure before the next sync may still bring a prefix of it back.)
 - A failed fdatasync ends the log: the kernel may have dropped the data and called it clean, so
   every later append and sync raises SyncFailed. The process must end; never retry.
 - The log never writes over a frame that counts: truncation and reset are frames themselves.

Threads: any method from any thread at any time; meant are appends from the event loop and `sync`
from a thread of its own. The lock that they share is held for one pwrite into the page cache, never
during an fdatasync. An append waits for more only when a segment is full and the next is not ready.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from aspenfs.errors import Busy, Closed, NoSpace, StorageError, SyncFailed, TxnTooLarge
from aspenfs.limits import KIB, MIB, WAL_FRAME_BYTES_MAX, WAL_SEGMENT_BYTES
from aspenfs.runtime.wal_format import (
    BEGIN_BYTES_MAX,
    CLUSTER_ID_BYTES,
    ENTRY_KIND_MAX,
    FIRST_FRAME,
    FRAME_HEADER_BYTES,
    VOTE_BYTES_MAX,
    Begin,
    Kind,
    encode_frame,
)
from aspenfs.runtime.wal_recovery import Recovered, Report, Segment, recover, verify
from aspenfs.runtime.wal_replay import Frame, Piece, Void, replay
from aspenfs.runtime.wal_segments import SegmentPool, storage_error
from aspenfs.runtime.wal_tail import CONTROL_BYTES, Tail
from aspenfs.seams import Disk, DiskFile

__all__ = ["Frame", "Kind", "PendingSync", "Report", "Wal", "verify"]

logger = logging.getLogger(__name__)

SEGMENT_BYTES_MIN: Final = 4 * KIB
_REWRITE_BYTES: Final = 1 * MIB  # at a time


class PendingSync(NamedTuple):
    """What a sync that has begun is to make durable: see `Wal.begin_sync`."""

    files: Sequence[DiskFile]  # oldest first
    full: tuple[Segment, ...]
    target: tuple[int, int]  # (segment number, offset)


class Wal:
    """Made by `Wal.open`; see the head of this file for what is true."""

    def __init__(self, disk: Disk, directory: str, pool: SegmentPool, found: Recovered) -> None:
        self._disk, self._directory, self._pool = disk, directory, pool
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._dead: StorageError | None = None
        self._segments = found.segments
        self._first_index, self._last_index = found.first_index, found.last_index
        self._hard_state = found.hard_state
        self._void_after: list[Void] = found.void_after
        self._tail = Tail(found.run + 1 & 0xFFFF)
        self._previous: Segment | None = None  # the one before the segment that is being written
        # Durability: all before `_synced` = (segment number, offset) is durable; at `_clean` nothing
        # is left to sync; `_unsynced` are full segments that still wait for their fdatasync.
        self._synced = self._clean = (0, 0)
        self._synced_index = self._sync_floor = found.last_index
        self._unsynced: list[Segment] = []
        # (segment number, offset): how far the log said that it was durable, when it was opened
        self.claimed_at_open = found.synced
        if found.segments:
            self._tail.resume(found.segments[-1])
            self._synced = self._clean = self._tail.position

    @classmethod
    def open(
        cls,
        disk: Disk,
        directory: str,
        cluster_id: bytes,
        *,
        segment_bytes: int = WAL_SEGMENT_BYTES,
        background: bool = True,
        claim: bool = True,
    ) -> "Wal":
        """The log in `directory` (made if missing), recovered and durable up to `last_index`.

        Raises Corrupt when something that had been durable does not read back (nothing was changed
        then), StorageError for another cluster's log, SyncFailed, NoSpace.
        `background=False` does all work in the calling threads, for simulation.
        `claim=False`: the next append or sync is the first to say in the log that what was found is
        durable, so that the caller may `truncate_after` entries behind `claimed_at_open` before.
        """
        assert len(cluster_id) == CLUSTER_ID_BYTES
        assert segment_bytes >= SEGMENT_BYTES_MIN
        try:
            _make_durable_directory(disk, directory)
            found = recover(disk, directory, cluster_id)
        except OSError as error:
            raise storage_error(error, f"opening the log {directory}") from error
        pool = SegmentPool(
            disk,
            directory,
            cluster_id,
            segment_bytes,
            next_number=found.next_number,
            has_spare=found.has_spare,
            background=background,
        )
        try:
            wal = cls(disk, directory, pool, found)
            wal._take_over(found, claim)
        except OSError as error:
            pool.close()
            found.close()
            raise SyncFailed(f"fdatasync of the log failed while opening it: {error}") from error
        except BaseException:
            pool.close()
            found.close()
            raise
        return wal

    def _take_over(self, found: Recovered, claim: bool) -> None:
        # After the end of a process the log may still be in the page cache only; what replay hands
        # out must not be lost any more. If it ended because a sync failed, the kernel has called clean
        # what it did not write, and a sync alone would write nothing: so it is written again. And before
        # anything is appended, files behind the end lose their names, so that no later recovery can take
        # them for a continuation.
        for segment in found.segments:
            number, offset = found.synced
            if segment.number >= number:
                _write_again(segment, offset if segment.number == number else FIRST_FRAME)
            segment.file.datasync()
            if segment is not self._tail.segment:
                segment.file.close()
        for segment in found.dropped:
            segment.file.close()
        self._pool.retire_now([segment.name for segment in found.dropped])
        if found.torn_bytes:
            logger.warning(
                "wal torn tail dropped directory=%s bytes=%d: what no sync had covered; expected after loss "
                "of power, damage after anything less",
                self._directory,
                found.torn_bytes,
            )
        self._seal_tail(claim)
        self._pool.stir()

    @property
    def first_index(self) -> int:
        """Of the oldest entry still there; `last_index + 1` when there is none."""
        return self._first_index

    @property
    def last_index(self) -> int:
        """Of the newest entry; when there is none, the index after which the log goes on (0 at first)."""
        return self._last_index

    @property
    def synced_index(self) -> int:
        """All entries up to this one are durable."""
        return min(self._synced_index, self._last_index)

    @property
    def hard_state(self) -> tuple[int, bytes] | None:
        """Term and vote as last written."""
        return self._hard_state

    @property
    def short_of_space(self) -> bool:
        """No segment could be made for when the current one is full: refuse what makes the log grow
        for good, let through what frees space (deletes), and expect NoSpace at the segment's end."""
        return self._pool.failure is not None

    # --- writing ---

    def append(self, kind: int, term: int, index: int, payload: bytes) -> None:
        """Add one entry: `index` is `last_index + 1`, `kind` 1..15. One pwrite.

        Raises NoSpace or StorageError (nothing was added), SyncFailed, Closed, TxnTooLarge.
        """
        size = len(payload)
        with self._lock:
            tail = self._tail
            at = tail.end
            end = at + FRAME_HEADER_BYTES + size + 7 & ~7
            if end > tail.entry_limit or self._dead is not None or size > WAL_FRAME_BYTES_MAX:
                self._append([(kind, term, index, payload)])
                return
            assert index == self._last_index + 1
            assert 0 < kind <= ENTRY_KIND_MAX
            data, crc = encode_frame(at, tail.tag, tail.crc, tail.claim, tail.run, kind, term, index, payload)
            if end > tail.cached:
                data = tail.whole_pages(data, end)
            segment = tail.segment
            assert segment is not None
            try:
                segment.file.pwrite(data, at)
            except OSError as error:
                raise tail.abandon(error, len(data)) from error
            tail.end, tail.crc, self._last_index = end, crc, index

    def append_many(self, frames: Sequence[tuple[int, int, int, bytes]]) -> None:
        """Add frames (kind, term, index, payload) with one pwrite, all or none (of a failed append).

        Entries as in `append`; and Kind.HARD_STATE with payload = vote (its index is ignored).
        Together they must fit into one segment.
        """
        with self._lock:
            self._append(frames)

    def save_hard_state(self, term: int, vote: bytes) -> None:
        """Add term and vote; durable after the next sync, as entries are."""
        self.append_many([(Kind.HARD_STATE, term, 0, vote)])

    def truncate_after(self, index: int) -> None:
        """Entries above `index` are void: the next one appended is `index + 1`."""
        with self._lock:
            assert self._first_index - 1 <= index <= self._last_index
            if index < self._last_index:
                self._void_entries(Kind.TRUNCATE, index)

    def reset(self, index: int) -> None:
        """All entries are void: the next one appended is `index + 1` (a snapshot up to `index` came in)."""
        with self._lock:
            self._void_entries(Kind.RESET, index)

    def _append(self, frames: Sequence[tuple[int, int, int, bytes]]) -> None:
        """Any frames, with the lock held: checks all, rolls over if they do not fit, writes."""
        if self._dead is not None:
            raise self._dead
        if not frames:
            return
        size, last, hard_state = self._checked(frames)
        tail = self._tail
        entries = any(kind <= ENTRY_KIND_MAX for kind, *_ in frames)
        if size > tail.room(entries=entries):
            self._roll(size)
        begin = self._begin() if tail.end == FIRST_FRAME else None
        tail.write(frames, self._last_index, begin)
        segment = tail.segment
        assert segment is not None
        if begin is not None:
            self._segments.append(segment)
        self._last_index, self._hard_state = last, hard_state

    def _checked(
        self, frames: Sequence[tuple[int, int, int, bytes]]
    ) -> tuple[int, int, tuple[int, bytes] | None]:
        """The bytes that the frames take, and last index and hard state when they are written."""
        size = BEGIN_BYTES_MAX if self._tail.end <= FIRST_FRAME else 0
        last, hard_state = self._last_index, self._hard_state
        for kind, term, index, payload in frames:
            if len(payload) > WAL_FRAME_BYTES_MAX:
                raise TxnTooLarge(f"a log entry of {len(payload)} bytes (at most {WAL_FRAME_BYTES_MAX})")
            size += FRAME_HEADER_BYTES + len(payload) + 7 & ~7
            if kind == Kind.HARD_STATE:
                assert len(payload) <= VOTE_BYTES_MAX
                hard_state = (term, payload)
                continue
            assert kind > ENTRY_KIND_MAX or (kind > 0 and index == last + 1)
            last = index
        return size, last, hard_state

    def _void_entries(self, kind: Kind, index: int) -> None:
        """Write TRUNCATE or RESET, with the lock held."""
        self._append([(kind, 0, index, b"")])
        segment = self._tail.segment
        assert segment is not None
        # Any place behind the entries that are there and before those to come will do.
        position = self._tail.position
        if kind == Kind.TRUNCATE:
            segment.base = min(segment.base, index)
            self._void_after.append((position, index))
        else:
            segment.base = index
            self._first_index = index + 1
            self._void_after.append((position, 0))
        self._synced_index = min(self._synced_index, index)
        self._sync_floor = min(self._sync_floor, index)

    # --- segments ---

    def _roll(self, size: int) -> None:
        """Go on in a fresh segment. From here on the old one gets no frame any more, even if the
        first write to the new one fails: its BEGIN frame may be on disk and says where the old ended."""
        tail = self._tail
        room = self._pool.segment_bytes - FIRST_FRAME - BEGIN_BYTES_MAX - CONTROL_BYTES
        old = tail.segment
        if size > room or (old is not None and tail.end == FIRST_FRAME):
            raise TxnTooLarge(f"{size} bytes of frames do not fit into a log segment (room: {room} bytes)")
        segment = self._pool.take()
        if old is not None:
            old.end, old.crc = tail.end, tail.crc
            old.last_index = self._last_index
            self._unsynced.append(old)
        self._previous = old
        tail.start(segment)
        if old is None or self._synced >= (old.number, old.end):
            tail.claim = FIRST_FRAME
        self._pool.stir()

    def _begin(self) -> Begin:
        old = self._previous
        if old is None:
            return Begin(0, 0, 0, 0, self._last_index, self._hard_state)
        if self._synced >= (old.number, old.end):
            synced = old.end
        else:
            synced = self._synced[1] if self._synced[0] == old.number else 0
        return Begin(old.number, old.end, synced, old.crc, self._last_index, self._hard_state)

    def trim(self, before_index: int) -> None:
        """Entries below `before_index` are needed no more; whole segments of them go, oldest first.

        Call it only for what is durable elsewhere, and not under a replay of them.
        """
        with self._lock:
            if self._dead is not None:
                raise self._dead
            names = []
            segments = self._segments
            while len(segments) > 1:
                # The successor takes over where the log starts, so its BEGIN must be durable; and
                # its BEGIN, not a truncation since then, tells what a crash may bring back.
                begin, begin_at = segments[1].begin, (segments[1].number, segments[1].begin_end)
                if begin is None or begin.index >= before_index or self._synced < begin_at:
                    break
                names.append(segments.pop(0).name)
            if not names:
                return
            self._first_index = max(self._first_index, min(segment.base for segment in segments) + 1)
            oldest = (segments[0].number, 0)
            self._void_after = [void for void in self._void_after if void[0] >= oldest]
        self._pool.retire(names)

    # --- durability ---

    def sync(self, before: Callable[[], object] | None = None) -> int:
        """Make durable what was appended before the call; the index up to which all entries are.

        `before` runs once it is settled which entries those are, ahead of the first fdatasync: there
        the caller makes durable what they name. If it raises, nothing was done.
        Blocks for one fdatasync (two when a segment was filled meanwhile); callers queue up.
        Raises SyncFailed, and then the log is dead.
        """
        with self._sync_lock:
            pending = self._pending_sync()
            if pending is None:
                return self._synced_index
            if before is not None:
                before()
            try:
                for file in pending.files:
                    file.datasync()
            except OSError as error:
                raise self._die(error) from error
            return self._sync_ended(pending)

    def begin_sync(self) -> "PendingSync | None":
        """`sync` in two parts, for who has another way to sync `files`: then comes `end_sync`, and until
        then no other sync. None: there is nothing to do, and `synced_index` is the answer. Does not block.
        SyncFailed; Busy: a sync is under way."""
        if not self._sync_lock.acquire(blocking=False):
            raise Busy("a sync of the log is under way")
        try:
            pending = self._pending_sync()
        except BaseException:
            self._sync_lock.release()
            raise
        if pending is None:
            self._sync_lock.release()
        return pending

    def end_sync(self, pending: "PendingSync", error: OSError | None) -> int:
        """What `sync` returns and raises, when its files are durable, or there was an error."""
        try:
            if error is not None:
                raise self._die(error) from error
            return self._sync_ended(pending)
        finally:
            self._sync_lock.release()

    def abandon_sync(self) -> None:
        """As if `begin_sync` had not been called."""
        self._sync_lock.release()

    def _pending_sync(self) -> "PendingSync | None":
        with self._lock:
            if self._dead is not None:
                raise self._dead
            if isinstance(self._pool.failure, SyncFailed):
                self._dead = self._pool.failure
                raise self._dead
            current, target = self._tail.segment, self._tail.position
            self._sync_floor = self._last_index
            if target == self._clean:
                return None
            full = tuple(self._unsynced)
        files = [segment.file for segment in full]
        if current is not None and target[1] > FIRST_FRAME:
            files.append(current.file)
        return PendingSync(files, full, target)

    def _sync_ended(self, pending: "PendingSync") -> int:
        full, target = pending.full, pending.target
        with self._lock:
            del self._unsynced[: len(full)]
            self._synced = self._clean = target
            index = self._synced_index = self._sync_floor  # lower if a truncation came meanwhile
            self._update_claim(target)
            self._mark(target)
        for segment in full:
            segment.file.close()
        if self._pool.failure is not None:
            self._pool.stir()
        return index

    def _seal_tail(self, claim: bool) -> None:
        """Put a durable frame where the log ends, for nobody else yet has the log.

        What stands there may be half of a frame that a power failure tore. Were it only written over
        by the next append, another power failure could undo that in one sector and not in the next,
        where equal payload bytes would then make the torn frame whole.
        """
        tail = self._tail
        if tail.segment is None:
            return
        durable = tail.claim
        if not claim:
            tail.claim = 0
        self._mark(self._synced)
        tail.segment.file.datasync()
        self._synced = tail.position
        tail.claim = tail.end if claim else durable
        if not claim:
            self._clean = (0, 0)  # the next sync has something to say

    def _die(self, error: OSError) -> StorageError:
        with self._lock:
            if self._dead is None:
                self._dead = SyncFailed(f"fdatasync of the log failed ({error}): this process must end")
            return self._dead

    def _update_claim(self, synced: tuple[int, int]) -> None:
        tail, previous = self._tail, self._previous
        if synced[0] == tail.position[0]:
            tail.claim = synced[1]
        elif previous is not None and synced >= (previous.number, previous.end):
            tail.claim = FIRST_FRAME  # of the segments before, nothing is left to sync

    def _mark(self, synced: tuple[int, int]) -> None:
        """Say how far the log is durable, if no frame has come since that says it; lock held.

        The frame itself need not be durable: it is for finding damage later, in a log at rest.
        """
        tail = self._tail
        if (
            synced != tail.position
            or tail.end <= FIRST_FRAME
            or tail.room(entries=False) < FRAME_HEADER_BYTES
        ):
            return
        # Without it the log is as good, but for damage at rest: so a failure is nobody's.
        with contextlib.suppress(NoSpace, StorageError):
            tail.write([(Kind.MARK, 0, self._last_index, b"")], self._last_index)
            self._clean = tail.position

    def close(self, *, sync: bool = True) -> None:
        """Sync (unless the log is dead) and let go of all files. Idempotent.

        Not `sync`: what entries name may be lost, and then nothing must say that they are durable.
        """
        if isinstance(self._dead, Closed):
            return
        try:
            if sync and self._dead is None:
                self.sync()
        finally:
            with self._lock:
                self._dead = Closed("the log is closed")
                for segment in [*self._unsynced, self._tail.segment]:
                    if segment is not None:
                        segment.file.close()
            self._pool.close()

    # --- reading ---

    def replay(self, from_index: int) -> Iterator[Frame]:
        """Entries from `from_index` on up to the `last_index` of now, in order.

        `from_index` lies in first_index..last_index+1. Reads from disk and checks every frame.
        """
        with self._lock:
            assert self._first_index <= from_index <= self._last_index + 1
            last = self._last_index
            ends = {self._tail.segment: self._tail.end}
            pieces = [
                Piece(s.number, s.base, s.tag, s.begin.previous_crc, ends.get(s, s.end))
                for s in self._segments
                if s.begin is not None
            ]
            voids = list(self._void_after)
        return replay(self._disk, self._directory, pieces, voids, from_index, last)


def _write_again(segment: Segment, offset: int) -> None:
    """Its frames from `offset` on, as they are."""
    while offset < segment.end:
        data = segment.file.pread(min(_REWRITE_BYTES, segment.end - offset), offset)
        segment.file.pwrite(data, offset)
        offset += len(data)


def _make_durable_directory(disk: Disk, directory: str) -> None:
    disk.make_directory(directory)
    try:
        disk.sync_directory(directory)  # an earlier process may have failed to
        while directory:
            directory = directory.rpartition("/")[0]
            disk.sync_directory(directory)
    except OSError as error:
        raise SyncFailed(f"fsync of the directory of the log failed: {error}") from error
