"""Attributes that are changed while a file is written: they go with the writes, in their order."""

import os
import stat
from collections.abc import Sequence

import pytest
import trio

from aspenfs import errors
from aspenfs.filesystem import acl, layout
from aspenfs.filesystem.content import EXTENTS_A_STEP
from aspenfs.kv.types import Event
from aspenfs.vfs.coherence import UNCACHED
from aspenfs.vfs.filesystem import FileSystem
from aspenfs.vfs.tree import Attr, SetAttr
from aspenfs.views.files_open import OpenInode
from tests.coherence.hosts import Host, Hosts
from tests.coherence.test_births import close, with_two
from tests.filesystem.volumes import CALLER
from tests.views.subject import User

NOBODY = 0xFFFFFFFF
NAMED = [
    acl.AclEntry(acl.USER_OBJ, 6, NOBODY), acl.AclEntry(acl.USER, 6, 77),
    acl.AclEntry(acl.GROUP_OBJ, 4, NOBODY), acl.AclEntry(acl.MASK, 6, NOBODY),
    acl.AclEntry(acl.OTHER, 4, NOBODY),
]  # fmt: skip
CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY
PAST = 1_000_000_000 * 10**9
LIKE_TAR = SetAttr(mtime_ns=PAST), SetAttr(uid=17, gid=18), SetAttr(mode=0o750)


async def create(host: Host, flags: int = CREATE) -> tuple[int, OpenInode]:
    attr, file = await host.tree.create(1, b"f", 0o600, flags, CALLER)
    assert isinstance(file, OpenInode)
    return attr.node, file


async def seen_by(host: Host) -> Attr:
    await host.store.barrier()
    return await host.tree.lookup(1, b"f")


def is_like_tar(attr: Attr, size: int) -> bool:
    facts = attr.size, attr.mtime_ns, attr.uid, attr.gid, attr.mode
    return facts == (size, PAST, 17, 18, stat.S_IFREG | 0o750)


@pytest.mark.parametrize(
    ("new", "data"),
    [(True, b""), (True, b"data"), (True, b"x" * (3 << 20)), (False, b"data"), (False, b"x" * (3 << 20))],
)
def test_they_are_answered_at_once_and_close_waits_for_them(new: bool, data: bytes) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        if not new:
            await a.mounted.create(b"f")
        a.store.paused = b.store.paused = True
        with trio.fail_after(1):
            node, file = await create(a, CREATE if new else os.O_CREAT | os.O_WRONLY)
            if data:
                await file.write(0, data)
            for change in LIKE_TAR:
                told = await a.tree.setattr(node, change, CALLER)
        assert is_like_tar(told, len(data))
        with trio.move_on_after(1) as waited:
            await file.flush()
        assert waited.cancelled_caught
        a.store.go_on()
        b.store.go_on()
        await close(file)
        assert is_like_tar(await seen_by(b), told.size)
        assert is_like_tar(await a.tree.getattr(node), told.size)
        assert await b.mounted.read(b"f") == data
        assert not a.tree.writers

    with_two(test)


def test_they_share_a_transaction() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        length = len(hosts.log)
        a.store.paused = b.store.paused = True
        node, file = await create(a)
        await file.write(0, b"one")
        await trio.sleep(0.1)  # it is on its way
        for change in LIKE_TAR:
            await a.tree.setattr(node, change, CALLER)
        assert len(hosts.log) == length + 2
        a.store.go_on()
        b.store.go_on()
        await close(file)
        assert len(hosts.log) == length + 3

    with_two(test)


def test_bytes_and_what_is_changed_behind_them_go_together() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        a.store.paused = b.store.paused = True
        node, file = await create(a)
        await file.write(0, b"one")
        await trio.sleep(0.1)
        length = len(hosts.log)
        await file.write(3, b"two")
        await file.write(6, b"three")
        await a.tree.setattr(node, SetAttr(mtime_ns=PAST), CALLER)
        a.store.go_on()
        b.store.go_on()
        await close(file)
        assert len(hosts.log) == length + 1
        attr = await seen_by(b)
        assert (attr.size, attr.mtime_ns) == (11, PAST)
        assert await b.mounted.read(b"f") == b"onetwothree"

    with_two(test)


