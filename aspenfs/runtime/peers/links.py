"""The end of a link that connects: finding the peer, proving who both are, sending, asking, trying again.

Belongs here: one `Link` for each peer and kind, and the `Outgoing` connection that it has now. Not
here: the end that accepts (`server.py`), which links there are (`network.py`).

A link has at most one connection that is used. A renewal makes the next one first; the old one is
*retired*: nothing new goes over it, and it ends when what was asked over it has been answered.
"""

import random
import ssl
from collections.abc import Callable
from typing import Any, Final, Protocol

import trio

from aspenfs import errors
from aspenfs.errors import AspenError, PeerRefused, PeerUnreachable, ProtocolError
from aspenfs.limits import (
    KIB,
    MIB,
    PEER_BACKOFF_MS_MAX,
    PEER_BACKOFF_MS_MIN,
    PEER_FRAME_BYTES_MAX,
    PEER_GREETING_BYTES_MAX,
    PEER_HANDSHAKE_S,
    PEER_IDLE_MS,
    PEER_LINK_BYTES_MAX,
    PEER_LINK_S_MAX,
    PEER_QUEUE_BYTES_MAX,
    PEER_REQUESTS_BYTES_MAX,
    PEER_REQUESTS_MAX,
)
from aspenfs.runtime.identity import Life
from aspenfs.runtime.peers import addresses, ca, frames
from aspenfs.runtime.peers.addresses import Address
from aspenfs.runtime.peers.ca import NodeName
from aspenfs.runtime.peers.channel import Channel, unreadable
from aspenfs.runtime.peers.frames import Hello, LinkKind, Parts, Type, Welcome
from aspenfs.runtime.peers.stream import Broken, TlsStream

UNSENT_BYTES: Final = {LinkKind.MESSAGES: 128 * KIB, LinkKind.BULK: 1 * MIB}


_chance = random.Random()  # own: nobody else's seed makes peers collide


class LinkOwner(Protocol):
    """What a link needs to know of its node, at each attempt anew; `network.PeerNetwork`."""

    def hello(self, kind: LinkKind) -> Hello: ...

    def client_context(self) -> ssl.SSLContext: ...

    def addresses(self, peer: int) -> tuple[Address, ...]: ...

    def check_server(self, peer: int, name: NodeName | None) -> None:
        """PeerRefused unless a certificate of that name may answer where `peer` was called."""

    def note_life(self, peer: int, life: Life) -> None:
        """PeerRefused if another life of the peer is known that this one does not follow."""

    def link_up(self, peer: int, kind: LinkKind) -> None: ...

    def link_down(self, peer: int, kind: LinkKind, cause: str) -> None:
        """An attempt failed, or a connection was lost."""


class _Asked:
    """One request on its way."""

    __slots__ = ("answer", "answered", "error")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.answer: Any = None
        self.error: AspenError | None = None


