"""What kv/ tells the kernel to drop when others change keys."""

import os

import pytest

from aspenfs import errors
from aspenfs.kv.types import delete, put
from aspenfs.vfs.tree import SetAttr, Touched
from tests.views.subject import KVSetup, run, whole


async def known(kv: KVSetup, *paths: bytes) -> list[int]:
    """Node ids of paths, which the kernel then knows."""
    return [(await kv.mounted.stat(path)).node for path in paths]


def entries(kv: KVSetup) -> set[tuple[int, bytes]]:
    """The entries that became stale since the last look."""
    found = {(touched.parent, touched.name) for touched in kv.stale if touched.parent is not None}
    kv.stale.clear()
    return found


def test_put_on_a_known_file_touches_its_data() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.mounted.create(b"f", b"1")
        await kv.store.txn([], [put(b"k/f", b"2")])
        assert kv.stale == [Touched((await known(kv, b"f"))[0], data=True)]

    run(test)


def test_own_changes_touch_nothing() -> None:
    async def test(kv: KVSetup) -> None:
        at = kv.mounted
        await at.mkdir(b"d")
        await at.create(b"d/f", b"1")
        await at.rename(b"d/f", b"d/g")
        await at.append(b"d/g", b"2")
        await at.unlink(b"d/g")
        await at.rmdir(b"d")
        assert kv.stale == []

    run(test)


def test_new_key_touches_its_entry_and_its_directory() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.mounted.mkdir(b"d")
        (directory,) = await known(kv, b"d")
        old = (await kv.mounted.stat(b"d")).mtime_ns
        await kv.store.txn([], [put(b"k/d/f", b"")])
        assert Touched(directory) in kv.stale
        assert entries(kv) == {(directory, b"f")}
        assert (await kv.mounted.stat(b"d")).mtime_ns >= old

    run(test)


def test_each_change_of_names_by_others_moves_the_time_of_their_directory_on() -> None:
    """Also while the clock stands, and behind times that somebody set: the kernel keeps listings by it."""

    async def test(kv: KVSetup) -> None:
        at = kv.mounted
        await at.mkdir(b"d")
        await kv.store.txn([], [put(b"k/implicit/f", b"")])
        ahead = kv.clock.now_ns + 10**9
        await at.set(b"d", SetAttr(mtime_ns=ahead))
        set_time = await at.stat(b"d")
        assert set_time.mtime_ns == ahead
        kv.clock.time_ns = lambda: kv.clock.now_ns  # type: ignore[method-assign]
        seen = {path: [(await at.stat(path)).mtime_ns] for path in (b"d", b"implicit", b"")}
        for key in (b"k/d/f", b"k/d/sub/f", b"k/implicit/g", b"k/implicit/sub/f", b"k/f"):
            for change in (put(key, b""), delete(key)):
                await kv.store.txn([], [change])
                path = b"/".join(key.split(b"/")[1:2]) if key.count(b"/") > 1 else b""
                seen[path].append((await at.stat(path)).mtime_ns)
        for path, times in seen.items():
            assert len(set(times)) == len(times), path
        await at.set(b"d", SetAttr(mtime_ns=7))
        assert (await at.stat(b"d")).mtime_ns == 7

    run(test)


def test_deleted_key_touches_its_entry_and_keeps_what_is_open() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.mounted.create(b"f", b"last words")
        (node,) = await known(kv, b"f")
        file = await kv.mounted.open(b"f", os.O_RDONLY)
        await kv.store.txn([], [delete(b"k/f")])
        assert Touched(node) in kv.stale
        assert entries(kv) == {(kv.tree.root, b"f")}
        assert await whole(file) == b"last words"
        assert (await kv.tree.getattr(node)).nlink == 0

    run(test)


