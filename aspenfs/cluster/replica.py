"""Replica: a Raft node with what its users need of it: proposals that happen once, reads, applying.

Belongs here: carrying out a `Ready` in its order, applying, time, keeping the log in memory short. In parts
of its own: proposals (`proposing.py`, `taking.py`), reads (`reading.py`), who is told when (`noticing.py`).
Not here: consensus itself (`raft.py`), the disk, the network and the state machine, which come in through
`Owner`. Pure: the real host and the simulator run this very code. Steps and their reasons:
docs/design/cluster.md.

All methods run in one thread, and none suspends. Inputs only take note; `pump` acts. So a turn of the
owner's loop may put in many proposals and messages, and pays for one write and one send a peer.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from aspenfs import errors
from aspenfs.cluster.membership import ConfigurationChange
from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.noticing import Noticing
from aspenfs.cluster.proposing import RESEND_TICKS
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.reading import Read
from aspenfs.cluster.replica_base import HEADER, NS_PER_MS, Owner, Settings
from aspenfs.cluster.types import Entry, EntryKind, Ready, Role, Snapshot
from aspenfs.limits import PROPOSAL_TIMEOUT_MS, RAFT_APPEND_BYTES_MAX, RAFT_LOG_BYTES_MAX

_LEADERLESS_WAIT_NS: Final = 2_000 * NS_PER_MS  # an election that has a majority takes less
_LOG_BYTES_MAX_ALONE: Final = 1 << 20


class Replica(Noticing):
    """One node of a cluster. See the head of this file."""

    def __init__(self, raft: Raft, owner: Owner, monotonic_ns: Callable[[], int], *, incarnation: int,
                 proposal_timeout_ms: int = PROPOSAL_TIMEOUT_MS,
                 batch_bytes: int = RAFT_APPEND_BYTES_MAX) -> None:  # fmt: skip
        """`monotonic_ns` counts suspend (CLOCK_BOOTTIME); `incarnation` is greater with each start.
        `batch_bytes`: of proposals that are sent, or go into the log, at once."""
        timeout_ns = proposal_timeout_ms * NS_PER_MS
        super().__init__(raft, owner, Settings(monotonic_ns, incarnation, timeout_ns, batch_bytes))
        self._led_ns = monotonic_ns()  # when there was a leader last
        # Durability: what waits for a ticket, in order.
        self._after_sync: deque[tuple[int, Sequence[Message]]] = deque()
        self._truncated: deque[tuple[int, int]] = deque()  # by which write, to which index
        self.stall: errors.NoSpace | None = None
        self._installing: Snapshot | None = None
        self._look()

    # --- what others ask for ---

    def receive(self, message: Message) -> None:
        """A message of another member, authenticated. EntriesLost: the node must stop."""
        if self.raft.stopped is not None:
            raise self.raft.stopped.with_traceback(None)
        kind = message.type
        if kind == MessageType.PROP:
            self._asks(message.sender)
            self._take_proposals(message)
        elif kind == MessageType.PROP_RESP:
            self._proposals_taken(message)
        elif kind == MessageType.READ_INDEX:
            self._asks(message.sender)
            self.raft.tell((message.sender,))
            # What has begun must have an index for it; else it asks again.
            if self._has_begun_in_log() and not self._answer_under_lease(message):
                self.raft.step(message)
        else:
            self.raft.step(message)

    def tick(self) -> None:
        """TICK_MS have passed. An owner that was late calls it once, not many times."""
        self._ticks += 1
        self.raft.tick()
        self._expire()
        self._resend()
        self._keep_lease()
        self.pump()

    def reminded(self) -> None:
        """The moment that `Owner.remind` was asked for has passed."""
        self._reminded()
        self.pump()

    def synced(self, ticket: int, index: int) -> None:
        """All that was written up to `ticket` is durable, and the log is up to entry `index`."""
        self._synced = max(self._synced, ticket)
        raft = self.raft
        # What stands in the log behind a truncation that this sync has not seen is not what it saw.
        truncated = self._truncated
        while truncated and truncated[0][0] <= ticket:
            truncated.popleft()
        index = min(index, raft.last_index, *(to for _, to in truncated))
        term = raft.log.term_at(index)
        while self._after_sync and self._after_sync[0][0] <= ticket:
            _, messages = self._after_sync.popleft()
            for message in messages:
                self._owner.send(message.to, message)
        if term is not None:
            raft.persisted(index, term)
        self.pump()

    def accept(self, kind: int, data: bytes) -> Entry:
        """Alone: the next entry of the log, written there by the owner already, and evaluated by it."""
        return self.raft.append_alone(kind, data)

    def change_configuration(self, change: ConfigurationChange) -> int:
        """Proposes it; its index. NotLeader, Busy (another change is under way), InvalidArgument."""
        index = self.raft.propose_configuration(change)
        self._look()
        return index

    def transfer_leader(self, to: int) -> None:
        """Starts handing leadership over; it ends by a change of term, or not at all."""
        self.raft.transfer_leader(to)

    def snapshot_installed(self, snapshot: Snapshot) -> None:
        """The state is at `snapshot`, and so is the log; waiters whose entry it may cover are told so."""
        self._installing = None
        self.raft.suspended = False
        self.raft.snapshot_installed(snapshot)
        for key, proposal in list(self._sent.items()):
            if key[0] <= snapshot.term:
                self._hidden(key, proposal, lost=key[0] < snapshot.term)
        self._look()
        self.pump()

    @property
    def installing(self) -> Snapshot | None:
        """The snapshot that the leader offered and the owner is fetching."""
        return self._installing

    def snapshot_failed(self) -> None:
        """It could not be had; the leader offers another one."""
        self._installing = None
        self.raft.snapshot_failed()
        self.pump()

    def state_is_at(self, snapshot: Snapshot) -> None:
        """The durable state has this: followers that need more than the log in memory may get it."""
        raft = self.raft
        raft.set_snapshot(snapshot)
        limit = _LOG_BYTES_MAX_ALONE if self.alone else RAFT_LOG_BYTES_MAX
        if raft.log.bytes > limit:
            raft.compact(min(snapshot.index, raft.log.applied, raft.log.index_of_tail(limit // 2)))

    def suspend(self, error: errors.AspenError) -> None:
        """The state is not to be built upon: nothing is applied until `resume`, or until a snapshot was
        installed. Everybody who waits gets `error`; what they proposed may be applied later all the same.

        The log goes on: this node votes, takes entries, and may lead.
        """
        self.raft.suspended = True
        for proposal in self._sent.values():  # their numbers stay in use: see `_hidden`
            if not proposal.expired:
                self._done.append((proposal.done, error))
                proposal.expired = self._some_expired = True
        self._end_others(error)

    def resume(self) -> None:
        """The owner's state is a good one again, not behind what was applied; the log leads on from there."""
        self.raft.suspended = False
        self._look()
        self.pump()

    def stop(self, error: errors.AspenError) -> None:
        """The node stops: everybody who waits gets `error`."""
        for proposal in self._sent.values():
            self._resolve(proposal, error)
        self._sent.clear()
        self._end_others(error)

    def _end_others(self, error: errors.AspenError) -> None:
        """Who waits for anything but a proposal that was sent."""
        for proposal in self._unsent:
            self._resolve(proposal, error)
        self._unsent.clear()
        for read in [*self._next_reads, *self._round_reads, *(read for _, read in self._ready_reads)]:
            self._done.append((read.done, error))
        self._next_reads, self._round_reads, self._ready_reads = [], [], []
        self._tell()

    # --- acting ---

    def pump(self) -> None:
        """Does all that can be done now."""
        raft = self.raft
        while True:
            if self._unsent:
                self._send_proposals()
            if self._queue:
                self._append_queue(now=bool(self._held_queued))
            if self._next_reads and not self._round:
                self._start_round()
            if self._stalled is not None and not self._write_stalled():
                break
            if raft.role is Role.LEADER and (raft.last_index, raft.commit) != self._seen:
                self._look_who_waits()
            if not raft.has_ready:
                break
            self._carry_out(raft.ready())
        if self._held and self._stalled is None:
            self._look_what_is_held()
        self._tell()

    def _carry_out(self, ready: Ready) -> None:
        """Step 1 of docs/design/cluster.md; the rest at once, or when there is room on the disk."""
        if ready.entries or ready.hard_state is not None or ready.truncate_after is not None:
            try:
                self._written = self._owner.write(ready.truncate_after, ready.entries, ready.hard_state)
            except errors.NoSpace as error:
                self._stalled, self.stall = ready, error
                return
        self._go_on(ready)

    def _write_stalled(self) -> bool:
        ready = self._stalled
        assert ready is not None
        try:
            self._written = self._owner.write(ready.truncate_after, ready.entries, ready.hard_state)
        except errors.NoSpace as error:
            self.stall = error
            return False
        self._stalled = self.stall = None
        self._go_on(ready)
        return True

    def _go_on(self, ready: Ready) -> None:
        send = self._owner.send
        if ready.truncate_after is not None:
            self._truncated.append((self._written, ready.truncate_after))
        begun = self._begun_index
        for message in ready.messages:
            if begun and message.type == MessageType.READ_INDEX_RESP:
                message = message._replace(index=max(message.index, begun))
            send(message.to, message)
        if self._written == self._synced and not ready.must_sync:
            for message in ready.messages_after_sync:
                send(message.to, message)
        elif ready.messages_after_sync or ready.must_sync:
            self._after_sync.append((self._written, ready.messages_after_sync))
            self._owner.request_sync()
        if ready.snapshot is not None and self._installing is None:
            self._installing = ready.snapshot
            self._owner.fetch_snapshot(ready.snapshot, self.raft.leader)
        if ready.committed:
            self._apply(ready.committed)
        for state in ready.reads:
            self._round_answered(state.context, state.index)
        if self._ready_reads:
            self._answer_reads()
        self._look()

    def _tell(self) -> None:
        """Calls who waited, last of all: they may ask for more."""
        while self._done:
            done, self._done = self._done, []
            for call, result in done:
                call(result)

    def _look(self) -> None:
        """Keeps `alone` true: the only voter, its leader, nothing under way that may end that."""
        raft = self.raft
        configuration = raft.configuration
        was_alone = self.alone
        self.alone = (
            raft.role is Role.LEADER
            and configuration == (configuration.voters[:1], (), (), (), False)
            and not raft.change_pending
            and raft.last_index == self._owner.revision
        )
        if self.alone and not was_alone and self._round:
            self._ask_again()  # who is alone has no ticks that would find a lost round

    # --- applying ---

    def _apply(self, committed: Sequence[Entry]) -> None:
        owner, raft = self._owner, self.raft
        evaluated = owner.revision
        for entry in committed:
            index, kind = entry.index, entry.kind
            if index <= evaluated:
                if kind != EntryKind.NORMAL or not entry.data:
                    self._passed_over(entry)
                continue  # evaluated when it was accepted, or by the node whose state this one took over
            if kind == EntryKind.PROPOSAL:
                self._apply_proposal(entry)
            elif kind == EntryKind.CONFIGURATION:
                owner.apply_configuration(
                    entry, raft.apply_configuration(ConfigurationChange.decode(entry.data))
                )
            else:
                owner.apply(entry, None)
                if not entry.data:
                    self._term_began(entry.term)
        last = committed[-1].index
        owner.committed(last)
        raft.applied_to(last)

    def _passed_over(self, entry: Entry) -> None:
        """The state machine has this entry: what it means for the core, and for who waits for it."""
        if entry.kind == EntryKind.CONFIGURATION:
            self.raft.apply_configuration(ConfigurationChange.decode(entry.data))
        elif entry.kind == EntryKind.PROPOSAL:
            node, number = HEADER.unpack_from(entry.data)
            proposal = self._sent.pop((entry.term, number), None) if node == self.raft.node_id else None
            if proposal is not None:
                self._resolve(proposal, errors.OutcomeUnknown("this node took over a newer state meanwhile"))
        else:
            self._term_began(entry.term)

    def _apply_proposal(self, entry: Entry) -> None:
        node, number = HEADER.unpack_from(entry.data)
        own = node == self.raft.node_id
        if own and entry.term == self._count_term:
            # The answer that the leader has it may have been lost, and those behind it wait for that.
            self._acknowledged = max(self._acknowledged, number)
        proposal = self._sent.pop((entry.term, number), None) if own else None
        if proposal is None:
            self._owner.apply(entry, None)
        else:
            result = self._owner.apply(entry, None if proposal.expired else proposal.context)
            self._resolve(proposal, result)

    # --- time ---

    def _expire(self) -> None:
        now = self._now()
        if self.raft.leader:
            self._led_ns = now
        elif now - self._led_ns > self._settings.timeout_ns:
            # There has been no leader for as long as anybody would wait for one. Who comes now, perhaps to a
            # directory that is locked until the one before is answered, need not wait so long to hear it.
            now += max(0, self._settings.timeout_ns - _LEADERLESS_WAIT_NS)
        error = None
        for proposal in [*self._sent.values(), *self._unsent]:
            if proposal.deadline_ns <= now and not proposal.expired:
                error = error or self._no_quorum()
                self._done.append((proposal.done, error))
                proposal.expired = self._some_expired = True
        while self._unsent and self._unsent[0].expired:
            self.proposed_bytes -= len(self._unsent.popleft().command)
        for name in ("_next_reads", "_round_reads"):
            reads: list[Read] = getattr(self, name)
            if reads and reads[0].deadline_ns <= now:
                error = error or self._no_quorum()
                self._done += [(read.done, error) for read in reads if read.deadline_ns <= now]
                setattr(self, name, [read for read in reads if read.deadline_ns > now])
        if any(read.deadline_ns <= now for _, read in self._ready_reads):
            # It has its index, and what leads up to it does not arrive.
            error = error or self._no_quorum()
            self._done += [(read.done, error) for _, read in self._ready_reads if read.deadline_ns <= now]
            self._ready_reads = [(index, read) for index, read in self._ready_reads if read.deadline_ns > now]
        if self._round and (
            self._ticks - self._round_tick >= RESEND_TICKS or self._round_term != self.raft.term
        ):
            self._ask_again()
