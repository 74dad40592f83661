"""files/ from several hosts at once: whoever comes first, the tree is one that some order explains."""

import os
from collections.abc import Awaitable, Callable

import pytest
import trio

from aspenfs import errors
from aspenfs.filesystem import acl
from aspenfs.vfs.tree import SetAttr, Usage
from aspenfs.views.files import FilesTree
from tests.coherence.hosts import Hosts, run, together
from tests.filesystem.volumes import CALLER
from tests.views.subject import Mounted, whole

SEEDS = range(20)
DEFAULT_ACL = acl.pack([acl.AclEntry(1, 6, 0), acl.AclEntry(4, 0, 0), acl.AclEntry(32, 0, 0)])


class Trees:
    """files/ on a few hosts, by paths."""

    def __init__(self, hosts: Hosts, count: int = 3) -> None:
        self.volumes = [hosts.volume(node_id) for node_id in range(1, count + 1)]
        self.trees = [FilesTree(volume, lambda: Usage(4096, 100, 50, 0, 0)) for volume in self.volumes]
        self.hosts = [Mounted(tree) for tree in self.trees]

    async def everywhere(self) -> None:
        """Returns when every host has applied all that is agreed."""
        for volume in self.volumes:
            await volume.store.barrier()


def racing(test: Callable[[Trees], Awaitable[None]], seed: int, count: int = 3) -> None:
    async def main(hosts: Hosts) -> None:
        trees = Trees(hosts, count)
        await trees.volumes[0].format()
        await trees.everywhere()
        await test(trees)
        for tree in trees.trees:
            while await tree.reap():
                pass

    run(main, seed)


def outcomes(results: list[object]) -> tuple[int, set[type]]:
    """How many succeeded, and the errors of the others."""
    failures = [result for result in results if isinstance(result, errors.AspenError)]
    return len(results) - len(failures), {type(failure) for failure in failures}


