"""NodeStores that are replicas of each other: agreement, forwarding, reads, leaders that go."""

from pathlib import Path

import pytest
import trio

from aspenfs import errors
from aspenfs.cluster.membership import ChangeKind
from aspenfs.cluster.messages import Message, MessageType
from aspenfs.kv import commands, types
from aspenfs.kv.types import absent, append, merge, put
from aspenfs.limits import PROPOSAL_TIMEOUT_MS
from aspenfs.runtime.host import NodeStore
from tests.runtime.host_driver import hash_of
from tests.runtime.store_cluster import SECONDS_MAX, store_cluster, until

BOUND_S = PROPOSAL_TIMEOUT_MS / 1000 - 1  # sooner than by the setting that it replaces


def followers(cluster: object) -> list[NodeStore]:
    leader = cluster.leader()  # type: ignore[attr-defined]
    return [store for store in cluster.stores.values() if store is not leader]  # type: ignore[attr-defined]


def test_what_any_node_writes_all_have_and_read(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_cluster(tmp_path) as cluster:
            for node, store in cluster.stores.items():
                assert not store.alone
                done = await store.txn([absent(b"k/%d" % node)], [put(b"k/%d" % node, b"x")])
                assert done.succeeded
                assert store.get(b"k/%d" % node) is not None
                assert await store.committed(done.revision) >= done.revision
                for other in cluster.stores.values():
                    assert await other.barrier() >= done.revision
                    assert other.get(b"k/%d" % node) is not None
            await until(lambda: len({store.revision for store in cluster.stores.values()}) == 1)
            assert len({hash_of(store) for store in cluster.stores.values()}) == 1

    trio.run(main)


def test_of_racing_creators_exactly_one_wins(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_cluster(tmp_path) as cluster:
            wins: list[int] = []

            async def create(node: int, number: int) -> None:
                key = b"k/%d" % number
                if (await cluster.stores[node].txn([absent(key)], [put(key, b"%d" % node)])).succeeded:
                    wins.append(number)

            async with trio.open_nursery() as racers:
                for number in range(50):
                    for node in cluster.stores:
                        racers.start_soon(create, node, number)
            assert sorted(wins) == list(range(50))

    trio.run(main)


def test_requests_in_flight_survive_the_leader(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_cluster(tmp_path) as cluster:
            store = followers(cluster)[0]
            acknowledged: list[int] = []

            async def write(number: int) -> None:
                await store.txn([], [merge(b"k/log", append(b"%d," % number))])
                acknowledged.append(number)

            async with trio.open_nursery() as writers:
                for number in range(100):
                    writers.start_soon(write, number)
                    if number == 50:
                        leader = cluster.leader()
                        assert leader is not None
                        await cluster.stop(leader.node_id)
                    await trio.sleep(0.001)
            record = store.get(b"k/log")
            assert record is not None
            # Each of them once: neither lost nor applied twice by being proposed again.
            assert sorted(map(int, record.value.rstrip(b",").split(b","))) == list(range(100))
            assert sorted(acknowledged) == list(range(100))

    trio.run(main)


def test_lossy_network_neither_loses_nor_repeats(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_cluster(tmp_path) as cluster:
            cluster.loss = 0.2

            async def write(store: NodeStore, number: int) -> None:
                await store.txn([], [merge(b"k/log", append(b"%d," % number))])

            async with trio.open_nursery() as writers:
                for number in range(90):
                    writers.start_soon(write, cluster.stores[1 + number % 3], number)
                    await trio.sleep(0.002)
            cluster.loss = 0.0
            store = cluster.stores[1]
            await store.barrier()
            record = store.get(b"k/log")
            assert record is not None
            assert sorted(map(int, record.value.rstrip(b",").split(b","))) == list(range(90))

    trio.run(main)


def test_without_majority_calls_fail_after_a_bounded_time_and_stale_reads_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_cluster(tmp_path) as cluster:
            store = followers(cluster)[0]
            await store.txn([], [put(b"k/a", b"1")])
            settings = store._replica._settings
            store._replica._settings = settings._replace(timeout_ns=10**9)
            cluster.isolate(store.node_id)
            with trio.fail_after(BOUND_S), pytest.raises(errors.NoQuorum):
                await store.txn([], [put(b"k/a", b"2")])
            with trio.fail_after(BOUND_S), pytest.raises(errors.NoQuorum):
                await store.barrier()
            store._replica._settings = settings  # on a busy machine a second is soon over
            assert store.get(b"k/a") is not None
            others = [other for other in cluster.stores.values() if other is not store]
            with trio.fail_after(SECONDS_MAX):
                await others[0].txn([], [put(b"k/b", b"1")])
            cluster.cut.clear()
            with trio.fail_after(SECONDS_MAX):
                await store.barrier()
            assert store.get(b"k/b") is not None

    trio.run(main)


def test_all_stopped_and_started_again_have_everything(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_cluster(tmp_path) as cluster:
            for number in range(20):
                await cluster.stores[1 + number % 3].txn([], [put(b"k/%d" % number, b"x")])
            revision = max(store.revision for store in cluster.stores.values())
            for node in list(cluster.stores):
                await cluster.stop(node)
            for node in (1, 2, 3):
                await cluster.start(node)
            for store in cluster.stores.values():
                assert await store.barrier() >= revision
                assert len(store.range(b"k/", b"k0")) == 20

    trio.run(main)


def test_three_become_one_again_and_it_is_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_cluster(tmp_path) as cluster:
            leader = cluster.leader()
            assert leader is not None
            raft = leader.consensus.replica.raft
            for count, store in enumerate(followers(cluster), 1):
                await cluster.change(ChangeKind.REMOVE, store.node_id)
                await until(lambda left=3 - count: len(raft.configuration.voters) == left)  # type: ignore[misc]
            await until(lambda: leader.alone)
            assert (await leader.txn([], [put(b"k/a", b"1")])).succeeded

    trio.run(main)


def test_a_node_that_meets_what_a_newer_release_wrote_stops_and_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_cluster(tmp_path) as cluster:
            old = followers(cluster)[0]
            newer = next(store for store in cluster.stores.values() if store is not old)
            command, _ = newer.engine.txn_command([], [put(b"k/a", b"new")])
            unknown = commands.encode(command._replace(body=((), [(types.UPDATE + 1, b"k/a", b"new")], ())))
            await newer.consensus.propose(command, unknown, None)
            await trio.sleep(100)  # the node's task ends it

    with pytest.raises(BaseExceptionGroup) as raised:
        trio.run(main)
    told = raised.value.subgroup(errors.NotSupported)
    assert told is not None
    assert "newer release" in str(told.exceptions)


def test_a_node_that_hears_of_lost_entries_stops_and_serves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_cluster(tmp_path) as cluster:
            store, other = followers(cluster)
            raft, sent = store.consensus.replica.raft, []
            term = raft.term + 1
            lost = Message(MessageType.APP, store.node_id, other.node_id, term, term, index=raft.commit)
            cluster.carry = lambda *message: sent.append(message)  # type: ignore[method-assign]
            store.consensus.receive(other.node_id, [lost])
            store.consensus.receive(other.node_id, [lost._replace(type=MessageType.VOTE, term=term + 1)])
            with pytest.raises(errors.EntriesLost):
                store.get(b"k")
            await trio.sleep(0.01)
            assert store.node_id not in {sender for sender, *_ in sent}

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main)
    assert caught.value.subgroup(errors.EntriesLost) is not None
