"""Proposals, as the one who proposes: numbered for each leader, sent in order, sent again, resolved once.

Belongs here: everything until the answer of the state machine is there, whoever leads meanwhile (ADR 0006).
Not here: what a leader does with them (`taking.py`).
"""

from collections import deque
from collections.abc import Sequence
from typing import Final

from aspenfs import errors
from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.reading import Reading
from aspenfs.cluster.replica_base import HEADER, Done, Owner, Settings
from aspenfs.cluster.types import Entry, EntryKind
from aspenfs.limits import PROPOSALS_BYTES_MAX, RAFT_APPEND_ENTRIES_MAX

RESEND_TICKS: Final = 4  # a proposal or read that the leader did not acknowledge is sent again
_HELD_BACK_MAX: Final = 256  # proposals that wait for an answer to those before them


class Proposal:
    __slots__ = ("command", "context", "deadline_ns", "done", "expired", "repeatable", "sent_tick")

    def __init__(
        self, command: bytes, context: object, done: Done, deadline_ns: int, repeatable: bool
    ) -> None:
        self.command, self.context, self.done, self.deadline_ns = command, context, done, deadline_ns
        self.repeatable = repeatable  # applying it twice does nothing more: it carries a (client, sequence)
        self.sent_tick = 0
        self.expired = False  # the proposer was told NoQuorum


class Proposing(Reading):
    def __init__(self, raft: Raft, owner: Owner, settings: Settings) -> None:
        super().__init__(raft, owner, settings)
        # Waiting for a leader, and sent to one: (term, number) -> proposal, in order.
        self._unsent: deque[Proposal] = deque()
        self._sent: dict[tuple[int, int], Proposal] = {}
        self._count = 0  # of the last proposal sent in `_count_term`
        self._count_term = 0
        self._acknowledged = 0  # numbers up to this one are in the leader's log
        self._some_expired = False  # some of those sent have nobody who waits
        self._resent_tick = -1  # when the leader last complained of a gap
        self.proposed_bytes = 0  # of proposals not yet resolved

    def propose(self, command: bytes, context: object, done: Done, *, repeatable: bool = False) -> None:
        """`done` gets the result of evaluating `command` here, once, or NoQuorum or OutcomeUnknown."""
        proposal = Proposal(command, context, done, self._now() + self._settings.timeout_ns, repeatable)
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
        while unsent and size < self._settings.batch_bytes and len(batch) < RAFT_APPEND_ENTRIES_MAX:
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

    def _payload(self, number: int, proposal: Proposal) -> bytes:
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

    def _resend(self) -> None:
        if not self._sent or self.raft.leader in (0, self.raft.node_id):
            return
        term, oldest = self.raft.term, self._ticks - RESEND_TICKS
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
            if size >= self._settings.batch_bytes or len(batch) == RAFT_APPEND_ENTRIES_MAX:
                self._forward(raft.leader, term, batch)
                batch, size = [], 0
        if batch:
            self._forward(raft.leader, term, batch)

    # --- resolving ---

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

    def _hidden(self, key: tuple[int, int], proposal: Proposal, *, lost: bool) -> None:
        """Whether the snapshot has it can not be known. Its number stays in use as long as its term may go on
        (not `lost`): the leader takes no later one before it."""
        if not proposal.expired:
            if proposal.repeatable:
                again = Proposal(proposal.command, proposal.context, proposal.done, proposal.deadline_ns,
                                  repeatable=True)  # fmt: skip
                self.proposed_bytes += len(again.command)
                self._unsent.append(again)
            else:
                error = errors.OutcomeUnknown("this node took over a newer state meanwhile")
                self._done.append((proposal.done, error))
            proposal.expired = self._some_expired = True
        if lost:
            self._resolve(self._sent.pop(key), None)

    def _resolve(self, proposal: Proposal, result: object) -> None:
        self.proposed_bytes -= len(proposal.command)
        if not proposal.expired:
            self._done.append((proposal.done, result))

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
