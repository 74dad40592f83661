"""The whole store across the loss of power or of its process, at every disk operation of its log.

The log is on a simulated disk. The state is LMDB on a real one, which cannot be crashed; instead a
copy of it from an earlier moment is what is found afterwards, as old as the contract of StateDb
allows (`durable_index`). What must come back is exactly the state after some accepted
transaction: at least the last committed one, and after the death of the process alone, the last accepted one.
"""

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from aspenfs.runtime.host import NodeStore
from aspenfs.sim.disk import SimDisk, SimulatedCrash
from tests.runtime.host_driver import hash_of, load, open_store

TRANSACTIONS = 80
SEGMENT_BYTES = 8 << 10  # so that the log rolls over and is trimmed many times


class Run:
    """One life of a store under the load, and what is known of it from outside."""

    def __init__(self, directory: Path, disk: SimDisk, seed: int) -> None:
        self.directory, self.disk = directory, disk
        self.rng = random.Random(seed)
        self.hashes: list[bytes] = []  # by revision: what was visible then
        self.committed = 0
        self.copies: list[tuple[int, int, Path]] = []  # (applied, floor at that time, where)
        self.store: NodeStore | None = None

    async def live(self) -> None:
        """Writes, commits, applies; raises SimulatedCrash when the disk goes down."""
        self.store = store = open_store(self.directory, disk=self.disk, background=False,
                                        segment_bytes=SEGMENT_BYTES)  # fmt: skip
        self.hashes.append(hash_of(store))
        self._copy()
        for number in range(1, TRANSACTIONS + 1):
            result = await store.txn([], load(number))
            assert result.revision == number
            self.hashes.append(hash_of(store))
            if self.rng.random() < 0.2:
                self.committed = await store.committed()
            if self.rng.random() < 0.1:
                store.apply()
                self._copy()

    def _copy(self) -> None:
        assert self.store is not None
        place = self.directory / f"copy-{len(self.copies)}"
        shutil.copytree(self.directory / "state", place)
        status = self.store.status()
        applied, floor = status["applied"], self.store.replay_floor
        assert isinstance(applied, int)
        self.copies.append((applied, floor, place))

    def lose_power(self) -> None:
        """The state as it may be found: any copy that the newest floor allows."""
        assert self.store is not None
        floor = self.store.replay_floor
        self.die()
        candidates = [place for applied, _, place in self.copies if applied >= floor]
        shutil.rmtree(self.directory / "state")
        shutil.copytree(self.rng.choice(candidates), self.directory / "state")

    def die(self) -> None:
        """The process ends: only the address space goes."""
        assert self.store is not None
        self.store._state.close()

    async def come_back(self, at_least: int) -> None:
        """What is found is a prefix of what was accepted, with `at_least`, and the store goes on from it."""
        store = open_store(self.directory, disk=self.disk, background=False, segment_bytes=SEGMENT_BYTES)
        revision = store.revision
        assert revision >= at_least
        if revision < len(self.hashes):
            assert hash_of(store) == self.hashes[revision]
        else:  # the transaction under way was in the log, but its caller never heard of it
            assert revision == len(self.hashes)
        await store.txn([], load(revision + 1))
        await store.committed()
        expected = hash_of(store)
        store.close()
        again = open_store(self.directory, disk=self.disk, background=False, segment_bytes=SEGMENT_BYTES)
        assert hash_of(again) == expected
        again.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """In memory if there is such a place: thousands of syncs of the state are not what is tested."""
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="aspenfs-test-", dir=memory if memory.is_dir() else None))
    yield directory
    shutil.rmtree(directory)


def operations(place: Path) -> tuple[int, int]:
    """The first and the last disk operation of an undisturbed life, after the store was opened."""
    disk = SimDisk(0)
    run = Run(place / "probe", disk, 0)
    first = 0

    async def main() -> None:
        nonlocal first
        open_store(run.directory, disk=disk, background=False, segment_bytes=SEGMENT_BYTES).close()
        first = disk.operations
        await run.live()
        assert run.store is not None
        run.die()

    trio.run(main)
    return first, disk.operations


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("power", [True, False], ids=["power", "process"])
def test_what_comes_back_is_a_prefix_with_all_that_was_promised(place: Path, power: bool, part: int) -> None:
    first, last = operations(place)
    step = 4 if power else 12
    for at in range(first + 1 + part, last + 1, step):
        disk = SimDisk(at)
        run = Run(place / str(at), disk, at)

        async def main(run: Run = run, disk: SimDisk = disk, at: int = at) -> None:
            open_store(run.directory, disk=disk, background=False, segment_bytes=SEGMENT_BYTES).close()
            (disk.crash_at if power else disk.kill_at)(at)
            try:
                await run.live()
            except SimulatedCrash:
                pass
            else:
                disk.crash() if power else disk.kill()
            if run.store is None:  # went down while it was opened
                disk.restart()
                open_store(run.directory, disk=disk, background=False, segment_bytes=SEGMENT_BYTES).close()
                return
            if power:
                run.lose_power()
            else:
                run.die()
            disk.restart()
            await run.come_back(run.committed if power else len(run.hashes) - 1)

        trio.run(main)
        shutil.rmtree(run.directory)
