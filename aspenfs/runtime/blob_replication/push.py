"""Bringing chunks from the node that was given them to the others, until a majority has them on disk.

Belongs here: who has what, who is sent what and when, and when that is enough. A chunk is pushed as soon
as it was put, so that it usually is where it must be when the transaction that names it is proposed;
`ensure` waits for the rest. Each peer has a queue of its own: one that is slow, full or gone holds up nobody
while a majority does without it, and what it missed it fetches itself (`repair.py`).

All methods run in the loop's thread. What is between two awaits is atomic.
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

import trio

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.cluster.types import Configuration, NodeId
from aspenfs.limits import (
    BLOB_ASK_MAX,
    BLOB_FACTS_MAX,
    BLOB_PIN_S,
    BLOB_PUSH_BYTES_MAX,
    BLOB_PUSH_QUEUE_MAX,
    BLOB_PUSH_REQUESTS_MAX,
    PROPOSAL_TIMEOUT_MS,
)
from aspenfs.runtime.blob_replication import wire
from aspenfs.runtime.blob_replication.wire import BATCH_BYTES_MAX, CHUNK_OVERHEAD, Peers, Verdict

logger = logging.getLogger(__name__)

ENSURE_TIMEOUT_S: Final = PROPOSAL_TIMEOUT_MS / 1000
REQUEST_TIMEOUT_S: Final = 10.0
RENEW_S: Final = 0.25  # who came back meanwhile, and what voters are there now, is looked at so often
PAUSE_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # after a failure, before the next try
FULL_NS: Final = 2 * 10**9  # a peer without room is sent nothing for so long
# What a node has answered is relied on for so long: its pin, which began later, outlasts the proposal.
FRESH_NS: Final = BLOB_PIN_S * 10**9 // 4


def has_majority(configuration: Configuration, holders: Collection[int]) -> bool:
    """Is a majority of each half of the voters among `holders`?"""
    for half in (configuration.voters, configuration.outgoing):
        if half and 2 * sum(voter in holders for voter in half) <= len(half):
            return False
    return True


class _Chunk:
    """A chunk on its way, and what is known of who has it."""

    __slots__ = ("began_ns", "data", "digest", "dropped", "failure", "full", "holders", "queued", "settled",
                 "size", "users")  # fmt: skip

    def __init__(self, digest: bytes, size: int, began_ns: int) -> None:
        self.digest, self.size, self.began_ns = digest, size, began_ns
        self.data: bytes | None = None  # read from the store when it is sent, if not here
        self.holders: set[int] = set()  # who has it on disk
        self.queued: set[int] = set()  # whose queue it is in, or whose answer is to come
        self.full: set[int] = set()  # who has no room for it
        self.users = 0  # who wait for it
        self.settled = trio.Event()  # a majority has it, or `failure` says why none will
        self.failure: errors.AspenError | None = None
        self.dropped = False  # nobody wants it any more


class _Peer:
    __slots__ = ("failures", "full_until_ns", "in_flight", "node", "paused", "queue", "starting")

    def __init__(self, node: NodeId) -> None:
        self.node = node
        self.queue: deque[tuple[_Chunk, bool]] = deque()  # with True: it may have it, ask first
        self.in_flight = self.failures = 0
        self.full_until_ns = 0  # it said that it has no room; not asked again before
        self.starting = self.paused = False


class Pusher:
    """See the head of this file."""

    def __init__(self, blobs: BlobStore, peers: Peers, configuration: Callable[[], Configuration],
                 node: NodeId, sync: Callable[[], Awaitable[None]],
                 now_ns: Callable[[], int]) -> None:  # fmt: skip
        """`sync` returns when what was put here before is on disk."""
        self._blobs, self._peers, self._configuration, self._node = blobs, peers, configuration, node
        self._sync, self._now = sync, now_ns
        self._nursery: trio.Nursery | None = None
        self._chunks: dict[bytes, _Chunk] = {}
        self._queues: dict[int, _Peer] = {}
        self._held_bytes = 0
        self.pushed_bytes = self.pushed_chunks = 0  # acknowledged, each peer counted
        self.active_ns = 0  # when something was pushed here last

    def start(self, nursery: trio.Nursery) -> None:
        """From here on things are sent."""
        self._nursery = nursery
        for peer in self._queues.values():
            self._pump(peer)

    def stop(self) -> None:
        self._nursery = None

    @property
    def held_bytes(self) -> int:
        """Of chunks in memory, beside those in messages under way."""
        return self._held_bytes

    # --- what others call ---

    def push(self, digest: bytes, data: bytes) -> None:
        """Begins to bring a chunk that was just put here to all who are connected. Does not wait."""
        chunk = self._fresh(digest)
        if chunk is None:
            self._begin(digest, len(data), data)

    async def ensure(self, digests: Sequence[bytes]) -> None:
        """Waits until a majority of each half of the voters has these chunks on disk, and spares them.

        NoQuorum if that takes too long; NoSpace if too many have no room. SyncFailed.
        """
        waiting = []
        for digest in digests:
            chunk = self._fresh(digest)
            if chunk is None:
                chunk = self._begin(digest, self._length(digest), None)
            if chunk.settled.is_set() and not has_majority(self._configuration(), chunk.holders):
                chunk.settled = trio.Event()  # the voters are others now
            if not chunk.settled.is_set():
                waiting.append(chunk)
        if waiting:
            await self._wait(waiting)

    # --- waiting ---

    async def _wait(self, chunks: list[_Chunk]) -> None:
        self._keep_here(chunks)
        for chunk in chunks:
            chunk.users += 1
        try:
            with trio.move_on_after(ENSURE_TIMEOUT_S) as scope:
                for chunk in chunks:
                    while not chunk.settled.is_set():
                        self._renew(chunk)
                        with trio.move_on_after(RENEW_S):
                            await chunk.settled.wait()
                    if chunk.failure is not None:
                        raise chunk.failure.with_traceback(None)
            if scope.cancelled_caught:
                raise self._no_quorum(chunks)
        finally:
            for chunk in chunks:
                chunk.users -= 1
                if not chunk.users and not chunk.settled.is_set():
                    self._drop(chunk)

    def _no_quorum(self, chunks: list[_Chunk]) -> errors.NoQuorum:
        late = [chunk for chunk in chunks if not chunk.settled.is_set()]
        voters = {*self._configuration().voters, *self._configuration().outgoing}
        missing = sorted(voters - late[0].holders) if late else []
        connected = self._peers.connected()
        which = ", ".join(f"{node}{'' if node in connected else ' (not connected)'}" for node in missing)
        return errors.NoQuorum(
            f"{len(late)} chunks are not on disk on a majority after {ENSURE_TIMEOUT_S:g} s: "
            f"they are missing on node {which}"
        )

    def _renew(self, chunk: _Chunk) -> None:
        """Asks those who were not asked: they were not connected, or no voters yet."""
        configuration = self._configuration()
        self._settle(chunk, configuration)
        connected = self._peers.connected()
        for node in {*configuration.voters, *configuration.outgoing}:
            if node in connected and not (
                node in chunk.queued or node in chunk.holders or node in chunk.full or node == self._node
            ):
                self._enqueue(node, chunk, chunk.data is None)
        self._keep_here([chunk])

    def _keep_here(self, chunks: list[_Chunk]) -> None:
        """This node counts too, once its own disk has them."""
        own = [
            chunk for chunk in chunks if self._node not in chunk.queued and self._node not in chunk.holders
        ]
        if own and self._nursery is not None:
            for chunk in own:
                chunk.queued.add(self._node)
            self._nursery.start_soon(self._sync_here, own)

    async def _sync_here(self, chunks: list[_Chunk]) -> None:
        here = [chunk for chunk in chunks if self._blobs.has(chunk.digest)]
        await self._sync()
        for chunk in chunks:
            chunk.queued.discard(self._node)
        for chunk in here:
            self._has(chunk, self._node)

    # --- chunks ---

    def _fresh(self, digest: bytes) -> _Chunk | None:
        chunk = self._chunks.get(digest)
        if chunk is None or chunk.dropped or self._now() - chunk.began_ns > FRESH_NS:
            return None
        return chunk

    def _length(self, digest: bytes) -> int:
        """0 if it is not here: then the others may have it all the same."""
        try:
            return self._blobs.length(digest)
        except errors.NotFound:
            return 0

    def _begin(self, digest: bytes, size: int, data: bytes | None) -> _Chunk:
        """Without `data`, the others are asked first: what was here before may be there too."""
        self.active_ns = now = self._now()
        chunk = self._chunks[digest] = _Chunk(digest, size, now)
        if data is not None and self._held_bytes + size <= BLOB_PUSH_BYTES_MAX:
            chunk.data = data
            self._held_bytes += size
        configuration = self._configuration()
        members = {*configuration.voters, *configuration.outgoing, *configuration.learners}
        for node in self._peers.connected():
            if node in members and node != self._node:
                self._enqueue(node, chunk, data is None)
        while len(self._chunks) > BLOB_FACTS_MAX:
            oldest = self._chunks.pop(next(iter(self._chunks)))
            if not oldest.users and not oldest.settled.is_set():
                self._drop(oldest)
        return chunk

    def _has(self, chunk: _Chunk, node: int) -> None:
        chunk.holders.add(node)
        self._settle(chunk, self._configuration())

    def _settle(self, chunk: _Chunk, configuration: Configuration) -> None:
        if chunk.settled.is_set():
            return
        if not has_majority(configuration, chunk.holders):
            if not chunk.full:
                return
            voters = {*configuration.voters, *configuration.outgoing}
            if has_majority(configuration, voters - chunk.full | chunk.holders):
                return  # without those that have no room
            nodes = ", ".join(map(str, sorted(chunk.full)))
            chunk.failure = errors.NoSpace(f"a majority is needed, and node {nodes} has no room for blobs")
            chunk.dropped = True
        self._release(chunk)  # who lags gets it from the store
        chunk.settled.set()

    def _drop(self, chunk: _Chunk) -> None:
        chunk.dropped = True
        self._release(chunk)

    def _release(self, chunk: _Chunk) -> None:
        if chunk.data is not None:
            chunk.data = None
            self._held_bytes -= chunk.size

    # --- one peer ---

    def _enqueue(self, node: NodeId | int, chunk: _Chunk, ask: bool) -> None:
        peer = self._queues.get(node)
        if peer is None:
            peer = self._queues[node] = _Peer(NodeId(node))
        if self._now() < peer.full_until_ns:
            chunk.full.add(node)
            self._settle(chunk, self._configuration())
            return
        queue = peer.queue
        while len(queue) >= BLOB_PUSH_QUEUE_MAX and queue[0][0].settled.is_set():
            queue.popleft()[0].queued.discard(node)
        queue.append((chunk, ask))
        chunk.queued.add(node)
        self._pump(peer)

    def _pump(self, peer: _Peer) -> None:
        """One more request, if there is something to send and room for it on the way."""
        if self._nursery is None or peer.starting or peer.paused or not peer.queue:
            return
        if peer.in_flight < BLOB_PUSH_REQUESTS_MAX:
            peer.starting = True  # what is queued before it starts goes with it
            self._nursery.start_soon(self._send, peer)

    async def _send(self, peer: _Peer) -> None:
        peer.starting = False
        ask, batch, body = self._take(peer)
        if not batch:
            return
        peer.in_flight += 1
        self._pump(peer)
        try:
            if ask:
                answer = await self._peers.request(peer.node, wire.HAVE, body, timeout_s=REQUEST_TIMEOUT_S)
                self._asked(peer, batch, wire.flags_of(answer, len(batch)))
            else:
                answer = await self._peers.request(peer.node, wire.PUT, body, timeout_s=REQUEST_TIMEOUT_S)
                self._stored(peer, batch, wire.verdicts_of(answer, len(batch)))
        except errors.AspenError as error:
            self._failed(peer, batch, ask, error)
        finally:
            peer.in_flight -= 1
        self._pump(peer)

    def _take(self, peer: _Peer) -> tuple[bool, list[_Chunk], list[bytes] | list[tuple[bytes, bytes]]]:
        """The next chunks of the queue that go together: asked for, or sent."""
        queue, node = peer.queue, peer.node
        batch: list[_Chunk] = []
        sent: list[tuple[bytes, bytes]] = []
        size = 0
        asked = queue[0][1] if queue else False
        while queue and len(batch) < BLOB_ASK_MAX:
            chunk, ask = queue[0]
            wanted = not chunk.dropped and node not in chunk.holders and not (ask and chunk.settled.is_set())
            if wanted:
                if batch and (ask != asked or size + chunk.size + CHUNK_OVERHEAD > BATCH_BYTES_MAX):
                    break
                asked = ask
                if not ask:
                    data = chunk.data or self._read(chunk.digest)
                    wanted = data is not None
                    if data is not None:
                        sent.append((chunk.digest, data))
                        size += len(data) + CHUNK_OVERHEAD
            queue.popleft()
            if wanted:
                batch.append(chunk)
            else:
                chunk.queued.discard(node)
        return asked, batch, [chunk.digest for chunk in batch] if asked else sent

    def _read(self, digest: bytes) -> bytes | None:
        try:
            return self._blobs.read(digest)
        except (errors.NotFound, errors.StorageError):
            return None  # no use to anybody

    def _asked(self, peer: _Peer, batch: list[_Chunk], flags: bytes) -> None:
        peer.failures = 0
        for chunk, flag in zip(batch, flags, strict=True):
            chunk.queued.discard(peer.node)
            if flag:
                self._has(chunk, peer.node)
            elif not chunk.settled.is_set():
                self._enqueue(peer.node, chunk, False)

    def _stored(self, peer: _Peer, batch: list[_Chunk], verdicts: list[Verdict]) -> None:
        busy = []
        for chunk, verdict in zip(batch, verdicts, strict=True):
            if verdict == Verdict.BUSY:
                busy.append(chunk)
                continue
            chunk.queued.discard(peer.node)
            if verdict == Verdict.STORED:
                self.pushed_bytes += chunk.size
                self.pushed_chunks += 1
                self._has(chunk, peer.node)
            elif verdict == Verdict.FULL:
                peer.full_until_ns = self._now() + FULL_NS
                chunk.full.add(peer.node)
                self._settle(chunk, self._configuration())
            else:
                logger.error("node=%d chunk=%s was damaged on its way", peer.node, chunk.digest.hex())
        if busy:
            self._failed(peer, busy, False, errors.Overloaded("it spares as much as it can"))
        else:
            peer.failures = 0

    def _failed(self, peer: _Peer, batch: list[_Chunk], ask: bool, error: errors.AspenError) -> None:
        """What is still wanted goes again, after a pause; the rest is left to the peer's own repair."""
        for chunk in reversed(batch):
            if chunk.dropped or chunk.settled.is_set():
                chunk.queued.discard(peer.node)
            else:
                peer.queue.appendleft((chunk, ask))
        if not peer.failures:
            logger.info("node=%d does not take chunks: %s", peer.node, error)
        if not peer.paused and self._nursery is not None:
            peer.paused = True
            pause = PAUSE_S[min(peer.failures, len(PAUSE_S) - 1)]
            peer.failures += 1
            self._nursery.start_soon(self._resume, peer, pause)

    async def _resume(self, peer: _Peer, pause_s: float) -> None:
        await trio.sleep(pause_s)
        peer.paused = False
        if peer.node not in self._peers.connected():
            for chunk, _ in peer.queue:
                chunk.queued.discard(peer.node)
            peer.queue.clear()  # `_renew` asks it again when it is back, if it still matters then
        self._pump(peer)
