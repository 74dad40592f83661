"""Names, links, renames and the end of inodes, on the domain itself."""

import random
import stat

import pytest

from aspenfs import errors
from aspenfs.filesystem import layout
from aspenfs.filesystem.volume import Volume
from aspenfs.kv.types import add, delete, merge, put
from aspenfs.vfs.listings import Listings
from aspenfs.vfs.tree import SetAttr
from aspenfs.views.files import FilesTree
from tests.filesystem.volumes import CALLER, Setup, run

NOREPLACE, EXCHANGE = 1, 2


async def names(setup: Setup, node: int = 1) -> list[bytes]:
    return list(setup.tree.list_names(node, None, 100)[0])


def test_directories_count_their_subdirectories_and_entries() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        top = (await tree.mkdir(1, b"top", 0o755, CALLER)).node
        await tree.mkdir(top, b"a", 0o755, CALLER)
        await tree.mknod(top, b"pipe", stat.S_IFIFO | 0o600, 0, CALLER)
        attr = await tree.getattr(top)
        assert (attr.nlink, attr.size) == (3, 2)
        await tree.rmdir(top, b"a")
        await tree.unlink(top, b"pipe")
        assert ((await tree.getattr(top)).nlink, (await tree.getattr(1)).nlink) == (2, 3)

    run(test)


def test_a_directory_cannot_move_below_itself() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        a = (await tree.mkdir(1, b"a", 0o755, CALLER)).node
        b = (await tree.mkdir(a, b"b", 0o755, CALLER)).node
        for parent in (a, b):
            with pytest.raises(errors.InvalidArgument):
                await tree.rename(1, b"a", parent, b"x", 0)
        with pytest.raises(errors.InvalidArgument):
            await tree.rename(1, b"a", a, b"b", EXCHANGE)

    run(test)


def test_rename_replaces_only_like_with_like() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        await tree.mkdir(1, b"dir", 0o755, CALLER)
        full = (await tree.mkdir(1, b"full", 0o755, CALLER)).node
        await tree.symlink(full, b"x", b"y", CALLER)
        await tree.symlink(1, b"link", b"y", CALLER)
        for source, target, error in (
            (b"dir", b"link", errors.NotADirectory),
            (b"link", b"dir", errors.IsADirectory),
            (b"dir", b"full", errors.DirectoryNotEmpty),
            (b"none", b"dir", errors.NotFound),
        ):
            with pytest.raises(error):
                await tree.rename(1, source, 1, target, 0)
        with pytest.raises(errors.AlreadyExists):
            await tree.rename(1, b"dir", 1, b"full", NOREPLACE)
        with pytest.raises(errors.NotFound):
            await tree.rename(1, b"dir", 1, b"none", EXCHANGE)
        await tree.rename(1, b"full", 1, b"dir", 0)
        assert await names(setup) == [b"dir", b"link"]

    run(test)


def test_exchange_between_directories_keeps_counts_and_parents() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        one = (await tree.mkdir(1, b"one", 0o755, CALLER)).node
        two = (await tree.mkdir(1, b"two", 0o755, CALLER)).node
        await tree.mkdir(one, b"d", 0o755, CALLER)
        await tree.symlink(two, b"l", b"t", CALLER)
        await tree.rename(one, b"d", two, b"l", EXCHANGE)
        assert stat.S_ISLNK((await tree.lookup(one, b"d")).mode)
        assert ((await tree.getattr(one)).nlink, (await tree.getattr(two)).nlink) == (2, 3)

    run(test)


def test_names_of_one_inode_renamed_onto_each_other_both_stay() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        node = (await tree.symlink(1, b"a", b"t", CALLER)).node
        await tree.link(node, 1, b"b")
        await tree.rename(1, b"a", 1, b"b", 0)
        assert await names(setup) == [b"a", b"b"]

    run(test)


def test_an_open_file_outlives_its_name_and_goes_with_the_last_close() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        attr, handle = await tree.create(1, b"f", 0o644, 2, CALLER)
        await handle.write(0, b"x" * 100_000)
        await tree.unlink(1, b"f")
        assert bytes(await handle.read(0, 10)) == b"x" * 10
        await handle.write(100_000, b"more")
        assert (await tree.getattr(attr.node)).nlink == 0
        assert setup.problems() == []
        await handle.release()
        assert await tree.reap() == 1
        with pytest.raises(errors.NotFound):
            await tree.getattr(attr.node)
        assert setup.volume.inode_count() == 1

    run(test)


def test_an_orphan_of_a_killed_daemon_is_reaped_at_the_next_start() -> None:
    async def test(setup: Setup) -> None:
        _, handle = await setup.tree.create(1, b"f", 0o644, 2, CALLER)
        await handle.write(0, b"x" * 100)
        await setup.tree.unlink(1, b"f")
        volume = Volume(setup.store, setup.blobs, setup.clock)
        again = FilesTree(volume, setup.tree.usage)
        assert again.orphans.recover() == 1
        assert await again.reap() == 1
        assert volume.inode_count() == 1
        with pytest.raises(errors.Stale):
            await handle.write(0, b"late")

    run(test)


def test_an_inode_without_a_row_is_shown_until_the_kernel_forgets_it() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        node = (await tree.mkdir(1, b"cwd", 0o755, CALLER)).node
        await tree.rmdir(1, b"cwd")
        assert (await tree.getattr(node)).nlink == 0
        with pytest.raises(errors.NotFound):
            await tree.mkdir(node, b"x", 0o755, CALLER)
        assert (await tree.setattr(node, SetAttr(mode=0o700), CALLER)).mode == stat.S_IFDIR | 0o700
        assert (await tree.getattr(node)).mode == stat.S_IFDIR | 0o700
        tree.forgotten(node)
        with pytest.raises(errors.NotFound):
            await tree.getattr(node)

    run(test)


