"""The state at a checkpoint: exactly that entry's, as the database has it, looked at within bounds."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
import trio.lowlevel
import trio.testing

from aspenfs.kv.machine import state_hash
from aspenfs.kv.memory import MemoryState
from aspenfs.kv.types import NO_ATTRIBUTES, Record
from aspenfs.runtime.applier import Applier
from aspenfs.runtime.checkpoints import Checkpoints, Digest
from aspenfs.runtime.statedb import StateDb
from tests.runtime.store_cluster import until

PLENTY = 1 << 40
SLOW = 0.01  # percent of a core: nothing gets done


class Looked:
    """A state, its applier, and what looks at it, running."""

    def __init__(self, place: Path, **options: Any) -> None:
        self.state = StateDb(place / "state")
        self.failures: list[BaseException] = []
        self.applier = Applier(self.state, self._applied, self.failures.append, self.failures.append)
        self.free_bytes = PLENTY
        self.checkpoints = Checkpoints(self.state, self.applier, lambda: self.free_bytes, **options)
        self.model = MemoryState()
        self.expected: dict[int, bytes] = {}
        self.index = 0

    def _applied(self, steps: list[int]) -> None:
        self.state.refresh()

    def write(self, count: int) -> None:
        for _ in range(count):
            self.index += 1
            effects = [(b"k/%d" % (self.index * number % 97), _record(self.index)) for number in range(1, 5)]
            self.model.apply(effects)
            self.applier.add(self.index, effects)

    def checkpoint(self) -> int:
        self.index += 1
        self.applier.checkpoint(self.index)
        self.applier.add(self.index, ())
        self.expected[self.index] = state_hash(self.model)
        return self.index

    async def found(self, index: int) -> Digest | str:
        await until(lambda: self.checkpoints.find(index) is not None)
        found = self.checkpoints.find(index)
        assert found is not None
        return found


def _record(index: int) -> Record:
    return Record((b"%d" % index).ljust(8_000, b"."), index, index, 1, 0, 0, NO_ATTRIBUTES)


def on(place: Path, test: Callable[[Looked], Any], **options: Any) -> None:
    async def main() -> None:
        looked = Looked(place, **options)
        looked.applier.start(trio.lowlevel.current_trio_token())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(looked.checkpoints.run)
                await trio.testing.wait_all_tasks_blocked()
                await test(looked)
                nursery.cancel_scope.cancel()
        finally:
            await trio.to_thread.run_sync(looked.applier.stop)
            looked.state.close()
        assert not looked.failures

    trio.run(main)


def test_the_digest_is_that_of_the_entry_though_all_was_committed_at_once(tmp_path: Path) -> None:
    async def test(looked: Looked) -> None:
        for _ in range(3):
            looked.write(100)
            index = looked.checkpoint()
            looked.write(100)
            looked.applier.request(looked.index)
            found = await looked.found(index)
            assert isinstance(found, Digest)
            assert found.digest == looked.expected[index]
            await until(lambda: looked.state.applied_index == looked.index)
            assert state_hash(looked.state) == state_hash(looked.model) != found.digest

    on(tmp_path, test)


def test_of_several_the_last_one_is_looked_at(tmp_path: Path) -> None:
    async def test(looked: Looked) -> None:
        looked.write(300)
        first = looked.checkpoint()
        looked.write(10)
        second = looked.checkpoint()
        looked.applier.request(first)
        await until(lambda: looked.checkpoints._walked is not None)
        looked.applier.request(second)
        assert await looked.found(first) == "a later one came"
        looked.checkpoints.hurry(second)
        looked.checkpoints.forget()
        assert await looked.found(second) == "another state took its place"

    on(tmp_path, test, percent=SLOW)


def test_a_walk_that_ends_while_its_state_is_replaced_counts_for_nothing(tmp_path: Path) -> None:
    async def test(looked: Looked) -> None:
        looked.write(50)
        index = looked.checkpoint()
        looked.applier.request(index)
        await until(lambda: looked.checkpoints._walked is not None)
        pin = looked.checkpoints._walked
        assert pin is not None
        pin.give_up = lambda why: None  # type: ignore[method-assign]  # too late: it has just ended
        looked.checkpoints.forget()
        pin.hurry()
        assert await looked.found(index) == "another state took its place"

    on(tmp_path, test, percent=SLOW)


def test_a_walk_that_would_cost_the_last_of_the_disk_is_given_up(tmp_path: Path) -> None:
    async def test(looked: Looked) -> None:
        looked.write(300)
        index = looked.checkpoint()
        looked.applier.request(index)
        await until(lambda: looked.checkpoints._walked is not None)
        await trio.sleep(0.05)
        assert looked.checkpoints.find(index) is None
        looked.free_bytes = 0
        assert await looked.found(index) == "the disk is nearly full"

    on(tmp_path, test, percent=SLOW, look_s=0.01)


def test_a_state_that_can_not_be_read_has_a_digest_that_nobody_has(tmp_path: Path) -> None:
    async def test(looked: Looked) -> None:
        looked.write(5)
        long = b"k/" + b"x" * 2000
        looked.index += 1
        looked.applier.add(looked.index, [(long, _record(looked.index))])
        looked.applier.request(looked.index)
        await until(lambda: looked.state.applied_index == looked.index)
        with looked.state._env.begin(write=True, db=looked.state._root) as txn:
            assert txn.put(long[:511], b"no link")  # the rest of the key is nowhere
        index = looked.checkpoint()
        looked.applier.request(index)
        found = await looked.found(index)
        assert isinstance(found, Digest)
        assert found.digest != looked.expected[index]

    on(tmp_path, test)


def test_what_is_about_to_be_looked_at_was_not_missed(tmp_path: Path) -> None:
    """The loop may see in the state what the applier has not told it of."""

    async def test(looked: Looked) -> None:
        reached, goes_on = looked.applier.at_checkpoint, threading.Event()
        assert reached is not None

        def late(index: int) -> None:
            assert goes_on.wait(30)
            reached(index)

        looked.applier.at_checkpoint = late
        looked.write(5)
        index = looked.checkpoint()
        looked.applier.request(index)

        def seen() -> bool:
            looked.state.refresh()
            return looked.state.applied_index == index

        await until(seen)
        assert looked.checkpoints.find(index) is None
        goes_on.set()
        assert isinstance(await looked.found(index), Digest)

    on(tmp_path, test)


def test_what_was_not_looked_at_is_told(tmp_path: Path) -> None:
    async def test(looked: Looked) -> None:
        looked.write(5)
        index = looked.checkpoint()
        assert looked.checkpoints.find(index) is None
        looked.applier.at_checkpoint = None
        looked.applier.request(index)
        assert await looked.found(index) == "it did not look at its state there"

    on(tmp_path, test)
