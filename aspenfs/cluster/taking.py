"""Proposals, as the leader takes them: numbered, in order, queued while a sync is under way.

Belongs here: what others and this node have proposed until it is in the log, and what of it may be relied
upon already (`Store.begin`). Not here: the proposer's side (`proposing.py`).
"""

from collections import deque
from collections.abc import Sequence
from typing import Final

from aspenfs import errors
from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.replica_base import HEADER, INCARNATION_SHIFT, Base, Done, Owner, Settings
from aspenfs.cluster.types import EntryKind, Role
from aspenfs.limits import PROPOSALS_BYTES_MAX, RAFT_APPEND_ENTRIES_MAX

_QUEUE_BYTES_ENOUGH: Final = 256 << 10  # are worth a write of their own


class Taking(Base):
    def __init__(self, raft: Raft, owner: Owner, settings: Settings) -> None:
        super().__init__(raft, owner, settings)
        # What was taken, from this node and from others, and is not yet in the log, because a sync is under
        # way: it could not be committed before the next one, and one write for all is cheaper.
        self._queue: list[tuple[int, bytes]] = []
        self._queue_bytes = self._queue_term = 0
        # How many of the queue, and up to which index of the log, others may have proposed; and alike for
        # what this node has begun: readers elsewhere must see it.
        self._foreign_queued = self._foreign = 0
        self._begun_queued = False
        self._begun = self._begun_term = 0
        # Who wants to know that what it has begun is in the logs of a majority: of the queue; and of which
        # term, behind which entry.
        self._held_queued: list[Done] = []
        self._held: deque[tuple[int, int, Done]] = deque()
        # The last number taken from each node in `_taken_term`.
        self._taken: dict[int, int] = {}
        self._taken_term = 0

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

    def _answer_proposals(self, node: int, term: int, last: int, *, refused_for: int) -> None:
        answer = Message(MessageType.PROP_RESP, node, self.raft.node_id, term, index=last,
                         reject=bool(refused_for), reject_hint=refused_for)  # fmt: skip
        self._owner.send(node, answer)

    def _enqueue(self, payloads: Sequence[bytes], size: int) -> None:
        if self._queue_term != self.raft.term:
            self._empty_queue()
            self._queue_term, self._foreign = self.raft.term, 0
        self._queue += [(EntryKind.PROPOSAL, payload) for payload in payloads]
        self._queue_bytes += size

    def _empty_queue(self) -> None:
        self._queue, self._queue_bytes = [], 0
        self._foreign_queued, self._begun_queued = 0, False
        self._held_queued = []

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
        while count < min(len(self._queue), RAFT_APPEND_ENTRIES_MAX) and size < self._settings.batch_bytes:
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
            if self._held_queued and not self._begun_queued:
                self._wait_till_held(self._held_queued)
                self._held_queued = []

    def when_held(self, done: Done) -> None:
        """`done` is called once a majority has all that this node has begun in its log, on disk or not, with
        the index of an entry up to which that is so; never, if leadership ends before. To be asked before the
        `pump`: what was sent before that is told of when it is on disk."""
        if self._begun_queued:
            self._held_queued.append(done)
        else:
            self._wait_till_held([done])

    def _wait_till_held(self, some: Sequence[Done]) -> None:
        self.raft.want_held(self._begun)
        self._held += [(self._begun_term, self._begun, done) for done in some]

    def _look_what_is_held(self) -> None:
        """Who asked is told."""
        waiting, now, held = self._held, self.raft.term, self.raft.held
        while waiting and (waiting[0][1] <= held or waiting[0][0] != now):
            term, index, done = waiting.popleft()
            if term == now:
                self._done.append((done, index))

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
