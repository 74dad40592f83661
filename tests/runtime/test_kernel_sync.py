"""The log made durable by the kernel's own workers, and by the thread where they can not or must not."""

import errno
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio

from aspenfs import errors
from aspenfs.kv.types import put
from aspenfs.runtime import host
from aspenfs.runtime.disk import RealDisk, RealFile
from aspenfs.runtime.kernel_sync import Descriptor, Done, KernelSync
from aspenfs.runtime.wal import Wal
from tests.runtime.host_driver import open_store, running, until

CLUSTER = b"c" * 16


def opened(directory: Path) -> KernelSync:
    kernel = KernelSync.open(directory)
    assert kernel is not None, "this kernel has no asynchronous fdatasync"
    return kernel


def written(directory: Path, name: str) -> RealFile:
    file = RealDisk(directory).open(name, create=True)
    file.pwrite(b"x" * 10_000, 0)
    return file


def test_what_was_asked_for_is_told_of_once(tmp_path: Path) -> None:
    async def main() -> None:
        kernel = opened(tmp_path)
        assert not os.get_inheritable(kernel._context.fileno)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.run)
            for count in (1, 2, 64):
                told: list[OSError | None] = []
                files = [written(tmp_path, f"{number}") for number in range(count)]
                kernel.start(files, told.append)
                assert (kernel.under_way, told) == (True, []), "nobody is told while he asks"
                await until(lambda told=told: told)
                assert (kernel.under_way, told) == (False, [None])
                for file in files:
                    file.close()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_whoever_stops_can_wait_for_it(tmp_path: Path) -> None:
    kernel = opened(tmp_path)
    file = written(tmp_path, "f")
    told: list[OSError | None] = []
    kernel.start([file], told.append)
    kernel.wait()
    assert told == [None]
    kernel.wait()
    assert told == [None]
    file.close()


def test_what_the_kernel_does_not_take_was_not_begun(tmp_path: Path) -> None:
    kernel = opened(tmp_path)
    file = written(tmp_path, "f")
    told: list[OSError | None] = []
    reader, writer = os.pipe()  # has no fsync
    with open(reader), open(writer, "wb") as pipe:
        for refused in ([pipe], [file] * 65, []):
            with pytest.raises((ValueError, OverflowError)):
                kernel.start(refused, told.append)
            assert not kernel.under_way
        # One that is taken and one that is not: the answer is an error.
        kernel.start([file, pipe], told.append)
        kernel.wait()
    (error,) = told
    assert error is not None
    told.clear()
    kernel.start([file], told.append)
    kernel.wait()
    assert told == [None], "and the next one is none"
    file.close()


@pytest.fixture
def losing_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system whose disk takes less than it promised: what is written back to it fails with EIO."""
    below, mountpoint = tmp_path / "below", tmp_path / "m"
    below.mkdir()
    mountpoint.mkdir()
    image = below / "image"
    mounted = []
    try:
        for command in (["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(below)],
                        ["truncate", "-s", "256m", str(image)],
                        ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image)],
                        ["mount", "-o", "loop", str(image), str(mountpoint)]):  # fmt: skip
            subprocess.run(command, check=True, timeout=60)
            if command[0] == "mount":
                mounted.append(command[-1])
        yield mountpoint
    finally:
        for place in reversed(mounted):
            # -l: a test that failed holds files open, and a loop device lets go of its image a little later.
            subprocess.run(["umount", "-l", place], check=True, timeout=60)


def test_a_disk_that_fails_ends_the_log(losing_disk: Path) -> None:
    kernel = opened(losing_disk)
    wal = Wal.open(RealDisk(losing_disk), "wal", CLUSTER, background=False, segment_bytes=1 << 20)
    wal.append(1, 1, 1, b"a" * 1000)
    told: list[OSError | None] = []
    pending = wal.begin_sync()
    assert pending is not None
    kernel.start(pending.files, told.append)  # type: ignore[arg-type]
    kernel.wait()
    assert wal.end_sync(pending, told.pop()) == 1
    file = RealDisk(losing_disk).open("lost", create=True)
    for number in range(20):
        file.pwrite(os.urandom(1 << 20), number << 20)
    kernel.start([file], told.append)
    kernel.wait()
    (error,) = told
    assert error is not None
    assert error.errno in (errno.EIO, errno.ENOSPC)
    wal.append(1, 1, 2, b"a" * 1000)
    pending = wal.begin_sync()
    assert pending is not None
    with pytest.raises(errors.SyncFailed, match="fdatasync of the log failed"):
        wal.end_sync(pending, error)
    for act in (wal.sync, wal.begin_sync, lambda: wal.append(1, 1, 3, b"")):
        with pytest.raises(errors.SyncFailed):
            act()
    file.close()
    wal.close()


# --- under a store ---


class Noted(KernelSync):
    """Counts, and may refuse or fail."""

    refuses: Exception | None = None
    fails: OSError | None = None
    asked = 0

    def start(self, files: Sequence[Descriptor], done: Done) -> None:
        self.asked += 1
        if self.refuses is not None:
            raise self.refuses
        failure = self.fails
        super().start(files, done if failure is None else lambda _: done(failure))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[Noted]:
    """Those that stores have opened."""
    made: list[Noted] = []

    class Opening:
        @staticmethod
        def open(directory: Path) -> Noted:
            kernel = Noted.open(directory)
            assert isinstance(kernel, Noted)
            kernel.asked = 0  # but for its own trial
            made.append(kernel)
            return kernel

    monkeypatch.setattr(host, "KernelSync", Opening)
    return made


@pytest.fixture
def no_chores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for a sync but the test, however slow the machine is."""
    monkeypatch.setattr(host, "SYNC_INTERVAL_MS", 1_000_000)