def test_directories_that_appear_and_vanish_with_a_key_are_touched() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/a/b/c", b"")])
        assert entries(kv) == {(kv.tree.root, b"a")}
        a, b = await known(kv, b"a", b"a/b")
        await kv.store.txn([], [delete(b"k/a/b/c")])
        assert entries(kv) == {(kv.tree.root, b"a"), (a, b"b"), (b, b"c")}
        with pytest.raises(errors.NotFound):
            await kv.tree.getattr(a)
        await kv.store.txn([], [put(b"k/a/x", b"")])
        assert (kv.tree.root, b"a") in entries(kv)
        assert await known(kv, b"a") == [a]

    run(test)


def test_directories_that_stay_are_never_touched_as_entries() -> None:
    """Or every process in them would find its working directory deleted."""

    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/a/b/c", b"")])
        _, b = await known(kv, b"a", b"a/b")
        entries(kv)
        await kv.store.txn([], [put(b"k/a/b/d", b"")])
        assert entries(kv) == {(b, b"d")}
        await kv.store.txn([], [delete(b"k/a/b/c")])
        assert entries(kv) == {(b, b"c")}
        await kv.store.txn([], [put(b"k/a/b", b"own key")])
        assert entries(kv) == {(b, b"%value")}
        await kv.store.txn([], [put(b"k/a/b", b"changed")])
        assert entries(kv) == set()
        await kv.store.txn([], [delete(b"k/a/b")])
        assert entries(kv) == {(b, b"%value")}

    run(test)


def test_file_that_becomes_a_directory_and_back_is_touched_each_time() -> None:
    async def test(kv: KVSetup) -> None:
        root = kv.tree.root
        await kv.mounted.create(b"a", b"own")
        await kv.store.txn([], [put(b"k/a/b", b"")])
        assert entries(kv) == {(root, b"a")}
        await known(kv, b"a/b")
        await kv.store.txn([], [delete(b"k/a/b")])
        assert (root, b"a") in entries(kv)
        assert await kv.mounted.read(b"a") == b"own"
        await kv.store.txn([], [put(b"k/a/c", b"")])
        assert (root, b"a") in entries(kv)

    run(test)


def test_directory_turned_into_a_file_by_one_transaction_is_touched() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/a/b", b"")])
        await known(kv, b"a", b"a/b")
        entries(kv)
        await kv.store.txn([], [put(b"k/a", b""), delete(b"k/a/b")])
        assert (kv.tree.root, b"a") in entries(kv)

    run(test)


def test_below_an_unknown_directory_nothing_is_touched_but_its_entry() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/a/b/c/d", b"")])
        assert kv.stale == [Touched(parent=kv.tree.root, name=b"a")]

    run(test)


def test_marker_of_others_touches_its_entry_and_attributes() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"d/new/", b"")])
        assert entries(kv) == {(kv.tree.root, b"new")}
        (node,) = await known(kv, b"new")
        await kv.store.txn([], [put(b"d/new/", b"", 0, {"mode": 0o700})])
        assert kv.stale == [Touched(node)]
        await kv.store.txn([], [delete(b"d/new/")])
        assert (kv.tree.root, b"new") in entries(kv)

    run(test)


def test_key_put_again_is_another_file_to_those_who_have_the_old_one_open() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.mounted.create(b"f", b"old")
        (node,) = await known(kv, b"f")
        file = await kv.mounted.open(b"f", os.O_RDONLY)
        await kv.store.txn([], [delete(b"k/f")])
        await kv.store.txn([], [put(b"k/f", b"new")])
        assert await whole(file) == b"old"
        assert await known(kv, b"f") != [node]

    run(test)


def test_key_that_turns_into_a_symlink_is_another_node() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.mounted.create(b"f", b"target")
        (node,) = await known(kv, b"f")
        await kv.store.txn([], [put(b"k/f", b"target", 0, {"type": "symlink"})])
        assert (kv.tree.root, b"f") in entries(kv)
        (link,) = await known(kv, b"f")
        assert link != node
        assert await kv.tree.readlink(link) == b"target"

    run(test)


def test_keys_of_other_keyspaces_touch_nothing() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"f/x", b""), put(b"c/x", b"")])
        assert kv.stale == []

    run(test)
