"""The end of a link that accepts: who is let in, messages and requests in, answers out.

Belongs here: the listening sockets, strangers until they have shown who they are, the `Incoming`
connections. Not here: the end that connects (`links.py`), who is a member (`network.py`), what
strangers may ask (`admission.py`).

Who connects is a *stranger* until its certificate and its greeting have been checked. It has a deadline and
may send one small frame; there are at most so many, and the oldest of the busiest address makes room
for a new one. Nothing that a stranger sends does worse than end its own connection, with one line in the log.
"""

import contextlib
import logging
import ssl
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import trio
from cryptography import x509

from aspenfs import errors
from aspenfs.cluster.messages import Message
from aspenfs.errors import AspenError, InvalidArgument, ProtocolError
from aspenfs.limits import (
    PEER_FRAME_BYTES_MAX,
    PEER_GREETING_BYTES_MAX,
    PEER_HANDSHAKE_S,
    PEER_IDLE_MS,
    PEER_REQUESTS_BYTES_MAX,
    PEER_REQUESTS_MAX,
    PEER_STRANGERS_MAX,
    PROPOSAL_TIMEOUT_MS,
)
from aspenfs.runtime.peers import addresses, ca, frames
from aspenfs.runtime.peers.ca import NodeName
from aspenfs.runtime.peers.channel import Channel, unreadable
from aspenfs.runtime.peers.frames import Hello, Parts, Request, Type, Welcome
from aspenfs.runtime.peers.links import UNSENT_BYTES
from aspenfs.runtime.peers.stream import Broken, TlsStream

log = logging.getLogger(__name__)

Handler = Callable[[int, Any], Awaitable[Any]]

_LINES_MAX, _LINES_S = 20, 10  # of the log, about strangers


class ServerOwner(Protocol):
    """What the accepting end needs of its node; `network.PeerNetwork`."""

    @property
    def handlers(self) -> Mapping[str, Handler]: ...

    def server_context(self) -> ssl.SSLContext: ...

    def check_client(self, name: NodeName, hello: Hello) -> None:
        """PeerRefused unless who shows that certificate may connect, with that greeting."""

    def welcome(self) -> Welcome: ...

    def came_in(self, channel: "Incoming") -> None:
        """A member is connected; told again when it is over by `went_away`."""

    def went_away(self, channel: "Incoming") -> None: ...

    def decode(self, peer: int, values: Sequence[Any]) -> Sequence[Message]:
        """Raft messages of `peer` out of what was unpacked. ProtocolError."""

    @property
    def deliver(self) -> Callable[[int, Sequence[Message]], object]:
        """Takes messages of a peer. What it raises ends the network: the core has failed."""

    async def answer_stranger(self, kind: int, payload: bytes, host: str) -> bytes:
        """The frame that answers one without a certificate; an AspenError refuses it."""


class Incoming(Channel):
    """A connection that a member made. It sends messages and requests; answers go back."""

    def __init__(self, stream: TlsStream, hello: Hello, owner: ServerOwner, name: NodeName,
                 issuer: x509.Name) -> None:  # fmt: skip
        super().__init__(stream)
        self.hello, self.peer, self.born = hello, name.node_id, name.born
        self.issuer = issuer  # the CA of its certificate
        self._owner = owner
        self._running: dict[int, trio.CancelScope] = {}

    async def _read(self) -> None:
        while True:
            for frame in await self.stream.receive(PEER_FRAME_BYTES_MAX):
                with unreadable(self.peer):
                    messages = self._take_in(*frames.split(frame))
                if messages:
                    self._owner.deliver(self.peer, messages)
            # Who does not fetch its answers may not ask for more.
            await self.drained_to(PEER_REQUESTS_BYTES_MAX)

    def _take_in(self, kind: int, payload: memoryview) -> Sequence[Message]:
        """Does what a frame asks for; messages are returned, to be delivered."""
        if kind == Type.MESSAGES:
            return self._owner.decode(self.peer, frames.decode_messages(payload))
        if kind == Type.REQUEST:
            self._start(frames.decode_request(payload))
        elif kind == Type.PING:
            (sent,) = frames.decode_numbers(payload, 1)
            self.push(frames.encode(Type.PONG, (sent,)))
        elif kind == Type.CANCEL:
            (number,) = frames.decode_numbers(payload, 1)
            if scope := self._running.get(number):
                scope.cancel()
        else:
            raise ProtocolError(f"a frame of type {kind} is not for the end that accepted")
        return ()

    def _looked(self) -> None:
        # Unasked: the other end's own ping may wait behind a long frame on a slow line.
        self.push(frames.encode(Type.PONG, (0,)))

    def _start(self, request: Request) -> None:
        if request.number in self._running:
            raise ProtocolError(f"request {request.number} is still under way")
        if len(self._running) >= PEER_REQUESTS_MAX:
            raise ProtocolError(f"more than {PEER_REQUESTS_MAX} requests under way")
        self._running[request.number] = scope = trio.CancelScope()
        assert self.nursery is not None
        self.nursery.start_soon(self._run_request, request, scope)

    async def _run_request(self, request: Request, scope: trio.CancelScope) -> None:
        number, kind, body = request
        frame: Parts = ()
        try:
            with scope:
                frame = await self._answer(number, kind, body)
        finally:
            del self._running[number]
        if frame:
            self.push(*frame)

    async def _answer(self, number: int, kind: str, body: Any) -> Parts:
        handler = self._owner.handlers.get(kind)
        try:
            if handler is None:
                raise errors.NotSupported(f"this node answers no requests of kind {kind!r}")
            return frames.encode_answer(number, kind, await handler(self.peer, body))
        except (errors.TooLarge, InvalidArgument) as error:
            log.info("peers: node=%d request=%s refused: %s", self.peer, kind, error)
            return frames.encode_failure(number, error)
        except AspenError as error:
            return frames.encode_failure(number, error)
        except Exception:
            log.exception("peers: node=%d request=%s failed", self.peer, kind)
            failure = errors.RemoteFailure(f"the node failed at {kind}; its log has the cause")
            return frames.encode_failure(number, failure)


