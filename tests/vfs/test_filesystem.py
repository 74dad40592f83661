"""Inode numbers, lookup counts and handles, over real trees in memory."""

import sys
from collections.abc import Sequence

import pytest
import trio

from aspenfs import errors
from aspenfs.kv.types import Event, put
from aspenfs.runtime.system import SystemClock
from aspenfs.vfs.coherence import Alone, Coherence
from aspenfs.vfs.filesystem import KNOWN_KEPT, ROOT_INODE, FileSystem
from aspenfs.vfs.tree import SetAttr
from aspenfs.views.kv import KVTree
from tests.filesystem.volumes import CALLER, Setup, run
from tests.vfs.notices import Noted


def test_forget_reaches_the_tree_only_when_no_handle_is_open() -> None:
    async def test(setup: Setup) -> None:
        forgotten: list[int] = []
        setup.tree.forgotten = forgotten.append  # type: ignore[assignment]
        fs = FileSystem([setup.tree], 1)
        files, _, _ = await fs.lookup(ROOT_INODE, b"files")
        fh, _, _, ino, _, attr = await fs.create(files, b"f", 0o644, 2, CALLER)
        await fs.lookup(files, b"f")
        fs.forget(ino, 1)
        assert fs.known[ino] == 1
        fs.forget(ino, 1)
        assert ino not in fs.known
        assert forgotten == []
        await fs.release(fh)
        assert forgotten == [attr.node]

    run(test)


def test_the_root_lists_the_trees_and_gives_them_numbers_of_their_own() -> None:
    async def test(setup: Setup) -> None:
        fs = FileSystem([setup.tree], 1)
        assert [name for name, _ in await fs.names(ROOT_INODE, 0, 10)] == [b"files"]
        ((ino, tree, _),) = await fs.listed(ROOT_INODE, [b"files"])  # type: ignore[misc]
        assert (ino, tree) == ((1 << 48) | 1, setup.tree)
        assert ino not in fs.known, "an entry that was not sent is no lookup"
        assert (await fs.dots(ROOT_INODE))[1][0] == ROOT_INODE
        with pytest.raises(errors.ReadOnly):
            await fs.mkdir(ROOT_INODE, b"x", 0o755, CALLER)

    run(test)


def test_a_subtree_mount_has_its_directory_as_inode_1() -> None:
    async def test(setup: Setup) -> None:
        await setup.tree.mkdir(1, b"srv", 0o755, CALLER)
        below = (await setup.tree.mkdir((await setup.tree.lookup(1, b"srv")).node, b"in", 0o755, CALLER)).node
        fs = FileSystem([setup.tree], 1)
        await fs.use_subtree(b"/files/srv")
        ino, _, attr = await fs.lookup(ROOT_INODE, b"in")
        assert attr.node == below
        assert [entry[0] for entry in await fs.dots(ino)] == [ino, ROOT_INODE]
        for path, error in ((b"/none", errors.NotFound), (b"/files/none", errors.NotFound)):
            with pytest.raises(error):
                await FileSystem([setup.tree], 1).use_subtree(path)

    run(test)


def test_links_and_renames_do_not_cross_trees() -> None:
    async def test(setup: Setup) -> None:
        other = Setup()
        await other.volume.format()
        other.tree.name = "other"
        fs = FileSystem([setup.tree, other.tree], 1)
        files, _, _ = await fs.lookup(ROOT_INODE, b"files")
        elsewhere, _, _ = await fs.lookup(ROOT_INODE, b"other")
        ino, _, _ = await fs.symlink(files, b"l", b"t", CALLER)
        with pytest.raises(errors.CrossTree):
            await fs.link(ino, elsewhere, b"l")
        with pytest.raises(errors.CrossTree):
            await fs.rename(files, b"l", elsewhere, b"l", 0)

    run(test)


def test_a_handle_that_is_not_there_is_EBADF() -> None:
    async def main() -> None:
        fs = FileSystem([Setup().tree], 1)
        with pytest.raises(errors.BadHandle):
            fs.file(7)
        await fs.release(7)

    trio.run(main)


