"""What a snapshot may cost its sender, and who may read it."""

import itertools
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from aspenfs import limits
from aspenfs.errors import ProtocolError
from aspenfs.kv.machine import state_hash
from aspenfs.runtime.snapshots.blocks import digest_of, next_block
from aspenfs.runtime.snapshots.server import SnapshotServer
from aspenfs.runtime.statedb import StateDb
from tests.kv.subject import FakeEntropy
from tests.runtime.snapshot_wire import filled, items, record


class Setup:
    def __init__(self, path: Path) -> None:
        self.state = filled(path, 100)
        self.free_bytes = 1 << 40
        self.server = SnapshotServer(self.state, FakeEntropy(), lambda: self.free_bytes)

    async def opened(self, node: int = 1, index: int = 0) -> dict[str, Any]:
        return await self.server.open(node, {"index": index})

    async def read(
        self, number: bytes, after: bytes = b"", *, node: int = 1, most: int = 4096
    ) -> dict[str, Any]:
        return await self.server.read(node, {"id": number, "after": after, "max": most})


def on(place: Path, test: Callable[[Setup], Awaitable[None]], clock: trio.abc.Clock | None = None) -> None:
    async def main() -> None:
        setup = Setup(place / "state")
        try:
            await test(setup)
        finally:
            for number in list(setup.server._pins):
                setup.server._end(number, "the test is over")
            setup.state.close()

    trio.run(main, clock=clock)


