"""A transaction is proposed only when a majority has the chunks that it names on disk."""

import pytest
import trio

from aspenfs import errors
from aspenfs.blobs.format import digest_of
from aspenfs.cluster.types import Configuration
from aspenfs.limits import BLOB_PIN_S, BLOB_PUSH_BYTES_MAX, BLOB_PUSH_QUEUE_MAX, MIB, PROPOSAL_TIMEOUT_MS
from aspenfs.runtime.blob_replication import wire
from aspenfs.runtime.blob_replication.push import RENEW_S, has_majority
from tests.filesystem.volumes import CALLER
from tests.runtime.blob_cluster import Cluster, chunk, cluster, damage, on_disk, run, until

TIMEOUT_S = PROPOSAL_TIMEOUT_MS / 1000


def holders(nodes: Cluster, data: bytes) -> set[int]:
    return {number for number, node in nodes.nodes.items() if on_disk(node.blobs, data)}


def test_a_majority_of_each_half_is_what_counts() -> None:
    three = Configuration((1, 2, 3))
    assert not has_majority(three, {1})
    assert has_majority(three, {1, 3})
    assert not has_majority(three, {1, 4, 5})
    assert not has_majority(Configuration((1, 2, 3, 4)), {1, 2})
    joint = Configuration((1, 2, 3), outgoing=(3, 4, 5))
    assert not has_majority(joint, {1, 2})
    assert not has_majority(joint, {1, 2, 4})
    assert has_majority(joint, {1, 3, 4})
    assert has_majority(Configuration((1,), learners=(2, 3)), {1})


def test_what_is_written_is_on_disk_on_a_majority_before_it_is_proposed() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            before_log = nodes[1].store.before_propose
            seen = []

            async def before(command: object) -> None:
                await before_log(command)  # type: ignore[arg-type]
                seen.append(holders(nodes, chunk(1)))

            nodes[1].store.before_propose = before
            await nodes[1].create(b"f", chunk(1))
            assert len(seen[-1]) >= 2
            assert nodes[1].replicator.pusher.held_bytes == 0

    run(test)


def test_a_push_begins_when_the_chunk_is_put_and_goes_to_learners_too() -> None:
    async def test() -> None:
        async with cluster(3, learners=1) as nodes:
            nodes[1].replicator.put(chunk(1))
            await until(lambda: all(node.has(chunk(1)) for node in nodes.nodes.values()), 1)
            requests = len(nodes.network.requests)
            await nodes[1].replicator.pusher.ensure([digest_of(chunk(1))])
            assert len(nodes.network.requests) == requests, "it was done already"
            assert nodes[1].replicator.pusher.pushed_chunks == 3

    run(test)


def test_chunks_put_together_travel_together() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.delay_s = {2: 0.1, 3: 0.1}
            for number in range(200):
                nodes[1].replicator.put(chunk(number))
            await nodes[1].replicator.pusher.ensure([digest_of(chunk(number)) for number in range(200)])
            puts = [request for request in nodes.network.requests if request[1:3] == (2, wire.PUT)]
            assert sum(count for *_, count in puts) == 200
            assert len(puts) <= 2

    run(test)


def test_a_slow_a_hung_and_a_dead_peer_hold_up_nobody() -> None:
    async def test() -> None:
        async with cluster(5, off={5}) as nodes:
            nodes.network.delay_s[3] = 5.0
            nodes.network.hung.add(4)
            began = trio.current_time()
            for number in range(50):
                await nodes[1].create(b"%d" % number, chunk(number))
                if number == 0:
                    # A majority of five needs the slow one.
                    assert trio.current_time() - began >= 5
                    nodes.network.delay_s[3] = 0.0
                    began = trio.current_time()
            assert trio.current_time() - began < 1
            assert all({1, 2, 3} <= holders(nodes, chunk(number)) for number in range(50))

    run(test)


