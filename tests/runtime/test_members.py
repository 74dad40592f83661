"""Removing nodes, asked anywhere, also the one that leads: real NodeStores, requests without sockets."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from aspenfs import errors
from aspenfs.cluster.types import NodeId
from aspenfs.kv.types import put
from aspenfs.runtime.members import CHANGE, Members
from aspenfs.runtime.peers.network import REMOVED
from tests.runtime.snapshot_wire import Wire
from tests.runtime.store_cluster import StoreCluster, store_cluster, until


class Line:
    """The requests of one node; who was removed is cut off before it gets the answer."""

    def __init__(self, node: int, wire: Wire, everybody: dict[int, Members]) -> None:
        self._node, self._end, self._everybody = node, wire.end(node), everybody

    def _check(self, to: int) -> None:
        row = self._everybody[to].table().get(self._node)
        if row is not None and row.state == "removed":
            raise errors.PeerUnreachable(f"it says: node {self._node} {REMOVED}")

    async def request(self, to: NodeId, kind: str, body: Any, *, timeout_s: float) -> Any:
        self._check(to)
        try:
            return await self._end.request(to, kind, body, timeout_s=timeout_s)
        finally:
            self._check(to)


@asynccontextmanager
async def cluster_with_members(directory: Path) -> AsyncIterator[tuple[StoreCluster, dict[int, Members]]]:
    async with store_cluster(directory) as cluster:
        wire, everybody = Wire(), dict[int, Members]()
        for node, store in cluster.stores.items():
            everybody[node] = members = Members(store, store.consensus)
            members.requests = Line(node, wire, everybody)
            wire.handlers[node, CHANGE] = members.answer  # type: ignore[assignment]  # NodeId is an int
            await members.introduce(f"n{node}", [f"192.0.2.{node}:7420"], b"", 1)
        yield cluster, everybody


def leader_of(cluster: StoreCluster) -> int:
    leader = cluster.leader()
    assert leader is not None
    return leader.node_id


@pytest.mark.parametrize("who", ["leader", "follower"])
@pytest.mark.parametrize("asked", ["itself", "another"])
def test_node_is_removed_whoever_it_is_and_whoever_is_asked(tmp_path: Path, who: str, asked: str) -> None:
    async def main() -> None:
        async with cluster_with_members(tmp_path) as (cluster, everybody):
            leader = leader_of(cluster)
            leaving = leader if who == "leader" else next(node for node in everybody if node != leader)
            staying = [node for node in everybody if node != leaving]
            with trio.fail_after(8):
                await everybody[leaving if asked == "itself" else staying[0]].change("remove", leaving)
            await until(lambda: all(everybody[node].table()[leaving].state == "removed" for node in staying))
            for node in staying:
                assert everybody[node].configuration.voters == tuple(staying)
                assert everybody[node].leader in staying

    trio.run(main)


def test_leader_is_removed_while_others_write(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster_with_members(tmp_path) as (cluster, everybody):
            leader = leader_of(cluster)
            staying = [node for node in everybody if node != leader]
            written = 0

            async def write() -> None:
                nonlocal written
                while True:
                    await cluster.stores[staying[1]].txn([], [put(b"k/%d" % written, b"v" * 5_000)])
                    written += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await until(lambda: written > 20)
                await everybody[staying[0]].change("remove", leader)
                so_far = written
                await until(lambda: written > so_far + 20)
                nursery.cancel_scope.cancel()
            assert everybody[staying[0]].table()[leader].state == "removed"

    trio.run(main)


def test_leader_that_nobody_can_succeed_stays(tmp_path: Path) -> None:
    async def main() -> None:
        async with cluster_with_members(tmp_path) as (cluster, everybody):
            leader = leader_of(cluster)
            for node in everybody:
                if node != leader:
                    await cluster.stop(node)
            with pytest.raises(errors.AspenError):
                await everybody[leader].change("remove", leader)
            assert everybody[leader].table()[leader].state == "member"
            assert leader in everybody[leader].configuration.voters

    trio.run(main)
