"""Nodes that move: who was away finds them again, as soon as they, who know where it is, come to it."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from aspenfs import errors
from aspenfs.limits import PEER_ADDRESS_BYTES_MAX, PEER_ADDRESSES_MAX, PEER_FORMER_LIVES_MAX
from aspenfs.runtime.peers import frames
from aspenfs.runtime.peers.credentials import Credentials
from aspenfs.runtime.peers.frames import Hello, LinkKind, Welcome
from tests.runtime.peers.nodes import (
    CLUSTER_ID,
    Node,
    Row,
    in_trio,
    make_authority,
    make_credentials,
    message,
    until,
)


@pytest.fixture
def places() -> Iterator[list[str]]:
    """Free addresses: bound, so that nobody else gets them meanwhile; who listens there may do so."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(5)]
        for probe in probes:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", 0))
        yield [f"127.0.0.1:{probe.getsockname()[1]}" for probe in probes]


class Host:
    """A node in one life: at `address`, with what its table says of the others."""

    def __init__(self, shown: Credentials, address: str, table: dict[int, Row], incarnation: int) -> None:
        self.node = Node(shown, incarnation=incarnation, advertise=[address])
        self.listen = address
        self.node.network.set_members(table)

    async def start(self, nursery: trio.Nursery) -> Node:
        await nursery.start(self.node.network.run, [self.listen])
        return self.node


def _row(shown: Credentials, address: str, topology: int = 1) -> Row:
    return Row((address,), born=shown.name.born, topology=topology)


def _shown(directory: Path, count: int) -> dict[int, Credentials]:
    authority = make_authority()
    numbers = range(1, count + 1)
    return {number: make_credentials(directory / f"n{number}", authority, number) for number in numbers}


@in_trio
async def test_who_was_away_while_all_others_moved_finds_them_again(
    tmp_path: Path, places: list[str]
) -> None:
    shown = _shown(tmp_path, 3)
    old = dict(zip(shown, places, strict=False))
    new = {1: places[3], 2: places[4], 3: old[3]}
    stale = {number: _row(shown[number], old[number]) for number in shown}
    fresh = {number: _row(shown[number], new[number], topology=2 if number < 3 else 1) for number in shown}
    async with trio.open_nursery() as nursery:
        one = await Host(shown[1], new[1], fresh, 2).start(nursery)
        two = await Host(shown[2], new[2], fresh, 2).start(nursery)
        three = await Host(shown[3], new[3], stale, 5).start(nursery)
        await until(lambda: three.network.connected() == {1, 2}, "3 finds the others")
        await until(lambda: one.network.connected() == {2, 3} and two.network.connected() == {1, 3}, "all")
        three.network.send(1, message(1, 3))
        await until(lambda: one.received)
        assert three.network.found_at(1) == (2, (new[1],))
        assert one.network.found_at(3) == (1, (old[3],))
        # The table catches up, and says the same.
        three.network.set_members(fresh)
        assert three.network.found_at(1) == (2, (new[1],))
        nursery.cancel_scope.cancel()


@in_trio
async def test_two_that_move_at_once_find_each_other_by_way_of_nobody_but_themselves(
    tmp_path: Path, places: list[str]
) -> None:
    """No majority could have written their rows before: they agree on nothing until they are connected."""
    shown = _shown(tmp_path, 3)
    old = dict(zip(shown, places, strict=False))
    new = {1: places[3], 2: places[4], 3: old[3]}
    stale = {number: _row(shown[number], old[number]) for number in shown}
    async with trio.open_nursery() as nursery:
        nodes = [await Host(shown[number], new[number], stale, 2).start(nursery) for number in shown]
        three = nodes[2]
        await until(lambda: three.network.connected() == {1, 2}, "3, which stayed, finds both")
        assert three.network.found_at(2) == (2, (new[2],))
        nursery.cancel_scope.cancel()