class Outgoing(Channel):
    """A connection that this node made. Requests over it; nothing comes in but answers."""

    def __init__(self, stream: TlsStream, peer: int, clock: Callable[[], int]) -> None:
        super().__init__(stream)
        self.peer = peer
        self.due = trio.Event()  # the link should get another connection: this one is over, or old
        self.round_trip_ns = 0  # of the last ping; 0: none yet
        self._clock = clock
        self._asked: dict[int, _Asked] = {}
        self._asked_bytes = 0
        self._waiting = trio.lowlevel.ParkingLot()
        self._retired = False
        self._renew_at = trio.current_time() + PEER_LINK_S_MAX * _chance.uniform(0.9, 1.0)

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            self.due.set()
            for asked in self._asked.values():
                asked.error = PeerUnreachable(f"node {self.peer} went away before it answered: {self.cause}")
                asked.answered.set()
            self._waiting.unpark_all()

    # --- requests ---

    async def ask(self, number: int, frame: Parts) -> Any:
        """Sends a request, waits for its answer, returns it or raises the error that it is.

        Waits its turn while too many are under way. The caller brings the timeout: when this is
        cancelled, the other end is told that nobody waits any more.
        """
        size = sum(map(len, frame))
        await self._await_turn(size)
        self._asked[number] = asked = _Asked()
        self._asked_bytes += size
        self.push(*frame)
        try:
            await asked.answered.wait()
        finally:
            del self._asked[number]
            self._asked_bytes -= size
            self._waiting.unpark()
            if not asked.answered.is_set():
                self.push(frames.encode(Type.CANCEL, (number,)))
            self._end_if_retired()
        if asked.error is not None:
            raise asked.error
        return asked.answer

    async def _await_turn(self, size: int) -> None:
        while self._asked and (len(self._asked) >= PEER_REQUESTS_MAX
                               or self._asked_bytes + size > PEER_REQUESTS_BYTES_MAX):  # fmt: skip
            try:
                await self._waiting.park()
            except trio.Cancelled:
                self._waiting.unpark()  # what woke this one up may be for another
                raise
        if self.over.is_set():
            raise PeerUnreachable(f"node {self.peer}: {self.cause}")
        self._waiting.unpark()  # there may be room for a further one

    # --- retirement ---

    def retire(self) -> None:
        """Ends when all that was asked has been answered and all that waits has been sent."""
        self._retired = True
        self._end_if_retired()

    def _end_if_retired(self) -> None:
        if self._retired and not self._asked and not self.queued_bytes:
            self.end("replaced by a newer connection")

    def _emptied(self) -> None:
        self._end_if_retired()

    def _looked(self) -> None:
        self.push(frames.encode(Type.PING, (self._clock(),)))
        used = self.stream.bytes_sent + self.stream.bytes_received
        if used > PEER_LINK_BYTES_MAX or trio.current_time() > self._renew_at:
            self.due.set()

    # --- what comes in ---

    async def _read(self) -> None:
        while True:
            for frame in await self.stream.receive(PEER_FRAME_BYTES_MAX):
                with unreadable(self.peer):
                    self._take_in(*frames.split(frame))

    def _take_in(self, kind: int, payload: memoryview) -> None:
        if kind == Type.ANSWER:
            number, answer = frames.decode_answer(payload)
            self._answered(number, answer, None)
        elif kind == Type.FAILURE:
            number, error = frames.decode_failure(payload)
            self._answered(number, None, error)
        elif kind == Type.PONG:
            (sent,) = frames.decode_numbers(payload, 1)
            if sent:  # else it only says that it lives
                self.round_trip_ns = max(1, self._clock() - sent)
        elif kind == Type.REFUSED:
            raise Broken(f"it says: {frames.decode_refusal(payload)}")
        else:
            raise ProtocolError(f"a frame of type {kind} is not for the end that connected")

    def _answered(self, number: int, answer: Any, error: AspenError | None) -> None:
        asked = self._asked.get(number)  # None: nobody waits any more
        if asked is not None:
            asked.answer, asked.error = answer, error
            asked.answered.set()


