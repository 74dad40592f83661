"""Upkeep: what fails is tried again, nothing of it ends the mount, nothing is forgotten."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from aspenfs import errors
from aspenfs.blobs.collect import CollectStep
from aspenfs.blobs.store import BlobStore
from aspenfs.cli.upkeep import AFTER_FAILURE_S, Upkeep
from aspenfs.runtime.disk import RealDisk
from tests.filesystem.volumes import CALLER, Setup, run


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[BlobStore]:
    store = BlobStore.open(RealDisk(tmp_path))
    yield store
    store.close()


async def orphans(setup: Setup, count: int) -> None:
    """So many files that are gone but for their rows, as a killed daemon leaves them."""
    for index in range(count):
        _, handle = await setup.tree.create(1, b"%d" % index, 0o644, 2, CALLER)
        await handle.write(0, index.to_bytes(2, "big") * 10_000)
        await setup.tree.unlink(1, b"%d" % index)
    setup.tree.open_counts.clear()
    setup.tree.orphans.kept.clear()
    setup.tree.orphans.recover()


def nothing(_: errors.NoSpace | None) -> None: ...


def failing(setup: Setup, failures: list[Exception]) -> None:
    """Ending an orphan fails so often."""
    release = setup.tree.content.release_operations

    def release_or_fail(node: int, size: int) -> Any:
        if failures:
            raise failures.pop()
        return release(node, size)

    setup.tree.content.release_operations = release_or_fail  # type: ignore[method-assign]


def test_an_orphan_that_cannot_go_now_goes_later_and_does_not_hold_up_the_others() -> None:
    async def test(setup: Setup) -> None:
        await orphans(setup, 3)
        failing(setup, [errors.NoSpace("full")])
        with pytest.raises(errors.NoSpace):
            await setup.tree.reap()
        assert len(setup.tree.orphans.doomed) == 3
        assert await setup.tree.reap() == 3
        assert setup.volume.inode_count() == 1

    run(test)


@pytest.mark.parametrize(
    "error",
    [errors.NoSpace("full"), errors.Conflict("x"), errors.NoQuorum("x"), OSError(5, "x"), ValueError()],
)
def test_no_failure_of_upkeep_ends_it(blobs: BlobStore, error: Exception) -> None:
    async def main() -> None:
        setup = Setup()
        await setup.volume.format()
        await orphans(setup, 1)
        upkeep = Upkeep(setup.tree, setup.volume, blobs, nothing)
        failures = [error]
        failing(setup, failures)
        with trio.move_on_after(2 * AFTER_FAILURE_S):
            await upkeep.run()
        assert not failures
        assert setup.volume.inode_count() == 1

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_sync_that_failed_is_passed_on(blobs: BlobStore) -> None:
    async def main() -> None:
        setup = Setup()
        await setup.volume.format()

        def collect() -> Iterator[CollectStep]:
            raise errors.SyncFailed("lost")

        blobs.collect = collect  # type: ignore[method-assign,assignment]
        with pytest.raises(errors.SyncFailed):
            await Upkeep(setup.tree, setup.volume, blobs, nothing).run()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_compaction_that_found_no_room_says_so_and_is_tried_again(blobs: BlobStore) -> None:
    async def main() -> None:
        setup = Setup()
        await setup.volume.format()
        calls = 0
        told: list[errors.NoSpace | None] = []

        def collect() -> Iterator[CollectStep]:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise errors.NoSpace("full")
            return iter(())

        blobs.collect = collect  # type: ignore[method-assign,assignment]
        with trio.move_on_after(60):
            await Upkeep(setup.tree, setup.volume, blobs, told.append).run()
        assert calls == 2
        assert list(map(str, told)) == ["full", "None"]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_garbage_of_earlier_lives_and_beyond_memory_is_collected(blobs: BlobStore) -> None:
    async def main() -> None:
        setup = Setup()
        await setup.volume.format()
        await orphans(setup, 50)
        while await setup.tree.reap():
            pass
        setup.volume.unreferenced.clear()  # as after a restart
        setup.volume.garbage_max = 7
        with trio.move_on_after(120):
            await Upkeep(setup.tree, setup.volume, blobs, nothing).run()
        assert setup.blobs.chunks == {}

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_full_disk_at_the_end_is_left_to_the_next_start(blobs: BlobStore) -> None:
    async def main() -> None:
        setup = Setup()
        await setup.volume.format()
        await orphans(setup, 1)
        failing(setup, [errors.NoSpace("full")])
        await Upkeep(setup.tree, setup.volume, blobs, nothing).tidy()
        assert len(setup.tree.orphans.doomed) == 1

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
