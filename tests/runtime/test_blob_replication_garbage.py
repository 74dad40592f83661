"""Each node deletes its own copies of what nothing names, and none that somebody relies on."""

import pytest
import trio

from aspenfs import errors
from aspenfs.blobs.format import digest_of
from aspenfs.filesystem.layout import BLOB_PREFIX
from aspenfs.limits import BLOB_PIN_S
from aspenfs.runtime.blob_replication import wire
from aspenfs.runtime.blob_replication.garbage import PERIOD_S
from tests.runtime.blob_cluster import Cluster, chunk, cluster, run, until

AFTER_PINS_S = 1.3 * BLOB_PIN_S + 2 * PERIOD_S


async def written_everywhere(nodes: Cluster, name: bytes, data: bytes) -> None:
    await nodes[1].create(name, data)
    await until(lambda: all(node.has(data) for node in nodes.nodes.values()), 5)


async def collected(nodes: Cluster) -> None:
    for node in nodes.nodes.values():
        await node.collect()


def test_every_node_deletes_its_copy_and_the_leader_the_row() -> None:
    async def test() -> None:
        async with cluster(3, learners=1) as nodes:
            await written_everywhere(nodes, b"f", chunk(1))
            await trio.sleep(AFTER_PINS_S)
            await nodes[2].tree.unlink(1, b"f")
            for number in (4, 3, 2):
                assert await nodes[number].collect() == 1
                assert not nodes[number].has(chunk(1))
                assert nodes.named(chunk(1)) == 0, "the row is the leader's to take away"
            await nodes[1].collect()
            assert nodes.named(chunk(1)) == -1
            await collected(nodes)
            assert all(not node.volume.unreferenced for node in nodes.nodes.values())

    run(test)


def test_what_a_pusher_that_died_did_not_name_goes_when_nobody_can_be_waiting_for_it() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await trio.sleep(AFTER_PINS_S)
            digest = nodes[1].replicator.put(chunk(1))
            await nodes[1].replicator.pusher.ensure([digest])
            await until(lambda: nodes[3].has(chunk(1)), 5)
            nodes[1].stop()
            await trio.sleep(BLOB_PIN_S - 10)
            await nodes[2].collect()
            assert nodes[2].has(chunk(1)), "it may still be named"
            await trio.sleep(AFTER_PINS_S)
            await nodes[2].collect()
            await nodes[3].collect()
            assert not nodes[2].has(chunk(1))
            assert not nodes[3].has(chunk(1))
            nodes[1].start()
            await nodes.nursery.start(nodes[1].run)
            await trio.sleep(AFTER_PINS_S)
            await nodes[1].collect()
            assert not nodes[1].has(chunk(1))

    run(test)


def test_a_receiver_that_restarted_keeps_what_it_promised_before() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await trio.sleep(AFTER_PINS_S)
            digest = nodes[1].replicator.put(chunk(1))
            await nodes[1].replicator.pusher.ensure([digest])
            await until(lambda: nodes[2].has(chunk(1)), 5)
            await nodes[2].restart(nodes.nursery)
            await trio.sleep(BLOB_PIN_S - 10)
            nodes[2].volume.unreference([digest])
            await nodes[2].collect()
            assert nodes[2].has(chunk(1))
            await trio.sleep(AFTER_PINS_S)
            await nodes[2].collect()
            assert not nodes[2].has(chunk(1))

    run(test)


def test_what_was_asked_for_is_spared_though_its_last_name_goes() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_everywhere(nodes, b"f", chunk(1))
            await trio.sleep(AFTER_PINS_S)
            digest = digest_of(chunk(1))
            await nodes.network.ports[1].request(2, wire.HAVE, [digest], timeout_s=1)  # type: ignore[arg-type]
            await nodes[1].tree.unlink(1, b"f")
            await collected(nodes)
            assert [node.has(chunk(1)) for node in nodes.nodes.values()] == [False, True, False]
            await trio.sleep(AFTER_PINS_S)
            await collected(nodes)
            assert not nodes[2].has(chunk(1)), "losing the pin makes it a candidate again"

    run(test)


def test_a_name_that_comes_after_the_bytes_went_is_noticed_and_repaired() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_everywhere(nodes, b"f", chunk(1))
            await trio.sleep(AFTER_PINS_S)
            for number in (2, 3):
                nodes[number].blobs.delete([digest_of(chunk(1))])  # as collection may, at an unlucky moment
            await nodes[1].create(b"g", chunk(1))
            await until(lambda: nodes[2].has(chunk(1)) and nodes[3].has(chunk(1)), 5)

    run(test)


