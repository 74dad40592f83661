"""NodeStore: acknowledgement, group commit, recovery, trimming, chores."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from aspenfs import errors
from aspenfs.kv import commands
from aspenfs.kv.commands import Command
from aspenfs.kv.types import absent, put
from aspenfs.limits import HISTORY_REVISIONS, TXN_OPS_MAX
from aspenfs.runtime.consensus import META_TERM
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.system import SystemClock, SystemEntropy
from tests.runtime.host_driver import SECONDS_MAX, hash_of, load, open_store, running, until


def test_txn_does_not_suspend(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        with pytest.raises(StopIteration) as ended:
            store.txn([absent(b"f/a")], [put(b"f/a", b"1")]).send(None)
        assert ended.value.value.succeeded
        record = store.get(b"f/a")
        assert record is not None
        assert record.value == b"1"
        store.close()

    trio.run(main)


def test_committed_waits_for_the_disk_and_txn_does_not(tmp_path: Path) -> None:
    release = threading.Event()

    async def main() -> None:
        store = open_store(tmp_path, pre_sync=[release.wait])
        async with running(store):
            revision = (await store.txn([], [put(b"f/a", b"1")])).revision
            with trio.move_on_after(0.05) as patience:
                await store.committed(revision)
            assert patience.cancelled_caught
            assert store.engine.committed_revision < revision
            release.set()
            assert await store.committed(revision) >= revision
        store.close()

    trio.run(main)


def test_all_who_wait_meanwhile_share_one_sync(tmp_path: Path) -> None:
    gate = threading.Semaphore(0)
    started = threading.Semaphore(0)

    def hook() -> None:
        started.release()
        gate.acquire()

    async def main() -> None:
        store = open_store(tmp_path, pre_sync=[hook])
        async with running(store):
            before = store.status()["syncs"]

            async def write(number: int) -> None:
                await store.txn([], [put(b"f/%d" % number, b"")])
                await store.committed()

            async with trio.open_nursery() as writers:
                writers.start_soon(write, 0)
                await until(lambda: started.acquire(blocking=False))
                for number in range(1, 100):
                    writers.start_soon(write, number)
                await trio.testing.wait_all_tasks_blocked()
                for _ in range(3):
                    gate.release()
            syncs = store.status()["syncs"]
            assert isinstance(syncs, int)
            assert isinstance(before, int)
            assert syncs - before <= 3
            gate.release(100)
        store.close()

    trio.run(main)


def test_what_comes_during_the_hooks_is_not_committed_with_them(tmp_path: Path) -> None:
    """Its chunks may have come after the hook had synced them."""
    holds = False
    in_hook, go_on = threading.Event(), threading.Semaphore(0)

    def hook() -> None:
        if holds:
            in_hook.set()
            go_on.acquire(timeout=SECONDS_MAX)

    async def main() -> None:
        nonlocal holds
        store = open_store(tmp_path, pre_sync=[hook])
        async with running(store):
            holds = True
            first = (await store.txn([], [put(b"f/a", b"")])).revision
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.committed, first)
                await until(in_hook.is_set)
                in_hook.clear()
                second = (await store.txn([], [put(b"f/b", b"")])).revision
                go_on.release()  # this sync only: the next one may begin at any time
            assert store.engine.committed_revision == first
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.committed, second)
                await until(in_hook.is_set)
                assert store.engine.committed_revision == first
                holds = False
                go_on.release()
        store.close()

    trio.run(main)


def test_accepted_work_that_nobody_waits_for_is_committed_and_applied_soon(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        async with running(store):
            revision = (await store.txn([], [put(b"f/a", b"")])).revision
            await until(lambda: store.status()["applied"] == revision)
            assert store.status()["overlay_bytes"] == 0
            # And the state is synced when nothing follows, so that no restart evaluates it again.
            await until(lambda: store.replay_floor == revision)
        store.close()

    trio.run(main)


def test_waiters_get_their_commit_when_the_store_ends(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        committed: list[int] = []

        async def wait() -> None:
            committed.append(await store.committed())

        async with trio.open_nursery() as nursery, running(store):
            await store.txn([], [put(b"f/a", b"")])
            nursery.start_soon(wait)
        assert committed == [1]
        store.close()
        calls: list[Callable[[], object]] = [
            lambda: store.get(b"f/a"), lambda: store.range(b"f/", b"f0"), lambda: store.scan(b"f/", b"f0"),
            lambda: store.leases(), lambda: store.watch(b"f/", b"f0"), store.status,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(errors.Closed):
                call()
        for attempt in (store.txn([], [put(b"f/a", b"")]), store.committed(9), store.barrier()):
            with pytest.raises(errors.Closed):
                await attempt
        store.close()

    trio.run(main)


async def _write(store: NodeStore, numbers: range) -> None:
    for number in numbers:
        await store.txn([], load(number))
        if number % 64 == 0:
            await trio.lowlevel.checkpoint()


def test_closed_and_opened_it_is_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        async with running(store):
            await _write(store, range(1, 400))
        expected = hash_of(store), store.revision, store.identity
        store.close()
        again = open_store(tmp_path)
        assert (hash_of(again), again.revision, again.identity) == expected
        assert again.status()["overlay_bytes"] == 0
        again.close()

    trio.run(main)


def test_evaluated_again_the_log_gives_the_same_state(tmp_path: Path) -> None:
    """The state directory is lost; the log, never trimmed, makes it anew."""

    async def main() -> None:
        store = open_store(tmp_path, segment_bytes=1 << 22)
        async with running(store):
            await _write(store, range(1, 300))
            await store.lease_grant(10_000, 7)
            await store.txn([], [put(b"k/leased", b"", 7)], dedup=(b"c" * 16, 1))
            await store.compact(100)
        expected = hash_of(store), store.revision
        store.close()
        for file in (tmp_path / "state").iterdir():
            file.unlink()
        again = open_store(tmp_path, segment_bytes=1 << 22)
        assert (hash_of(again), again.revision) == expected
        assert again.status()["committed"] == expected[1]
        again.close()

    trio.run(main)


def test_log_is_trimmed_as_the_state_follows(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        async with running(store):
            for block in range(4):
                await _write(store, range(block * 300 + 1, block * 300 + 301))
                await store.committed()
                revision = store.revision
                await until(lambda wanted=revision: store.replay_floor >= wanted)

            def trimmed() -> bool:
                """The loop does it when the state has told that it is durable."""
                status = store.status()
                assert isinstance(status["wal_first"], int)
                assert isinstance(status["wal_segments"], int)
                return status["wal_first"] > 600 and status["wal_segments"] <= 4

            await until(trimmed)
        store.close()
        open_store(tmp_path).close()

    trio.run(main)


@pytest.mark.parametrize("lost", ["wal", "state"])
def test_half_a_state_directory_is_refused(tmp_path: Path, lost: str) -> None:
    async def main() -> None:
        store = open_store(tmp_path, background=False)  # trimmed segments are gone when it is closed
        await _write(store, range(1, 1000))
        store.close()
        for file in (tmp_path / lost).iterdir():
            file.unlink()
        with pytest.raises(errors.Corrupt, match="the state ends with entry"):
            open_store(tmp_path)

    trio.run(main)


def test_expired_leases_end_by_themselves(tmp_path: Path) -> None:
    async def main() -> None:
        store = NodeStore.open(tmp_path, SystemClock(), SystemEntropy(), segment_bytes=1 << 16)
        async with running(store):
            lease = await store.lease_grant(1)
            await store.txn([], [put(b"k/a", b"", lease)])
            await until(lambda: store.get(b"k/a") is None)
            assert store.leases() == []
        store.close()

    trio.run(main)


def test_history_is_compacted_by_itself(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path, segment_bytes=1 << 22)
        async with running(store):
            for number in range(HISTORY_REVISIONS + 1200):
                await store.txn([], [put(b"k/a", b"%d" % number)])
                if number % 100 == 0:
                    await trio.lowlevel.checkpoint()

            def compacted() -> bool:
                try:
                    store.get(b"k/a", revision=1)
                except errors.Compacted as error:
                    return error.oldest > 100
                return False

            await until(compacted)
            record = store.get(b"k/a", revision=2000)
            assert record is not None
            assert record.value == b"1999"
        store.close()

    trio.run(main)


def _names(value: bytes) -> Callable[[Command], bool]:
    """Says of transactions that put `value` that what they name is missing."""

    def verify(command: Command) -> bool:
        return command.kind != commands.TXN or all(one[2] != value for one in command.body[1])

    return verify


def test_a_tail_that_names_what_was_lost_is_cut_off(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        await store.txn([], [put(b"f/a", b"kept")])
        await store.committed()
        for value in (b"also kept", b"lost", b"behind it"):
            await store.txn([], [put(b"f/a", value)])
        _abandon(store)
        again = open_store(tmp_path, verify_entry=_names(b"lost"))
        record = again.get(b"f/a")
        assert record is not None
        assert (record.value, again.revision) == (b"also kept", 2)
        await again.txn([], [put(b"f/a", b"new")])
        await again.committed()
        _abandon(again)
        last = open_store(tmp_path, verify_entry=_names(b"lost"))
        record = last.get(b"f/a")
        assert record is not None
        assert (record.value, last.revision) == (b"new", 3)
        last.close()

    trio.run(main)


def test_a_durable_entry_that_names_what_was_lost_is_corrupt(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        await store.txn([], [put(b"f/a", b"lost")])
        await store.committed()
        await store.txn([], [put(b"f/a", b"2")])
        _abandon(store)
        with pytest.raises(errors.Corrupt, match="entry 1 names"):
            open_store(tmp_path, verify_entry=_names(b"lost"))
        open_store(tmp_path).close()

    trio.run(main)


def _abandon(store: NodeStore) -> None:
    """As a killed process leaves it: nothing is synced or applied, files are closed."""
    store._fail(errors.StorageError("killed"))
    store._wal._dead = errors.Closed("killed")  # or `close` would sync
    store._wal._pool.close()
    store._state.close()


def test_hooks_run_before_recovered_entries_are_committed(tmp_path: Path) -> None:
    calls: list[str] = []

    async def main() -> None:
        store = open_store(tmp_path)
        await store.txn([], [put(b"f/a", b"")])
        _abandon(store)
        again = open_store(tmp_path, pre_sync=[lambda: calls.append("synced")])
        assert again.status()["committed"] == 1
        assert calls == ["synced"]
        again.close()

    trio.run(main)


def test_a_transaction_beyond_bounds_leaves_no_trace(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        with pytest.raises(errors.TxnTooLarge):
            await store.txn([], [put(b"f/%d" % n, b"") for n in range(TXN_OPS_MAX + 1)])
        with pytest.raises(errors.LeaseNotFound):
            await store.txn([], [put(b"k/a", b"", 99)])
        assert store.revision == 0
        assert store.status()["wal_last"] == 0
        store.close()

    trio.run(main)


def test_status_has_the_indices_in_order(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path, name="demo")
        async with running(store):
            await _write(store, range(1, 50))
            status = store.status()
            assert (status["cluster"], status["state"], status["revision"]) == ("demo", "ok", 49)
            applied, committed = status["applied"], status["committed"]
            assert isinstance(applied, int)
            assert isinstance(committed, int)
            assert applied <= committed <= 49
            await store.committed()
            assert store.status()["durable"] == 49
        store.close()

    trio.run(main)


def test_the_state_keeps_the_term_of_its_last_entry(tmp_path: Path) -> None:
    """Of a node that is alone, too: from it others get a snapshot, and go on with the log behind it."""

    async def main() -> None:
        for life in (1, 2):
            store = open_store(tmp_path)
            await store.txn([], [put(b"f/a", b"1")])
            await store.committed()
            store.apply()
            last = list(store._wal.replay(store.revision))[-1]
            stored = store.state.meta(META_TERM)
            assert stored == last.term.to_bytes(8, "big") == life.to_bytes(8, "big")
            assert store.consensus.term_at(store.revision) == last.term
            store.close()

    trio.run(main)
