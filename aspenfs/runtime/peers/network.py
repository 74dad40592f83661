"""PeerNetwork: the Peers port (docs/design/cluster.md) over TLS links; who is a member and may connect.

Belongs here: the table of members, which links there are, which link a request takes, who is let in.
Not here: connections (`links.py`, `server.py`), bytes (`frames.py`), what strangers may ask (`admission.py`).

Who is at the other end is decided by the certificate alone: its CA, then node id and birth mark against
the table. What the peer says about itself must agree, and decides nothing.

All methods belong to the loop's thread. None but `run` and `request` suspends.
"""

import errno
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from itertools import count
from typing import Any, NamedTuple, Protocol

import trio

from aspenfs import errors
from aspenfs.cluster.messages import Message, from_wire
from aspenfs.errors import IdentityLost, InvalidArgument, PeerRefused, PeerUnreachable, ProtocolError
from aspenfs.limits import PEER_SMALL_REQUEST_BYTES
from aspenfs.runtime.identity import Life
from aspenfs.runtime.peers import addresses, frames
from aspenfs.runtime.peers.addresses import Address
from aspenfs.runtime.peers.ca import NodeName
from aspenfs.runtime.peers.channel import Channel
from aspenfs.runtime.peers.credentials import Credentials
from aspenfs.runtime.peers.frames import Hello, LinkKind, Welcome
from aspenfs.runtime.peers.links import Link
from aspenfs.runtime.peers.server import Handler, Incoming, Server
from aspenfs.seams import Clock

log = logging.getLogger(__name__)

REMOVED = "was removed from the cluster"  # so that who is told so knows it
OLD_COPY = "its state directory is an old copy"
COPIED = "its state directory was copied"
BULK_KINDS = ("blob.", "snapshot.")  # requests whose answers are long

_SAME_MAX = 4  # connections of one peer and kind

Deliver = Callable[[int, Sequence[Message]], object]
Strangers = Callable[[int, bytes, str], Awaitable[bytes]]  # type and payload of its frame, its host