@in_trio
async def test_the_table_counts_when_it_knows_of_a_later_move(tmp_path: Path, places: list[str]) -> None:
    shown = _shown(tmp_path, 2)
    addresses = dict(zip(shown, places, strict=False))
    table = {number: _row(shown[number], addresses[number]) for number in shown}
    async with trio.open_nursery() as nursery:
        one = await Host(shown[1], addresses[1], table, 3).start(nursery)
        await Host(shown[2], addresses[2], table, 3).start(nursery)
        await until(lambda: one.network._told, "2 has said where it is")
        moved = {**table, 2: _row(shown[2], "192.0.2.1:7420", topology=4)}
        one.network.set_members(moved)
        assert one.network.found_at(2) == (4, ("192.0.2.1:7420",))
        assert list(map(str, one.network.addresses(2))) == ["192.0.2.1:7420"]
        # Of an earlier one it does not, whatever is written into the row besides.
        one.network.set_members({**table, 2: _row(shown[2], "192.0.2.1:7420", topology=3)})
        assert one.network.found_at(2) == (3, (addresses[2],))
        assert list(map(str, one.network.addresses(2))) == [addresses[2], "192.0.2.1:7420"]
        nursery.cancel_scope.cancel()


@in_trio
async def test_what_is_no_address_is_passed_over(tmp_path: Path, places: list[str]) -> None:
    shown = _shown(tmp_path, 2)
    addresses = dict(zip(shown, places, strict=False))
    table = {number: _row(shown[number], addresses[number]) for number in shown}
    async with trio.open_nursery() as nursery:
        one = await Host(shown[1], addresses[1], table, 1).start(nursery)
        two = Node(shown[2], advertise=["no/address", "also no address"])
        two.network.set_members(table)
        await nursery.start(two.network.run, [addresses[2]])
        await until(lambda: one.network.connected() == {2} and two.network.connected() == {1})
        assert one.network.found_at(2) == (1, (addresses[2],))
        nursery.cancel_scope.cancel()


def test_a_greeting_of_a_release_that_says_no_address_is_a_greeting() -> None:
    fields = [frames.MAGIC, [frames.VERSION], LinkKind.BULK, CLUSTER_ID, 3, 1, 1]
    assert frames.decode_hello(memoryview(frames.pack(fields))) == Hello(LinkKind.BULK, CLUSTER_ID, 3, 1, 1)


def test_former_lives_go_with_greeting_and_answer_and_may_be_missing() -> None:
    hello = Hello(LinkKind.BULK, CLUSTER_ID, 3, 5, 1, ("a:1",), (4, 3))
    assert frames.decode_hello(frames.split(memoryview(frames.encode_hello(hello))[4:])[1]) == hello
    welcome = Welcome(5, 1, (4, 3))
    assert frames.decode_welcome(frames.split(memoryview(frames.encode_welcome(welcome))[4:])[1]) == welcome
    assert frames.decode_welcome(memoryview(frames.pack([frames.VERSION, 5, 1]))) == Welcome(5, 1)


@pytest.mark.parametrize("former", [7, "text", ["x"], [-1], [1] * (PEER_FORMER_LIVES_MAX + 1)])
def test_what_are_no_former_lives_is_refused(former: object) -> None:
    fields = [frames.MAGIC, [frames.VERSION], LinkKind.BULK, CLUSTER_ID, 3, 5, 1, [], former]
    with pytest.raises(errors.ProtocolError):
        frames.decode_hello(memoryview(frames.pack(fields)))
    with pytest.raises(errors.ProtocolError):
        frames.decode_welcome(memoryview(frames.pack([frames.VERSION, 5, 1, former])))


@pytest.mark.parametrize(
    "addresses", [7, "text", [7], ["a:1"] * (PEER_ADDRESSES_MAX + 1), ["a" * (PEER_ADDRESS_BYTES_MAX + 1)]]
)
def test_a_greeting_with_what_are_no_addresses_is_refused(addresses: object) -> None:
    fields = [frames.MAGIC, [frames.VERSION], LinkKind.BULK, CLUSTER_ID, 3, 1, 1, addresses]
    with pytest.raises(errors.ProtocolError):
        frames.decode_hello(memoryview(frames.pack(fields)))