@pytest.mark.usefixtures("no_chores")
def test_the_thread_is_there_for_what_the_hooks_have_to_do(tmp_path: Path, noted: list[Noted]) -> None:
    due, ran = [False], []

    def hook() -> None:
        ran.append(True)
        due[0] = False

    async def main() -> None:
        store = open_store(tmp_path, pre_sync=[hook], pre_sync_due=lambda: due[0])
        async with running(store):
            ran.clear()
            for number in range(10):
                await store.txn([], [put(b"k", b"%d" % number)])
                await store.committed()
            assert not ran
            assert noted[0].asked >= 10
            asked = noted[0].asked
            due[0] = True
            await store.txn([], [put(b"k", b"x")])
            await store.committed()
            assert ran == [True]
            assert noted[0].asked == asked
            await store.txn([], [put(b"k", b"y")])
            await store.committed()
            assert noted[0].asked == asked + 1
        store.close()

    trio.run(main)


def test_all_who_wait_meanwhile_share_one_sync(tmp_path: Path, noted: list[Noted]) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        async with running(store):
            await store.txn([], [put(b"k", b"")])
            await store.committed()
            before = noted[0].asked

            async def write(number: int) -> None:
                await store.txn([], [put(b"f/%d" % number, b"")])
                await store.committed()

            async with trio.open_nursery() as writers:
                for number in range(100):
                    writers.start_soon(write, number)
            assert noted[0].asked - before <= 3
        store.close()

    trio.run(main)


def test_a_store_whose_kernel_refuses_goes_on_with_the_thread(
    tmp_path: Path, noted: list[Noted], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        async with running(store):
            await store.txn([], [put(b"k", b"1")])
            await store.committed()
            noted[0].refuses = OverflowError("no room")
            with caplog.at_level(logging.WARNING):
                for number in range(5):
                    revision = (await store.txn([], [put(b"k", b"%d" % number)])).revision
                    with trio.fail_after(10):
                        await store.committed(revision)
            assert noted[0].asked >= 1
            assert "made by the thread from now on" in caplog.text
        store.close()

    trio.run(main)


def test_a_failure_that_the_kernel_tells_ends_the_store(tmp_path: Path, noted: list[Noted]) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        with pytest.raises(errors.SyncFailed, match="Input/output"):  # noqa: PT012 – raised at its end
            async with running(store):
                await store.txn([], [put(b"k", b"1")])
                await store.committed()
                noted[0].fails = OSError(errno.EIO, os.strerror(errno.EIO))
                revision = (await store.txn([], [put(b"k", b"2")])).revision
                with pytest.raises(errors.SyncFailed):
                    await store.committed(revision)
        assert store.engine.committed_revision < revision
        store.close()

    trio.run(main)


def test_what_is_under_way_when_a_store_stops_is_waited_for(tmp_path: Path, noted: list[Noted]) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        for life in range(20):  # one store may run more than once
            async with running(store):
                revision = (await store.txn([], [put(b"k", b"%d" % life)])).revision
                store._syncer.request()
                under_way = noted[-1].under_way
                if life == 0:
                    assert under_way
            assert not noted[-1].under_way
            assert store.engine.committed_revision == revision
            await store.txn([], [put(b"l", b"%d" % life)])
            store._syncer.request()
            assert not noted[-1].under_way, "nobody would hear of it"
        store.close()
        again = open_store(tmp_path)
        record = again.get(b"k")
        assert record is not None
        assert record.value == b"19"
        again.close()

    trio.run(main)


def test_a_failure_of_the_sync_under_way_when_a_store_stops_is_told_in_the_loop(
    tmp_path: Path, noted: list[Noted], monkeypatch: pytest.MonkeyPatch
) -> None:
    told_in: list[threading.Thread] = []

    async def main() -> None:
        store = open_store(tmp_path)
        fail = store._syncer._failed

        def noting(error: BaseException) -> None:
            told_in.append(threading.current_thread())
            fail(error)

        monkeypatch.setattr(store._syncer, "_failed", noting)
        with pytest.raises(errors.SyncFailed):  # noqa: PT012 – raised at its end
            async with running(store):
                await store.txn([], [put(b"k", b"1")])
                await store.committed()
                noted[0].fails = OSError(errno.EIO, os.strerror(errno.EIO))
                await store.txn([], [put(b"k", b"2")])
                store._syncer.request()
                assert noted[0].under_way
        store.close()

    trio.run(main)
    assert told_in == [threading.main_thread()]


def test_what_was_asked_for_before_a_store_runs_is_done_then(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(tmp_path)
        revision = (await store.txn([], [put(b"k", b"")])).revision
        store._syncer.request()
        async with running(store):
            done: Callable[[], bool] = lambda: store.engine.committed_revision >= revision  # noqa: E731
            await until(done)
        store.close()

    trio.run(main)


@pytest.mark.usefixtures("no_chores")
def test_a_sync_that_somebody_else_makes_is_waited_for_by_the_thread(tmp_path: Path) -> None:
    """As when a state is put in place of another one: that syncs the log from a thread of its own."""
    in_sync, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        in_sync.set()
        assert go_on.wait(20)

    async def main() -> None:
        store = open_store(tmp_path)
        async with running(store):
            revision = (await store.txn([], [put(b"k", b"1")])).revision
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, store._wal.sync, hold)
                await until(in_sync.is_set)
                second = (await store.txn([], [put(b"k", b"2")])).revision
                store._syncer.request()
                assert store._syncer._queued == 1
                with trio.move_on_after(0.05):
                    await store.committed(second)
                assert store.engine.committed_revision < revision
                go_on.set()
            with trio.fail_after(10):
                assert await store.committed(second) >= second
        store.close()

    trio.run(main)
