"""Real NodeStores in one loop that compare their states and get well, over requests that can be cut."""

from collections.abc import Callable, Sequence, Set
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple

import trio
import trio.testing

from aspenfs.errors import PeerUnreachable
from aspenfs.kv import records
from aspenfs.kv.types import Record
from aspenfs.runtime.catching_up import CatchingUp
from aspenfs.runtime.checkpoints import Checkpoints
from aspenfs.runtime.divergence import Divergence, Verdict
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.members import Members
from aspenfs.runtime.snapshots.server import SnapshotServer
from aspenfs.runtime.system import SystemClock
from tests.kv.subject import FakeEntropy
from tests.runtime.snapshot_wire import End, Wire
from tests.runtime.store_cluster import StoreCluster, grown, until

PLENTY = 1 << 40
NEVER_S = 1_000.0


class _Line(End):
    """The requests of one node."""

    def __init__(self, cluster: "ComparedCluster", node: int) -> None:
        super().__init__(cluster.wire, node)
        self._cluster = cluster

    def connected(self) -> Set[int]:
        return frozenset(self._cluster.stores) - {self._node}

    async def request(self, to: Any, kind: str, body: Any, *, timeout_s: float) -> Any:
        if to not in self._cluster.stores or self._cluster.refused(self._node, to, kind):
            await trio.lowlevel.checkpoint()
            raise PeerUnreachable(f"node {to} is cut off")
        return await super().request(to, kind, body, timeout_s=timeout_s)


class Parts(NamedTuple):
    checkpoints: Checkpoints
    divergence: Divergence
    snapshots: SnapshotServer
    scope: trio.CancelScope


class ComparedCluster(StoreCluster):
    def __init__(self, directory: Path, nursery: trio.Nursery, period_s: float) -> None:
        super().__init__(directory, nursery)
        self.wire, self.period_s = Wire(), period_s
        self.parts: dict[int, Parts] = {}
        # Whether a request (from, to, kind) gets lost.
        self.refused: Callable[[int, int, str], bool] = lambda sender, to, kind: False

    async def start(self, node: int, **options: Any) -> NodeStore:
        store = await super().start(node, **options)
        for key in [key for key in self.wire.handlers if key[0] == node]:
            del self.wire.handlers[key]
        line, scope = _Line(self, node), trio.CancelScope()
        snapshots = SnapshotServer(store.state, FakeEntropy(), lambda: PLENTY,
                                   lambda: store.quarantine and store.quarantine.error())  # fmt: skip
        snapshots.register(line)
        store.suspended.append(snapshots.look)
        checkpoints = Checkpoints(store.state, store.applier, lambda: PLENTY)
        divergence = Divergence(store, checkpoints, line, SystemClock(),
                                Members(store, store.consensus).step_down, period_s=self.period_s,
                                again_s=min(self.period_s, 0.2))  # fmt: skip
        catching_up = CatchingUp(store, line, store.directory)

        async def run() -> None:
            with scope:
                async with trio.open_nursery() as nursery:
                    for part in (checkpoints, divergence, snapshots, catching_up):
                        nursery.start_soon(part.run)

        self.nursery.start_soon(run)
        self.parts[node] = Parts(checkpoints, divergence, snapshots, scope)
        return store

    async def stop(self, node: int) -> None:
        self.parts.pop(node).scope.cancel()
        await super().stop(node)

    def hold_states_back(self) -> None:
        """Nobody gets another node's state for now."""
        self.refused = lambda sender, to, kind: kind.startswith("snapshot.")

    async def compare(self, node: int = 1) -> Verdict:
        async def waits(index: int) -> None: ...

        with trio.fail_after(30):
            return await self.parts[node].divergence.compare(waits)

    async def settled(self) -> None:
        """All have evaluated and applied the same; verdicts may go into the log meanwhile."""
        stores = list(self.stores.values())
        await evaluated_by_all(stores)
        for store in stores:
            await store.committed(store.revision)
            await store.applied(store.revision)

    async def settled_but(self, node: int) -> None:
        """As `settled`, without that one."""
        stores = [store for store in self.stores.values() if store.node_id != node]
        await evaluated_by_all(stores)
        for store in stores:
            await store.applied(store.revision)

    def spoil(self, node: int, key: bytes, value: bytes) -> None:
        """What a disk could do: another value in the database of that node, and nobody is told."""
        state = self.stores[node].state
        with state._env.begin(write=True, db=state._root) as txn:
            record = records.unpack(txn.get(key) or b"")
            txn.put(key, records.pack(Record(value, *record[1:])))
        state.refresh()


async def evaluated_by_all(stores: Sequence[NodeStore]) -> None:
    await until(lambda: len({store.revision for store in stores}) == 1)


def compared_cluster(
    directory: Path, count: int = 3, *, period_s: float = NEVER_S
) -> AbstractAsyncContextManager[ComparedCluster]:
    """`period_s` is between two comparisons; by default they are made on demand."""
    return grown(lambda nursery: ComparedCluster(directory, nursery, period_s), count)
