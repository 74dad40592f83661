"""Following: what a node does on the word of a leader: appends, commits, snapshots.

Not here: whether the sender may lead (terms are checked in `raft.py`), fetching a snapshot (the owner's).
"""

from collections.abc import Sequence
from typing import Final

from aspenfs.cluster.core import FOLLOWER, LEADER, LOST_ELSEWHERE, LOST_HERE
from aspenfs.cluster.election import Election
from aspenfs.cluster.messages import TELL_HELD, Message, MessageType
from aspenfs.cluster.types import NOBODY, Entry, Snapshot

_APP_RESP: Final = MessageType.APP_RESP
_HEARTBEAT_RESP: Final = MessageType.HEARTBEAT_RESP
_HELD: Final = MessageType.HELD


class Following(Election):
    def _follow(self, leader: int) -> None:
        """A leader of this term has spoken."""
        assert self.role is not LEADER, f"nodes {self.node_id} and {leader} both lead in term {self.term}"
        if self.role is not FOLLOWER:
            self._become_follower(self.term, leader)
        elif self.leader != leader:
            assert not self.leader, f"nodes {self.leader} and {leader} both lead in term {self.term}"
            self.leader = leader
        self._election_elapsed = self._contact_elapsed = 0

    def _on_append(self, message: Message) -> None:
        index, log, entries = message.index, self.log, message.entries
        if self._wanted is not None:
            # The log will be replaced. What it took now and acknowledged would be lost with it.
            return
        if index < log.committed:
            if self._is_complete(message, index, message.log_term, entries):
                self._acknowledge(log.committed)
            return
        if entries and log.unapplied_bytes > self._bounds.unapplied:
            return  # as if it had been lost: the leader tries again, when this node has applied more
        last = log.maybe_append(index, message.log_term, entries, self.term)
        if last is None:
            if index > log.committed or self._is_complete(message, index, message.log_term, ()):
                self._refuse(message)
            return
        if message.context == TELL_HELD:
            self._send(_HELD, message.sender, index=last)  # leaves when it is written, before it is synced
        told = log.commit_to(min(message.commit, last))
        # An append that only told of a commit, behind what was acknowledged to this leader: it learns
        # nothing from an answer. If that acknowledgement was lost, its heartbeats find out.
        if entries or not told or last > self._acknowledged:
            self._acknowledge(last)

    def _is_complete(self, message: Message, index: int, log_term: int, entries: Sequence[Entry]) -> bool:
        """Whether the sender leads as one who has what is committed here (Leader Completeness, Raft §5.4).

        EntriesLost if its log, of which (index, log_term) and `entries` are a part, has something else
        there: it, and those who elected it, have lost that. False for a leader whom a later one has
        followed: from that one comes what is committed here, with a state that this node has fetched.
        """
        log = self.log
        term = log.term_at(log.committed)
        assert term is not None, "the term of the last committed entry is known"
        if term > message.term:
            return False
        lost = log.find_lost(index, log_term, entries)
        if lost is not None:
            first, theirs = lost
            own = log.term_at(first)
            self._stop(
                f"entry {first} is committed here{'' if own is None else f', of term {own}'}; but node "
                f"{message.sender}, the leader of term {message.term}, has another one there, of term "
                f"{theirs}: it has lost entries up to {log.committed}, or never had them. {LOST_ELSEWHERE}"
            )
        return True

    def _acknowledge(self, index: int) -> None:
        """All up to `index` will be on disk when this turn is: one answer for all appends of a turn."""
        self._acknowledgement = max(self._acknowledgement, index)

    def _refuse(self, message: Message) -> None:
        """With an entry that may agree: the last one here whose term is not above the leader's there."""
        log = self.log
        hint, term = log.find_conflict_by_term(min(message.index, log.last_index), message.log_term)
        self._messages_after_sync.append(
            Message(_APP_RESP, message.sender, self.node_id, self.term, term, message.index,
                    reject=True, reject_hint=hint)
        )  # fmt: skip

    def _take_acknowledgement(self) -> None:
        index = self._acknowledgement
        self._acknowledged = max(self._acknowledged, index)
        self._acknowledgement = 0
        self._messages_after_sync.append(
            Message(_APP_RESP, self.leader, self.node_id, self.term, index=index)
        )

    def _on_heartbeat(self, message: Message) -> None:
        log = self.log
        if message.commit > log.last_index:
            self._stop(
                f"node {message.sender}, the leader of term {message.term}, was promised the entries up to "
                f"{message.commit}, and the log here ends at {log.last_index}. {LOST_HERE}"
            )
        log.commit_to(message.commit)
        wanted = self._wanted
        fetching = 0 if wanted is None else wanted.index
        self._send(_HEARTBEAT_RESP, message.sender, index=fetching, context=message.context)

    # --- snapshots ---

    def _on_snapshot(self, message: Message) -> None:
        snapshot, log = message.snapshot, self.log
        assert snapshot is not None, "SNAP without a snapshot"
        if self._wanted is not None:
            return  # one is being fetched; if that fails, the leader offers again
        if snapshot.index <= log.committed:
            if self._is_complete(message, snapshot.index, snapshot.term, ()):
                self._acknowledge(log.committed)
        elif log.matches(snapshot.index, snapshot.term):
            log.commit_to(snapshot.index)
            self._acknowledge(snapshot.index)
        else:
            self._wanted = snapshot
            self._wanted_due = True

    def snapshot_installed(self, snapshot: Snapshot) -> None:
        """The owner's state and log, both durable, are those of `snapshot`, which is the one asked for by
        `Ready.snapshot` or a later one. Nothing else of the log is left."""
        assert self._wanted is not None, "a snapshot that was not asked for"
        assert snapshot.index >= self._wanted.index, (
            f"a snapshot of {snapshot.index}, not {self._wanted.index}"
        )
        self.snapshot_failed()
        self.log.reset(snapshot.index, snapshot.term)
        self._restore(snapshot.configuration)
        # Not to the leader of an earlier term than that of the state: its log may end before it.
        if self.leader and snapshot.term <= self.term:
            self._acknowledge(snapshot.index)

    def keeps_log(self, snapshot: Snapshot) -> bool:
        """The owner is about to take over a state that it has fetched of its own accord, not behind what it
        has applied: whether the log leads on from there (Log Matching, Raft §5.3), and stays.

        If not, what the log has and this state has not is of no account to anybody: it ends before
        `snapshot`, or has something else in its place. It is to be emptied then, and until
        `snapshot_installed` nothing is taken or acknowledged, as if a leader had sent that snapshot.
        """
        if self._wanted is None and self.log.matches(snapshot.index, snapshot.term):
            self.log.commit_to(snapshot.index)
            return True
        if self._wanted is None:
            assert self.role is not LEADER, f"a leader without the committed entry {snapshot.index}"
            if self.role is not FOLLOWER:
                self._become_follower(self.term, NOBODY)
            self._wanted = snapshot
        return False

    def snapshot_failed(self) -> None:
        """The snapshot asked for can not be had. The log goes on as it is; the leader offers again."""
        self._wanted = None
        self._wanted_due = False
