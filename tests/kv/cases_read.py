"""Cases of the conformance suite: ranges, old revisions, compaction."""

import pytest

from aspenfs import errors
from aspenfs.kv.types import Record, delete, merge, put
from aspenfs.kv.types import append as appended
from tests.kv.subject import Subject, Suite, case


def _pairs(rows: list[tuple[bytes, Record]]) -> list[tuple[bytes, bytes]]:
    return [(key, record.value) for key, record in rows]


class ReadCases(Suite):
    @case
    async def test_range_orders_limits_reverses_and_omits_values(self, subject: Subject) -> None:
        store = subject.store
        keys = [b"k/" + bytes([letter]) + tail for letter in b"abc" for tail in (b"", b"\x00", b"\xff")]
        await store.txn([], [put(key, key[2:]) for key in reversed(keys)])
        assert [key for key, _ in store.range(b"k/", b"k0")] == keys
        assert [key for key, _ in store.range(b"k/", b"k0", reverse=True)] == keys[::-1]
        assert [key for key, _ in store.range(b"k/a\x00", b"k/c")] == keys[1:6]
        assert [key for key, _ in store.range(b"k/", b"k0", limit=2)] == keys[:2]
        assert [key for key, _ in store.range(b"k/", b"k0", limit=2, reverse=True)] == keys[:-3:-1]
        assert store.range(b"k/c", b"k/b") == []
        assert [key for key, _ in store.scan(b"k/b", b"")][:3] == keys[3:6]
        only = store.range(b"k/", b"k0", keys_only=True)
        assert [key for key, _ in only] == keys
        assert all(record.value == b"" and record.version == 1 for _, record in only)

    @case
    async def test_a_scan_shows_what_is_there_throughout_exactly_once(self, subject: Subject) -> None:
        store = subject.store
        keys = [b"f/%05d" % number for number in range(300)]
        for begin in range(0, 300, 100):
            await store.txn([], [put(key, b"x") for key in keys[begin : begin + 100]])
        seen = []
        for place, (key, _) in enumerate(store.scan(b"f/", b"f0")):
            seen.append(key)
            if place % 10 == 0:
                await store.txn(
                    [], [put(b"f/%05d+" % (place * 7 % 300), b"new"), put(keys[place % 300], b"changed")]
                )
                await store.committed()
        assert [key for key in seen if not key.endswith(b"+")] == keys

    @case
    async def test_old_revisions_read_as_they_were(self, subject: Subject) -> None:
        store = subject.store
        snapshots = [(store.revision, _pairs(store.range(b"k/", b"k0")))]
        for operations in (
            [put(b"k/a", b"1"), put(b"k/c", b"1")],
            [put(b"k/a", b"2"), put(b"f/x", b"")],
            [delete(b"k/a"), put(b"k/b", b"1")],
            [put(b"f/x", b"2")],
            [put(b"k/a", b"3"), put(b"k/a\x00", b"zero"), put(b"c/a", b"")],
            [merge(b"k/a", appended(b"!")), delete(b"k/c"), delete(b"k/b")],
        ):
            result = await store.txn([], operations)
            snapshots.append((result.revision, _pairs(store.range(b"k/", b"k0"))))
        for revision, expected in snapshots:
            assert _pairs(store.range(b"k/", b"k0", revision=revision)) == expected
            assert _pairs(store.range(b"k/", b"k0", revision=revision, reverse=True)) == expected[::-1]
            assert _pairs(store.range(b"k/", b"k0", revision=revision, limit=1)) == expected[:1]
            assert _pairs(store.range(b"k/a\x00", b"k/c", revision=revision)) == [
                pair for pair in expected if b"k/a\x00" <= pair[0] < b"k/c"
            ]
            for key in (b"k/a", b"k/a\x00", b"k/b", b"k/c", b"k/d"):
                record = store.get(key, revision=revision)
                assert (record.value if record else None) == dict(expected).get(key)

    @case
    async def test_revisions_to_come_and_keyspaces_without_history_are_refused(
        self, subject: Subject
    ) -> None:
        store = subject.store
        first = await store.txn([], [put(b"k/a", b"1"), put(b"f/a", b"1")])
        await store.txn([], [put(b"k/b", b"1")])
        with pytest.raises(errors.FutureRevision):
            store.get(b"k/a", revision=store.revision + 1)
        with pytest.raises(errors.FutureRevision):
            store.range(b"k/", b"k0", revision=store.revision + 1)
        with pytest.raises(errors.Compacted):
            store.get(b"f/a", revision=first.revision)
        with pytest.raises(errors.Compacted):
            store.range(b"f/", b"f0", revision=first.revision)
        with pytest.raises(errors.Compacted):
            store.range(b"", b"", revision=first.revision)
        with pytest.raises(errors.InvalidArgument):
            store.get(b"k/a", revision=-1)
        found = store.get(b"f/a", revision=store.revision)
        assert found is not None, "the newest revision is no old one"

    @case
    async def test_compaction_keeps_what_its_revision_shows(self, subject: Subject) -> None:
        store = subject.store
        first = await store.txn([], [put(b"k/a", b"1"), put(b"k/b", b"1"), put(b"k/gone", b"1")])
        await store.txn([], [put(b"k/a", b"2"), delete(b"k/gone")])
        third = await store.txn([], [delete(b"k/b")])
        await store.txn([], [put(b"k/a", b"4"), put(b"k/b", b"4"), put(b"k/gone", b"4")])
        expected = {
            at: _pairs(store.range(b"k/", b"k0", revision=at))
            for at in range(third.revision, store.revision + 1)
        }
        await store.compact(third.revision)
        for at, pairs in expected.items():
            assert _pairs(store.range(b"k/", b"k0", revision=at)) == pairs
        for below in (first.revision, third.revision - 1):
            with pytest.raises(errors.Compacted) as caught:
                store.range(b"k/", b"k0", revision=below)
            assert caught.value.oldest == third.revision
            with pytest.raises(errors.Compacted):
                store.get(b"k/a", revision=below)
        assert _pairs(store.range(b"k/", b"k0")) == [(b"k/a", b"4"), (b"k/b", b"4"), (b"k/gone", b"4")]

    @case
    async def test_compaction_never_goes_back_nor_ahead(self, subject: Subject) -> None:
        store = subject.store
        for number in range(5):
            await store.txn([], [put(b"k/a", b"%d" % number)])
        mark = store.revision - 1
        await store.compact(mark)
        await store.compact(mark)
        with pytest.raises(errors.Compacted):
            await store.compact(mark - 1)
        with pytest.raises(errors.FutureRevision):
            await store.compact(store.revision + 10)
        assert store.get(b"k/a", revision=mark) is not None

    @case
    async def test_compaction_of_many_revisions_at_once(self, subject: Subject) -> None:
        store = subject.store
        for number in range(2_500):
            await store.txn([], [put(b"k/%d" % (number % 7), b"%d" % number)])
        before = store.range(b"k/", b"k0")
        await store.compact(store.revision)
        assert store.range(b"k/", b"k0") == before
        with pytest.raises(errors.Compacted):
            store.get(b"k/0", revision=100)
