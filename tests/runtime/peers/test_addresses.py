"""Addresses as people write them."""

import socket

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from aspenfs.errors import InvalidArgument, PeerUnreachable
from aspenfs.limits import PEER_ADDRESSES_MAX, PEER_PORT
from aspenfs.runtime.peers import addresses
from aspenfs.runtime.peers.addresses import Address
from tests.runtime.peers.nodes import in_trio


@pytest.mark.parametrize(("text", "host", "port"), [
    ("node1", "node1", PEER_PORT), ("node1.example.:1", "node1.example.", 1), ("my_host", "my_host", 7420),
    ("192.0.2.7", "192.0.2.7", 7420), ("192.0.2.7:65535", "192.0.2.7", 65535), ("[::1]", "::1", 7420),
    ("2001:db8::7", "2001:db8::7", 7420), ("[2001:db8::7]:80", "2001:db8::7", 80),
    ("fe80::1%eth0", "fe80::1%eth0", 7420),
])  # fmt: skip
def test_host_and_port_are_found(text: str, host: str, port: int) -> None:
    address = addresses.parse(text)
    assert address == (host, port)
    assert addresses.parse(str(address)) == address


@pytest.mark.parametrize("text", [
    "", ":7420", "node1:", "node1:0", "node1:65536", "node1:-1", "node1:x", "node1: 1", "a b", "-node",
    "node-:1", "[node1]:80", "[::1", "[::1]7420", "::1]:7", "1.2.3", "1.2.3.4.5", "256.1.1.1", "2001:db8:::1",
    "a..b", "*", "*:1", "node/1", "node1:\uff17", "x" * 64, "node\n", "http://node1:7420", ":".join("a" * 9),
    "fe80::1%" + "e" * 16, "fe80::1%",
])  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="address"):
        addresses.parse(text)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = addresses.parse(text)
    except InvalidArgument:
        return
    assert addresses.parse(str(address)) == address


def test_to_listen_on_any_interface_or_port_is_possible() -> None:
    assert addresses.parse("*", listen=True) == ("", PEER_PORT)
    assert addresses.parse("*:0", listen=True) == ("", 0)
    assert addresses.parse("127.0.0.1:0", listen=True) == ("127.0.0.1", 0)
    assert str(Address("", 7)) == "*:7"


def test_a_node_has_some_addresses_but_not_many() -> None:
    assert addresses.parse_all(["a", "a:7420", "b"]) == (("a", 7420), ("b", 7420))
    for bad in ([], [f"n{number}" for number in range(PEER_ADDRESSES_MAX + 1)], ["a", "b c"]):
        with pytest.raises(InvalidArgument):
            addresses.parse_all(bad)


@in_trio
async def test_the_cause_of_a_failure_to_connect_is_named() -> None:
    with pytest.raises(PeerUnreachable, match=r"127\.0\.0\.1:1: Connection refused"):
        await addresses.connect(Address("127.0.0.1", 1))
    with pytest.raises(PeerUnreachable, match=r"no-such-host\.invalid:7420: "):
        await addresses.connect(Address("no-such-host.invalid", 7420))
    with trio.socket.socket() as full:
        await full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = Address(*full.getsockname())
        held = [await addresses.connect(address)]  # and one more fits its queue
        with pytest.raises(PeerUnreachable, match="no answer in"):
            await _connect_all(address, held)
        for sock in held:
            sock.close()


async def _connect_all(address: Address, held: list[socket.socket]) -> None:
    while True:
        held.append(await addresses.connect(address))