def test_without_a_majority_it_fails_after_a_bounded_time_and_works_again_afterwards() -> None:
    async def test() -> None:
        async with cluster(3, off={2, 3}) as nodes:
            began = trio.current_time()
            with pytest.raises(errors.NoQuorum, match=r"missing on node 2 \(not connected\), 3"):
                await nodes[1].create(b"f", chunk(1))
            assert trio.current_time() - began == pytest.approx(TIMEOUT_S, abs=0.5)
            assert nodes[1].replicator.pusher.held_bytes == 0, "nobody waits for it any more"
            nodes.network.down.clear()
            await nodes[1].create(b"g", chunk(1))
            assert len(holders(nodes, chunk(1))) >= 2

    run(test)


def test_a_peer_that_comes_back_in_time_saves_the_write() -> None:
    async def test() -> None:
        async with cluster(3, off={2, 3}) as nodes:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(nodes[1].create, b"f", chunk(1))
                await trio.sleep(5)
                nodes.network.down.remove(3)
            assert holders(nodes, chunk(1)) >= {1, 3}

    run(test)


def test_a_connection_that_breaks_under_a_push_is_tried_again() -> None:
    async def test() -> None:
        async with cluster(3, off={3}) as nodes:
            nodes.network.refusals.append((2, wire.PUT, errors.PeerUnreachable("broken")))
            await nodes[1].create(b"f", chunk(1))
            assert trio.current_time() < RENEW_S, "at once, not when the writer loses patience"
            nodes.network.refusals += [(2, wire.PUT, errors.PeerUnreachable("broken"))] * 3
            await nodes[1].create(b"g", chunk(2))
            assert trio.current_time() < 2
            assert holders(nodes, chunk(2)) == {1, 2}

    run(test)


def test_an_answer_that_makes_no_sense_counts_for_nothing() -> None:
    async def test() -> None:
        async with cluster(3, off={3}) as nodes:
            answers = iter([[], [7], "x", None, b"\0"])

            async def answer(*_: object) -> object:
                return next(answers, [0])

            handlers = nodes.network.ports[2].handlers
            right, handlers[wire.PUT] = handlers[wire.PUT], answer
            async with trio.open_nursery() as nursery:
                nursery.start_soon(nodes[1].create, b"f", chunk(1))
                await until(lambda: next(answers, None) is None)
                handlers[wire.PUT] = right

    run(test)


def test_a_full_peer_is_not_counted_and_does_not_matter_while_the_others_have_room() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes[2].full = True
            began = trio.current_time()
            await nodes[1].create(b"f", chunk(1))
            assert trio.current_time() - began < 1
            assert holders(nodes, chunk(1)) == {1, 3}

    run(test)


def test_when_a_majority_is_full_the_writer_is_told_so_at_once() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes[2].full = nodes[3].full = True
            began = trio.current_time()
            with pytest.raises(errors.NoSpace, match="node 2, 3 has no room"):
                await nodes[1].create(b"f", chunk(1))
            with pytest.raises(errors.NoSpace):
                await nodes[1].create(b"g", chunk(2))
            assert trio.current_time() - began < 1
            assert nodes.network.asked(2, wire.PUT) == 1, "it is not sent more while it is full"
            nodes[2].full = False
            await trio.sleep(3)
            await nodes[1].create(b"h", chunk(1))
            assert len(holders(nodes, chunk(1))) == 2

    run(test)


def test_a_disk_without_room_under_a_receiver_is_a_refusal() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes[2].disk.fail("pwrite", 28, times=-1)
            request = nodes.network.ports[1].request
            body = [[digest_of(chunk(2)), chunk(2)]]
            assert tuple(await request(2, wire.PUT, body, timeout_s=1)) == (wire.Verdict.FULL,)  # type: ignore[arg-type]
            await nodes[1].create(b"f", chunk(1))
            assert holders(nodes, chunk(1)) == {1, 3}

    run(test)


