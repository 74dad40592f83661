"""Replication: a leader brings the others' logs to where its own is, and commits what a quorum has.

Belongs here: becoming leader, appends, heartbeats, snapshots offered, flow control, the answers to all
of these, the check that a quorum still answers. Not here: where entries come from (`leading.py`), what
a follower does (`following.py`).

Nothing is sent while input is taken in: it is noted that something is due, and `_send_due` sends it at
the end of the turn. So a turn that takes in many proposals and answers sends one append a member.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Final

from aspenfs.cluster.core import CANDIDATE, LEADER, LOST_ELSEWHERE, Core
from aspenfs.cluster.messages import TELL_HELD, Message, MessageType
from aspenfs.cluster.progress import Progress, ProgressState
from aspenfs.cluster.quorum import VoteResult, joint_vote
from aspenfs.cluster.readonly import Question
from aspenfs.cluster.types import NOBODY, Entry, EntryKind, ReadState, Snapshot

_APP: Final = MessageType.APP
_HEARTBEAT: Final = MessageType.HEARTBEAT
_PROBE: Final = ProgressState.PROBE
_REPLICATE: Final = ProgressState.REPLICATE
_SNAPSHOT: Final = ProgressState.SNAPSHOT
_WAITING_MAX: Final = 1_000  # entries, for one who can wait
_SILENT_MAX: Final = 2  # answers that know nothing of a snapshot: one may have crossed the offer

match = attrgetter("match")
read_round = attrgetter("read_round")
_new = tuple.__new__


def _held(progress: Progress) -> int:
    return max(progress.held, progress.match)


class Replication(Core):
    # --- leadership begins and ends ---

    def _become_leader(self) -> None:
        assert self.role is CANDIDATE, f"a leader that was {self.role.name}"
        self._reset(self.term)
        self.role = LEADER
        self.leader = self.node_id
        self.can_wait = ()
        log = self.log
        for node in self._progress:
            self._progress[node] = progress = self._new_progress()
            progress.next = log.last_index + 1
            progress.recently_active = False
        own = self._progress[self.node_id]
        own.match = log.persisted
        self._term_start = log.last_index + 1
        self._held_wanted = 0
        # Entries of earlier terms may hold a change of the configuration: all must be applied first.
        self._pending_change = log.last_index
        self._look_if_alone()
        if self._quietly and self._alone and log.applied == log.last_index:
            self.committed_in_term = True
        else:
            self._append([(int(EntryKind.NORMAL), b"")])

    def _append(self, entries: Sequence[tuple[int, bytes]]) -> int:
        """The leader's own: (kind, data) pairs become entries. The index of the first."""
        term, first = self.term, self.log.last_index + 1
        self.log.append(
            [_new(Entry, (term, index, kind, data)) for index, (kind, data) in enumerate(entries, first)]
        )
        self._append_due = True
        return first

    def _check_quorum(self) -> None:
        """A leader whom a quorum has not answered for an election timeout steps down (Raft §6.2)."""
        progress = self._progress
        if self.node_id in progress:
            progress[self.node_id].recently_active = True
        configuration = self.configuration
        active = joint_vote(
            [progress[node].recently_active for node in configuration.voters],
            [progress[node].recently_active for node in configuration.outgoing],
        )
        if active is not VoteResult.WON:
            self._become_follower(self.term, NOBODY)
            return
        for node, each in progress.items():
            each.recently_active = node == self.node_id

    # --- sending ---

    def _send_due(self) -> None:
        """Sends each member what there is for it."""
        self._append_due = False
        for node, progress in self._progress.items():
            waits = (
                node in self.can_wait
                and progress.state is _REPLICATE
                and not progress.wanted
                and self.log.last_index - progress.next < _WAITING_MAX
            )
            if node != self.node_id and not waits:
                self._send_appends(node, progress)
        self._cuts.clear()

    def _send_appends(self, node: int, progress: Progress) -> None:
        """As much as flow control allows; an empty one if it is wanted, or tells more of the commit index."""
        even_empty = progress.wanted or (
            not self.tells_late and progress.could_use_commit(self.log.committed)
        )
        progress.wanted = False
        while not progress.is_paused and self._send_append(node, progress, even_empty):
            even_empty = False

    def _send_append(self, node: int, progress: Progress, even_empty: bool) -> bool:
        log = self.log
        first, last = progress.next, log.last_index
        if first > last and not even_empty:
            return False
        previous_term = log.term_at(first - 1)
        if previous_term is None:
            return self._send_snapshot(node, progress)
        entries: list[Entry] = []
        # Where appends on their way may all have been lost, an empty one finds out.
        if progress.state is not _REPLICATE or not progress.inflights.full:
            entries = self._cut(first, last)
        if not entries and not even_empty:
            return False
        context = TELL_HELD if entries and first <= self._held_wanted else b""
        self._messages.append(_new(Message, (_APP, node, self.node_id, self.term, previous_term, first - 1,
                                             log.committed, entries, False, 0, context, None)))  # fmt: skip
        progress.sent_entries(len(entries), log.bytes_between(first - 1, first - 1 + len(entries)))
        progress.sent_commit = log.committed
        return True

    def _cut(self, first: int, last: int) -> list[Entry]:
        """Entries for one append: members at the same point get the same list, to be encoded once."""
        entries = self._cuts.get(first)
        if entries is None:
            entries = self._cuts[first] = self.log.slice(first, last, self._bounds.append)
        return entries

    def _send_snapshot(self, node: int, progress: Progress) -> bool:
        """What it needs is compacted: it shall fetch a state. Not if it is silent, for it would not hear."""
        if not progress.recently_active:
            return False
        snapshot = self._offer()
        progress.become_snapshot(snapshot.index)
        self._send(MessageType.SNAP, node, snapshot=snapshot)
        return True

    def _offer(self) -> Snapshot:
        """The state that the owner offers; without one, or with one that the log does not reach back to,
        that of the applied index, which it is about to have."""
        snapshot, log = self._snapshot, self.log
        if snapshot is not None and snapshot.index >= log.compacted:
            return snapshot
        term = log.term_at(log.applied)
        assert term is not None, "applied entries are not compacted beyond"
        return Snapshot(log.applied, term, self.configuration)

    def _send_heartbeats(self, context: bytes = b"") -> None:
        committed = self.log.committed
        for node, progress in self._progress.items():
            if node != self.node_id:
                # Not beyond what it is known to have: the rest of its log may be another leader's.
                self._send(_HEARTBEAT, node, commit=min(progress.match, committed), context=context)

    # --- answers ---

    def _on_append_response(self, message: Message) -> None:
        progress = self._progress.get(message.sender)
        if progress is None:
            return
        progress.recently_active = True
        if message.reject:
            self._append_refused(message, progress)
            return
        index, log = message.index, self.log
        if index > log.last_index:
            # It got no such entry from this leader: it is committed, or was when this term began.
            self._stop(
                f"node {message.sender} has entries up to {index} that are committed, and the log of this "
                f"leader of term {self.term} ends at {log.last_index}: here they are lost. {LOST_ELSEWHERE}"
            )
        if not progress.maybe_update(index) and not (progress.match == index and progress.state is _PROBE):
            return
        if progress.state is _PROBE:
            progress.become_replicate()
        elif progress.state is _REPLICATE:
            progress.inflights.free_to(index)
        elif progress.match >= log.compacted:
            progress.become_replicate()
        if index > log.committed:
            self._maybe_commit()
        if progress.next <= log.last_index or progress.could_use_commit(log.committed):
            self._append_due = True
        if message.sender == self._transferee and progress.match == log.last_index:
            self._send_timeout_now()

    def _append_refused(self, message: Message, progress: Progress) -> None:
        hint = message.reject_hint
        progress.held = progress.match  # it may have lost what was not on its disk
        if message.log_term:
            # Its entries after the hint are of terms above log_term; ours of terms above that can not
            # match its entry there. Both sides skipping whole terms, few probes are needed.
            hint, _ = self.log.find_conflict_by_term(hint, message.log_term)
        if progress.maybe_decrement(message.index, hint):
            if progress.state is _REPLICATE:
                progress.become_probe()
            progress.wanted = self._append_due = True

    def _on_heartbeat_response(self, message: Message) -> None:
        progress = self._progress.get(message.sender)
        if progress is None:
            return
        progress.recently_active = True
        throttled = progress.paused
        progress.paused = False
        self._follow_fetching(progress, message.index)
        if message.context:
            self._on_round_answered(progress, message.context)
        # What was sent ahead may be lost, and nobody would notice. Answers to rounds of reads, of which
        # there may be hundreds a second, are no occasion, unless something waits for one.
        if progress.state is _PROBE or (
            progress.match < self.log.last_index and (throttled or not message.context)
        ):
            progress.wanted = self._append_due = True

    def _follow_fetching(self, progress: Progress, index: int) -> None:
        """It says which snapshot it is fetching, 0 for none: so a fetch that died is noticed."""
        if index:
            if index > progress.match and index <= self.log.last_index:
                if progress.state is not _SNAPSHOT:
                    progress.become_snapshot(index)  # another leader had offered it
                progress.silent = 0
        elif progress.state is _SNAPSHOT:
            progress.silent += 1
            if progress.silent >= _SILENT_MAX:
                self._snapshot_ended(progress, ok=False)

    def _snapshot_ended(self, progress: Progress, *, ok: bool) -> None:
        if not ok:
            progress.pending_snapshot = 0
        progress.become_probe()

    # --- what others have, before it is on their disks ---

    def want_held(self, index: int) -> None:
        """Whoever is sent entries up to this one shall say at once that it has them in its log."""
        self._held_wanted = max(self._held_wanted, index)

    def _on_held(self, message: Message) -> None:
        progress = self._progress.get(message.sender)
        if progress is not None and message.index <= self.log.last_index:
            progress.recently_active = True
            progress.held = max(progress.held, message.index)

    @property
    def held(self) -> int:
        """On a leader: entries up to this one are in the logs of a quorum, though perhaps not on their disks;
        0 if those of this term are not. As long as each of these keeps its log, whoever leads next has
        them: the argument of Raft §5.4.3, with logs for disks."""
        if self.role is not LEADER:
            return 0
        own = self._progress.get(self.node_id)
        if own is not None:
            own.held = self.log.written
        index = self._quorum_of(_held)
        return index if self.log.term_at(index) == self.term else 0

    # --- committing ---

    def _maybe_commit(self) -> bool:
        """Commits what a quorum has on disk, if it is of this term: an entry of an earlier one is committed
        only by one of this term behind it (Raft §5.4.2)."""
        index, log = self._quorum_of(match), self.log
        if index <= log.committed or log.term_at(index) != self.term:
            return False
        log.commit_to(index)
        self.committed_in_term = True
        self._append_due = True
        return True

    def tell(self, nodes: Iterable[int] | None = None, *, commit: int | None = None) -> None:
        """A leader that tells late: these, or all, shall have now what is in the log, and hear of what is
        committed, or of this commit index. Nothing is sent to those who know."""
        if self.role is not LEADER:
            return
        last, commit = self.log.last_index, self.log.committed if commit is None else commit
        for node in self._progress if nodes is None else nodes:
            progress = self._progress.get(node)
            if progress is not None and (progress.next <= last or progress.could_use_commit(commit)):
                progress.wanted = self._append_due = True

    def nearest(self) -> list[int]:
        """The other voters that a leader is in step with, who is furthest first."""
        ranked = [
            (-progress.match, node)
            for node, progress in self._progress.items()
            if node != self.node_id and node in self.configuration.voters and progress.state is _REPLICATE
        ]
        return [node for _, node in sorted(ranked)]

    def _own_log_persisted(self) -> None:
        """The leader counts itself, for what is on its own disk."""
        own = self._progress.get(self.node_id)
        persisted = self.log.persisted
        if own is not None and own.maybe_update(persisted):
            if persisted >= self._term_start:
                self._term_unsynced = False
            if persisted > self.log.committed:
                self._maybe_commit()

    # --- rounds of reads ---

    def _start_round(self) -> None:
        """One round for all who wait; or an answer at once, where nobody else is a voter."""
        reads = self._reads
        if self._is_only_voter:
            self._answer(self.log.committed, reads.take_waiting())
        else:
            self._send_heartbeats(reads.start(self.log.committed))
            self._progress[self.node_id].read_round = reads.last

    def _on_round_answered(self, progress: Progress, context: bytes) -> None:
        number = self._reads.round_of(context)
        if number > progress.read_round:
            progress.read_round = number
            for index, asked in self._reads.confirm(self._quorum_of(read_round)):
                self._answer(index, asked)

    def _answer(self, index: int, asked: Sequence[Question]) -> None:
        for node, context in asked:
            if node == self.node_id:
                self._read_states.append(ReadState(context, index))
            else:
                self._send(MessageType.READ_INDEX_RESP, node, index=index, context=context)

    def _send_timeout_now(self) -> None:
        self._send(MessageType.TIMEOUT_NOW, self._transferee)
