"""Replica: a Raft node with what its users need of it: proposals that happen once, reads, applying.

Belongs here: carrying out a `Ready` in its order, numbering and forwarding proposals, batching reads
and the leader's lease, keeping the log in memory short. Not here: consensus itself (`raft.py`), the
disk, the network and the state machine, which come in through `Owner`. Pure: the real host and the
simulator run this very code. Steps and their reasons: docs/design/cluster.md.

All methods run in one thread, and none suspends. Inputs only take note; `pump` acts. So a turn of the
owner's loop may put in many proposals and messages, and pays for one write and one send a peer.
"""

from collections import deque
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Final, Protocol

from aspenfs import errors
from aspenfs.cluster.membership import ConfigurationChange
from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.types import Configuration, Entry, EntryKind, HardState, Ready, Role, Snapshot
from aspenfs.limits import (
    CLOCK_DRIFT_PPM_MAX,
    ELECTION_TICKS,
    PROPOSAL_TIMEOUT_MS,
    PROPOSALS_BYTES_MAX,
    RAFT_APPEND_BYTES_MAX,
    RAFT_APPEND_ENTRIES_MAX,
    RAFT_LOG_BYTES_MAX,
    TICK_MS,
)

HEADER: Final = Struct("<QQ")  # of a PROPOSAL's payload: node id, number; the command follows
INCARNATION_SHIFT: Final = 40  # a number is incarnation << 40 | count

_NS_PER_MS: Final = 1_000_000
# A quorum that answered a round sent at t lets nobody else be elected before t + this (Raft §6.4.1):
# an election timeout, less the greatest drift of two clocks, less the tick that a follower may be
# ahead, less 10 ms for what nobody thought of.
LEASE_NS: Final = _NS_PER_MS * (
    ELECTION_TICKS * TICK_MS * (1_000_000 - CLOCK_DRIFT_PPM_MAX) // 1_000_000 - TICK_MS - 10
)
_LEADERLESS_WAIT_NS: Final = 2_000 * _NS_PER_MS  # an election that has a majority takes less
_RESEND_TICKS: Final = 4  # a proposal or read that the leader did not acknowledge is sent again
_ASKED_LATELY_TICKS: Final = 4
_ALL_AT_ONCE_TICKS: Final = 20
_READ_LATELY_TICKS: Final = 20  # a leader that nobody reads from lets its lease lapse
_LOG_BYTES_MAX_ALONE: Final = 1 << 20
_QUEUE_BYTES_ENOUGH: Final = 256 << 10  # are worth a write of their own
_HELD_BACK_MAX: Final = 256  # proposals that wait for an answer to those before them

Done = Callable[[object], object]  # gets the result of `Owner.apply`, or an AspenError


class Owner(Protocol):
    """What a replica needs of the world. Called by `pump` and `tick` only."""

    @property
    def revision(self) -> int:
        """The last entry that the state machine has evaluated."""

    def write(
        self, truncate_after: int | None, entries: Sequence[Entry], hard_state: HardState | None
    ) -> int:
        """Into the log, in that order, all or nothing: a ticket for `synced`, greater than all before.
        NoSpace: nothing was written, it will be tried again."""

    def request_sync(self) -> None:
        """What was written shall be durable soon; `Replica.synced` tells."""

    def send(self, to: int, message: Message) -> None: ...

    def apply(self, entry: Entry, context: object) -> object:
        """Evaluates an entry of kind NORMAL or PROPOSAL as revision `entry.index`; its result. `context`
        is what `propose` was given if it was proposed here, in this life of the node; else None."""

    def apply_configuration(self, entry: Entry, configuration: Configuration) -> None:
        """`entry` changed the configuration to this, as revision `entry.index`."""

    def committed(self, index: int) -> None:
        """All entries up to this one are committed and evaluated; called once a batch."""

    def remind(self) -> None:
        """Call `Replica.reminded` soon: when others may have been told of a commit by something else."""

    def fetch_snapshot(self, snapshot: Snapshot, leader: int) -> None:
        """Fetch a state of at least that index; then `snapshot_installed`, or `snapshot_failed`."""


class _Proposal:
    __slots__ = ("command", "context", "deadline_ns", "done", "expired", "repeatable", "sent_tick")

    def __init__(
        self, command: bytes, context: object, done: Done, deadline_ns: int, repeatable: bool
    ) -> None:
        self.command, self.context, self.done, self.deadline_ns = command, context, done, deadline_ns
        self.repeatable = repeatable  # applying it twice does nothing more: it carries a (client, sequence)
        self.sent_tick = 0
        self.expired = False  # the proposer was told NoQuorum


