"""A seed's worth of trouble for a cluster in memory: everything that may go wrong, in an order of its own.

Each seed draws how often what happens, so that rare mixtures come up too. After every step the
invariants are checked; at the end all is healed, and the cluster must get well.

    python -m tests.cluster.chaos FIRST COUNT STEPS     runs seeds and says which fail
"""

import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from random import Random

from aspenfs import errors
from aspenfs.cluster.membership import Transition
from aspenfs.cluster.messages import Message
from tests.cluster.network import Cluster, Node, add, learn, remove

NODES_MAX = 6


class Chaos:
    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.cluster = Cluster(
            random.choice((1, 2, 3, 3, 3, 5)),
            random=lambda _: random.randrange,
            max_append_bytes=random.choice((100, 300, 1 << 20)),
            max_inflight_messages=random.choice((1, 3, 256)),
            max_inflight_bytes=random.choice((200, 1000, 1 << 24)),
            max_uncommitted_bytes=random.choice((500, 1 << 20)),
            max_unapplied_bytes=random.choice((600, 1 << 20)),
        )
        self.proposed = 0
        self.asked = 0
        self.drops, self.repeats, self.reorders = (random.choice((0.0, 0.02, 0.2)) for _ in range(3))
        self.kinds: list[tuple[Callable[[], None], float]] = [
            (self.deliver, 40.0),
            (self.pump, 30.0),
            (self.tick, random.choice((2.0, 5.0, 20.0))),
            (self.propose, random.choice((1.0, 8.0))),
            (self.begin_sync, 15.0),
            (self.end_sync, random.choice((3.0, 15.0))),
            (self.read, random.choice((0.2, 2.0))),
            (self.crash, random.choice((0.0, 0.1, 0.5))),
            (self.restart, 0.5),
            (self.partition, random.choice((0.0, 0.1, 0.5))),
            (self.heal, random.choice((0.1, 0.4))),
            (self.change, random.choice((0.0, 0.1, 0.5))),
            (self.transfer, random.choice((0.0, 0.02, 0.2))),
            (self.compact, random.choice((0.0, 0.1, 0.5))),
            (self.sync_state, 0.3),
            (self.fetch, 0.5),
            (self.unreachable, random.choice((0.0, 0.1))),
            (self.campaign, random.choice((0.0, 0.02))),
        ]

    def run(self, steps: int) -> None:
        actions = [action for action, _ in self.kinds]
        weights = [weight for _, weight in self.kinds]
        for action in self.random.choices(actions, weights, k=steps):
            action()
        self.get_well()

    def one(self) -> Node | None:
        running = self.cluster.running
        return self.random.choice(running) if running else None

    def victim(self) -> Node | None:
        """It hurts most where the leader is."""
        return self.cluster.leader if self.random.random() < 0.5 else self.one()

    # --- what happens ---

    def deliver(self) -> None:
        """A burst: mostly in order, which keeps things going."""
        mail, random = self.cluster.mail, self.random
        for _ in range(random.randrange(1, 8)):
            if not mail:
                return
            if random.random() < self.reorders:
                mail.rotate(random.randrange(len(mail)))
            message: Message = mail.popleft()
            if random.random() < self.repeats:
                mail.append(message)
            if random.random() >= self.drops:
                self.cluster.deliver(message)

    def pump(self) -> None:
        node = self.one()
        if node is not None:
            node.pump()

    def tick(self) -> None:
        self.cluster.tick(settle=False)

    def propose(self) -> None:
        node = self.one()
        if node is None:
            return
        data = [
            b"%d" % (self.proposed + at) + bytes(self.random.choice((0, 0, 100)))
            for at in range(self.random.randrange(1, 5))
        ]
        try:
            self.cluster.propose(node.node_id, *data)
        except (errors.NotLeader, errors.Overloaded):
            return
        self.proposed += len(data)

    def begin_sync(self) -> None:
        node = self.one()
        if node is not None and node.disk.sync is None and node.unsynced:
            node.begin_sync()

    def end_sync(self) -> None:
        node = self.one()
        if node is not None and node.disk.sync is not None:
            node.end_sync()

    def read(self) -> None:
        node = self.one()
        if node is not None:
            self.asked += 1
            self.cluster.read(node.node_id, b"%d" % self.asked)

    def crash(self) -> None:
        node = self.victim()
        if node is not None:
            node.crash(self.random.randrange(4))

    def restart(self) -> None:
        down = [node for node in self.cluster.nodes.values() if not node.up]
        if down:
            self.random.choice(down).start()

    def partition(self) -> None:
        cluster, random = self.cluster, self.random
        ids, victim = list(cluster.nodes), self.victim()
        match random.randrange(3):
            case 0:
                cluster.cut((random.choice(ids), random.choice(ids)))
            case 1:
                cluster.isolate(*random.sample(ids, random.randrange(len(ids))))
            case _ if victim is not None:
                cluster.isolate(victim.node_id)

    def heal(self) -> None:
        self.cluster.heal()

    def change(self) -> None:
        leader, random = self.cluster.leader, self.random
        if leader is None:
            return
        ids = list(range(1, NODES_MAX + 1))
        kinds = (add, learn, remove)
        changes = [random.choice(kinds)(random.choice(ids)) for _ in range(random.choice((0, 1, 1, 1, 2, 3)))]
        try:
            self.cluster.change(leader.node_id, *changes, transition=random.choice(list(Transition)))
        except (errors.NotLeader, errors.Busy, errors.InvalidArgument):
            return
        for change in changes:
            if change.node not in self.cluster.nodes:
                self.cluster.add_node(change.node)

    def transfer(self) -> None:
        node = self.one()
        if node is not None:
            try:
                node.raft.transfer_leader(self.random.choice(list(self.cluster.nodes)))
            except (errors.NotLeader, errors.InvalidArgument):
                return

    def sync_state(self) -> None:
        node = self.one()
        if node is not None:
            node.sync_state()

    def compact(self) -> None:
        node = self.one()
        if node is not None:
            node.compact(max(0, node.state.index - self.random.choice((0, 3, 10))))

    def fetch(self) -> None:
        node = self.one()
        if node is None or node.fetching is None:
            return
        sources = [each for each in self.cluster.running if each.state.index >= node.fetching.index]
        if sources and self.random.random() < 0.8:
            node.install(self.random.choice(sources))
        else:
            node.fail_fetch()

    def unreachable(self) -> None:
        node = self.one()
        if node is not None:
            node.raft.report_unreachable(self.random.choice(list(self.cluster.nodes)))
            node.raft.report_snapshot(
                self.random.choice(list(self.cluster.nodes)), self.random.random() < 0.5
            )

    def campaign(self) -> None:
        node = self.one()
        if node is not None:
            node.raft.campaign()

    # --- and how it ends ---

    def get_well(self) -> None:
        """Whole links and running nodes: soon there is a leader, and all have what it commits."""
        cluster = self.cluster
        cluster.heal()
        for node in cluster.nodes.values():
            if not node.up:
                node.start()
            if node.disk.sync is not None:
                node.end_sync()
        self.wait_for("a leader without changes under way", self.is_quiet)
        self.wait_for("the last proposal", self.has_last)
        leader = cluster.leader
        assert leader is not None
        index = leader.state.index
        members = [cluster[node] for node in set().union(*leader.raft.configuration[:4])]
        self.wait_for("all to have it", lambda: all(node.state.index >= index for node in members))
        self.wait_for("reads", lambda: self.read_last(members))
        assert len({tuple(node.state.entries[:index]) for node in members}) == 1

    def has_last(self) -> bool:
        """Proposed again and again: it may be lost with a leader."""
        leader = self.cluster.leader
        if leader is None or b"the end" in leader.data:
            return leader is not None
        with suppress(errors.Overloaded, errors.NotLeader):
            self.cluster.propose(leader.node_id, b"the end")
        return False

    def read_last(self, members: list[Node]) -> bool:
        """Asked again and again: a question may be lost with a leader."""
        for node in members:
            self.cluster.read(node.node_id, b"the end of %d" % node.node_id)
        return all(b"the end of %d" % node.node_id in node.reads for node in members)

    def is_quiet(self) -> bool:
        leader = self.cluster.leader
        if leader is None or leader.raft.transferring or not leader.raft.committed_in_term:
            return False
        configuration = leader.raft.configuration
        return not leader.raft.change_pending or bool(configuration.outgoing and not configuration.auto_leave)

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        for _ in range(400):
            if condition():
                return
            self.cluster.tick()
            for node in self.cluster.running:
                if node.fetching is not None:
                    node.install(max(self.cluster.running, key=lambda each: each.state.index))
        raise AssertionError(f"waited in vain for {what}")


def main(first: int, count: int, steps: int) -> None:
    failed = []
    for seed in range(first, first + count):
        try:
            Chaos(seed).run(steps)
        except Exception:
            failed.append(seed)
            if len(failed) <= 3:
                print(f"seed {seed}:", file=sys.stderr)
                traceback.print_exc()
    print(f"{count} seeds from {first}, {len(failed)} failed: {failed[:50]}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