def test_what_is_written_behind_them_moves_the_time_again() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        a.store.paused = b.store.paused = True
        node, file = await create(a)
        await file.write(0, b"one")
        await a.tree.setattr(node, SetAttr(mtime_ns=PAST, mode=0o640), CALLER)
        await file.write(3, b"two")
        await a.tree.setattr(node, SetAttr(atime_ns=PAST), CALLER)
        a.store.go_on()
        b.store.go_on()
        await close(file)
        attr = await seen_by(b)
        assert attr.mtime_ns > PAST
        assert (attr.size, attr.atime_ns, stat.S_IMODE(attr.mode)) == (6, PAST, 0o640)
        assert await b.mounted.read(b"f") == b"onetwo"

    with_two(test)


@pytest.mark.parametrize(
    "why", ["another thread", "nobody that is seen", "a reader", "size", "closed", "closed in part", "many",
            "-o sync", "access control list", "nothing open"]
)  # fmt: skip
def test_who_is_told_of_no_error_waits(why: str) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f")).node
        reader = await a.tree.open(node, os.O_RDONLY, CALLER)
        writer = User()
        writer.pid = 99 if why.startswith(("a reader", "closed")) else CALLER.pid
        file = await a.tree.open(node, os.O_WRONLY, writer)
        other = await a.tree.open(node, os.O_WRONLY, CALLER) if why.startswith("closed") else None
        asker, change = CALLER, SetAttr(mode=0o640)
        if why == "another thread":
            asker = User()
            asker.pid = 77
        elif why == "nobody that is seen":
            asker = User()
            asker.pid = 0
            await (await a.tree.open(node, os.O_WRONLY, asker)).write(0, b"")
        elif why == "size":
            change = SetAttr(size=2, mode=0o640)
        elif why == "-o sync":
            a.tree.begins_files = False
        elif why == "access control list":
            await a.tree.setxattr(node, b"user.any", b"1")
        a.store.paused = True
        if why == "closed in part":  # a child has it open, too
            assert other is not None
            await other.flush()
        if why != "nothing open":
            await file.write(0, b"data")
        if why == "closed":
            assert isinstance(other, OpenInode)
            a.tree.released(other)
        if why == "many":
            for n in range(100):
                await file.write(10 + 2 * n, b"x")
        with trio.move_on_after(1) as waited:
            await a.tree.setattr(node, change, asker)
        assert waited.cancelled_caught
        a.store.go_on()
        await file.flush()
        await file.release()
        await reader.release()
        assert not a.tree.writers

    with_two(test)


def test_without_early_answers_they_wait() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node, file = await create(a)
        await file.write(0, b"data")
        a.tree.write_behind = False
        await a.tree.setattr(node, SetAttr(mode=0o640), CALLER)
        assert not a.tree.is_under_way(node)
        await close(file)

    with_two(test)


def test_who_looks_here_is_told_at_once_and_the_kernel_keeps_nothing_of_the_answer() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        mounted = FileSystem([a.tree], 0)
        node, file = await create(a)
        a.store.paused = True
        await file.write(0, b"data")
        ino = mounted.ino_of(a.tree, node)
        validity, told = await mounted.setattr(ino, SetAttr(mtime_ns=PAST), CALLER)
        assert validity is UNCACHED
        assert told.size == 4
        with trio.fail_after(1):
            validity, looked = await mounted.getattr(ino)
        assert validity is UNCACHED
        assert looked == told
        a.store.go_on()
        await file.flush()
        validity, committed = await mounted.getattr(ino)
        assert validity is a.tree
        assert committed._replace(blocks=told.blocks) == told
        validity, _ = await mounted.setattr(ino, SetAttr(mtime_ns=PAST), CALLER)
        assert validity is a.tree
        await close(file)

    with_two(test)


@pytest.mark.parametrize("last", ["write", "two writes", "change"])
def test_what_is_told_is_what_will_be(last: str) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        a.store.paused = b.store.paused = True
        node, file = await create(a)
        made = (await a.tree.getattr(node)).ctime_ns
        await a.tree.setattr(node, SetAttr(mtime_ns=PAST), CALLER)
        if last == "change":
            await a.tree.setattr(node, SetAttr(mode=0o640), CALLER)
        else:
            await trio.sleep(0.1)  # the change is on its way
            for n in range(2 if last == "two writes" else 1):
                await file.write(2 * n, b"xx")
                await trio.sleep(0.001)
        told = await a.tree.getattr(node)
        a.store.go_on()
        b.store.go_on()
        await close(file)
        seen = await seen_by(b)
        assert seen._replace(blocks=0) == told._replace(blocks=0)
        assert (seen.mtime_ns == PAST) is (last == "change")
        assert seen.ctime_ns > made

    with_two(test)