class Member(Protocol):
    """What the network needs of a row of the table; `members.Member` fits."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """HOST:PORT, the first one preferred."""

    @property
    def state(self) -> str:
        """"removed": refused for ever."""

    @property
    def topology(self) -> int:
        """The start of it since which it is found there: of two addresses the later one is right."""

    @property
    def born(self) -> bytes:
        """The birth mark that its certificate must have; b"": any."""


class PeerError(NamedTuple):
    """Why a peer is not connected, for people."""

    cause: str
    since_ns: int  # wall clock: when it was last connected, or first missed
    attempts: int


class _Told(NamedTuple):
    """What a peer says of itself in its greeting."""

    incarnation: int
    addresses: tuple[Address, ...]


class PeerNetwork:
    """Links to all members. `deliver` gets the Raft messages of one frame, `unreachable` the id of a peer
    to which messages got lost; both are called from the loop, outside of any call of this class.

    `deliver` and a bug are the only things that end `run` with an error.
    """

    def __init__(self, credentials: Credentials, life: Life, clock: Clock, *,
                 deliver: Deliver, unreachable: Callable[[int], object],
                 advertise: Sequence[str] = ()) -> None:  # fmt: skip
        """`advertise`: where this node is found in this life, HOST:PORT; those it greets are told."""
        self.node_id = credentials.name.node_id
        self.deliver = deliver
        self.handlers: dict[str, Handler] = {}
        self.gathers = False  # who sends calls `flush` after it
        self._gathered: dict[int, Channel] = {}  # with messages that wait for it
        self.strangers: Strangers | None = None  # answers those without a certificate (`admission.py`)
        self.ports: list[int] = []  # listened on, while `run` runs
        self._life, self._clock = life, clock
        self._unreachable = unreachable
        self._members: Mapping[int, Member] = {}
        self._addresses: dict[int, tuple[Address, ...]] = {}
        self._advertise = tuple(advertise)
        self._told: dict[int, _Told] = {}  # where peers say they are found
        self._lives: dict[int, Life] = {}  # the latest one seen
        self._links: dict[tuple[int, LinkKind], Link] = {}
        self._incoming: dict[Incoming, None] = {}  # oldest first
        self._errors: dict[int, PeerError] = {}
        self._numbers = count(1)
        self._lost: dict[int, None] = {}  # peers to be reported as unreachable
        self._lossy = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._server = Server(self)
        self._use(credentials)

    # --- the port ---

    def send(self, to: int, message: Message) -> None:
        """Raft messages: in order while connected; may be lost, never blocks. With `gathers` they wait for
        `flush`."""
        link = self._links.get((to, LinkKind.MESSAGES))
        if link is None or link.channel is None or not link.push_message(frames.pack(message)):
            self._report_lost(to)
        elif self.gathers:
            self._gathered[to] = link.channel
        else:
            link.channel.flush()

    def flush(self) -> None:
        """What was sent since the last time leaves: that to one peer as one record, by one system call."""
        if self._gathered:
            for channel in self._gathered.values():
                channel.flush()
            self._gathered.clear()

    async def request(self, to: int, kind: str, body: Any, *, timeout_s: float) -> Any:
        """What the handler of `kind` at `to` returns, or the AspenError that it raises; arrays are tuples.

        PeerUnreachable at once without a connection, later if it ends or nothing comes in time: the
        request may have been carried out then. TooLarge.
        """
        assert to != self.node_id, "a request to oneself"
        number = next(self._numbers)
        frame = frames.encode_request(number, kind, body)
        bulk = kind.startswith(BULK_KINDS) or sum(map(len, frame)) > PEER_SMALL_REQUEST_BYTES
        link = self._links.get((to, LinkKind.BULK if bulk else LinkKind.MESSAGES))
        with trio.move_on_after(timeout_s):
            if link is not None and link.channel is None and to in self.connected():
                await link.up.wait()  # it lives: the other link is a moment behind
            if link is None or link.channel is None:
                raise PeerUnreachable(f"node {to} is not connected: {self._cause(to)}")
            return await link.channel.ask(number, frame)
        raise PeerUnreachable(f"node {to} did not answer {kind} in {timeout_s:g} s")

    def connected(self) -> Set[int]:
        """The peers that messages reach, as far as this node knows."""
        return {peer for (peer, kind), link in self._links.items()
                if kind == LinkKind.MESSAGES and link.channel is not None}  # fmt: skip

    def handle(self, kind: str, handler: Handler) -> None:
        """Who answers requests of that kind. An AspenError that it raises is the answer too."""
        assert kind not in self.handlers, kind
        self.handlers[kind] = handler

    # --- what the node tells it ---

    def set_members(self, members: Mapping[int, Member]) -> None:
        """The table, as of now: links come and go, addresses change, the removed are thrown out."""
        self._members = members = dict(members)
        for peer in [peer for peer in self._told if peer not in members]:
            del self._told[peer]
        known = {peer: self._places(peer, member) for peer, member in members.items()}
        moved = {peer for peer, found in known.items() if self._addresses.get(peer) != found}
        self._addresses = known
        wanted = {peer for peer, member in members.items()
                  if member.state != "removed" and peer != self.node_id}  # fmt: skip
        for key in [key for key in self._links if key[0] not in wanted]:
            self._links.pop(key).scope.cancel()
            self._errors.pop(key[0], None)
        for peer in sorted(wanted):
            for kind in LinkKind:
                link = self._links.get((peer, kind))
                if link is None:
                    link = self._links[peer, kind] = Link(self, peer, kind, self._clock.monotonic_ns)
                    if self._nursery is not None:
                        self._nursery.start_soon(link.run)
                elif peer in moved:
                    link.hurry()
        for channel in self._incoming:
            try:
                self._check_member(channel.peer, channel.born)
            except errors.ClusterError as error:
                channel.end(str(error), error)

    def set_credentials(self, credentials: Credentials) -> None:
        """A new certificate or other CAs: every connection is made anew, one after the other.

        Those that peers made stay until they make them anew; those under a CA that is no longer
        trusted end now.
        """
        self._use(credentials)
        for link in self._links.values():
            link.renew()
        trusted = {certificate.subject for certificate in credentials.bundle}
        for channel in self._incoming:
            if channel.issuer not in trusted:
                refusal = PeerRefused("the CA of its certificate is not trusted any more")
                channel.end(str(refusal), refusal)

    def _use(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self._server_context = credentials.server_context()
        self._client_context = credentials.client_context()

    # --- where peers are found ---

    def _places(self, peer: int, member: Member) -> tuple[Address, ...]:
        """What the table says, or, before it, what the peer itself has said since."""
        listed, told = _parsed(member.addresses), self._told.get(peer)
        if told is None or told.incarnation < member.topology:
            return listed
        return tuple(dict.fromkeys((*told.addresses, *listed)))

    def _take_in_addresses(self, hello: Hello) -> None:
        """A node that was away while others moved may know none of their addresses; they know its own. Who
        greets it is found again, long before the table has caught up."""
        addresses, peer = _parsed(hello.addresses), hello.node_id
        if not addresses:
            return
        self._told[peer] = _Told(hello.incarnation, addresses)
        places = self._places(peer, self._members[peer])
        if places != self._addresses.get(peer):
            log.info("peers: node=%d says that it is found at %s", peer, " ".join(map(str, addresses)))
            self._addresses[peer] = places
            for kind in LinkKind:
                if link := self._links.get((peer, kind)):
                    link.hurry()

    def found_at(self, peer: int) -> tuple[int, tuple[str, ...]]:
        """Since which start of it a member is found where; as it has said itself, or as the table says."""
        member, told = self._members.get(peer), self._told.get(peer)
        if member is None:
            return 0, ()
        if told is None or told.incarnation < member.topology or told.addresses == _parsed(member.addresses):
            return member.topology, member.addresses
        return told.incarnation, tuple(map(str, told.addresses))

    # --- what it tells about itself ---

    def peer_error(self, peer: int) -> PeerError | None:
        """Why messages do not reach that member; None if they do."""
        return self._errors.get(peer)

    def round_trip_ns(self, peer: int) -> int:
        """Of the last ping; 0 if not known."""
        link = self._links.get((peer, LinkKind.MESSAGES))
        return link.channel.round_trip_ns if link is not None and link.channel is not None else 0

    def _cause(self, peer: int) -> str:
        found = self._errors.get(peer)
        if found is not None:
            return found.cause
        return "no attempt was made yet" if peer in self._members else "it is not a member"

    # --- running ---

    async def run(self, listen: Sequence[str], *,
                  task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:  # fmt: skip
        """Listens, connects and serves until cancelled; no socket and no task is left then.

        `listen`: addresses as people write them, `*` is every interface. InvalidArgument, Busy.
        """
        listeners = await _listen([addresses.parse(each, listen=True) for each in listen])
        try:
            self.ports = [listener.socket.getsockname()[1] for listener in listeners]
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for link in self._links.values():
                    nursery.start_soon(link.run)
                nursery.start_soon(self._server.serve, listeners)
                nursery.start_soon(self._tell_losses)
                task_status.started()
        finally:
            self._nursery, self.ports = None, []
            for listener in listeners:
                listener.socket.close()

    def _report_lost(self, peer: int) -> None:
        self._lost[peer] = None
        self._lossy.set()

    async def _tell_losses(self) -> None:
        """Later, not within `send`: the core that sends is not to be entered again."""
        while True:
            await self._lossy.wait()
            self._lossy = trio.Event()
            lost, self._lost = self._lost, {}
            for peer in lost:
                self._unreachable(peer)

    # --- links.LinkOwner ---

    def hello(self, kind: LinkKind) -> Hello:
        name = self.credentials.name
        incarnation, mark, former = self._life
        return Hello(kind, name.cluster_id, name.node_id, incarnation, mark, self._advertise, former)

    def client_context(self) -> ssl.SSLContext:
        return self._client_context

    def addresses(self, peer: int) -> tuple[Address, ...]:
        return self._addresses.get(peer, ())

    def check_server(self, peer: int, name: NodeName | None) -> None:
        self._check_name(name)
        assert name is not None
        if name.node_id != peer:
            raise PeerRefused(f"node {name.node_id} answers where node {peer} should: correct its address")
        self._check_member(peer, name.born)

    def note_life(self, peer: int, life: Life) -> None:
        known, incarnation = self._lives.get(peer), life.incarnation
        if known is not None:
            lives_since = incarnation - known.incarnation
            if lives_since < 0:
                raise PeerRefused(f"node {peer} was started {known.incarnation} times, but this is start "
                                  f"number {incarnation}: {OLD_COPY}")  # fmt: skip
            if lives_since == 0 and life.mark != known.mark:
                raise PeerRefused(f"node {peer} runs twice: {COPIED}")
            if 0 < lives_since <= len(life.former) and life.former[lives_since - 1] != known.mark:
                raise PeerRefused(f"node {peer} does not know of its start number {known.incarnation}, which "
                                  f"was seen here: {OLD_COPY}")  # fmt: skip
            if lives_since == 0:
                return
        self._lives[peer] = life
        for channel in self._incoming:
            if channel.peer == peer and channel.hello.incarnation < incarnation:
                channel.end("the node was started again")
        for kind in LinkKind:
            if link := self._links.get((peer, kind)):
                link.hurry()

    def link_up(self, peer: int, kind: LinkKind) -> None:
        if kind == LinkKind.MESSAGES:
            self._errors.pop(peer, None)
            log.info("peers: node=%d connected", peer)

    def link_down(self, peer: int, kind: LinkKind, cause: str) -> None:
        if kind != LinkKind.MESSAGES or (peer, kind) not in self._links:
            return
        former = self._errors.get(peer)
        if former is None:
            self._report_lost(peer)
            self._errors[peer] = PeerError(cause, self._clock.time_ns(), 1)
        else:
            self._errors[peer] = PeerError(cause, former.since_ns, former.attempts + 1)
        if former is None or former.cause != cause:
            log.info("peers: node=%d not connected: %s", peer, cause)

    # --- server.ServerOwner ---

    def server_context(self) -> ssl.SSLContext:
        return self._server_context

    def check_client(self, name: NodeName, hello: Hello) -> None:
        self._check_name(name)
        if (hello.cluster_id, hello.node_id) != (name.cluster_id, name.node_id):
            raise PeerRefused("the greeting and the certificate name different nodes")
        self._check_member(name.node_id, name.born)
        self.note_life(name.node_id, Life(hello.incarnation, hello.process, hello.former))
        self._take_in_addresses(hello)

    def _check_name(self, name: NodeName | None) -> None:
        if name is None:
            raise PeerRefused("the certificate is not a node's")
        if name.cluster_id != self.credentials.name.cluster_id:
            raise errors.ForeignCluster(f"the certificate is of the cluster {name.cluster_id.hex()}, "
                                        f"not {self.credentials.name.cluster_id.hex()}")  # fmt: skip

    def _check_member(self, peer: int, born: bytes) -> None:
        if peer == self.node_id:
            raise PeerRefused(f"node {peer} calls itself: its state directory was copied, or its address "
                              "is another node's")  # fmt: skip
        member = self._members.get(peer)
        if member is None:
            raise PeerRefused(f"node {peer} is not among the members that node {self.node_id} knows")
        if member.state == "removed":
            raise PeerRefused(f"node {peer} {REMOVED}: empty its state directory and join again with a new "
                              "ticket")  # fmt: skip
        if member.born and member.born != born:
            raise IdentityLost(f"the log of node {peer} is not the one that it had when it became a member: "
                               "its disk was replaced; remove the member and join again with a new ticket")

    def welcome(self) -> Welcome:
        return Welcome(*self._life)

    def came_in(self, channel: Incoming) -> None:
        # A renewal leaves the former one to end by itself; many of them are a peer that lost track.
        same = [each for each in self._incoming
                if (each.peer, each.hello.link) == (channel.peer, channel.hello.link)]  # fmt: skip
        if len(same) >= _SAME_MAX:
            same[0].end("replaced by newer connections")
        self._incoming[channel] = None
        for kind in LinkKind:
            link = self._links.get((channel.peer, kind))
            if link is not None and link.channel is None:
                link.hurry()  # it is alive

    def went_away(self, channel: Incoming) -> None:
        del self._incoming[channel]

    def decode(self, peer: int, values: Sequence[Any]) -> Sequence[Message]:
        try:
            messages = [from_wire(value) for value in values]
        except InvalidArgument as error:
            raise ProtocolError(str(error)) from None
        for message in messages:
            if message.sender != peer or message.to != self.node_id:
                raise ProtocolError(f"a message from node {message.sender} to node {message.to}")
        return messages

    async def answer_stranger(self, kind: int, payload: bytes, host: str) -> bytes:
        if self.strangers is None:
            raise PeerRefused("a certificate of this cluster is needed")
        return await self.strangers(kind, payload, host)


def _parsed(texts: Sequence[str]) -> tuple[Address, ...]:
    found = []
    for text in texts:
        try:
            found.append(addresses.parse(text))
        except InvalidArgument as error:  # written by another release
            log.info("peers: %s", error)
    return tuple(found)


async def _listen(wanted: Sequence[Address]) -> list[trio.SocketListener]:
    listeners: list[trio.SocketListener] = []
    try:
        for address in wanted:
            listeners += await trio.open_tcp_listeners(address.port, host=address.host or None)
    except OSError as error:
        for listener in listeners:
            listener.socket.close()
        cause = f"cannot listen on {address}: {error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            raise errors.Busy(f"{cause}: another daemon is there, choose another port") from None
        raise InvalidArgument(cause) from None
    return listeners
