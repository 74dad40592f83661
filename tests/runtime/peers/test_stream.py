"""TlsStream between two ends in one loop: frames of any size, in any pieces, up to the last one."""

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from aspenfs.errors import ProtocolError
from aspenfs.limits import PEER_FRAME_BYTES_MAX
from aspenfs.runtime.peers.credentials import Credentials
from aspenfs.runtime.peers.stream import Broken, TlsStream
from tests.runtime.peers.nodes import in_trio, make_authority, make_credentials


@pytest.fixture
def shown(tmp_path: Path) -> Credentials:
    return make_credentials(tmp_path, make_authority(), 1)


@asynccontextmanager
async def pair(shown: Credentials) -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    """Client and server, the handshake done."""
    one, two = socket.socketpair()
    client = TlsStream(one, shown.client_context(), server=False)
    server = TlsStream(two, shown.server_context(), server=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.handshake)
        nursery.start_soon(server.handshake)
    try:
        yield client, server
    finally:
        client.close()
        server.close()


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


SIZES = [1, 2, 3, 100, 65_530, 65_531, 65_532, 65_533, 70_000, 5, 16_384, 1 << 20, 7, PEER_FRAME_BYTES_MAX, 1]


@in_trio
async def test_frames_of_all_sizes_arrive_whole_and_in_order(shown: Credentials) -> None:
    sent = [random.Random(size).randbytes(size) for size in SIZES * 2]
    received: list[bytes] = []

    async def receive(server: TlsStream) -> None:
        while len(received) < len(sent):
            received.extend(bytes(each) for each in await server.receive(PEER_FRAME_BYTES_MAX))

    async with pair(shown) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(receive, server)
        await client.send([frame(data) for data in sent])
    assert received == sent


@in_trio
async def test_pieces_of_any_size_make_the_same_frames(shown: Credentials) -> None:
    chance = random.Random(7)
    sent = [chance.randbytes(chance.choice([1, 30, 5000, 65_000, 90_000])) for _ in range(40)]
    data = b"".join(map(frame, sent))
    received: list[bytes] = []

    async def receive(server: TlsStream) -> None:
        while len(received) < len(sent):
            received.extend(bytes(each) for each in await server.receive(PEER_FRAME_BYTES_MAX))

    async with pair(shown) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(receive, server)
        offset = 0
        while offset < len(data):
            size = chance.choice([1, 2, 3, 7, 500, 20_000, 80_000])
            await client.send([data[offset:offset + size]])
            offset += size
            if chance.random() < 0.3:
                await trio.testing.wait_all_tasks_blocked()
    assert received == sent


@in_trio
async def test_what_a_full_socket_does_not_take_at_once_goes_with_the_next(shown: Credentials) -> None:
    async with pair(shown) as (client, server):
        sent = [b"%06d" % number * 2_000 for number in range(1_000)]
        all_at_once = [client.send_now(frame(data)) for data in sent[:-1]]
        assert all_at_once[0]
        assert not all_at_once[-1]
        received: list[bytes] = []

        async def receive() -> None:
            while len(received) < len(sent):
                received.extend(bytes(each) for each in await server.receive(PEER_FRAME_BYTES_MAX))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await client.send([])
            assert not client.flushing
            assert client.send_now(frame(sent[-1]))
        assert received == sent


@in_trio
async def test_what_was_sent_before_the_end_is_received_before_the_end(shown: Credentials) -> None:
    async with pair(shown) as (client, server):
        await client.send([frame(b"last words")])
        client.close()
        assert [bytes(each) for each in await server.receive(100)] == [b"last words"]
        with pytest.raises(Broken, match="closed the connection"):
            await server.receive(100)


@in_trio
async def test_an_end_in_the_middle_of_a_frame_is_no_frame(shown: Credentials) -> None:
    for size in (2, 10, 100_000):
        async with pair(shown) as (client, server):
            await client.send([frame(bytes(200_000))[:size]])
            client.close()
            with pytest.raises(Broken):
                await server.receive(PEER_FRAME_BYTES_MAX)


@in_trio
async def test_a_connection_that_is_cut_without_a_word_is_broken(shown: Credentials) -> None:
    async with pair(shown) as (client, server):
        client.socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(Broken):
            await server.receive(100)
        with pytest.raises(Broken):
            await client.receive(100)
        with pytest.raises(Broken):
            await client.send([b"x"])


@in_trio
async def test_frames_before_a_bad_length_are_received_first(shown: Credentials) -> None:
    async with pair(shown) as (client, server):
        await client.send([frame(b"good") + frame(bytes(101))])
        assert [bytes(each) for each in await server.receive(100)] == [b"good"]
        with pytest.raises(ProtocolError, match="a frame of 101 bytes"):
            await server.receive(100)


@in_trio
async def test_closing_wakes_who_waits(shown: Credentials) -> None:
    async with pair(shown) as (client, _), trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(Broken, match="closed"):
                await client.receive(100)

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        client.close()


@in_trio
async def test_both_directions_carry_much_at_once(shown: Credentials) -> None:
    data = frame(bytes(1 << 20))

    async def exchange(stream: TlsStream) -> None:
        async def receive() -> None:
            for _ in range(20):
                assert len((await stream.receive(PEER_FRAME_BYTES_MAX))[0]) == 1 << 20

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for _ in range(20):
                await stream.send([data])

    async with pair(shown) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(exchange, client)
        nursery.start_soon(exchange, server)
