"""A backup of a serving node: one revision of it, whatever happens meanwhile, and in nobody's way."""

import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from aspenfs import errors
from aspenfs.blobs.cache import ChunkCache
from aspenfs.filesystem import layout
from aspenfs.kv import rows
from aspenfs.kv.machine import state_hash
from aspenfs.kv.types import put
from aspenfs.limits import SNAPSHOT_AGE_MAX_S
from aspenfs.runtime.backup.format import Kind, Reader
from aspenfs.runtime.backup.reading import Progress, read
from aspenfs.runtime.control_command import Call
from tests.runtime.backed_up import FILES, applied, backup_of, on_a_node, taken, write_file
from tests.runtime.test_blob_garbage import Node

Test = Callable[[Node], Awaitable[None]]


def test_it_holds_what_was_committed_when_it_was_asked_for(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        await node.store.txn([], [put(b"k/last", b"written a moment ago")])
        data, result = await taken(backup_of(node, tmp_path))
        header, end = read(io.BytesIO(data), "a backup")
        assert header.index == result["index"] == node.store.revision
        assert end.state_digest == result["state_digest"] == state_hash(node.store._state)
        assert (end.rows, end.blobs) == (result["rows"], 4)
        assert header.cluster_id == node.store.identity.cluster_id

    on_a_node(tmp_path, test)


def test_it_is_one_revision_with_its_chunks_whatever_happens_meanwhile(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        await applied(node)
        wanted, before = state_hash(node.store._state), node.store.revision
        number = 0

        async def meanwhile(item: dict[str, Any]) -> None:
            nonlocal number
            for name in FILES:
                await node.tree.unlink(1, name)
                await write_file(node, name, b"%d" % number * 30_000)
            await node.store.txn([], [put(b"k/app", b"new")])
            while node.store.replay_floor < node.store.revision - 1:
                await node.volume.txn([], [])
                await applied(node)
            while await node.tree.content.collect():
                pass
            number += 1

        data, _ = await taken(backup_of(node, tmp_path), meanwhile)
        header, end = read(io.BytesIO(data), "a backup")
        assert (header.index, end.state_digest) == (before, wanted)
        assert (end.blobs, end.lost) == (4, 0)
        assert number > 3
        # And what it held back goes.
        kept = {key[3:] for key, row in node.store.scan(layout.BLOB_PREFIX, b"f/c") if any(row.value[:8])}
        while await node.tree.content.collect():
            pass
        assert set(node.blobs.digests()) == kept

    on_a_node(tmp_path, test)


def test_chunks_that_were_taken_may_go_while_it_goes_on(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        backup = backup_of(node, tmp_path)
        spared: list[int] = []

        async def meanwhile(item: dict[str, Any]) -> None:
            spared.append(sum(map(node.volume.spares, node.blobs.digests())))

        for number in range(30):
            await write_file(node, b"file%d" % number, b"%d" % number * 60_000)
        await taken(backup, meanwhile)
        assert spared == sorted(spared, reverse=True)
        assert (spared[0], spared[-1]) == (node.blobs.stats().chunks, 0)
        assert 0 < spared[-3] < spared[0]

    on_a_node(tmp_path, test)


def test_there_is_one_at_a_time_and_one_that_is_cancelled_holds_nothing_back(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        backup = backup_of(node, tmp_path)
        with trio.CancelScope() as scope:

            async def meanwhile(item: dict[str, Any]) -> None:
                assert any(map(node.volume.spares, node.blobs.digests()))
                with pytest.raises(errors.Busy):
                    await taken(backup)
                scope.cancel()

            await taken(backup, meanwhile)
        assert scope.cancelled_caught
        assert not any(map(node.volume.spares, node.blobs.digests()))
        assert node.store._state._environment._snapshots == 0
        await taken(backup)

    on_a_node(tmp_path, test)


def test_who_takes_the_rows_too_slowly_gets_an_error(tmp_path: Path) -> None:
    clock = trio.testing.MockClock()

    async def test(node: Node) -> None:
        async def meanwhile(item: dict[str, Any]) -> None:
            clock.jump(SNAPSHOT_AGE_MAX_S)
            await trio.sleep_forever()

        with pytest.raises(errors.Overloaded, match="faster disk"):
            await taken(backup_of(node, tmp_path), meanwhile)
        assert node.store._state._environment._snapshots == 0
        late: list[bool] = []

        async def slowly_later(item: dict[str, Any]) -> None:
            if item["blobs_total"]:  # the rows are through: no snapshot waits any more
                clock.jump(SNAPSHOT_AGE_MAX_S)
                await trio.lowlevel.checkpoint()
                late.append(True)

        await taken(backup_of(node, tmp_path), slowly_later)
        assert late

    on_a_node(tmp_path, test, clock)


def damage(node: Node, directory: Path, data: bytes) -> bytes:
    """Makes the chunk that begins like `data` unreadable; its name."""
    (path,) = [path for path in (directory / "blobs").glob("*.segment") if data[:1000] in path.read_bytes()]
    content = bytearray(path.read_bytes())
    at = content.index(data[:1000])
    content[at] ^= 1
    path.write_bytes(content)
    node.blobs._cache = ChunkCache(0)
    return next(digest for digest in node.blobs.digests() if _unreadable(node, digest))


def _unreadable(node: Node, digest: bytes) -> bool:
    try:
        node.blobs.read(digest)
    except errors.Corrupt:
        return True
    return False


def test_a_chunk_that_cannot_be_read_ends_it_unless_asked_to_go_on_without(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        digest = damage(node, tmp_path, FILES[b"two"])
        with pytest.raises(errors.Unavailable, match=digest.hex()):
            await taken(backup_of(node, tmp_path))
        data, result = await taken(backup_of(node, tmp_path), skip_damaged=True)
        assert (result["blobs"], result["lost"]) == (3, 1)
        seen: list[Progress] = []
        _, end = read(io.BytesIO(data), "a backup", progress=seen.append)
        assert (end.blobs, end.lost) == (3, 1)
        assert [name for name, _ in seen[-1].lost] == [digest]

    on_a_node(tmp_path, test)


def test_a_chunk_that_is_not_here_comes_from_another_node(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        digest = damage(node, tmp_path, FILES[b"two"])

        class Others:
            shared, may_collect, removes_rows = False, True, True

            def is_pinned(self, digest: bytes) -> bool:
                return False

            async def fetch(self, wanted: bytes, ahead: Any = ()) -> bytes:
                assert wanted == digest
                return FILES[b"two"]

        node.volume.replicas = Others()
        _, result = await taken(backup_of(node, tmp_path))
        assert (result["blobs"], result["lost"]) == (4, 0)

    on_a_node(tmp_path, test)


def test_without_a_majority_it_is_refused_unless_what_is_here_is_enough(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        await applied(node)

        async def barrier() -> int:
            raise errors.NoQuorum("nobody answers")

        node.store.barrier = barrier  # type: ignore[method-assign]
        with pytest.raises(errors.NoQuorum):
            await taken(backup_of(node, tmp_path))
        _, result = await taken(backup_of(node, tmp_path), stale=True)
        assert result["index"] == node.store.revision

    on_a_node(tmp_path, test)


def test_counts_go_up_to_the_totals(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        for number in range(2000):
            await node.store.txn([], [put(b"k/%04d" % number, bytes(1000))])
        items: list[dict[str, Any]] = []

        async def item(value: Any) -> None:
            items.append(value)

        result = await backup_of(node, tmp_path).handle(Call({}, b"", 0, item, lambda: None))
        counts = [(one["rows"], one["blobs"]) for one in items]
        assert counts == sorted(counts)
        assert counts[-1] == (result["rows"], 4) == (items[-1]["rows_total"], items[-1]["blobs_total"])
        assert abs(items[0]["rows_total"] - result["rows"]) < 10
        assert len(items) > 4

    on_a_node(tmp_path, test)


def test_internal_rows_are_part_of_it(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        data, _ = await taken(backup_of(node, tmp_path))
        frames = list(Reader("a backup").feed(data))
        found = [key for frame in frames if frame.kind == Kind.ROWS for key, _ in rows.unpack(frame.payload)]
        assert found == sorted(found)
        assert {key[:2] for key in found} >= {b"\0l", b"\0h", b"\0r", b"f/", b"k/", b"c/"}

    on_a_node(tmp_path, test)
