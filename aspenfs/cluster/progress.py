"""Progress: what a leader knows of one member's log, and how much it may send it.

Belongs here: etcd's `tracker.Progress` and `Inflights`. Not here: who is a member (`tracker.py`), sending
(`replication.py`).

    PROBE      where the logs agree is a guess: one append at a time
    REPLICATE  it is known: appends are sent ahead of their answers, as many as `Inflights` allows
    SNAPSHOT   the member is fetching a snapshot: nothing is sent
"""

from collections import deque
from enum import IntEnum
from typing import NamedTuple


class ProgressState(IntEnum):
    PROBE = 0
    REPLICATE = 1
    SNAPSHOT = 2


class ProgressView(NamedTuple):
    """For people: how far a member is, as its leader knows."""

    state: ProgressState
    match: int
    next: int
    active: bool  # it answered within the last election timeout
    learner: bool
    snapshot: int  # index of the one that it was told to fetch, or 0
    inflight: int  # appends not yet answered


class Inflights:
    """Appends on their way to one member: the index of each one's last entry, and its bytes."""

    __slots__ = ("_appends", "_bytes", "_bytes_max", "_messages_max")

    def __init__(self, messages_max: int, bytes_max: int) -> None:
        self._messages_max, self._bytes_max = messages_max, bytes_max
        self._appends: deque[tuple[int, int]] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._appends)

    @property
    def full(self) -> bool:
        return len(self._appends) >= self._messages_max or self._bytes >= self._bytes_max

    def add(self, index: int, size: int) -> None:
        assert not self.full, "more appends on their way than allowed"
        self._appends.append((index, size))
        self._bytes += size

    def free_to(self, index: int) -> None:
        """Those whose last entry is `index` or before have arrived."""
        appends = self._appends
        while appends and appends[0][0] <= index:
            self._bytes -= appends.popleft()[1]

    def clear(self) -> None:
        self._appends.clear()
        self._bytes = 0


class Progress:
    """One member's, as the leader sees it. `match` < `next` always; `match` is on that member's disk."""

    __slots__ = (
        "held", "inflights", "match", "next", "paused", "pending_snapshot", "read_round", "recently_active",
        "sent_commit", "silent", "state", "wanted",
    )  # fmt: skip

    def __init__(self, next_index: int, inflights: Inflights, *, recently_active: bool = False) -> None:
        self.state = ProgressState.PROBE
        self.match = 0
        self.held = 0  # in its log, on disk or not; as far as it was asked to tell
        self.next = next_index
        self.inflights = inflights
        self.paused = False  # until a heartbeat is answered: PROBE has sent its append, REPLICATE is full
        self.wanted = False  # an append is due, even an empty one
        self.pending_snapshot = 0
        self.silent = 0  # heartbeats in a row whose answer knew nothing of the snapshot
        self.sent_commit = 0  # the highest commit index that was sent and that the member could use
        self.read_round = 0  # the last round of reads that it answered
        self.recently_active = recently_active  # cleared by each check of the quorum

    def become_probe(self) -> None:
        if self.state is ProgressState.SNAPSHOT:
            # The snapshot may have arrived: go on behind it.
            self.next = max(self.match, self.pending_snapshot) + 1
        else:
            self.next = self.match + 1
        self._reset(ProgressState.PROBE)
        self.sent_commit = min(self.sent_commit, self.next - 1)

    def become_replicate(self) -> None:
        self._reset(ProgressState.REPLICATE)
        self.next = self.match + 1

    def become_snapshot(self, index: int) -> None:
        self._reset(ProgressState.SNAPSHOT)
        self.pending_snapshot = index
        self.next = max(self.match, index) + 1
        self.sent_commit = index

    def _reset(self, state: ProgressState) -> None:
        self.state = state
        self.paused = False
        self.pending_snapshot = 0
        self.silent = 0
        self.inflights.clear()

    @property
    def is_paused(self) -> bool:
        return self.paused or self.state is ProgressState.SNAPSHOT

    def sent_entries(self, count: int, size: int) -> None:
        """`count` entries of `size` bytes in all, from `next` on, are on their way."""
        if self.state is ProgressState.REPLICATE:
            if count:
                self.next += count
                self.inflights.add(self.next - 1, size)
            self.paused = self.inflights.full
        else:
            self.paused = True

    def could_use_commit(self, commit: int) -> bool:
        """Whether an empty append would tell it more of the commit index, as far as its log goes."""
        return commit > self.sent_commit and self.sent_commit < self.next - 1

    def maybe_update(self, index: int) -> bool:
        """It has all up to `index` on disk. False: that is old news."""
        if index <= self.match:
            return False
        self.match = index
        if self.next <= index:
            self.next = index + 1
        self.paused = False
        return True

    def maybe_decrement(self, rejected: int, hint: int) -> bool:
        """It refused an append that followed `rejected`; its log may agree up to `hint`. False: old news."""
        if self.state is ProgressState.REPLICATE:
            if rejected <= self.match:
                return False
            # What was sent ahead was lost: go on behind what is known to have arrived.
            self.next = self.match + 1
        else:
            if self.next - 1 != rejected:
                return False
            self.next = max(min(rejected, hint + 1), self.match + 1)
        self.sent_commit = min(self.sent_commit, self.next - 1)
        self.paused = False
        return True
