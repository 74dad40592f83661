"""Replicas over memory, driven by hand: messages arrive, disks sync and time passes when a test says so."""

from collections import Counter, deque
from collections.abc import Sequence

from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.replica import Replica
from aspenfs.cluster.types import Configuration, Entry, HardState, Role, Snapshot
from aspenfs.limits import ELECTION_TICKS, TICK_MS


class Node:
    """A replica and its owner: a disk that syncs at once, a state that is the list of what was applied."""

    def __init__(self, node_id: int, cluster: "Replicas") -> None:
        self.node_id, self.cluster = node_id, cluster
        self.ticket = self.revision = 0
        self.applied: list[bytes] = []
        self.sync_due = self.remind_due = False
        self.syncs = True
        self.appends: Counter[int] = Counter()  # sent, by receiver
        raft = Raft(node_id, cluster.configuration, hard_state=HardState(0, 0), entries=(), base_index=0,
                    base_term=0, applied=0, random=lambda bound: node_id % bound, fresh=True)  # fmt: skip
        self.replica = Replica(raft, self, lambda: cluster.now_ns, incarnation=1)

    @property
    def raft(self) -> Raft:
        return self.replica.raft

    # --- Owner ---

    def write(
        self, truncate_after: int | None, entries: Sequence[Entry], hard_state: HardState | None
    ) -> int:
        self.ticket += 1
        return self.ticket

    def request_sync(self) -> None:
        self.sync_due = True

    def send(self, to: int, message: Message) -> None:
        if message.type == MessageType.APP:
            self.appends[to] += 1
        self.cluster.sent.append(message)

    def apply(self, entry: Entry, context: object) -> object:
        self.revision = entry.index
        if entry.data:
            self.applied.append(entry.data[16:])
        return entry.index

    def apply_configuration(self, entry: Entry, configuration: Configuration) -> None:
        self.revision = entry.index

    def committed(self, index: int) -> None: ...

    def remind(self) -> None:
        self.remind_due = True

    def fetch_snapshot(self, snapshot: Snapshot, leader: int) -> None: ...

    # --- what a test does ---

    def sync(self) -> None:
        if self.sync_due and self.syncs:
            self.sync_due = False
            self.replica.synced(self.ticket, self.raft.last_index)

    def remember(self) -> None:
        """The moment that it asked for has passed."""
        if self.remind_due:
            self.remind_due = False
            self.replica.reminded()

    def propose(self, *data: bytes) -> list[object]:
        """What became of them, in the order in which it became known."""
        results: list[object] = []
        for each in data:
            self.replica.propose(each, None, results.append)
        self.replica.pump()
        return results


class Replicas:
    def __init__(self, count: int) -> None:
        self.now_ns = 0
        self.configuration = Configuration(tuple(range(1, count + 1)))
        self.sent: deque[Message] = deque()
        self.cut: set[int] = set()
        self.nodes = {node: Node(node, self) for node in self.configuration.voters}

    def __getitem__(self, node: int) -> Node:
        return self.nodes[node]

    def settle(self) -> None:
        """All that is on its way arrives, all disks sync; no time passes."""
        while self.sent or any(node.sync_due and node.syncs for node in self.nodes.values()):
            while self.sent:
                message = self.sent.popleft()
                if not {message.to, message.sender} & self.cut:
                    node = self.nodes[message.to]
                    node.replica.receive(message)
                    node.replica.pump()
            for node in self.nodes.values():
                node.sync()

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.now_ns += TICK_MS * 1_000_000
            for node in self.nodes.values():
                node.replica.tick()
            self.settle()

    def elect(self) -> Node:
        """Node 1 leads, has a lease, and nobody has asked for anything for a long time."""
        self.nodes[1].raft.campaign()
        self.nodes[1].replica.pump()
        self.settle()
        assert self.nodes[1].raft.role is Role.LEADER
        self.rest()
        return self.nodes[1]

    def rest(self) -> None:
        for _ in range(3 * ELECTION_TICKS):
            self.tick()
            for node in self.nodes.values():
                node.remember()
            self.settle()
        self.lease()

    def lease(self) -> None:
        """For the leader: by a read of its own."""
        self.nodes[1].replica.read(lambda index: None)
        self.nodes[1].replica.pump()
        self.settle()
        for node in self.nodes.values():
            node.appends.clear()
