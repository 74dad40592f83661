"""A node that was away, is new, or did not get something finds out what it lacks, and fetches it."""

import pytest
import trio

from aspenfs import errors
from aspenfs.blobs.format import digest_of
from aspenfs.cluster.types import NodeId
from aspenfs.limits import KIB
from aspenfs.runtime.blob_replication import repair, wire
from tests.runtime.blob_cluster import Cluster, chunk, cluster, run, until

COUNT = 300


async def many_files(nodes: Cluster) -> list[bytes]:
    pieces = [chunk(number) for number in range(COUNT)]
    for number, piece in enumerate(pieces):
        await nodes[1].create(b"%d" % number, piece)
    return pieces


def test_what_a_node_did_not_get_it_fetches_once_it_applies_the_name() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.down.add(3)
            await nodes[1].create(b"f", chunk(1))
            assert nodes[3].replicator.status().missing == 1
            assert not nodes[3].replicator.status().is_complete
            with pytest.raises(errors.PeerUnreachable):
                await nodes[1].replicator.lacking(NodeId(3))
            nodes.network.down.remove(3)
            assert await nodes[1].replicator.lacking(NodeId(3)) == (1, True)
            await until(lambda: nodes[3].has(chunk(1)), 5)
            await until(lambda: nodes[3].replicator.status().is_complete, 5)
            assert await nodes[1].replicator.lacking(NodeId(3)) == (0, True)
            assert nodes[3].replicator.status().repaired == 1

    run(test)


def test_what_is_on_its_way_is_not_asked_for() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.delay_s[3] = 0.2
            for number in range(20):
                await nodes[1].create(b"%d" % number, chunk(number))
            await until(lambda: all(nodes[3].has(chunk(number)) for number in range(20)), 5)
            await trio.sleep(5)
            assert nodes[3].replicator.status().is_complete
            assert nodes.network.asked(1, wire.GET) + nodes.network.asked(2, wire.GET) == 0

    run(test)


def test_a_node_that_was_away_or_new_gets_everything_it_lacks() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.down.add(3)
            nodes[3].store.lagging = True
            pieces = await many_files(nodes)
            nodes[3].stop()
            nodes[3].store.lagging = False
            nodes[3].store.follow()
            nodes[3].start()
            nodes.network.down.remove(3)
            await nodes.nursery.start(nodes[3].run)
            await until(lambda: nodes[3].replicator.status().is_complete, 60)
            assert nodes[3].has(*pieces)
            assert nodes[3].replicator.status().repaired == COUNT
            assert min(nodes.network.asked(number, wire.GET) for number in (1, 2)) > 0, "both help"

    run(test)


def test_after_a_snapshot_the_same() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.down.add(3)
            nodes[3].store.lagging = True
            pieces = await many_files(nodes)
            nodes.network.down.remove(3)
            forget, nodes[3]._forget = nodes[3]._forget, lambda: None
            forget()  # a snapshot tells observers nothing
            nodes[3].store.follow()
            await trio.sleep(5)
            assert not nodes[3].has(pieces[0])
            nodes[3].replicator.state_replaced()
            assert not (await nodes[1].replicator.lacking(NodeId(3)))[1], "it does not know all yet"
            await until(lambda: nodes[3].replicator.status().is_complete, 60)
            assert nodes[3].has(*pieces)

    run(test)


