"""New files that are open before they are committed: nobody sees less than they would of committed ones."""

import os
import stat
from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio

from aspenfs import errors
from aspenfs.kv.types import Event
from aspenfs.vfs.coherence import UNCACHED
from aspenfs.vfs.filesystem import FileSystem
from aspenfs.vfs.tree import SetAttr
from aspenfs.views.files_open import OpenInode
from tests.coherence.hosts import Host, Hosts, run, together
from tests.filesystem.volumes import CALLER
from tests.views.subject import User

CREATE = os.O_CREAT | os.O_RDWR
SEEDS = range(10)


def with_two(test: Callable[[Hosts, Host, Host], Awaitable[None]], seed: int = 0) -> None:
    """`a` leads."""

    async def main(hosts: Hosts) -> None:
        a, b = await hosts.host(1), await hosts.host(2)
        a.tree.write_behind = b.tree.write_behind = True
        a.store.leads = True
        await a.volume.new_id()  # from here on it has some
        await hosts.everywhere()
        await test(hosts, a, b)

    run(main, seed)


async def create(host: Host, name: bytes = b"f", flags: int = CREATE) -> tuple[int, OpenInode]:
    attr, file = await host.tree.create(1, name, 0o644, flags, CALLER)
    assert isinstance(file, OpenInode)
    return attr.node, file


async def close(file: OpenInode) -> None:
    try:
        await file.flush()
    finally:
        await file.release()


def test_a_new_file_is_open_at_once_and_close_waits_for_it() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        a.store.paused = b.store.paused = True
        with trio.fail_after(1):
            _, file = await create(a)
            assert await file.write(0, b"data") == 4
        with trio.move_on_after(1) as waited:
            await file.flush()
        assert waited.cancelled_caught
        a.store.go_on()
        b.store.go_on()
        await close(file)
        await b.store.barrier()
        assert await b.mounted.read(b"f") == b"data"
        assert not a.tree.births.children

    with_two(test)


def test_what_was_written_is_in_the_log_before_the_file_is_committed() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        a.store.paused = b.store.paused = True
        length = len(hosts.log)
        _, file = await create(a)
        await file.write(0, b"data")
        await trio.sleep(0.1)
        assert len(hosts.log) == length + 2  # they share a sync
        a.store.go_on()
        b.store.go_on()
        await close(file)
        assert len(hosts.log) == length + 2

    with_two(test)


def test_other_hosts_see_it_from_the_moment_that_it_is_open() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        _, file = await create(a)
        await b.store.barrier()
        assert stat.S_ISREG((await b.tree.lookup(1, b"f")).mode)
        await close(file)

    with_two(test)


@pytest.mark.parametrize(
    "look", ["lookup", "getattr", "list", "open", "read", "setattr", "link", "unlink",
             "rename from", "rename to", "setxattr", "sync", "create", "exclusive", "mkdir"]
)  # fmt: skip
def test_who_asks_for_it_here_waits_until_it_is_there(look: str) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        other = (await a.mounted.create(b"other")).node
        tree = a.tree
        a.store.paused = True
        node, file = await create(a)
        assert tree.births.children

        async def go_on() -> None:
            await trio.sleep(1)
            assert file.node in tree.births.children
            a.store.go_on()

        async def ask() -> None:
            if look == "lookup":
                assert (await tree.lookup(1, b"f")).node == node
            elif look == "getattr":
                assert (await tree.getattr(node)).nlink == 1
            elif look == "list":
                await tree.settled(1)
                assert tree.list_names(1, None, 9)[0] == [b"f", b"other"]
            elif look == "open":
                await (await tree.open(node, os.O_RDONLY, CALLER)).release()
            elif look == "read":
                assert await file.read(0, 10) == b""
            elif look == "setattr":
                assert (await tree.setattr(node, SetAttr(mode=0o600), CALLER)).mode == stat.S_IFREG | 0o600
            elif look == "link":
                assert (await tree.link(node, 1, b"g")).nlink == 2
            elif look == "unlink":
                await tree.unlink(1, b"f")
            elif look == "rename from":
                await tree.rename(1, b"f", 1, b"g", 0)
            elif look == "rename to":
                await tree.rename(1, b"other", 1, b"f", 0)
                assert (await tree.lookup(1, b"f")).node == other
            elif look == "setxattr":
                await tree.setxattr(node, b"user.x", b"1")
            elif look == "sync":
                await tree.sync()
                assert not tree.births.children
            elif look == "create":
                attr, again = await tree.create(1, b"f", 0o644, CREATE, CALLER)
                assert attr.node == node
                await again.release()
            elif look == "mkdir":
                with pytest.raises(errors.AlreadyExists):
                    await tree.mkdir(1, b"f", 0o755, CALLER)
            else:
                with pytest.raises(errors.AlreadyExists):
                    await tree.create(1, b"f", 0o644, CREATE | os.O_EXCL, CALLER)

        results = await together(ask, go_on)
        assert results == [None, None]
        await close(file)

    with_two(test)


