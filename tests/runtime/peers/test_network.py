"""PeerNetwork over real TLS on loopback: messages, requests, members coming and going."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from aspenfs import errors
from aspenfs.limits import (
    PEER_QUEUE_BYTES_MAX,
    PEER_REQUEST_BYTES_MAX,
    PEER_REQUESTS_BYTES_MAX,
    PEER_REQUESTS_MAX,
)
from aspenfs.runtime.peers import frames, links
from aspenfs.runtime.peers.frames import LinkKind
from tests.runtime.peers.nodes import (
    Node,
    Row,
    in_trio,
    make_authority,
    make_credentials,
    make_nodes,
    message,
    running,
    until,
)


async def echo(peer: int, body: Any) -> Any:
    return body


# --- messages ---


@in_trio
async def test_messages_arrive_in_order_and_many_in_one_frame(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    async with running(one, two):
        sent = [message(2, 1, commit=number) for number in range(1000)]
        one.network.gathers = True
        for each in sent:
            one.network.send(2, each)
        one.network.flush()
        await until(lambda: len(two.received) == len(sent))
        assert two.received == [(1, each) for each in sent]
        assert len(two.batches) < 10
        assert one.lost == []


@in_trio
async def test_both_directions_work_between_three_nodes(tmp_path: Path) -> None:
    nodes = make_nodes(tmp_path, 3)
    async with running(*nodes):
        for node in nodes:
            for other in nodes:
                if other is not node:
                    node.network.send(other.id, message(other.id, node.id))
        for node in nodes:
            await until(lambda node=node: len(node.received) == 2)  # type: ignore[misc]
            assert {peer for peer, _ in node.received} == {1, 2, 3} - {node.id}
            assert node.network.connected() == {1, 2, 3} - {node.id}


@in_trio
async def test_a_message_larger_than_a_batch_and_those_around_it_arrive(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    async with running(one, two):
        entry = (1, 8, 1, b"e" * (3 << 20))
        large = message(2, 1)._replace(type=1, index=7, entries=(entry,), log_term=1)  # type: ignore[arg-type]
        for each in (message(2, 1), large, message(2, 1), large, message(2, 1)):
            one.network.send(2, each)
        await until(lambda: len(two.received) == 5)
        assert two.received[3][1].entries[0].data == b"e" * (3 << 20)


@in_trio
async def test_a_message_to_who_is_not_connected_is_lost_and_reported(tmp_path: Path) -> None:
    (one,) = make_nodes(tmp_path, 1)
    async with running(one, connect=False):
        one.network.set_members({1: one.row, 2: Row(("127.0.0.1:1",))})
        for _ in range(5):
            one.network.send(2, message(2, 1))
        assert one.lost == []  # never within send
        await until(lambda: one.lost)
        await until(lambda: one.network.peer_error(2))
        error = one.network.peer_error(2)
        assert error is not None
        assert "Connection refused" in error.cause
        assert one.network.connected() == set()


@in_trio
async def test_the_queue_of_a_peer_that_does_not_read_is_bounded_and_what_is_dropped_is_reported(
    tmp_path: Path,
) -> None:
    one, two = make_nodes(tmp_path, 2)
    async with running(one, two):
        entry = (1, 8, 1, b"e" * (1 << 20))
        large = message(2, 1)._replace(type=1, index=7, entries=(entry,), log_term=1)  # type: ignore[arg-type]
        count = 2 * PEER_QUEUE_BYTES_MAX // (1 << 20)
        for _ in range(count):  # no await in between: nothing is written meanwhile
            one.network.send(2, large)
        channel = one.network._links[2, LinkKind.MESSAGES].channel
        assert channel is not None
        assert channel.queued_bytes <= PEER_QUEUE_BYTES_MAX
        await until(lambda: one.lost == [2])
        await until(lambda: not channel.queued_bytes)
        assert count // 3 < len(two.received) < count


@in_trio
async def test_what_the_core_raises_ends_the_network(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)

    def broken(peer: int, messages: object) -> None:
        raise ZeroDivisionError

    two.network.deliver = broken
    with pytest.RaisesGroup(pytest.RaisesExc(ZeroDivisionError), flatten_subgroups=True):
        async with running(one, two):
            one.network.send(2, message(2, 1))
            await trio.sleep_forever()


@in_trio
async def test_a_bug_in_reading_a_frame_ends_its_connection_only(
    tmp_path: Path, expected_errors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make_nodes(tmp_path, 2)
    two.network.handle("echo", echo)
    expected_errors += ["node=1 a frame could not be read", "node=2 a frame could not be read"]

    def buggy(payload: object) -> Any:
        monkeypatch.undo()
        raise KeyError("a bug")

    async with running(one, two):
        for name in ("decode_request", "decode_answer"):
            monkeypatch.setattr(frames, name, buggy)
            with pytest.raises(errors.PeerUnreachable):
                await one.network.request(2, "echo", 1, timeout_s=5)
            await until(lambda: one.network.connected() == {2})
            assert await one.network.request(2, "echo", 1, timeout_s=5) == 1


# --- requests ---


@in_trio
async def test_a_request_is_answered_with_what_its_handler_returns(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    two.network.handle("echo", echo)
    async with running(one, two):
        body = (b"bytes", "text", 7, None, (1, (2,)), {"map": b"\0"})
        assert await one.network.request(2, "echo", body, timeout_s=5) == body
        assert await one.network.request(2, "echo", [1, [2]], timeout_s=5) == (1, (2,))


@pytest.mark.parametrize("kind", ["blob.echo", "echo"])
@in_trio
async def test_requests_of_any_allowed_size_are_answered(tmp_path: Path, kind: str) -> None:
    one, two = make_nodes(tmp_path, 2)
    two.network.handle(kind, echo)
    async with running(one, two):
        for size in (0, 1, 65_520, 65_536, 65_600, 1 << 20, PEER_REQUEST_BYTES_MAX - 64):
            body = b"x" * size
            assert await one.network.request(2, kind, body, timeout_s=10) == body
        with pytest.raises(errors.TooLarge):
            await one.network.request(2, kind, b"x" * (PEER_REQUEST_BYTES_MAX + 200), timeout_s=5)


@in_trio
async def test_many_requests_at_once_get_each_its_own_answer(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    most = under_way = 0

    async def slow(peer: int, body: Any) -> Any:
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        await trio.sleep(0.001 * (body % 7))
        under_way -= 1
        return body * 2

    two.network.handle("slow", slow)
    answers: dict[int, Any] = {}

    async def ask(number: int) -> None:
        answers[number] = await one.network.request(2, "slow", number, timeout_s=15)

    async with running(one, two):
        async with trio.open_nursery() as nursery:
            for number in range(500):
                nursery.start_soon(ask, number)
        assert answers == {number: 2 * number for number in range(500)}
        assert most <= PEER_REQUESTS_MAX


@in_trio
async def test_the_bytes_of_requests_under_way_are_bounded(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    release = trio.Event()
    held = answered = 0

    async def hold(peer: int, body: bytes) -> int:
        nonlocal held
        held += len(body)
        await release.wait()
        return len(body)

    two.network.handle("blob.put", hold)

    async def ask() -> None:
        nonlocal answered
        assert await one.network.request(2, "blob.put", bytes(3 << 20), timeout_s=15) == 3 << 20
        answered += 1

    async with running(one, two), trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
        most = PEER_REQUESTS_BYTES_MAX // (3 << 20) * (3 << 20)
        await until(lambda: held >= most)
        await trio.sleep(0.2)
        assert held == most
        release.set()
        await until(lambda: answered == 20)


@in_trio
async def test_the_error_of_a_handler_is_raised_where_it_was_asked(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)

    async def not_leader(peer: int, body: Any) -> Any:
        raise errors.NotLeader("ask node 3", leader=3)

    two.network.handle("lead", not_leader)
    async with running(one, two):
        with pytest.raises(errors.NotLeader, match="ask node 3") as raised:
            await one.network.request(2, "lead", None, timeout_s=5)
        assert raised.value.leader == 3
        with pytest.raises(errors.NotSupported, match="nothing"):
            await one.network.request(2, "nothing", None, timeout_s=5)


@in_trio
async def test_a_bug_in_a_handler_is_logged_and_answered(tmp_path: Path, expected_errors: list[str]) -> None:
    one, two = make_nodes(tmp_path, 2)

    async def buggy(peer: int, body: Any) -> Any:
        raise KeyError("a bug")

    async def unsendable(peer: int, body: Any) -> Any:
        return object()

    two.network.handle("buggy", buggy)
    two.network.handle("unsendable", unsendable)
    two.network.handle("echo", echo)
    expected_errors.append("request=buggy failed")
    async with running(one, two):
        with pytest.raises(errors.RemoteFailure):
            await one.network.request(2, "buggy", None, timeout_s=5)
        with pytest.raises(errors.InvalidArgument):
            await one.network.request(2, "unsendable", None, timeout_s=5)
        assert await one.network.request(2, "echo", 1, timeout_s=5) == 1


@in_trio
async def test_a_request_that_is_not_answered_in_time_is_given_up_at_both_ends(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    ended = trio.Event()

    async def for_ever(peer: int, body: Any) -> Any:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    two.network.handle("for_ever", for_ever)
    two.network.handle("echo", echo)
    async with running(one, two):
        with pytest.raises(errors.PeerUnreachable, match=r"did not answer for_ever in 0\.05 s"):
            await one.network.request(2, "for_ever", None, timeout_s=0.05)
        await ended.wait()
        assert await one.network.request(2, "echo", 1, timeout_s=5) == 1


@in_trio
async def test_a_request_whose_peer_goes_away_fails_at_once(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    asked = trio.Event()

    async def for_ever(peer: int, body: Any) -> Any:
        asked.set()
        await trio.sleep_forever()

    two.network.handle("for_ever", for_ever)
    async with running(one), trio.open_nursery() as nursery, running(two):
        for node in (one, two):
            node.network.set_members({1: one.row, 2: two.row})
        await until(lambda: one.network.connected())

        async def ask() -> None:
            with pytest.raises(errors.PeerUnreachable, match="went away"):
                await one.network.request(2, "for_ever", None, timeout_s=15)

        nursery.start_soon(ask)
        await asked.wait()
    assert one.lost == [2]


@in_trio
async def test_a_small_request_does_not_wait_behind_bulk_data(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    hold = trio.Event()

    async def held(peer: int, body: Any) -> None:
        await hold.wait()

    two.network.handle("blob.put", held)
    two.network.handle("echo", echo)
    async with running(one, two), trio.open_nursery() as nursery:

        async def put() -> None:
            await one.network.request(2, "blob.put", bytes(1 << 20), timeout_s=15)

        for _ in range(2 * PEER_REQUESTS_MAX):
            nursery.start_soon(put)
        await trio.sleep(0.05)
        assert await one.network.request(2, "echo", 1, timeout_s=5) == 1
        hold.set()


@in_trio
async def test_a_request_waits_for_the_bulk_link_of_a_peer_that_lives(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    two.network.handle("blob.echo", echo)
    async with running(one, two):
        link = one.network._links[2, LinkKind.BULK]
        await link.up.wait()
        assert link.channel is not None
        link.channel.end("for the test")
        await until(lambda: link.channel is None)
        assert await one.network.request(2, "blob.echo", 7, timeout_s=10) == 7


# --- members ---


@in_trio
async def test_a_node_that_is_not_in_the_table_is_refused_and_let_in_when_it_is(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    async with running(one, two, connect=False):
        one.network.set_members({1: one.row, 2: two.row})
        await until(lambda: one.network.peer_error(2))
        error = one.network.peer_error(2)
        assert error is not None
        assert "node 1 is not among the members that node 2 knows" in error.cause
        two.network.set_members({1: one.row, 2: two.row})
        await until(lambda: one.network.connected() == {2} and two.network.connected() == {1})
        assert one.network.peer_error(2) is None


@in_trio
async def test_a_removed_member_is_thrown_out_and_refused(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    async with running(one, two):
        one.network.set_members({1: one.row, 2: two.row._replace(state="removed")})
        assert one.network.connected() == set()
        await until(lambda: two.network.peer_error(1))
        await until(lambda: "was removed" in two.network.peer_error(1).cause)  # type: ignore[union-attr]
        await until(lambda: two.network.peer_error(1).attempts > 2)  # type: ignore[union-attr]
        assert not one.network._incoming


@in_trio
async def test_a_member_that_lost_its_log_is_refused(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    async with running(one, two, connect=False):
        two.network.set_members({1: one.row, 2: two.row})
        one.network.set_members({1: one.row, 2: two.row._replace(born=b"b" * 16)})
        await until(lambda: two.network.peer_error(1) and one.network.peer_error(2))
        for error in (two.network.peer_error(1), one.network.peer_error(2)):
            assert error is not None
            assert "its disk was replaced" in error.cause


@in_trio
async def test_who_answers_under_another_members_address_is_not_taken_for_it(tmp_path: Path) -> None:
    one, two, three = make_nodes(tmp_path, 3)
    async with running(one, two, three, connect=False):
        table = {node.id: node.row for node in (one, two, three)}
        two.network.set_members(table)
        three.network.set_members(table)
        one.network.set_members({1: one.row, 2: three.row._replace(born=b""), 3: three.row})
        await until(lambda: one.network.connected() == {3})
        await until(lambda: one.network.peer_error(2))
        assert "node 3 answers where node 2 should" in one.network.peer_error(2).cause  # type: ignore[union-attr]


@in_trio
async def test_a_changed_address_is_followed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PEER_BACKOFF_MS_MIN", "PEER_BACKOFF_MS_MAX"):
        monkeypatch.setattr(links, name, 1_000_000)
    one, two = make_nodes(tmp_path, 2)
    async with running(one, two, connect=False):
        table = {1: one.row, 2: two.row}
        one.network.set_members({**table, 2: two.row._replace(addresses=("127.0.0.1:1",))})
        two.network.set_members(table)
        # Who is called by a peer tries it at once: not that is to help here.
        await until(lambda: len(one.network._incoming) == len(LinkKind))
        await until(lambda: one.network.peer_error(2))
        await trio.testing.wait_all_tasks_blocked(0.1)
        one.network.set_members(table)  # in a pause that is longer than this test
        await until(lambda: one.network.connected() == {2})


@in_trio
async def test_of_several_addresses_the_one_that_works_is_found(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    async with running(one, two, connect=False):
        good = f"localhost:{two.network.ports[0]}"
        places = ("127.0.0.1:1", "not a host", "does-not-exist.invalid:7420", good)
        one.network.set_members({1: one.row, 2: two.row._replace(addresses=places)})
        two.network.set_members({1: one.row, 2: two.row})
        await until(lambda: one.network.connected() == {2})


@in_trio
async def test_a_node_that_was_away_is_connected_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = make_authority()
    one = Node(make_credentials(tmp_path / "n1", authority, 1))
    shown = make_credentials(tmp_path / "n2", authority, 2)
    two = Node(shown)
    async with running(one):
        async with running(two):
            table = {1: one.row, 2: two.row}
            for node in (one, two):
                node.network.set_members(table)
            await until(lambda: one.network.connected() == {2})
        await until(lambda: one.network.peer_error(2))
        await until(lambda: one.lost)  # told by a task of its own
        two = Node(shown, incarnation=2)
        async with running(two):
            for node in (one, two):
                node.network.set_members({1: one.row, 2: two.row})
            await until(lambda: one.network.connected() == {2} and two.network.connected() == {1})
            one.network.send(2, message(2, 1))
            await two.arrived.wait()
    # What happens again and again is written once.
    refusals = [record for record in caplog.records if "not connected" in record.message]
    assert len(refusals) <= 4


@in_trio
async def test_an_old_copy_of_a_node_is_refused(tmp_path: Path) -> None:
    authority = make_authority()
    one = Node(make_credentials(tmp_path / "n1", authority, 1))
    shown = make_credentials(tmp_path / "n2", authority, 2)
    new, old, twin = Node(shown, incarnation=7), Node(shown, incarnation=6), Node(shown, incarnation=7)
    async with running(one, new, old, twin, connect=False):
        for node in (one, new):
            node.network.set_members({1: one.row, 2: new.row})
        await until(lambda: one.network.connected() == {2} and new.network.connected() == {1})
        for node in (old, twin):
            node.network.set_members({1: one.row, 2: new.row})
        await until(lambda: old.network.peer_error(1) and twin.network.peer_error(1))
        assert "is an old copy" in old.network.peer_error(1).cause  # type: ignore[union-attr]
        assert "runs twice" in twin.network.peer_error(1).cause  # type: ignore[union-attr]


@in_trio
async def test_an_old_copy_is_refused_however_often_it_is_started(tmp_path: Path) -> None:
    authority = make_authority()
    one = Node(make_credentials(tmp_path / "n1", authority, 1))
    shown = make_credentials(tmp_path / "n2", authority, 2)
    seen = Node(shown, incarnation=6, mark=60, former=(50, 40, 30))
    copies = [Node(shown, incarnation=7, mark=71, former=(61, 51, 41, 30)),
              Node(shown, incarnation=8, mark=81, former=(71, 61, 51, 41, 30))]  # fmt: skip
    async with running(one, seen, *copies, connect=False):
        for node in (one, seen):
            node.network.set_members({1: one.row, 2: seen.row})
        await until(lambda: one.network.connected() == {2} and seen.network.connected() == {1})
        for copy in copies:
            copy.network.set_members({1: one.row, 2: seen.row})
            await until(lambda copy=copy: copy.network.peer_error(1))  # type: ignore[misc]
            cause = copy.network.peer_error(1).cause  # type: ignore[union-attr]
            assert cause == ("node 2 does not know of its start number 6, which was seen here: its state "
                             "directory is an old copy")  # fmt: skip


@in_trio
@pytest.mark.parametrize(
    ("incarnation", "former"),
    [(7, (60, 50)), (9, (80, 70, 60)), (40, tuple(range(390, 70, -10))), (9, ()), (9, (80, 70))],
)
async def test_a_later_start_is_let_in(tmp_path: Path, incarnation: int, former: tuple[int, ...]) -> None:
    """Also one of an earlier release, or after one, or after very many: nothing is known against it."""
    authority = make_authority()
    one = Node(make_credentials(tmp_path / "n1", authority, 1))
    shown = make_credentials(tmp_path / "n2", authority, 2)
    seen = Node(shown, incarnation=6, mark=60, former=(50, 40, 30))
    later = Node(shown, incarnation=incarnation, mark=7, former=former)
    async with running(one, seen, later, connect=False):
        for node in (one, seen):
            node.network.set_members({1: one.row, 2: seen.row})
        await until(lambda: one.network.connected() == {2} and seen.network.connected() == {1})
        later.network.set_members({1: one.row, 2: later.row})
        await until(lambda: later.network.connected() == {1})


@in_trio
async def test_a_newer_life_of_a_node_ends_the_connections_of_the_former(tmp_path: Path) -> None:
    authority = make_authority()
    one = Node(make_credentials(tmp_path / "n1", authority, 1))
    shown = make_credentials(tmp_path / "n2", authority, 2)
    former, newer = Node(shown, incarnation=1), Node(shown, incarnation=2)
    async with running(one, former, newer, connect=False):
        former.network.set_members({1: one.row, 2: former.row})
        one.network.set_members({1: one.row, 2: former.row})
        await until(lambda: former.network.connected() == {1})
        newer.network.set_members({1: one.row, 2: newer.row})
        await until(lambda: newer.network.connected() == {1} and not former.network.connected())
        await until(lambda: {channel.hello.incarnation for channel in one.network._incoming} == {2})


@in_trio
async def test_a_node_does_not_talk_to_itself(tmp_path: Path) -> None:
    authority = make_authority()
    shown = make_credentials(tmp_path / "n1", authority, 1)
    one, copy = Node(shown), Node(shown, incarnation=2)
    async with running(one, copy, connect=False):
        one.network.set_members({1: one.row})
        copy.network.set_members({1: copy.row, 2: one.row._replace(born=b"")})
        await until(lambda: copy.network.peer_error(2))
        assert "node 1 answers where node 2 should" in copy.network.peer_error(2).cause  # type: ignore[union-attr]


# --- renewal, ends ---


@in_trio
async def test_a_connection_is_renewed_without_a_request_or_a_message_lost(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    hold = trio.Event()

    async def held(peer: int, body: Any) -> Any:
        await hold.wait()
        return body

    two.network.handle("held", held)
    two.network.handle("echo", echo)
    async with running(one, two), trio.open_nursery() as nursery:

        async def ask() -> None:
            assert await one.network.request(2, "held", 7, timeout_s=15) == 7

        nursery.start_soon(ask)
        await trio.sleep(0.05)
        link = one.network._links[2, LinkKind.MESSAGES]
        for number in range(3):
            former = link.channel
            one.network.set_credentials(one.credentials)
            one.network.send(2, message(2, 1, commit=number))
            await until(lambda former=former: link.channel is not former)  # type: ignore[misc]
            assert await one.network.request(2, "echo", number, timeout_s=5) == number
        assert one.lost == []
        hold.set()
        await until(lambda: len(two.received) == 3)
        await until(lambda: len(two.network._incoming) == 2)
    assert one.lost == []


@in_trio
async def test_nothing_is_left_when_the_network_is_cancelled_in_the_middle_of_it(tmp_path: Path) -> None:
    nodes = make_nodes(tmp_path, 3)

    async def slow_echo(peer: int, body: Any) -> Any:
        await trio.sleep(0.001)
        return body

    for node in nodes:
        node.network.handle("echo", slow_echo)

    async def busy(node: Node, other: Node) -> None:
        with contextlib.suppress(errors.PeerUnreachable):
            while True:
                node.network.send(other.id, message(other.id, node.id))
                await node.network.request(other.id, "echo", bytes(200_000), timeout_s=5)

    async with trio.open_nursery() as nursery, running(*nodes):
        for node in nodes:
            for other in nodes:
                if node is not other:
                    nursery.start_soon(busy, node, other)
        await trio.sleep(0.1)


@in_trio
async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    async with running(one):
        with pytest.raises(errors.Busy, match=rf"127\.0\.0\.1:{one.network.ports[0]}.*choose another port"):
            await two.network.run([one.address])
        with pytest.raises(errors.InvalidArgument, match="cannot listen"):
            await two.network.run(["192.0.2.1:7420"])


@in_trio
async def test_it_listens_and_connects_over_ipv6(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    async with trio.open_nursery() as nursery:
        for node in (one, two):
            await nursery.start(node.network.run, ["[::1]:0"])
        table = {node.id: Row((f"[::1]:{node.network.ports[0]}",)) for node in (one, two)}
        for node in (one, two):
            node.network.set_members(table)
        await until(lambda: one.network.connected() and two.network.connected())
        nursery.cancel_scope.cancel()


@in_trio
async def test_pings_measure_the_way(tmp_path: Path) -> None:
    one, two = make_nodes(tmp_path, 2)
    async with running(one, two):
        await until(lambda: 0 < one.network.round_trip_ns(2) < 1_000_000_000)


def test_the_log_names_node_and_address(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    @in_trio
    async def connect() -> None:
        one, two = make_nodes(tmp_path, 2)
        async with running(one, two):
            pass

    connect()
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    assert any("node=1 link=messages address=127.0.0.1:" in record.message for record in caplog.records)
