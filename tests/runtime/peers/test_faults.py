"""Peers on a bad network: partitions of one way and both, delays, resets, slow links; and the proxy."""

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from aspenfs import errors
from aspenfs.limits import PEER_IDLE_MS
from tests.faultproxy import FaultProxy, running_proxy
from tests.runtime.peers.nodes import Node, Row, in_trio, make_nodes, message, running, until


@asynccontextmanager
async def apart(directory: Path) -> AsyncIterator[tuple[Node, Node, FaultProxy]]:
    """Two nodes; the first reaches the second through a proxy, the second the first directly."""
    one, two = make_nodes(directory, 2)

    async def echo(peer: int, body: Any) -> Any:
        return body

    two.network.handle("echo", echo)
    two.network.handle("blob.echo", echo)
    async with running(one, two, connect=False) as nursery:
        proxy = FaultProxy("127.0.0.1", two.network.ports[0])
        await nursery.start(proxy.run)
        one.network.set_members({1: one.row, 2: Row((proxy.address,), born=two.row.born)})
        two.network.set_members({1: one.row, 2: two.row})
        await until(lambda: one.network.connected() == {2} and two.network.connected() == {1})
        yield one, two, proxy


@in_trio
async def test_a_peer_that_vanishes_without_a_word_is_noticed_and_found_again(tmp_path: Path) -> None:
    async with apart(tmp_path) as (one, two, proxy):
        proxy.cut()
        began = trio.current_time()
        await until(lambda: not one.network.connected())
        assert trio.current_time() - began < PEER_IDLE_MS / 1000 + 10
        error = one.network.peer_error(2)
        assert error is not None
        assert "nothing was heard" in error.cause
        await until(lambda: one.lost == [2])  # told by a task of its own
        proxy.heal()
        began = trio.current_time()
        await until(lambda: one.network.connected() == {2})
        assert trio.current_time() - began < 10
        one.network.send(2, message(2, 1, commit=7))
        await until(lambda: (1, message(2, 1, commit=7)) in two.received)


@pytest.mark.parametrize("way", ["there", "back"])
@in_trio
async def test_a_partition_of_one_way_ends_the_link_at_both_ends(tmp_path: Path, way: str) -> None:
    async with apart(tmp_path) as (one, two, proxy):
        getattr(proxy, way).hold()
        await until(lambda: not one.network.connected())
        await until(lambda: not two.network._incoming)
        assert two.network.connected() == {1}  # the links of the other direction know nothing of it
        proxy.heal()
        await until(lambda: one.network.connected() == {2})


@in_trio
async def test_messages_survive_a_short_partition(tmp_path: Path) -> None:
    async with apart(tmp_path) as (one, two, proxy):
        proxy.cut()
        sent = [message(2, 1, commit=number) for number in range(100)]
        for each in sent:
            one.network.send(2, each)
            if each.commit % 10 == 0:
                await trio.sleep(0.01)
        assert two.received == []
        proxy.heal()
        await until(lambda: len(two.received) == 100)
        assert [each for _, each in two.received] == sent
        assert one.lost == []


@in_trio
async def test_a_reset_loses_messages_but_not_their_order(tmp_path: Path) -> None:
    async with apart(tmp_path) as (one, two, proxy):
        for number in range(400):
            one.network.send(2, message(2, 1, commit=number))
            if number % 100 == 50:
                proxy.reset()
            await trio.sleep(0.002)
        await until(lambda: one.network.connected() == {2})
        one.network.send(2, message(2, 1, commit=1000))
        await until(lambda: two.received[-1][1].commit == 1000)
        commits = [each.commit for _, each in two.received]
        assert commits == sorted(set(commits))
        assert set(one.lost) == {2}


@in_trio
async def test_requests_are_answered_or_fail_on_a_network_that_resets(tmp_path: Path) -> None:
    async with apart(tmp_path) as (one, _, proxy):
        outcomes = {"answered": 0, "failed": 0}

        async def ask(kind: str) -> None:
            for number in range(40):
                body = (number, bytes(50_000))
                try:
                    assert await one.network.request(2, kind, body, timeout_s=5) == body
                    outcomes["answered"] += 1
                except errors.PeerUnreachable:
                    outcomes["failed"] += 1
                    await until(lambda: one.network.connected() == {2})

        async with trio.open_nursery() as nursery:
            for kind in ("echo", "blob.echo") * 4:
                nursery.start_soon(ask, kind)
            for _ in range(8):
                await trio.sleep(0.05)
                proxy.reset()
        assert outcomes["answered"] > 20
        assert outcomes["failed"] > 0


@in_trio
async def test_a_slow_and_distant_peer_is_no_dead_one(tmp_path: Path) -> None:
    async with apart(tmp_path) as (one, _, proxy):
        proxy.there.delay_s = proxy.back.delay_s = 0.1
        proxy.there.bytes_per_s = 300_000
        began = trio.current_time()
        body = bytes(2 << 20)  # longer on its way than a silent peer would be let live
        assert await one.network.request(2, "blob.echo", body, timeout_s=30) == body
        assert trio.current_time() - began > PEER_IDLE_MS / 1000 + 2
        assert one.network.connected() == {2}
        assert one.lost == []
        assert one.network.round_trip_ns(2) > 150_000_000


@in_trio
async def test_a_peer_that_refuses_connections_is_tried_again_and_again(tmp_path: Path) -> None:
    async with apart(tmp_path) as (one, _, proxy):
        proxy.refusing = True
        proxy.reset()
        await until(lambda: one.network.peer_error(2) and one.network.peer_error(2).attempts > 3)  # type: ignore[union-attr]
        proxy.heal()
        await until(lambda: one.network.connected() == {2})
        assert proxy.connections < 60


# --- the proxy itself ---


def test_a_proxy_in_a_thread_carries_holds_and_cuts() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as target,
        running_proxy(*target.getsockname()) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as near,
        target.accept()[0] as far,
    ):
        far.settimeout(20)
        near.sendall(b"one")
        assert far.recv(10) == b"one"
        proxy.call(proxy.there.hold)
        near.sendall(b"two")
        far.settimeout(0.1)
        with pytest.raises(TimeoutError):
            far.recv(10)
        far.sendall(b"back")
        assert near.recv(10) == b"back"
        proxy.call(proxy.heal)
        far.settimeout(20)
        assert far.recv(10) == b"two"
        proxy.back.delay_s = 0.2
        began = time.monotonic()
        far.sendall(b"late")
        assert near.recv(10) == b"late"
        assert time.monotonic() - began >= 0.2
        proxy.call(proxy.reset)
        with pytest.raises(ConnectionResetError):
            near.recv(10)
