"""States that differ are found, the odd one answers nothing, gets well, and loses nothing it promised."""

import logging
from pathlib import Path

import pytest
import trio

from aspenfs import errors
from aspenfs.cluster.membership import ChangeKind
from aspenfs.cluster.types import Configuration
from aspenfs.kv.types import append, merge, put
from aspenfs.runtime import quarantine
from aspenfs.runtime.checkpoints import UNREADABLE
from aspenfs.runtime.divergence import Verdict, majority, pack, unpack
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.members import Members
from tests.runtime.compared import ComparedCluster, compared_cluster
from tests.runtime.host_driver import hash_of
from tests.runtime.store_cluster import until

A, B, C = b"a" * 32, b"b" * 32, b"c" * 32


def other_than(cluster: ComparedCluster, node: int) -> NodeStore:
    return next(store for store in cluster.stores.values() if store.node_id != node)


def follower(cluster: ComparedCluster) -> int:
    leader = cluster.leader()
    assert leader is not None
    return other_than(cluster, leader.node_id).node_id


async def spoiled(cluster: ComparedCluster, node: int) -> None:
    for number in range(20):
        await cluster.stores[node].txn([], [put(b"k/%d" % number, b"value")])
    await cluster.settled()
    cluster.spoil(node, b"k/7", b"rotten")


# --- finding out ---


def test_states_are_compared_at_one_entry_while_all_write(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path, period_s=0.1) as cluster, trio.open_nursery() as writers:

            async def write(store: NodeStore) -> None:
                number = 0
                while True:
                    number += 1
                    await store.txn([], [put(b"k/%d/%d" % (store.node_id, number % 50), b"%d" % number)])

            for store in cluster.stores.values():
                writers.start_soon(write, store)
            seen: set[int] = set()
            grown = cluster.stores[1].revision
            with trio.fail_after(30):
                while len(seen) < 5:
                    await trio.sleep(0.01)
                    latest = [parts.divergence.latest for parts in cluster.parts.values()]
                    if None not in latest and len({verdict.index for verdict in latest if verdict}) == 1:
                        assert latest[0] is not None
                        if latest[0].index <= grown:
                            continue  # some were no members yet
                        seen.add(latest[0].index)
                        assert latest[0].digest
                        assert len(latest[0].told) == 3
                        assert set(latest[0].told.values()) == {latest[0].digest}
            writers.cancel_scope.cancel()
            assert all(store.quarantine is None for store in cluster.stores.values())

    trio.run(main)


def test_any_node_can_have_them_compared_now(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path) as cluster:
            for node in (1, 2, 3):
                verdict = await cluster.compare(node)
                assert set(verdict.told) == {1, 2, 3}
                assert verdict.differing == ()
                await until(lambda: all(parts.divergence.latest == verdict  # noqa: B023 – not kept
                                        for parts in cluster.parts.values()))  # fmt: skip

    trio.run(main)


def test_a_node_alone_has_nothing_to_compare(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path, 1) as cluster:
            with pytest.raises(errors.InvalidArgument):
                await cluster.compare()

    trio.run(main)


@pytest.mark.parametrize("leads", [False, True])
def test_the_odd_one_answers_nothing_and_gets_well(
    tmp_path: Path, leads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path) as cluster:
            leader = cluster.leader()
            assert leader is not None
            bad = leader.node_id if leads else follower(cluster)
            store = cluster.stores[bad]
            await spoiled(cluster, bad)
            watcher = store.watch(b"k/", b"k0")
            cluster.hold_states_back()
            verdict = await cluster.compare(other_than(cluster, bad).node_id)
            assert verdict.differing == (bad,)
            await until(lambda: store.quarantine is not None)
            for read in (lambda: store.get(b"k/7"), lambda: store.range(b"k/", b"k0"),
                         lambda: store.scan(b"k/", b"k0"), lambda: store.leases(),
                         lambda: store.watch(b"k/", b"k0"), store.snapshot):  # fmt: skip
                with pytest.raises(errors.Diverged, match=f"entry {verdict.index}"):
                    read()
            for call in (lambda: store.txn([], [put(b"k/new", b"")]), store.barrier,
                         lambda: store.lease_grant(1000), lambda: cluster.compare(bad)):  # fmt: skip
                with pytest.raises(errors.Diverged):
                    await call()
            answer = await cluster.parts[bad].snapshots.open(1, {"index": 0})
            assert set(answer) == {"refused"}
            assert store.get(b"c/digests") is not None  # its own rows
            assert store.status()["state"] == "quarantine"
            await until(lambda: (tmp_path / str(bad) / quarantine.FILE_NAME).exists())
            # The others go on, and another one leads.
            done = await other_than(cluster, bad).txn([], [put(b"k/meanwhile", b"x")])
            await until(lambda: (led := cluster.leader()) is not None and led.node_id != bad)

            first_index = store.status()["wal_first"]
            replaced: list[bool] = []
            store.replaced.append(lambda: replaced.append(True))
            cluster.refused = lambda sender, to, kind: False
            with trio.fail_after(20):
                await store.well()
            assert replaced
            assert not (tmp_path / str(bad) / quarantine.FILE_NAME).exists()
            assert await store.barrier() >= done.revision
            record = store.get(b"k/7")
            assert record is not None
            assert record.value == b"value"
            assert store.get(b"k/meanwhile") is not None
            assert store.status()["wal_first"] == first_index, "the log was thrown away"
            assert (await store.txn([], [put(b"k/after", b"y")])).succeeded
            await cluster.settled()
            assert len({hash_of(each) for each in cluster.stores.values()}) == 1
            assert (await cluster.compare(bad)).differing == ()
            with pytest.raises(errors.Lagged):
                await watcher.__anext__()

    trio.run(main)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(told) == 1
    assert "quarantine" in told[0]


