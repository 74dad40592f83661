"""What must hold of a cluster after every step: Raft's own properties (Raft §5, figure 3) and ours.

Belongs here: checks that look at all nodes at once, and remember what was. They cost little, so that every
test of the core runs under them.
"""

from typing import TYPE_CHECKING

from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.quorum import VoteResult, joint_vote
from aspenfs.cluster.types import NOBODY, Configuration, Entry, Role

if TYPE_CHECKING:
    from tests.cluster.network import Cluster, Node


class Checker:
    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster
        self._leaders: dict[int, int] = {}  # term -> who leads
        self._entries: dict[
            tuple[int, int], tuple[Entry, int | None]
        ] = {}  # (index, term) -> it, term before
        self._committed: dict[int, Entry] = {}  # applied somewhere
        self.commit = 0  # the highest index that any leader has committed
        self._hard_states: dict[int, tuple[int, int]] = {}  # as durable
        self._seen: dict[int, int] = {}  # node -> how far its log has been looked at
        self._led: set[tuple[int, int]] = set()
        self._lengths: dict[tuple[int, int], int] = {}  # (node, term) of leaders -> last index
        self._asked: dict[bytes, tuple[int, int, int]] = {}  # read -> commit, time and term then
        self._leases: dict[tuple[int, int], int] = {}  # (node, term) -> when its last proof began
        self.reads = 0

    # --- events ---

    def check(self, node: "Node") -> None:
        """After anything that `node` did."""
        raft, log = node.raft, node.raft.log
        assert log.compacted <= log.applied <= log.applying <= log.committed <= log.last_index
        assert log.persisted <= log.written <= log.last_index
        self._check_log(node)
        self._check_disk(node)
        if raft.role is Role.LEADER:
            self._check_leader(node)

    def crashed(self, node: "Node") -> None:
        """A term that its disk does not know never was: an only voter may lead it again, for nobody, as
        `sent` checks, has heard of it."""
        term = node.raft.term
        if node.disk.durable.hard_state.term < term and self._leaders.get(term) == node.node_id:
            del self._leaders[term]
            self._led.discard((node.node_id, term))
            self._lengths.pop((node.node_id, term), None)
            self._leases.pop((node.node_id, term), None)
            self._entries = {key: entry for key, entry in self._entries.items() if key[1] != term}

    def _check_log(self, node: "Node") -> None:
        """Log matching: an entry of one index and term is one entry, and so is all before it."""
        log = node.raft.log
        for entry in log.slice(max(log.compacted, log.committed) + 1, log.last_index, 1 << 40):
            before = log.term_at(entry.index - 1)
            known = self._entries.setdefault((entry.index, entry.term), (entry, before))
            assert known == (entry, before), f"two entries {entry.index} of term {entry.term}"
        assert log.bytes == sum(
            len(entry.data) + 64 for entry in log.slice(log.compacted + 1, log.last_index, 1 << 40)
        )

    def _check_disk(self, node: "Node") -> None:
        """Terms never fall, a vote is never changed, and what is called durable is."""
        term, vote = node.disk.durable.hard_state
        old_term, old_vote = self._hard_states.get(node.node_id, (0, NOBODY))
        assert (term, old_vote if term == old_term and old_vote else vote) >= (old_term, old_vote)
        if term == old_term and old_vote:
            assert vote == old_vote, f"node {node.node_id} votes twice in term {term}"
        self._hard_states[node.node_id] = (term, vote)
        persisted = node.raft.log.persisted
        assert node.disk.durable.term_at(persisted) == node.raft.log.term_at(persisted)

    def _check_leader(self, node: "Node") -> None:
        raft, log = node.raft, node.raft.log
        known = self._leaders.setdefault(raft.term, node.node_id)
        assert known == node.node_id, f"nodes {known} and {node.node_id} both lead in term {raft.term}"
        led = (node.node_id, raft.term)
        if led not in self._led:
            self._led.add(led)
            self._check_elected(node)
        assert log.last_index >= self._lengths.get(led, 0), "a leader's log has lost entries"
        self._lengths[led] = log.last_index
        assert len(log.configurations_between(log.committed, log.last_index)) <= 1
        if log.committed > self.commit:
            assert log.term_at(log.committed) == raft.term, "an earlier term's entry is committed by counting"
            self._check_durable(raft.configuration, log.committed, raft.term)
            self.commit = log.committed

    def _check_elected(self, node: "Node") -> None:
        """Leader completeness, and that no lease of another leader runs."""
        log = node.raft.log
        for index, entry in self._committed.items():
            assert index <= log.compacted or log.term_at(index) == entry.term, (
                f"leader {node.node_id} lacks committed entry {index}"
            )
        assert log.last_index >= self.commit, f"leader {node.node_id} lacks committed entries"
        for (leader, term), began in self._leases.items():
            other = self._cluster.nodes[leader]
            still = other.up and other.raft.role is Role.LEADER and other.raft.term == term
            if still and leader != node.node_id and not other.raft.transferred_in_term:
                assert self._cluster.now >= began + 14, f"node {leader} has a lease in term {term}"

    def _check_durable(self, configuration: Configuration, index: int, term: int) -> None:
        """Whoever takes part in a majority that commits has the entry on disk."""

        def has(node_id: int) -> bool:
            image = self._cluster.nodes[node_id].disk.durable
            return image.base_index >= index or image.term_at(index) == term

        result = joint_vote(map(has, configuration.voters), map(has, configuration.outgoing))
        assert result is VoteResult.WON, f"entry {index} is committed and not durable"

    def applied(self, node: "Node", entry: Entry) -> None:
        """State machine safety; and no entry is applied that its own node could lose."""
        known = self._committed.setdefault(entry.index, entry)
        assert known == entry, f"node {node.node_id} applies another entry {entry.index}"
        assert node.disk.durable.term_at(entry.index) == entry.term

    def sent(self, node: "Node", message: Message) -> None:
        """What others may count on is on disk before they hear of it."""
        durable = node.disk.durable
        assert message.sender == node.node_id
        if message.type is MessageType.APP_RESP and not message.reject and message.index:
            if message.term == node.raft.term:  # else what it speaks of may be gone since
                assert durable.base_index >= message.index or durable.term_at(message.index) is not None
        elif message.type is MessageType.VOTE_RESP and not message.reject:
            term, vote = durable.hard_state
            assert term > message.term or (term, vote) == (message.term, message.to), "a vote not on disk"
        elif message.type is MessageType.VOTE:
            term, vote = durable.hard_state
            assert term > message.term or (term, vote) == (message.term, node.node_id), "asks, and may forget"
        elif message.type in (MessageType.APP, MessageType.HEARTBEAT, MessageType.SNAP):
            assert durable.hard_state.term >= message.term, "leads in a term that its disk does not know"

    # --- reads ---

    def read_asked(self, node: "Node", context: bytes) -> None:
        self._asked[context] = (self.commit, self._cluster.now, node.raft.term)

    def read_answered(self, node: "Node", context: bytes, index: int) -> None:
        """It sees what was committed anywhere before it was asked; and it proves who leads."""
        self.reads += 1
        commit, began, term = self._asked[context]
        assert index >= commit, f"a read at {index}, when {commit} was committed"
        raft = node.raft
        if raft.role is Role.LEADER and raft.term == term:
            key = (node.node_id, term)
            self._leases[key] = max(self._leases.get(key, 0), began)
