"""Cases of the conformance suite: leases on log time, apply once, the two acknowledgement points."""

import pytest
import trio
import trio.testing

from aspenfs import errors
from aspenfs.kv.types import absent, append, delete, exists, get, merge, put, range_
from aspenfs.limits import DEDUP_RESULT_BYTES_MAX, LEASE_TTL_MS_MAX
from tests.kv.subject import Subject, Suite, case, take

CLIENT, OTHER = b"c" * 16, b"o" * 16


class LeaseCases(Suite):
    @case
    async def test_a_lease_is_granted_with_the_id_asked_for_or_a_free_one(self, subject: Subject) -> None:
        store = subject.store
        assert await store.lease_grant(5_000, 77) == 77
        picked = await store.lease_grant(6_000)
        assert picked not in (0, 77)
        assert sorted(store.leases()) == sorted([(77, 5_000, 5_000), (picked, 6_000, 6_000)])
        with pytest.raises(errors.AlreadyExists):
            await store.lease_grant(5_000, 77)
        for lease in (-1, 1 << 63, 1 << 64):
            for call in (store.lease_keepalive, store.lease_revoke):
                with pytest.raises(errors.InvalidArgument):
                    await call(lease)
            with pytest.raises(errors.InvalidArgument):
                await store.lease_grant(1_000, lease)
        for ttl_ms in (0, -1, LEASE_TTL_MS_MAX + 1):
            with pytest.raises(errors.InvalidArgument):
                await store.lease_grant(ttl_ms)

    @case
    async def test_keys_end_with_their_lease(self, subject: Subject) -> None:
        store, clock = subject.store, subject.clock
        await store.lease_grant(1_000, 1)
        await store.lease_grant(9_000, 2)
        await store.txn([], [put(b"k/a", b"", 1), put(b"f/a", b"", 1), put(b"k/b", b"", 2), put(b"k/c", b"")])
        batches = store.watch(b"k/", b"k0")
        clock.advance_ms(999)
        await subject.expire()
        assert store.get(b"k/a") is not None
        assert {lease: left for lease, _, left in store.leases()} == {1: 1, 2: 8_001}
        clock.advance_ms(1)
        await subject.expire()
        assert [key for key, _ in store.range(b"f/", b"k0")] == [b"k/b", b"k/c"]
        assert [lease for lease, _, _ in store.leases()] == [2]
        await store.committed()
        (batch,) = await take(batches, 1)
        if batch.revision != store.revision:
            (batch,) = await take(batches, 1)  # the puts, committed after the watch began
        assert [(event.key, event.record) for event in batch.events] == [(b"k/a", None)]

    @case
    async def test_keepalive_restarts_the_time(self, subject: Subject) -> None:
        store, clock = subject.store, subject.clock
        await store.lease_grant(1_000, 1)
        for _ in range(3):
            clock.advance_ms(900)
            assert await store.lease_keepalive(1) == 1_000
            await subject.expire()
        assert store.leases() == [(1, 1_000, 1_000)]
        clock.advance_ms(1_000)
        await subject.expire()
        with pytest.raises(errors.LeaseNotFound):
            await store.lease_keepalive(1)

    @case
    async def test_log_time_does_not_go_back_with_the_clock(self, subject: Subject) -> None:
        store, clock = subject.store, subject.clock
        await store.lease_grant(1_000, 1)
        clock.advance_ms(-3_600_000)
        await store.lease_grant(1_000, 2)
        assert store.leases() == [(1, 1_000, 1_000), (2, 1_000, 1_000)]
        clock.advance_ms(3_601_000)
        await subject.expire()
        assert store.leases() == []

    @case
    async def test_revoke_deletes_the_keys_in_one_revision(self, subject: Subject) -> None:
        store = subject.store
        await store.lease_grant(1_000, 1)
        await store.txn([], [put(b"k/%d" % number, b"", 1) for number in range(5)])
        await store.committed()
        batches = store.watch(b"k/", b"k0")
        await store.lease_revoke(1)
        assert store.range(b"k/", b"k0") == []
        await store.committed()
        assert len((await take(batches, 1))[0].events) == 5
        with pytest.raises(errors.LeaseNotFound):
            await store.lease_revoke(1)
        await store.lease_grant(1_000, 1)
        await store.lease_revoke(1)

    @case
    async def test_a_key_hangs_on_the_lease_of_its_last_put_only(self, subject: Subject) -> None:
        store = subject.store
        await store.lease_grant(1_000, 1)
        await store.lease_grant(1_000, 2)
        await store.txn([], [put(key, b"", 1) for key in (b"k/moved", b"k/freed", b"k/merged", b"k/again")])
        await store.txn([], [put(b"k/moved", b"", 2), put(b"k/freed", b""), merge(b"k/merged", append(b"x"))])
        await store.txn([], [delete(b"k/again")])
        await store.txn([], [put(b"k/again", b"")])
        await store.lease_revoke(1)
        assert [(key, record.lease) for key, record in store.range(b"k/", b"k0")] == [
            (b"k/again", 0),
            (b"k/freed", 0),
            (b"k/moved", 2),
        ]
        await store.lease_revoke(2)
        assert [key for key, _ in store.range(b"k/", b"k0")] == [b"k/again", b"k/freed"]

    @case
    async def test_a_put_with_an_unknown_lease_fails_whole(self, subject: Subject) -> None:
        store = subject.store
        with pytest.raises(errors.LeaseNotFound):
            await store.txn([], [put(b"k/a", b""), put(b"k/b", b"", 12345)])
        assert store.range(b"k/", b"k0") == []
        result = await store.txn([exists(b"k/a")], [put(b"k/b", b"", 12345)], [put(b"k/c", b"")])
        assert not result.succeeded