def test_when_it_was_read_is_not_forgotten_meanwhile() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f", b"data")).node
        file = await a.tree.open(node, os.O_RDWR, CALLER)
        await trio.sleep(1)
        await file.read(0, 4)
        before = await a.tree.getattr(node)
        assert before.atime_ns > before.mtime_ns
        a.store.paused = True
        await file.write(0, b"DATA")
        assert (await a.tree.getattr(node)).atime_ns == before.atime_ns
        a.store.go_on()
        await file.flush()
        await file.release()

    with_two(test)


def test_where_an_append_ends_nobody_can_tell_before() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f")).node
        await hosts.everywhere()
        a.store.paused = True
        theirs = await b.tree.open(node, os.O_WRONLY | os.O_APPEND, CALLER)
        await theirs.write(0, b"theirs")
        await theirs.flush()
        mine = await a.tree.open(node, os.O_WRONLY | os.O_APPEND, CALLER)
        await mine.write(0, b"mine")
        with trio.move_on_after(1) as waited:
            await a.tree.getattr(node)
        assert waited.cancelled_caught
        a.store.go_on()
        assert (await a.tree.getattr(node)).size == 10
        for file in (theirs, mine):
            await file.flush()
            await file.release()

    with_two(test)


@pytest.mark.parametrize("how", ["many", "one over many", "one over another"])
def test_they_wait_for_all_that_was_written_before(how: str) -> None:
    """Also if that takes more than one transaction."""

    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node, file = await create(a)
        if how == "one over many":
            for n in range(2 * EXTENTS_A_STEP):
                await file.write(2 * n, b"x")
            await file.sync(True)
        rows: list[layout.Inode] = []

        def observe(revision: int, events: Sequence[Event], origin: object) -> None:
            rows.extend(
                layout.unpack_inode(event.record.value)
                for event in events
                if event.key == layout.inode_key(node) and event.record is not None
            )

        b.store.observe(observe)
        a.store.paused = True
        if how == "many":
            for n in range(60):
                await file.write(2 * n, b"x")
        elif how == "one over another":
            for data in (b"x", b"xx", b"xxx"):
                await file.write(116, data)
        else:
            await file.write(1, b"y" * 4 * EXTENTS_A_STEP)
        await a.tree.setattr(node, SetAttr(mode=0o640), CALLER)
        a.store.go_on()
        await close(file)
        await b.store.barrier()
        assert len(rows) > 1
        assert [stat.S_IMODE(row.mode) for row in rows[:-1]] == [0o600] * (len(rows) - 1)
        assert stat.S_IMODE(rows[-1].mode) == 0o640
        assert rows[-1].size == (4 * EXTENTS_A_STEP + 1 if how == "one over many" else 119)

    with_two(test)


@pytest.mark.parametrize("what", ["new", "written"])
def test_close_tells_that_they_failed_once(what: str) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node, file = await create(a)
        await file.sync(True)
        a.store.cut = True
        await file.write(0, b"data")
        if what == "new":
            await trio.sleep(0.1)
        await a.tree.setattr(node, SetAttr(mode=0o640), CALLER)
        with pytest.raises(errors.NoQuorum):
            await file.flush()
        await file.flush()
        a.store.cut = False
        assert stat.S_IMODE((await a.tree.getattr(node)).mode) == 0o600
        assert (await a.tree.setattr(node, SetAttr(mode=0o640), CALLER)).mode == stat.S_IFREG | 0o640
        await close(file)

    with_two(test)


def test_another_leader_changes_nothing() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        a.store.paused = b.store.paused = True
        node, file = await create(a, os.O_CREAT | os.O_WRONLY)
        await file.write(0, b"data")
        for change in LIKE_TAR:
            await a.tree.setattr(node, change, CALLER)
        a.store.depose()
        a.store.go_on()
        b.store.go_on()
        await close(file)
        assert is_like_tar(await seen_by(b), 4)

    with_two(test)


@pytest.mark.parametrize("seed", range(10))
def test_in_any_order_with_others(seed: int) -> None:
    """Both hosts change one file; what each has told last is what is there, or the other's."""

    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f")).node
        await hosts.everywhere()
        modes: dict[int, int] = {}

        async def change(host: Host, base: int) -> None:
            file = await host.tree.open(node, os.O_WRONLY, CALLER)
            for n in range(20):
                await file.write(n, b"x")
                modes[base] = base + n
                await host.tree.setattr(node, SetAttr(mode=base + n), CALLER)
                if hosts.random.random() < 0.3:
                    await trio.sleep(hosts.random.random() * 0.01)
            await file.flush()
            await file.release()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change, a, 0o100)
            nursery.start_soon(change, b, 0o200)
        await a.store.barrier()
        attr = await a.tree.getattr(node)
        assert stat.S_IMODE(attr.mode) in modes.values()
        assert attr.size == 20
        assert not a.tree.writes.failures
        assert not b.tree.writes.failures

    with_two(test, seed)


