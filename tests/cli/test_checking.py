"""The check beside a serving daemon: what it asks in which thread, and what it finds."""

import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.cli.checking import OnlineCheck
from aspenfs.filesystem import layout
from aspenfs.filesystem.volume import NoReplicas
from aspenfs.kv.types import add, delete, merge
from aspenfs.runtime.control_command import Call
from tests.filesystem.volumes import CALLER
from tests.runtime.test_blob_garbage import Node


class Asked(BlobStore):
    """Notes the threads in which it is asked."""

    threads: set[int]

    def has(self, digest: bytes) -> bool:
        self.threads.add(threading.get_ident())
        return super().has(digest)


def on_a_node(place: Path, test: Callable[[Node, OnlineCheck, list[Any], Call], Awaitable[None]]) -> None:
    async def main() -> None:
        node = Node(place)
        try:
            node.blobs.__class__ = Asked
            node.blobs.threads = set()  # type: ignore[attr-defined]
            await node.volume.format()
            _, handle = await node.tree.create(1, b"f", 0o644, 2, CALLER)
            await handle.write(0, bytes(20_000))
            await handle.release()
            items: list[Any] = []

            async def send(item: Any) -> None:
                items.append(item)

            call = Call({}, b"", 0, send, lambda: None)
            await test(node, OnlineCheck(node.store, node.blobs), items, call)
        finally:
            node.close()

    trio.run(main)


async def applied(node: Node) -> None:
    await node.store.committed()
    node.store.apply()


def test_the_blobs_are_asked_in_the_loop_that_owns_them(tmp_path: Path) -> None:
    async def test(node: Node, check: OnlineCheck, items: list[Any], call: Call) -> None:
        await applied(node)
        assert (await check.handle(call))["inodes"] == 2
        assert items == []
        assert node.blobs.threads == {threading.get_ident()}  # type: ignore[attr-defined]

    on_a_node(tmp_path, test)


def test_bytes_that_are_lost_are_found_and_those_that_nobody_names_any_more_are_not(tmp_path: Path) -> None:
    async def test(node: Node, check: OnlineCheck, items: list[Any], call: Call) -> None:
        await applied(node)
        ((key, _),) = node.store.scan(layout.BLOB_PREFIX, b"f/c")
        node.blobs.delete([key[3:]])
        await check.handle(call)
        assert [item[:2] for item in items] == [["files", key[3:].hex()]]
        items.clear()

        async def began_before(revision: int) -> None:
            """The changes that come now are newer than the snapshot, as if made during the check."""

        node.store.applied = began_before  # type: ignore[method-assign]
        await node.volume.txn([], [merge(key, add(0, -1))])
        await check.handle(call)
        assert items == []
        await node.volume.txn([], [delete(key)])
        await check.handle(call)
        assert items == []

    on_a_node(tmp_path, test)


class Peer(NoReplicas):
    """Another node, with chunks of its own."""

    shared = True

    def __init__(self, here: BlobStore) -> None:
        self.here, self.chunks = here, dict[bytes, bytes]()

    async def fetch(self, digest: bytes, ahead: Sequence[bytes] = ()) -> bytes:
        if digest not in self.chunks:
            raise errors.Unavailable("node 2 does not have it")
        self.here.add(digest, self.chunks[digest])
        return self.chunks[digest]


def test_what_another_node_has_is_fetched_and_what_none_has_is_named(tmp_path: Path) -> None:
    async def test(node: Node, check: OnlineCheck, items: list[Any], call: Call) -> None:
        await applied(node)
        ((key, _),) = node.store.scan(layout.BLOB_PREFIX, b"f/c")
        peer = check.replicas = Peer(node.blobs)
        node.blobs.delete([key[3:]])
        await check.handle(call)
        assert items == [["files", key[3:].hex(), "node 2 does not have it", False, False]]
        items.clear()
        peer.chunks[key[3:]] = bytes(20_000)
        await check.handle(call)
        assert items == [], "it may have been on its way here"
        assert node.blobs.has(key[3:])

    on_a_node(tmp_path, test)


def test_a_damaged_blob_is_mended_from_another_node(tmp_path: Path) -> None:
    async def test(node: Node, check: OnlineCheck, items: list[Any], call: Call) -> None:
        await applied(node)
        ((key, _),) = node.store.scan(layout.BLOB_PREFIX, b"f/c")
        (segment,) = (tmp_path / "blobs").glob("*.segment")
        with segment.open("r+b") as file:
            file.seek(5_000)
            file.write(b"damage")
        peer = check.replicas = Peer(node.blobs)
        await check.handle(call)
        assert [(item[0], item[4]) for item in items] == [("blobs", False)]
        items.clear()
        peer.chunks[key[3:]] = bytes(20_000)
        await check.handle(call)
        # The first one: found as missing, because its damage is known by now, and fetched.
        assert [(item[0], item[4]) for item in items] == [("blobs", True)]
        assert node.blobs.get(key[3:]) == bytes(20_000)

    on_a_node(tmp_path, test)


def test_one_check_at_a_time(tmp_path: Path) -> None:
    async def test(node: Node, check: OnlineCheck, items: list[Any], call: Call) -> None:
        outcomes: list[str] = []

        async def one() -> None:
            try:
                await check.handle(call)
                outcomes.append("done")
            except errors.Busy:
                outcomes.append("busy")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
        assert sorted(outcomes) == ["busy", "done"]
        await check.handle(call)

    on_a_node(tmp_path, test)


@pytest.mark.parametrize("depth", [3000])
def test_a_deep_chain_made_from_the_bottom_up_is_walked_once(tmp_path: Path, depth: int) -> None:
    """Ids that fall on the way to the root: each inode's way is as long as can be."""

    async def test(node: Node, check: OnlineCheck, items: list[Any], call: Call) -> None:
        tree = node.tree
        below = 0
        for index in range(depth):
            above = (await tree.mkdir(1, b"d%d" % index, 0o755, CALLER)).node
            if below:
                await tree.rename(1, b"d%d" % (index - 1), above, b"in", 0)
            below = above
        await applied(node)
        assert (await check.handle(call))["inodes"] == depth + 2
        assert items == []

    on_a_node(tmp_path, test)
