"""What a mount waits for, what it lets the kernel keep, and what it tells it of other hosts' changes."""

import os
import stat
from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio

from aspenfs import errors
from aspenfs.filesystem import layout
from aspenfs.kv.types import Event
from aspenfs.vfs.coherence import OPEN, SHARED_TIMEOUT_S, STALE, STRICT, UNCACHED, Coherence
from aspenfs.vfs.filesystem import ROOT_INODE, FileSystem
from aspenfs.vfs.tree import SetAttr
from aspenfs.views.cluster import ClusterTree
from tests.coherence.hosts import Host, Hosts, run, until
from tests.filesystem.volumes import CALLER
from tests.vfs.notices import Noted

MODES = (OPEN, STRICT, STALE)


class Mount:
    """A host with what the kernel would be told; the root directory of files/ is looked up."""

    def __init__(self, hosts: Hosts, host: Host, mode: str) -> None:
        self.hosts, self.host, self.store, self.tree = hosts, host, host.store, host.tree
        self.noted = Noted()
        self.coherence = Coherence(host.store, mode, self.noted)
        cluster = ClusterTree(dict, 1)
        self.fs = FileSystem([host.tree, cluster], 1, self.coherence)
        self.barriers = 0
        barrier = host.store.barrier

        async def counted() -> int:
            self.barriers += 1
            return await barrier()

        host.store.barrier = counted  # type: ignore[method-assign]
        host.store.observe(self._observe)
        self.files = 0

    async def start(self) -> "Mount":
        self.files, _, _ = await self.fs.lookup(ROOT_INODE, b"files")
        for _ in range(2):
            self.coherence.tick()
        return self

    def _observe(self, revision: int, events: Sequence[Event], origin: object) -> None:
        self.fs.noticed(events, own=origin is self.host.volume)

    async def make(self, name: bytes, data: bytes = b"") -> int:
        fh, file, _, ino, _, _ = await self.fs.create(self.files, name, 0o644, os.O_RDWR, CALLER)
        if data:
            await file.write(0, data)
        await self.fs.release(fh)
        return ino

    async def caught_up(self) -> None:
        await until(lambda: self.store.revision == len(self.hosts.log))


def with_mounts(
    test: Callable[[Hosts, Mount, Mount], Awaitable[None]], mode: str = OPEN, *, alone: bool = False
) -> None:
    async def main(hosts: Hosts) -> None:
        hosts.alone = alone
        a, b = [await Mount(hosts, await hosts.host(n), mode).start() for n in (1, 2)]
        await hosts.everywhere()
        a.barriers = b.barriers = 0
        await test(hosts, a, b)

    run(main)


# --- waiting ---


@pytest.mark.parametrize("mode", MODES)
def test_names_and_opens_wait_for_other_hosts_and_attributes_do_where_asked_for(mode: str) -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        fs = a.fs
        ino = await a.make(b"f")
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: fs.lookup(a.files, b"f"),
            lambda: fs.open(ino, 0, CALLER),
            lambda: fs.opendir(a.files),
            lambda: fs.getattr(ino),
            lambda: fs.listxattr(ino),
        ]
        waits = []
        for call in calls:
            before = a.barriers
            await call()
            waits.append(a.barriers - before)
        names, others = (0, 0) if mode == STALE else (1, int(mode == STRICT))
        assert waits == [names, names, names, others, others]

    with_mounts(test, mode)


@pytest.mark.parametrize("mode", [OPEN, STRICT])
def test_what_was_committed_anywhere_before_is_seen(mode: str) -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        b.store.delay = lambda: 0.5  # it lags
        for n in range(5):
            ino = await a.make(b"%d" % n, b"data")
            found, _, attr = await b.fs.lookup(b.files, b"%d" % n)
            assert (found, attr.size) == (ino, 4)
            fh, file, _ = await a.fs.open(ino, os.O_RDWR, CALLER)
            await file.write(4, b"more")
            await file.flush()
            await a.fs.release(fh)
            fh, file, _ = await b.fs.open(ino, 0, CALLER)
            assert await file.read(0, 10) == b"datamore"
            await b.fs.release(fh)

    with_mounts(test, mode)


