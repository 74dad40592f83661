"""Bytes that nothing names any more go only when no start of the node can ask for them again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from aspenfs.blobs.store import BlobStore
from aspenfs.filesystem import layout
from aspenfs.filesystem.volume import Volume
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.host import NodeStore
from aspenfs.vfs.tree import Usage
from aspenfs.views.files import FilesTree
from tests.filesystem.volumes import CALLER
from tests.kv.subject import FakeClock, FakeEntropy


class Node:
    """The state of one node with files/ on it, as the daemon puts it together, in a real directory."""

    def __init__(self, directory: Path) -> None:
        disk, clock = RealDisk(directory), FakeClock()
        self.blobs = BlobStore.open(disk)
        self.store = NodeStore.open(
            directory,
            clock,
            FakeEntropy(),
            disk=disk,
            pre_sync=[self.blobs.sync],
            verify_entry=lambda command: all(map(self.blobs.has, layout.named_digests(command))),
            background=False,
        )
        self.volume = Volume(self.store, self.blobs, clock)
        self.tree = FilesTree(self.volume, lambda: Usage(4096, 100, 50, 0, 0))

    async def make_and_remove(self, name: bytes, data: bytes) -> None:
        _, handle = await self.tree.create(1, name, 0o644, 2, CALLER)
        await handle.write(0, data)
        await handle.release()
        await self.tree.unlink(1, name)

    def die(self) -> None:
        """As after SIGKILL: nothing is written any more. (LMDB allows one environment a process.)"""
        self.store._state.close()

    def close(self) -> None:
        self.store.close()
        self.blobs.close()


@contextmanager
def opened(directory: Path) -> Iterator[Node]:
    node = Node(directory)
    yield node
    node.close()


def test_a_node_killed_after_collecting_garbage_starts_again(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path)
        await node.volume.format()
        await node.make_and_remove(b"f", bytes(20_000))
        await node.tree.content.collect()
        await node.store.committed()
        node.die()
        with opened(tmp_path) as again:
            assert again.tree.content.read(1, 0, 1, 0) == b""
            assert again.volume.inode_count() == 1

    trio.run(test)


def test_garbage_of_an_earlier_daemon_is_found_and_goes(tmp_path: Path) -> None:
    async def test() -> None:
        with opened(tmp_path) as node:
            await node.volume.format()
            for number in range(5):
                await node.make_and_remove(b"f", bytes([number]) * 20_000)
        with opened(tmp_path) as again:
            _, handle = await again.tree.create(1, b"kept", 0o644, 2, CALLER)
            await handle.write(0, bytes([3]) * 20_000)
            at: bytes | None = b""
            while at is not None:
                at = again.tree.content.find_garbage(at, 2)
            assert await again.tree.content.collect() == 4
            assert again.blobs.stats().chunks == 1
            assert next(again.store.scan(layout.BLOB_PREFIX, b"f/c"))[1].value == layout.I64(1)

    trio.run(test)


def test_bytes_wait_until_the_log_cannot_ask_for_them(tmp_path: Path) -> None:
    async def test() -> None:
        with opened(tmp_path) as node:
            await node.volume.format()
            await node.make_and_remove(b"f", bytes(20_000))
            assert await node.tree.content.collect() == 0
            assert node.blobs.stats().chunks == 1
            while node.store.replay_floor < node.store.revision - 1:
                await node.volume.txn([], [])
                await node.store.committed()
                node.store.apply()
            assert await node.tree.content.collect() == 1
            assert node.blobs.stats().chunks == 0
            assert list(node.store.scan(layout.BLOB_PREFIX, b"f/c")) == []

    trio.run(test)


def test_bytes_that_are_spared_go_when_they_are_not_any_more(tmp_path: Path) -> None:
    async def test() -> None:
        with opened(tmp_path) as node:
            await node.volume.format()
            await node.make_and_remove(b"f", bytes(20_000))
            while node.store.replay_floor < node.store.revision - 1:
                await node.volume.txn([], [])
                await node.store.committed()
                node.store.apply()
            asked: list[bytes] = []

            def spares(digest: bytes) -> bool:
                asked.append(digest)
                return len(asked) < 3

            node.volume.spares = spares
            assert [await node.tree.content.collect() for _ in range(3)] == [0, 0, 1]
            assert node.blobs.stats().chunks == 0

    trio.run(test)
