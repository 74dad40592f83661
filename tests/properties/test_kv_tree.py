"""Whatever keys the store holds, a walk through kv/ finds each of them once, and nothing else."""

import stat

from hypothesis import given, settings
from hypothesis import strategies as st

from aspenfs.kv.types import delete, put
from aspenfs.limits import KEY_BYTES_MAX
from aspenfs.views.kv_paths import key_of, path_of
from tests.properties.test_kv_paths import keys
from tests.views.subject import KVSetup, Mounted, run

short = st.lists(st.sampled_from([b"/", b"a", b"a", b"b", b"-", b".", b"%", b"\0", b"0", b"\xff"]),
                 min_size=1, max_size=5).map(b"".join)
key_sets = st.sets(st.one_of(short, keys), min_size=1, max_size=12)


async def walk(at: Mounted, names: tuple[bytes, ...], node: int) -> dict[tuple[bytes, ...], bytes]:
    """Path and content of every file below; a lookup of each name that is listed finds it."""
    found: dict[tuple[bytes, ...], bytes] = {}
    cookie, seen = 0, set()
    while batch := await at.after(node, cookie, 3):
        cookie = batch[-1][1]
        for name, _ in batch:
            assert name not in seen
            seen.add(name)
            attr = await at.tree.lookup(node, name)
            if stat.S_ISDIR(attr.mode):
                found |= await walk(at, (*names, name), attr.node)
            else:
                file = await at.tree.open(attr.node, 0, USER)
                found[*names, name] = await file.read(0, 4096)
    return found


class User:
    uid = gid = pid = umask = 0


USER = User()


def is_directory(key: bytes, others: set[bytes]) -> bool:
    return len(key) < KEY_BYTES_MAX and any(other.startswith(key + b"/") for other in others)


@settings(max_examples=100, deadline=None)
@given(key_sets)
def test_walk_finds_every_key_once_under_its_path(some: set[bytes]) -> None:
    async def test(kv: KVSetup) -> None:
        for key in some:
            await kv.store.txn([], [put(b"k/" + key, key)])
        found = await walk(kv.mounted, (), kv.tree.root)
        assert sorted(found.values()) == sorted(some)
        for path, key in found.items():
            assert key_of(path) == key
            assert list(path) == path_of(key, is_directory=is_directory(key, some))

    run(test)


@settings(max_examples=60, deadline=None)
@given(key_sets, st.data())
def test_what_is_unlinked_is_gone_and_nothing_else(some: set[bytes], data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.sampled_from(sorted(some))))

    async def test(kv: KVSetup) -> None:
        for key in some:
            await kv.store.txn([], [put(b"k/" + key, key)])
        paths = {key: path for path, key in (await walk(kv.mounted, (), kv.tree.root)).items()}
        for key in sorted(gone):
            node = kv.tree.root
            for name in paths[key][:-1]:
                node = (await kv.tree.lookup(node, name)).node
            await kv.tree.unlink(node, paths[key][-1])
        # What was a directory is one still, so what is left has kept its path.
        found = await walk(kv.mounted, (), kv.tree.root)
        assert found == {path: key for key, path in paths.items() if key not in gone}
        assert set(kv.keys()) == some - gone

    run(test)


@settings(max_examples=100, deadline=None)
@given(key_sets, key_sets)
def test_listing_gives_what_stays_once_across_changes(before: set[bytes], after: set[bytes]) -> None:
    """All changes come in one transaction, in the middle of the listing of the root."""

    async def test(kv: KVSetup) -> None:
        for key in before:
            await kv.store.txn([], [put(b"k/" + key, b"")])
        old = set(await kv.mounted.names())
        root = kv.tree.root
        first = await kv.mounted.after(root, 0, max(1, len(old) // 2))
        await kv.store.txn([], [*(delete(b"k/" + key) for key in before - after),
                                *(put(b"k/" + key, b"") for key in after - before)])
        new = set(await kv.mounted.names())
        given_names = [name for name, _ in first]
        cookie = first[-1][1]
        while batch := await kv.mounted.after(root, cookie, 2):
            given_names += [name for name, _ in batch]
            cookie = batch[-1][1]
        assert len(given_names) == len(set(given_names))
        assert old & new <= set(given_names)
        assert set(given_names) <= old | new

    run(test)