def test_names_and_opens_wait_for_the_barrier() -> None:
    async def test(setup: Setup) -> None:
        waits: list[None] = []

        class Store(Alone):
            async def barrier(self) -> int:
                waits.append(None)
                return 0

        fs = FileSystem([setup.tree], 1, Coherence(Store()))
        files, _, _ = await fs.lookup(ROOT_INODE, b"files")
        _, _, _, ino, _, _ = await fs.create(files, b"f", 0o644, 2, CALLER)
        before = len(waits)
        await fs.lookup(files, b"f")
        await fs.open(ino, 0, CALLER)
        await fs.opendir(files)
        assert len(waits) == before + 3

    run(test)


def test_values_and_directories_of_kv_that_others_change_are_told() -> None:
    async def test(setup: Setup) -> None:
        here, elsewhere = (KVTree(setup.store, SystemClock()) for _ in range(2))
        noted = Noted()
        fs = FileSystem([here], 1, Coherence(notices=noted))
        await elsewhere.mkdir(elsewhere.root, b"d", 0o755, CALLER)
        await setup.store.txn([], [put(b"k/v", b"1")])
        kv, _, _ = await fs.lookup(ROOT_INODE, b"kv")
        directory, value = [(await fs.lookup(kv, name))[0] for name in (b"d", b"v")]
        setup.store.observe(lambda _, events, by: fs.noticed(events, own=False), fs.keyspaces)
        node = (await elsewhere.lookup(elsewhere.root, b"d")).node
        await elsewhere.setattr(node, SetAttr(mode=0o700), CALLER)
        assert directory in [ino for ino, _ in noted.inodes]
        await setup.store.txn([], [put(b"k/v", b"2")])
        assert (value, True) in noted.inodes

    run(test)


def test_a_name_that_others_change_makes_the_listing_of_its_directory_stale() -> None:
    async def test(setup: Setup) -> None:
        await setup.tree.mkdir(1, b"srv", 0o755, CALLER)
        noted = Noted(), Noted()
        whole, part = (FileSystem([setup.tree], 1, Coherence(notices=notices)) for notices in noted)
        for fs in (whole, part):
            fs.coherence.opendir_unasked = True
        await part.use_subtree(b"/files/srv")
        srv, _, _ = await whole.lookup((await whole.lookup(ROOT_INODE, b"files"))[0], b"srv")

        def observe(revision: int, events: Sequence[Event], origin: object) -> None:
            for fs in (whole, part):
                fs.noticed(events, own=False)

        setup.store.observe(observe)
        await setup.tree.symlink((await setup.tree.lookup(1, b"srv")).node, b"new", b"target", CALLER)
        assert (srv, True) in noted[0].inodes
        assert whole.knows(srv)
        assert (ROOT_INODE, True) in noted[1].inodes
        assert part.knows(ROOT_INODE), "which nobody looks up"
        assert not part.knows(srv)

    run(test)


def test_listings_are_kept_by_the_kernel_of_a_node_alone() -> None:
    async def test(setup: Setup) -> None:
        store = Alone()
        fs = FileSystem([setup.tree], 1, Coherence(store))
        position = (await fs.names(ROOT_INODE, 0, 10))[-1][1]
        assert fs.ended(ROOT_INODE, position)
        store.alone = False
        assert (await fs.names(ROOT_INODE, 0, 10))[-1][1] == position
        assert not fs.ended(ROOT_INODE, position)

    run(test)


def test_what_the_kernel_forgets_takes_no_memory() -> None:
    fs = FileSystem([Setup().tree], 1)
    inodes = range(1 << 48, (1 << 48) + 3 * KNOWN_KEPT)
    for ino in inodes:
        fs.remember(ino)
    most = sys.getsizeof(fs.known)
    for ino in inodes[:-10]:
        fs.forget(ino, 1)
    assert list(fs.known) == list(inodes[-10:])
    assert sys.getsizeof(fs.known) < most // 3
