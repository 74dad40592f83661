"""Getting chunks from other nodes: for a reader that waits, for what it will read next, and for repair.

Belongs here: which peer is asked, what happens when it is slow or has it not, and that nobody asks twice
for the same chunk. What arrives is compared with its digest and kept; a damaged copy here is healed by that.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import trio

from aspenfs import errors
from aspenfs.blobs.format import digest_of
from aspenfs.blobs.store import BlobStore
from aspenfs.cluster.types import NodeId
from aspenfs.limits import BLOB_ASK_MAX, BLOB_FETCH_REQUESTS_MAX
from aspenfs.runtime.blob_replication import wire
from aspenfs.runtime.blob_replication.wire import Peers

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S: Final = 10.0
HEDGE_S: Final = 0.5  # while a reader waits, a peer that has not answered by then gets company
AVOID_NS: Final = 5 * 10**9  # a peer that failed is asked last for so long
GROUP: Final = 8  # chunks asked for together: small ones share a round trip, large ones several peers
WANTS_MAX: Final = 1_024  # more are not fetched ahead


class _Want:
    """A chunk that is being fetched, and who waits for it."""

    __slots__ = ("answers", "data", "digest", "done", "found", "kept", "started", "waiting")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.done = trio.Event()
        self.found = self.kept = self.started = False
        self.data: bytes | None = None  # for those who wait
        self.waiting = 0
        self.answers: list[str] = []  # of those who did not have it


class Lacking(NamedTuple):
    """Of chunks that were to be fetched, those that are not here, and why."""

    nowhere: list[bytes]  # nobody who was asked has them
    no_room: list[bytes]  # somebody does, and this node's disk does not take them


class Fetcher:
    """See the head of this file. All methods run in the loop's thread."""

    def __init__(self, blobs: BlobStore, peers: Peers, now_ns: Callable[[], int],
                 has_room: Callable[[], bool], kept: Callable[[bytes], object]) -> None:  # fmt: skip
        """`kept` hears of each chunk that was stored here."""
        self._blobs, self._peers, self._now, self._kept = blobs, peers, now_ns, kept
        self.has_room = has_room
        self._nursery: trio.Nursery | None = None
        self._wants: dict[bytes, _Want] = {}
        self._background = trio.CapacityLimiter(BLOB_FETCH_REQUESTS_MAX)
        self._load: dict[int, int] = {}  # requests under way
        self._failed_ns: dict[int, int] = {}
        self.fetched_bytes = self.fetched_chunks = 0
        self.active_ns = 0  # when a reader waited last

    def start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def stop(self) -> None:
        self._nursery = None

    @property
    def under_way(self) -> int:
        return len(self._wants)

    async def fetch(self, digest: bytes, ahead: Sequence[bytes] = ()) -> bytes:
        """The chunk; those `ahead` come in the background. Unavailable."""
        self.active_ns = self._now()
        want = self._wants.get(digest) or self._want(digest)
        if not want.started:  # also if it waits for its turn in the background
            want.started = True
            self._start([want], None)
        new = [other for other in ahead if other not in self._wants]
        self._in_background(new[: max(0, WANTS_MAX - len(self._wants))])
        want.waiting += 1
        try:
            await want.done.wait()
        finally:
            want.waiting -= 1
        if want.data is None:
            answers = "; ".join(want.answers) or "no other node is connected"
            raise errors.Unavailable(
                f"chunk {digest.hex()} can not be read here, and nowhere else: {answers}; "
                "start the node that wrote it, or restore the file from a backup (`aspen check` names it)"
            )
        return want.data

    async def fill(self, digests: Iterable[bytes]) -> Lacking:
        """Fetches these in the background."""
        digests = list(digests)
        self._in_background([digest for digest in digests if digest not in self._wants])
        wants = [self._wants[digest] for digest in digests if digest in self._wants]
        for want in wants:
            await want.done.wait()
        return Lacking(
            nowhere=[want.digest for want in wants if not want.found],
            no_room=[want.digest for want in wants if want.found and not want.kept],
        )

    def _want(self, digest: bytes) -> _Want:
        want = self._wants[digest] = _Want(digest)
        return want

    def _in_background(self, digests: Sequence[bytes]) -> None:
        for at in range(0, len(digests), GROUP):
            group = dict.fromkeys(digests[at : at + GROUP])
            self._start([self._want(digest) for digest in group], self._background)

    def _start(self, wants: list[_Want], limiter: trio.CapacityLimiter | None) -> None:
        if self._nursery is None:
            for want in wants:
                want.answers.append("this node is stopping")
                self._end(want)
        else:
            self._nursery.start_soon(self._obtain, wants, limiter)

    def _end(self, want: _Want) -> None:
        del self._wants[want.digest]
        want.done.set()

    # --- asking ---

    async def _obtain(self, wants: list[_Want], limiter: trio.CapacityLimiter | None) -> None:
        """Asks one peer after the other until all are there; the next one also when the last is slow."""
        try:
            if limiter is None:
                await self._ask_around(wants, HEDGE_S)
            else:
                async with limiter:
                    for want in wants:
                        want.started = True
                    await self._ask_around(wants, REQUEST_TIMEOUT_S)
        finally:
            for want in wants:
                if not want.done.is_set():
                    self._end(want)

    async def _ask_around(self, wants: list[_Want], patience_s: float) -> None:
        async with trio.open_nursery() as nursery:
            for node in self._in_order():
                answered = trio.Event()
                self._load[node] = self._load.get(node, 0) + 1
                nursery.start_soon(self._ask, node, wants, answered, nursery.cancel_scope)
                with trio.move_on_after(patience_s):
                    await answered.wait()

    def _in_order(self) -> list[NodeId]:
        """The best first: it has not failed lately, and has little to do for us."""
        now, failed, load = self._now(), self._failed_ns, self._load
        return sorted(
            map(NodeId, self._peers.connected()),
            key=lambda node: (now - failed.get(node, -AVOID_NS) < AVOID_NS, load.get(node, 0), node),
        )

    async def _ask(
        self, node: NodeId, wants: list[_Want], answered: trio.Event, others: trio.CancelScope
    ) -> None:
        asked = [want for want in wants if not want.done.is_set()]
        try:
            while asked and (found := await self._request(node, asked)):
                for want, data in zip(asked, found, strict=False):
                    self._take(want, node, data)
                    await trio.lowlevel.checkpoint()  # each one was hashed and written: some 0.4 ms
                asked = [want for want in asked[len(found) :] if not want.done.is_set()]
        finally:
            self._load[node] -= 1
            answered.set()
        if all(want.done.is_set() for want in wants):
            others.cancel()

    async def _request(self, node: NodeId, wants: list[_Want]) -> list[bytes | None]:
        """What it has of the first of these; nothing if it fails."""
        body = [want.digest for want in wants[:BLOB_ASK_MAX]]
        try:
            answer = await self._peers.request(node, wire.GET, body, timeout_s=REQUEST_TIMEOUT_S)
            return wire.found_of(answer, len(body))
        except errors.AspenError as error:
            logger.info("node=%d gives no chunks: %s", node, error)
            self._failed_ns[node] = self._now()
            for want in wants:
                want.answers.append(f"node {node}: {error}")
            return []

    def _take(self, want: _Want, node: NodeId, data: bytes | None) -> None:
        if want.done.is_set():
            return
        if data is None:
            want.answers.append(f"node {node} does not have it")
            return
        if digest_of(data) != want.digest:
            want.answers.append(f"node {node} sends other bytes")
            logger.error("node=%d chunk=%s is not what it sent", node, want.digest.hex())
            return
        self.fetched_bytes += len(data)
        self.fetched_chunks += 1
        if want.waiting:
            want.data = data
        want.found, want.kept = True, self._keep(want.digest, data)
        self._end(want)

    def _keep(self, digest: bytes, data: bytes) -> bool:
        """False without room for it: who waits gets it all the same."""
        try:
            if not self.has_room():
                return False
            self._blobs.add(digest, data)
        except errors.NoSpace:
            return False
        self._kept(digest)
        return True