def test_the_leader_finds_out_by_itself_now_and_then(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path, period_s=0.3) as cluster:
            bad = follower(cluster)
            await spoiled(cluster, bad)
            suspended: list[bool] = []
            cluster.stores[bad].suspended.append(lambda: suspended.append(True))
            await until(lambda: suspended)
            await until(lambda: cluster.stores[bad].quarantine is None)
            await until(lambda: all((verdict := parts.divergence.latest) is not None
                                    and len(verdict.told) == 3 and not verdict.differing
                                    for parts in cluster.parts.values()))  # fmt: skip
            record = cluster.stores[bad].get(b"k/7")
            assert record is not None
            assert record.value == b"value"

    trio.run(main)


@pytest.mark.parametrize("count", [2, 3])
def test_without_a_majority_there_is_an_alarm_and_nothing_is_touched(tmp_path: Path, count: int) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path, count) as cluster:
            await spoiled(cluster, 1)
            if count == 3:
                cluster.spoil(2, b"k/7", b"rotten too")
            verdict = await cluster.compare()
            assert not verdict.digest
            assert verdict.differing == tuple(range(1, count + 1))
            await until(lambda: all(parts.divergence.latest == verdict for parts in cluster.parts.values()))
            await trio.sleep(0.1)
            for store in cluster.stores.values():
                assert store.quarantine is None
                assert store.get(b"k/7") is not None
            assert (await cluster.stores[1].txn([], [put(b"k/goes-on", b"")])).succeeded

    trio.run(main)


def test_one_that_was_away_finds_out_when_it_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path) as cluster:
            bad = follower(cluster)
            await spoiled(cluster, bad)
            await cluster.stop(bad)
            verdict = await cluster.compare(other_than(cluster, bad).node_id)
            assert bad in verdict.silent
            assert verdict.digest
            suspended: list[bool] = []
            store = await cluster.start(bad)
            store.suspended.append(lambda: suspended.append(True))
            await until(lambda: suspended)
            with trio.fail_after(20):
                await store.well()
            record = store.get(b"k/7")
            assert record is not None
            assert record.value == b"value"

    trio.run(main)


def test_too_few_that_tell_bring_no_verdict_into_the_log(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path) as cluster:
            leader = cluster.leader()
            assert leader is not None
            cluster.refused = lambda sender, to, kind: kind == "state.checkpoint"
            verdict = await cluster.compare(leader.node_id)
            assert set(verdict.told) == {leader.node_id}
            assert set(verdict.silent) == {1, 2, 3} - {leader.node_id}
            assert not verdict.says_something
            assert cluster.parts[1].divergence.latest is None

    trio.run(main)


# --- the log of a node in quarantine ---