def test_who_relies_on_a_name_that_is_gone_by_then_must_have_the_bytes_on_a_majority() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_everywhere(nodes, b"f", chunk(1))
            await trio.sleep(AFTER_PINS_S)
            nodes[3].store.lagging = True
            await nodes[1].tree.unlink(1, b"f")
            await nodes[1].collect()
            await nodes[2].collect()
            assert not nodes[1].has(chunk(1))
            # By the state of node 3 the chunk is named, and so needs no push.
            await nodes[3].create(b"g", chunk(1))
            assert nodes[1].has(chunk(1)) or nodes[2].has(chunk(1))
            assert nodes.named(chunk(1)) == 1

    run(test)


def test_what_is_pinned_by_a_write_under_way_is_not_collected_on_its_own_node() -> None:
    async def test() -> None:
        async with cluster(3, off={2, 3}) as nodes:
            await trio.sleep(AFTER_PINS_S)
            with pytest.raises(errors.NoQuorum):
                await nodes[1].create(b"f", chunk(1))
            # Its outcome may be unknown: nothing goes before the log has moved on without it.
            assert nodes[1].volume.unreferenced
            await nodes[1].collect()
            assert nodes[1].has(chunk(1))
            await trio.sleep(AFTER_PINS_S)
            await nodes[1].collect()
            assert not nodes[1].has(chunk(1))

    run(test)


def test_a_node_that_is_cut_off_collects_nothing() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_everywhere(nodes, b"f", chunk(1))
            await trio.sleep(AFTER_PINS_S)
            await nodes[1].tree.unlink(1, b"f")
            nodes[2].store.lagging = True
            with pytest.raises(errors.NoQuorum):
                await nodes[2].collect()
            assert nodes[2].has(chunk(1))
            nodes[2].store.lagging = False
            assert await nodes[2].collect() == 1

    run(test)


def test_bytes_without_a_row_wait_until_the_log_cannot_ask_for_them() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_everywhere(nodes, b"f", chunk(1))
            await trio.sleep(AFTER_PINS_S)
            nodes[2].store.floor = nodes[2].store.revision
            await nodes[1].tree.unlink(1, b"f")
            await nodes[1].collect()
            assert nodes[2].store.get(BLOB_PREFIX + digest_of(chunk(1))) is None
            assert await nodes[2].collect() == 0
            assert nodes[2].has(chunk(1)), "a restart would evaluate its name once more"
            nodes[2].store.floor = None
            assert await nodes[2].collect() == 1

    run(test)


def test_a_node_that_was_away_while_names_and_rows_went_finds_what_it_has_too_much() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_everywhere(nodes, b"f", chunk(1))
            await written_everywhere(nodes, b"g", chunk(2))
            await trio.sleep(AFTER_PINS_S)
            nodes[3].stop()
            await nodes[1].tree.unlink(1, b"f")
            await nodes[1].collect()
            nodes[3].start()  # its log told observers of a life before
            await nodes.nursery.start(nodes[3].run)
            await trio.sleep(AFTER_PINS_S)
            await nodes[3].collect()
            assert not nodes[3].has(chunk(1))
            assert nodes[3].has(chunk(2))

    run(test)


def test_after_a_snapshot_what_the_state_does_not_name_goes() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_everywhere(nodes, b"f", chunk(1))
            await trio.sleep(AFTER_PINS_S)
            forget, nodes[3]._forget = nodes[3]._forget, lambda: None
            forget()
            await nodes[1].tree.unlink(1, b"f")
            await nodes[1].collect()
            nodes[3].replicator.state_replaced()
            await trio.sleep(2 * PERIOD_S)
            await nodes[3].collect()
            assert not nodes[3].has(chunk(1))

    run(test)


def test_a_new_leader_looks_for_rows_that_the_last_one_left() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await written_everywhere(nodes, b"f", chunk(1))
            await trio.sleep(AFTER_PINS_S)
            await nodes[1].tree.unlink(1, b"f")
            await nodes[2].collect()
            nodes[1].leads, nodes[2].leads = False, True
            await trio.sleep(2 * PERIOD_S)
            assert nodes[2].volume.overlooked
            nodes[2].tree.content.find_garbage(b"", 1000)
            await nodes[2].collect()
            assert nodes.named(chunk(1)) == -1

    run(test)


def test_more_candidates_than_memory_holds_are_found_by_the_next_sweep() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            for number in range(20):
                await written_everywhere(nodes, b"%d" % number, chunk(number))
            await trio.sleep(AFTER_PINS_S)
            nodes[2].volume.garbage_max = 5
            for number in range(20):
                await nodes[1].tree.unlink(1, b"%d" % number)
            await nodes[1].collect()
            for _ in range(20):
                await nodes[2].collect()
                await trio.sleep(PERIOD_S)
            assert nodes[2].blobs.stats().chunks == 0

    run(test)