def test_setgid_directories_hand_on_their_group() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        shared = (await tree.mkdir(1, b"shared", 0o2775, CALLER)).node
        await tree.setattr(shared, SetAttr(gid=77), CALLER)
        below = await tree.mkdir(shared, b"below", 0o755, CALLER)
        plain, _ = await tree.create(shared, b"file", 0o644, 2, CALLER)
        assert (below.gid, below.mode & 0o7777, plain.gid, plain.mode & 0o7777) == (77, 0o2755, 77, 0o644)

    run(test)


def test_listing_gives_what_stays_exactly_once_while_names_come_and_go() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        staying = [b"s%05d" % i for i in range(2000)]
        for name in staying:
            await tree.symlink(1, name, b"t", CALLER)
        noise = random.Random(7)
        listings = Listings()
        seen: list[bytes] = []
        coming: list[bytes] = []
        cookie = count = 0
        while batch := await listings.after(tree, 1, cookie, 50):
            taken = batch[: noise.randrange(1, 51)]  # the kernel's buffer may hold fewer
            seen += [name for name, _ in taken]
            cookie = taken[-1][1]
            for _ in range(20):
                count += 1
                coming.append(b"s%05dx%d" % (noise.randrange(2000), count))
                await tree.symlink(1, coming[-1], b"t", CALLER)
            await tree.unlink(1, coming.pop(noise.randrange(len(coming))))
        assert sorted(name for name in seen if b"x" not in name) == staying
        assert len(set(seen)) == len(seen)

    run(test)


def test_relatime_moves_atime_in_memory_and_writes_it_later() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        attr, handle = await tree.create(1, b"f", 0o644, 2, CALLER)
        await handle.write(0, b"data")
        before = setup.store.revision
        await handle.read(0, 4)
        moved = (await tree.getattr(attr.node)).atime_ns
        assert moved > attr.atime_ns
        await handle.read(0, 4)
        assert (await tree.getattr(attr.node)).atime_ns == moved, "newer than the change: it stays"
        assert setup.store.revision == before, "reading commits nothing"
        await tree.flush_atimes()
        assert setup.volume.inode(attr.node).atime == moved

    run(test)


def test_extended_attributes_come_back_and_go_with_the_inode() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        node = (await tree.symlink(1, b"f", b"t", CALLER)).node
        with pytest.raises(errors.NoAttribute):
            await tree.getxattr(node, b"user.a")
        await tree.setxattr(node, b"user.a", b"\0value")
        await tree.setxattr(node, b"trusted.b", b"")
        assert await tree.getxattr(node, b"user.a") == b"\0value"
        assert list(await tree.listxattr(node)) == [b"trusted.b", b"user.a"]
        await tree.removexattr(node, b"user.a")
        with pytest.raises(errors.NoAttribute):
            await tree.removexattr(node, b"user.a")
        with pytest.raises(errors.NotSupported):
            await tree.setxattr(node, b"system.x", b"")
        await tree.unlink(1, b"f")
        assert not list(setup.store.scan(layout.XATTR_PREFIX, b"f/y"))

    run(test)


def test_two_hosts_do_not_give_the_same_inode_id() -> None:
    async def test(setup: Setup) -> None:
        other = Volume(setup.store, setup.blobs, setup.clock)
        ids = [await volume.new_id() for _ in range(5000) for volume in (setup.volume, other)]
        assert len(set(ids)) == len(ids)

    run(test)


def test_the_check_finds_and_mends_what_is_broken() -> None:
    async def test(setup: Setup) -> None:
        tree, store = setup.tree, setup.store
        top = (await tree.mkdir(1, b"top", 0o755, CALLER)).node
        attr, handle = await tree.create(top, b"f", 0o644, 2, CALLER)
        await handle.write(0, b"x" * 50_000)
        await handle.release()
        damage = [
            merge(layout.inode_key(top), add(layout.NLINK, 5)),
            merge(layout.inode_key(attr.node), add(layout.ALLOCATED, 512)),
            put(layout.dirent_key(top, b"ghost"), layout.DIRENT.pack(999, 8)),
            delete(layout.dirent_key(top, b"f")),
            merge(layout.USAGE_KEY, add(0, 3)),
            put(layout.extent_key(998, 0), b"\0stray"),
            put(layout.orphan_key(997), b""),
        ]
        await store.txn([], damage)
        found = {problem.where for problem in setup.problems()}
        assert {"/top", "/top/ghost", f"inode {attr.node}", "usage", "inode 998", "orphan 997"} <= found
        for _ in range(4):
            for problem in setup.problems():
                assert problem.mend is not None
                await store.txn([], problem.mend)
        assert setup.problems() == []
        home = (await tree.lookup(1, b"lost+found")).node
        assert await names(setup, home) == [b"#%d" % attr.node]

    run(test)


def test_a_replaced_file_that_the_kernel_knows_can_still_be_opened() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        known: set[int] = set()
        tree.is_known = known.__contains__  # type: ignore[assignment]
        old, handle = await tree.create(1, b"f", 0o644, 2, CALLER)
        await handle.write(0, b"old")
        await handle.release()
        known.add(old.node)
        await tree.mknod(1, b"new", stat.S_IFREG | 0o644, 0, CALLER)
        await tree.rename(1, b"new", 1, b"f", 0)
        late = await tree.open(old.node, 0, CALLER)  # looked up before the rename, opened after it
        assert bytes(await late.read(0, 10)) == b"old"
        await late.release()
        assert await tree.reap() == 0
        known.discard(old.node)
        tree.forgotten(old.node)
        assert await tree.reap() == 1
        assert setup.volume.inode_count() == 2

    run(test)