def test_it_starts_in_quarantine_and_gets_well(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path) as cluster:
            bad = follower(cluster)
            await spoiled(cluster, bad)
            cluster.hold_states_back()
            await cluster.compare(other_than(cluster, bad).node_id)
            await until(lambda: (tmp_path / str(bad) / quarantine.FILE_NAME).exists())
            await cluster.stop(bad)
            await other_than(cluster, bad).txn([], [put(b"k/meanwhile", b"x")])
            store = await cluster.start(bad)
            with pytest.raises(errors.Diverged):
                store.get(b"k/7")
            revision = other_than(cluster, bad).revision
            await until(lambda: store.consensus.replica.raft.commit >= revision)
            assert store.revision < revision, "it has built upon a bad state"
            cluster.refused = lambda sender, to, kind: False
            with trio.fail_after(20):
                await store.well()
            await store.barrier()
            assert store.get(b"k/meanwhile") is not None
            await cluster.settled()
            assert len({hash_of(each) for each in cluster.stores.values()}) == 1

    trio.run(main)


def test_its_vote_and_its_log_count_meanwhile(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path) as cluster:
            bad = follower(cluster)
            await spoiled(cluster, bad)
            cluster.hold_states_back()
            await cluster.compare(other_than(cluster, bad).node_id)
            await until(lambda: cluster.stores[bad].quarantine is not None)
            leader = cluster.leader()
            assert leader is not None
            await cluster.stop(leader.node_id)
            last = other_than(cluster, bad)
            with trio.fail_after(20):  # elected by the vote of the bad one, committed by its log
                for number in range(10):
                    await last.txn([], [merge(b"k/log", append(b"%d" % number))])
            cluster.refused = lambda sender, to, kind: False
            store = cluster.stores[bad]
            if last.node_id not in (store.quarantine.sources if store.quarantine else ()):
                pytest.fail("the other node was found to be good")
            with trio.fail_after(20):
                await store.well()
                await store.barrier()
            record = store.get(b"k/log")
            assert record is not None
            assert record.value == b"0123456789"

    trio.run(main)


def test_what_it_had_proposed_is_answered_and_applied_at_most_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path) as cluster:
            bad = follower(cluster)
            store = cluster.stores[bad]
            await spoiled(cluster, bad)
            told: list[int] = []
            unknown: list[int] = []

            async def write(number: int) -> None:
                try:
                    await store.txn([], [merge(b"k/log", append(b"%d," % number))])
                    told.append(number)
                except errors.Diverged:
                    unknown.append(number)

            with trio.fail_after(40):
                async with trio.open_nursery() as writers:
                    number = 0
                    writers.start_soon(cluster.compare, other_than(cluster, bad).node_id)
                    while store.quarantine is None:
                        number += 1
                        writers.start_soon(write, number)
                        await trio.sleep(0.001)
                await store.well()
                for number in range(10_000, 10_020):
                    await write(number)
            await store.barrier()
            record = store.get(b"k/log")
            assert record is not None
            found = list(map(int, record.value.rstrip(b",").split(b",")))
            assert len(set(found)) == len(found)
            assert set(told) <= set(found) <= set(told) | set(unknown)
            assert set(range(10_000, 10_020)) <= set(told)
            await until(lambda: not store.consensus.replica.proposed_bytes)

    trio.run(main)


def test_what_comes_while_the_state_is_on_its_way_is_applied_upon_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path) as cluster:
            bad = follower(cluster)
            store = cluster.stores[bad]
            await spoiled(cluster, bad)
            cluster.refused = lambda sender, to, kind: kind == "snapshot.read"
            await cluster.compare(other_than(cluster, bad).node_id)
            await until(lambda: any(parts.snapshots.pinned for parts in cluster.parts.values()))
            opened = cluster.wire.count("snapshot.open")
            leader = cluster.leader()
            assert leader is not None
            heir = next(node for node in (1, 2, 3) if node not in (bad, leader.node_id))
            await Members(leader, leader.consensus).lead(heir)
            for number in range(20):
                await cluster.stores[heir].txn([], [merge(b"k/log", append(b"%d," % number))])
            cluster.refused = lambda sender, to, kind: False
            with trio.fail_after(20):
                await store.well()
                await store.barrier()
            assert cluster.wire.count("snapshot.open") == opened
            await cluster.settled()
            assert len({hash_of(each) for each in cluster.stores.values()}) == 1
            for index in (store.revision, store.revision + 1):
                assert store.consensus.meta_at(index) == cluster.stores[heir].consensus.meta_at(index)

    trio.run(main)


