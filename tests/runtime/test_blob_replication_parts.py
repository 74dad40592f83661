"""Pins end in time, a sync covers those who came before it, and nothing a peer sends is taken on trust."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from aspenfs import errors
from aspenfs.filesystem import layout, references
from aspenfs.kv.commands import TXN, Command
from aspenfs.kv.types import GREATER, absent, compare_field, put
from aspenfs.limits import BLOB_ASK_MAX, CHUNK_BYTES_MAX
from aspenfs.runtime.blob_replication import wire
from aspenfs.runtime.blob_replication.durable import GroupSync
from aspenfs.runtime.blob_replication.pins import Pins
from tests.filesystem.volumes import CALLER, Setup
from tests.filesystem.volumes import run as run_on_volume

SECOND = 10**9


class Time:
    now = 0

    def __call__(self) -> int:
        return self.now


# --- pins ---


@pytest.mark.parametrize("began", range(0, 100, 7))
def test_a_pin_lasts_as_long_as_was_promised_and_not_much_longer(began: int) -> None:
    time = Time()
    pins = Pins(time, pin_s=100)
    time.now = began * SECOND
    assert pins.add(b"a")
    time.now += 100 * SECOND - 1
    assert b"a" in pins
    assert pins.ended() == set()
    time.now += 25 * SECOND + 1
    assert b"a" not in pins
    assert pins.ended() == {b"a"}
    assert pins.ended() == set()


def test_a_pin_that_is_renewed_lasts_from_then_on() -> None:
    time = Time()
    pins = Pins(time, pin_s=100)
    pins.add(b"a")
    time.now = 90 * SECOND
    pins.add(b"a")
    time.now = 189 * SECOND
    assert b"a" in pins
    time.now = 1000 * SECOND
    assert b"a" not in pins
    assert len(pins) == 0


def test_there_are_no_more_pins_than_may_be() -> None:
    time = Time()
    pins = Pins(time, pin_s=100, most=2)
    assert pins.add(b"a")
    assert pins.add(b"b")
    assert pins.add(b"b"), "it is there already"
    assert not pins.add(b"c")
    time.now = 1000 * SECOND
    assert pins.add(b"c")


# --- one sync for all ---


def test_a_sync_covers_those_who_came_before_it_began_and_the_next_one_all_others() -> None:
    async def main() -> None:
        written: list[int] = []
        durable: list[int] = []
        gate, started = threading.Semaphore(0), threading.Semaphore(0)

        def sync() -> None:
            covered = list(written)
            started.release()
            gate.acquire()
            durable[:] = covered

        group = GroupSync(sync, lambda: True)

        async def writer(number: int) -> None:
            written.append(number)
            await group()
            assert number in durable

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer, 0)
            await trio.to_thread.run_sync(started.acquire)
            for number in range(1, 50):
                nursery.start_soon(writer, number)
            await trio.testing.wait_all_tasks_blocked()
            gate.release()
            gate.release()
        assert group.syncs == 2

    trio.run(main)


def test_nothing_is_synced_when_nothing_was_written() -> None:
    async def main() -> None:
        group = GroupSync(lambda: pytest.fail("there is nothing to do"), lambda: False)
        await group()

    trio.run(main)


def test_a_sync_that_fails_fails_for_everybody() -> None:
    async def main() -> None:
        def sync() -> None:
            raise errors.SyncFailed("disk")

        group = GroupSync(sync, lambda: True)

        async def waiter() -> None:
            with pytest.raises(errors.SyncFailed):
                await group()

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(waiter)

    trio.run(main)


# --- the wire ---

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.binary(max_size=40) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple),
    max_leaves=8,
)
READERS: list[Callable[[Any], object]] = [
    wire.digests_of,
    wire.chunks_of,
    lambda body: wire.verdicts_of(body, 2),
    lambda body: wire.flags_of(body, 2),
    lambda body: wire.found_of(body, 2),
    wire.lack_of,
]


@given(st.sampled_from(READERS), ANYTHING)
def test_bodies_of_any_form_are_taken_or_refused(reader: Callable[[Any], object], body: Any) -> None:
    with contextlib.suppress(errors.ProtocolError):
        reader(body)


@pytest.mark.parametrize(
    ("reader", "body"),
    [
        (wire.digests_of, [bytes(32)] * (BLOB_ASK_MAX + 1)),
        (wire.digests_of, [bytes(31)]),
        (wire.digests_of, {b"x": 1}),
        (wire.chunks_of, [[bytes(32), b""]]),
        (wire.chunks_of, [[bytes(32), bytes(CHUNK_BYTES_MAX + 1)]]),
        (wire.chunks_of, [[bytes(33), b"x"]]),
        (wire.chunks_of, [[bytes(32), b"x", b"y"]]),
        (READERS[2], [0]),
        (READERS[2], [0, 9]),
        (READERS[3], b"\0"),
        (READERS[4], []),
        (READERS[4], [None] * 3),
        (READERS[4], [b""]),
        (wire.lack_of, [-1, True]),
        (wire.lack_of, [True, True]),
        (wire.lack_of, [3]),
    ],
)
def test_what_is_out_of_bounds_is_refused(reader: Callable[[Any], object], body: Any) -> None:
    with pytest.raises(errors.ProtocolError):
        reader(body)


# --- names ---


def extent(number: int, digest: bytes) -> tuple[Any, ...]:
    return put(layout.extent_key(number, 0), layout.BLOB_EXTENT.pack(layout.EXTENT_BLOB, 5, 0, digest))


def test_a_compare_guards_what_is_named_if_it_holds_and_nothing_else() -> None:
    one, two, three = bytes(32), b"2" * 32, b"3" * 32
    guard = compare_field(layout.BLOB_PREFIX + one, 0, GREATER, 0)
    then = [extent(1, one), extent(2, two), put(b"k/x", b"y")]
    assert references.unguarded(Command(TXN, 0, None, ([], then, []))) == [one, two]
    assert references.unguarded(Command(TXN, 0, None, ([guard, absent(b"x")], then, []))) == [two]
    assert references.unguarded(Command(TXN, 0, None, ([guard], [], [extent(1, one), extent(2, three)]))) == [
        one,
        three,
    ], "what runs when the compare does not hold is not guarded by it"
    weak = compare_field(layout.BLOB_PREFIX + one, 8, GREATER, 0)
    assert references.unguarded(Command(TXN, 0, None, ([weak], then, []))) == [one, two]


def test_what_is_named_already_is_guarded() -> None:
    async def test(setup: Setup) -> None:
        _, handle = await setup.tree.create(1, b"f", 0o644, 2, CALLER)
        await handle.write(0, bytes(20_000))
        digest = next(iter(setup.blobs.chunks))
        guards = references.guards(
            setup.store, [extent(9, digest), extent(10, digest), extent(11, b"x" * 32)]
        )
        assert guards == [compare_field(layout.BLOB_PREFIX + digest, 0, GREATER, 0)]
        await handle.release()

    run_on_volume(test)
