"""Files without a name that are open on other hosts: kept for those who hold them, and ended afterwards."""

import os
from collections.abc import Awaitable, Callable

import pytest
import trio

from aspenfs import errors
from aspenfs.filesystem import layout
from aspenfs.kv.types import absent, put
from aspenfs.limits import LEASE_TTL_MS_MAX, SESSION_TTL_MS
from aspenfs.vfs.tree import OpenFile
from tests.coherence.hosts import Host, Hosts, run, together, until
from tests.filesystem.volumes import CALLER
from tests.views.subject import User, whole

SEEDS = range(10)
DATA = b"z" * 30_000
LONG_S = 30.0  # for all housekeeping to be over


def with_hosts(test: Callable[[Hosts, Host, Host, Host], Awaitable[None]], seed: int = 0) -> None:
    async def main(hosts: Hosts) -> None:
        a, b, c = [await hosts.host(node_id) for node_id in (1, 2, 3)]
        await hosts.everywhere()
        await test(hosts, a, b, c)

    run(main, seed)


async def opened_elsewhere(hosts: Hosts, a: Host, b: Host, data: bytes = DATA) -> OpenFile:
    """A file `f` that host `a` has made and host `b` has open."""
    attr = await a.mounted.create(b"f", data)
    await hosts.everywhere()
    return await b.tree.open(attr.node, os.O_RDWR, CALLER)


def inodes(hosts: Hosts) -> int:
    return sum(1 for _ in hosts.rows(layout.INODE_PREFIX))


def left_over(hosts: Hosts) -> list[bytes]:
    return [key for prefix in (layout.ORPHAN_PREFIX, layout.HOLD_PREFIX) for key, _ in hosts.rows(prefix)]


@pytest.mark.parametrize("how", ["unlink", "rename"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_file_open_on_another_host_is_read_and_written_until_it_is_closed(seed: int, how: str) -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        file = await opened_elsewhere(hosts, a, b)
        if how == "rename":
            await a.mounted.create(b"new", b"new")
            await a.mounted.rename(b"new", b"f")
        else:
            await a.mounted.unlink(b"f")
        await trio.sleep(LONG_S)
        assert await whole(file) == DATA
        assert await file.write(10, b"more") == 4
        await file.sync(False)
        assert (await file.read(8, 8)) == b"zzmorezz"
        await file.release()
        await trio.sleep(LONG_S)
        assert inodes(hosts) == (2 if how == "rename" else 1)
        assert left_over(hosts) == []

    with_hosts(test, seed)


def test_a_file_that_nobody_has_open_ends_soon_after_its_name() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        for n in range(100):
            await a.mounted.create(b"%d" % n, DATA[: n * 100])
        await hosts.everywhere()
        for n in range(100):
            await a.mounted.unlink(b"%d" % n)
        assert inodes(hosts) == 101
        length = len(hosts.log)
        await trio.sleep(4.0)
        assert inodes(hosts) == 1
        assert left_over(hosts) == []
        assert len(hosts.log) - length < 40  # many to a transaction
        length = len(hosts.log)
        await trio.sleep(60)
        assert len(hosts.log) - length < 3 * 60 / 4  # then only what keeps the sessions

    with_hosts(test)


@pytest.mark.parametrize("delay_s", [0.0, 0.3, 0.6, 1.2, 2.0])
def test_an_open_that_comes_late_gets_the_file_or_an_error_but_never_a_file_that_ends(delay_s: float) -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        attr = await a.mounted.create(b"f", DATA)
        await hosts.everywhere()
        await a.mounted.unlink(b"f")
        await trio.sleep(delay_s)
        try:
            file = await b.tree.open(attr.node, os.O_RDONLY, CALLER)
        except errors.Stale:
            assert delay_s > 0.5  # an open right behind a rename must see one of both files
        else:
            await trio.sleep(LONG_S)
            assert await whole(file) == DATA
            await file.release()

    with_hosts(test)


def test_a_slow_host_that_has_not_seen_the_unlink_loses_nothing() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        file = await opened_elsewhere(hosts, a, b)
        b.store.paused = True
        b.rounds = False  # it keeps its session alive by a hair: it is slow, not gone
        await a.mounted.unlink(b"f")
        await trio.sleep(SESSION_TTL_MS / 1000 - 5)
        assert inodes(hosts) == 2
        b.rounds = True
        b.store.go_on()
        await trio.sleep(LONG_S)
        assert await whole(file) == DATA
        await file.release()

    with_hosts(test)


def test_what_a_killed_host_held_ends_with_its_session() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        await opened_elsewhere(hosts, a, b)
        await a.mounted.unlink(b"f")
        await trio.sleep(5)
        b.kill()
        await trio.sleep(5)
        assert inodes(hosts) == 2
        await trio.sleep(SESSION_TTL_MS / 1000 + 5)
        assert inodes(hosts) == 1
        assert left_over(hosts) == []
        assert len(list(hosts.rows(layout.SESSION_PREFIX))) == 2

    with_hosts(test)


def test_orphans_of_a_host_that_died_are_ended_by_another_one() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        file = await opened_elsewhere(hosts, a, b)
        await a.mounted.unlink(b"f")
        await trio.sleep(1)
        a.kill()
        await trio.sleep(LONG_S)
        assert await whole(file) == DATA
        await file.release()
        await trio.sleep(LONG_S)
        assert inodes(hosts) == 1
        assert left_over(hosts) == []

    with_hosts(test)


def test_what_a_host_unlinked_just_before_it_died_ends_too() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        await a.mounted.create(b"f", DATA)
        await a.mounted.unlink(b"f")
        a.kill()
        await trio.sleep(2 * LONG_S)
        assert inodes(hosts) == 1
        assert left_over(hosts) == []

    with_hosts(test)


def test_who_ends_an_orphan_does_not_rely_on_a_state_that_lags() -> None:
    """A host holds it again by a new session, which the one that ends it has not seen."""

    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        file = await opened_elsewhere(hosts, a, b)
        await a.mounted.unlink(b"f")
        await trio.sleep(3)
        for host in (a, b, c):
            host.rounds = False
        await c.store.lease_revoke(b.tree.orphans.session.lease)
        await hosts.everywhere()
        a.store.paused = True  # it believes that nobody holds the file
        await b.tree.orphans.round()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.tree.reap)
            await trio.sleep(0.1)
            a.store.go_on()
        await hosts.everywhere()
        assert await whole(file) == DATA
        await file.release()

    with_hosts(test)


def test_an_orphan_that_is_being_ended_is_not_held_again() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        attr = await a.mounted.create(b"big")
        for n in range(300):
            await a.tree.writer.write(attr.node, n * 20_000, b"%05d" % n * 4_000)
        await hosts.everywhere()
        file = await b.tree.open(attr.node, os.O_RDONLY, CALLER)
        await a.mounted.unlink(b"big")
        await trio.sleep(3)
        for host in (a, b, c):
            host.rounds = False
        await c.store.lease_revoke(b.tree.orphans.session.lease)
        await hosts.everywhere()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.tree.reap)
            await until(lambda: b.tree.size_of(attr.node) < 6_000_000)
            await b.tree.orphans.round()
        await hosts.everywhere()
        with pytest.raises(errors.Stale):
            await file.read(0, 10)
        assert inodes(hosts) == 1

    with_hosts(test)


