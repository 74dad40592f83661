"""Reads that see all that was committed anywhere: rounds for all who wait, and the leader's lease.

Belongs here: asking for an index, waiting until it is evaluated, when no asking is needed. Why a lease is
safe: docs/design/cluster.md. Not here: how a leader makes sure that it leads (`readonly.py`).
"""

from collections.abc import Callable
from typing import Final

from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.replica_base import HEADER, NS_PER_MS, Done, Owner, Settings
from aspenfs.cluster.taking import Taking
from aspenfs.cluster.types import Role
from aspenfs.limits import CLOCK_DRIFT_PPM_MAX, ELECTION_TICKS, TICK_MS

# A quorum that answered a round sent at t lets nobody else be elected before t + this (Raft §6.4.1):
# an election timeout, less the greatest drift of two clocks, less the tick that a follower may be
# ahead, less 10 ms for what nobody thought of.
LEASE_NS: Final = NS_PER_MS * (
    ELECTION_TICKS * TICK_MS * (1_000_000 - CLOCK_DRIFT_PPM_MAX) // 1_000_000 - TICK_MS - 10
)
_READ_LATELY_TICKS: Final = 20  # a leader that nobody reads from lets its lease lapse


class Read:
    __slots__ = ("deadline_ns", "done")

    def __init__(self, done: Done, deadline_ns: int) -> None:
        self.done, self.deadline_ns = done, deadline_ns


class Reading(Taking):
    def __init__(self, raft: Raft, owner: Owner, settings: Settings) -> None:
        super().__init__(raft, owner, settings)
        # Those of the next round, those of the round under way, and those with an index.
        self._next_reads: list[Read] = []
        self._round_reads: list[Read] = []
        self._ready_reads: list[tuple[int, Read]] = []
        self._round = 0  # its number, or 0; contexts count rounds
        self._rounds = 0
        self._round_sent_ns = self._round_tick = self._round_term = 0
        self._lease_until_ns = self._lease_term = 0
        self._last_read_tick = -_READ_LATELY_TICKS
        # Set by the owner: whether clocks run as leases suppose (clock_rates.py). If not, reads are rounds.
        self.leases_allowed: Callable[[], bool] = lambda: True

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
        self._next_reads.append(Read(done, self._now() + self._settings.timeout_ns))

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

    def _ask_again(self) -> None:
        """The round is lost on the way, or its leader is: the next one takes its readers along."""
        self._round = 0
        self._next_reads[:0] = self._round_reads
        self._round_reads = []

    def _keep_lease(self) -> None:
        """Before it lapses, while somebody reads."""
        if (
            not self._round
            and self._ticks - self._last_read_tick < _READ_LATELY_TICKS
            and self._has_lease()
            and self._lease_until_ns - self._now() < LEASE_NS // 2
        ):
            self._start_round()
