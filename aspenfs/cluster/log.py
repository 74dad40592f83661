"""RaftLog: the entries that a node has in memory, and how far they are written, durable, committed, applied.

Belongs here: matching and truncating (Raft §5.3), the marks, counting bytes. Not here: files (the owner
writes what `Ready` hands it), terms and votes, who may commit.

    compacted <= applied <= applying <= committed <= last        persisted <= written <= last

Entries up to `compacted` are gone from memory, and of these only the last one's term is known. What is
committed but not yet durable here is not handed out for applying.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import Final

from aspenfs.cluster.types import Entry, EntryKind
from aspenfs.limits import RAFT_APPEND_ENTRIES_MAX

ENTRY_OVERHEAD_BYTES: Final = 64  # counted beside an entry's data: a log of empty entries is no empty log

_term = attrgetter("term")
_CONFIGURATION: Final = int(EntryKind.CONFIGURATION)


class RaftLog:
    """A log of which entries up to `compacted` are gone. All marks are indices of entries."""

    __slots__ = (
        "_ends", "_entries", "_start", "_truncated_in", "_truncated_to", "applied", "applying", "committed",
        "compacted", "compacted_term", "last_index", "persisted", "written",
    )  # fmt: skip

    def __init__(self, compacted: int, compacted_term: int, entries: Sequence[Entry], applied: int) -> None:
        """`entries` follow `compacted` and are durable; `applied` is one of them, or `compacted`."""
        last = compacted + len(entries)
        for position, entry in enumerate(entries, compacted + 1):
            assert entry.index == position, f"entry {entry.index} where {position} should be"
        assert compacted <= applied <= last, f"applied {applied} of a log from {compacted} to {last}"
        self._entries = list(entries)
        # Bytes of all entries up to each one, and up to `compacted`, since the log was made.
        self._start = 0
        self._ends: list[int] = []
        self._count(entries)
        self.compacted, self.compacted_term = compacted, compacted_term
        self.last_index = self.written = self.persisted = last
        self.committed = self.applying = self.applied = applied
        self._truncated_to: int | None = None  # entries above it that were handed to the owner are void
        self._truncated_in = 0  # the node's term when entries were last made void

    # --- looking at it ---

    @property
    def last_term(self) -> int:
        return self._entries[-1].term if self._entries else self.compacted_term

    def term_at(self, index: int) -> int | None:
        """None for what is compacted, or not there yet."""
        position = index - self.compacted - 1
        if 0 <= position < len(self._entries):
            return self._entries[position].term
        return self.compacted_term if position == -1 else None

    def matches(self, index: int, term: int) -> bool:
        return self.term_at(index) == term

    def is_up_to_date(self, index: int, term: int) -> bool:
        """Whether a log that ends so has at least what this one has (Raft §5.4.1)."""
        own = self.last_term
        return term > own or (term == own and index >= self.last_index)

    def slice(self, low: int, high: int, bytes_max: int) -> list[Entry]:
        """Entries low..high, as many as fit into `bytes_max`, but at least one. `low` is not compacted."""
        first = low - self.compacted - 1
        assert first >= 0, f"entry {low} is compacted"
        stop = min(high - self.compacted, len(self._entries), first + RAFT_APPEND_ENTRIES_MAX)
        if first >= stop:
            return []
        before = self._ends[first - 1] if first else self._start
        if self._ends[stop - 1] - before > bytes_max:
            stop = max(bisect_right(self._ends, before + bytes_max, first, stop), first + 1)
        return self._entries[first:stop]

    def bytes_between(self, after: int, last: int) -> int:
        """Bytes of the entries after..last, without the first; what is compacted counts nothing."""
        ends, compacted = self._ends, self.compacted
        if last <= compacted:
            return 0
        end = ends[last - compacted - 1]
        return end - (ends[after - compacted - 1] if after > compacted else self._start)

    @property
    def bytes(self) -> int:
        """All that is in memory."""
        return self._ends[-1] - self._start if self._ends else 0

    @property
    def unapplied_bytes(self) -> int:
        """Of what is committed and durable here: it waits for nobody but the owner."""
        return self.bytes_between(self.applied, max(self.applied, min(self.committed, self.persisted)))

    def index_of_tail(self, size: int) -> int:
        """The index behind which the log has at most `size` bytes."""
        if self.bytes <= size:
            return self.compacted
        return self.compacted + 1 + bisect_left(self._ends, self._ends[-1] - size)

    def configurations_between(self, after: int, last: int) -> list[int]:
        """Indices of the CONFIGURATION entries among after..last, without the first."""
        entries = self._entries[max(after, self.compacted) - self.compacted : max(last - self.compacted, 0)]
        return [entry.index for entry in entries if entry.kind == _CONFIGURATION]

    # --- growing and shrinking ---

    def append(self, entries: Sequence[Entry]) -> None:
        """Entries that follow the last one."""
        assert entries[0].index == self.last_index + 1, f"entry {entries[0].index} after {self.last_index}"
        self._entries += entries
        self._count(entries)
        self.last_index += len(entries)

    def append_written(self, entry: Entry) -> None:
        """One entry, which the owner has written to its log itself, as it has all before."""
        last = self.last_index
        assert self.written == last, "entries have not been handed to the owner"
        assert entry[1] == last + 1
        self._entries.append(entry)
        ends = self._ends
        ends.append((ends[-1] if ends else self._start) + len(entry[3]) + ENTRY_OVERHEAD_BYTES)
        self.last_index = self.written = last + 1

    def _count(self, entries: Sequence[Entry]) -> None:
        ends = self._ends
        end = ends[-1] if ends else self._start
        for entry in entries:
            end += len(entry[3]) + ENTRY_OVERHEAD_BYTES
            ends.append(end)

    def maybe_append(self, index: int, log_term: int, entries: Sequence[Entry], term: int) -> int | None:
        """Makes the log agree with a leader's of `term`: its `entries` follow (index, log_term).

        The index of the last of them, or None if this log does not have the one that they follow.
        """
        if not self.matches(index, log_term):
            return None
        last = index + len(entries)
        if entries:
            if index == self.last_index:
                self.append(entries)
            else:
                conflict = self._find_conflict(index, entries)
                if conflict:
                    self._truncate(conflict - 1, term)
                    self.append(entries[conflict - index - 1 :])
        return last

    def _find_conflict(self, index: int, entries: Sequence[Entry]) -> int:
        """The index of the first of `entries` that this log has not, or has otherwise; 0 if there is none."""
        own = self._entries
        position = index - self.compacted
        for entry in entries:
            if position >= len(own) or own[position].term != entry.term:
                return entry.index
            position += 1
        return 0

    def find_lost(self, index: int, log_term: int, entries: Sequence[Entry]) -> tuple[int, int] | None:
        """(index, term) of what another log has where this one has another entry that is committed.

        `entries` follow (index, log_term) there. Of what is compacted here, only this is known: along a log,
        terms do not fall.
        """
        ended, compacted = self.committed, self.compacted
        for position, term in ((index, log_term), *((entry.index, entry.term) for entry in entries)):
            if position > ended:
                break
            own = self.term_at(position) if position >= compacted else None
            if (own is None and term > self.compacted_term) or own not in (None, term):
                return position, term
        return None

    def _truncate(self, index: int, term: int) -> None:
        """Makes void what lies above `index`, on the word of a leader of `term`."""
        if index >= self.last_index:
            return
        assert index >= self.committed, (
            f"{self.committed} are committed, the leader voids those above {index}"
        )
        keep = index - self.compacted
        del self._entries[keep:], self._ends[keep:]
        self.last_index = index
        if index < self.written:
            self.written = index
            self._truncated_to = index if self._truncated_to is None else min(self._truncated_to, index)
        self.persisted = min(self.persisted, index)
        self._truncated_in = term

    def find_conflict_by_term(self, index: int, term: int) -> tuple[int, int]:
        """(index, term) of the last entry up to `index` whose term is not above `term`: logs may agree there.

        Term 0: what lies there is compacted, so nobody knows.
        """
        entries, compacted = self._entries, self.compacted
        if index > self.last_index:
            return index, 0
        if index > compacted:
            found = bisect_right(entries, term, 0, index - compacted, key=_term)
            if found:
                entry = entries[found - 1]
                return entry.index, entry.term
        if index >= compacted and self.compacted_term <= term:
            return compacted, self.compacted_term
        return max(min(index, compacted - 1), 0), 0

    def compact(self, index: int) -> None:
        """Forgets entries up to `index`, which are applied; nothing, if they are forgotten."""
        count = index - self.compacted
        if count <= 0:
            return
        assert index <= self.applied, f"compaction to {index} with {self.applied} applied"
        self.compacted_term = self._entries[count - 1].term
        self._start = self._ends[count - 1]
        del self._entries[:count], self._ends[:count]
        self.compacted = index

    def reset(self, index: int, term: int) -> None:
        """Nothing is left but a state of everything up to `index`, which is durable.

        Late news of syncs do no harm: entries that were above `index` did not match there, so none
        of them comes back.
        """
        self._entries, self._ends = [], []
        self._start = 0
        self.compacted, self.compacted_term = index, term
        self.last_index = self.written = self.persisted = index
        self.committed = self.applying = self.applied = index
        self._truncated_to = None

    # --- marks ---

    def take_truncation(self) -> int | None:
        """Entries above it, which the owner has written, are void; None if there are none such."""
        index = self._truncated_to
        self._truncated_to = None
        return index

    def take_unwritten(self) -> list[Entry]:
        """Entries for the owner to write; it has them now."""
        if self.written == self.last_index:
            return []
        entries = self._entries[self.written - self.compacted :]
        self.written = self.last_index
        return entries

    def persisted_to(self, index: int, term: int) -> bool:
        """The owner's disk has everything up to the entry (index, term). False: that is old news.

        A sync that began before entries were made void may speak of those. Mostly their terms tell them
        from what took their place. Where an entry came back under its old term, nothing does; but
        whatever was there before the truncation is of a term before that of the node then. So what an
        entry of an older term says is not believed: the entries of the leader's own term follow.
        """
        if index <= self.persisted or index > self.written or term < self._truncated_in:
            return False
        if self.term_at(index) != term:
            return False
        self.persisted = index
        return True

    def commit_to(self, index: int) -> bool:
        """Entries up to `index` are committed. False: that is old news."""
        if index <= self.committed:
            return False
        assert index <= self.last_index, (
            f"entry {index} is committed, and the log ends at {self.last_index}: it has lost entries"
        )
        self.committed = index
        return True

    @property
    def has_next_committed(self) -> bool:
        return self.applying < self.committed and self.applying < self.persisted

    def take_committed(self, bytes_max: int) -> list[Entry]:
        """Entries for the owner to apply, a bounded part; it has them now."""
        high = min(self.committed, self.persisted)
        if self.applying >= high:
            return []
        entries = self.slice(self.applying + 1, high, bytes_max)
        self.applying = entries[-1].index
        return entries

    def applied_to(self, index: int) -> None:
        assert self.applied <= index <= self.committed, f"applied {index}, committed {self.committed}"
        self.applied = index
        self.applying = max(self.applying, index)
