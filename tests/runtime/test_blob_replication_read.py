"""What can not be read here is read from another node, and kept."""

import os

import pytest
import trio

from aspenfs import errors
from aspenfs.blobs.format import digest_of
from aspenfs.blobs.store import BlobStore
from aspenfs.limits import BLOB_FETCH_AHEAD_BYTES, KIB, MIB
from aspenfs.runtime.blob_replication import wire
from aspenfs.runtime.blob_replication.fetch import HEDGE_S, REQUEST_TIMEOUT_S
from tests.runtime.blob_cluster import Cluster, Node, chunk, cluster, damage, run, until
from tests.views.subject import ROOT


async def written_without_node_3(nodes: Cluster, *pieces: bytes) -> None:
    """A file `f` that nodes 1 and 2 have; node 3 knows of it, and has none of its bytes."""
    nodes.network.down.add(3)
    await nodes[1].create(b"f", *pieces)
    await until(lambda: nodes[2].has(*pieces), 5)
    assert not any(map(nodes[3].has, pieces))
    nodes.network.down.remove(3)


def lose(node: Node, *pieces: bytes) -> None:
    node.blobs.delete([digest_of(piece) for piece in pieces])


def test_a_chunk_that_is_not_here_is_read_from_a_peer_and_kept() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_without_node_3(nodes, chunk(1), chunk(2))
            assert await nodes[3].read(b"f") == chunk(1) + chunk(2)
            assert nodes[3].has(chunk(1), chunk(2))
            asked = nodes.network.asked(1, wire.GET) + nodes.network.asked(2, wire.GET)
            assert await nodes[3].read(b"f") == chunk(1) + chunk(2)
            assert nodes.network.asked(1, wire.GET) + nodes.network.asked(2, wire.GET) == asked

    run(test)


def test_what_is_here_is_read_without_asking_or_suspending() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await nodes[1].create(b"f", chunk(1))
            node = (await nodes[1].tree.lookup(1, b"f")).node
            handle = await nodes[1].tree.open(node, os.O_RDONLY, ROOT)
            requests = len(nodes.network.requests)
            with pytest.raises(StopIteration):
                handle.read(0, 100).__await__().send(None)
            assert len(nodes.network.requests) == requests
            await handle.release()

    run(test)


def test_a_damaged_copy_is_healed_from_a_peer() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await nodes[1].create(b"f", chunk(1), chunk(2))
            await until(lambda: nodes[2].has(chunk(1), chunk(2)), 5)
            damage(nodes[2], chunk(1))
            assert await nodes[2].read(b"f") == chunk(1) + chunk(2)
            assert nodes[2].blobs.get(digest_of(chunk(1))) == chunk(1)
            nodes[2].blobs.sync()
            again = BlobStore.open(nodes[2].disk, segment_bytes=1 << 20)
            assert again.get(digest_of(chunk(1))) == chunk(1)

    run(test)


def test_a_peer_with_a_damaged_copy_passes_it_on_to_nobody_and_heals_its_own() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_without_node_3(nodes, chunk(1))
            for number in (1, 2):
                damage(nodes[number], chunk(1))
            nodes[2].blobs.put(chunk(9))
            with pytest.raises(errors.Unavailable):
                await nodes[3].read(b"f")
            nodes[3].blobs.put(chunk(1))
            await until(lambda: nodes[1].has(chunk(1)) and nodes[2].has(chunk(1)), 120)

    run(test)


def test_when_nobody_has_it_the_reader_is_told_which_and_what_to_do() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await nodes[1].create(b"f", chunk(1))
            await until(lambda: nodes[3].has(chunk(1)), 5)
            for number in (1, 2, 3):
                lose(nodes[number], chunk(1))
            with pytest.raises(errors.Unavailable) as raised:
                await nodes[3].read(b"f")
            text = str(raised.value)
            assert digest_of(chunk(1)).hex() in text
            assert "node 1 does not have it" in text
            assert "node 2 does not have it" in text
            assert "backup" in text
            nodes.network.down.add(3)
            with pytest.raises(errors.Unavailable, match="no other node is connected"):
                await nodes[3].read(b"f")

    run(test)


def test_a_node_that_is_alone_says_what_is_wrong_as_before() -> None:
    async def test() -> None:
        async with cluster(1) as nodes:
            await nodes[1].create(b"f", chunk(1))
            lose(nodes[1], chunk(1))
            with pytest.raises(errors.Corrupt, match="aspen check"):
                await nodes[1].read(b"f")

    run(test)


