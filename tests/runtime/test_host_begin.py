"""Transactions that have their place before they are committed, on real stores. tests/cluster/test_notices.py
has the cases that need their time exactly."""

from pathlib import Path

import trio

from aspenfs.kv.types import TxnResult, absent, put
from aspenfs.runtime.host import NodeStore
from tests.runtime.store_cluster import SECONDS_MAX, StoreCluster, store_cluster, until


async def quiet(cluster: StoreCluster) -> NodeStore:
    """The leader. Everybody has everything."""
    leader = cluster.leader()
    assert leader is not None
    await leader.txn([], [put(b"k/first", b"")])
    await until(lambda: len({store.revision for store in cluster.stores.values()}) == 1)
    return leader


def test_what_has_begun_is_seen_elsewhere_before_it_is_committed_here(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_cluster(tmp_path) as cluster:
            leader = await quiet(cluster)
            await leader.barrier()
            begun = leader.begin([absent(b"k/new")], [put(b"k/new", b"x")])
            assert begun is not None
            assert leader.get(b"k/new") is None
            other = next(store for store in cluster.stores.values() if store is not leader)
            await other.barrier()
            assert other.get(b"k/new") is not None
            result = await begun.outcome()
            assert isinstance(result, TxnResult)
            assert result.succeeded
            assert leader.get(b"k/new") is not None

    trio.run(main)


def test_only_the_leader_begins_and_nothing_of_others_may_be_under_way(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_cluster(tmp_path) as cluster:
            leader = await quiet(cluster)
            other = next(store for store in cluster.stores.values() if store is not leader)
            await other.barrier()
            assert other.begin([], [put(b"k/x", b"")]) is None
            await leader.barrier()
            replica = leader.consensus.replica
            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(other.txn, [], [put(b"k/%d" % number, b"")])
                with trio.fail_after(SECONDS_MAX):
                    while replica.raft.last_index == leader.revision and not replica._foreign_queued:
                        await trio.lowlevel.checkpoint()
                assert leader.begin([], [put(b"k/y", b"")]) is None
            own = [leader.begin([], [put(b"k/%d" % number, b"own")]) for number in range(3)]
            for begun in own:
                assert begun is not None
                await begun.outcome()
            assert leader.get(b"k/2").value == b"own"  # type: ignore[union-attr]

    trio.run(main)
