"""Raft: one node's part in keeping one log on many nodes, as a state machine without input or output.

Belongs here: what the owner calls, the rules of terms, handing out work. Its layers are listed in
`core.py`, its differences from etcd's raft in docs/design/raft.md, what crosses its seam in cluster.md.

The owner puts in messages, ticks and requests, then takes `ready` while `has_ready`, and carries out
what it says in its order. Methods run in one thread, and none suspends. An AssertionError says that an
invariant is broken, by this node's disk or by a program: the node must stop. So it must for EntriesLost,
which says that some node has lost what was committed: from then on the core does nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from aspenfs import errors
from aspenfs.cluster.core import CANDIDATE, LEADER, PRE_CANDIDATE, Bounds
from aspenfs.cluster.following import Following
from aspenfs.cluster.log import RaftLog
from aspenfs.cluster.messages import CAMPAIGN_TRANSFER, Message, MessageType
from aspenfs.cluster.progress import ProgressState, ProgressView
from aspenfs.cluster.types import NOBODY, Configuration, Entry, HardState, ReadState, Ready, Snapshot
from aspenfs.limits import (
    ELECTION_TICKS,
    HEARTBEAT_TICKS,
    RAFT_APPEND_BYTES_MAX,
    RAFT_APPLY_BYTES_MAX,
    RAFT_INFLIGHT_BYTES_MAX,
    RAFT_INFLIGHT_MESSAGES_MAX,
    RAFT_UNAPPLIED_BYTES_MAX,
    RAFT_UNCOMMITTED_BYTES_MAX,
)

_APP: Final = MessageType.APP
_APP_RESP: Final = MessageType.APP_RESP
_VOTE: Final = MessageType.VOTE
_VOTE_RESP: Final = MessageType.VOTE_RESP
_PRE_VOTE: Final = MessageType.PRE_VOTE
_PRE_VOTE_RESP: Final = MessageType.PRE_VOTE_RESP
_SNAP: Final = MessageType.SNAP
_HEARTBEAT: Final = MessageType.HEARTBEAT
_HEARTBEAT_RESP: Final = MessageType.HEARTBEAT_RESP
_HELD: Final = MessageType.HELD
_READ_INDEX: Final = MessageType.READ_INDEX
_READ_INDEX_RESP: Final = MessageType.READ_INDEX_RESP
_TRANSFER_LEADER: Final = MessageType.TRANSFER_LEADER
_TIMEOUT_NOW: Final = MessageType.TIMEOUT_NOW


class Raft(Following):
    """A node. Attributes without underscore are to be read, not set: node_id, log, role, term, leader (0:
    not known), configuration, committed_in_term, transferred_in_term. `suspended` may be set: as long as it
    is, nothing is handed out for applying."""

    def __init__(
        self,
        node_id: int,
        configuration: Configuration,
        *,
        hard_state: HardState,
        entries: Sequence[Entry],
        base_index: int,
        base_term: int,
        applied: int,
        random: Callable[[int], int],
        election_ticks: int = ELECTION_TICKS,
        heartbeat_ticks: int = HEARTBEAT_TICKS,
        max_append_bytes: int = RAFT_APPEND_BYTES_MAX,
        max_inflight_messages: int = RAFT_INFLIGHT_MESSAGES_MAX,
        max_inflight_bytes: int = RAFT_INFLIGHT_BYTES_MAX,
        max_uncommitted_bytes: int = RAFT_UNCOMMITTED_BYTES_MAX,
        max_unapplied_bytes: int = RAFT_UNAPPLIED_BYTES_MAX,
        fresh: bool = False,
    ) -> None:
        """A follower, with what its owner has on disk.

        `entries`: the log behind `base_index`, whose term is `base_term`. `applied`: up to here the owner's
        state has them; `configuration` is that of this very state. A node of a new cluster begins with the
        founder alone as configuration, and so does, at base 0, one that joins and gets the log from its
        beginning. `random(n)`: uniform in 0..n-1. `fresh`: this node id was never run before, so it has
        promised nobody anything.
        """
        log = RaftLog(base_index, base_term, entries, applied)
        assert log.last_term <= hard_state.term, "the log is of a later term than the node"
        changes = log.configurations_between(applied, log.last_index)
        # An only voter has promised nobody anything; unless there were others since.
        only_voter = configuration.voters == (node_id,) and not configuration.outgoing and not changes
        super().__init__(
            node_id,
            configuration,
            log,
            hard_state,
            election_ticks=election_ticks,
            heartbeat_ticks=heartbeat_ticks,
            random=random,
            bounds=Bounds(
                append=max_append_bytes,
                inflight_messages=max_inflight_messages,
                inflight=max_inflight_bytes,
                uncommitted=max_uncommitted_bytes,
                unapplied=max_unapplied_bytes,
            ),
            promised=not (fresh or only_voter),
        )
        # The commit index is not stored, but a leader appends a change of the configuration only when it
        # has applied the one before. So all but the last of those in the log are committed. Without this,
        # a node that crashed could stand for election with a majority of long ago.
        if len(changes) > 1:
            log.commit_to(changes[-2])

    # --- input ---

    def tick(self) -> None:
        """The unit of time has passed."""
        if self.stopped is not None:
            return
        self._contact_elapsed += 1
        if self.role is LEADER:
            self._tick_leader()
        else:
            self._tick_election()

    def step(self, message: Message) -> None:
        """A message of another node, which is who it says it is. Any may be lost, late, or come twice.
        EntriesLost, and then each time."""
        if self.stopped is not None:
            raise self.stopped.with_traceback(None)
        if message.to != self.node_id or message.sender == self.node_id:
            return
        if message.reject and message.commit:
            self._learn_from_refusal(message)
        if message.term != self.term and not self._settle_term(message):
            return
        kind = message.type
        if kind is _APP:
            self._follow(message.sender)
            self._on_append(message)
        elif kind is _HEARTBEAT:
            self._follow(message.sender)
            self._on_heartbeat(message)
        elif kind is _SNAP:
            self._follow(message.sender)
            self._on_snapshot(message)
        elif kind is _VOTE or kind is _PRE_VOTE:
            if not self._loyal or self._vote == message.sender:
                self._on_vote_request(message)
        elif kind is _TIMEOUT_NOW:
            self._on_timeout_now()
        elif kind is _READ_INDEX_RESP:
            self._read_states.append(ReadState(message.context, message.index))
        elif self.role is LEADER:
            self._step_leader(kind, message)
        elif kind is _VOTE_RESP:
            if self.role is CANDIDATE:
                self._on_vote_response(message)
        elif (
            kind is _PRE_VOTE_RESP
            and self.role is PRE_CANDIDATE
            and (message.reject or message.term > self.term)
        ):
            self._on_vote_response(message)

    def _settle_term(self, message: Message) -> bool:
        """A message of another term than this node's: whether it counts, now that the term is settled."""
        kind, term = message.type, message.term
        if term > self.term:
            if kind is _PRE_VOTE:
                return not self._loyal
            if kind is _PRE_VOTE_RESP and not message.reject:
                return term == self.term + 1  # of the term that would follow this one
            if kind is _VOTE:
                if message.context == CAMPAIGN_TRANSFER:
                    self._contact_elapsed = self._election_ticks  # the leader itself wants it
                elif self._loyal:
                    return False
            self._become_follower(term, NOBODY)
            return True
        if kind is _APP or kind is _HEARTBEAT:
            # A leader of an earlier term that this node was cut off from, while its own term rose. Silence
            # would leave things so: the leader does not hear of the term, and this node can not be elected.
            self._send(_APP_RESP, message.sender)
        elif kind is _PRE_VOTE:
            self._messages.append(self._vote_answer(_PRE_VOTE_RESP, message.sender, self.term, grant=False))
        return False

    def _step_leader(self, kind: MessageType, message: Message) -> None:
        if kind is _APP_RESP:
            self._on_append_response(message)
        elif kind is _HELD:
            self._on_held(message)
        elif kind is _HEARTBEAT_RESP:
            self._on_heartbeat_response(message)
        elif kind is _READ_INDEX:
            if not self._leaving:
                self._reads.ask(message.sender, message.context)
        elif kind is _TRANSFER_LEADER:
            with suppress(errors.InvalidArgument):  # the asker sees that nothing happens
                self.transfer_leader(message.index)

    def persisted(self, index: int, term: int) -> None:
        """The owner's log is durable up to the entry `index`, which had `term` when it was written.

        Not the term of what stands there now: the entry may have been replaced since the sync began.
        """
        if self.log.persisted_to(index, term) and self.role is LEADER:
            self._own_log_persisted()

    def applied_to(self, index: int) -> None:
        """The owner has applied what `ready` handed out as committed, up to `index`."""
        self.log.applied_to(index)
        self._leave_joint_if_due()

    def compact(self, index: int) -> None:
        """Forgets entries up to `index`, which are applied. Who needs them gets a snapshot."""
        self.log.compact(index)

    def set_snapshot(self, snapshot: Snapshot) -> None:
        """The state that the owner has for others; a later one when asked for it is as good."""
        self._snapshot = snapshot

    def report_unreachable(self, node: int) -> None:
        """What was sent to `node` lately may be lost: its link broke."""
        progress = self._progress.get(node)
        if self.role is LEADER and progress is not None and progress.state is ProgressState.REPLICATE:
            progress.become_probe()

    def report_snapshot(self, node: int, ok: bool) -> None:
        """`node` has fetched a snapshot, or failed to. It says so itself in time; this is faster."""
        progress = self._progress.get(node)
        if self.role is LEADER and progress is not None and progress.state is ProgressState.SNAPSHOT:
            self._snapshot_ended(progress, ok=ok)
            progress.paused = True  # until it answers: with its new log's end, or a heartbeat

    # --- output ---

    @property
    def _applies(self) -> bool:
        return self._wanted is None and not self.suspended

    @property
    def has_ready(self) -> bool:
        log, known = self.log, self._hard_state
        return self.stopped is None and bool(
            self._messages
            or self._append_due
            or self._acknowledgement
            or self._messages_after_sync
            or log.written < log.last_index
            or (log.has_next_committed and self._applies)
            or self._read_states
            or self.term != known.term
            or self._vote != known.vote
            or self._wanted_due
            or (self._reads.waiting and self.committed_in_term)
        )

    def ready(self) -> Ready:
        """All that is to be done now; it counts as handed over."""
        if self._append_due:
            self._send_due()
        if self._leaving and self.log.committed >= self._leaving:
            self._leave()
        if self._reads.waiting and self.committed_in_term:
            self._start_round()
        if self._acknowledgement:
            self._take_acknowledgement()
        log = self.log
        truncate_after, entries = log.take_truncation(), log.take_unwritten()
        hard_state = None
        if self.term != self._hard_state.term or self._vote != self._hard_state.vote:
            hard_state = self._hard_state = HardState(self.term, self._vote)
        messages, self._messages = self._messages, []
        after_sync, self._messages_after_sync = self._messages_after_sync, []
        if self._term_unsynced:
            messages, after_sync = [], messages + after_sync
        reads, self._read_states = self._read_states, []
        snapshot = self._wanted if self._wanted_due else None
        self._wanted_due = False
        committed = log.take_committed(RAFT_APPLY_BYTES_MAX) if self._applies else []
        must_sync = bool(entries) or hard_state is not None or truncate_after is not None
        return Ready(
            truncate_after, entries, hard_state, must_sync, messages, after_sync, snapshot, committed, reads
        )

    # --- looking at it ---

    @property
    def commit(self) -> int:
        return self.log.committed

    @property
    def last_index(self) -> int:
        return self.log.last_index

    def progress(self) -> dict[int, ProgressView]:
        """On the leader: how far each member is."""
        if self.role is not LEADER:
            return {}
        learners = self.configuration.learners
        return {
            node: ProgressView(each.state, each.match, each.next, each.recently_active, node in learners,
                               each.pending_snapshot, len(each.inflights))
            for node, each in self._progress.items()
        }  # fmt: skip