def test_several_peers_are_tried() -> None:
    async def test() -> None:
        async with cluster(5) as nodes:
            nodes.network.down.update({4, 5})
            await nodes[1].create(b"f", chunk(1))
            await until(lambda: nodes[2].has(chunk(1)) and nodes[3].has(chunk(1)), 5)
            nodes.network.down.clear()
            lose(nodes[1], chunk(1))  # node 1 is asked first, and is without it
            nodes.network.refusals.append((2, wire.GET, errors.PeerUnreachable("broken")))
            assert await nodes[5].read(b"f") == chunk(1)

    run(test)


def test_a_slow_peer_gets_company() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_without_node_3(nodes, chunk(1))
            nodes.network.hung.add(1)
            began = trio.current_time()
            assert await nodes[3].read(b"f") == chunk(1)
            assert trio.current_time() - began < HEDGE_S + 0.1
            await trio.sleep(REQUEST_TIMEOUT_S)

    run(test)


def test_bytes_that_are_not_the_chunk_are_not_believed() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_without_node_3(nodes, chunk(1))

            async def lie(*_: object) -> list[bytes]:
                return [chunk(2)]

            nodes.network.ports[1].handlers[wire.GET] = lie
            assert await nodes[3].read(b"f") == chunk(1)
            assert not nodes[3].has(chunk(2))

    run(test)


def test_readers_of_one_chunk_share_one_request() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_without_node_3(nodes, chunk(1))
            nodes.network.delay_s[1] = 0.1
            read = []

            async def reader() -> None:
                read.append(await nodes[3].read(b"f"))

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(reader)
            assert read == [chunk(1)] * 20
            assert nodes.network.asked(1, wire.GET) + nodes.network.asked(2, wire.GET) == 1

    run(test)


def test_a_reader_that_gives_up_takes_nothing_from_the_others() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_without_node_3(nodes, chunk(1))
            nodes.network.delay_s[1] = 0.2
            async with trio.open_nursery() as nursery:
                impatient = trio.CancelScope()

                async def first() -> None:
                    with impatient:
                        await nodes[3].read(b"f")

                nursery.start_soon(first)
                await trio.sleep(0.05)
                nursery.start_soon(nodes[3].read, b"f")
                await trio.sleep(0.05)
                impatient.cancel()
            assert nodes[3].has(chunk(1))

    run(test)


def test_what_follows_in_the_file_is_fetched_ahead() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            pieces = [chunk(number, MIB) for number in range(24)]
            await written_without_node_3(nodes, *pieces)
            nodes.network.delay_s = {1: 0.1, 2: 0.1}
            began = trio.current_time()
            for number, piece in enumerate(pieces):
                assert await nodes[3].read(b"f", number * MIB, MIB) == piece
                await trio.sleep(0.05)  # what the reader does with it
            waited = trio.current_time() - began - 24 * 0.05
            # A round trip for each window and no more than some: not one for each chunk.
            windows = 24 * MIB // BLOB_FETCH_AHEAD_BYTES + 1
            assert waited < (windows + 2) * 0.1 < 24 * 0.1

    run(test)


def test_a_read_that_spans_many_small_chunks_waits_for_few_round_trips() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            pieces = [chunk(number, 16 * KIB) for number in range(64)]
            await written_without_node_3(nodes, *pieces)
            nodes.network.delay_s = {1: 0.1, 2: 0.1}
            began = trio.current_time()
            assert await nodes[3].read(b"f") == b"".join(pieces)
            assert trio.current_time() - began < 0.5

    run(test)


def test_a_full_disk_does_not_keep_a_reader_from_what_others_have() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_without_node_3(nodes, chunk(1), chunk(2))
            nodes[3].full = True
            assert await nodes[3].read(b"f") == chunk(1) + chunk(2)
            nodes[3].full = False
            nodes[3].disk.fail("pwrite", 28, times=-1)
            assert await nodes[3].read(b"f") == chunk(1) + chunk(2)
            assert not nodes[3].has(chunk(1))

    run(test)


def test_a_file_that_changes_while_its_bytes_are_fetched_is_read_as_it_is_then() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_without_node_3(nodes, chunk(1), chunk(2))
            nodes.network.delay_s = {1: 0.2, 2: 0.2}
            read = []

            async def reader() -> None:
                read.append(await nodes[3].read(b"f"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                await trio.sleep(0.1)
                node = (await nodes[1].tree.lookup(1, b"f")).node
                await nodes[1].tree.content.truncate(node, 100)
            assert read == [chunk(1)[:100]]

    run(test)


def test_a_request_for_more_than_fits_is_answered_in_parts() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            pieces = [chunk(number, MIB) for number in range(10)]
            for piece in pieces:
                nodes[1].blobs.put(piece)
            lacking = await nodes[2].replicator.fetcher.fill(map(digest_of, [*pieces, chunk(99)]))
            assert lacking == ([digest_of(chunk(99))], [])
            assert nodes[2].has(*pieces)

    run(test)