def test_that_it_has_no_attributes_is_known_at_once() -> None:
    """The kernel asks at the first write."""

    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        a.store.paused = True
        node, file = await create(a)
        with trio.fail_after(1), pytest.raises(errors.NoAttribute):
            await a.tree.getxattr(node, b"security.capability")
        a.store.go_on()
        await close(file)

    with_two(test)


def test_who_asks_for_its_directory_is_told_of_it_at_once() -> None:
    """The kernel does, on the way to the next file that is made there."""

    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        other = (await a.mounted.mkdir(b"d")).node
        before = await a.tree.getattr(1)
        a.store.paused = True
        some = [await create(a, name) for name in (b"f", b"g")]
        with trio.fail_after(1):
            now = await a.tree.getattr(1)
            assert (await a.tree.getattr(other)).size == 0
        assert now.size == before.size + 2
        assert now.mtime_ns == now.ctime_ns > before.mtime_ns
        assert now.nlink == before.nlink
        a.store.go_on()
        for _, file in some:
            await close(file)
        assert await a.tree.getattr(1) == now

    with_two(test)


def test_its_directory_counts_it_once_and_the_kernel_keeps_no_count() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        mounted = FileSystem([a.tree], 0)
        counts: list[tuple[int, int]] = []

        def observe(revision: int, events: Sequence[Event], origin: object) -> None:
            counts.append((a.tree._attr(1).size, a.tree.births.inside(1)[0]))

        a.store.observe(observe)
        _, file = await create(a)
        validity, attr = await mounted.getattr(mounted.ino_of(a.tree, 1))
        assert validity is UNCACHED
        assert attr.size == 1
        await close(file)
        assert counts == [(1, 0)]
        validity, attr = await mounted.getattr(mounted.ino_of(a.tree, 1))
        assert validity is a.tree
        assert attr.size == 1

    with_two(test)


def test_a_lock_is_open_when_others_have_it_in_memory() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        a.store.paused = b.store.paused = True
        with trio.fail_after(1):
            node, file = await create(a, flags=CREATE | os.O_EXCL)
        assert node in a.tree.births.children
        assert a.store.begun[-1].known
        assert a.store.begun[-1].hurried
        a.store.depose()  # who leads next has it
        a.store.go_on()
        b.store.go_on()
        with pytest.raises(errors.AlreadyExists):
            await create(b, flags=CREATE | os.O_EXCL)
        await close(file)
        assert (await b.tree.lookup(1, b"f")).node == node

    with_two(test)


@pytest.mark.parametrize("theirs", ["the name", "the directory"])
def test_a_lock_is_not_open_before_others_have_it(theirs: str) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        a.store.paused = b.store.paused = True
        a.store.delay = lambda: 0.2

        async def make() -> int:
            return (await create(a, flags=CREATE | os.O_EXCL))[0]

        async def depose() -> int:
            await trio.sleep(0.1)
            a.store.cut = True  # it has begun, and nobody has heard of it
            await trio.sleep(0.2)
            a.store.depose()
            a.store.cut = False
            b.store.go_on()
            if theirs == "the name":
                await close((await create(b, flags=CREATE | os.O_EXCL))[1])
            else:
                await b.tree.setattr(1, SetAttr(mode=0o700), CALLER)
            a.store.go_on()
            return (await b.tree.lookup(1, b"f")).node if theirs == "the name" else 0

        mine, found = await together(make, depose)
        if theirs == "the name":
            assert isinstance(mine, errors.AlreadyExists)
            assert (await a.tree.lookup(1, b"f")).node == found
            assert not a.tree.open_counts
        else:
            assert (await a.tree.lookup(1, b"f")).node == mine
        assert not a.tree.births.children
        assert not a.tree.writes.failures

    with_two(test)