def test_a_create_that_finds_the_file_opens_it_as_it_is_by_then() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        ino = await a.make(b"f", b"old")
        await b.make(b"first")
        await b.caught_up()
        fh, file, _ = await a.fs.open(ino, os.O_RDWR, CALLER)
        await b.fs.lookup(b.files, b"f")
        b.store.delay = lambda: 0.3
        await file.write(0, b"new")
        await file.flush()
        before = b.store.revision
        _, found, _, again, _, _ = await b.fs.create(b.files, b"f", 0o644, os.O_RDWR, CALLER)
        assert b.store.revision > before
        assert again == ino
        assert await found.read(0, 10) == b"new"
        await a.fs.release(fh)

    with_mounts(test)


def test_a_stale_mount_answers_without_a_quorum_and_does_not_go_back() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        ino = await a.make(b"f", b"data")
        await b.caught_up()
        b.store.cut = True
        with trio.fail_after(0.1):
            assert (await b.fs.lookup(b.files, b"f"))[0] == ino
            _, file, _ = await b.fs.open(ino, 0, CALLER)
            assert await file.read(0, 10) == b"data"
            await b.fs.opendir(b.files)
        with pytest.raises(errors.NoQuorum):
            await b.make(b"g")
        with pytest.raises(errors.NotFound):
            await b.fs.unlink(b.files, b"none")

    with_mounts(test, STALE)


def test_without_a_quorum_only_the_tree_that_says_so_answers() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        b.store.cut = True
        with trio.fail_after(1):
            cluster, _, _ = await b.fs.lookup(ROOT_INODE, b"cluster")
            await b.fs.opendir(cluster)
            await b.fs.opendir(ROOT_INODE)
            ino, _, _ = await b.fs.lookup(cluster, b"health")
            await b.fs.open(ino, 0, CALLER)
        with pytest.raises(errors.NoQuorum):
            await b.fs.lookup(b.files, b"f")

    with_mounts(test)


@pytest.mark.parametrize("mode", [OPEN, STALE])
def test_a_refusal_of_a_state_that_lags_is_looked_at_again(mode: str) -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        b.store.delay = lambda: 0.2
        ino, _, _ = await a.fs.mkdir(a.files, b"d", 0o755, CALLER)
        await a.make(b"f", b"x")
        calls: list[tuple[Callable[[], Awaitable[object]], type]] = [
            (lambda: b.fs.rename(b.files, b"f", b.files, b"g", 0), errors.NotFound),
            (lambda: b.fs.setattr(ino, SetAttr(mode=0o700), CALLER), errors.Stale),
            (lambda: b.fs.setxattr(ino, b"user.x", b"v"), errors.Stale),
            (lambda: b.fs.rmdir(b.files, b"d"), errors.NotFound),
        ]
        for call, refusal in calls:
            if mode == STALE:
                with pytest.raises(refusal):
                    await call()
            else:
                await call()

    with_mounts(test, mode)


def test_a_refusal_that_stands_is_told_after_one_more_look() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        await b.caught_up()
        with pytest.raises(errors.NotFound):
            await b.fs.unlink(b.files, b"none")
        assert b.barriers == 1
        hosts.alone = True
        with pytest.raises(errors.NotFound):
            await b.fs.unlink(b.files, b"none")
        assert b.barriers == 1

    with_mounts(test)


# --- how long ---


def test_timeouts_fall_when_others_come_and_rise_when_they_have_gone() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        tree, fs = a.tree, a.fs
        assert tree.entry_timeout_s == tree.attr_timeout_s == tree.negative_timeout_s == 3600
        assert not fs.look()
        hosts.alone = False
        assert fs.look()
        assert tree.entry_timeout_s == tree.attr_timeout_s == tree.negative_timeout_s == SHARED_TIMEOUT_S
        assert a.noted.all == 1
        assert not fs.look()
        hosts.alone = True
        assert not fs.look()
        assert tree.attr_timeout_s == 3600
        assert a.noted.all == 1

    with_mounts(test, alone=True)


