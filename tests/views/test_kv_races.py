"""kv/ against others who change the same keys: nothing is lost, nothing comes back.

`Interposed` lets another client's transaction in just before the tree's own is ordered, as happens
where a transaction has to travel to a leader.
"""

import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import trio

from aspenfs import errors
from aspenfs.kv.local import LocalStore
from aspenfs.kv.store import Dedup
from aspenfs.kv.types import Compare, Operation, TxnResult, delete, put
from aspenfs.vfs.tree import SetAttr
from aspenfs.views import kv_space
from aspenfs.views.kv import KVTree
from tests.views.subject import ROOT, CountingEntropy, KVSetup, Mounted, StepClock, whole


class Interposed(LocalStore):
    """`before`: transactions of others, one let in before each of ours."""

    def __init__(self) -> None:
        super().__init__(StepClock(), CountingEntropy(), trio.Event)
        self.before: list[list[Operation]] = []
        self.tried = 0

    async def txn(self, compares: Sequence[Compare], then: Sequence[Operation],
                  else_: Sequence[Operation] = (), *, dedup: Dedup | None = None,
                  origin: object = None) -> TxnResult:
        if origin is not None:
            self.tried += 1
            if self.before:
                await super().txn([], self.before.pop(0))
        return await super().txn(compares, then, else_, dedup=dedup, origin=origin)


class Setup(KVSetup):
    def __init__(self) -> None:
        super().__init__()
        self.interposed = Interposed()
        self.store = self.interposed
        self.tree = KVTree(self.store, self.clock)
        self.mounted = Mounted(self.tree)
        self.store.observe(self._observe)

    def meanwhile(self, *operations: Operation) -> None:
        self.interposed.before.append(list(operations))