@pytest.mark.parametrize("seed", SEEDS)
def test_an_exclusive_create_succeeds_on_one_host_only(seed: int) -> None:
    async def test(trees: Trees) -> None:
        a, b, c = trees.hosts
        results = await together(*(lambda host=host: host.create(b"f") for host in (a, b, c)))
        assert outcomes(results) == (1, {errors.AlreadyExists})
        await trees.everywhere()
        (made,) = [result for result in results if not isinstance(result, errors.AspenError)]
        assert [(await host.stat(b"f")).node for host in (a, b, c)] == [made.node] * 3

    racing(test, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_mkdir_of_one_name_succeeds_on_one_host_only(seed: int) -> None:
    async def test(trees: Trees) -> None:
        results = await together(*(lambda host=host: host.mkdir(b"d") for host in trees.hosts))
        assert outcomes(results) == (1, {errors.AlreadyExists})

    racing(test, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_directory_does_not_go_while_a_name_comes_into_it(seed: int) -> None:
    async def test(trees: Trees) -> None:
        a, b, _ = trees.hosts
        await a.mkdir(b"d")
        await trees.everywhere()
        removed, made = await together(lambda: a.rmdir(b"d"), lambda: b.create(b"d/f"))
        assert isinstance(removed, errors.DirectoryNotEmpty) != isinstance(made, errors.NotFound)
        await trees.everywhere()
        assert await b.exists(b"d") is isinstance(removed, errors.DirectoryNotEmpty)

    racing(test, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_two_renames_that_would_make_a_loop_do_not_both_succeed(seed: int) -> None:
    async def test(trees: Trees) -> None:
        a, b, _ = trees.hosts
        for path in (b"x", b"y", b"x/1", b"y/1"):
            await a.mkdir(path)
        await trees.everywhere()
        results = await together(lambda: a.rename(b"x", b"y/1/x"), lambda: b.rename(b"y", b"x/1/y"))
        assert outcomes(results) == (1, {errors.InvalidArgument})

    racing(test, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_three_renames_in_a_ring_make_no_loop(seed: int) -> None:
    async def test(trees: Trees) -> None:
        a, b, c = trees.hosts
        for path in (b"x", b"y", b"z"):
            await a.mkdir(path)
        await trees.everywhere()
        results = await together(
            lambda: a.rename(b"x", b"y/x"), lambda: b.rename(b"y", b"z/y"), lambda: c.rename(b"z", b"x/z")
        )
        assert outcomes(results)[0] in (1, 2)  # the third sees itself below what it would go into, or no name

    racing(test, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_name_is_renamed_away_by_one_host_only(seed: int) -> None:
    async def test(trees: Trees) -> None:
        a, b, c = trees.hosts
        await a.create(b"f", b"data")
        await trees.everywhere()
        results = await together(
            lambda: a.rename(b"f", b"a"), lambda: b.rename(b"f", b"b"), lambda: c.unlink(b"f")
        )
        assert outcomes(results) == (1, {errors.NotFound})

    racing(test, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_links_are_counted_whoever_makes_and_removes_them(seed: int) -> None:
    async def test(trees: Trees) -> None:
        a, b, c = trees.hosts
        await a.create(b"f", b"data")
        await a.link(b"f", b"g")
        await trees.everywhere()
        results = await together(
            lambda: a.link(b"f", b"h"),
            lambda: b.link(b"f", b"h"),
            lambda: c.link(b"f", b"i"),
            lambda: b.unlink(b"g"),
            lambda: c.unlink(b"g"),
        )
        assert outcomes(results) == (3, {errors.AlreadyExists, errors.NotFound})
        await trees.everywhere()
        assert [(await host.stat(b"f")).nlink for host in trees.hosts] == [3] * 3

    racing(test, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_appends_from_several_hosts_overwrite_nothing(seed: int) -> None:
    async def test(trees: Trees) -> None:
        await trees.hosts[0].create(b"log")
        await trees.everywhere()

        async def appending(at: int, size: int) -> None:
            host = trees.hosts[at]
            file = await host.open(b"log", os.O_WRONLY | os.O_APPEND)
            for number in range(5):
                # The offset is what the kernel believes: of this host, and old.
                await file.write(0, piece(at, number, size))
            await file.release()

        def piece(at: int, number: int, size: int) -> bytes:
            return (b"%d.%d" % (at, number)).ljust(size - 1, b"-") + b"\n"

        sizes = (20, 40, 20_000)
        await together(*(lambda at=at: appending(at, sizes[at]) for at in range(3)))
        await trees.everywhere()
        data = await trees.hosts[1].read(b"log")
        lines = data.splitlines(keepends=True)
        assert sorted(lines) == sorted(piece(at, n, size) for at, size in enumerate(sizes) for n in range(5))

    racing(test, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_writes_to_one_file_from_several_hosts_all_land(seed: int) -> None:
    async def test(trees: Trees) -> None:
        await trees.hosts[0].create(b"f", b"." * 90_000)
        await trees.everywhere()

        async def writing(at: int) -> None:
            file = await trees.hosts[at].open(b"f")
            for number in range(10):
                size = (700, 17_000, 40_000)[(at + number) % 3]
                await file.write(at * 130_000 + number * 9_000, bytes([65 + at]) * size)
            await file.release()

        await together(*(lambda at=at: writing(at) for at in range(3)))
        await trees.everywhere()
        data = [await host.read(b"f") for host in trees.hosts]
        assert data[0] == data[1] == data[2]
        for at in range(3):
            assert data[0][at * 130_000 : at * 130_000 + 700] == bytes([65 + at]) * 700

    racing(test, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_modes_and_times_set_at_once_are_those_of_one(seed: int) -> None:
    async def test(trees: Trees) -> None:
        await trees.hosts[0].create(b"f")
        await trees.everywhere()
        await together(*(
            lambda at=at, host=host: host.set(b"f", SetAttr(mode=0o600 + at, uid=at, size=at))
            for at, host in enumerate(trees.hosts)
        ))  # fmt: skip
        await trees.everywhere()
        attrs = [await host.stat(b"f") for host in trees.hosts]
        assert attrs[0] == attrs[1] == attrs[2]

    racing(test, seed)


def test_two_tasks_that_reserve_ids_at_once_never_give_one_twice() -> None:
    async def test(trees: Trees) -> None:
        async def some(host: Mounted, prefix: bytes) -> list[int]:
            return [(await host.create(b"%s%d" % (prefix, n))).node for n in range(5)]

        work = [
            lambda h=h, at=b"%d-%d-" % (i, p): some(h, at)
            for i, h in enumerate(trees.hosts)
            for p in range(4)
        ]
        found = [node for nodes in await together(*work) for node in nodes]
        assert len(set(found)) == len(found) == 60

    racing(test, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_truncation_and_a_write_of_another_host_leave_one_of_both_orders(seed: int) -> None:
    async def test(trees: Trees) -> None:
        a, b, _ = trees.hosts
        await a.create(b"f", b"x" * 50_000)
        await trees.everywhere()
        writer = await b.open(b"f")
        await together(lambda: a.set(b"f", SetAttr(size=10)), lambda: writer.write(40_000, b"y" * 30_000))
        await writer.release()
        await trees.everywhere()
        data = await a.read(b"f")
        written_last = b"x" * 10 + b"\0" * 39_990 + b"y" * 30_000
        assert data in (b"x" * 10, written_last)

    racing(test, seed)


@pytest.mark.parametrize("how", ["mode", "acl"])
def test_a_set_group_id_bit_or_default_acl_that_came_before_a_create_is_inherited(how: str) -> None:
    async def test(trees: Trees) -> None:
        a, b, _ = trees.hosts
        directory = await a.mkdir(b"d")
        await trees.everywhere()
        await b.create(b"d/first")  # so that it has inode numbers
        await trees.everywhere()
        trees.volumes[1].store.paused = True  # type: ignore[attr-defined]
        if how == "mode":
            await a.set(b"d", SetAttr(gid=77, mode=0o2775))
        else:
            await trees.trees[0].setxattr(directory.node, acl.DEFAULT, DEFAULT_ACL)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trees.trees[1].create, directory.node, b"f", 0o644, os.O_RDWR, CALLER)
            await trio.sleep(0.1)
            trees.volumes[1].store.paused = False  # type: ignore[attr-defined]
            trees.volumes[1].store.hosts.tell()  # type: ignore[attr-defined]
        attr = await b.stat(b"d/f")
        assert (attr.gid if how == "mode" else attr.mode & 0o777) == (77 if how == "mode" else 0o600)

    racing(test, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_extended_attributes_set_at_once_stay_within_their_bounds(seed: int) -> None:
    async def test(trees: Trees) -> None:
        attr = await trees.hosts[0].create(b"f")
        await trees.everywhere()
        work = [
            lambda tree=tree, name=b"user.%d-%d" % (i, n): tree.setxattr(attr.node, name, b"v" * 60_000)
            for i, tree in enumerate(trees.trees)
            for n in range(8)
        ]
        results = await together(*work)
        await trees.everywhere()
        kept = await trees.trees[0].listxattr(attr.node)
        assert len(kept) == 17  # a MiB in all
        assert outcomes(results) == (17, {errors.NoSpace})

    racing(test, seed)


async def read_all(host: Mounted, path: bytes) -> bytes:
    return await whole(await host.open(path, os.O_RDONLY))
