"""What can be sent to a node's port, by anybody and by members gone bad: refused without harm.

After each attack the same node still serves its peer over the connection that it had before, and nothing of
the attack is left.
"""

import contextlib
import gc
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aspenfs.cluster.messages import Message
from aspenfs.limits import (
    PEER_FRAME_BYTES_MAX,
    PEER_GREETING_BYTES_MAX,
    PEER_HANDSHAKE_S,
    PEER_IDLE_MS,
    PEER_STRANGERS_MAX,
)
from aspenfs.runtime.peers import ca, credentials, frames
from aspenfs.runtime.peers.ca import Authority, NodeName
from aspenfs.runtime.peers.credentials import ALPN, Credentials
from aspenfs.runtime.peers.frames import Hello, LinkKind, Type
from tests.runtime.peers.nodes import (
    CLOCK,
    CLUSTER_ID,
    SECONDS_MAX,
    Background,
    Node,
    Row,
    descriptors,
    make_authority,
    make_credentials,
    message,
    until,
)

EXAMPLES = settings(max_examples=60, deadline=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


class Target:
    """Node 1, its peer node 2, and credentials of members 3 (who never ran) and 4 (who was removed)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = make_authority()
        self.member = make_credentials(directory / "n3", self.authority, 3)
        self.removed = make_credentials(directory / "n4", self.authority, 4)
        self.background = Background(self._nodes)

    def _nodes(self) -> list[Node]:
        async def echo(peer: int, body: Any) -> Any:
            return body

        nodes = [Node(make_credentials(self.directory / f"n{n}", self.authority, n)) for n in (1, 2)]
        nodes[0].network.handle("echo", echo)
        return nodes

    def start(self) -> None:
        async def prepare() -> None:
            table = {node.id: node.row for node in self.background.nodes}
            table[3] = Row((), born=self.member.name.born)  # nobody calls it: that would be sockets, too
            table[4] = Row(("127.0.0.1:1",), "removed", self.removed.name.born)
            for node in self.background.nodes:
                node.network.set_members(table)
            for node in self.background.nodes:  # both links, both ways: from here on, nothing new is opened
                await until(lambda node=node: len(node.network._incoming) == len(LinkKind))  # type: ignore[misc]

        self.background.run(prepare)
        self.node = self.background.nodes[0]
        self.port = self.node.network.ports[0]
        gc.collect()  # what others left behind would go meanwhile
        self.open = descriptors()

    def check_unharmed(self) -> None:
        """The node serves, and has forgotten the attack."""

        async def ask() -> Any:
            return await self.background.nodes[1].network.request(1, "echo", 7, timeout_s=5)

        assert self.background.run(ask) == 7
        deadline = time.monotonic() + SECONDS_MAX
        while self.node.network._server.strangers or {c.peer for c in self.node.network._incoming} != {2}:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        while descriptors() != self.open:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS_MAX)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def tls(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        return context.wrap_socket(self.connect())

    def as_member(self, shown: Credentials | None = None) -> ssl.SSLSocket:
        return self.tls((shown or self.member).client_context())

    def greeted(self) -> ssl.SSLSocket:
        """A connection of member 3 that was let in."""
        tls = self.as_member()
        tls.sendall(frames.encode_hello(Hello(LinkKind.MESSAGES, CLUSTER_ID, 3, 1, 1)))
        assert receive(tls)[0] == Type.WELCOME
        return tls


@pytest.fixture(scope="module")
def running_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target(tmp_path_factory.mktemp("peers"))
    with target.background:
        target.start()
        yield target


@pytest.fixture
def target(running_target: Target) -> Iterator[Target]:
    running_target.node.network._server._written_at.clear()  # the log tells about the first ones only
    yield running_target
    running_target.check_unharmed()


def receive(tls: ssl.SSLSocket) -> tuple[int, bytes]:
    """One frame; (0, b"") when the connection is over."""
    data = b""
    try:
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
            chunk = tls.recv(65_536)
            if not chunk:
                return 0, b""
            data += chunk
    except OSError:
        return 0, b""
    size = int.from_bytes(data[:4], "big")
    return data[4], data[5:4 + size]


def until_closed(sock: socket.socket) -> bytes:
    """All that still comes; fails if the node does not close the connection."""
    data = b""
    try:
        while chunk := sock.recv(65_536):
            data += chunk
    except TimeoutError:
        raise AssertionError("the connection was not closed") from None
    except OSError:
        pass
    return data


def refusal(tls: ssl.SSLSocket) -> str:
    """What the node said before it closed the connection."""
    data = until_closed(tls)
    assert data[4] == Type.REFUSED
    return str(msgpack.unpackb(data[5:])["message"])


def send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # closed already, as it should
        sock.sendall(data)


# --- before TLS ---


@EXAMPLES
@given(data=st.binary(min_size=1, max_size=2000))
def test_bytes_that_are_no_tls_end_their_connection(target: Target, data: bytes) -> None:
    with target.connect() as sock:
        send(sock, data)
        sock.shutdown(socket.SHUT_WR)
        until_closed(sock)


@EXAMPLES
@given(data=st.binary(max_size=600), kind=st.sampled_from([20, 21, 22, 23, 24]))
def test_bytes_that_look_like_tls_end_their_connection(target: Target, data: bytes, kind: int) -> None:
    with target.connect() as sock:
        send(sock, bytes([kind, 3, 3]) + len(data).to_bytes(2, "big") + data)
        sock.shutdown(socket.SHUT_WR)
        until_closed(sock)


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"\xff" * 4096,
    frames.encode_hello(Hello(LinkKind.BULK, CLUSTER_ID, 3, 1, 1)),
])  # fmt: skip
def test_plaintext_is_refused_at_once(target: Target, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    caplog.clear()
    with target.connect() as sock:
        send(sock, data)
        until_closed(sock)
    target.check_unharmed()
    assert any("refused: no TLS as it is spoken here" in record.message for record in caplog.records)


def test_a_connection_that_says_nothing_is_closed_in_time(target: Target) -> None:
    began = time.monotonic()
    with target.connect() as sock:
        until_closed(sock)
    assert PEER_HANDSHAKE_S - 1 < time.monotonic() - began < PEER_HANDSHAKE_S + 5


def test_a_handshake_byte_by_byte_is_closed_in_time(target: Target) -> None:
    context = target.member.client_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    handshake = context.wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        handshake.do_handshake()
    began = time.monotonic()
    with target.connect() as sock:
        sock.settimeout(0.2)
        for byte in outgoing.read():
            send(sock, bytes([byte]))
            try:
                if not sock.recv(1):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    assert time.monotonic() - began < PEER_HANDSHAKE_S + 5


def test_connections_that_say_nothing_are_bounded_and_keep_no_member_out(target: Target) -> None:
    began = time.monotonic()
    idle = [target.connect() for _ in range(2 * PEER_STRANGERS_MAX)]
    try:
        deadline = time.monotonic() + SECONDS_MAX
        while target.node.network._server.strangers != PEER_STRANGERS_MAX:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        target.greeted().close()
        assert time.monotonic() - began < PEER_HANDSHAKE_S, "it waited for one of them to be given up"
        assert target.node.network._server.strangers <= PEER_STRANGERS_MAX
        until_closed(idle[0])  # the oldest made room
    finally:
        for sock in idle:
            sock.close()


# --- TLS ---


def _no_certificate(target: Target) -> ssl.SSLContext:
    return credentials.client_context([target.authority.certificate])


def test_tls_1_2_is_refused(target: Target) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with target.connect() as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock)


def test_another_application_protocol_is_refused(target: Target) -> None:
    context = _no_certificate(target)
    context.set_alpn_protocols(["h2"])
    with target.tls(context) as tls:
        assert until_closed(tls) == b""
    assert ALPN != "h2"


def _shown(target: Target, authority: Authority, **how: Any) -> Credentials:
    """A certificate that names member 3."""
    return make_credentials(target.directory / os.urandom(4).hex(), authority, 3, **how)


def _foreign(target: Target) -> ssl.SSLContext:
    """By a CA that another cluster of the same name has."""
    context = _shown(target, make_authority()).client_context()
    context.load_verify_locations(cadata=ca.bundle_pem([target.authority.certificate]).decode())
    return context


def _expired(target: Target) -> ssl.SSLContext:
    return _shown(target, target.authority, made_s_ago=7200, lifetime_s=3600).client_context()


def _of_tomorrow(target: Target) -> ssl.SSLContext:
    return _shown(target, target.authority, made_s_ago=-86_400).client_context()


@pytest.mark.parametrize("make", [_foreign, _expired, _of_tomorrow])
def test_a_certificate_that_does_not_hold_is_refused_by_tls(
    target: Target, caplog: pytest.LogCaptureFixture, make: Callable[[Target], ssl.SSLContext]
) -> None:
    caplog.clear()
    with target.tls(make(target)) as tls:
        send(tls, frames.encode_hello(Hello(LinkKind.MESSAGES, CLUSTER_ID, 3, 1, 1)))
        assert receive(tls) == (0, b"")
    target.check_unharmed()
    assert any("its certificate is refused" in record.message for record in caplog.records)


def test_the_cas_own_certificate_is_no_nodes(target: Target, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(ca.bundle_pem([target.authority.certificate])
                                      + ca.keys_pem([target.authority.key]))  # fmt: skip
    context = _no_certificate(target)
    context.load_cert_chain(tmp_path / "ca.pem")
    with target.tls(context) as tls:
        send(tls, frames.encode_hello(Hello(LinkKind.MESSAGES, CLUSTER_ID, 3, 1, 1)))
        until_closed(tls)


def test_a_removed_member_is_refused(target: Target) -> None:
    with target.as_member(target.removed) as tls:
        send(tls, frames.encode_hello(Hello(LinkKind.MESSAGES, CLUSTER_ID, 4, 1, 1)))
        assert "was removed from the cluster" in refusal(tls)


def test_a_certificate_for_another_log_of_a_member_is_refused(target: Target, tmp_path: Path) -> None:
    shown = make_credentials(tmp_path / "again", target.authority, 3)
    with target.as_member(shown) as tls:
        send(tls, frames.encode_hello(Hello(LinkKind.MESSAGES, CLUSTER_ID, 3, 1, 1)))
        assert "its disk was replaced" in refusal(tls)


def test_a_certificate_of_another_cluster_is_refused(target: Target, tmp_path: Path) -> None:
    shown = make_credentials(tmp_path / "other", target.authority, 3, cluster_id=b"o" * 16)
    with target.as_member(shown) as tls:
        send(tls, frames.encode_hello(Hello(LinkKind.MESSAGES, CLUSTER_ID, 3, 1, 1)))
        assert "is of the cluster" in refusal(tls)


# --- greetings ---


def test_without_a_certificate_a_greeting_is_refused(target: Target) -> None:
    with target.tls(_no_certificate(target)) as tls:
        send(tls, frames.encode_hello(Hello(LinkKind.MESSAGES, CLUSTER_ID, 3, 1, 1)))
        assert "certificate" in refusal(tls)


@EXAMPLES
@given(data=st.binary(max_size=3000), certified=st.booleans())
def test_garbage_instead_of_a_greeting_is_refused(target: Target, data: bytes, certified: bool) -> None:
    with target.as_member() if certified else target.tls(_no_certificate(target)) as tls:
        send(tls, data)
        tls.shutdown(socket.SHUT_WR)
        until_closed(tls)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False)
    | st.binary(max_size=40) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
HELLO = [frames.MAGIC, [frames.VERSION], 1, CLUSTER_ID, 3, 1, 1]


@EXAMPLES
@given(kind=st.integers(0, 255), value=VALUES, certified=st.booleans())
def test_a_first_frame_of_any_kind_is_answered_or_refused(
    target: Target, kind: int, value: Any, certified: bool
) -> None:
    payload = msgpack.packb(value)
    with target.as_member() if certified else target.tls(_no_certificate(target)) as tls:
        send(tls, (len(payload) + 1).to_bytes(4, "big") + bytes([kind]) + payload)
        assert refusal(tls)


def _is_good(value: Any, wanted: Any) -> bool:
    """Whether it may stand where `wanted` does: the same, the other kind of link, a list with our version."""
    if type(value) is not type(wanted):
        return False
    return value == wanted or value == 2 or (isinstance(value, list) and frames.VERSION in value)


@EXAMPLES
@given(data=st.data())
def test_a_greeting_with_one_field_changed_is_refused(target: Target, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(HELLO) - 3))
    hello = list(HELLO)
    hello[place] = data.draw(VALUES.filter(lambda value: not _is_good(value, HELLO[place])))
    with target.as_member() as tls:
        send(tls, frames.encode(Type.HELLO, hello))
        assert refusal(tls)


def test_a_later_version_of_the_protocol_is_told_which_one_is_spoken(target: Target) -> None:
    with target.as_member() as tls:
        send(tls, frames.encode(Type.HELLO, [frames.MAGIC, [2, 3], *HELLO[2:]]))
        assert "speaks version 1" in refusal(tls)


@pytest.mark.parametrize("size", [0, PEER_GREETING_BYTES_MAX + 1, PEER_FRAME_BYTES_MAX, (1 << 32) - 1])
def test_a_greeting_of_a_length_that_is_not_allowed_is_refused_at_once(target: Target, size: int) -> None:
    with target.as_member() as tls:
        send(tls, size.to_bytes(4, "big"))
        assert f"a frame of {size} bytes" in refusal(tls)


def test_more_than_a_greeting_is_refused(target: Target) -> None:
    with target.as_member() as tls:
        send(tls, 2 * frames.encode_hello(Hello(LinkKind.MESSAGES, CLUSTER_ID, 3, 1, 1)))
        assert "before the greeting was answered" in refusal(tls)


# --- members gone bad ---


@EXAMPLES
@given(data=st.binary(min_size=1, max_size=5000))
def test_garbage_from_a_member_ends_its_connection(target: Target, data: bytes) -> None:
    with target.greeted() as tls:
        send(tls, data)
        tls.shutdown(socket.SHUT_WR)
        until_closed(tls)


@EXAMPLES
@given(kind=st.integers(0, 20), value=VALUES)
def test_a_frame_of_any_kind_from_a_member_does_no_harm(target: Target, kind: int, value: Any) -> None:
    payload = msgpack.packb(value)
    with target.greeted() as tls:
        send(tls, (len(payload) + 1).to_bytes(4, "big") + bytes([kind]) + payload)
        tls.shutdown(socket.SHUT_WR)
        until_closed(tls)


@EXAMPLES
@given(data=st.data())
def test_a_message_with_one_field_changed_does_no_harm(target: Target, data: st.DataObject) -> None:
    fields: list[Any] = list(message(1, 3))
    fields[data.draw(st.integers(0, len(fields) - 1))] = data.draw(VALUES)
    with target.greeted() as tls:
        send(tls, frames.encode_messages([msgpack.packb(fields)]))
        tls.shutdown(socket.SHUT_WR)
        until_closed(tls)


@pytest.mark.parametrize("bad", [message(1, 2), message(2, 3), Message(8, 1, 3, 0)])  # type: ignore[arg-type]
def test_a_message_in_anothers_name_or_for_another_ends_the_connection(target: Target, bad: Message) -> None:
    async def received() -> int:
        return len(target.node.received)

    before = target.background.run(received)
    with target.greeted() as tls:
        send(tls, frames.encode_messages([frames.pack(message(1, 3)), frames.pack(bad)]))
        assert refusal(tls)
    assert target.background.run(received) == before  # nothing of that frame was delivered


@pytest.mark.parametrize("payload", [
    b"\x91" * 100_000 + b"\xc0",  # an array in an array in …
    b"\xdd\x00\x01\xff\xff" * 2000,  # arrays that announce 131,071 elements, level within level
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    b"\xc7\x10\x01" + bytes(16), b"\xc1", b"\xd9\x02\xff\xfe", b"\x81\x01\x02", b"",
])  # fmt: skip
@pytest.mark.parametrize("kind", [Type.MESSAGES, Type.REQUEST, Type.CANCEL, Type.PING])
def test_msgpack_made_to_harm_ends_the_connection(target: Target, kind: Type, payload: bytes) -> None:
    with target.greeted() as tls:
        send(tls, (len(payload) + 1).to_bytes(4, "big") + bytes([kind]) + payload)
        assert refusal(tls)


def test_a_frame_that_is_cut_off_ends_with_its_connection(target: Target) -> None:
    frame = b"".join(frames.encode_request(1, "echo", bytes(200_000)))
    for size in (1, 4, 5, 100, 70_000, len(frame) - 1):
        with target.greeted() as tls:
            send(tls, frame[:size])
            tls.shutdown(socket.SHUT_WR)
            until_closed(tls)


def test_a_member_that_asks_too_much_at_once_is_cut_off(target: Target) -> None:
    with target.greeted() as tls:
        for number in range(200):
            send(tls, b"".join(frames.encode_request(7 if number > 20 else number, "echo", 1)))
        until_closed(tls)


def test_a_member_that_falls_silent_is_cut_off(target: Target) -> None:
    began = time.monotonic()
    with target.greeted() as tls:
        until_closed(tls)
    assert time.monotonic() - began < PEER_IDLE_MS / 1000 + 5


def test_a_member_that_does_not_read_its_answers_is_cut_off(target: Target) -> None:
    with target.greeted() as tls:
        tls.settimeout(3)
        try:
            for number in range(500):
                tls.sendall(b"".join(frames.encode_request(number, "echo", bytes(1 << 20))))
        except OSError:
            pass
        else:
            raise AssertionError("the node takes answers that nobody reads without end")


# --- a certificate of a member's, for another's name ---


def test_who_a_member_is_is_decided_by_its_certificate(target: Target) -> None:
    with target.as_member() as tls:
        send(tls, frames.encode_hello(Hello(LinkKind.MESSAGES, CLUSTER_ID, 2, 1, 1)))
        assert "name different nodes" in refusal(tls)
    name = NodeName(CLUSTER_ID, 2, target.member.name.born)
    forged = ca.sign(make_authority(), target.authority.key.public_key(), name, CLOCK.time_ns())
    assert ca.issued_by(forged, [target.authority.certificate]) is None
