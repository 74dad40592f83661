"""The engine apart from any log: acceptance, commit, loss, and what it keeps in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from aspenfs import errors
from aspenfs.kv import keys
from aspenfs.kv.engine import Engine
from aspenfs.kv.memory import MemoryState
from aspenfs.kv.types import Operation, delete, put
from aspenfs.limits import HISTORY_REVISIONS, LEASE_EXPIRE_MAX
from tests.kv.subject import FakeClock, FakeEntropy, nothing_more


def an_engine(base: MemoryState | None = None, **keywords: Any) -> Engine:
    return Engine(base or MemoryState(), FakeClock(), FakeEntropy(), trio.Event, **keywords)


def run(engine: Engine, *operations: Operation, origin: object = None) -> int:
    index, outcome = engine.submit(engine.txn_command([], operations)[0], origin)
    assert not isinstance(outcome.result, errors.AspenError)
    return index


def settle(engine: Engine, base: MemoryState) -> None:
    engine.committed_to(engine.revision)
    base.apply(engine.overlay.pending(engine.revision))
    engine.overlay.settle(engine.revision)


def test_preparing_changes_nothing() -> None:
    engine = an_engine()
    command, _ = engine.txn_command([], [put(b"k/a", b"1")])
    first = engine.prepare(command)
    assert engine.prepare(command) == first
    assert engine.revision == 0
    assert engine.get(b"k/a") is None
    engine.accept(*first)
    assert engine.revision == 1
    assert engine.get(b"k/a") is not None


def test_watchers_hear_at_commit_and_reads_see_at_acceptance() -> None:
    async def main() -> None:
        engine = an_engine()
        batches = engine.watch(b"k/", b"k0")
        replayed = engine.watch(b"k/", b"k0", from_revision=1)
        for number in range(3):
            run(engine, put(b"k/a", b"%d" % number))
        record = engine.get(b"k/a")
        assert record is not None
        assert record.value == b"2"
        await nothing_more(batches)
        engine.committed_to(2)
        assert [(await anext(batches)).revision for _ in range(2)] == [1, 2]
        assert [(await anext(replayed)).revision for _ in range(2)] == [1, 2]
        late = engine.watch(b"k/", b"k0", from_revision=1)
        assert [(await anext(late)).revision for _ in range(2)] == [1, 2]
        await nothing_more(late)
        engine.committed_to(3)
        assert (await anext(late)).revision == 3

    trio.run(main)


def test_those_who_wait_are_woken_in_turn() -> None:
    async def main() -> None:
        engine = an_engine()
        for _ in range(3):
            run(engine, put(b"k/a", b""))
        done: list[tuple[int, int]] = []

        async def wait(revision: int) -> None:
            done.append((revision, await engine.committed(revision)))

        async with trio.open_nursery() as nursery:
            for revision in (3, 1, 2, 1):
                nursery.start_soon(wait, revision)
            await trio.testing.wait_all_tasks_blocked()
            assert done == []
            engine.committed_to(1)
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(done) == [(1, 1), (1, 1)]
            engine.committed_to(3)
        assert sorted(done) == [(1, 1), (1, 1), (2, 3), (3, 3)]

    trio.run(main)


def test_lost_work_is_uncovered_told_and_fails_who_waits_for_it() -> None:
    async def main() -> None:
        engine = an_engine()
        run(engine, put(b"k/a", b"kept"), put(b"f/b", b"kept"))
        engine.committed_to(1)
        batches = engine.watch(b"k/", b"k0")
        run(engine, put(b"k/a", b"lost"), put(b"k/c", b"lost"))
        run(engine, delete(b"f/b"))
        outcomes: list[object] = []

        async def wait(revision: int) -> None:
            try:
                outcomes.append(await engine.committed(revision))
            except errors.Lost as error:
                outcomes.append(type(error))

        heard: list[Any] = []
        engine.observe(lambda revision, events, origin: heard.append((revision, list(events))))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, 3)
            await trio.testing.wait_all_tasks_blocked()
            engine.discard_after(1)
        assert outcomes == [errors.Lost]
        assert engine.revision == 1
        assert [(key, record.value) for key, record in engine.range(b"", b"")] == [
            (b"f/b", b"kept"), (b"k/a", b"kept")]  # fmt: skip
        ((revision, events),) = heard
        assert revision == 1
        assert [(event.key, event.record) for event in events] == [
            (b"f/b", engine.get(b"f/b")), (b"k/a", engine.get(b"k/a")), (b"k/c", None)]  # fmt: skip
        assert run(engine, put(b"k/d", b"")) == 2
        engine.committed_to(2)
        batch = await anext(batches)
        assert [event.key for event in batch.events] == [b"k/d"], "lost work never reaches a watcher"

    trio.run(main)


def test_a_failing_observer_stops_neither_the_entry_nor_the_others() -> None:
    failures: list[Exception] = []
    heard: list[int] = []

    def fail(*_: object) -> None:
        raise RuntimeError("mine")

    engine = an_engine(observer_failed=failures.append)
    engine.observe(fail)
    engine.observe(lambda revision, events, origin: heard.append(revision))
    assert run(engine, put(b"k/a", b"")) == 1
    assert heard == [1]
    assert [str(failure) for failure in failures] == ["mine"]
    strict = an_engine()
    strict.observe(fail)
    strict.observe(lambda revision, events, origin: heard.append(revision))
    with pytest.raises(RuntimeError, match="mine"):
        run(strict, put(b"k/a", b""))
    assert heard == [1, 1]
    assert strict.get(b"k/a") is not None


def test_an_engine_goes_on_where_the_state_of_an_earlier_one_ended() -> None:
    async def main() -> None:
        base = MemoryState()
        engine = an_engine(base)
        for number in range(5):
            run(engine, put(b"k/a", b"%d" % number), put(b"f/a", b""))
        settle(engine, base)
        engine.submit(engine.grant_command(1_000, 1))
        settle(engine, base)
        again = an_engine(base, index=engine.revision)
        assert again.revision == again.committed_revision == 6
        assert again.expired_leases(FakeClock().now_ns + 2_000_000_000) == [1]
        batches = again.watch(b"k/", b"k0", from_revision=2)
        assert [(await anext(batches)).revision for _ in range(4)] == [2, 3, 4, 5]
        with pytest.raises(errors.Compacted) as caught:
            again.watch(b"f/", b"f0", from_revision=5)
        assert caught.value.oldest == 7
        assert run(again, put(b"k/a", b"")) == 7

    trio.run(main)


def test_compaction_comes_due_and_leaves_the_promised_history_and_no_rest() -> None:
    base = MemoryState()
    engine = an_engine(base)
    for number in range(HISTORY_REVISIONS + 999):
        run(engine, put(b"k/%d" % (number % 9), b""), put(b"f/%d" % (number % 9), b""))
    assert engine.compaction_due() is None
    run(engine, put(b"k/a", b""))
    due = engine.compaction_due()
    assert due == engine.revision - HISTORY_REVISIONS + 1
    while engine.submit(engine.compact_command(due))[1].result:
        pass
    assert engine.compaction_due() is None
    assert engine.get(b"k/a", revision=due) is None
    settle(engine, base)
    assert an_engine(base, index=engine.revision).compaction_due() is None
    newest = engine.revision
    engine.submit(engine.compact_command(newest))
    while engine.submit(engine.compact_command(newest))[1].result:
        pass
    settle(engine, base)
    rest = list(base.items(keys.VERSION_OF, keys.VERSION_OF + b"\xff"))
    assert rest == [], "compacting everything leaves no old version behind"
    assert list(base.items(keys.CHANGED_AT, keys.CHANGED_AT + b"\xff" * 9)) == []


def _counting(read: Callable[..., Any]) -> tuple[list[int], Callable[..., Any]]:
    calls: list[int] = []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return read(*arguments, **keywords)

    return calls, counted


def test_looking_for_expired_leases_reads_nothing_while_none_can_be() -> None:
    clock = FakeClock()
    engine = Engine(MemoryState(), clock, FakeEntropy(), trio.Event)
    for lease in range(1, 4):
        engine.submit(engine.grant_command(1_000 * lease, lease))
    assert engine.expire_command() is None
    calls, counted = _counting(engine.overlay.items)
    engine.overlay = type("Counted", (), {"items": staticmethod(counted), "get": engine.overlay.get})()
    for _ in range(10):
        assert engine.expire_command() is None
    assert calls == []
    clock.advance_ms(2_000)
    command = engine.expire_command()
    assert command is not None
    assert command.body == (1, 2)


def test_a_lease_granted_after_a_look_in_vain_ends_in_time() -> None:
    clock = FakeClock()
    engine = Engine(MemoryState(), clock, FakeEntropy(), trio.Event)
    assert engine.expire_command() is None
    engine.submit(engine.grant_command(1_000, 7))
    clock.advance_ms(1_000)
    command = engine.expire_command()
    assert command is not None
    assert command.body == (7,)


def test_a_watch_that_cannot_be_is_refused_when_asked_for() -> None:
    engine = an_engine()
    for _ in range(3):
        run(engine, put(b"k/a", b""), put(b"f/a", b""))
    engine.submit(engine.compact_command(2))
    engine.committed_to(4)
    with pytest.raises(errors.Compacted):
        engine.watch(b"k/", b"k0", from_revision=1)
    with pytest.raises(errors.InvalidArgument):
        engine.watch(b"k/", b"k0", from_revision=-1)


def test_many_leases_end_a_bounded_number_at_a_time() -> None:
    clock = FakeClock()
    engine = Engine(MemoryState(), clock, FakeEntropy(), trio.Event)
    for lease in range(1, LEASE_EXPIRE_MAX + 11):
        engine.submit(engine.grant_command(1_000, lease))
    clock.advance_ms(1_000)
    ended = []
    while (command := engine.expire_command()) is not None:
        ended.append(engine.submit(command)[1].result)
    assert ended == [LEASE_EXPIRE_MAX, 10]
    assert engine.leases() == []


def test_an_engine_goes_on_with_the_state_of_a_snapshot() -> None:
    async def main() -> None:
        ahead_base = MemoryState()
        ahead = an_engine(ahead_base)
        base = MemoryState()
        engine = an_engine(base)
        for number in range(3):
            for one in (ahead, engine):
                run(one, put(b"k/a", b"%d" % number))
        settle(engine, base)
        run(engine, put(b"k/mine", b"accepted, but its fate is not known"))
        replays = engine.watch(b"k/", b"k0", from_revision=3)
        live = engine.watch(b"k/", b"k0")
        waits = engine.watch(b"k/", b"k0", from_revision=12)
        for number in range(3, 10):
            run(ahead, put(b"k/a", b"%d" % number))
        settle(ahead, ahead_base)
        woken = []
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                woken.append(await engine.committed(4))

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            base.apply(list(ahead_base.items(b"", b"")))
            engine.rebase(10)
        assert woken == [10]
        assert (engine.revision, engine.committed_revision, engine.overlay.bytes) == (10, 10, 0)
        assert engine.get(b"k/mine") is None
        record = engine.get(b"k/a")
        assert record is not None
        assert record.value == b"9"
        assert [(await anext(replays)).revision for _ in range(8)] == list(range(3, 11))
        with pytest.raises(errors.Lagged) as lagged:
            await anext(live)
        assert lagged.value.revision == 4
        again = engine.watch(b"k/", b"k0", from_revision=lagged.value.revision)
        assert [(await anext(again)).revision for _ in range(7)] == list(range(4, 11))
        for _ in range(2):
            engine.committed_to(run(engine, put(b"k/a", b"after")))
        assert (await anext(again)).revision == 11
        assert (await anext(waits)).revision == 12

    trio.run(main)


def test_a_snapshot_brings_its_leases_and_its_history_to_compact() -> None:
    clock = FakeClock()
    ahead_base, base = MemoryState(), MemoryState()
    ahead = Engine(ahead_base, clock, FakeEntropy(), trio.Event)
    engine = Engine(base, clock, FakeEntropy(), trio.Event)
    assert engine.expire_command() is None  # looked in vain: it knows of no lease
    ahead.submit(ahead.grant_command(1_000, 7))
    for _ in range(HISTORY_REVISIONS + 1_100):
        run(ahead, put(b"k/a", b""))
    settle(ahead, ahead_base)
    base.apply(list(ahead_base.items(b"", b"")))
    engine.rebase(ahead.revision)
    assert engine.compaction_due() == ahead.compaction_due() is not None
    clock.advance_ms(1_000)
    command = engine.expire_command()
    assert command is not None
    assert command.body == (7,)
