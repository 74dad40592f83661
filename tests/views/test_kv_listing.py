"""Listing kv/: in order, by seeks, linear."""

from collections.abc import Iterator

import trio

from aspenfs.kv.local import LocalStore
from aspenfs.kv.types import Record, put
from aspenfs.views.kv import KVTree
from aspenfs.views.kv_walk import SKIP_STEPS, components
from tests.views.subject import CountingEntropy, KVSetup, Mounted, StepClock, run


class Counting(LocalStore):
    """Counts what a listing reads."""

    def __init__(self) -> None:
        super().__init__(StepClock(), CountingEntropy(), trio.Event)
        self.read = 0

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, Record]]:
        for item in super().scan(start, end):
            self.read += 1
            yield item


async def fill(store: LocalStore, keys: list[bytes]) -> None:
    for start in range(0, len(keys), 100):
        await store.txn([], [put(b"k/" + key, b"") for key in keys[start:start + 100]])


def test_order_is_that_of_components_not_of_keys() -> None:
    async def test(kv: KVSetup) -> None:
        await fill(kv.store, [b"a/x", b"a-b", b"a", b"a.c/y", b"a0", b"B", b"/z", b"!", b"\xff"])
        assert await kv.mounted.names() == [b"%empty", b"!", b"B", b"a", b"a-b", b"a.c", b"a0", b"\xff"]
        found = [(raw, below) for raw, _, below in components(kv.store, b"k/", None)]
        assert found == [(b"", True), (b"!", False), (b"B", False), (b"a", True), (b"a-b", False),
                         (b"a.c", True), (b"a0", False), (b"\xff", False)]

    run(test)


def test_components_behind_any_component_are_the_rest() -> None:
    async def test(kv: KVSetup) -> None:
        await fill(kv.store, [b"a/x", b"a/y", b"a-b", b"a-b/c", b"a.c/y", b"a0", b"/z", b"/", b"b/c", b"b!"])
        everything = [raw for raw, _, _ in components(kv.store, b"k/", None)]
        for after in [*everything, b"a-", b"a.", b"a/", b"zzz", b"a\0"]:
            rest = [raw for raw, _, _ in components(kv.store, b"k/", after)]
            assert rest == [raw for raw in everything if raw > after], after

    run(test)


def test_listing_skips_what_is_below_its_directories() -> None:
    async def main() -> None:
        store = Counting()
        await fill(store, [b"d%02d/sub/%03d" % (directory, number)
                           for directory in range(50) for number in range(200)])
        at = Mounted(KVTree(store, StepClock()))
        store.read = 0
        assert len(await at.names(limit=1000)) == 50
        assert store.read < 2 * 50 * (SKIP_STEPS + 3)

    trio.run(main)


def test_listing_of_many_entries_reads_each_a_few_times_only() -> None:
    async def main() -> None:
        store = Counting()
        keys = [b"file.%05d.txt" % number for number in range(20_000)]
        await fill(store, keys)
        at = Mounted(KVTree(store, StepClock()))
        store.read = 0
        assert await at.names(limit=512) == keys
        assert store.read < 1.2 * len(keys)

    trio.run(main)


def test_listing_reads_no_more_ahead_than_the_kernel_takes() -> None:
    """A reader that takes few entries at a time, as readdir with a small buffer does."""

    async def main() -> None:
        store = Counting()
        await fill(store, [b"%05d" % number for number in range(2_000)])
        tree = KVTree(store, StepClock())
        listing = await tree.opendir(tree.root)
        store.read = cookie = count = 0
        while batch := await listing.after(cookie, 512):
            taken = batch[:20]
            count += len(taken)
            cookie = taken[-1][2]
        assert count == 2_000
        assert store.read < 4 * count

    trio.run(main)