class Link:
    """Keeps a connection of one kind to one peer, as long as `run` runs."""

    def __init__(self, owner: LinkOwner, peer: int, kind: LinkKind, clock: Callable[[], int]) -> None:
        self.peer, self.kind = peer, kind
        self.channel: Outgoing | None = None  # the one that is used
        self.up = trio.Event()  # while there is one
        self._owner, self._clock = owner, clock
        self._hurry = trio.Event()
        self._good: Address | None = None  # the address that worked last
        self.scope = trio.CancelScope()

    def push_message(self, packed: bytes) -> bool:
        """Whether the message is on its way, as far as this node knows."""
        channel = self.channel
        if channel is None or channel.queued_bytes + len(packed) > PEER_QUEUE_BYTES_MAX:
            return False
        channel.push_message(packed)
        return True

    def hurry(self) -> None:
        """Something has changed: an attempt is worth while now."""
        self._hurry.set()

    def renew(self) -> None:
        """What the connection was made with is outdated: make another one."""
        if self.channel is not None:
            self.channel.due.set()
        self.hurry()

    async def run(self) -> None:
        """Until cancelled (`scope`)."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                pause_ms = float(PEER_BACKOFF_MS_MIN)
                while True:
                    try:
                        channel = await self._connect()
                    except AspenError as error:
                        if self.channel is None:
                            self._owner.link_down(self.peer, self.kind, str(error))
                        await self._pause(pause_ms)
                        pause_ms = min(2 * pause_ms, PEER_BACKOFF_MS_MAX)
                        continue
                    began = trio.current_time()
                    self._use(channel, nursery)
                    await channel.due.wait()
                    if trio.current_time() - began > PEER_BACKOFF_MS_MAX / 1000:
                        pause_ms = PEER_BACKOFF_MS_MIN
                    if channel.over.is_set():
                        await self._pause(pause_ms)
                        pause_ms = min(2 * pause_ms, PEER_BACKOFF_MS_MAX)

    def _use(self, channel: Outgoing, nursery: trio.Nursery) -> None:
        former, self.channel = self.channel, channel
        self.up.set()
        nursery.start_soon(self._run_channel, channel)
        if former is not None:
            former.retire()
        self._owner.link_up(self.peer, self.kind)

    async def _run_channel(self, channel: Outgoing) -> None:
        await channel.run()
        if self.channel is channel:
            self.channel, self.up = None, trio.Event()
            self._owner.link_down(self.peer, self.kind, channel.cause)

    async def _pause(self, pause_ms: float) -> None:
        """Half of it is random: peers that lost each other at the same time do not collide for ever."""
        self._hurry = trio.Event()
        with trio.move_on_after(pause_ms * _chance.uniform(0.5, 1.0) / 1000):
            await self._hurry.wait()

    # --- one attempt ---

    async def _connect(self) -> Outgoing:
        """PeerUnreachable, PeerRefused, or what else the peer answers."""
        known = self._owner.addresses(self.peer)
        failures: list[AspenError] = []
        for address in sorted(known, key=lambda each: each != self._good):
            try:
                channel = await self._connect_to(address)
            except AspenError as error:
                failures.append(error)
                continue
            self._good = address
            return channel
        # What somebody answered is worth more than that nobody did.
        answered = [error for error in failures if not isinstance(error, PeerUnreachable)]
        raise (answered or failures or [PeerUnreachable(f"node {self.peer} has no known address")])[0]

    async def _connect_to(self, address: Address) -> Outgoing:
        sock = await addresses.connect(address)
        addresses.tune(sock, unsent_bytes=UNSENT_BYTES[self.kind], silence_ms=PEER_IDLE_MS)
        stream = TlsStream(sock, self._owner.client_context(), server=False)
        try:
            with trio.move_on_after(PEER_HANDSHAKE_S):
                welcome = await self._greet(stream)
                self._owner.note_life(self.peer, Life(*welcome))
                return Outgoing(stream, self.peer, self._clock)
        except Broken as error:
            stream.close()
            raise PeerUnreachable(f"{address}: {error}") from None
        except BaseException:
            stream.close()
            raise
        stream.close()
        raise PeerUnreachable(f"{address}: no greeting in {PEER_HANDSHAKE_S} s")

    async def _greet(self, stream: TlsStream) -> Welcome:
        await stream.handshake()
        certificate = stream.peer_certificate()
        self._owner.check_server(self.peer, ca.name_of(certificate) if certificate else None)
        await stream.send([frames.encode_hello(self._owner.hello(self.kind))])
        kind, payload = frames.split((await stream.receive(PEER_GREETING_BYTES_MAX))[0])
        if kind == Type.REFUSED:
            refusal = frames.decode_refusal(payload)
            raise refusal if isinstance(refusal, errors.ClusterError) else PeerRefused(str(refusal))
        if kind != Type.WELCOME:
            raise ProtocolError(f"node {self.peer} answers a greeting with a frame of type {kind}")
        return frames.decode_welcome(payload)