def test_a_file_that_others_made_meanwhile_is_opened_for_who_may_open_all_and_looked_up_for_others() -> None:
    """The kernel does not check: it believes that the caller has made it."""

    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        theirs = (await b.mounted.create(b"f", mode=0o600)).node
        await a.store.barrier()
        somebody, root = User(1000, 1000), User(0, 0)
        with pytest.raises(errors.Stale):
            await a.tree.create(1, b"f", 0o644, CREATE, somebody)
        with pytest.raises(errors.AlreadyExists):
            await a.tree.create(1, b"f", 0o644, CREATE | os.O_EXCL, somebody)
        attr, file = await a.tree.create(1, b"f", 0o644, CREATE, root)
        assert attr.node == theirs
        await file.release()
        assert not a.tree.open_counts

    with_two(test)


@pytest.mark.parametrize("flags", [os.O_APPEND, os.O_SYNC, os.O_DSYNC])
def test_a_synchronous_file_is_committed_before_it_is_open(flags: int) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        _, file = await create(a, flags=CREATE | flags)
        assert not a.tree.births.children
        assert (await a.tree.lookup(1, b"f")).nlink == 1
        await close(file)

    with_two(test)


@pytest.mark.parametrize("why", ["follows", "others under way", "no question at close"])
def test_where_its_place_is_not_settled_it_is_waited_for(why: str) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        host = a
        if why == "follows":
            host = b
        elif why == "others under way":
            a.store.paused = True
            await b.mounted.create(b"theirs")
        else:
            a.tree.write_behind = False

        async def go_on() -> None:
            await trio.sleep(1)
            a.store.go_on()

        async def make() -> None:
            _, file = await create(host)
            assert not host.tree.births.children
            await close(file)

        assert await together(make, go_on) == [None, None]

    with_two(test)


def test_another_leader_may_put_it_behind_others_and_it_is_there_all_the_same() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        a.store.paused = b.store.paused = True
        node, file = await create(a)
        a.store.depose()
        a.store.go_on()
        b.store.go_on()
        await file.write(0, b"data")
        await close(file)
        await b.store.barrier()
        assert (await b.tree.lookup(1, b"f")).node == node
        assert await b.mounted.read(b"f") == b"data"

    with_two(test)


def test_a_directory_that_changed_meanwhile_is_looked_at_again() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        directory = (await a.mounted.mkdir(b"d")).node
        await hosts.everywhere()
        a.store.paused = b.store.paused = True
        attr, file = await a.tree.create(directory, b"f", 0o644, CREATE, CALLER)
        a.store.depose()
        a.store.go_on()
        b.store.go_on()
        await b.tree.setattr(directory, SetAttr(mode=0o700), CALLER)
        await file.write(0, b"data")
        await file.flush()
        await file.release()
        assert (await a.tree.lookup(directory, b"f")).node == attr.node
        assert await a.mounted.read(b"d/f") == b"data"

    with_two(test)


@pytest.mark.parametrize("writes", [False, True])
def test_if_another_host_has_the_name_by_then_close_says_so(writes: bool) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        told: list[bytes] = []
        a.tree.misnamed = lambda parent, name: told.append(name)  # type: ignore[method-assign]
        a.store.paused = b.store.paused = True
        _, file = await create(a)
        a.store.depose()
        b.store.go_on()
        theirs = await b.tree.mkdir(1, b"f", 0o755, CALLER)
        if writes:
            await file.write(0, b"lost")
        a.store.go_on()
        with pytest.raises(errors.AspenError):
            await close(file)
        assert told == [b"f"]
        assert (await a.tree.lookup(1, b"f")).node == theirs.node
        assert not a.tree.births.children
        assert not a.tree.writes.failures

    with_two(test)


@pytest.mark.parametrize("seed", SEEDS)
def test_many_at_a_time_from_both_hosts(seed: int) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        async def some(host: Host, prefix: bytes) -> None:
            for n in range(20):
                name = prefix + b"%d" % n
                _, file = await create(host, name)
                await file.write(0, name)
                if n % 3 == 0:
                    await host.tree.rename(1, name, 1, name + b"r", 0)
                elif n % 3 == 1:
                    await host.tree.unlink(1, name)
                await close(file)

        await together(*(lambda host=host, p=p: some(host, p) for host, p in
                         ((a, b"a"), (a, b"b"), (b, b"c"), (a, b"d"))))  # fmt: skip
        await hosts.everywhere()
        names, _ = b.tree.list_names(1, None, 1000)
        expected = {p + b"%d" % n + (b"r" if n % 3 == 0 else b"")
                    for p in (b"a", b"b", b"c", b"d") for n in range(20) if n % 3 != 1}  # fmt: skip
        assert set(names) == expected
        for name in names:
            assert await b.mounted.read(name) == name.removesuffix(b"r")

    with_two(test, seed)