def test_a_strict_mount_lets_the_kernel_keep_nothing_of_names_and_attributes() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        for alone in (False, True):
            hosts.alone = alone
            a.fs.look()
            assert a.tree.entry_timeout_s == a.tree.attr_timeout_s == a.tree.negative_timeout_s == 0

    with_mounts(test, STRICT)


def test_an_entry_that_others_have_changed_before_the_reply_is_not_kept() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        await b.make(b"first")
        results: list[object] = []

        async def make() -> None:
            results.append((await b.fs.create(b.files, b"f", 0o644, os.O_RDWR, CALLER))[4])
            results.append((await b.fs.mkdir(b.files, b"d", 0o755, CALLER))[1])

        b.store.paused = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make)
            await until(lambda: a.tree.names.entries(1, b"e", 9)[0].name == b"f")
            await a.fs.unlink(a.files, b"f")
            b.store.leap()
        assert results == [UNCACHED, b.tree]

    with_mounts(test)


# --- pages ---


def test_pages_are_kept_only_if_the_kernel_was_told_of_every_change_to_them() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        ino = await a.make(b"f", b"data")
        await b.fs.lookup(b.files, b"f")
        assert (await b.fs.open(ino, 0, CALLER))[2]
        fh, file, keep = await a.fs.open(ino, os.O_RDWR, CALLER)
        await file.write(0, b"DATA")
        await file.flush()
        assert not (await b.fs.open(ino, 0, CALLER))[2]
        assert b.noted.dropped == [ino]
        b.noted.untold.clear()  # as the notifier does it, when the kernel has dropped them
        assert (await b.fs.open(ino, 0, CALLER))[2]
        assert (await a.fs.open(ino, 0, CALLER))[2], "its own changes went through its own pages"
        await a.fs.release(fh)
        assert keep

    with_mounts(test)


@pytest.mark.parametrize("size", [0, 2, 100])
def test_a_truncation_elsewhere_drops_pages_too(size: int) -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        ino = await a.make(b"f", b"data")
        await a.fs.setattr(ino, SetAttr(size=1000), CALLER)  # and a hole
        await b.fs.lookup(b.files, b"f")
        await a.fs.setattr(ino, SetAttr(size=size), CALLER)
        assert not (await b.fs.open(ino, 0, CALLER))[2]

    with_mounts(test)


def test_attributes_of_what_was_changed_lately_are_asked_for_again_at_an_open() -> None:
    """An answer that was on its way may have brought the old ones back."""

    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        ino = await a.make(b"f")
        await b.fs.lookup(b.files, b"f")
        for ticks, dropped in enumerate((1, 1, 0)):
            await a.fs.setattr(ino, SetAttr(mode=0o600), CALLER)
            await b.caught_up()
            b.noted.clear()
            for _ in range(ticks):
                b.coherence.tick()
            for _ in range(3):  # but once: it would undo what the first has asked for
                assert (await b.fs.open(ino, 0, CALLER))[2]
            assert len(b.noted.dropped) == dropped, ticks

    with_mounts(test)


def test_bytes_that_did_not_go_where_the_kernel_has_them_are_dropped_here_too() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        ino = await a.make(b"f", b"12345")
        await b.fs.lookup(b.files, b"f")
        fh, file, _ = await b.fs.open(ino, os.O_WRONLY | os.O_APPEND, CALLER)
        await a.make(b"other")
        await file.write(2, b"x")  # it believes in an older end
        await file.flush()
        assert (ino, True) in b.noted.inodes
        await b.fs.release(fh)

    with_mounts(test)


# --- names ---


def test_of_names_the_kernel_is_told_what_it_may_know() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        for name in (b"known", b"unknown"):
            await a.make(name)
        await b.fs.lookup(b.files, b"known")
        with pytest.raises(errors.NotFound):
            await b.fs.lookup(b.files, b"missed")
        b.noted.clear()
        await a.make(b"new")
        await a.make(b"missed")
        await a.fs.unlink(a.files, b"unknown")
        await a.fs.unlink(a.files, b"known")
        await b.caught_up()
        assert b.noted.names == [(b.files, b"missed"), (b.files, b"known")]
        assert (b.files, False) in b.noted.inodes
        for _ in range(2):
            b.coherence.tick()
        b.noted.clear()
        await a.fs.unlink(a.files, b"missed")
        await a.make(b"missed")
        await b.caught_up()
        assert b.noted.names == []

    with_mounts(test)