def test_two_at_a_time_and_one_for_each_node(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        first, second = await setup.opened(1), await setup.opened(2)
        assert "refused" in await setup.opened(3)
        again = await setup.opened(1)
        assert len({first["id"], second["id"], again["id"]}) == 3
        assert "gone" in await setup.read(first["id"])
        assert "rows" in await setup.read(again["id"])
        await setup.server.end(2, {"id": second["id"]})
        assert "id" in await setup.opened(3)
        assert setup.server.pinned == limits.SNAPSHOTS_MAX

    on(tmp_path, test)


def test_a_snapshot_is_read_by_the_node_that_asked_for_it(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        number = (await setup.opened(1))["id"]
        assert "gone" in await setup.read(number, node=2)
        await setup.server.end(2, {"id": number})
        assert "rows" in await setup.read(number)

    on(tmp_path, test)


def test_a_block_can_be_had_again_but_no_earlier_one(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        number = (await setup.opened())["id"]
        blocks = [await setup.read(number)]
        for _ in range(3):
            blocks.append(await setup.read(number, blocks[-1]["last"]))
        assert await setup.read(number, blocks[-2]["last"]) == blocks[-1]
        # Another size, as a node with a newer release might ask for.
        longer = await setup.read(number, blocks[-2]["last"], most=9000)
        assert longer["rows"].startswith(blocks[-1]["rows"])
        assert "gone" in await setup.read(number, blocks[0]["last"])
        assert "gone" in await setup.read(number, b"f/never")

    on(tmp_path, test)


def test_it_ends_when_it_is_too_old_or_nobody_reads_it(tmp_path: Path) -> None:
    clock = trio.testing.MockClock()

    async def test(setup: Setup) -> None:
        number, idle = (await setup.opened(1))["id"], (await setup.opened(2))["id"]
        after = b""
        for _ in range(limits.SNAPSHOT_AGE_MAX_S // limits.SNAPSHOT_IDLE_S_MAX):
            clock.jump(limits.SNAPSHOT_IDLE_S_MAX - 1)
            setup.server.look()
            after = (await setup.read(number, after))["last"]
            clock.jump(1)
        setup.server.look()
        assert "gone" in await setup.read(idle, node=2)
        assert "rows" in await setup.read(number, after)
        clock.jump(1)
        setup.server.look()
        assert "gone" in await setup.read(number, after)
        assert setup.server.pinned == 0

    on(tmp_path, test, clock)


@pytest.mark.parametrize("cost", ["growth", "disk"])
def test_it_ends_when_it_costs_too_much(tmp_path: Path, cost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aspenfs.runtime.snapshots.server.SNAPSHOT_GROWTH_BYTES_MAX", 4 << 20)

    async def test(setup: Setup) -> None:
        number = (await setup.opened())["id"]
        setup.server.look()
        assert setup.server.pinned == 1
        if cost == "growth":
            for index in range(101, 111):
                setup.state.apply([(b"k/large", record(bytes(1 << 20)))], index)
                setup.state.refresh()
        else:
            setup.free_bytes = limits.SNAPSHOT_FREE_BYTES_MIN - 1
        setup.server.look()
        assert "gone" in await setup.read(number)
        assert cost == "growth" or "refused" in await setup.opened()

    on(tmp_path, test)


def test_pages_are_used_again_when_it_has_ended(tmp_path: Path) -> None:
    """What a pin costs is bounded by what is written while it lasts; afterwards the file stays as it is."""

    async def test(setup: Setup) -> None:
        def write(first: int) -> int:
            for index in range(first, first + 10):
                setup.state.apply([(b"k/large", record(bytes(1 << 20)))], index)
                setup.state.refresh()
            return setup.state.size_bytes()

        before = write(101)
        number = (await setup.opened())["id"]
        grown = write(111)
        assert before + (9 << 20) < grown < before + (12 << 20)
        await setup.server.end(1, {"id": number})
        assert write(121) < grown + (1 << 20)

    on(tmp_path, test)


def test_one_that_ends_while_a_thread_reads_it_ends_after_that(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        number = (await setup.opened())["id"]
        pin = setup.server._pins[number]
        reading, go_on = threading.Event(), threading.Event()
        read = pin.read

        def slowly(after: bytes, bytes_max: int) -> Any:
            reading.set()
            assert go_on.wait(20)
            return read(after, bytes_max)

        pin.read = slowly  # type: ignore[method-assign]
        answers = []
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                answers.append(await setup.read(number))

            nursery.start_soon(ask)
            nursery.start_soon(ask)
            assert await trio.to_thread.run_sync(reading.wait, 20)
            setup.server._end(number, "a test")
            go_on.set()
        assert answers == [{"gone": "a test"}] * 2
        assert setup.state._environment._snapshots == 0

    on(tmp_path, test)


@pytest.mark.parametrize("body", [None, 7, {}, {"id": "text"}, {"id": b"x", "after": 1}, {"index": -1},
                                  {"id": b"x", "after": b"", "max": -1}, {"index": True}])  # fmt: skip
def test_requests_that_make_no_sense_are_refused(tmp_path: Path, body: Any) -> None:
    async def test(setup: Setup) -> None:
        with pytest.raises(ProtocolError):
            await setup.server.open(1, body)
        with pytest.raises(ProtocolError):
            await setup.server.read(1, body)
        if not isinstance(body, dict) or type(body.get("id")) is not bytes:
            with pytest.raises(ProtocolError):
                await setup.server.end(1, body)

    on(tmp_path, test)


def test_the_digest_of_a_serving_node_is_its_state_hash_at_that_index(tmp_path: Path) -> None:
    async def test(setup: Setup) -> None:
        wanted = state_hash(setup.state)
        setup.state.apply([(b"k/later", record(b"1"))], 101)  # applied, and readers have not moved yet
        answer = await setup.server.digest(2, {})
        assert (answer["index"], answer["rows"]) == (101, len(items()) + 1)
        assert answer["digest"] != wanted
        setup.state.refresh()
        assert answer["digest"] == state_hash(setup.state)

    on(tmp_path, test)


@pytest.mark.parametrize("bytes_max", [1, 100, 4096, 1 << 20, 1 << 30])
def test_blocks_hold_each_row_once_and_keep_to_their_size(tmp_path: Path, bytes_max: int) -> None:
    state = filled(tmp_path / "state", 100, count=300)
    with state.snapshot() as snapshot:
        after, blocks = b"", []
        for number in itertools.count():
            block = next_block(snapshot, after, bytes_max)
            assert len(block.rows) <= bytes_max or block.row_count == 1
            blocks.append(block)
            after = block.last
            if block.end:
                break
            assert number < 1000
        joined = b"".join(block.rows for block in blocks)
        assert joined == next_block(snapshot, b"", 1 << 40).rows
        assert sum(block.row_count for block in blocks) == len(items(count=300)) == digest_of(snapshot).rows
    state.close()


def test_an_empty_state_is_one_empty_block(tmp_path: Path) -> None:
    state = StateDb(tmp_path / "state")
    with state.snapshot() as snapshot:
        assert next_block(snapshot, b"") == (b"", 0, b"", True)
        assert (snapshot.applied_index, snapshot.term) == (0, 0)
    state.close()
