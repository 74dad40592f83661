"""The simulated world: time, chance, clocks, network, syncs that take time, the state database."""

import random
from collections.abc import Callable

import pytest

from aspenfs.kv.types import NO_ATTRIBUTES, Record
from aspenfs.sim import network
from aspenfs.sim.clock import SimClock
from aspenfs.sim.disk import SimDisk, SimFile, SimulatedCrash
from aspenfs.sim.network import Network, Quality
from aspenfs.sim.scheduler import MS, SECOND, Scheduler, Streams, log_uniform
from aspenfs.sim.state import SimState
from aspenfs.sim.threads import Signal, SyncThread, Task

# --- time and chance ---


def test_events_happen_in_order_of_time_and_then_of_planning() -> None:
    scheduler, happened = Scheduler(), list[str]()
    scheduler.at(2, lambda: happened.append("late"))
    scheduler.at(1, lambda: happened.append("first"))
    scheduler.at(1, lambda: happened.append("second"))
    cancelled = scheduler.at(1, lambda: happened.append("never"))
    cancelled.cancel()
    while scheduler.step() is not None:
        pass
    assert happened == ["first", "second", "late"]
    assert (scheduler.now_ns, scheduler.events) == (2, 3)


def test_nothing_is_planned_in_the_past() -> None:
    scheduler, times = Scheduler(), list[int]()
    scheduler.at(10, lambda: scheduler.at(5, lambda: times.append(scheduler.now_ns)))
    while scheduler.step() is not None:
        pass
    assert times == [10]


def test_streams_do_not_disturb_each_other() -> None:
    one, other = Streams(1), Streams(1)
    used = other.stream("a")
    for _ in range(5):
        used.random()
    assert one.stream("b").random() == other.stream("b").random()
    assert one.stream("a").random() != used.random()
    assert one.stream("a").random() != one.stream("b").random()
    assert Streams(1).stream("a").random() != Streams(2).stream("a").random()
    assert one.fork("x").stream("a").random() == other.fork("x").stream("a").random()
    # The same in every interpreter and release.
    assert Streams(1).stream("a").getrandbits(32) == 2955472016


def test_log_uniform_stays_between_its_bounds() -> None:
    rng = random.Random(1)
    drawn = [log_uniform(rng, 10, 1_000) for _ in range(500)]
    assert 10 <= min(drawn) < 20
    assert 500 < max(drawn) <= 1_000
    assert 0.3 < sum(one < 100 for one in drawn) / 500 < 0.7


# --- clocks ---


def pass_time(scheduler: Scheduler, duration_ns: int) -> None:
    scheduler.after(duration_ns, lambda: None)
    scheduler.step()


def test_clock_drifts_leaps_and_never_goes_back() -> None:
    scheduler = Scheduler()
    clock = SimClock(scheduler, boot_ns=7)
    clock.set_drift(1_000)
    pass_time(scheduler, SECOND)
    assert clock.monotonic_ns() == 7 + SECOND + MS
    before = clock.monotonic_ns()
    clock.set_drift(-1_000)
    assert clock.monotonic_ns() == before
    clock.leap(5)
    assert clock.monotonic_ns() == before + 5
    wall = clock.time_ns()
    clock.set_wall(-SECOND)
    assert clock.time_ns() == wall - SECOND
    assert clock.monotonic_ns() == before + 5


def test_clock_says_how_long_its_own_time_takes() -> None:
    scheduler = Scheduler()
    clock = SimClock(scheduler)
    clock.set_drift(-500_000)
    assert clock.virtual_ns(SECOND) == 2 * SECOND


# --- network ---


class Heard:
    def __init__(self, quality: Quality) -> None:
        self.scheduler = Scheduler()
        self.messages: list[tuple[int, int, object]] = []
        self.network = Network(self.scheduler, Streams(1), self._hear, quality)

    def _hear(self, to: int, sender: int, message: object) -> None:
        self.messages.append((to, sender, message))

    def run(self) -> list[object]:
        while self.scheduler.step() is not None:
            pass
        heard, self.messages = self.messages, []
        return [message for _, _, message in heard]


def test_ordered_link_keeps_the_order_and_another_does_not() -> None:
    for ordered in (True, False):
        heard = Heard(Quality(ordered=ordered))
        for n in range(50):
            heard.network.send(1, 2, n)
        assert (heard.run() == list(range(50))) == ordered


def test_messages_are_lost_repeated_and_withheld_as_often_as_asked() -> None:
    lossy = Heard(Quality(drop=0.5))
    for n in range(400):
        lossy.network.send(1, 2, n)
    assert 150 < len(lossy.run()) < 250
    twice = Heard(Quality(duplicate=1.0))
    twice.network.send(1, 2, "x")
    assert twice.run() == ["x", "x"]
    held = Heard(Quality(hold=1.0))
    for n in range(20):
        held.network.send(1, 2, n)
    assert sorted(map(str, held.run())) == sorted([str(n) for n in range(20)] * 2)
    assert held.scheduler.now_ns > SECOND


def test_blocked_link_is_blocked_in_its_direction_alone_and_for_what_is_on_its_way() -> None:
    heard = Heard(Quality())
    heard.network.send(1, 2, "on its way")
    heard.network.block([(1, 2)])
    heard.network.send(1, 2, "after")
    heard.network.send(2, 1, "back")
    assert heard.run() == ["back"]
    assert not heard.network.reachable(1, 2)
    heard.network.unblock([(1, 2)])
    heard.network.send(1, 2, "again")
    assert heard.run() == ["again"]


