"""Writes that are committed together, or after they returned: in order, bounded, and no error is lost."""

import os
from collections.abc import Awaitable, Callable

import pytest
import trio

from aspenfs import errors
from aspenfs.filesystem import layout
from aspenfs.limits import FILE_BYTES_MAX, MIB, WRITE_BEHIND_FILE_BYTES_MAX
from aspenfs.vfs.tree import SetAttr
from tests.coherence.hosts import Host, Hosts, run, together
from tests.filesystem.volumes import CALLER
from tests.views.subject import whole

SEEDS = range(10)


def with_two(test: Callable[[Hosts, Host, Host], Awaitable[None]], seed: int = 0, early: bool = True) -> None:
    async def main(hosts: Hosts) -> None:
        a, b = await hosts.host(1), await hosts.host(2)
        a.tree.write_behind = b.tree.write_behind = early
        await hosts.everywhere()
        await test(hosts, a, b)

    run(main, seed)


async def seen_by(host: Host) -> bytes:
    await host.store.barrier()
    return await host.mounted.read(b"f")


@pytest.mark.parametrize("early", [False, True])
def test_writers_of_one_host_share_transactions_and_never_conflict(early: bool) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"log")
        files = [await a.mounted.open(b"log", os.O_WRONLY | os.O_APPEND) for _ in range(200)]
        length = len(hosts.log)

        async def append(n: int) -> None:
            await files[n].write(0, b"line %03d\n" % n)
            await files[n].flush()
            await files[n].release()

        await together(*(lambda n=n: append(n) for n in range(200)))
        assert len(hosts.log) - length < 30
        data = await a.mounted.read(b"log")
        assert sorted(data.splitlines(keepends=True)) == [b"line %03d\n" % n for n in range(200)]

    with_two(test, early=early)


def test_a_write_returns_before_its_commit_and_close_waits_for_it() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"f")
        file = await a.mounted.open(b"f")
        a.store.paused = True
        with trio.fail_after(1):
            await file.write(0, b"one")
            await file.write(3, b"two")
        with trio.move_on_after(1) as waited:
            await file.flush()
        assert waited.cancelled_caught
        a.store.go_on()
        await file.flush()
        await file.release()
        assert await seen_by(b) == b"onetwo"

    with_two(test)


@pytest.mark.parametrize("look", ["read", "getattr", "lookup", "listed", "setattr", "truncate"])
def test_who_looks_at_a_file_sees_what_was_written_here(look: str) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f", b"-" * 10)).node
        file = await a.tree.open(node, os.O_RDWR, CALLER)
        await file.write(5, b"x" * 10)
        tree = a.tree
        if look == "read":
            assert await file.read(0, 20) == b"-----xxxxxxxxxx"
        elif look == "getattr":
            assert (await tree.getattr(node)).size == 15
        elif look == "lookup":
            assert (await tree.lookup(1, b"f")).size == 15
        elif look == "listed":
            names, _ = tree.list_names(1, None, 10)
            (attr,) = await tree.listed(1, names)
            assert attr is not None
            assert attr.size == 15
        elif look == "setattr":
            assert (await tree.setattr(node, SetAttr(mode=0o600), CALLER)).size == 15
        else:
            assert (await tree.setattr(node, SetAttr(size=12), CALLER)).size == 12
            assert await file.read(0, 20) == b"-----xxxxxxx"
        await file.release()

    with_two(test)


@pytest.mark.parametrize("size", [1000, 4096, 128 * 1024, MIB])
def test_a_stream_of_writes_takes_few_transactions_and_large_chunks(size: int) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"f")
        length = len(hosts.log)
        file = await a.mounted.open(b"f")
        data = os.urandom(12 * MIB)
        for at in range(0, len(data), size):
            await file.write(at, data[at : at + size])
        await file.flush()
        await file.release()
        assert len(hosts.log) - length <= 6
        assert await seen_by(b) == data
        assert sum(1 for _ in hosts.rows(layout.EXTENT_PREFIX)) < 30

    with_two(test)


def test_what_is_not_committed_is_bounded() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"f")
        file = await a.mounted.open(b"f")
        a.store.paused = True
        taken = 0
        with trio.move_on_after(1):
            while True:
                await file.write(taken, b"x" * MIB)
                taken += MIB
        assert taken == WRITE_BEHIND_FILE_BYTES_MAX
        a.store.go_on()
        await file.flush()
        await file.release()

    with_two(test)


def test_the_error_of_a_commit_comes_with_the_next_call_of_each_open_file_once() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"f", b"old")
        displaced: list[int] = []
        a.tree.displaced = displaced.append  # type: ignore[assignment]
        one, other = await a.mounted.open(b"f"), await a.mounted.open(b"f")
        a.store.cut = True
        await one.write(0, b"new")
        await one.write(3, b"newer")
        with pytest.raises(errors.NoQuorum):
            await one.flush()
        await one.flush()
        with pytest.raises(errors.NoQuorum):
            await other.sync(False)
        a.store.go_on()
        assert displaced
        assert await one.read(0, 10) == b"old"
        await one.write(0, b"new")
        await one.flush()
        late = await a.mounted.open(b"f")
        await late.sync(False)
        for file in (one, other, late):
            await file.release()
        assert not a.tree.writes.failures

    with_two(test)


