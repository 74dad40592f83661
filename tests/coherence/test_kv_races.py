"""kv/ from several hosts at once, and looked at between the apply of a change and the return of its call."""

import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import pytest

from aspenfs import errors
from aspenfs.kv.types import Event
from aspenfs.views.kv import KVTree
from tests.coherence.hosts import Hosts, HostStore, run, together, until
from tests.filesystem.volumes import CALLER
from tests.views.subject import Mounted, whole

SEEDS = range(10)


class Place:
    """kv/ on one host, by paths. `meanwhile` runs once when a change of this host's own is applied."""

    def __init__(self, hosts: Hosts, node_id: int) -> None:
        self.store: HostStore = hosts.store(node_id)
        self.tree = KVTree(self.store, hosts.clock)
        self.mounted = Mounted(self.tree)
        self.displaced: list[int] = []
        self.tree.displaced = self.displaced.append  # type: ignore[assignment]
        self.meanwhile: Callable[[], object] | None = None
        self.store.observe(self._observe)

    def _observe(self, revision: int, events: Sequence[Event], origin: object) -> None:
        own = origin is self.tree.origin
        for event in events:
            self.tree.noticed(event, own)
            if not own:
                list(self.tree.touched(event))
        if own and self.meanwhile is not None:
            look, self.meanwhile = self.meanwhile, None
            look()

    async def keys(self) -> dict[bytes, bytes]:
        await self.store.barrier()
        return {key[2:]: record.value for key, record in self.store.range(b"k/", b"k0")}


def now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of what does not suspend."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it suspends")


