"""Cases of the conformance suite: watches, live and resumed, and the observers of this node."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import pytest
import trio
import trio.testing

from aspenfs import errors
from aspenfs.kv.types import Batch, Event, absent, delete, delete_range, put
from aspenfs.limits import WATCH_BUFFER_BATCHES
from tests.kv.subject import Subject, Suite, case, nothing_more, take

Seen = list[tuple[int, list[tuple[bytes, bytes | None, bytes | None]]]]


def _plain(batches: Sequence[Batch]) -> Seen:
    return [
        (
            batch.revision,
            [
                (key, record.value if record else None, previous.value if previous else None)
                for key, record, previous in batch.events
            ],
        )
        for batch in batches
    ]


async def _read_all(batches: AsyncIterator[Batch], revisions: list[int]) -> None:
    async for batch in batches:
        revisions += [batch.revision]


class WatchCases(Suite):
    @case
    async def test_a_live_watch_gets_one_batch_per_revision_with_previous_records(
        self, subject: Subject
    ) -> None:
        store = subject.store
        await store.txn([], [put(b"k/a", b"0")])
        await store.committed()
        batches = store.watch(b"k/", b"k0")
        first = await store.txn([], [put(b"k/b", b"1"), put(b"k/a", b"1"), put(b"f/x", b"1")])
        await store.txn([], [put(b"f/x", b"2")])
        await store.txn([absent(b"k/a")], [put(b"k/never", b"")])
        second = await store.txn([], [delete(b"k/a"), delete(b"k/none"), put(b"k/t", b""), delete(b"k/t")])
        third = await store.txn([], [put(b"k/z", b"1"), put(b"k/y", b"1"), put(b"k/z", b"2")])
        assert _plain(await take(batches, 3)) == [
            (first.revision, [(b"k/b", b"1", None), (b"k/a", b"1", b"0")]),
            (second.revision, [(b"k/a", None, b"1")]),
            (third.revision, [(b"k/z", b"2", None), (b"k/y", b"1", None)]),
        ]
        await nothing_more(batches)

    @case
    async def test_a_watch_has_its_range_only(self, subject: Subject) -> None:
        store = subject.store
        await store.committed()
        batches = store.watch(b"k/b", b"k/c")
        everything = store.watch(b"k/", b"")
        result = await store.txn([], [put(key, b"") for key in (b"k/a", b"k/b", b"k/bb", b"k/c")])
        assert _plain(await take(batches, 1)) == [
            (result.revision, [(b"k/b", b"", None), (b"k/bb", b"", None)])
        ]
        assert len((await anext(everything)).events) == 4

    @case
    async def test_a_watch_resumes_from_any_revision_without_gap_or_repetition(
        self, subject: Subject
    ) -> None:
        store = subject.store
        start = store.revision + 1
        for step in range(6):
            await store.txn([], [put(b"k/a", b"%d" % step), put(b"k/%d" % step, b"x"), put(b"f/a", b"")])
            await store.txn([], [put(b"f/a", b"")])
            if step % 2:
                await store.txn([], [delete(b"k/a"), delete_range(b"k/0", b"k/9")])
        await store.committed()
        whole = _plain(await take(store.watch(b"k/", b"k0", from_revision=start), 9))
        assert [event for _, events in whole for event in events if event[0] == b"k/a"][:4] == [
            (b"k/a", b"0", None),
            (b"k/a", b"1", b"0"),
            (b"k/a", None, b"1"),
            (b"k/a", b"2", None),
        ]
        for revision in range(start, store.revision + 1):
            expected = [batch for batch in whole if batch[0] >= revision]
            batches = store.watch(b"k/", b"k0", from_revision=revision)
            assert _plain(await take(batches, len(expected))) == expected
            if revision % 5 == 0:
                await nothing_more(batches)
        batches = store.watch(b"k/", b"k0", from_revision=start)
        assert _plain([await anext(batches)]) == whole[:1]
        live = await store.txn([], [put(b"k/live", b"")])
        rest = _plain(await take(batches, 9))
        assert rest == [*whole[1:], (live.revision, [(b"k/live", b"", None)])]

    @case
    async def test_revision_zero_is_before_the_first_entry(self, subject: Subject) -> None:
        first = await subject.store.txn([], [put(b"k/a", b"1")])
        await subject.store.committed()
        batches = subject.store.watch(b"k/", b"k0", from_revision=0)
        assert _plain(await take(batches, 1)) == [(first.revision, [(b"k/a", b"1", None)])]

    @case
    async def test_a_watch_from_a_revision_to_come_shows_nothing_older(self, subject: Subject) -> None:
        store = subject.store
        await store.txn([], [put(b"k/old", b"")])
        await store.committed()
        batches = store.watch(b"k/", b"k0", from_revision=store.revision + 3)
        revisions = [(await store.txn([], [put(b"k/a", b"%d" % step)])).revision for step in range(4)]
        assert [batch.revision for batch in await take(batches, 2)] == revisions[2:]

    @case
    async def test_a_watch_from_the_compaction_revision_has_its_deletions(self, subject: Subject) -> None:
        store = subject.store
        await store.txn([], [put(b"k/a", b"1"), put(b"k/b", b"1")])
        mark = await store.txn([], [delete(b"k/a"), put(b"k/b", b"2")])
        await store.txn([], [put(b"k/a", b"3")])
        await store.compact(mark.revision)
        await store.committed()
        batches = store.watch(b"k/", b"k0", from_revision=mark.revision)
        assert _plain(await take(batches, 1)) == [
            (mark.revision, [(b"k/a", None, b"1"), (b"k/b", b"2", b"1")])
        ]
        for revision in (0, mark.revision - 1):
            with pytest.raises(errors.Compacted) as caught:
                await anext(store.watch(b"k/", b"k0", from_revision=revision))
            assert caught.value.oldest == mark.revision

    @case
    async def test_compaction_under_a_replaying_reader_is_told_to_it(self, subject: Subject) -> None:
        store = subject.store
        start = store.revision + 1
        for step in range(5):
            await store.txn([], [put(b"k/a", b"%d" % step)])
        await store.committed()
        batches = store.watch(b"k/", b"k0", from_revision=start)
        await anext(batches)
        await store.compact(store.revision)
        with pytest.raises(errors.Compacted):
            await take(batches, 4)

    @case
    async def test_a_watch_elsewhere_resumes_from_recent_batches_or_says_so(self, subject: Subject) -> None:
        store = subject.store
        first = await store.txn([], [put(b"f/a", b"1"), put(b"k/a", b"1")])
        second = await store.txn([], [put(b"f/a", b"2")])
        await store.committed()
        batches = store.watch(b"f/", b"f0", from_revision=first.revision)
        assert _plain(await take(batches, 2)) == [
            (first.revision, [(b"f/a", b"1", None)]),
            (second.revision, [(b"f/a", b"2", b"1")]),
        ]
        for step in range(WATCH_BUFFER_BATCHES):
            await store.txn([], [put(b"f/b", b"%d" % step)])
        await store.committed()
        with pytest.raises(errors.Compacted) as caught:
            await anext(store.watch(b"f/", b"f0", from_revision=first.revision))
        assert first.revision < caught.value.oldest <= store.revision
        resumed = store.watch(b"f/", b"f0", from_revision=caught.value.oldest)
        assert (await anext(resumed)).revision >= caught.value.oldest

    @case
    async def test_a_slow_reader_gets_what_is_buffered_then_lagged_and_can_go_on(
        self, subject: Subject
    ) -> None:
        store = subject.store
        await store.committed()
        batches = store.watch(b"k/", b"k0")
        revisions = [
            (await store.txn([], [put(b"k/a", b"%d" % step)])).revision
            for step in range(WATCH_BUFFER_BATCHES + 50)
        ]
        await store.committed()
        got: list[int] = []
        with pytest.raises(errors.Lagged) as caught:
            await _read_all(batches, got)
        assert got == revisions[: len(got)]
        assert caught.value.revision == revisions[len(got)], "no gap and no repetition when resumed there"
        rest = await take(
            store.watch(b"k/", b"k0", from_revision=caught.value.revision), len(revisions) - len(got)
        )
        assert [batch.revision for batch in rest] == revisions[len(got) :]

    @case
    async def test_a_waiting_reader_is_woken_and_a_cancelled_one_loses_nothing(
        self, subject: Subject
    ) -> None:
        store = subject.store
        await store.committed()
        batches = store.watch(b"k/", b"k0")
        await nothing_more(batches)
        got: list[Batch] = []

        async def read() -> None:
            got.append(await anext(batches))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            result = await store.txn([], [put(b"k/a", b"")])
        assert [batch.revision for batch in got] == [result.revision]

    @case
    async def test_closing_a_watch_ends_it_for_a_waiting_reader(self, subject: Subject) -> None:
        batches = subject.store.watch(b"k/", b"k0")
        got: list[Batch] = []

        async def read() -> None:
            got.extend([batch async for batch in batches])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            await batches.aclose()  # type: ignore[attr-defined]
        assert got == []

    @case
    async def test_a_closed_watch_ends(self, subject: Subject) -> None:
        async with aclosing(subject.store.watch(b"k/", b"k0")) as batches:  # type: ignore[type-var]
            pass
        await subject.store.txn([], [put(b"k/a", b"")])
        await subject.store.committed()
        assert [batch async for batch in batches] == []

    @case
    async def test_observers_hear_of_every_change_at_once_in_order_with_its_origin(
        self, subject: Subject
    ) -> None:
        store = subject.store
        heard: list[tuple[int, list[Event], object]] = []
        origin = object()
        end = store.observe(lambda revision, events, by: heard.append((revision, list(events), by)))
        first = await store.txn([], [put(b"f/a", b"1"), put(b"k/a", b"1")], origin=origin)
        assert [(revision, by) for revision, _, by in heard] == [(first.revision, origin)], (
            "before txn returns"
        )
        assert heard[0][1] == [Event(b"f/a", store.get(b"f/a"), None), Event(b"k/a", store.get(b"k/a"), None)]
        old = store.get(b"k/a")
        second = await store.txn([], [delete(b"k/a")])
        await store.txn([absent(b"f/a")], [put(b"k/x", b"")])
        assert heard[1:] == [(second.revision, [Event(b"k/a", None, old)], None)]
        end()
        await store.txn([], [put(b"k/a", b"")])
        assert len(heard) == 2

    @case
    async def test_an_observer_of_some_keyspaces_hears_of_what_has_a_key_in_them(
        self, subject: Subject
    ) -> None:
        store = subject.store
        heard: list[tuple[str, list[bytes]]] = []

        def listen(name: str, *keyspaces: bytes) -> Callable[[], None]:
            def observer(revision: int, events: Sequence[Event], origin: object) -> None:
                heard.append((name, [event.key for event in events]))

            return store.observe(observer, keyspaces)

        ends = [listen("files", b"f/"), listen("all"), listen("both", b"f/", b"k/")]
        await store.txn([], [put(b"k/a", b"")])
        assert heard == [("all", [b"k/a"]), ("both", [b"k/a"])]
        heard.clear()
        await store.txn([], [put(b"k/b", b""), put(b"f/b", b"")])
        assert heard == [(name, [b"k/b", b"f/b"]) for name in ("files", "all", "both")]
        heard.clear()
        ends.append(listen("late", b"k/"))
        await store.txn([], [put(b"k/a", b"")])
        assert heard == [(name, [b"k/a"]) for name in ("all", "both", "late")]
        heard.clear()
        ends[1]()
        await store.txn([], [put(b"k/a", b"")])
        await store.txn([], [put(b"c/a", b"")])
        assert heard == [("both", [b"k/a"]), ("late", [b"k/a"])]
        for end in ends:
            end()
        await store.txn([], [put(b"k/a", b""), put(b"f/a", b"")])
        assert len(heard) == 2

    @case
    async def test_each_observer_registration_ends_on_its_own(self, subject: Subject) -> None:
        heard: list[int] = []

        def observer(revision: int, events: Sequence[Event], origin: object) -> None:
            heard.append(revision)

        ends = [subject.store.observe(observer), subject.store.observe(observer)]
        await subject.store.txn([], [put(b"k/a", b"")])
        assert len(heard) == 2
        ends[0]()
        ends[0]()
        await subject.store.txn([], [put(b"k/a", b"")])
        assert len(heard) == 3