def test_reset_loses_what_is_on_its_way_both_ways() -> None:
    heard = Heard(Quality())
    heard.network.send(1, 2, "lost")
    heard.network.send(2, 1, "lost")
    heard.network.send(1, 3, "elsewhere")
    heard.network.reset(2, 1)
    heard.network.send(1, 2, "later")
    assert sorted(map(str, heard.run())) == ["elsewhere", "later"]


def test_shapes_of_partitions() -> None:
    nodes = [1, 2, 3, 4, 5]

    def open_links(blocked: list[network.Link]) -> set[network.Link]:
        return {(a, b) for a in nodes for b in nodes if a != b} - {*blocked}

    assert open_links(network.halves(nodes, [1])) == {(a, b) for a in nodes[1:] for b in nodes[1:] if a != b}
    through = [(3, n) for n in nodes if n != 3]
    left = {*through, *[(b, a) for a, b in through], (1, 2), (2, 1), (4, 5), (5, 4)}
    assert open_links(network.bridge(nodes, 3)) == left
    assert open_links(network.ring(nodes)) == {
        link for a, b in ((1, 2), (2, 3), (3, 4), (4, 5), (5, 1)) for link in ((a, b), (b, a))
    }
    assert network.one_way(nodes, 2) == [(1, 2), (3, 2), (4, 2), (5, 2)]


# --- threads ---


def syncing(file: SimFile, result: int) -> Callable[[], int]:
    def sync() -> int:
        file.datasync()
        return result

    return sync


def synced_while_written_to(seed: int) -> bytes:
    """The second sector of a file, after a crash: it was written while a sync of the first was under way."""
    disk, thread = SimDisk(seed), SyncThread()
    file = disk.open("log", create=True)
    disk.sync_directory("")
    file.pwrite(bytes(1024), 0)
    file.datasync()
    disk.gate = lambda name: thread.gate()
    file.pwrite(b"a" * 512, 0)
    thread.begin(syncing(file, 1))
    assert thread.busy
    file.pwrite(b"b" * 512, 512)
    thread.go_on()
    assert thread.result() == 1
    thread.close()
    disk.crash()
    disk.restart()
    found = disk.open("log").pread(1024, 0)
    assert found[:512] == b"a" * 512
    return found[512:]


def test_sync_covers_what_was_written_before_it_began_and_nothing_else() -> None:
    assert {synced_while_written_to(seed) for seed in range(20)} == {b"b" * 512, bytes(512)}


def test_crash_ends_a_sync_that_is_under_way() -> None:
    disk, thread = SimDisk(1), SyncThread()
    disk.gate = lambda name: thread.gate()
    file = disk.open("log", create=True)
    file.pwrite(b"a", 0)
    thread.begin(syncing(file, 0))
    disk.crash()
    thread.go_on()
    assert not thread.busy
    with pytest.raises(SimulatedCrash):
        thread.result()
    disk.restart()
    again = disk.open("log", create=True)
    again.pwrite(b"b", 0)
    thread.begin(syncing(again, 7))
    thread.go_on()
    assert thread.result() == 7
    thread.close()


def test_task_waits_for_signals_and_ends_once() -> None:
    scheduler = Scheduler()
    first, second = Signal(), Signal()
    seen: list[str] = []
    ended: list[Exception | None] = []

    async def work() -> None:
        await first.wait()
        seen.append("first")
        await second.wait()
        raise ValueError

    Task(work(), lambda step: scheduler.after(0, step), ended.append)
    scheduler.step()
    assert seen == []
    first.set()
    scheduler.step()
    assert seen == ["first"]
    second.set()
    scheduler.step()
    assert isinstance(ended[0], ValueError)
    cancelled = Task(Signal().wait(), lambda step: scheduler.after(0, step), ended.append)
    cancelled.cancel()
    while scheduler.step() is not None:
        pass
    assert len(ended) == 1


# --- state ---


def record(value: bytes) -> Record:
    return Record(value, 1, 1, 1, 0, 0, NO_ATTRIBUTES)


def test_power_undoes_the_newest_transaction_of_the_state_or_nothing() -> None:
    found = set()
    for seed in range(20):
        state = SimState()
        state.apply([(b"a", record(b"1"))], 1, {"m": b"1"})
        state.apply([(b"a", record(b"2")), (b"b", record(b"3"))], 2, {"m": b"2"})
        assert state.durable_index == 1
        state.lose_power(random.Random(seed))
        a, b = state.get(b"a"), state.get(b"b")
        assert a is not None
        found.add((state.applied_index, state.meta("m"), a.value, b is None))
    assert found == {(1, b"1", b"1", True), (2, b"2", b"2", False)}


def test_synced_state_stays_and_a_snapshot_takes_its_place_for_good() -> None:
    state = SimState()
    state.apply([(b"a", record(b"1"))], 5, {"m": b"1"})
    assert state.sync() == 5
    state.lose_power(random.Random(1))
    assert state.applied_index == 5
    other = SimState()
    other.become(state.image())
    other.lose_power(random.Random(1))
    assert (other.applied_index, other.durable_index, other.meta("m")) == (5, 5, b"1")
    assert other.digest() == state.digest()