def test_a_receiver_takes_no_bytes_that_are_not_those_of_the_digest() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            request = nodes.network.ports[1].request
            body = [[digest_of(chunk(1)), chunk(2)], [digest_of(chunk(3)), chunk(3)]]
            assert tuple(await request(2, wire.PUT, body, timeout_s=1)) == (  # type: ignore[arg-type]
                wire.Verdict.DAMAGED,
                wire.Verdict.STORED,
            )
            assert not nodes[2].has(chunk(1))
            assert not nodes[2].has(chunk(2))
            assert on_disk(nodes[2].blobs, chunk(3))

    run(test)


def test_a_damaged_copy_counts_for_nothing_and_is_replaced_by_what_is_sent() -> None:
    async def test() -> None:
        async with cluster(3, off={3}) as nodes:
            for node in (nodes[1], nodes[2]):
                node.blobs.put(chunk(1))
            damage(nodes[2], chunk(1))
            await nodes[1].create(b"f", chunk(1))
            assert nodes.network.asked(2, wire.PUT) == 1
            assert nodes[2].blobs.get(digest_of(chunk(1))) == chunk(1)
            nodes[2].blobs.put(chunk(2))
            damage(nodes[2], chunk(2))
            await nodes[1].create(b"g", chunk(2))
            assert nodes[2].blobs.get(digest_of(chunk(2))) == chunk(2)

    run(test)


def test_in_a_joint_configuration_both_halves_must_have_it() -> None:
    async def test() -> None:
        joint = Configuration((1, 2, 3), outgoing=(3, 4, 5))
        async with cluster(5, configuration=joint, off={4, 5}) as nodes:
            with pytest.raises(errors.NoQuorum):
                await nodes[1].create(b"f", chunk(1))
            nodes.network.down.remove(5)
            nodes.network.down.add(2)
            await nodes[1].create(b"g", chunk(2))
            assert holders(nodes, chunk(2)) >= {1, 3, 5}

    run(test)


def test_who_has_it_counts_again_when_the_voters_change() -> None:
    async def test() -> None:
        async with cluster(5, configuration=Configuration((1, 2, 3)), off={4, 5}) as nodes:
            digest = nodes[1].replicator.put(chunk(1))
            await nodes[1].replicator.pusher.ensure([digest])
            assert holders(nodes, chunk(1)) <= {1, 2, 3}
            nodes.configuration = Configuration((1, 4, 5))
            nodes.network.down.clear()
            await nodes[1].replicator.pusher.ensure([digest])
            assert len(holders(nodes, chunk(1)) & {1, 4, 5}) >= 2

    run(test)


def test_a_learner_that_writes_needs_the_voters_and_counts_for_nothing() -> None:
    async def test() -> None:
        async with cluster(3, learners=1, off={2, 3}) as nodes:
            with pytest.raises(errors.NoQuorum):
                await nodes[4].create(b"f", chunk(1))
            nodes.network.down.remove(2)
            await nodes[4].create(b"g", chunk(1))
            assert holders(nodes, chunk(1)) >= {1, 2}

    run(test)


def test_a_single_voter_with_learners_waits_for_its_own_disk_only() -> None:
    async def test() -> None:
        async with cluster(1, learners=1) as nodes:
            nodes.network.hung.add(2)
            await nodes[1].create(b"f", chunk(1))
            assert trio.current_time() < 1
            assert holders(nodes, chunk(1)) == {1}

    run(test)


def test_a_node_that_is_alone_asks_nobody_and_pins_nothing() -> None:
    async def test() -> None:
        async with cluster(1) as nodes:
            await nodes[1].create(b"f", chunk(1), chunk(2))
            await nodes[1].tree.unlink(1, b"f")
            assert not nodes[1].replicator.pins
            assert await nodes[1].collect() == 2
            assert nodes.network.requests == []

    run(test)