class OnceCases(Suite):
    @case
    async def test_a_retry_applies_once_and_returns_the_first_result(self, subject: Subject) -> None:
        store = subject.store
        await store.txn([], [put(b"k/b", b"first", 0, {"n": 1})])
        operations = [merge(b"k/a", append(b"x")), get(b"k/b"), range_(b"k/", b"k0"), delete(b"k/b")]
        first = await store.txn([], operations, dedup=(CLIENT, 1))
        for step in range(150):
            await store.txn([], [put(b"k/b", b"%d" % step), put(b"f/x", b"")])
            await store.txn([], [put(b"f/y", b"")], dedup=(OTHER, step + 1))
        again = await store.txn([], operations, dedup=(CLIENT, 1))
        assert (again.revision, again.succeeded) == (first.revision, first.succeeded)
        assert list(again.responses) == list(first.responses)
        assert isinstance(again.responses[2], list)
        value = store.get(b"k/a")
        assert value is not None
        assert value.value == b"x"

    @case
    async def test_a_retry_of_a_failed_compare_gets_that_answer(self, subject: Subject) -> None:
        store = subject.store
        first = await store.txn([exists(b"k/a")], [put(b"k/b", b"")], dedup=(CLIENT, 1))
        await store.txn([], [put(b"k/a", b"")])
        again = await store.txn([exists(b"k/a")], [put(b"k/b", b"")], dedup=(CLIENT, 1))
        assert (
            (again.succeeded, again.revision) == (first.succeeded, first.revision) == (False, first.revision)
        )
        assert store.get(b"k/b") is None

    @case
    async def test_sequences_go_up_and_an_older_one_is_refused(self, subject: Subject) -> None:
        store = subject.store
        for sequence in (1, 2, 5):
            await store.txn([], [merge(b"k/a", append(b"%d" % sequence))], dedup=(CLIENT, sequence))
        for sequence in (1, 4):
            with pytest.raises(errors.Stale):
                await store.txn([], [merge(b"k/a", append(b"?"))], dedup=(CLIENT, sequence))
        await store.txn([], [merge(b"k/a", append(b"o"))], dedup=(OTHER, 1))
        record = store.get(b"k/a")
        assert record is not None
        assert record.value == b"125o"

    @case
    async def test_an_error_is_not_remembered(self, subject: Subject) -> None:
        store = subject.store
        with pytest.raises(errors.LeaseNotFound):
            await store.txn([], [put(b"k/a", b"", 5)], dedup=(CLIENT, 1))
        await store.lease_grant(1_000, 5)
        assert (await store.txn([], [put(b"k/a", b"", 5)], dedup=(CLIENT, 1))).succeeded

    @case
    async def test_a_result_too_large_to_keep_is_refused_and_nothing_happens(self, subject: Subject) -> None:
        store = subject.store
        await store.txn([], [put(b"k/a", bytes(DEDUP_RESULT_BYTES_MAX))])
        with pytest.raises(errors.TxnTooLarge):
            await store.txn([], [get(b"k/a"), put(b"k/b", b"")], dedup=(CLIENT, 1))
        assert store.get(b"k/b") is None

    @case
    async def test_malformed_client_ids_are_refused(self, subject: Subject) -> None:
        for dedup in ((b"short", 1), (CLIENT, 0), (CLIENT, 1 << 63)):
            with pytest.raises(errors.InvalidArgument):
                await subject.store.txn([], [], dedup=dedup)


class CommitCases(Suite):
    @case
    async def test_accepted_work_is_visible_at_once_and_committed_when_waited_for(
        self, subject: Subject
    ) -> None:
        store = subject.store
        result = await store.txn([absent(b"k/a")], [put(b"k/a", b"1")])
        assert store.revision >= result.revision
        assert store.get(b"k/a") is not None
        assert await store.committed(result.revision) >= result.revision
        later = await store.txn([], [put(b"k/b", b"")])
        assert await store.committed() >= later.revision
        assert await store.committed(result.revision) >= later.revision, "it never goes back"
        assert await store.barrier() >= later.revision
        await store.fence(later.revision)

    @case
    async def test_waiting_for_a_revision_to_come_ends_when_it_came(self, subject: Subject) -> None:
        store = subject.store
        wanted = store.revision + 2
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.committed, wanted)
            nursery.start_soon(store.fence, wanted)
            await trio.testing.wait_all_tasks_blocked()
            for step in range(2):
                await store.txn([], [put(b"k/a", b"%d" % step)])
            await store.committed()
        assert store.revision >= wanted

    @case
    async def test_of_racing_creators_exactly_one_wins(self, subject: Subject) -> None:
        store = subject.store
        won: list[int] = []

        async def race(number: int) -> None:
            for step in range(20):
                key = b"k/%d" % step
                if (await store.txn([absent(key)], [put(key, b"%d" % number)])).succeeded:
                    won.append(number)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(race, number)
        assert len(won) == 20

    @case
    async def test_revisions_only_grow(self, subject: Subject) -> None:
        store = subject.store
        revisions = [store.revision]
        for step in range(10):
            result = await store.txn([], [put(b"k/a", b"%d" % step)])
            assert result.revision > revisions[-1]
            assert store.revision == result.revision
            revisions.append(result.revision)
            await store.txn([absent(b"k/a")], [put(b"k/b", b"")])
            assert store.revision >= revisions[-1]
            revisions[-1] = store.revision