def test_a_directory_that_the_kernel_does_not_know_holds_no_names_there() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        ino, _, _ = await a.fs.mkdir(a.files, b"d", 0o755, CALLER)
        await a.fs.create(ino, b"f", 0o644, os.O_RDWR, CALLER)
        await b.caught_up()
        b.noted.clear()
        await a.fs.unlink(ino, b"f")
        await b.caught_up()
        assert b.noted.names == []
        assert b.noted.inodes == []

    with_mounts(test)


def test_all_names_that_the_kernel_may_hold_can_be_found() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        d, _, _ = await a.fs.mkdir(a.files, b"d", 0o755, CALLER)
        await a.make(b"f")
        await a.fs.create(d, b"deep", 0o644, os.O_RDWR, CALLER)
        await a.make(b"forgotten")
        ino = (await a.fs.lookup(a.files, b"forgotten"))[0]
        a.fs.forget(ino, a.fs.known[ino])
        held = [name async for name in a.fs.names_held()]
        assert sorted(held) == sorted([(a.files, b"d"), (a.files, b"f"), (d, b"deep")])

    with_mounts(test, alone=True)


# --- a kernel that remembers what it was told ---


def test_a_kernel_that_was_told_not_to_flush_has_its_writes_waited_for() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        allowed = [a.tree.write_behind]
        assert not a.coherence.asks_at_close()  # at the first close(2)
        allowed.append(a.tree.write_behind)
        assert allowed == [True, False]
        hosts.alone = False
        ino = await a.make(b"f")
        fh, file, _ = await a.fs.open(ino, os.O_RDWR, CALLER)
        length = len(hosts.log)
        await file.write(0, b"data")
        assert len(hosts.log) == length + 1
        assert b.coherence.asks_at_close()
        assert b.tree.write_behind
        await a.fs.release(fh)

    with_mounts(test, alone=True)


def test_a_kernel_that_opens_directories_unasked_asks_for_their_times() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        for mount in (a, b):
            mount.coherence.opendir_unasked = True
        assert not a.fs.asks_anew(stat.S_IFDIR | 0o755)
        hosts.alone = False
        assert a.fs.asks_anew(stat.S_IFDIR | 0o755)
        assert not a.fs.asks_anew(stat.S_IFREG | 0o644)
        b.store.delay = lambda: 0.5
        _, before = await b.fs.getattr(b.files)
        await a.make(b"f")
        _, after = await b.fs.getattr(b.files)
        assert after.mtime_ns > before.mtime_ns

    with_mounts(test, alone=True)


# --- the way back to the beginning ---


def test_a_state_that_was_replaced_makes_all_doubtful() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        ino = await a.make(b"f", b"data")
        await b.fs.lookup(b.files, b"f")
        fh, file, _ = await b.fs.open(ino, 0, CALLER)
        b.store.engine._hearers[b"f/"] = []
        await a.fs.unlink(a.files, b"f")
        await b.caught_up()
        b.store.engine._hearers.clear()
        b.fs.replaced()
        assert b.noted.all == 1
        await trio.sleep(30)
        assert await file.read(0, 10) == b"data"
        await b.fs.release(fh)
        await trio.sleep(30)
        assert [key for key, _ in hosts.rows(layout.ORPHAN_PREFIX)] == []

    with_mounts(test)


def test_a_change_that_failed_halfway_leaves_nothing_in_the_kernel() -> None:
    async def test(hosts: Hosts, a: Mount, b: Mount) -> None:
        ino = await a.make(b"f", b"data")
        a.noted.clear()
        with pytest.raises(errors.TooLarge):
            await a.fs.setattr(ino, SetAttr(uid=7, size=1 << 60), CALLER)
        assert a.noted.inodes == [(ino, True)]

    with_mounts(test)
