"""ReadRounds: who waits at a leader for an index to read at, and which rounds of heartbeats they wait for.

etcd's `readOnly`, with rounds in place of its contexts: everybody who asks between two turns of the core
shares one round, and contexts of different nodes cannot meet. Not here: who is a quorum, sending.

An index is good for a reader if it was the commit index of somebody who still led after the reader asked
(Raft §6.4). So: note the commit index, send a round, and answer when a quorum has answered that round
or a later one.
"""

from collections import deque
from typing import Final, NamedTuple

from aspenfs.limits import RAFT_READS_MAX

_CONTEXT_BYTES: Final = 8


class Question(NamedTuple):
    node: int
    context: bytes


class ReadRounds:
    __slots__ = ("_count", "_open", "last", "waiting")

    def __init__(self) -> None:
        self.waiting: list[Question] = []  # for the next round
        self.last = 0  # number of the last round of this term
        self._open: deque[tuple[int, int, list[Question]]] = deque()  # round, index, who
        self._count = 0  # of all that wait

    def clear(self) -> None:
        """Leadership has ended or begun: who waits asks again."""
        self.waiting, self.last, self._count = [], 0, 0
        self._open.clear()

    def ask(self, node: int, context: bytes) -> None:
        """Beyond RAFT_READS_MAX nobody is taken: they ask again."""
        if self._count < RAFT_READS_MAX:
            self._count += 1
            self.waiting.append(Question(node, context))

    def take_waiting(self) -> list[Question]:
        """Who waits for the next round, and gets an answer without one."""
        asked, self.waiting = self.waiting, []
        self._count -= len(asked)
        return asked

    def start(self, index: int) -> bytes:
        """A round for all who wait, at commit index `index`: the context of its heartbeats."""
        self.last += 1
        self._open.append((self.last, index, self.waiting))
        self.waiting = []
        return self.context

    @property
    def context(self) -> bytes:
        return self.last.to_bytes(_CONTEXT_BYTES, "big")

    @property
    def pending(self) -> bool:
        """Whether a round is not answered yet."""
        return bool(self._open)

    def round_of(self, context: bytes) -> int:
        """The round that an answer is to; 0 if it is to none of ours."""
        number = int.from_bytes(context, "big")
        return number if len(context) == _CONTEXT_BYTES and number <= self.last else 0

    def confirm(self, number: int) -> list[tuple[int, list[Question]]]:
        """A quorum has answered round `number` or later ones: (index, who may read at it)."""
        answers = []
        rounds = self._open
        while rounds and rounds[0][0] <= number:
            _, index, asked = rounds.popleft()
            self._count -= len(asked)
            answers.append((index, asked))
        return answers