def test_a_chunk_that_is_named_already_is_neither_sent_nor_asked_for() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            await nodes[1].create(b"f", chunk(1))
            await until(lambda: nodes[2].has(chunk(1)) and nodes[3].has(chunk(1)), 1)
            requests = len(nodes.network.requests)
            await nodes[1].create(b"g", chunk(1))
            await nodes[2].create(b"h", chunk(1))
            handle = await nodes[1].tree.open(await nodes[1].create(b"i", chunk(1)), 2, CALLER)
            await handle.write(5000, b"x")
            assert len(nodes.network.requests) == requests
            assert nodes.named(chunk(1)) == 5, "three files have it whole, the fourth in two pieces"
            nodes[3].blobs.delete([digest_of(chunk(1))])
            await nodes[3].create(b"j", chunk(1))
            await trio.sleep(1)
            assert len(nodes.network.requests) == requests, "though it was not here, the others have it"

    run(test)


def test_what_was_here_but_is_not_named_is_asked_for_before_it_is_sent() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            for number in (1, 2, 3):
                nodes[number].blobs.put(chunk(1))  # left by transactions that failed
            nodes[1].blobs.put(chunk(2))
            await nodes[1].create(b"f", chunk(1))
            assert nodes.network.asked(2, wire.PUT) == 0
            assert len(holders(nodes, chunk(1))) >= 2, "an answer means on disk, not in the page cache"
            await nodes[1].create(b"g", chunk(2))
            assert len(holders(nodes, chunk(2))) >= 2

    run(test)


def test_an_answer_is_not_relied_on_for_longer_than_the_peer_spares_the_chunk() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            digest = nodes[1].replicator.put(chunk(1))
            await nodes[1].replicator.pusher.ensure([digest])
            await until(lambda: nodes[3].has(chunk(1)), 1)
            await trio.sleep(2 * BLOB_PIN_S)
            for number in (2, 3):
                nodes[number].blobs.delete([digest])
            await nodes[1].replicator.pusher.ensure([digest])
            assert len(holders(nodes, chunk(1))) >= 2

    run(test)


def test_memory_is_bounded_while_nobody_takes_what_is_put() -> None:
    async def test() -> None:
        async with cluster(3, off={2, 3}) as nodes:
            pusher = nodes[1].replicator.pusher
            digests = [nodes[1].replicator.put(chunk(number, MIB)) for number in range(70)]
            assert pusher.held_bytes == BLOB_PUSH_BYTES_MAX
            nodes.network.down.clear()
            await pusher.ensure(digests)
            assert all(len(holders(nodes, chunk(number, MIB))) >= 2 for number in (0, 69))
            assert pusher.held_bytes == 0

    run(test)


def test_a_peer_that_lags_for_long_is_left_to_its_own_repair() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes.network.hung.add(3)
            pusher = nodes[1].replicator.pusher
            for number in range(BLOB_PUSH_QUEUE_MAX + 100):
                await pusher.ensure([nodes[1].replicator.put(number.to_bytes(4, "big"))])
            assert len(pusher._queues[3].queue) <= BLOB_PUSH_QUEUE_MAX
            assert pusher.held_bytes == 0

    run(test)


def test_a_receiver_that_spares_as_much_as_it_can_is_asked_again_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with cluster(3, off={3}) as nodes:
            nodes[2].replicator.pins._most = 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(nodes[1].create, b"f", chunk(1))
                await trio.sleep(1)
                assert holders(nodes, chunk(1)) == {1}
                nodes[2].replicator.pins._most = 10
            assert holders(nodes, chunk(1)) == {1, 2}

    run(test)
    assert not caplog.records, "it is nothing to worry about"


def test_a_sync_that_fails_ends_the_replicator() -> None:
    async def test() -> None:
        async with cluster(3) as nodes:
            nodes[1].disk.fail("datasync", 5, times=-1)
            with trio.move_on_after(1):
                await nodes[1].create(b"f", chunk(1))
            await trio.sleep(1)

    with pytest.raises(BaseExceptionGroup) as raised:
        run(test)
    assert raised.group_contains(errors.SyncFailed)