def test_a_log_that_does_not_reach_the_new_state_is_emptied(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path) as cluster:
            bad = follower(cluster)
            store = cluster.stores[bad]
            await spoiled(cluster, bad)
            cluster.hold_states_back()
            await cluster.compare(other_than(cluster, bad).node_id)
            await until(lambda: store.quarantine is not None)
            cluster.isolate(bad)  # no entries come in, requests go on
            for number in range(20):
                await other_than(cluster, bad).txn([], [put(b"k/later/%d" % number, b"x")])
            last, applied = store.consensus.replica.raft.last_index, other_than(cluster, bad).revision
            for other in cluster.stores.values():
                if other is not store:
                    await other.applied(applied)
            assert last < applied
            cluster.refused = lambda sender, to, kind: False
            await store.well()
            assert int(store.status()["wal_first"]) > last
            assert store.revision >= applied
            cluster.cut.clear()
            await store.barrier()
            assert (await store.txn([], [put(b"k/after", b"y")])).succeeded
            await cluster.settled()
            assert len({hash_of(each) for each in cluster.stores.values()}) == 1

    trio.run(main)


def test_changes_of_the_configuration_that_it_passes_over_count(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path) as cluster:
            bad = follower(cluster)
            store = cluster.stores[bad]
            await spoiled(cluster, bad)
            cluster.hold_states_back()
            await cluster.compare(other_than(cluster, bad).node_id)
            await until(lambda: store.quarantine is not None)
            await cluster.start(4)
            await cluster.change(ChangeKind.ADD_LEARNER, 4)
            healthy = other_than(cluster, bad)
            await until(lambda: 4 in healthy.consensus.replica.raft.configuration.learners)
            await cluster.settled_but(bad)
            cluster.refused = lambda sender, to, kind: False
            with trio.fail_after(20):
                await store.well()
                await store.barrier()
            assert store.consensus.replica.raft.configuration.learners == (4,)
            await cluster.change(ChangeKind.ADD_VOTER, 4)
            await until(lambda: all(each.consensus.replica.raft.configuration.voters == (1, 2, 3, 4)
                                    for each in cluster.stores.values()))  # fmt: skip
            await cluster.settled()
            assert len({hash_of(each) for each in cluster.stores.values()}) == 1

    trio.run(main)


# --- judging ---


@pytest.mark.parametrize(
    ("configuration", "told", "found"),
    [
        (Configuration((1, 2, 3)), {1: A, 2: A, 3: A}, A),
        (Configuration((1, 2, 3)), {1: A, 2: A, 3: B}, A),
        (Configuration((1, 2, 3)), {1: A, 2: A}, A),
        (Configuration((1, 2, 3)), {1: A}, b""),
        (Configuration((1, 2, 3)), {1: A, 2: B, 3: C}, b""),
        (Configuration((1, 2)), {1: A, 2: B}, b""),
        (Configuration((1, 2, 3, 4)), {1: A, 2: A, 3: B, 4: B}, b""),
        (Configuration((1, 2, 3)), {1: UNREADABLE, 2: UNREADABLE, 3: A}, b""),
        (Configuration((1,), learners=(2, 3)), {1: A, 2: B, 3: B}, A),  # learners have no say
        (Configuration((1, 2, 3), (3, 4, 5)), {1: A, 2: A, 3: A, 4: B, 5: B}, b""),  # both halves
        (Configuration((1, 2, 3), (3, 4, 5)), {1: A, 2: A, 3: A, 4: A, 5: B}, A),
    ],
)
def test_a_majority_of_the_voters_is_right(
    configuration: Configuration, told: dict[int, bytes], found: bytes
) -> None:
    assert majority(configuration, told) == found


def test_a_verdict_survives_its_row() -> None:
    verdict = Verdict(7, 8, A, {1: A, 2: UNREADABLE, 1 << 62: A}, {4: "away"})
    assert unpack(pack(verdict)) == verdict
    assert verdict.differing == (2,)


# --- the marker ---


def test_a_quarantine_survives_its_file(tmp_path: Path) -> None:
    found = quarantine.Quarantine(7, A, UNREADABLE, (1, 2))
    assert quarantine.read(tmp_path) is None
    quarantine.write(tmp_path, found)
    assert quarantine.read(tmp_path) == found
    (tmp_path / quarantine.FILE_NAME).write_bytes(b"{}")
    with pytest.raises(errors.Corrupt):
        quarantine.read(tmp_path)


def test_a_node_alone_with_a_bad_state_does_not_start(tmp_path: Path) -> None:
    async def main() -> None:
        async with compared_cluster(tmp_path, 1) as cluster:
            await cluster.stop(1)
            quarantine.write(tmp_path / "1", quarantine.Quarantine(7, A, B, (2,)))
            with pytest.raises(errors.Corrupt, match="no other member"):
                await cluster.start(1)

    trio.run(main)
