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
        names, _ = kv.tree.list_names(kv.tree.root, None, 100)
        assert names == [b"%empty", b"!", b"B", b"a", b"a-b", b"a.c", b"a0", b"\xff"]
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
        tree = KVTree(store, StepClock())
        store.read = 0
        assert len(tree.list_names(tree.root, None, 1000)[0]) == 50
        assert store.read < 2 * 50 * (SKIP_STEPS + 3)

    trio.run(main)


def test_listing_of_many_entries_reads_each_a_few_times_only() -> None:
    async def main() -> None:
        store = Counting()
        keys = [b"file.%05d.txt" % number for number in range(20_000)]
        await fill(store, keys)
        at = Mounted(KVTree(store, StepClock()))
        store.read = 0
        names: list[bytes] = []
        position = 0
        while batch := await at.after(at.tree.root, position, 512):
            names += [name for name, _ in batch]
            position = batch[-1][1]
        assert sorted(names) == keys
        assert store.read < 1.2 * len(keys)

    trio.run(main)


def test_names_go_on_behind_any_of_them() -> None:
    async def test(kv: KVSetup) -> None:
        long = b"x" * 300  # a name of two pieces
        await fill(kv.store, [b"a/x", b"a-b", b"a", b"a.c/y", b"/z", b"\xff", long, long[:255], b"/", b"a/"])
        for node in (kv.tree.root, (await kv.tree.lookup(kv.tree.root, b"a")).node):
            everything, end = kv.tree.list_names(node, None, 100)
            assert end is None
            for step in (1, 2, 3):
                names: list[bytes] = []
                behind = None
                while not names or behind is not None:
                    some, behind = kv.tree.list_names(node, behind, step)
                    assert len(some) <= step
                    names += some
                assert names == everything

    run(test)


def test_the_version_of_listings_differs_after_each_change_of_names() -> None:
    async def test(kv: KVSetup) -> None:
        at, root = kv.mounted, kv.tree.root
        seen = {kv.tree.listing_version(root)}

        async def changed() -> None:
            version = kv.tree.listing_version(root)
            assert version not in seen
            seen.add(version)

        await at.create(b"a", b"x")
        await changed()
        await kv.store.txn([], [put(b"k/b/c", b"")])  # as the command line does
        await changed()
        await at.rename(b"a", b"d")
        await changed()
        await at.mkdir(b"e")
        await changed()
        await at.unlink(b"d")
        await changed()
        await kv.store.txn([], [put(b"s/elsewhere", b"")])
        assert kv.tree.listing_version(root) in seen
        kv.tree.replaced()
        await changed()

    run(test)
