"""A cluster in memory: real cores, disks that lose what is not synced, a network in the test's hand.

Belongs here: what an owner of a core does (docs/design/cluster.md), and no more. What must hold is in
`invariants.py`, called after every step. Nothing happens by itself: tests tick, deliver and sync, or let
`settle` do so until nothing is left to do.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import msgpack

from aspenfs.cluster.membership import Change, ChangeKind, ConfigurationChange, Transition
from aspenfs.cluster.messages import Message, from_wire
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.types import Configuration, Entry, EntryKind, HardState, Ready, Role, Snapshot
from tests.cluster.invariants import Checker

NORMAL, CONFIGURATION = int(EntryKind.NORMAL), int(EntryKind.CONFIGURATION)


class Image:
    """A log as it stands on a disk."""

    def __init__(self) -> None:
        self.base_index = self.base_term = 0
        self.entries: list[Entry] = []
        self.hard_state = HardState(0, 0)

    def write(
        self, truncate_after: int | None, entries: Sequence[Entry], hard_state: HardState | None
    ) -> None:
        if truncate_after is not None:
            del self.entries[truncate_after - self.base_index :]
        if hard_state is not None:
            self.hard_state = hard_state
        self.entries += entries

    def reset(self, index: int, term: int) -> None:
        self.base_index, self.base_term, self.entries = index, term, []

    def trim(self, index: int) -> None:
        count = index - self.base_index
        if count > 0:
            self.base_term = self.entries[count - 1].term
            del self.entries[:count]
            self.base_index = index

    def copy(self) -> "Image":
        image = Image()
        image.base_index, image.base_term, image.hard_state = self.base_index, self.base_term, self.hard_state
        image.entries = list(self.entries)
        return image

    def term_at(self, index: int) -> int | None:
        if index == self.base_index:
            return self.base_term
        position = index - self.base_index - 1
        return self.entries[position].term if 0 <= position < len(self.entries) else None

    @property
    def last(self) -> tuple[int, int]:
        return (
            (self.entries[-1].index, self.entries[-1].term)
            if self.entries
            else (self.base_index, self.base_term)
        )


Write = tuple[int | None, Sequence[Entry], HardState | None]


class Sync(NamedTuple):
    """One under way: it covers what had been written when it began."""

    ticket: int
    index: int  # type: ignore[assignment]
    term: int


class Disk:
    """`durable` is what a power failure leaves; writes wait in order."""

    def __init__(self) -> None:
        self.view, self.durable = Image(), Image()
        self.ticket = self.synced = 0
        self._writes: deque[Write] = deque()
        self.sync: Sync | None = None

    def write(self, *write: Any) -> None:
        self.view.write(*write)
        self._writes.append(write)
        self.ticket += 1

    def begin_sync(self) -> None:
        self.sync = Sync(self.ticket, *self.view.last)

    def end_sync(self) -> Sync:
        sync = self.sync
        assert sync is not None
        self.sync = None
        while self.synced < sync.ticket:
            self.durable.write(*self._writes.popleft())
            self.synced += 1
        return sync

    def crash(self, kept: int) -> None:
        """`kept` writes that were not synced are there all the same."""
        for _ in range(min(kept, len(self._writes))):
            self.durable.write(*self._writes.popleft())
        self.view = self.durable.copy()
        self._writes.clear()
        self.synced = self.ticket
        self.sync = None

    def reset(self, index: int, term: int) -> None:
        """A snapshot has been installed, durably; the hard state stays."""
        for image in (self.view, self.durable):
            image.reset(index, term)
        self.durable.hard_state = self.view.hard_state
        self._writes.clear()
        self.synced = self.ticket
        self.sync = None

    def trim(self, index: int) -> None:
        self.view.trim(index)
        self.durable.trim(index)


class State:
    """A state machine that remembers everything: entry i is at place i - 1."""

    def __init__(self, genesis: Configuration) -> None:
        self.entries: list[tuple[int, bytes]] = []  # term, data
        self.configurations: list[tuple[int, Configuration]] = [(0, genesis)]

    @property
    def index(self) -> int:
        return len(self.entries)

    def configuration_at(self, index: int) -> Configuration:
        return [each for at, each in self.configurations if at <= index][-1]

    def until(self, index: int) -> "State":
        state = State(self.configurations[0][1])
        state.entries = self.entries[:index]
        state.configurations = [each for each in self.configurations if each[0] <= index]
        return state

    def snapshot(self, index: int) -> Snapshot:
        term = self.entries[index - 1][0] if index else 0
        return Snapshot(index, term, self.configuration_at(index))


class Node:
    """A core and its owner."""

    def __init__(self, node_id: int, cluster: "Cluster", **options: Any) -> None:
        self.node_id, self.cluster, self.options = node_id, cluster, options
        self.disk = Disk()
        self.state = State(cluster.genesis)
        self.durable_index = 0  # of the state
        self.up = False
        self.reads: dict[bytes, int] = {}  # answered: context -> index
        self.fetching: Snapshot | None = None
        self._after_sync: deque[tuple[int, Sequence[Message]]] = deque()
        self.raft: Raft
        self.start(fresh=True)

    def start(self, *, fresh: bool = False) -> None:
        assert not self.up
        self.state = self.state.until(self.durable_index)
        image = self.disk.view
        self.raft = Raft(
            self.node_id,
            self.state.configuration_at(self.durable_index),
            hard_state=image.hard_state,
            entries=image.entries,
            base_index=image.base_index,
            base_term=image.base_term,
            applied=self.durable_index,
            random=self.cluster.random(self.node_id),
            fresh=fresh,
            **self.options,
        )
        self.up = True

    def crash(self, kept: int = 0) -> None:
        assert self.up
        self.up = False
        self.disk.crash(kept)
        self.cluster.checker.crashed(self)
        self._after_sync.clear()
        self.fetching = None
        self.reads.clear()

    def pump(self) -> bool:
        """Carries out what the core wants, but for syncs. Whether there was anything."""
        busy = False
        while self.up and self.raft.has_ready:
            busy = True
            self.carry_out(self.raft.ready())
            self.cluster.checker.check(self)
        return busy

    def carry_out(self, ready: Ready) -> None:
        disk = self.disk
        assert ready.must_sync is (
            bool(ready.entries) or ready.hard_state is not None or ready.truncate_after is not None
        )
        if ready.must_sync:
            disk.write(ready.truncate_after, ready.entries, ready.hard_state)
        self.send(ready.messages)
        if disk.synced == disk.ticket:
            self.send(ready.messages_after_sync)
        elif ready.messages_after_sync:
            self._after_sync.append((disk.ticket, ready.messages_after_sync))
        if ready.snapshot is not None:
            assert self.fetching is None
            self.fetching = ready.snapshot
        self.apply(ready.committed)
        for context, index in ready.reads:
            self.reads[context] = index
            self.cluster.checker.read_answered(self, context, index)

    def send(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self.cluster.checker.sent(self, message)
            self.cluster.post(message)

    def apply(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            assert entry.index == self.state.index + 1
            self.cluster.checker.applied(self, entry)
            self.state.entries.append((entry.term, entry.data))
            if entry.kind == CONFIGURATION:
                configuration = self.raft.apply_configuration(ConfigurationChange.decode(entry.data))
                self.state.configurations.append((entry.index, configuration))
        if entries:
            self.raft.applied_to(entries[-1].index)

    # --- disk ---

    @property
    def leads(self) -> bool:
        return self.up and self.raft.role is Role.LEADER

    @property
    def unsynced(self) -> bool:
        return self.disk.synced < self.disk.ticket

    def begin_sync(self) -> None:
        self.disk.begin_sync()

    def end_sync(self) -> None:
        sync = self.disk.end_sync()
        while self._after_sync and self._after_sync[0][0] <= sync.ticket:
            self.send(self._after_sync.popleft()[1])
        self.raft.persisted(sync.index, sync.term)
        self.cluster.checker.check(self)

    def sync(self) -> None:
        self.begin_sync()
        self.end_sync()

    def sync_state(self) -> None:
        self.durable_index = self.state.index
        self.raft.set_snapshot(self.state.snapshot(self.durable_index))

    def compact(self, index: int | None = None) -> None:
        """The durable state makes the log before it superfluous."""
        self.sync_state()
        index = self.durable_index if index is None else index
        self.raft.compact(index)
        self.disk.trim(index)

    # --- snapshots ---

    def install(self, source: "Node", index: int | None = None) -> Snapshot:
        """Fetches the state of `source`, as of now or of `index`, and takes it."""
        index = source.state.index if index is None else index
        snapshot = source.state.snapshot(index)
        assert self.fetching is not None
        self.fetching = None
        self.state = source.state.until(index)
        self.durable_index = index
        self._after_sync.clear()  # the owner waits for its log to be still
        self.disk.reset(snapshot.index, snapshot.term)
        self.raft.snapshot_installed(snapshot)
        self.cluster.checker.check(self)
        return snapshot

    def fail_fetch(self) -> None:
        self.fetching = None
        self.raft.snapshot_failed()

    @property
    def data(self) -> list[bytes]:
        """What was proposed and is applied here."""
        configurations = {at for at, _ in self.state.configurations}
        return [
            data for at, (_, data) in enumerate(self.state.entries, 1) if data and at not in configurations
        ]


class Cluster:
    """Nodes by id. Links are whole unless cut; a message on a cut link is lost."""

    def __init__(
        self,
        voters: int | Sequence[int] = 3,
        *,
        learners: Sequence[int] = (),
        random: Callable[[int], Callable[[int], int]] | None = None,
        **options: Any,
    ) -> None:
        ids = tuple(range(1, voters + 1)) if isinstance(voters, int) else tuple(voters)
        self.genesis = Configuration(ids, learners=tuple(learners))
        # A lower id stands for election sooner, unless the test has its own way.
        self.random = random or (lambda node_id: lambda bound: min(3 * (node_id - 1), bound - 1))
        self.options = options
        self.checker = Checker(self)
        self.now = 0  # ticks
        self.mail: deque[Message] = deque()
        self.lost: list[Message] = []
        self._cut: set[tuple[int, int]] = set()
        self.nodes: dict[int, Node] = {}
        for node_id in (*ids, *learners):
            self.add_node(node_id)

    def __getitem__(self, node_id: int) -> Node:
        return self.nodes[node_id]

    def add_node(self, node_id: int) -> Node:
        """One that knows of the cluster what it began with."""
        self.nodes[node_id] = node = Node(node_id, self, **self.options)
        return node

    @property
    def running(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.up]

    # --- network ---

    def post(self, message: Message) -> None:
        """By way of its bytes, as between real nodes."""
        self.mail.append(from_wire(msgpack.unpackb(msgpack.packb(message), use_list=False)))

    def cut(self, *pairs: tuple[int, int]) -> None:
        """One way each."""
        self._cut.update(pairs)

    def isolate(self, *ids: int) -> None:
        """These talk to each other only, and so do the others."""
        for one in self.nodes:
            for other in self.nodes:
                if (one in ids) != (other in ids):
                    self._cut.add((one, other))

    def heal(self) -> None:
        self._cut.clear()

    def is_cut(self, message: Message) -> bool:
        return (message.sender, message.to) in self._cut

    def deliver(self, message: Message) -> None:
        node = self.nodes.get(message.to)
        if node is None or not node.up or self.is_cut(message):
            self.lost.append(message)
            return
        node.raft.step(message)
        self.checker.check(node)

    # --- time ---

    def tick(self, count: int = 1, *, settle: bool = True) -> None:
        """All who run, `count` times; between ticks everything that can happen does."""
        for _ in range(count):
            self.now += 1
            for node in self.running:
                node.raft.tick()
                self.checker.check(node)
            if settle:
                self.settle()

    def settle(self) -> None:
        """Until nobody has anything to do, but for the passing of time and the fetching of snapshots."""
        rounds = 0
        while self.round():
            rounds += 1
            assert rounds < 5_000, "messages go to and fro without end"

    def round(self, deliveries: int | None = None) -> bool:
        """Everybody does what there is and syncs, then messages arrive. Whether there was anything."""
        busy = False
        for node in self.running:
            busy |= node.pump()
            if node.unsynced:
                node.sync()
                busy = True
        for _ in range(len(self.mail) if deliveries is None else min(deliveries, len(self.mail))):
            self.deliver(self.mail.popleft())
            busy = True
        return busy

    def until(self, condition: Callable[[], bool]) -> None:
        """Message by message, and no further than `condition`."""
        while not condition():
            assert self.round(1), "nothing happens any more"

    def pump(self) -> None:
        """Everybody carries out what there is, without syncs and deliveries."""
        for node in self.running:
            node.pump()

    # --- short ways ---

    @property
    def leader(self) -> Node | None:
        """The one of the highest term."""
        leaders = [node for node in self.nodes.values() if node.leads]
        return max(leaders, key=lambda node: node.raft.term, default=None)

    def elect(self, node_id: int) -> Node:
        """`node_id` stands for election once the others' promises are over."""
        node = self.nodes[node_id]
        for _ in range(100):
            if not node.leads:
                node.raft.campaign()
                self.settle()
            if node.leads:
                return node
            self.tick()
        raise AssertionError(f"node {node_id} is not elected")

    def propose(self, node_id: int, *data: bytes) -> int:
        return self.nodes[node_id].raft.propose([(NORMAL, each) for each in data])

    def change(self, node_id: int, *changes: Change, transition: int = Transition.AUTO) -> int:
        return self.nodes[node_id].raft.propose_configuration(ConfigurationChange(changes, transition))

    def read(self, node_id: int, context: bytes) -> bool:
        self.checker.read_asked(self.nodes[node_id], context)
        return self.nodes[node_id].raft.read_index(context)


def add(node_id: int) -> Change:
    return Change(ChangeKind.ADD_VOTER, node_id)


def learn(node_id: int) -> Change:
    return Change(ChangeKind.ADD_LEARNER, node_id)


def remove(node_id: int) -> Change:
    return Change(ChangeKind.REMOVE, node_id)