def test_a_write_after_a_failure_is_refused_once_and_nothing_behind_it_lands() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"f", b"old")
        file = await a.mounted.open(b"f")
        a.store.cut = True
        await file.write(0, b"1")
        await trio.sleep(20)
        a.store.go_on()
        with pytest.raises(errors.NoQuorum):
            await file.write(1, b"2")
        await file.write(2, b"3")
        await file.flush()
        await file.release()
        assert await seen_by(b) == b"ol3"

    with_two(test)


def test_without_a_word_at_close_a_write_itself_waits_and_tells_its_error() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"f", b"old")
        file = await a.mounted.open(b"f")
        a.store.cut = True
        with pytest.raises(errors.NoQuorum):
            await file.write(0, b"new")
        a.store.go_on()
        await file.write(0, b"NEW")
        assert await seen_by(b) == b"NEW"
        await file.sync(False)
        await file.release()

    with_two(test, early=False)


def test_a_write_beyond_the_largest_file_is_refused_at_once() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"f")
        file = await a.mounted.open(b"f")
        with pytest.raises(errors.TooLarge):
            await file.write(FILE_BYTES_MAX - 1, b"xx")
        await file.flush()
        await file.release()

    with_two(test)


def test_an_append_that_another_host_overtook_is_displaced() -> None:
    """The kernel has put the bytes into its pages where it believed the end to be."""

    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f", b"12345")).node
        await hosts.everywhere()
        displaced: list[int] = []
        a.tree.displaced = displaced.append  # type: ignore[assignment]
        mine = await a.mounted.open(b"f", os.O_WRONLY | os.O_APPEND)
        await mine.write(5, b"aaaaa")
        await mine.flush()
        assert displaced == []
        await hosts.everywhere()
        await b.mounted.append(b"f", b"bbbbb")
        await mine.write(10, b"ccccc")
        await mine.flush()
        assert displaced == [node]
        await mine.release()
        assert await seen_by(b) == b"12345aaaaabbbbbccccc"

    with_two(test)


def test_an_append_of_whole_pages_is_told_from_a_page_that_is_written_back() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f", b"1" * 4096)).node
        await hosts.everywhere()
        file = await a.tree.open(node, os.O_RDWR | os.O_APPEND, CALLER)
        await b.mounted.append(b"f", b"2" * 4096)
        await hosts.everywhere()
        await file.write(4096, b"3" * 4096, False)
        await file.flush()
        assert await whole(file) == b"1" * 4096 + b"2" * 4096 + b"3" * 4096
        await file.write(0, b"4" * 4096, True)
        await file.flush()
        assert (await whole(file))[:4097] == b"4" * 4096 + b"2"
        await file.release()

    with_two(test)


def test_an_append_that_the_kernel_has_cut_at_a_page_stays_whole() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"f", b"-" * 4000)
        await hosts.everywhere()
        file = await a.mounted.open(b"f", os.O_RDWR | os.O_APPEND)

        async def elsewhere() -> None:
            for _ in range(20):
                await b.mounted.append(b"f", b"b" * 10)

        async def here() -> None:
            await file.write(4000, b"a" * 96, False)
            await trio.sleep(0.0001)
            await file.write(4096, b"a" * 104, False)
            await file.flush()

        await together(here, elsewhere)
        await file.release()
        assert b"a" * 200 in await seen_by(b)

    with_two(test)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_writes_in_any_order_leave_what_the_last_of_them_left(seed: int) -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        random = hosts.random
        await a.mounted.create(b"f")
        file = await a.mounted.open(b"f")
        model = bytearray()
        for step in range(120):
            size = random.choice((1, 10, 3000, 17_000, 70_000))
            at = random.choice((len(model), random.randrange(len(model) + 100_000)))
            data = bytes([step % 251 + 1]) * size
            await file.write(at, data)
            if at > len(model):
                model.extend(bytes(at - len(model)))
            model[at : at + size] = data
            if random.random() < 0.05:
                size = random.randrange(len(model) + 1)
                await a.tree.setattr((await a.mounted.stat(b"f")).node, SetAttr(size=size), CALLER)
                del model[size:]
            if random.random() < 0.2:
                await trio.sleep(random.random() / 100)
        await file.flush()
        await file.release()
        assert await seen_by(b) == bytes(model)

    with_two(test, seed)


