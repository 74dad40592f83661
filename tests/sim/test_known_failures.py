"""Failures that other systems had, each with the test that we owe it (named after where it was found).

Here are those that a cluster in virtual time can show. Those about one part are beside that part: the core in
tests/cluster/, watches and compaction in tests/kv/, log, state and snapshots on disk in tests/runtime/.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from aspenfs import errors
from aspenfs.cluster.membership import Change, ChangeKind, ConfigurationChange
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.replica import Replica
from aspenfs.cluster.types import Role
from aspenfs.kv import types
from aspenfs.kv.types import Batch, TxnResult
from aspenfs.limits import ELECTION_TICKS, TICK_MS, WATCH_BUFFER_BATCHES
from aspenfs.sim import network, serving
from aspenfs.sim.faults import Swarm
from aspenfs.sim.process import Process
from aspenfs.sim.revisions import Change as LogChange
from aspenfs.sim.revisions import Watched, check_resumed
from aspenfs.sim.scheduler import MS
from aspenfs.sim.simulation import plan, run
from aspenfs.sim.threads import Task
from tests.sim.scenario import NO_QUORUM, Answer, Scenario, value

ELECTION_MS = ELECTION_TICKS * TICK_MS
SMALL: dict[str, Any] = {  # for small segments of the log
    "segment_bytes": 16 << 10,
    "make_raft": functools.partial(Raft, max_append_bytes=2 << 10),
    "make_replica": functools.partial(Replica, batch_bytes=2 << 10),
}


@pytest.fixture
def three() -> Iterator[Scenario]:
    with Scenario(3) as scenario:
        yield scenario


class Watch:
    """Follows user keys on one node."""

    def __init__(self, scenario: Scenario, node: int, from_revision: int) -> None:
        self.batches: list[LogChange] = []
        self.ended: list[Exception | None] = []
        self.from_revision = from_revision
        self.process: Process = scenario[node]
        self._scheduler = scenario.cluster.scheduler
        watcher = self.process.engine.watch(b"k/", b"k0", from_revision=from_revision)

        async def follow() -> None:
            async for batch in watcher:
                self.batches.append(change(batch))

        self.task = Task(follow(), self._soon, self.ended.append)
        self.process.tasks.append(self.task)

    def _soon(self, step: object) -> None:
        self._scheduler.after(0, lambda: self.process.do(step))  # type: ignore[arg-type]

    @property
    def revisions(self) -> list[int]:
        return [batch.revision for batch in self.batches]


def change(batch: Batch) -> LogChange:
    return LogChange(
        batch.revision, [(one.key, one.record.value if one.record else None) for one in batch.events]
    )


# --- storage ---


@pytest.mark.parametrize("power", [True, False], ids=["power", "process"])
def test_etcd_13766_state_and_applied_index_are_never_apart(power: bool) -> None:
    """The process dies in each effect of applying under load; what is found is the state of its index."""
    for effect in range(1, 60, 2):
        with Scenario(3, seed=effect, flush_ns=5 * MS) as scenario:
            leader = scenario.leader()
            machine = scenario.cluster.machines[scenario.others(leader)[effect % 2]]
            answers = [scenario.txn(leader, [], [types.put(b"k/%d" % (n % 7), b"%d" % n)]) for n in range(40)]
            machine.crash_in, machine.power = effect, power
            for answer in answers:
                answer.result()
            scenario.until(lambda machine=machine: not machine.up)  # type: ignore[misc]
            # Process.__init__ compares the whole state with what the log says up to its applied index.
            scenario.start(machine.node)
            scenario.settle()


def test_etcd_14370_one_node_acknowledges_what_is_on_its_disk_alone() -> None:
    for seed in range(30):
        with Scenario(1, seed=seed, sync_ns=20 * MS) as scenario:
            scenario.leader()
            scenario.put(1, b"k/before", b"")
            answers = [scenario.txn(1, [], [types.put(b"k/%d" % n, b"")]) for n in range(10)]
            scenario.pass_ms(seed)
            told = [n for n, answer in enumerate(answers) if answer.there]
            scenario.down(1, power=True)
            engine = scenario.start(1).engine
            assert value(engine, b"k/before") == b""
            assert all(value(engine, b"k/%d" % n) == b"" for n in told)


def test_etcd_14571_every_kind_of_entry_moves_the_applied_index(three: Scenario) -> None:
    leader = three.leader()
    engine = three[leader].engine
    commands = [
        engine.grant_command(5_000, 7),
        engine.keepalive_command(7),
        engine.keepalive_command(8),  # no such lease
        engine.txn_command([types.exists(b"k/none")], [types.put(b"k/none", b"")])[0],
        engine.txn_command([], [types.delete(b"k/none")])[0],
        engine.txn_command([], [], (), (b"c" * 16, 1))[0],
        engine.txn_command([], [], (), (b"c" * 16, 1))[0],  # a repetition
        engine.txn_command([], [], (), (b"c" * 16, 2))[0],
        engine.txn_command([], [types.put(b"k/leased", b"", 7)])[0],
        engine.compact_command(3),
        engine.compact_command(1 << 40),  # a revision to come
        engine.checkpoint_command(),
        engine.revoke_command(7),
    ]
    for command in commands:
        before = three.cluster.invariants.applied_index
        three.submit(leader, command).result()
        assert three.cluster.invariants.applied_index == before + 1
    before = three.cluster.invariants.applied_index
    three[leader].do(three[leader].replica.change_configuration,
                     ConfigurationChange((Change(ChangeKind.ADD_LEARNER, 9),)))  # fmt: skip
    three[leader].do(three[leader].replica.pump)
    three.until(lambda: three.cluster.invariants.applied_index == before + 1)
    three.settle()
    for node in three.nodes:
        three.down(node, power=True)
    for node in three.nodes:
        assert three.start(node).engine.revision == before + 1
    three.settle()
    assert len({three.cluster.machines[node].state.digest() for node in three.nodes}) == 1


@pytest.mark.parametrize("power", [True, False], ids=["power", "process"])
def test_etcd_14685_crash_in_each_step_of_taking_over_a_snapshot(power: bool) -> None:
    installed = 0
    for effect in range(1, 14):
        with Scenario(3, seed=effect, keep_entries=0, flush_ns=20 * MS) as scenario:
            leader = scenario.leader()
            lagging = scenario.others(leader)[0]
            scenario.isolate(lagging)
            for n in range(30):
                scenario.put(leader, b"k/%d" % n, b"")
            scenario.pass_ms(500)
            scenario.heal()
            machine = scenario.cluster.machines[lagging]
            scenario.until(lambda process=scenario[lagging]: process.replica.installing is not None)  # type: ignore[misc]
            machine.crash_in, machine.power = effect, power
            scenario.until(lambda machine=machine: not machine.up or machine.state.applied_index >= 30)  # type: ignore[misc]
            installed += not machine.up
            machine.crash_in = None
            scenario.start(lagging)
            scenario.settle()
            assert value(scenario[lagging].engine, b"k/29") == b""
    assert installed > 3


@pytest.mark.parametrize("power", [True, False], ids=["power", "process"])
def test_etcd_14098_14143_16596_node_starts_after_a_crash_anywhere_in_its_first_steps(power: bool) -> None:
    """First start, first entries, segments that roll: at every operation of the disk."""
    for operation in range(1, 70):
        with Scenario(3, seed=operation, started=False, **SMALL) as scenario:
            machine = scenario.cluster.machines[2]
            (machine.disk.crash_at if power else machine.disk.kill_at)(operation)
            machine.power = power
            # `start` forgets planned faults, as it heals the disk: so the first process is made by hand.
            machine.incarnation = 1
            try:
                machine.process = Process(machine)
                machine.process.begin()
            except BaseException:
                machine.down(power)
            for node in (1, 3):
                scenario.start(node)
            scenario.leader()
            for n in range(40):
                scenario.put(1 + 2 * (n % 2), b"k/%d" % n, bytes(600))
            if not machine.up:
                scenario.start(2)
            scenario.settle()


# --- reads and watches ---


def test_etcd_2014_consul_2014_leader_that_was_cut_off_answers_no_read(three: Scenario) -> None:
    old = three.leader()
    three.put(old, b"k/a", b"1")
    assert three.get(old, b"k/a") == b"1"  # from now on it has a lease
    three.isolate(old)
    pending = [three.ask(old, lambda engine: value(engine, b"k/a"))]
    new = three.leader_among(three.others(old))
    three.put(new, b"k/a", b"2")
    pending.append(three.ask(old, lambda engine: value(engine, b"k/a")))
    assert pending[0].result(within_ms=0) == b"1"  # under its lease, before there was another leader
    assert pending[1].result() is NO_QUORUM
    three.heal()
    assert three.get(old, b"k/a") == b"2"


def test_etcd_15271_reader_that_resumes_elsewhere_goes_not_back_and_misses_nothing(three: Scenario) -> None:
    leader = three.leader()
    there, behind = three.others(leader)
    three.isolate(behind)
    first = Watch(three, there, 1)
    for n in range(20):
        three.put(leader, b"k/%d" % n, b"%d" % n)
    three.until(lambda: len(first.batches) == 20)
    seen = first.batches[-1].revision
    first.task.cancel()
    assert three[behind].engine.revision < seen
    second = Watch(three, behind, seen + 1)
    three.pass_ms(200)
    assert second.batches == []
    three.heal()
    for n in range(20, 25):
        three.put(leader, b"k/%d" % n, b"%d" % n)
    three.until(lambda: len(second.batches) == 5)
    watches = [Watched(b"k/", b"k0", watch.from_revision, watch.batches) for watch in (first, second)]
    assert not check_resumed(watches, three.cluster.log)


def test_etcd_15220_20221_watch_of_a_revision_to_come_gets_nothing_before_it_on_any_node(
    three: Scenario,
) -> None:
    leader = three.leader()
    three.put(leader, b"k/a", b"")
    three.settle()
    future = three[leader].engine.revision + 5
    watches = [Watch(three, node, future) for node in three.nodes]
    lagging = three.others(leader)[0]
    three.isolate(lagging)
    for _ in range(8):
        three.put(leader, b"k/a", b"")
    three.heal()
    three.settle()
    three.until(lambda: all(len(watch.batches) == 4 for watch in watches))
    assert {tuple(watch.revisions) for watch in watches} == {tuple(range(future, future + 4))}


def test_etcd_17247_17529_slow_reader_is_told_so_and_a_retry_is_one_event(three: Scenario) -> None:
    leader = three.leader()
    node = three.others(leader)[0]
    watch = Watch(three, node, three[leader].engine.revision + 1)
    watch.process.pause()  # the reader's process takes nothing in
    for _ in range(3):
        command, _ = three[leader].engine.txn_command([], [
            types.merge(b"k/list", types.append(b"x"))], (), (b"c" * 16, 1))  # fmt: skip
        three.submit(leader, command).result()
    for n in range(WATCH_BUFFER_BATCHES + 10):
        three.txn(leader, [], [types.put(b"k/n", b"%d" % n)])
    three.pass_ms(3_000)
    # The process goes on, but its reader does not come to read: every batch stays in the buffer.
    step, watch._soon = watch._soon, lambda step: None  # type: ignore[method-assign]
    watch.process.resume()
    three.settle()
    watch._soon = step  # type: ignore[method-assign]
    watch.task.wake()
    three.until(lambda: bool(watch.ended))
    error = watch.ended[0]
    assert isinstance(error, errors.Lagged)
    assert sum(1 for batch in watch.batches for key, _ in batch.events if key == b"k/list") == 1
    again = Watch(three, node, error.revision)
    three.until(lambda: bool(again.batches) and again.revisions[-1] == three[node].engine.revision)
    watches = [Watched(b"k/", b"k0", one.from_revision, one.batches) for one in (watch, again)]
    assert not check_resumed(watches, three.cluster.log)


def test_etcd_17780_18089_18667_19179_compaction_is_alike_everywhere_and_survives(three: Scenario) -> None:
    leader = three.leader()
    for n in range(6):
        three.put(leader, b"k/a", b"%d" % n)
    deleted = three.txn(leader, [], [types.delete(b"k/a")]).result().revision
    for n in range(6):
        three.put(leader, b"k/b", b"%d" % n)
    while three.submit(leader, three[leader].engine.compact_command(deleted)).result():
        pass
    three.settle()

    def looks() -> list[object]:
        found: list[object] = []
        for node in three.nodes:
            engine = three[node].engine
            with pytest.raises(errors.Compacted) as compacted:
                engine.get(b"k/a", revision=deleted - 1)
            with pytest.raises(errors.Compacted):
                engine.watch(b"k/", b"k0", from_revision=deleted - 1)
            assert engine.get(b"k/a", revision=deleted) is None
            found.append((compacted.value.oldest, engine.revision))
        return found

    assert looks() == [(deleted, three[leader].engine.revision)] * 3
    watches = [Watch(three, node, deleted) for node in three.nodes]
    three.until(lambda: all(len(watch.batches) == 7 for watch in watches))
    assert all(watch.batches[0].events == [(b"k/a", None)] for watch in watches)  # the deletion is there
    revision = three[leader].engine.revision
    for node in three.nodes:
        three.down(node, power=True)
    for node in three.nodes:
        assert three.start(node).engine.revision >= three.cluster.machines[node].state.durable_index
    three.leader()
    three.settle()
    assert all(three[node].engine.revision > revision for node in three.nodes)
    assert looks()[0] == looks()[1]


def test_etcd_2020_watch_from_revision_0_begins_before_the_first_entry(three: Scenario) -> None:
    leader = three.leader()
    three.put(leader, b"k/a", b"")
    for node in three.nodes:
        watch = Watch(three, node, 0)
        three.until(lambda watch=watch: len(watch.batches) == 1)  # type: ignore[misc]


def test_etcd_2020_lock_whose_lease_ended_is_no_lock_and_its_fence_says_so(three: Scenario) -> None:
    """Expiry is not mutual exclusion: who holds a lock names its create revision in each write."""
    leader = three.leader()
    three.submit(leader, three[leader].engine.grant_command(1_000, 7)).result()
    lock = [types.absent(b"k/lock")], [types.put(b"k/lock", b"first", 7)]
    first = three.txn(leader, *lock).result()
    assert first.succeeded
    three.pass_ms(2_000)
    expire = three[leader].engine.expire_command()
    assert expire is not None
    three.submit(leader, expire).result()
    second = three.txn(leader, [types.absent(b"k/lock")], [types.put(b"k/lock", b"second")]).result()
    assert second.succeeded

    def guarded(holder: TxnResult) -> bool:
        fence = types.compare_create_revision(b"k/lock", types.EQUAL, holder.revision)
        result = three.txn(leader, [fence], [types.put(b"k/guarded", b"")]).result()
        return bool(result.succeeded)

    assert not guarded(first)
    assert guarded(second)


# --- leaders ---


@pytest.mark.parametrize("nodes", [3, 5])
def test_dqlite_raft_203_pre_vote_does_not_undo_a_transfer(nodes: int) -> None:
    with Scenario(nodes) as scenario:
        leader = scenario.leader()
        for target in scenario.others(leader):
            current = scenario.leader()
            term = scenario[current].raft.term
            scenario[current].do(scenario[current].replica.transfer_leader, target)
            scenario[current].do(scenario[current].replica.pump)
            scenario.until(lambda target=target: scenario.leader() == target, within_ms=ELECTION_MS)  # type: ignore[misc]
            assert scenario[target].raft.term == term + 1


def test_consul_7031_leadership_goes_to_up_to_date_voters_alone(three: Scenario) -> None:
    leader = three.leader()
    learner, voter = three.others(leader)
    process = three[leader]
    process.do(process.replica.change_configuration,
               ConfigurationChange((Change(ChangeKind.ADD_LEARNER, learner),)))  # fmt: skip
    process.do(process.replica.pump)
    three.until(lambda: process.raft.configuration.learners == (learner,))
    for target in (learner, 99):
        with pytest.raises(errors.InvalidArgument):
            process.replica.transfer_leader(target)
    three.settle()
    # Through another node nothing happens either.
    three[voter].do(three[voter].replica.transfer_leader, learner)
    three[voter].do(three[voter].replica.pump)
    three.pass_ms(3 * ELECTION_MS)
    assert three.leader() == leader
    # To a voter that lags it goes when that one has caught up, or not at all.
    three.isolate(voter)
    answers = [three.txn(leader, [], [types.put(b"k/%d" % n, b"")]) for n in range(20)]
    process.do(process.replica.transfer_leader, voter)
    process.do(process.replica.pump)
    three.heal()
    for answer in answers:
        answer.result()
    three.leader()


def test_nomad_consul_storm_of_transfers_ends_in_a_leader(three: Scenario) -> None:
    for n in range(100):
        leader = three.cluster.leader()
        if leader is not None:
            target = three.nodes[n % 3]
            leader.do(transfer, leader, target)
        three.pass_ms(20)
    leader_node = three.leader()
    three.put(leader_node, b"k/after", b"")


def transfer(process: Process, target: int) -> None:
    if process.raft.role is Role.LEADER:
        process.replica.transfer_leader(target)
        process.replica.pump()


SHAPES: dict[str, Callable[[list[int]], list[network.Link]]] = {
    "bridge": lambda nodes: network.bridge(nodes, nodes[0]),
    "ring": network.ring,
    "deaf leader": lambda nodes: network.one_way(nodes, nodes[0]),
    "one link": lambda nodes: network.between(nodes[:1], nodes[1:2]),
}


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("seed", range(5))
def test_cloudflare_2020_partial_partition_does_not_stall(shape: str, seed: int) -> None:
    """While it lasts there is a leader that commits, within ten election timeouts; and it stays."""
    with Scenario(5, seed=seed) as scenario:
        leader = scenario.leader()
        scenario.put(leader, b"k/before", b"")
        nodes = [leader, *scenario.others(leader)]
        scenario.cluster.network.block(SHAPES[shape](nodes))
        commit = scenario.cluster.invariants.commit
        scenario.pass_ms(ELECTION_MS)

        def writes() -> bool:
            for process in scenario.cluster.processes():
                if process.raft.role is Role.LEADER:
                    scenario.txn(process.node, [], [types.put(b"k/during", b"")])
            scenario.pass_ms(100)
            return scenario.cluster.invariants.commit > commit

        scenario.until(writes, within_ms=10 * ELECTION_MS)
        terms = len(scenario.cluster.invariants.leaders)
        scenario.pass_ms(20 * ELECTION_MS)
        assert len(scenario.cluster.invariants.leaders) - terms <= 1


def test_node_that_comes_back_from_a_partition_deposes_nobody(three: Scenario) -> None:
    leader = three.leader()
    away = three.others(leader)[0]
    three.isolate(away)
    three.pass_ms(10 * ELECTION_MS)
    three.heal()
    three.pass_ms(5 * ELECTION_MS)
    assert three.leader() == leader
    assert len(three.cluster.invariants.leaders) == 1


# --- retries ---


def test_ambiguous_timeout_retry_with_a_number_applies_once(three: Scenario) -> None:
    """The leader dies when it has committed, before its client hears; the retry gets the first result."""
    leader = three.leader()
    node, other = three.others(leader)
    command, _ = three[leader].engine.txn_command(
        [], [types.merge(b"k/list", types.append(b"x"))], (), (b"c" * 16, 1)
    )
    first = Answer(three)
    three[leader].do(serving.submit, three[leader], command, first.came)
    three.until(
        lambda: value(three[node].engine, b"k/list") == b"x" or value(three[leader].engine, b"k/list") == b"x"
    )
    revision = three.cluster.invariants.applied_index
    three.down(leader, power=True)
    three.leader_among([node, other])
    again = three.txn(node, [], [types.merge(b"k/list", types.append(b"x"))], (b"c" * 16, 1)).result()
    assert isinstance(again, TxnResult)
    assert again.revision == revision
    assert three.get(other, b"k/list") == b"x"


@pytest.mark.parametrize("seed", range(40))
def test_proposal_under_way_when_the_leader_changes_is_applied_once_without_a_number(seed: int) -> None:
    with Scenario(3, seed=seed, sync_ns=10 * MS) as scenario:
        leader = scenario.leader()
        node, other = scenario.others(leader)
        answers = [
            scenario.txn(node, [], [types.merge(b"k/list", types.append(b"%02d" % n))]) for n in range(10)
        ]
        scenario.pass_ms(seed)
        scenario[leader].do(transfer, scenario[leader], other)
        results = [answer.result() for answer in answers]
        assert all(isinstance(result, TxnResult) for result in results)
        items = scenario.get(other, b"k/list")
        assert sorted(items[at : at + 2] for at in range(0, len(items), 2)) == [
            b"%02d" % n for n in range(10)
        ]


def test_without_a_majority_calls_end_in_bounded_time(three: Scenario) -> None:
    leader = three.leader()
    for node in three.others(leader):
        three.down(node)
    write = three.txn(leader, [], [types.put(b"k/a", b"")])
    three.pass_ms(2 * ELECTION_MS)
    read = three.ask(leader, lambda engine: None)
    assert isinstance(write.result(within_ms=4_000), errors.NoQuorum)
    assert read.result(within_ms=4_000) is NO_QUORUM


def test_when_there_was_no_leader_for_long_calls_end_soon_and_go_on_when_there_is_one_again() -> None:
    with Scenario(3, proposal_timeout_ms=10_000) as scenario:
        leader = scenario.leader()
        others = scenario.others(leader)
        for node in others:
            scenario.down(node)
        scenario.pass_ms(5_000)
        first = scenario.txn(leader, [], [types.put(b"k/a", b"")])
        scenario.pass_ms(4_000)
        assert not first.there
        scenario.pass_ms(3_000)
        later = scenario.txn(leader, [], [types.put(b"k/b", b"")])
        read = scenario.ask(leader, lambda engine: None)
        assert isinstance(later.result(within_ms=2_200), errors.NoQuorum)
        assert read.result(within_ms=200) is NO_QUORUM
        for node in others:
            scenario.start(node)
        scenario.leader()
        assert isinstance(scenario.txn(leader, [], [types.put(b"k/c", b"")]).result(), TxnResult)


# --- mixtures that were fatal elsewhere, as seeds ---


@pytest.mark.parametrize("seed", range(1, 13))
def test_redis_raft_2020_snapshots_membership_and_lost_logs_together(seed: int) -> None:
    chosen = plan(90_000 + seed, 5_000, 3)
    kinds = (
        "add",
        "promote",
        "demote",
        "remove",
        "replace",
        "crash",
        "blackout",
        "partition",
        "lossy",
        "wipe",
    )
    result = run(
        replace(chosen, swarm=Swarm(kinds, 150 * MS), settings=replace(chosen.settings, keep_entries=0))
    )
    assert not result.failed, result.message


@pytest.mark.parametrize("seed", range(1, 13))
def test_braft_366_cockroach_133764_leases_pre_votes_and_transfers_together(seed: int) -> None:
    chosen = plan(91_000 + seed, 5_000, 3)
    kinds = ("transfer", "transfer", "pause", "partition", "drift", "leap", "slow")
    result = run(replace(chosen, swarm=Swarm(kinds, 100 * MS)))
    assert not result.failed, result.message
