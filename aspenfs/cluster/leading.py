"""Leading: what a leader is asked for: entries, reads, changes of the configuration, its own succession.

Belongs here: admitting and refusing them. Not here: replicating what was admitted (`replication.py`),
what a change makes of a configuration (`membership.py`).
"""

from collections.abc import Sequence
from typing import Final

from aspenfs import errors
from aspenfs.cluster.core import FOLLOWER, LEADER
from aspenfs.cluster.log import ENTRY_OVERHEAD_BYTES
from aspenfs.cluster.membership import Changer, ConfigurationChange
from aspenfs.cluster.messages import MessageType
from aspenfs.cluster.replication import Replication, read_round
from aspenfs.cluster.types import NOBODY, Configuration, Entry, EntryKind
from aspenfs.limits import MEMBERS_MAX

_NORMAL: Final = int(EntryKind.NORMAL)
_CONFIGURATION: Final = int(EntryKind.CONFIGURATION)
_new = tuple.__new__


class Leading(Replication):
    # --- entries ---

    def propose(self, entries: Sequence[tuple[int, bytes]]) -> int:
        """Appends (kind, data) pairs to the leader's log, all or none: the index of the first.

        NotLeader: to `leader`, if it is known; also while leadership is handed over. Overloaded: too much is
        waiting to be committed, or applied here. That it was appended does not mean that it will be
        committed: entries of another leader may take its place.
        """
        self._check_leading()
        log, bounds = self.log, self._bounds
        size = ENTRY_OVERHEAD_BYTES * len(entries)
        for _, data in entries:
            size += len(data)
        uncommitted = log.bytes_between(log.committed, log.last_index)
        # One that is too large by itself gets through when nothing else is waiting.
        if (
            uncommitted and uncommitted + size > bounds.uncommitted
        ) or log.unapplied_bytes > bounds.unapplied:
            raise errors.Overloaded(
                f"{uncommitted} bytes of the log wait for a majority, {log.unapplied_bytes} to be applied"
            )
        return self._append(entries)

    def append_alone(self, kind: int, data: bytes) -> Entry:
        """The next entry of a node that is all of its cluster, which its owner writes to its log itself.

        The cheap way: no Ready repeats it; it is committed by `persisted`. `ready` must have handed out
        all entries before. Not bounded: the owner counts what it accepts.
        """
        if not self._alone:
            raise errors.NotLeader("this node is not alone", self.leader)
        log = self.log
        entry = _new(Entry, (self.term, log.last_index + 1, kind, data))
        log.append_written(entry)
        return entry

    def _check_leading(self) -> None:
        if self.role is not LEADER:
            raise errors.NotLeader(leader=self.leader)
        if self.transferring:
            raise errors.NotLeader("leadership is being handed over")

    # --- reads ---

    def read_index(self, context: bytes) -> bool:
        """Asks for an index to read at; a ReadState with `context` comes in a later Ready.

        All who ask between two Readys share a round. False: no leader is known. An answer may never come
        (the leader changed, a message was lost): ask again, with a context that no node ever used.
        """
        if self.role is LEADER:
            if self._leaving:
                return False
            self._reads.ask(self.node_id, context)
        elif self.leader:
            self._send(MessageType.READ_INDEX, self.leader, context=context)
        else:
            return False
        return True

    # --- configuration ---

    @property
    def change_pending(self) -> bool:
        """Whether a change of the configuration may be in the log and not be applied, or must be left."""
        return self._pending_change > self.log.applied or bool(self.configuration.outgoing)

    def propose_configuration(self, change: ConfigurationChange) -> int:
        """Appends a CONFIGURATION entry: its index. It counts when the owner has applied it.

        NotLeader; Busy: another change is not applied yet, or nothing of this leader's term is committed
        (then an older one may be, with a majority that this leader does not know of: Ongaro's bug of
        2015); InvalidArgument: what it asks for can not be.
        """
        self._check_leading()
        if not self.committed_in_term:
            raise errors.Busy("the leader has just been elected: try again in a moment")
        if self._pending_change > self.log.applied:
            raise errors.Busy("another change of the configuration is under way")
        configuration, _ = self._changer().apply(change)
        if len(set().union(*configuration[:4])) > MEMBERS_MAX:
            raise errors.InvalidArgument(f"a cluster has at most {MEMBERS_MAX} members")
        self._pending_change = self._append([(_CONFIGURATION, change.encode())])
        return self._pending_change

    def apply_configuration(self, change: ConfigurationChange) -> Configuration:
        """To be called as a committed CONFIGURATION entry is applied: what the configuration is from then on.

        A leader that it leaves without a vote steps down, when a majority of those who are left knows it.
        """
        try:
            configuration, progress = self._changer().apply(change)
        except errors.InvalidArgument as error:
            raise AssertionError(f"a committed change does not fit {self.configuration}: {error}") from error
        self.configuration, self._progress = configuration, progress
        self._look_if_alone()
        if self.role is LEADER:
            self._lead_changed()
        elif self.role is not FOLLOWER and not self._is_voter:
            self._become_follower(self.term, NOBODY)
        return configuration

    def _changer(self) -> Changer:
        return Changer(self.configuration, self._progress, self._new_progress)

    def _lead_changed(self) -> None:
        self._maybe_commit()  # a smaller quorum may have it already
        self._append_due = True  # new members need not wait for a heartbeat
        if not self._is_voter:
            self._begin_to_leave()
        elif self._transferee and self._transferee not in self.configuration.voters:
            self._end_transfer()
        else:
            for index, asked in self._reads.confirm(self._quorum_of(read_round)):
                self._answer(index, asked)

    def _leave_joint_if_due(self) -> None:
        """Once everything that entered the joint configuration is applied, it is left by itself."""
        if (
            self.role is LEADER
            and self.configuration.auto_leave
            and self.log.applied >= self._pending_change
            and self.committed_in_term
            and not self._transferee
        ):
            self._pending_change = self._append([(_CONFIGURATION, ConfigurationChange().encode())])

    # --- succession ---

    @property
    def transferring(self) -> bool:
        """Whether it leads and takes no proposals, because another shall lead."""
        return bool(self._transferee or self._leaving)

    def _begin_to_leave(self) -> None:
        """This leader has lost its vote. Before it goes, a majority of the new voters must know that the
        change is committed: two that were one of two voters each would need this node's vote to elect
        anybody, and, its log being the longest, not get it. Whoever has one more entry knows."""
        if not self._leaving:
            self._reads.clear()
            self._transferee = NOBODY
            self._leaving = self._append([(_NORMAL, b"")])

    def _leave(self) -> None:
        """Whoever of the voters has all of the log may stand for election at once."""
        self.transferred_in_term = True
        for node in self.configuration.voters:
            if self._progress[node].match == self.log.last_index:
                self._send(MessageType.TIMEOUT_NOW, node)
                break
        self._become_follower(self.term, NOBODY)

    def transfer_leader(self, to: int) -> None:
        """Hands leadership to `to`, once its log is up to date; given up after an election timeout.

        On another node the request goes to the leader. NotLeader: there is none. InvalidArgument, on the
        leader alone: `to` is no voter. Proposals are refused until it is over. That it has worked shows
        in `term` and `leader`.
        """
        if self.role is not LEADER:
            if not self.leader:
                raise errors.NotLeader("there is no leader")
            self._send(MessageType.TRANSFER_LEADER, self.leader, index=to)
            return
        if to not in self.configuration.voters:
            raise errors.InvalidArgument(f"node {to} is no voter: it cannot lead")
        if self._leaving or to in (self.node_id, self._transferee):
            return
        # From its campaign on, others may vote for it although they have promised this leader their
        # loyalty. When that ends is not known, so no lease counts for the rest of the term.
        self.transferred_in_term = True
        self._transferee = to
        self._election_elapsed = 0
        progress = self._progress[to]
        if progress.match == self.log.last_index:
            self._send_timeout_now()
        else:
            progress.wanted = self._append_due = True

    def _end_transfer(self) -> None:
        self._transferee = NOBODY
        self._leave_joint_if_due()

    # --- time ---

    def _tick_leader(self) -> None:
        self._heartbeat_elapsed += 1
        self._election_elapsed += 1
        if self._election_elapsed >= self._election_ticks:
            self._election_elapsed = 0
            if not self._leaving:  # it does no harm, and nobody else can tell the others
                self._check_quorum()
            if self._transferee:
                self._end_transfer()
        if self.role is LEADER and self._heartbeat_elapsed >= self._heartbeat_ticks:
            self._heartbeat_elapsed = 0
            self._send_heartbeats()
            if self._reads.pending:  # its round may have been lost
                self._send_heartbeats(self._reads.context)