class _Read:
    __slots__ = ("deadline_ns", "done")

    def __init__(self, done: Done, deadline_ns: int) -> None:
        self.done, self.deadline_ns = done, deadline_ns


class Replica:
    """One node of a cluster. See the head of this file."""

    def __init__(self, raft: Raft, owner: Owner, monotonic_ns: Callable[[], int], *, incarnation: int,
                 proposal_timeout_ms: int = PROPOSAL_TIMEOUT_MS,
                 batch_bytes: int = RAFT_APPEND_BYTES_MAX) -> None:  # fmt: skip
        """`monotonic_ns` counts suspend (CLOCK_BOOTTIME); `incarnation` is greater with each start.
        `batch_bytes`: of proposals that are sent, or go into the log, at once."""
        self.raft, self._owner, self._now = raft, owner, monotonic_ns
        self._incarnation = incarnation << INCARNATION_SHIFT
        self._timeout_ns = proposal_timeout_ms * _NS_PER_MS
        self._led_ns = monotonic_ns()  # when there was a leader last
        self._batch_bytes = batch_bytes
        self._ticks = 0
        # Proposals: waiting for a leader, and those sent to one: (term, number) -> proposal, in order.
        self._unsent: deque[_Proposal] = deque()
        self._sent: dict[tuple[int, int], _Proposal] = {}
        self._count = 0  # of the last proposal sent in `_count_term`
        self._count_term = 0
        self._acknowledged = 0  # numbers up to this one are in the leader's log
        self._some_expired = False  # some of those sent have nobody who waits
        self._resent_tick = -1  # when the leader last complained of a gap
        self.proposed_bytes = 0  # of proposals not yet resolved
        # As a leader: what was taken, from this node and from others, and is not yet in the log, because a
        # sync is under way: it could not be committed before the next one, and one write for all is cheaper.
        self._queue: list[tuple[int, bytes]] = []
        self._queue_bytes = self._queue_term = 0
        # As a leader: how many of the queue, and up to which index of the log, others may have proposed; and
        # alike for what this node has begun: readers elsewhere must see it.
        self._foreign_queued = self._foreign = 0
        self._begun_queued = False
        self._begun = self._begun_term = 0
        # As a leader: who wants to know everything at once, because it asks for things, until which tick;
        # what was in the log and committed when the owner was asked to remind.
        raft.tells_late = True
        self._askers: dict[int, int] = {}
        self._all_at_once_until = 0  # tick: too few have answered in time
        self._seen = (0, 0)  # last and committed index, when it was last looked who can wait
        self._reminder: tuple[int, int] | None = None
        # As a leader: the last number taken from each node in `_taken_term`.
        self._taken: dict[int, int] = {}
        self._taken_term = 0
        # Durability: what waits for a ticket, in order.
        self._written = self._synced = 0
        self._after_sync: deque[tuple[int, Sequence[Message]]] = deque()
        self._truncated: deque[tuple[int, int]] = deque()  # by which write, to which index
        self._stalled: Ready | None = None  # a disk without room: its entries are not yet in the log
        self.stall: errors.NoSpace | None = None
        # Reads: those of the next round, those of the round under way, and those with an index.
        self._next_reads: list[_Read] = []
        self._round_reads: list[_Read] = []
        self._round = 0  # its number, or 0; contexts count rounds
        self._rounds = 0
        self._round_sent_ns = self._round_tick = self._round_term = 0
        self._ready_reads: list[tuple[int, _Read]] = []
        self._lease_until_ns = self._lease_term = 0
        self._last_read_tick = -_READ_LATELY_TICKS
        # Set by the owner: whether clocks run as leases suppose (clock_rates.py). If not, reads are rounds.
        self.leases_allowed: Callable[[], bool] = lambda: True
        self._installing: Snapshot | None = None
        self._done: list[tuple[Done, object]] = []  # to be called at the end of a pump
        self.alone = False
        self._look()

    # --- what others ask for ---

    def propose(self, command: bytes, context: object, done: Done, *, repeatable: bool = False) -> None:
        """`done` gets the result of evaluating `command` here, once, or NoQuorum or OutcomeUnknown."""
        proposal = _Proposal(command, context, done, self._now() + self._timeout_ns, repeatable)
        self.proposed_bytes += len(command)
        self._unsent.append(proposal)

    def begin(self, command: bytes, context: object, done: Done) -> bool:
        """As `propose`, where the order is settled at once, and with it the outcome: nothing comes before it
        but what is evaluated here and what this node itself has under way. And no reader on another node
        who asks from now on is answered without it, as long as this node leads.

        False, and nothing has happened, unless this node leads under a lease, has all that is committed, and
        nothing is under way that others proposed, or whose proposer has given up. If leadership ends before
        it is committed it is proposed again, as any other; others' may be before it then. It waits for a
        `pump`: those who come soon share its sync.
        """
        raft = self.raft
        if (
            self._unsent
            or self._foreign_queued
            or self._stalled is not None
            or raft.transferring
            or raft.suspended
            or self._queue_bytes > PROPOSALS_BYTES_MAX
            or not self.read_now()
            or self._foreign > self._owner.revision
            or self._has_expired()
        ):
            return False
        self.propose(command, context, done)
        self._send_proposals()
        self._begun_queued = True
        return True

    def read_now(self) -> bool:
        """Whether a read here and now sees all that was committed anywhere: on a leader with a lease.

        Ask again after the state was read, if there was a pause that could have outlived the lease.
        """
        raft = self.raft
        if self.alone:
            return raft.role is Role.LEADER
        self._last_read_tick = self._ticks
        return self._has_lease() and self._owner.revision >= raft.commit

    def read(self, done: Done) -> None:
        """`done` gets an index that was current after this call, when it is evaluated here; or NoQuorum."""
        self._last_read_tick = self._ticks
        self._next_reads.append(_Read(done, self._now() + self._timeout_ns))

    def receive(self, message: Message) -> None:
        """A message of another member, authenticated."""
        kind = message.type
        if kind == MessageType.PROP:
            self._askers[message.sender] = self._ticks + _ASKED_LATELY_TICKS
            self._take_proposals(message)
        elif kind == MessageType.PROP_RESP:
            self._proposals_taken(message)
        elif kind == MessageType.READ_INDEX:
            self._askers[message.sender] = self._ticks + _ASKED_LATELY_TICKS
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
        if (
            not self._round
            and self._ticks - self._last_read_tick < _READ_LATELY_TICKS
            and self._has_lease()
            and self._lease_until_ns - self._now() < LEASE_NS // 2
        ):
            self._start_round()
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

    def _hidden(self, key: tuple[int, int], proposal: _Proposal, *, lost: bool) -> None:
        """Whether the snapshot has it can not be known. Its number stays in use as long as its term may go on
        (not `lost`): the leader takes no later one before it."""
        if not proposal.expired:
            if proposal.repeatable:
                again = _Proposal(proposal.command, proposal.context, proposal.done, proposal.deadline_ns,
                                  repeatable=True)  # fmt: skip
                self.proposed_bytes += len(again.command)
                self._unsent.append(again)
            else:
                error = errors.OutcomeUnknown("this node took over a newer state meanwhile")
                self._done.append((proposal.done, error))
            proposal.expired = self._some_expired = True
        if lost:
            self._resolve(self._sent.pop(key), None)

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
                self._append_queue()
            if self._next_reads and not self._round:
                self._start_round()
            if self._stalled is not None and not self._write_stalled():
                break
            if raft.role is Role.LEADER and (raft.last_index, raft.commit) != self._seen:
                self._look_who_waits()
            if not raft.has_ready:
                break
            self._carry_out(raft.ready())
        self._tell()

    def _look_who_waits(self) -> None:
        """Who asks for things has and hears everything at once, for it may wait for this; so have as many
        others as make a majority. The rest have it a little later, several entries at a time: to be told
        of each would cost them and this node more than it is worth. If a majority does not answer in time,
        all have everything at once for a while.
        """
        raft, ticks = self.raft, self._ticks
        self._seen = raft.last_index, raft.commit
        for node in [node for node, until in self._askers.items() if until < ticks]:
            del self._askers[node]
        askers = self._askers
        configuration = raft.configuration
        voters = configuration.voters
        if ticks < self._all_at_once_until or configuration.outgoing:
            raft.can_wait = ()
        else:
            nearest = raft.nearest()
            wanted = len(voters) // 2 + (raft.node_id not in voters) - sum(node in askers for node in nearest)
            others = [node for node in nearest if node not in askers]
            raft.can_wait = others[max(0, wanted) :]
        raft.tell(askers)
        if self._reminder is None:
            self._ask_for_reminder()

    def _ask_for_reminder(self) -> None:
        self._reminder = self.raft.last_index, self.raft.commit
        self._owner.remind()

    def reminded(self) -> None:
        """The moment that `Owner.remind` was asked for has passed."""
        raft, reminder = self.raft, self._reminder
        self._reminder = None
        if reminder is None or raft.role is not Role.LEADER:
            return
        last, commit = reminder
        if raft.commit < last:
            self._all_at_once_until = self._ticks + _ALL_AT_ONCE_TICKS
            raft.can_wait = ()
        raft.tell(raft.can_wait)
        raft.tell(commit=commit)
        if (raft.last_index, raft.commit) != reminder:
            self._ask_for_reminder()
        self.pump()

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

    def _term_began(self, term: int) -> None:
        """A leader's first entry is applied: what went to earlier ones and is not applied never will be."""
        sent = self._sent
        lost = [key for key in sent if key[0] < term]
        if lost:
            again = [sent.pop(key) for key in lost]
            for proposal in again:
                if proposal.expired:
                    self._resolve(proposal, None)
            self._unsent.extendleft(reversed([proposal for proposal in again if not proposal.expired]))

    def _resolve(self, proposal: _Proposal, result: object) -> None:
        self.proposed_bytes -= len(proposal.command)
        if not proposal.expired:
            self._done.append((proposal.done, result))

    # --- proposals, as the one who proposes ---

    def _send_proposals(self) -> None:
        """To this node itself or to the leader, as far as there is one that takes them."""
        raft = self.raft
        term, leader = raft.term, raft.leader
        if not leader or raft.transferring:
            return
        if term != self._count_term:
            self._count_term, self._count, self._acknowledged = term, 0, 0
        leads = leader == raft.node_id
        if leads and self._queue_bytes > PROPOSALS_BYTES_MAX:
            return
        if (not leads and self._count and self._acknowledged < self._incarnation | self._count
                and len(self._unsent) < _HELD_BACK_MAX):  # fmt: skip
            return  # they go together when the leader has answered the last ones
        batch: list[tuple[int, bytes]] = []
        size = 0
        unsent = self._unsent
        while unsent and size < self._batch_bytes and len(batch) < RAFT_APPEND_ENTRIES_MAX:
            proposal = unsent.popleft()
            self._count += 1
            number = self._incarnation | self._count
            self._sent[term, number] = proposal
            payload = self._payload(number, proposal)
            batch.append((number, payload))
            size += len(payload)
        if leads:
            self._enqueue([payload for _, payload in batch], size)
        else:
            self._forward(leader, term, batch)

    def _payload(self, number: int, proposal: _Proposal) -> bytes:
        """Of its entry, which is sent now."""
        proposal.sent_tick = self._ticks
        return HEADER.pack(self.raft.node_id, number) + proposal.command

    def _forward(self, leader: int, term: int, batch: Sequence[tuple[int, bytes]]) -> None:
        entries = tuple(Entry(term, number, int(EntryKind.PROPOSAL), payload) for number, payload in batch)
        self._owner.send(leader, Message(MessageType.PROP, leader, self.raft.node_id, term, entries=entries))

    def _proposals_taken(self, message: Message) -> None:
        """The leader says how far it has them; or that it lacks some; or that it is not the leader."""
        if message.term != self._count_term or message.term != self.raft.term:
            return
        if message.index > self._acknowledged:
            self._acknowledged = message.index
            if self._some_expired:
                self._forget_expired(message.term, message.index)
        if message.reject and message.reject_hint == message.sender and self._resent_tick != self._ticks:
            # Once a tick: each message that was sent behind a lost one is refused.
            self._resent_tick = self._ticks
            self._send_again(message.index)

    def _forget_expired(self, term: int, taken: int) -> None:
        """Those that the leader has need not be sent any more, and nobody waits for them."""
        expired = [key for key, proposal in self._sent.items() if proposal.expired]
        for key in expired:
            if key[0] == term and key[1] <= taken:
                self._resolve(self._sent.pop(key), None)
        self._some_expired = len(expired) > 0

    def _has_expired(self) -> bool:
        self._some_expired = self._some_expired and any(one.expired for one in self._sent.values())
        return self._some_expired

    def _resend(self) -> None:
        if not self._sent or self.raft.leader in (0, self.raft.node_id):
            return
        term, oldest = self.raft.term, self._ticks - _RESEND_TICKS
        if any(key[0] == term and key[1] > self._acknowledged and proposal.sent_tick <= oldest
               for key, proposal in self._sent.items()):  # fmt: skip
            self._send_again(self._acknowledged)

    def _send_again(self, after: int) -> None:
        """All of this term behind number `after`, in order, bounded messages."""
        raft = self.raft
        term = raft.term
        batch: list[tuple[int, bytes]] = []
        size = 0
        for (of_term, number), proposal in self._sent.items():
            if of_term != term or number <= after:
                continue
            payload = self._payload(number, proposal)
            batch.append((number, payload))
            size += len(payload)
            if size >= self._batch_bytes or len(batch) == RAFT_APPEND_ENTRIES_MAX:
                self._forward(raft.leader, term, batch)
                batch, size = [], 0
        if batch:
            self._forward(raft.leader, term, batch)

    # --- proposals, as the leader who takes them ---

    def _take_proposals(self, message: Message) -> None:
        raft, node = self.raft, message.sender
        if raft.role is not Role.LEADER or message.term != raft.term:
            self._answer_proposals(node, message.term, 0, refused_for=raft.leader)
            return
        if self._taken_term != raft.term:
            self._taken, self._taken_term = {}, raft.term
        last = self._taken.get(node, 0)
        if self._queue_bytes > PROPOSALS_BYTES_MAX:
            return  # it will be sent again
        new: list[bytes] = []
        gap = False
        for entry in message.entries:
            number = entry.index
            if number <= last:
                continue  # a repetition
            if number != last + 1 and not (number >> INCARNATION_SHIFT > last >> INCARNATION_SHIFT
                                           and number & ((1 << INCARNATION_SHIFT) - 1) == 1):  # fmt: skip
                gap = True
                break
            if entry.data[:16] != HEADER.pack(node, number):
                break  # it speaks for another node: nothing of it is taken
            new.append(entry.data)
            last = number
        if new:
            self._taken[node] = last
            self._enqueue(new, sum(map(len, new)))
            self._foreign_queued += len(new)
        self._answer_proposals(node, raft.term, last, refused_for=raft.node_id if gap else 0)

    def _enqueue(self, payloads: Sequence[bytes], size: int) -> None:
        if self._queue_term != self.raft.term:
            self._empty_queue()
            self._queue_term, self._foreign = self.raft.term, 0
        self._queue += [(EntryKind.PROPOSAL, payload) for payload in payloads]
        self._queue_bytes += size

    def _empty_queue(self) -> None:
        self._queue, self._queue_bytes = [], 0
        self._foreign_queued, self._begun_queued = 0, False

    def _append_queue(self, *, now: bool = False) -> None:
        """Into the log, unless it is better to wait (not if `now`). What was taken under another term is
        nobody's any more: its proposers see that term end."""
        raft = self.raft
        if raft.role is not Role.LEADER or raft.term != self._queue_term:
            self._empty_queue()
            return
        if self._written > self._synced and self._queue_bytes < _QUEUE_BYTES_ENOUGH and not now:
            return
        count, size = 0, 0
        while count < min(len(self._queue), RAFT_APPEND_ENTRIES_MAX) and size < self._batch_bytes:
            size += len(self._queue[count][1])
            count += 1
        some = self._queue[:count]
        try:
            raft.propose(some)
        except errors.AspenError:  # Overloaded, or handing over: later
            return
        del self._queue[:count]
        self._queue_bytes -= size
        if self._foreign_queued:
            foreign = sum(HEADER.unpack_from(payload)[0] != raft.node_id for _, payload in some)
            if foreign:
                self._foreign, self._foreign_queued = raft.last_index, self._foreign_queued - foreign
        if self._begun_queued:
            self._begun, self._begun_term = raft.last_index, raft.term
            self._begun_queued = bool(self._queue)

    def _has_begun_in_log(self) -> bool:
        """Whether all that this node has begun has an index by now."""
        while self._begun_queued and self._queue:
            length = len(self._queue)
            self._append_queue(now=True)
            if len(self._queue) == length:
                return False
        return True

    @property
    def _begun_index(self) -> int:
        """What readers elsewhere must see, beyond what is committed."""
        return self._begun if self._begun_term == self.raft.term else 0

    def _answer_proposals(self, node: int, term: int, last: int, *, refused_for: int) -> None:
        answer = Message(MessageType.PROP_RESP, node, self.raft.node_id, term, index=last,
                         reject=bool(refused_for), reject_hint=refused_for)  # fmt: skip
        self._owner.send(node, answer)

    # --- reads ---

    def _has_lease(self) -> bool:
        raft = self.raft
        return (
            self._lease_term == raft.term
            and raft.role is Role.LEADER
            and not raft.transferred_in_term
            and raft.committed_in_term
            and self._now() < self._lease_until_ns
            and self.leases_allowed()
        )

    def _start_round(self) -> None:
        """Asks for an index for all who wait. Without a leader there is nobody to ask: later."""
        raft = self.raft
        if not raft.leader or (raft.role is Role.LEADER and not raft.committed_in_term):
            return
        self._round_reads += self._next_reads
        self._next_reads = []
        self._rounds += 1
        self._round = self._rounds
        self._round_sent_ns, self._round_tick, self._round_term = self._now(), self._ticks, raft.term
        if self._has_lease() and self._round_reads:
            self._round = 0
            self._indexed(raft.commit)
            return
        raft.read_index(self._context())

    def _round_answered(self, context: bytes, index: int) -> None:
        if not self._round or context != self._context():
            return  # an earlier one, whose readers went on to a later one
        raft = self.raft
        if raft.role is Role.LEADER and raft.term == self._round_term:
            self._lease_term, self._lease_until_ns = raft.term, self._round_sent_ns + LEASE_NS
        self._round = 0
        self._indexed(index)

    def _context(self) -> bytes:
        return HEADER.pack(self.raft.node_id, self._incarnation | self._round)

    def _indexed(self, index: int) -> None:
        self._ready_reads += [(index, read) for read in self._round_reads]
        self._round_reads = []
        self._answer_reads()

    def _answer_reads(self) -> None:
        revision = self._owner.revision
        waiting = []
        for index, read in self._ready_reads:
            if index <= revision:
                self._done.append((read.done, index))
            else:
                waiting.append((index, read))
        self._ready_reads = waiting

    def _answer_under_lease(self, message: Message) -> bool:
        """A follower's read, answered without asking the others."""
        self._last_read_tick = self._ticks
        if not self._has_lease():
            return False
        raft = self.raft
        self._owner.send(message.sender, Message(
            MessageType.READ_INDEX_RESP, message.sender, raft.node_id, raft.term,
            index=max(raft.commit, self._begun_index), context=message.context))  # fmt: skip
        return True

    # --- time ---

    def _expire(self) -> None:
        now = self._now()
        if self.raft.leader:
            self._led_ns = now
        elif now - self._led_ns > self._timeout_ns:
            # There has been no leader for as long as anybody would wait for one. Who comes now, perhaps to a
            # directory that is locked until the one before is answered, need not wait so long to hear it.
            now += max(0, self._timeout_ns - _LEADERLESS_WAIT_NS)
        error = None
        for proposal in [*self._sent.values(), *self._unsent]:
            if proposal.deadline_ns <= now and not proposal.expired:
                error = error or self._no_quorum()
                self._done.append((proposal.done, error))
                proposal.expired = self._some_expired = True
        while self._unsent and self._unsent[0].expired:
            self.proposed_bytes -= len(self._unsent.popleft().command)
        for name in ("_next_reads", "_round_reads"):
            reads: list[_Read] = getattr(self, name)
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
            self._ticks - self._round_tick >= _RESEND_TICKS or self._round_term != self.raft.term
        ):
            self._ask_again()

    def _ask_again(self) -> None:
        """The round is lost on the way, or its leader is: the next one takes its readers along."""
        self._round = 0
        self._next_reads[:0] = self._round_reads
        self._round_reads = []

    def _no_quorum(self) -> errors.NoQuorum:
        leader = self.raft.leader
        voters = len(self.raft.configuration.voters)
        who = f"leader {leader} does not get it through" if leader else "there is no leader"
        return errors.NoQuorum(
            f"no majority of {voters} voters within {self._timeout_ns // (1000 * _NS_PER_MS)} s: {who}; "
            "`aspen status` shows who is missing"
        )
