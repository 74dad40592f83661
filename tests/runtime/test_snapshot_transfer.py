"""A state on its way to another node: whole and equal, whatever breaks on the way; or nothing."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from aspenfs.errors import Closed, Corrupt, NoSpace, PeerUnreachable
from aspenfs.kv.machine import state_hash
from aspenfs.runtime import swap
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.snapshots import client
from aspenfs.runtime.snapshots.client import Fetched, Progress, SnapshotClient
from aspenfs.runtime.snapshots.server import SnapshotServer
from aspenfs.runtime.statedb import StateDb
from tests.kv.subject import FakeEntropy
from tests.runtime.snapshot_wire import META, Wire, filled, items, record

US, LEADER, OTHER = 1, 2, 3
BLOCK_BYTES = 16_384
PLENTY = 1 << 40
NEVER_S = 1_000.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender is told that it need not keep a state, also on a busy machine."""
    monkeypatch.setattr(client, "_CLOSE_SECONDS", NEVER_S)


class Nodes:
    """A leader with a state, another node with a newer one, and us."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.wire = Wire()
        self.states = {LEADER: filled(place / "leader", 100), OTHER: filled(place / "other", 120, seed=1)}
        self.servers = {}
        for node, state in self.states.items():
            self.servers[node] = SnapshotServer(state, FakeEntropy(), lambda: PLENTY)
            self.servers[node].register(self.wire.end(node))
        self.leader = LEADER
        self.ours = place / "ours"
        self.ours.mkdir()
        self.gives_up_after(NEVER_S)
        self.seen: list[Progress] = []

    def gives_up_after(self, resume_s: float) -> None:
        """A sender that does not answer for so long."""
        self.client = SnapshotClient(
            self.wire.end(US), self.ours, block_bytes=BLOCK_BYTES, resume_s=resume_s, pause_s=0.01
        )

    async def fetch(self, min_index: int = 90) -> Fetched:
        with trio.fail_after(60):
            return await self.client.fetch(lambda: self.leader, min_index, self.seen.append)

    def expect(self, fetched: Fetched, node: int, index: int) -> None:
        """What was fetched is the state of `node` when it was filled."""
        assert (fetched.index, fetched.term, fetched.configuration) == (index, 3, META["configuration"])
        state = StateDb(self.ours / "state.new")
        wanted = items(seed=0 if node == LEADER else 1)
        assert list(state.items(b"", b"")) == wanted
        assert state_hash(state) == fetched.digest
        assert (state.applied_index, state.meta("term")) == (index, META["term"])
        assert state.verify().keys == len(wanted) == fetched.rows
        state.close()


@asynccontextmanager
async def nodes(place: Path) -> AsyncIterator[Nodes]:
    made = Nodes(place)
    try:
        async with trio.open_nursery() as nursery:
            for server in made.servers.values():
                nursery.start_soon(server.run)
            yield made
            nursery.cancel_scope.cancel()
    finally:
        for state in made.states.values():
            state.close()


def on(place: Path, test: Callable[[Nodes], Awaitable[None]]) -> None:
    async def main() -> None:
        async with nodes(place) as made:
            await test(made)

    trio.run(main)


def test_a_state_arrives_whole(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        fetched = await nodes.fetch()
        nodes.expect(fetched, LEADER, 100)
        assert state_hash(nodes.states[LEADER]) == fetched.digest
        assert nodes.seen[-1][2::2] == (fetched.rows, fetched.bytes)
        counts = [progress.rows for progress in nodes.seen]
        assert counts == sorted(set(counts))
        assert nodes.servers[LEADER].pinned == 0
        assert nodes.wire.count("snapshot.read") > 10

    on(tmp_path, test)


def test_what_changes_meanwhile_is_not_in_it(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        state = nodes.states[LEADER]

        def change(kind: str, answer: Any) -> Any:
            if kind == "snapshot.read":
                number = nodes.wire.count(kind)
                state.apply([(b"f/%06d" % (number * 37), None), (b"k/zz", record(b"new"))], 100 + number)
                state.refresh()
            return answer

        nodes.wire.change = change
        nodes.expect(await nodes.fetch(), LEADER, 100)
        assert state.get(b"k/zz") is not None

    on(tmp_path, test)


def test_an_error_of_the_sender_is_no_error_of_ours(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        def cut(what: str, number: int) -> None:
            if what != "answer" and number in (1, 2, 6):
                raise Closed("the sender's store is closed")

        nodes.wire.cut = cut
        nodes.expect(await nodes.fetch(), LEADER, 100)

    on(tmp_path, test)


@pytest.mark.parametrize("lost", ["snapshot.read", "answer"])
def test_a_broken_connection_costs_a_block_and_not_the_transfer(tmp_path: Path, lost: str) -> None:
    async def test(nodes: Nodes) -> None:
        def cut(what: str, number: int) -> None:
            if what == lost and number % 3 and number > 2:
                raise PeerUnreachable("cut")

        nodes.wire.cut = cut
        nodes.expect(await nodes.fetch(), LEADER, 100)
        assert nodes.wire.count("snapshot.open") == 1
        # Two of three requests were lost.
        assert nodes.wire.count("snapshot.read") < 4 * len(nodes.seen)

    on(tmp_path, test)


def test_a_snapshot_that_is_gone_is_replaced_by_another_one(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        def change(kind: str, answer: Any) -> Any:
            if nodes.wire.count("snapshot.read") == 5 and kind == "snapshot.read":
                nodes.servers[LEADER].look = lambda: None  # type: ignore[method-assign]
                for number in list(nodes.servers[LEADER]._pins):
                    nodes.servers[LEADER]._end(number, "a test")
            return answer

        nodes.wire.change = change
        nodes.expect(await nodes.fetch(), LEADER, 100)
        assert nodes.wire.count("snapshot.open") == 2

    on(tmp_path, test)


def test_when_the_sender_dies_the_new_leader_is_asked(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        def cut(what: str, number: int) -> None:
            if number > 5 and nodes.wire.asked[number - 1][0] == LEADER:
                nodes.leader = OTHER
                raise PeerUnreachable("dead")

        nodes.wire.cut = cut
        nodes.gives_up_after(0.2)
        nodes.expect(await nodes.fetch(), OTHER, 120)
        assert {progress.source for progress in nodes.seen} == {LEADER, OTHER}

    on(tmp_path, test)


def test_a_sender_that_lost_the_leadership_is_read_to_the_end(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        def change(kind: str, answer: Any) -> Any:
            nodes.leader = OTHER if kind == "snapshot.read" else nodes.leader
            return answer

        nodes.wire.change = change
        nodes.expect(await nodes.fetch(), LEADER, 100)

    on(tmp_path, test)


def test_who_has_not_applied_enough_is_asked_again(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        def change(kind: str, answer: Any) -> Any:
            if "refused" in answer and nodes.wire.count(kind) == 3:
                nodes.states[LEADER].apply([(b"k/more", record(b"1"))], 150, META)
            return answer

        nodes.wire.change = change
        assert (await nodes.fetch(150)).index == 150
        assert nodes.wire.count("snapshot.open") == 4

    on(tmp_path, test)


def test_nobody_leads_for_a_while(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        leaders = iter([0, 0, 7, LEADER])
        with trio.fail_after(60):
            fetched = await nodes.client.fetch(lambda: next(leaders, LEADER), 1)
        nodes.expect(fetched, LEADER, 100)

    on(tmp_path, test)


def test_damage_on_the_way_is_found_and_fetched_again(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        def change(kind: str, answer: Any) -> Any:
            if kind == "snapshot.read" and nodes.wire.count(kind) in (4, 9):
                block = bytearray(answer["rows"])
                block[len(block) // 2] ^= 1
                answer["rows"] = bytes(block)
            return answer

        nodes.wire.change = change
        nodes.expect(await nodes.fetch(), LEADER, 100)
        assert nodes.wire.count("snapshot.open") == 3

    on(tmp_path, test)


@pytest.mark.parametrize("field", ["rows", "digest"])
def test_what_is_always_damaged_is_refused_and_leaves_nothing(tmp_path: Path, field: str) -> None:
    async def test(nodes: Nodes) -> None:
        def change(kind: str, answer: Any) -> Any:
            if kind == "snapshot.read" and answer["end"]:
                answer[field] = answer[field][:-1] + bytes([answer[field][-1] ^ 1])
            return answer

        nodes.wire.change = change
        with pytest.raises(Corrupt, match="the rows are not those"):
            await nodes.fetch()
        assert list(nodes.ours.iterdir()) == []
        assert nodes.wire.count("snapshot.open") == 3

    on(tmp_path, test)


def test_rows_that_come_twice_are_refused_though_the_digest_fits(tmp_path: Path) -> None:
    """A sender with a bug: each block is what it says, but not what should come next."""

    async def test(nodes: Nodes) -> None:
        def change(kind: str, answer: Any) -> Any:
            if kind == "snapshot.read":
                for pin in nodes.servers[LEADER]._pins.values():
                    pin.hashers[b""] = pin.hashers[answer["last"]]
                answer["last"] = b""
            return answer

        nodes.wire.change = change
        with pytest.raises(Corrupt, match="does not come behind"):
            await nodes.fetch()

    on(tmp_path, test)


@pytest.mark.parametrize(
    "nonsense", [{}, [], None, {"rows": b"", "last": b"", "digest": b"", "end": False}, {"id": 1}]
)
@pytest.mark.parametrize("kind", ["snapshot.open", "snapshot.read"])
def test_answers_without_sense_end_it_and_leave_nothing(tmp_path: Path, kind: str, nonsense: Any) -> None:
    async def test(nodes: Nodes) -> None:
        nodes.wire.change = lambda asked, answer: nonsense if asked == kind else answer
        with pytest.raises(Corrupt, match="same release"):
            await nodes.fetch()
        assert list(nodes.ours.iterdir()) == []

    on(tmp_path, test)


def test_a_fetch_that_is_cancelled_leaves_nothing_and_pins_nothing(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        with trio.CancelScope() as scope:

            def change(kind: str, answer: Any) -> Any:
                if nodes.wire.count("snapshot.read") == 5:
                    scope.cancel()
                return answer

            nodes.wire.change = change
            await nodes.fetch()
        assert scope.cancelled_caught
        assert list(nodes.ours.iterdir()) == []
        assert nodes.servers[LEADER].pinned == 0

    on(tmp_path, test)


def test_a_full_disk_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        nodes.client = SnapshotClient(nodes.wire.end(US), nodes.ours, map_bytes=1 << 20)
        with pytest.raises(NoSpace):
            await nodes.fetch()
        assert list(nodes.ours.iterdir()) == []

    on(tmp_path, test)


def test_what_an_earlier_life_left_half_fetched_is_no_part_of_it(tmp_path: Path) -> None:
    async def test(nodes: Nodes) -> None:
        left = StateDb(nodes.ours / "state.new", syncing=False)
        left.load([(b"a", b"left over")])
        left.close()
        nodes.expect(await nodes.fetch(), LEADER, 100)
        assert swap.recover(RealDisk(nodes.ours)) is None
        assert list(nodes.ours.iterdir()) == []

    on(tmp_path, test)

