"""Space kept back: how much, when it is given up, who is refused until it is back."""

import errno
import os
from pathlib import Path

import pytest
import trio

from aspenfs.errors import NoSpace
from aspenfs.kv.types import delete, put
from aspenfs.limits import MIB, SYNC_INTERVAL_MS
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.reserve import FILE_NAME, Reserve
from tests.kv.subject import FakeClock, FakeEntropy
from tests.runtime.host_driver import running, until, until_it_accepts


def blocks(directory: Path) -> int:
    return os.stat(directory / FILE_NAME).st_blocks * 512


def test_reserve_holds_real_blocks_until_it_is_given_up(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path, 4 * MIB)
    assert reserve.take()
    assert reserve.whole
    assert blocks(tmp_path) >= 4 * MIB
    assert reserve.give_up() == 4 * MIB
    assert blocks(tmp_path) == 0
    assert reserve.give_up() == 0
    assert reserve.take()
    assert blocks(tmp_path) >= 4 * MIB


def test_reserve_of_an_earlier_life_is_kept(tmp_path: Path) -> None:
    Reserve(tmp_path, 4 * MIB).take()
    inode = os.stat(tmp_path / FILE_NAME).st_ino
    again = Reserve(tmp_path, 4 * MIB)
    assert again.take()
    assert again.whole
    assert os.stat(tmp_path / FILE_NAME).st_ino == inode


def test_giving_up_what_was_never_taken_is_nothing(tmp_path: Path) -> None:
    assert Reserve(tmp_path).give_up() == 0


def test_what_was_given_up_is_not_for_those_who_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks that it has given up look like space again."""
    free = 1 << 30
    status = os.statvfs(tmp_path)

    def statvfs(path: object) -> os.statvfs_result:
        blocks = (1 << 30) // status.f_frsize, free // status.f_frsize
        return os.statvfs_result((*status[:1], status.f_frsize, blocks[0], blocks[1], blocks[1], *status[5:]))

    monkeypatch.setattr(os, "statvfs", statvfs)
    reserve = Reserve(tmp_path, 8 * MIB)
    assert reserve.take()
    assert reserve.give_up() == 8 * MIB
    free = 6 * MIB  # something was written meanwhile
    assert not reserve.take()
    assert not blocks(tmp_path)
    free = 8 * MIB
    assert reserve.take()
    assert blocks(tmp_path) == 6 * MIB


def test_who_gives_space_back_may_have_the_reserve_until_that_is_done(tmp_path: Path) -> None:
    async def test() -> None:
        store = NodeStore.open(
            tmp_path, FakeClock(), FakeEntropy(), segment_bytes=1 << 20, reserve=Reserve(tmp_path, 4 * MIB)
        )
        async with running(store):
            assert blocks(tmp_path) >= 4 * MIB
            store.short_of_room(NoSpace("no room to move to"))
            assert blocks(tmp_path) == 0
            await trio.sleep(5 * SYNC_INTERVAL_MS / 1000)  # several looks at it
            assert blocks(tmp_path) == 0
            with pytest.raises(NoSpace, match="no room to move to"):
                await store.txn([], [put(b"f/b", b"")])
            store.short_of_room(None)
            await until_it_accepts(store)
            assert blocks(tmp_path) >= 4 * MIB
        store.close()

    trio.run(test)


def test_a_full_state_gives_up_the_reserve_and_refuses_writers_until_it_is_back(
    tmp_path: Path,
) -> None:
    room = 1 << 40

    async def test() -> None:
        nonlocal room
        reserve = Reserve(tmp_path, 4 * MIB)
        store = NodeStore.open(
            tmp_path,
            FakeClock(),
            FakeEntropy(),
            segment_bytes=1 << 20,
            free_bytes=lambda: room,
            reserve=reserve,
        )
        assert store.refusal is None
        async with running(store):
            room = 0
            await store.txn([], [put(b"f/a", bytes(3000))])
            await until(lambda: store.refusal is not None)
            assert blocks(tmp_path) == 0
            assert store.status()["state"] == "full"
            with pytest.raises(NoSpace) as refused:
                await store.txn([], [put(b"f/b", b"")])
            assert refused.value.errno == errno.ENOSPC
            await store.txn([], [delete(b"f/a")])
            assert store.get(b"f/a") is None
            room = 1 << 40
            await until(lambda: store.refusal is None)
            await until_it_accepts(store)
            assert blocks(tmp_path) >= 4 * MIB
        store.close()

    trio.run(test)