async def chmod_behind(host: Host, mode: int) -> tuple[int, OpenInode]:
    """A file of 0644 that is being written; its mode was changed behind that, in another transaction."""
    node, file = await create(host)
    await host.tree.setattr(node, SetAttr(mode=0o644), CALLER)
    await file.sync(True)
    await file.write(0, b"one")
    await trio.sleep(0.0001)  # that is on its way
    await file.write(3, b"two")
    await host.tree.setattr(node, SetAttr(mode=mode), CALLER)
    assert node in host.tree.writes.files
    return node, file


@pytest.mark.parametrize("how", ["rename", "link", "exchange"])
def test_another_name_comes_behind_them(how: str) -> None:
    """Nobody finds a secret under its name before its mode."""

    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"other")
        node, file = await chmod_behind(a, 0o600)
        if how == "rename":
            await a.tree.rename(1, b"f", 1, b"secret", 0)
        elif how == "link":
            assert stat.S_IMODE((await a.tree.link(node, 1, b"secret")).mode) == 0o600
        else:
            await a.tree.rename(1, b"other", 1, b"f", 2)
        await b.store.barrier()
        attr = await b.tree.lookup(1, b"other" if how == "exchange" else b"secret")
        assert (attr.node, stat.S_IMODE(attr.mode), attr.size) == (node, 0o600, 6)
        await close(file)

    with_two(test)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("whose", ["mine", "theirs"])
def test_an_access_control_list_and_the_mode_agree(seed: int, whose: str) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node, file = await chmod_behind(a, 0o600)
        host = a if whose == "mine" else b
        await host.tree.setxattr(node, acl.ACCESS, acl.pack(NAMED))
        await close(file)
        await b.store.barrier()
        mode = stat.S_IMODE((await b.tree.getattr(node)).mode)
        held = acl.parse(await b.tree.getxattr(node, acl.ACCESS))
        assert held == acl.with_mode(held, mode)
        assert mode == acl.mode_bits(NAMED) or whose == "theirs"

    with_two(test, seed)


def test_what_another_host_changes_meanwhile_is_shown() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node, file = await create(a)
        await file.write(0, b"x" * 100)
        await a.tree.setattr(node, SetAttr(mode=0o666), CALLER)
        seen = []
        for n in range(60):  # something is always under way
            await file.write(0, b"%02d" % n)
            if n == 20:
                await b.store.barrier()
                await b.tree.setattr(node, SetAttr(mode=0o600, size=8), CALLER)
            if n > 40:
                await a.store.barrier()
                attr = await a.tree.getattr(node)
                seen.append((stat.S_IMODE(attr.mode), attr.size))
            await trio.sleep(0.001)
        assert set(seen) == {(0o600, 8)}
        await close(file)

    with_two(test)


def test_times_never_go_back() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f")).node
        await hosts.everywhere()
        mine = await a.tree.open(node, os.O_WRONLY, CALLER)
        await mine.write(0, b"mine")
        a.store.delay = lambda: 1.0  # it is late
        await mine.write(4, b"mine")
        await a.tree.setattr(node, SetAttr(atime_ns=PAST), CALLER)
        await trio.sleep(0.3)
        theirs = await b.tree.open(node, os.O_WRONLY, CALLER)
        await theirs.write(20, b"theirs")
        await theirs.flush()
        before = await b.tree.getattr(node)
        await a.store._until(b.store.revision)
        assert node in a.tree.writes.files
        assert (await a.tree.getattr(node)).mtime_ns >= before.mtime_ns
        await close(mine)  # type: ignore[arg-type]
        await b.store.barrier()
        after = await b.tree.getattr(node)
        assert (after.size, after.atime_ns) == (26, PAST)
        assert after.mtime_ns >= before.mtime_ns
        assert after.ctime_ns >= before.ctime_ns
        await theirs.release()

    with_two(test)


def test_errors_are_kept_when_the_node_is_alone_by_then() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        _, file = await create(a)
        await file.sync(True)
        a.store.cut = True
        await file.write(0, b"data")
        a.tree.write_behind = False  # the kernel was told that it need not ask at close
        with trio.fail_after(60), pytest.raises(errors.NoQuorum):
            await file.sync(True)
        a.store.cut = False
        await close(file)

    with_two(test)
