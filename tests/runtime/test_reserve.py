"""Space kept back: how much, when it is given up, who is refused until it is back."""

import errno
import os
from pathlib import Path

import pytest
import trio

from aspenfs.errors import NoSpace
from aspenfs.kv.types import delete, put
from aspenfs.limits import MIB
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
