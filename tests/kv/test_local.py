"""LocalStore passes the conformance suite, and what only it promises."""

import pytest
import trio
import trio.testing

from aspenfs import errors
from aspenfs.kv import commands
from aspenfs.kv.local import LocalStore
from aspenfs.kv.store import Store
from aspenfs.kv.types import put
from tests.kv.conformance import Conformance, FakeClock, FakeEntropy, Subject


class TestLocalStore(Conformance):
    async def open(self, nursery: trio.Nursery, clock: FakeClock) -> Subject:
        store = LocalStore(clock, FakeEntropy(), trio.Event)
        port: Store = store

        async def close() -> None:
            store.close()

        return Subject(port, clock, store.expire_leases, close)


def test_txn_does_not_suspend() -> None:
    async def main() -> None:
        store = LocalStore(FakeClock(), FakeEntropy(), trio.Event)
        with pytest.raises(StopIteration) as ended:
            store.txn([], [put(b"k/a", b"")]).send(None)
        assert ended.value.value.succeeded

    trio.run(main)


def test_the_journal_has_each_entry_that_changed_something() -> None:
    journal: list[tuple[int, bytes]] = []

    async def main() -> None:
        store = LocalStore(
            FakeClock(), FakeEntropy(), trio.Event, lambda index, data: journal.append((index, data))
        )
        await store.txn([], [put(b"k/a", b"")])
        await store.lease_grant(1_000)
        with pytest.raises(errors.LeaseNotFound):
            await store.lease_revoke(999)

    trio.run(main)
    assert [index for index, _ in journal] == [1, 2]
    assert [commands.decode(data).kind for _, data in journal] == [commands.TXN, commands.LEASE_GRANT]


def test_closing_ends_watches_and_waits() -> None:
    async def main() -> None:
        store = LocalStore(FakeClock(), FakeEntropy(), trio.Event)
        batches = store.watch(b"k/", b"k0")
        await store.txn([], [put(b"k/a", b"")])

        async def wait() -> None:
            with pytest.raises(errors.Closed):
                await store.committed(99)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            store.close()
        await anext(batches)
        with pytest.raises(errors.Closed):
            await anext(batches)
        with pytest.raises(errors.Closed):
            store.watch(b"k/", b"k0")

    trio.run(main)