def test_a_host_that_was_away_for_too_long_gets_stale_and_lives_on() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        file = await opened_elsewhere(hosts, a, b)
        other = await a.mounted.create(b"stays", b"stays")
        await hosts.everywhere()
        kept = await b.tree.open(other.node, os.O_RDONLY, CALLER)
        b.store.cut = True
        await a.mounted.unlink(b"f")
        await trio.sleep(SESSION_TTL_MS / 1000 + 10)
        assert inodes(hosts) == 2
        b.store.go_on()
        await trio.sleep(LONG_S)
        with pytest.raises(errors.Stale):
            await file.read(0, 10)
        with pytest.raises(errors.Stale):
            await file.write(0, b"x")
        await file.release()
        await a.mounted.unlink(b"stays")
        await trio.sleep(LONG_S)
        assert await whole(kept) == b"stays"
        await kept.release()

    with_hosts(test)


def test_a_session_that_ended_by_mistake_takes_hold_again_of_what_is_left() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        file = await opened_elsewhere(hosts, a, b)
        await a.mounted.unlink(b"f")
        await trio.sleep(3)
        a.rounds = c.rounds = False  # nobody ends anything in the meantime
        await a.store.lease_revoke(b.tree.orphans.session.lease)
        await trio.sleep(3)
        a.rounds = c.rounds = True
        await trio.sleep(LONG_S)
        assert await whole(file) == DATA
        await file.release()

    with_hosts(test)