def test_nothing_is_held_for_writes_that_failed() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"f")
        file = await a.mounted.open(b"f")
        a.store.cut = True
        for n in range(6):
            await file.write(n * MIB, bytes([n]) * (MIB - n))
        with pytest.raises(errors.NoQuorum):
            await file.flush()
        assert not a.volume.pinned
        assert a.tree.writes.bytes == 0
        a.store.go_on()
        await file.release()

    with_two(test)


def test_writes_that_leave_much_behind_beside_them_take_as_many_transactions_as_they_need() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"f")
        model = bytearray()
        for n in range(40 * 4):  # extents of 60,000 bytes that small appends have made
            data = bytes([n]) * 15_000
            await a.tree.writer.write((await a.mounted.stat(b"f")).node, n * 15_000 + n // 4 * 10, data)
            model.extend(bytes(n * 15_000 + n // 4 * 10 - len(model)) + data)
        file = await a.mounted.open(b"f")
        length = len(hosts.log)
        for n in range(40):
            await file.write(n * 60_010 + 20_000, b"x" * 17_000)
            model[n * 60_010 + 20_000 : n * 60_010 + 37_000] = b"x" * 17_000
        await file.flush()
        await file.release()
        assert 2 < len(hosts.log) - length < 20
        assert await seen_by(b) == bytes(model)

    with_two(test)


def test_the_parts_of_an_append_that_the_kernel_has_cut_stay_together() -> None:
    """The second one may be some ms late on a busy machine; another host appends meanwhile."""

    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        await a.mounted.create(b"f", b"-" * 4000)
        await hosts.everywhere()
        mine = await a.mounted.open(b"f", os.O_RDWR | os.O_APPEND)
        theirs = await b.mounted.open(b"f", os.O_WRONLY | os.O_APPEND)
        await mine.write(4000, b"a" * 96, mapped=False)
        await trio.sleep(0.006)
        await theirs.write(4000, b"b" * 10)
        await theirs.flush()
        await mine.write(4096, b"a" * 30, mapped=False)
        await mine.flush()
        await mine.release()
        await theirs.release()
        assert (await seen_by(b))[4000:] in (b"a" * 126 + b"b" * 10, b"b" * 10 + b"a" * 126)

    with_two(test)


@pytest.mark.parametrize(
    ("start", "size", "waits"),
    [(0, 10, False), (10, 10, True), (5, 6, True), (19, 5, True), (20, 10, False), (35, 5, False),
     (36, 10, True), (60, 10, True)],
)  # fmt: skip
def test_who_reads_waits_for_what_it_reads(start: int, size: int, waits: bool) -> None:
    """Of 40 bytes, 10 to 20 are rewritten, and 50 to 55 written anew."""

    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f", b"-" * 40)).node
        file = await a.tree.open(node, os.O_RDWR, CALLER)
        a.store.paused = True
        await file.write(10, b"x" * 10)
        await file.write(50, b"y" * 5)
        with trio.move_on_after(1) as waited:
            early = await file.read(start, size)
        assert waited.cancelled_caught is waits
        a.store.go_on()
        expected = (b"-" * 10 + b"x" * 10 + b"-" * 20 + bytes(10) + b"y" * 5)[start : start + size]
        assert await file.read(start, size) == expected
        assert waits or early == expected
        await file.flush()
        await file.release()

    with_two(test)


def test_who_reads_does_not_wait_for_what_comes_behind() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f", b"-" * 40)).node
        file = await a.tree.open(node, os.O_RDWR, CALLER)
        await file.write(0, b"x")
        await trio.lowlevel.checkpoint()

        async def read() -> None:
            assert await file.read(0, 2) == b"x-"
            assert node in a.tree.writes.files  # what was written behind is under way

        async def write() -> None:
            for n in range(20):
                await file.write(20, b"%d" % n)
                await trio.sleep(0.001)

        assert await together(read, write) == [None, None]
        await file.flush()
        await file.release()

    with_two(test)


def test_who_reads_where_somebody_appends_waits() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f", b"-" * 40)).node
        file = await a.tree.open(node, os.O_RDWR | os.O_APPEND, CALLER)
        a.store.paused = True
        await file.write(40, b"x", mapped=False)
        with trio.move_on_after(1) as waited:
            await file.read(0, 10)
        assert waited.cancelled_caught
        a.store.go_on()
        await file.flush()
        await file.release()

    with_two(test)


def test_who_reads_waits_for_what_is_left_of_the_writes() -> None:
    async def test(hosts: Hosts, a: Host, b: Host) -> None:
        node = (await a.mounted.create(b"f", b"-" * 40)).node
        file = await a.tree.open(node, os.O_RDWR, CALLER)
        await file.write(0, b"x")
        await trio.lowlevel.checkpoint()  # it is on its way, alone
        await file.write(20, b"y")
        with trio.fail_after(5):
            while not a.tree.writes.files[node].done:  # noqa: ASYNC110 – virtual time costs nothing
                await trio.sleep(0.0001)
        assert await file.read(20, 1) == b"y"
        await file.flush()
        await file.release()

    with_two(test)
