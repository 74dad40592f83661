"""Who has entries, and hears of commits, when: those who wait for it at once, the others a little later.

Belongs here: a leader's choice, turn by turn. Not here: what is sent (`replication.py`). Why: ADR 0013.
"""

from typing import Final

from aspenfs.cluster.proposing import Proposing
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.replica_base import Owner, Settings
from aspenfs.cluster.types import Role

_ASKED_LATELY_TICKS: Final = 4
_ALL_AT_ONCE_TICKS: Final = 20


class Noticing(Proposing):
    def __init__(self, raft: Raft, owner: Owner, settings: Settings) -> None:
        super().__init__(raft, owner, settings)
        raft.tells_late = True
        self._askers: dict[int, int] = {}  # who has asked for something: until which tick it counts
        self._all_at_once_until = 0  # tick: too few have answered in time
        self._seen = (0, 0)  # last and committed index, when it was last looked who can wait
        self._reminder: tuple[int, int] | None = None  # the same, when the owner was asked to remind

    def _asks(self, node: int) -> None:
        self._askers[node] = self._ticks + _ASKED_LATELY_TICKS

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

    def _reminded(self) -> None:
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