def test_a_node_that_was_alone_keeps_what_it_has_open_when_others_come() -> None:
    async def main(hosts: Hosts) -> None:
        hosts.alone = True
        a = await hosts.host(1)
        length = len(hosts.log)
        await trio.sleep(300)
        assert len(hosts.log) == length  # an idle node writes nothing
        gone = await a.mounted.open((await made(a, b"gone")), os.O_RDWR)
        await a.mounted.unlink(b"gone")
        file = await a.mounted.open((await made(a, b"f")), os.O_RDWR)
        known = await a.mounted.create(b"known")
        a.tree.is_known = {known.node}.__contains__  # type: ignore[assignment]
        await a.mounted.unlink(b"known")
        hosts.alone = False
        b = await hosts.host(2)
        await b.mounted.unlink(b"f")
        await trio.sleep(LONG_S)
        assert await whole(file) == await whole(gone) == DATA
        await file.release()
        await gone.release()
        await trio.sleep(LONG_S)
        assert inodes(hosts) == 1
        assert left_over(hosts) == []

    run(main)


async def made(host: Host, name: bytes) -> bytes:
    await host.mounted.create(name, DATA)
    return name


def test_a_node_that_is_alone_again_ends_what_the_others_left() -> None:
    async def main(hosts: Hosts) -> None:
        a, b = await hosts.host(1), await hosts.host(2)
        await hosts.everywhere()
        file = await opened_elsewhere(hosts, a, b)
        held = await a.mounted.open(await made(a, b"g"), os.O_RDWR)
        await a.mounted.unlink(b"f")
        await a.mounted.unlink(b"g")
        await trio.sleep(5)
        b.kill()
        hosts.alone = True
        await trio.sleep(SESSION_TTL_MS / 1000 + 5)
        assert inodes(hosts) == 2
        await held.release()
        await trio.sleep(LONG_S)
        assert inodes(hosts) == 1
        assert left_over(hosts) == []
        del file

    run(main)


def test_the_session_of_a_removed_node_holds_up_nothing() -> None:
    """Also one on a lease of years, as a backup brings it of the node that made it."""

    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        await opened_elsewhere(hosts, a, b)
        b.kill()
        lease = await a.store.lease_grant(LEASE_TTL_MS_MAX)
        for node_id in (2, 9):
            await a.volume.txn([], [put(layout.session_key(node_id), layout.I64(0), lease)])
        for host in (a, c):
            host.volume.is_member = {1, 3}.__contains__
        await a.mounted.unlink(b"f")
        await trio.sleep(5)
        assert inodes(hosts) == 1
        await trio.sleep(15)
        assert len(list(hosts.rows(layout.SESSION_PREFIX))) == 2

    with_hosts(test)


def test_a_node_that_died_when_it_had_just_stopped_being_alone_holds_up_little() -> None:
    async def main(hosts: Hosts) -> None:
        hosts.alone = True
        a = await hosts.host(1)
        await a.mounted.create(b"f")
        hosts.alone = False
        b, c = await hosts.host(2), await hosts.host(3)
        a.kill()
        lease = await b.store.lease_grant(LEASE_TTL_MS_MAX)
        row = b.store.get(layout.session_key(1))
        assert row is not None
        await b.volume.txn([], [put(layout.session_key(1), row.value, lease)])
        await c.mounted.unlink(b"f")
        await trio.sleep(SESSION_TTL_MS / 1000 + 35)
        assert inodes(hosts) == 1
        assert len(list(hosts.rows(layout.SESSION_PREFIX))) == 2

    run(main)


def test_an_unmounted_host_holds_nothing() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        await opened_elsewhere(hosts, a, b)
        await a.mounted.unlink(b"f")
        await trio.sleep(5)
        await b.unmount()
        await trio.sleep(5)
        assert inodes(hosts) == 1
        assert len(list(hosts.rows(layout.SESSION_PREFIX))) == 2

    with_hosts(test)