def with_places(test: Callable[[Hosts, Place, Place, Place], Awaitable[None]], seed: int = 0) -> None:
    async def main(hosts: Hosts) -> None:
        await test(hosts, *(Place(hosts, node_id) for node_id in (1, 2, 3)))

    run(main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_exclusive_create_succeeds_on_one_host_only(seed: int) -> None:
    async def test(hosts: Hosts, *places: Place) -> None:
        results = await together(
            *(lambda p=place: p.mounted.create(b"d/f", b"%d" % id(p)) for place in places)
        )
        errors_of = [type(result) for result in results if isinstance(result, errors.AspenError)]
        assert errors_of == [errors.NotFound] * 3  # there is no d yet
        await places[0].mounted.mkdir(b"d")
        for place in places:
            await place.store.barrier()
        results = await together(*(lambda p=place: p.mounted.create(b"d/f") for place in places))
        assert sorted(type(result) is errors.AlreadyExists for result in results) == [False, True, True]

    with_places(test, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_appends_from_several_hosts_overwrite_nothing(seed: int) -> None:
    async def test(hosts: Hosts, *places: Place) -> None:
        await places[0].mounted.create(b"log")
        for place in places:
            await place.store.barrier()

        async def append(place: Place, number: int) -> None:
            file = await place.mounted.open(b"log", os.O_WRONLY | os.O_APPEND)
            for line in range(10):
                await file.write(
                    len(await whole(await place.mounted.open(b"log"))), b"%d.%d\n" % (number, line)
                )

        await together(*(lambda p=p, n=n: append(p, n) for n, p in enumerate(places)))
        (value,) = (await places[0].keys()).values()
        assert sorted(value.split()) == [b"%d.%d" % (n, line) for n in range(3) for line in range(10)]
        assert any(place.displaced for place in places)

    with_places(test, seed)


def test_a_key_removed_elsewhere_before_create_returns_stays_with_who_made_it() -> None:
    async def test(hosts: Hosts, a: Place, b: Place, c: Place) -> None:
        a.store.paused = True
        made: list[Any] = []

        async def make() -> None:
            made.append(await a.tree.create(1, b"f", 0o644, os.O_RDWR | os.O_EXCL, CALLER))

        hosts.nursery.start_soon(make)
        await until(lambda: b.store.get(b"k/f") is not None)
        await b.mounted.unlink(b"f")
        a.store.leap()
        await until(lambda: bool(made))
        ((attr, file),) = made
        assert attr.nlink == 0
        assert await file.write(0, b"late") == 4
        assert await whole(file) == b"late"
        assert await a.keys() == {}
        assert not a.tree.names_it(1, b"f", attr.node)

    with_places(test)


def test_a_key_replaced_elsewhere_before_create_returns_is_another_file() -> None:
    async def test(hosts: Hosts, a: Place, b: Place, c: Place) -> None:
        a.store.paused = True
        made: list[Any] = []

        async def make() -> None:
            made.append(await a.tree.create(1, b"f", 0o644, os.O_RDWR | os.O_EXCL, CALLER))

        hosts.nursery.start_soon(make)
        await until(lambda: b.store.get(b"k/f") is not None)
        await b.mounted.unlink(b"f")
        await b.mounted.create(b"f", b"theirs")
        a.store.leap()
        await until(lambda: bool(made))
        ((attr, file),) = made
        await file.write(0, b"ours")
        assert await a.keys() == {b"f": b"theirs"}
        assert (await a.mounted.stat(b"f")).node != attr.node
        assert await a.mounted.read(b"f") == b"theirs"

    with_places(test)


def test_an_open_file_is_read_while_our_own_unlink_is_on_its_way_back() -> None:
    async def test(hosts: Hosts, a: Place, b: Place, c: Place) -> None:
        await a.mounted.create(b"f", b"data")
        file = await a.mounted.open(b"f")
        seen: list[bytes] = []
        a.meanwhile = lambda: seen.append(now(whole(file)))
        await a.mounted.unlink(b"f")
        assert seen == [b"data"]
        assert await whole(file) == b"data"

    with_places(test)


def test_a_new_key_under_the_name_that_our_unlink_took_is_not_taken_for_the_old_one() -> None:
    async def test(hosts: Hosts, a: Place, b: Place, c: Place) -> None:
        await a.mounted.create(b"f", b"old")
        file = await a.mounted.open(b"f")
        await b.store.barrier()
        new: list[Any] = []

        def look() -> None:
            """Another host makes the key anew, and somebody here looks it up, before unlink(2) returns."""
            hosts.log.append(hosts.log[-1]._replace(command=create, proposer=2))
            a.store.apply_next()
            new.append(now(a.tree.lookup(1, b"f")))

        create = a.store.engine.txn_command([], [(1, b"k/f", b"new", 0, None)])[0]
        a.meanwhile = look
        await a.mounted.unlink(b"f")
        assert await whole(file) == b"old"
        assert await whole(await a.tree.open(new[0].node, os.O_RDONLY, CALLER)) == b"new"
        assert (await a.mounted.stat(b"f")).node == new[0].node

    with_places(test)


@pytest.mark.parametrize("directory", [False, True])
def test_a_file_keeps_its_number_while_our_own_rename_is_on_its_way_back(directory: bool) -> None:
    async def test(hosts: Hosts, a: Place, b: Place, c: Place) -> None:
        if directory:
            await a.mounted.mkdir(b"d")
        attr = await a.mounted.create(b"d/f" if directory else b"f", b"data")
        file = await a.tree.open(attr.node, os.O_RDWR, CALLER)
        seen: list[Any] = []

        def look() -> None:
            seen.append(now(whole(file)))
            seen.append(now(a.tree.getattr(attr.node)).nlink)
            seen.append(now(a.mounted.stat(b"e/f" if directory else b"g")).node)

        a.meanwhile = look
        await a.mounted.rename(*((b"d", b"e") if directory else (b"f", b"g")))
        assert seen == [b"data", 1, attr.node]
        await file.write(4, b"more")
        assert await a.keys() == {b"e/f" if directory else b"g": b"datamore"}
        assert a.tree.space.moves == []

    with_places(test)


def test_a_rename_that_lost_takes_no_node_along() -> None:
    async def test(hosts: Hosts, a: Place, b: Place, c: Place) -> None:
        attr = await a.mounted.create(b"f", b"data")
        await b.store.barrier()
        results = await together(lambda: a.mounted.rename(b"f", b"g"), lambda: b.mounted.rename(b"f", b"h"))
        lost = [result for result in results if isinstance(result, errors.NotFound)]
        assert len(lost) == 1
        assert list(await a.keys()) in ([b"g"], [b"h"])
        if b"h" in await a.keys():
            assert (await a.tree.getattr(attr.node)).nlink == 0
        assert a.tree.space.moves == []

    with_places(test)