class _Stranger:
    """One who has not shown yet who it is."""

    __slots__ = ("crowded_out", "host", "scope")

    def __init__(self, host: str) -> None:
        self.host, self.crowded_out = host, False
        self.scope = trio.CancelScope(deadline=trio.current_time() + PEER_HANDSHAKE_S)


class Server:
    """Accepts connections on all listeners until cancelled; the listeners are closed then."""

    def __init__(self, owner: ServerOwner) -> None:
        self._owner = owner
        self._strangers: dict[_Stranger, None] = {}  # oldest first
        self._written_at: deque[float] = deque(maxlen=_LINES_MAX)  # when the log last told about strangers
        self._untold = 0

    @property
    def strangers(self) -> int:
        return len(self._strangers)

    async def serve(self, listeners: Sequence[trio.SocketListener]) -> None:
        await trio.serve_listeners(self._accepted, list(listeners))

    async def _accepted(self, accepted: trio.SocketStream) -> None:
        host, address = _remote(accepted.socket)
        sock = addresses.taken(accepted.socket)
        stream = TlsStream(sock, self._owner.server_context(), server=True)
        self._make_room()
        stranger = _Stranger(host)
        self._strangers[stranger] = None
        channel, cause = None, "no greeting in time"
        try:
            with stranger.scope:
                channel, cause = await self._meet(stream, stranger)
        finally:
            del self._strangers[stranger]
            if channel is None:
                stream.close()
        if channel is not None:
            await self._serve(channel, address)
        elif cause:
            self._tell(address, "it was crowded out" if stranger.crowded_out else cause)

    async def _serve(self, channel: Incoming, address: str) -> None:
        addresses.tune(channel.stream.socket, unsent_bytes=UNSENT_BYTES[channel.hello.link],
                       silence_ms=PEER_IDLE_MS)  # fmt: skip
        where = f"node={channel.peer} link={channel.hello.link.name.lower()} address={address}"
        log.info("peers: %s connected", where)
        self._owner.came_in(channel)
        try:
            await channel.run()
        finally:
            self._owner.went_away(channel)
            log.info("peers: %s disconnected: %s", where, channel.cause)

    # --- strangers ---

    async def _meet(self, stream: TlsStream, stranger: _Stranger) -> tuple[Incoming | None, str]:
        """The connection of a member, or None and why not: "" for a stranger that got its answer."""
        try:
            await stream.handshake()
        except Broken as error:
            return None, str(error)
        try:
            return await self._greeted(stream, stranger), ""
        except Broken as error:
            return None, str(error)
        except AspenError as error:
            refusal = error
        except Exception:
            log.exception("peers: a greeting failed")
            refusal = errors.RemoteFailure("the node failed at the greeting; its log has the cause")
        with contextlib.suppress(Broken):
            await stream.send([frames.encode_refusal(refusal)])
        return None, str(refusal)

    async def _greeted(self, stream: TlsStream, stranger: _Stranger) -> Incoming | None:
        received = await stream.receive(PEER_GREETING_BYTES_MAX)
        kind, payload = frames.split(received[0])
        if len(received) > 1:
            raise ProtocolError("more was sent before the greeting was answered")
        certificate = stream.peer_certificate()
        if certificate is None:
            # What it asks may need the leader and a commit.
            stranger.scope.deadline += 2 * PROPOSAL_TIMEOUT_MS / 1000
            await stream.send([await self._owner.answer_stranger(kind, bytes(payload), stranger.host)])
            return None
        name = ca.name_of(certificate)
        if name is None or kind != Type.HELLO:
            raise ProtocolError("a certificate or a greeting that is not a node's")
        hello = frames.decode_hello(payload)
        self._owner.check_client(name, hello)
        await stream.send([frames.encode_welcome(self._owner.welcome())])
        return Incoming(stream, hello, self._owner, name, certificate.issuer)

    def _make_room(self) -> None:
        staying = [each for each in self._strangers if not each.crowded_out]
        if len(staying) >= PEER_STRANGERS_MAX:
            busiest = Counter(each.host for each in staying).most_common(1)[0][0]
            oldest = next(each for each in staying if each.host == busiest)
            oldest.crowded_out = True
            oldest.scope.cancel()

    def _tell(self, address: str, cause: str) -> None:
        """One line, unless there were many of late: a flood of strangers is no flood of the log."""
        now = trio.current_time()
        if len(self._written_at) == _LINES_MAX and now - self._written_at[0] < _LINES_S:
            self._untold += 1
            return
        self._written_at.append(now)
        more = f" ({self._untold} more before it)" if self._untold else ""
        self._untold = 0
        log.info("peers: address=%s refused: %s%s", address, cause, more)


def _remote(sock: trio.socket.SocketType) -> tuple[str, str]:
    """Host, and host with port, of the other end."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return "?", "?"  # it has gone already
    return host, str(addresses.Address(host, port))