def test_a_node_that_starts_again_at_once_replaces_its_session() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        await opened_elsewhere(hosts, a, b)
        await a.mounted.unlink(b"f")
        await trio.sleep(5)
        b.kill()
        again = await hosts.host(2)
        await trio.sleep(5)
        assert inodes(hosts) == 1
        assert left_over(hosts) == []
        assert len(list(hosts.rows(layout.SESSION_PREFIX))) == 3
        assert again.tree.orphans.session.created

    with_hosts(test)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_has_not_seen_its_last_session_yet_replaces_it(seed: int) -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        again = Host(hosts, 4)
        again.store.paused = True
        last = await hosts.host(4)
        last.kill()
        again.store.go_on()
        await again.start()
        await hosts.everywhere()
        row = a.store.get(layout.session_key(4))
        assert row is not None
        assert row.create_revision == again.tree.orphans.session.created

    with_hosts(test, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_session_that_comes_in_after_the_next_life_has_begun_is_replaced(seed: int) -> None:
    """What a node was proposing when it was killed may reach the leader late."""

    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        again = Host(hosts, 4)
        lease = await a.store.lease_grant(SESSION_TTL_MS)
        key = layout.session_key(4)

        async def late() -> None:
            await a.volume.txn([absent(key)], [put(key, layout.I64(0), lease)])

        await together(late, again.start)
        await hosts.everywhere()
        row = a.store.get(key)
        assert row is not None
        assert row.create_revision == again.tree.orphans.session.created

    with_hosts(test, seed)


def test_a_file_too_large_for_one_transaction_is_held_and_ends_too() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        attr = await a.mounted.create(b"big")
        for n in range(150):
            await a.tree.writer.write(attr.node, n * 30_000, b"%05d" % n * 4_000)
        await hosts.everywhere()
        file = await b.tree.open(attr.node, os.O_RDONLY, CALLER)
        await a.mounted.unlink(b"big")
        await trio.sleep(LONG_S)
        assert len(await whole(file)) == 149 * 30_000 + 20_000
        await file.release()
        await trio.sleep(LONG_S)
        assert inodes(hosts) == 1
        assert left_over(hosts) == []

    with_hosts(test)


def test_a_file_made_here_and_removed_elsewhere_before_create_returns_is_held() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        await b.mounted.create(b"first")  # so that it has inode numbers
        await hosts.everywhere()
        b.store.paused = True
        results: list[OpenFile] = []

        async def making() -> None:
            results.append((await b.tree.create(1, b"f", 0o644, os.O_RDWR, CALLER))[1])

        hosts.nursery.start_soon(making)
        await until(lambda: a.store.get(layout.dirent_key(1, b"f")) is not None)
        await a.mounted.unlink(b"f")
        b.store.leap()
        await trio.sleep(LONG_S)
        (file,) = results
        assert await file.write(0, b"late") == 4
        assert await whole(file) == b"late"
        await file.release()
        await trio.sleep(LONG_S)
        assert inodes(hosts) == 2

    with_hosts(test)


def test_more_orphans_than_one_transaction_can_hold() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        attrs = [await a.mounted.create(b"%d" % n, b"%d" % n) for n in range(250)]
        await hosts.everywhere()
        files = [await b.tree.open(attr.node, os.O_RDONLY, CALLER) for attr in attrs]
        await together(*(lambda n=n: a.mounted.unlink(b"%d" % n) for n in range(250)))
        await trio.sleep(LONG_S)
        assert [await whole(file) for file in files] == [b"%d" % n for n in range(250)]
        for file in files:
            await file.release()
        await trio.sleep(LONG_S)
        assert inodes(hosts) == 1
        assert left_over(hosts) == []

    with_hosts(test)


def test_a_directory_removed_elsewhere_can_still_be_looked_at() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        attr = await a.mounted.mkdir(b"d")
        await hosts.everywhere()
        b.tree.is_known = {attr.node}.__contains__  # type: ignore[assignment]
        await a.mounted.rmdir(b"d")
        await hosts.everywhere()
        assert (await b.tree.getattr(attr.node)).nlink == 0
        assert b.tree.list_names(attr.node, None, 10) == ((), None)
        with pytest.raises(errors.NotFound):
            await b.tree.create(attr.node, b"f", 0o644, os.O_RDWR, CALLER)
        b.tree.forgotten(attr.node)
        with pytest.raises(errors.NotFound):
            await b.tree.getattr(attr.node)

    with_hosts(test)


def test_who_opens_for_writing_what_was_removed_elsewhere_is_sent_back_once() -> None:
    async def test(hosts: Hosts, a: Host, b: Host, c: Host) -> None:
        node = (await a.mounted.create(b"f", DATA)).node
        await hosts.everywhere()
        await a.mounted.unlink(b"f")
        await hosts.everywhere()
        one, another = User(), User()
        one.pid, another.pid = 7, 8
        await (await b.tree.open(node, os.O_RDONLY, one)).release()  # read as before the name went
        for caller in (one, another):
            with pytest.raises(errors.Stale):
                await b.tree.open(node, os.O_WRONLY, caller)
        opened = await b.tree.open(node, os.O_WRONLY, one)  # the kernel has looked up again meanwhile
        await (await b.tree.open(node, os.O_RDWR, CALLER)).release()  # it is not lost: somebody has it
        await opened.release()
        with pytest.raises(errors.Stale):
            await b.tree.open(node, os.O_WRONLY, one)

    with_hosts(test)
