"""Several real NodeStores in one loop, each with its own disk, over a network whose ways can be cut."""

import random
from collections.abc import AsyncIterator, Callable, Set
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio

from aspenfs.cluster.membership import Change, ChangeKind, ConfigurationChange
from aspenfs.cluster.messages import Message
from aspenfs.cluster.types import Role
from aspenfs.runtime import identity
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.identity import Identity
from aspenfs.runtime.system import SystemClock, SystemEntropy

SECONDS_MAX = 20


class Way:
    """How one node reaches the others."""

    def __init__(self, cluster: "StoreCluster", node: int) -> None:
        self.cluster, self.node = cluster, node

    def send(self, to: int, message: Message) -> None:
        self.cluster.carry(self.node, to, message)

    def flush(self) -> None:
        pass

    def connected(self) -> Set[int]:
        return frozenset(self.cluster.stores) - {self.node}


class StoreCluster:
    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory, self.nursery = directory, nursery
        self.stores: dict[int, NodeStore] = {}
        self.scopes: dict[int, tuple[trio.CancelScope, trio.Event]] = {}
        self.cut: set[tuple[int, int]] = set()
        self.loss = 0.0  # share of messages lost
        self.entropy = SystemEntropy()
        self.lives = 0
        self._draw = random.Random(1)

    async def start(self, node: int, **options: Any) -> NodeStore:
        directory = self.directory / str(node)
        directory.mkdir(exist_ok=True)
        if identity.read(directory) is None:
            identity.write(directory, Identity(b"c" * 16, "demo", node))
        self.lives += 1
        store = NodeStore.open(directory, SystemClock(), self.entropy, incarnation=self.lives,
                               segment_bytes=1 << 22, **options)  # fmt: skip
        store.consensus.network = Way(self, node)
        scope, ended = trio.CancelScope(), trio.Event()

        async def run(task_status: Any) -> None:
            try:
                with scope:
                    await store.run(task_status)
            finally:
                ended.set()

        await self.nursery.start(run)
        self.stores[node], self.scopes[node] = store, (scope, ended)
        return store

    async def stop(self, node: int) -> None:
        scope, ended = self.scopes.pop(node)
        store = self.stores.pop(node)
        scope.cancel()
        with trio.CancelScope(shield=True):
            await ended.wait()
            store.close()

    def carry(self, sender: int, to: int, message: Message) -> None:
        if (sender, to) in self.cut or self._draw.random() < self.loss:
            return
        trio.lowlevel.current_trio_token().run_sync_soon(self._arrive, sender, to, message)

    def _arrive(self, sender: int, to: int, message: Message) -> None:
        if to in self.stores:
            self.stores[to].consensus.receive(sender, [message])

    def isolate(self, node: int) -> None:
        for other in self.stores:
            self.cut |= {(node, other), (other, node)}

    def leader(self) -> NodeStore | None:
        led = [store for store in self.stores.values() if store.consensus.replica.raft.role is Role.LEADER]
        return max(led, key=lambda store: store.consensus.replica.raft.term, default=None)

    async def change(self, kind: ChangeKind, node: int) -> None:
        """By the leader; until every node that runs has applied it."""

        def proposed() -> bool:
            leader = self.leader()
            if leader is None:
                return False
            try:
                leader.consensus.replica.change_configuration(ConfigurationChange((Change(kind, node),)))
            except Exception:
                leader.consensus.wake()
                return False
            leader.consensus.wake()
            return True

        await until(proposed)

    async def grow(self, count: int) -> None:
        """A cluster of `count` voters, ids from 1."""
        await self.start(1)
        for node in range(2, count + 1):
            await self.start(node)
            await self.change(ChangeKind.ADD_LEARNER, node)
            await self.change(ChangeKind.ADD_VOTER, node)
        everybody = tuple(range(1, count + 1))
        await until(lambda: all(store.consensus.replica.raft.configuration.voters == everybody
                                for store in self.stores.values()))  # fmt: skip


Grown = TypeVar("Grown", bound=StoreCluster)


@asynccontextmanager
async def grown(make: Callable[[trio.Nursery], Grown], count: int) -> AsyncIterator[Grown]:
    """The cluster that `make` gives, with `count` voters; all of it ends with the block."""
    async with trio.open_nursery() as nursery:
        cluster = make(nursery)
        await cluster.grow(count)
        try:
            yield cluster
        finally:
            for node in list(cluster.stores):
                await cluster.stop(node)
            nursery.cancel_scope.cancel()


def store_cluster(directory: Path, count: int = 3) -> AbstractAsyncContextManager[StoreCluster]:
    return grown(partial(StoreCluster, directory), count)


async def until(condition: Callable[[], object], seconds: float = SECONDS_MAX) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 – most conditions are figures without an event
            await trio.sleep(0.005)