def test_repair_goes_on_after_a_restart_without_fetching_anything_twice() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.down.add(3)
            pieces = await many_files(nodes)
            nodes.network.delay_s = {1: 0.1, 2: 0.1}
            nodes.network.down.remove(3)
            await until(lambda: sum(map(nodes[3].has, pieces)) > COUNT // 3, 60)
            nodes[3].blobs.sync()
            got = sum(map(nodes[3].has, pieces))
            assert got < COUNT
            nodes.network.requests.clear()
            await nodes[3].restart(nodes.nursery)
            await until(lambda: nodes[3].replicator.status().is_complete, 60)
            assert nodes[3].has(*pieces)
            asked = nodes.network.asked(1, wire.GET) + nodes.network.asked(2, wire.GET)
            assert asked <= COUNT - got + 2 * repair.BATCH, "at most what was under way"

    run(test)


def test_what_nobody_has_is_counted_and_comes_when_somebody_has_it() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.down.add(3)
            await nodes[1].create(b"f", chunk(1))
            nodes.network.down.update({1, 2})
            nodes.network.down.remove(3)
            await trio.sleep(5)
            assert nodes[3].replicator.status().missing == 1
            nodes[2].blobs.delete([digest_of(chunk(1))])
            nodes.network.down.remove(2)
            await until(lambda: nodes[3].replicator.status().unavailable == 1, 5)
            nodes.network.down.remove(1)
            await until(lambda: nodes[3].has(chunk(1)), 2)

    run(test)


def test_what_does_not_fit_on_the_disk_is_not_said_to_be_nowhere_and_comes_once_there_is_room() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            node = nodes[3]
            nodes.network.down.add(3)
            for number in range(3):
                await nodes[1].create(b"%d" % number, chunk(number))
            nodes.network.delay_s = {1: 0.2, 2: 0.2}
            nodes.network.down.remove(3)
            await until(lambda: nodes.network.asked(1, wire.GET) + nodes.network.asked(2, wire.GET) > 0, 5)
            node.full = True  # while they are on their way
            await trio.sleep(40)
            status = node.replicator.status()
            assert (status.missing, status.unavailable, status.waiting_for_room) == (3, 0, 3)
            assert status.repaired == 0
            assert await node.read(b"0") == chunk(0)
            node.full = False
            await until(lambda: node.has(*map(chunk, range(3))), 4)
            await until(lambda: node.replicator.status().is_complete, 2)
            assert node.replicator.status().waiting_for_room == 0
            assert node.replicator.status().repaired == 3

    run(test)


def test_what_nobody_has_stays_so_while_the_disk_is_full() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.down.add(3)
            await nodes[1].create(b"f", chunk(1))
            for number in (1, 2):
                nodes[number].blobs.delete([digest_of(chunk(1))])
            nodes.network.down.remove(3)
            await until(lambda: nodes[3].replicator.status().unavailable == 1, 5)
            nodes[3].full = True
            await trio.sleep(2 * repair.RETRY_S)
            status = nodes[3].replicator.status()
            assert (status.unavailable, status.waiting_for_room) == (1, 0)

    run(test)


def test_what_is_named_no_more_is_not_fetched() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.down.add(3)
            await nodes[1].create(b"f", chunk(1))
            await nodes[1].tree.unlink(1, b"f")
            nodes.network.down.remove(3)
            await until(lambda: nodes[3].replicator.status().is_complete, 5)
            assert not nodes[3].has(chunk(1))
            assert nodes.network.asked(1, wire.GET) + nodes.network.asked(2, wire.GET) == 0

    run(test)


def test_damage_that_is_found_is_repaired_unasked() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await nodes[1].create(b"f", chunk(1))
            await until(lambda: nodes[2].has(chunk(1)), 5)
            nodes[2].blobs.delete([digest_of(chunk(1))])
            nodes[2].replicator.damaged(digest_of(chunk(1)))
            await until(lambda: nodes[2].has(chunk(1)), 5)

    run(test)


def test_more_than_memory_holds_is_found_by_walking_again() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.down.add(3)
            nodes[3].replicator.repair.missing_max = 50
            pieces = await many_files(nodes)
            assert nodes[3].replicator.status().missing == 50
            nodes.network.down.remove(3)
            await until(lambda: nodes[3].has(*pieces), 120)

    run(test)


def test_repair_gives_way_to_those_who_read_and_write() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.down.add(3)
            await many_files(nodes)
            nodes.network.delay_s = {1: 0.05, 2: 0.05}

            async def seconds() -> float:
                """From the first request to the last."""
                first = len(nodes.network.times)
                await until(lambda: nodes[3].replicator.status().is_complete, 120)
                requests = zip(nodes.network.requests[first:], nodes.network.times[first:], strict=True)
                times = [time for request, time in requests if request[2] == wire.GET]
                return times[-1] - times[0]

            nodes.network.down.remove(3)
            idle = await seconds()
            nodes[3].blobs.delete([digest_of(chunk(number)) for number in range(COUNT)])
            nodes[3].replicator.state_replaced()
            async with trio.open_nursery() as nursery:

                async def write() -> None:
                    for number in range(COUNT, 1 << 30):
                        nodes[3].replicator.put(chunk(number, 4 * KIB))
                        await trio.sleep(0.2)

                nursery.start_soon(write)
                busy = await seconds()
                nursery.cancel_scope.cancel()
            assert busy > 1.5 * idle

    run(test)