def run(test: Callable[[Setup], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            await test(Setup())

    trio.run(main)


def test_write_to_a_key_that_was_deleted_does_not_bring_it_back() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.create(b"f", b"old")
        file = await kv.mounted.open(b"f")
        kv.meanwhile(delete(b"k/f"))
        assert await file.write(0, b"OLD!") == 4
        assert kv.keys() == {}
        assert await whole(file) == b"OLD!"

    run(test)


def test_write_does_not_land_in_a_later_key_of_the_same_name() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.create(b"f", b"old")
        file = await kv.mounted.open(b"f")
        await kv.store.txn([], [delete(b"k/f")])
        await kv.store.txn([], [put(b"k/f", b"new")])
        await file.write(0, b"OLD!")
        assert kv.keys() == {b"f": b"new"}
        assert await kv.mounted.read(b"f") == b"new"

    run(test)


def test_append_meets_an_append_of_others() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.create(b"f", b"1")
        file = await kv.mounted.open(b"f", os.O_WRONLY | os.O_APPEND)
        kv.meanwhile(put(b"k/f", b"1 other"))
        await file.write(1, b" ours")
        assert kv.keys() == {b"f": b"1 other ours"}

    run(test)


def test_chmod_keeps_a_value_that_was_put_meanwhile() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.create(b"f", b"old")
        kv.meanwhile(put(b"k/f", b"new"))
        attr = await kv.mounted.set(b"f", SetAttr(mode=0o600))
        assert kv.keys() == {b"f": b"new"}
        assert attr.mode & 0o777 == 0o600

    run(test)


def test_rename_takes_the_value_that_was_put_meanwhile() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.create(b"f", b"old")
        kv.meanwhile(put(b"k/f", b"new"))
        await kv.mounted.rename(b"f", b"g")
        assert kv.keys() == {b"g": b"new"}

    run(test)


def test_rename_of_a_directory_takes_a_key_that_came_meanwhile() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.mkdir(b"d")
        await kv.mounted.create(b"d/a", b"1")
        kv.meanwhile(put(b"k/d/b/c", b"2"))
        await kv.mounted.rename(b"d", b"e")
        assert kv.keys() == {b"e/a": b"1", b"e/b/c": b"2"}
        assert await kv.mounted.names() == [b"e"]

    run(test)


@pytest.mark.parametrize(
    ("other", "value"),
    [(b"k/d/aa", b"between"), (b"k/d/a", b"changed"), (b"k/d", b"own"), (b"k/d/z", b"last")],
)
def test_rename_of_a_directory_misses_no_change(other: bytes, value: bytes) -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.mkdir(b"d")
        await kv.mounted.create(b"d/a", b"1")
        await kv.mounted.create(b"d/b", b"2")
        kv.meanwhile(put(other, value))
        await kv.mounted.rename(b"d", b"e")
        expected = {b"d/a": b"1", b"d/b": b"2", other[2:]: value}
        assert kv.keys() == {b"e" + key[1:]: value for key, value in expected.items()}

    run(test)


def test_rename_over_a_file_sees_that_it_became_a_directory() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.create(b"f", b"ours")
        kv.meanwhile(put(b"k/g/below", b"theirs"))
        with pytest.raises(errors.IsADirectory):
            await kv.mounted.rename(b"f", b"g")

    run(test)


def test_replaced_open_file_holds_what_was_put_last() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.create(b"new", b"new")
        await kv.mounted.create(b"f", b"old")
        file = await kv.mounted.open(b"f")
        kv.meanwhile(put(b"k/f", b"last"))
        await kv.mounted.rename(b"new", b"f")
        assert await whole(file) == b"last"
        assert kv.keys() == {b"f": b"new"}

    run(test)


def test_rename_over_an_empty_directory_sees_a_key_that_came_in_it() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.mkdir(b"d")
        await kv.mounted.mkdir(b"e")
        kv.meanwhile(put(b"k/e/x", b"theirs"))
        with pytest.raises(errors.DirectoryNotEmpty):
            await kv.mounted.rename(b"d", b"e")

    run(test)


def test_rename_with_noreplace_sees_what_came_meanwhile() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.create(b"f", b"ours")
        kv.meanwhile(put(b"k/g", b"theirs"))
        with pytest.raises(errors.AlreadyExists):
            await kv.mounted.rename(b"f", b"g", 1)
        assert kv.keys() == {b"f": b"ours", b"g": b"theirs"}

    run(test)


def test_rename_of_a_directory_sees_a_key_that_came_at_its_target() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.mkdir(b"d")
        kv.meanwhile(put(b"k/e", b"theirs"))
        with pytest.raises(errors.NotADirectory):
            await kv.mounted.rename(b"d", b"e")

    run(test)


def test_create_with_excl_sees_what_came_meanwhile() -> None:
    async def test(kv: Setup) -> None:
        kv.meanwhile(put(b"k/f", b"theirs"))
        with pytest.raises(errors.AlreadyExists):
            await kv.mounted.create(b"f")
        assert kv.keys() == {b"f": b"theirs"}

    run(test)


def test_create_of_a_file_sees_that_it_became_a_directory() -> None:
    async def test(kv: Setup) -> None:
        kv.meanwhile(put(b"k/f/below", b"theirs"))
        with pytest.raises(errors.IsADirectory):
            await kv.mounted.write(b"f", b"ours")
        assert kv.keys() == {b"f/below": b"theirs"}

    run(test)


def test_mkdir_sees_what_came_meanwhile() -> None:
    async def test(kv: Setup) -> None:
        for other in (b"k/d", b"k/d/x", b"d/d/", b"d/d/x/"):
            kv.meanwhile(put(other, b""))
            with pytest.raises(errors.AlreadyExists):
                await kv.mounted.mkdir(b"d")
            await kv.store.txn([], [delete(other)])

    run(test)


def test_mkdir_in_a_directory_that_was_removed_meanwhile_is_enoent() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.mkdir(b"d")
        kv.meanwhile(delete(b"d/d/"))
        with pytest.raises(errors.NotFound):
            await kv.mounted.mkdir(b"d/e")
        assert not await kv.mounted.exists(b"d")

    run(test)


def test_rmdir_sees_a_key_that_came_meanwhile() -> None:
    async def test(kv: Setup) -> None:
        for other in (b"k/d/x", b"k/d", b"d/d/x/"):
            await kv.mounted.mkdir(b"d")
            kv.meanwhile(put(other, b""))
            with pytest.raises(errors.DirectoryNotEmpty):
                await kv.mounted.rmdir(b"d")
            await kv.store.txn([], [delete(other)])
            await kv.mounted.rmdir(b"d")

    run(test)


def test_unlink_of_what_was_deleted_meanwhile_is_enoent() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.create(b"f")
        kv.meanwhile(delete(b"k/f"))
        with pytest.raises(errors.NotFound):
            await kv.mounted.unlink(b"f")

    run(test)


def test_unlinked_open_file_holds_what_was_put_last() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.create(b"f", b"old")
        file = await kv.mounted.open(b"f")
        kv.meanwhile(put(b"k/f", b"last"))
        await kv.mounted.unlink(b"f")
        assert await whole(file) == b"last"

    run(test)


def test_attributes_of_a_directory_do_not_bring_it_back() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.mkdir(b"d")
        kv.meanwhile(delete(b"d/d/"))
        with pytest.raises(errors.NotFound):
            await kv.mounted.set(b"d", SetAttr(mode=0o700))
        assert not await kv.mounted.exists(b"d")

    run(test)


def test_change_that_always_loses_gives_up_with_eagain() -> None:
    async def test(kv: Setup) -> None:
        await kv.mounted.create(b"f", b"")
        kv.interposed.tried = 0
        for number in range(kv_space.CONFLICTS_MAX):
            kv.meanwhile(put(b"k/f", b"%d" % number))
        with pytest.raises(errors.Conflict):
            await kv.mounted.rename(b"f", b"g")
        assert kv.interposed.tried == kv_space.CONFLICTS_MAX
        assert set(kv.keys()) == {b"f"}

    run(test)


def test_open_truncates_only_the_file_that_was_looked_up() -> None:
    async def test(kv: Setup) -> None:
        node = (await kv.mounted.create(b"f", b"old")).node
        kv.meanwhile(delete(b"k/f"), put(b"k/f", b"new"))
        await kv.tree.open(node, os.O_WRONLY | os.O_TRUNC, ROOT)
        assert kv.keys() == {b"f": b"new"}

    run(test)
