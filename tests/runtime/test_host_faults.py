"""NodeStore on a disk that fails: a sync that fails ends it, a full one does not."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from aspenfs import errors
from aspenfs.kv import commands
from aspenfs.kv.types import Event, delete, put
from aspenfs.limits import MIB, OVERLAY_BYTES_MAX
from aspenfs.runtime.host import NodeStore
from aspenfs.sim.disk import SimDisk
from tests.runtime.host_driver import fill, hash_of, load, open_store, running, until, until_it_accepts


def test_after_a_failed_sync_every_call_raises_and_run_ends(tmp_path: Path) -> None:
    disk = SimDisk()

    async def main() -> None:
        store = open_store(tmp_path, disk=disk, background=False)  # the only syncs are those of commits
        with pytest.raises(errors.SyncFailed):  # noqa: PT012 – what `run` raises comes at the end of the block
            async with running(store):
                await store.txn([], [put(b"f/a", b"1")])
                await store.committed()
                disk.fail("datasync", errno.EIO, at=disk.operations)
                await store.txn([], [put(b"f/a", b"2")])
                with pytest.raises(errors.SyncFailed):
                    await store.committed()
                calls: list[Callable[[], object]] = [
                    lambda: store.get(b"f/a"), lambda: store.range(b"f/", b"f0"), lambda: store.leases(),
                    lambda: store.watch(b"f/", b"f0"),
                ]  # fmt: skip
                for call in calls:
                    with pytest.raises(errors.SyncFailed):
                        call()
                for attempt in (store.txn([], [put(b"f/a", b"3")]), store.barrier(), store.fence(99)):
                    with pytest.raises(errors.SyncFailed):
                        await attempt
        with pytest.raises(errors.SyncFailed):
            await store.committed()
        assert store.status()["state"] == "failed"
        store.close()
        disk.crash()
        disk.restart()
        again = open_store(tmp_path, disk=disk)
        record = again.get(b"f/a")
        assert record is not None
        assert record.value in (b"1", b"2")
        again.close()

    trio.run(main)


async def _write_that_fails(store: NodeStore, key: bytes) -> None:
    await store.txn([], [put(key, b"1")])
    with pytest.raises(errors.SyncFailed, match="chunks"):
        await store.committed()


def test_a_hook_that_fails_ends_the_store_before_the_log_is_synced(tmp_path: Path) -> None:
    def hook() -> None:
        raise errors.SyncFailed("chunks")

    async def main() -> None:
        store = open_store(tmp_path, pre_sync=[hook])
        with pytest.raises(errors.SyncFailed, match="chunks"):
            async with running(store):
                await _write_that_fails(store, b"f/a")
        assert store.status()["durable"] == 0
        store.close()

    trio.run(main)


def test_an_entry_whose_hook_failed_is_dropped_by_the_next_start_if_what_it_names_is_gone(
    tmp_path: Path,
) -> None:
    """Closing must not make it durable: then the node would refuse to start for want of its chunks."""
    failing = [False]

    def hook() -> None:
        if failing[0]:
            raise errors.SyncFailed("chunks")

    async def main() -> None:
        store = open_store(tmp_path, pre_sync=[hook])
        with pytest.raises(errors.SyncFailed, match="chunks"):  # noqa: PT012 – as above
            async with running(store):
                await store.txn([], [put(b"f/a", b"1")])
                kept = await store.committed()
                failing[0] = True
                await _write_that_fails(store, b"f/b")
        store.close()
        again = open_store(tmp_path, verify_entry=lambda command: b"f/b" not in commands.encode(command))
        assert again.get(b"f/a") is not None
        assert again.get(b"f/b") is None
        assert again.revision >= kept
        again.close()

    trio.run(main)


def test_a_bug_in_a_chore_ends_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        store = open_store(tmp_path)

        def broken() -> None:
            raise ZeroDivisionError

        store.engine.expire_command = broken  # type: ignore[method-assign]
        with pytest.raises(errors.StorageError, match="ZeroDivisionError"):
            async with running(store):
                await until(lambda: store.status()["state"] == "failed")
        store.close()

    trio.run(main)
    assert "ZeroDivisionError" in caplog.text


def test_a_full_log_refuses_leaves_no_trace_and_works_again(tmp_path: Path) -> None:
    disk = SimDisk(capacity_bytes=3 << 16)  # the segment in use, the next one, and nothing more
    seen: list[tuple[int, int]] = []

    async def main() -> None:
        store = open_store(tmp_path, disk=disk)

        def observer(revision: int, events: object, origin: object) -> None:
            assert isinstance(events, list)
            seen.append((revision, len(events)))

        store.observe(observer)
        async with running(store):
            with pytest.raises(errors.NoSpace):
                await fill(store, b"x" * 3000)
            accepted = store.revision
            assert store.get(b"f/%d" % (accepted - 1)) is not None  # reads go on
            assert store.get(b"f/%d" % accepted) is None
            assert seen == [(revision, 1) for revision in range(1, accepted + 1)]
            await store.committed()
            disk.capacity_bytes = 1 << 30

            await until_it_accepts(store)
            await store.committed()
        expected = hash_of(store), store.revision
        store.close()
        again = open_store(tmp_path, disk=disk)
        assert (hash_of(again), again.revision) == expected
        again.close()

    trio.run(main)


def test_deleting_goes_on_when_no_further_segment_fits(tmp_path: Path) -> None:
    disk = SimDisk(capacity_bytes=5 << 15)
    free = 0  # so that the state does not grow, the log is not trimmed, and no segment comes back

    async def main() -> None:
        nonlocal free
        store = open_store(tmp_path, disk=disk, free_bytes=lambda: free, background=False)
        async with running(store):
            await store.txn([], [put(b"f/a", b"")])
            with pytest.raises(errors.NoSpace):
                await fill(store, b"x" * 3000)
            assert store.status()["state"] == "full"
            assert store.revision < 40  # as soon as no third segment fits, not when the second is full
            assert (await store.txn([], [delete(b"f/a")])).responses == [1]
            await store.committed()
            disk.capacity_bytes = 1 << 30
            await until_it_accepts(store)
            free = 1 << 30
            await until(lambda: store.status()["state"] == "ok")
        store.close()

    trio.run(main)


def test_a_state_that_cannot_grow_holds_writers_back_and_goes_on_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free = 1 << 40
    value = b"x" * MIB

    async def main() -> None:
        nonlocal free
        store = open_store(tmp_path, free_bytes=lambda: free, segment_bytes=8 * MIB)
        async with running(store):
            await store.txn([], [put(b"f/old", b"")])
            free = 0
            with pytest.raises(errors.NoSpace):
                await fill(store, value)
            held = store.status()["overlay_bytes"]
            assert isinstance(held, int)
            assert OVERLAY_BYTES_MAX < held < OVERLAY_BYTES_MAX + 2 * MIB
            assert store.status()["state"] == "full"
            assert store.get(b"f/old") is not None
            assert (await store.txn([], [delete(b"f/old")])).responses == [1]
            free = 1 << 40
            await until(lambda: store.status()["state"] == "ok")
            await until(lambda: store.status()["overlay_bytes"] == 0)
            await store.txn([], [put(b"f/new", value)])
        store.close()

    trio.run(main)
    assert "does not grow" in caplog.text


def test_writers_faster_than_the_disk_wait_and_lose_nothing(tmp_path: Path) -> None:
    value = b"x" * MIB
    most = 0

    async def main() -> None:
        nonlocal most
        store = open_store(tmp_path, segment_bytes=64 * MIB)

        async def writer(name: int) -> None:
            nonlocal most
            for number in range(12):
                await store.txn([], [put(b"f/%d/%d" % (name, number), value)])
                most = max(most, store.engine.overlay.bytes)

        async with running(store), trio.open_nursery() as nursery:
            for name in range(8):
                nursery.start_soon(writer, name)
        assert len(store.range(b"f/", b"f0", keys_only=True)) == 96
        store.close()

    trio.run(main)
    assert OVERLAY_BYTES_MAX < most < OVERLAY_BYTES_MAX + 10 * MIB


def test_without_its_threads_it_makes_room_where_it_is_called(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path, segment_bytes=64 * MIB)
        for number in range(80):
            await store.txn([], [put(b"f/%d" % (number % 4), b"x" * MIB)])
        assert store.engine.overlay.bytes < OVERLAY_BYTES_MAX
        store.close()

    trio.run(main)


@pytest.mark.parametrize("step", range(3))
def test_a_write_that_fails_anywhere_is_as_if_never_tried(tmp_path: Path, step: int) -> None:
    """EIO and ENOSPC at each write of the log in turn."""

    async def main() -> None:
        probe = SimDisk()
        store = open_store(tmp_path / "probe", disk=probe, background=False)
        start = probe.operations
        for number in range(1, 40):
            await store.txn([], load(number))
        last = probe.operations
        store.close()
        for at in range(start + 1 + step, last + 1, 3):
            disk = SimDisk(at)
            directory = tmp_path / str(at)
            store = open_store(directory, disk=disk, background=False)
            disk.fail("pwrite", (errno.EIO, errno.ENOSPC)[at % 2], at=at)
            failed = 0
            for number in range(1, 40):
                before = hash_of(store), store.revision
                try:
                    await store.txn([], load(number))
                except errors.StorageError:
                    assert at % 2 == 0
                    failed += 1
                    assert (hash_of(store), store.revision) == before
                except errors.NoSpace:
                    failed += 1
                    assert (hash_of(store), store.revision) == before
            expected = hash_of(store), store.revision
            assert failed <= 1
            assert 39 - failed <= store.revision <= 40  # one more to look for space
            store.close()
            again = open_store(directory, disk=disk, background=False)
            assert (hash_of(again), again.revision) == expected
            again.close()

    trio.run(main)


def test_observers_hear_of_what_is_in_the_log_only(tmp_path: Path) -> None:
    disk = SimDisk()
    heard: list[list[bytes]] = []

    async def main() -> None:
        store = open_store(tmp_path, disk=disk, background=False)

        def observer(revision: int, events: list[Event], origin: object) -> None:
            heard.append([event.key for event in events])

        store.observe(observer)  # type: ignore[arg-type]
        await store.txn([], [put(b"f/a", b"")])
        disk.fail("pwrite", errno.ENOSPC, at=disk.operations)
        with pytest.raises(errors.NoSpace):
            await store.txn([], [put(b"f/b", b"")])
        await store.txn([], [put(b"f/c", b"")])
        store.close()

    trio.run(main)
    assert heard == [[b"f/a"], [b"f/c"]]
